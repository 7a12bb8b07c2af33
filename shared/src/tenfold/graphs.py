"""Traced networks as files, ONNX or torch's exported program, and such files as functions."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tenfold.errors import UserError

GraphFormat = Literal["onnx", "pt2"]
"""ONNX, or torch.export's own."""

_ONNX = ("onnx", "onnxscript", "onnxruntime")


def check_graph_format(format: str, package: str) -> None:
    """Make sure that a graph can be written in this format here.

    Args:
        format: a `GraphFormat`.
        package: whose extra "export" brings what ONNX needs.

    Raises:
        UserError: an unknown format, or packages that it needs are missing.
    """
    if format not in get_args(GraphFormat):
        fix = f"choose {', '.join(get_args(GraphFormat))}"
        raise UserError(f"unknown format {format!r} of a graph", fix=fix)
    lacking = [name for name in _ONNX if importlib.util.find_spec(name) is None]
    if format == "onnx" and lacking:
        fix = f'pip install "{package}[export]"'
        raise UserError(f"format onnx needs {', '.join(lacking)}", fix=fix)


def write_graph(
    program: torch.export.ExportedProgram,
    path: str | Path,
    format: GraphFormat,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> None:
    """Write a traced network.

    Args:
        program: of `torch.export.export`.
        path: the file.
        format: see `GraphFormat`.
        inputs: names of what it takes; ONNX keeps them.
        outputs: likewise of what it gives.
    """
    with warnings.catch_warnings():
        # of torch's exporter about its own libraries
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        # weights in channels_last are whole, but not in the order that torch calls complete
        warnings.filterwarnings("ignore", "No complete tensor found")
        if format == "pt2":
            torch.export.save(program, path)
            return
        names = {"input_names": list(inputs), "output_names": list(outputs)}
        quiet: Any = {"dynamo": True, "external_data": False, "verbose": False}
        torch.onnx.export(program, (), path, **names, **quiet)


def open_graph(path: str | Path, format: GraphFormat) -> Callable[[Tensor], Any]:
    """A written graph of one input as a function on the CPU.

    Returns:
        A function from a tensor to a tensor, or to a tuple of them where there are several outputs.
    """
    if format == "pt2":
        return torch.export.load(path).module()
    import onnxruntime  # an extra: only those who export ONNX have it

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(given: Tensor) -> Any:
        found = session.run(None, {name: given.detach().cpu().contiguous().numpy()})
        tensors = [torch.as_tensor(output) for output in found]
        return tuple(tensors) if len(tensors) > 1 else tensors[0]

    return run
