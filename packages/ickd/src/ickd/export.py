"""One network as a file for use elsewhere: ONNX, or torch's exported program.

The graph takes pixels in 0..1: the network's normalisation, and its resolution where it has one,
are part of it. The number of images is free, their size is not. A file is read again and must
answer as the network does before it takes its place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo.exc as torch_dynamo
from torch import Tensor

from ickd.networks import Network
from tenfold.errors import UserError, first_line
from tenfold.graphs import GraphFormat, check_graph_format, open_graph, write_graph

TOLERANCE: dict[str, float] = {"onnx": 1e-4, "pt2": 1e-5, "safetensors": 1e-5}
"""Largest difference from the network's outputs, relative to the largest of them, by format."""

# neither is the batch size that the graph was traced with
_TRACED, _CHECKED = 2, (1, 3)

Run = Callable[[Tensor], Tensor]  # pixels -> logits


@dataclass(frozen=True)
class Exported:
    """A file of an export.

    Attributes:
        format: "onnx", "pt2" or "safetensors".
        path: the file, or folder.
        image_size: side of the images that it takes, in pixels.
        deviation: largest difference from the network, relative to its largest output; None if
            they were not compared.
    """

    format: str
    path: Path
    image_size: int
    deviation: float | None

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{self.path}: not compared with the network"
        sizes = ", ".join(map(str, _CHECKED))
        limit = TOLERANCE[self.format]
        return (
            f"{self.path}: differs by {self.deviation:.1e} (limit {limit:g}) of the largest "
            f"output at batch sizes {sizes}"
        )


def export_graph(
    network: Network,
    path: str | Path,
    format: GraphFormat = "onnx",
    image_size: int | None = None,
    *,
    check: bool = True,
) -> Exported:
    """Write a network as a graph from pixels (batch, colours, size, size) to "logits".

    Args:
        network: it is not changed; what is written is its behaviour in eval mode, in float32.
        path: the file; what stood there is replaced when the new one has passed.
        format: "onnx" or "pt2" (torch.export).
        image_size: side of the images; what the network usually sees if left out.
        check: compare the file with the network.

    Raises:
        UserError: an unknown format, packages that it needs are missing, or a network that cannot
            be traced.
        RuntimeError: the file does not answer as the network does.
    """
    check_graph_format(format, "ickd")
    path, size = Path(path), image_size or network.example_size
    still = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    program = _trace(still, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write_graph(program, part, format, ["pixels"], ["logits"])
        deviation = _compare(still, open_graph(part, format), format, size) if check else None
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return Exported(format, path, size, deviation)


@torch.no_grad()
def deviation_between(expected: Run, actual: Run, network: Network, size: int) -> float:
    """Largest difference of two functions on images of noise, relative to the largest output.

    Args:
        expected: what is right.
        actual: what is compared with it.
        network: whose images these are.
        size: their side.
    """
    largest = 0.0
    for batch in _CHECKED:
        pixels = _pixels(network, batch, size)
        right, found = expected(pixels), actual(pixels)
        scale = float(right.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        largest = max(largest, float((found - right).abs().max()) / scale)
    return largest


def check_deviation(deviation: float, format: str, what: str) -> float:
    """Give back a deviation within the limit of a format.

    Raises:
        RuntimeError: it is beyond.
    """
    if not deviation <= TOLERANCE[format]:
        limit = f"{deviation:.2g} of its largest output, more than {TOLERANCE[format]:g}"
        raise RuntimeError(f"{what} differs from the network by {limit}")
    return deviation


def _trace(network: Network, size: int) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        return torch.export.export(
            network, (_pixels(network, _TRACED, size),), dynamic_shapes=shapes
        )
    except (RuntimeError, ValueError, AssertionError, torch_dynamo.UserError) as error:
        what = f"torch.export cannot trace {network.name} on {size}x{size} pixels"
        what += f": {first_line(error)}"
        raise UserError(what, fix="try another --image-size, or --format safetensors") from error


def _compare(network: Network, run: Run, format: str, size: int) -> float:
    deviation = deviation_between(network, run, network, size)
    return check_deviation(deviation, format, f"the {format} file")


def _pixels(network: Network, batch: int, size: int) -> Tensor:
    shape = (batch, len(network.expects.mean), size, size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(batch))
