"""A model as a file for use elsewhere: ONNX, or torch's exported program.

The number of texts and of tokens is free. A file is read again and must answer as the model does,
on other sizes than it was traced with, before it takes its place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bert_oversmoothing.model import FusionModel
from bert_oversmoothing.model.folding import can_fold, fold
from tenfold.graphs import GraphFormat, check_graph_format, write_graph

Fold = Literal["auto", "never", "always"]
Run = Callable[..., Any]

TOLERANCE: dict[str, float] = {"onnx": 1e-4, "pt2": 1e-5}
"""Largest difference in any number of the answers, relative to the largest of them, by format."""

_TRACED, _CHECKED = (2, 9), ((1, 5), (3, 12))  # texts and tokens
_CHOICES = 3


class Inference(nn.Module):
    """A fusion model with inputs by place, and nothing but its answers.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: FusionModel) -> None:
        super().__init__()
        self.model = model
        self.inputs, self.outputs = input_names(model), output_names(model)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The answers."""
        named = dict(zip(self.inputs, given, strict=True))
        output = self.model(**named, return_dict=True, output_fusion_weights=False)
        return tuple(output[name] for name in self.outputs)


def input_names(model: FusionModel) -> list[str]:
    """What the graph takes; token types only where the family tells two texts apart."""
    if model.task == "image":
        return ["pixel_values"]
    typed = (getattr(model.config.backbone, "type_vocab_size", None) or 0) > 1
    return ["input_ids", "attention_mask"] + ["token_type_ids"] * typed


def output_names(model: FusionModel) -> list[str]:
    """What the graph gives."""
    return ["start_logits", "end_logits"] if model.task == "qa" else ["logits"]


@dataclass(frozen=True)
class Exported:
    """A file of an export.

    Attributes:
        path: the file.
        format: "onnx" or "pt2".
        inputs: their names, in their order.
        outputs: likewise.
        deviation: largest difference from the model in any answer, relative to the largest of
            them; None if they were not compared.
        folded: what folding saved, a line, if there was any.
    """

    path: Path
    format: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    deviation: float | None
    folded: str | None = None

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{self.path}: not compared with the model"
        limit = TOLERANCE[self.format]
        return f"{self.path}: differs by {self.deviation:.1e} from the model (limit {limit:g})"


def export_model(
    model: FusionModel,
    path: str | Path,
    format: GraphFormat = "onnx",
    *,
    folding: Fold = "auto",
    check: bool = True,
) -> Exported:
    """Write a model as a graph.

    Args:
        model: not changed; what is written is its behaviour in eval mode, in float32.
        path: the file; what stood there is replaced when the new one has passed.
        format: "onnx" or "pt2" (torch.export).
        folding: whether a concat and the linear head for questions become one map.
        check: compare the file with the model.

    Raises:
        UserError: packages that the format needs are missing, or folding is asked for where there
            is nothing to fold.
        RuntimeError: the file does not answer as the model does.
    """
    check_graph_format(format, "bert-oversmoothing")
    path = Path(path)
    still = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    network, saved = Inference(still), None
    traced = network
    if folding == "always" or (folding == "auto" and can_fold(still)):
        folded = fold(still)
        traced, saved = Inference(folded.model), str(folded)
    given = example(still, *_TRACED)
    axes = dict.fromkeys(_free_axes(still), torch.export.Dim.DYNAMIC)
    shapes = (tuple(axes for _ in given),)
    with torch.no_grad():
        program = torch.export.export(traced, given, dynamic_shapes=shapes, strict=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write_graph(program, part, format, traced.inputs, traced.outputs)
        deviation = None
        if check:
            deviation = deviation_between(network, open_file(part, format), still)
            if not deviation <= TOLERANCE[format]:
                limit = f"{deviation:.2g}, more than {TOLERANCE[format]:g}"
                raise RuntimeError(f"the {format} file differs from the model by {limit}")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    names = (tuple(traced.inputs), tuple(traced.outputs))
    return Exported(path, format, *names, deviation, saved)


def open_file(path: str | Path, format: GraphFormat) -> Run:
    """A written graph as a function on the CPU, from inputs by place to a tuple of answers."""
    if format == "pt2":
        return torch.export.load(path).module()
    import onnxruntime  # an extra: only those who export ONNX have it

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        arrays = (tensor.detach().contiguous().numpy() for tensor in given)
        found: Sequence[Any] = session.run(None, dict(zip(names, arrays, strict=True)))
        return tuple(torch.as_tensor(array) for array in found)

    return run


@torch.no_grad()
def deviation_between(expected: Run, actual: Run, model: FusionModel) -> float:
    """Largest difference of two functions in any answer, relative to the largest answer.

    Args:
        expected: what is right.
        actual: what is compared with it.
        model: whose inputs they take.
    """
    largest = 0.0
    for texts, tokens in _CHECKED:
        given = example(model, texts, tokens)
        for right, found in zip(expected(*given), actual(*given), strict=True):
            if right.shape != found.shape:
                return float("inf")
            apart = (found - right).abs().max() / right.abs().max().clamp(min=1e-30)
            largest = max(largest, float(apart))
    return largest


def example(model: FusionModel, texts: int, tokens: int) -> tuple[Tensor, ...]:
    """Random inputs, the last text half padding; images of noise."""
    generator = torch.Generator().manual_seed(tokens)
    backbone: Any = model.config.backbone
    vision = getattr(backbone, "vision_config", backbone)
    if model.task == "image":
        side = vision.image_size
        height, width = side if isinstance(side, Sequence) else (side, side)
        shape = (texts, vision.num_channels, height, width)
        return (torch.randn(shape, generator=generator),)
    shape = (texts, _CHOICES, tokens) if model.task == "choice" else (texts, tokens)
    padding = getattr(backbone, "pad_token_id", None) or 0
    # No id is that of padding: positions are counted by it in some families.
    ids = torch.randint(backbone.vocab_size - 1, shape, generator=generator)
    ids += ids >= padding
    mask = torch.ones(shape, dtype=torch.int64)
    mask[-1, ..., (tokens + 1) // 2 :] = 0
    ids[mask == 0] = padding
    types = torch.zeros_like(ids)
    types[..., tokens // 2 :] = 1
    named = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return tuple(named[name] for name in input_names(model))


def _free_axes(model: FusionModel) -> tuple[int, ...]:
    return {"image": (0,), "choice": (0, 1, 2)}.get(model.task, (0, 1))
