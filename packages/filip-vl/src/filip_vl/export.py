"""Both towers as files for use elsewhere: ONNX, or torch's exported program.

The image graph takes pixels in 0..1, so that CLIP's normalisation is part of it; the text graph
takes ids. Both give tokens of length 1, and zeros where a token does not count. The number of
images or captions is free, sizes are not. A file is read again and must answer as the network does
before it takes its place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from filip_vl.data.transforms import CLIP_MEAN, CLIP_STD
from filip_vl.model import FilipModel
from tenfold.graphs import GraphFormat, check_graph_format, open_graph, write_graph

Tower = Literal["image", "text"]
Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From pixels or ids to tokens and their mask."""

TOLERANCE: dict[str, float] = {"onnx": 1e-4, "pt2": 1e-5, "safetensors": 0.0}
"""Largest difference of any number of a token, whose length is 1, by format."""

_TRACED, _CHECKED = 2, (1, 3)  # neither is the batch size that the graph was traced with


class ImageTower(nn.Module):
    """Pixels in 0..1 to tokens of length 1, with their mask.

    Args:
        model: whose tower it is.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: FilipModel) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", CLIP_MEAN), ("std", CLIP_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch tokens embed"], Bool[Tensor, "batch tokens"]]:
        """Tokens and mask."""
        found = self.model.encode_image((pixels - self.mean) / self.std)
        return found.normalized(), found.mask


class TextTower(nn.Module):
    """Ids of captions to tokens of length 1, with their mask.

    Args:
        model: whose tower it is.
    """

    def __init__(self, model: FilipModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Int64[Tensor, "batch length"]
    ) -> tuple[Float[Tensor, "batch tokens embed"], Bool[Tensor, "batch tokens"]]:
        """Tokens, zeros where the mask is False, and mask."""
        found = self.model.encode_text(ids)
        return found.normalized() * found.mask.unsqueeze(2), found.mask


_TOWERS: dict[Tower, Callable[[FilipModel], nn.Module]] = {"image": ImageTower, "text": TextTower}
_INPUTS: dict[Tower, str] = {"image": "pixels", "text": "ids"}


@dataclass(frozen=True)
class Exported:
    """A file of an export.

    Attributes:
        path: the file, or folder.
        format: "onnx", "pt2" or "safetensors".
        deviation: largest difference from the network in any number of a token; None if they were
            not compared.
    """

    path: Path
    format: str
    deviation: float | None

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{self.path}: not compared with the network"
        limit = TOLERANCE[self.format]
        return f"{self.path}: differs by {self.deviation:.1e} from the network (limit {limit:g})"


def export_tower(
    model: FilipModel,
    tower: Tower,
    path: str | Path,
    format: GraphFormat = "onnx",
    *,
    check: bool = True,
) -> Exported:
    """Write a tower as a graph with the outputs "tokens" and "mask".

    Args:
        model: it is not changed; what is written is its behaviour in eval mode, in float32.
        tower: "image" takes "pixels" (batch, 3, size, size) in 0..1, "text" takes "ids" (batch,
            context length), padded behind the end.
        path: the file; what stood there is replaced when the new one has passed.
        format: "onnx" or "pt2" (torch.export).
        check: compare the file with the network.

    Raises:
        UserError: packages that the format needs are missing.
        RuntimeError: the file does not answer as the network does.
    """
    check_graph_format(format, "filip-vl")
    path = Path(path)
    still = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    network = _TOWERS[tower](still)
    shapes = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        program = torch.export.export(
            network, (example(still, tower, _TRACED),), dynamic_shapes=shapes
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        write_graph(program, part, format, [_INPUTS[tower]], ["tokens", "mask"])
        deviation = None
        if check:
            answers = open_graph(part, format)
            deviation = deviation_between(network, answers, still, tower)
            _check(deviation, format, f"the {format} file of the {tower} tower")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return Exported(path, format, deviation)


def export_folder(model: FilipModel, folder: str | Path, *, check: bool = True) -> Exported:
    """Write both towers as a model folder, safetensors with configuration and tokenizer.

    Args:
        model: it is not changed.
        folder: made if need be.
        check: open the folder and compare it with the network.

    Raises:
        RuntimeError: the folder does not answer as the network does.
    """
    model.save_pretrained(folder)
    if not check:
        return Exported(Path(folder), "safetensors", None)
    still = copy.deepcopy(model).cpu().float().eval()
    again = FilipModel.from_pretrained(folder).float()
    deviation = 0.0
    for tower, make in _TOWERS.items():
        apart = deviation_between(make(still), make(again), still, tower)
        deviation = max(deviation, _check(apart, "safetensors", "the model folder"))
    return Exported(Path(folder), "safetensors", deviation)


@torch.no_grad()
def deviation_between(expected: Run, actual: Run, model: FilipModel, tower: Tower) -> float:
    """Largest difference of two functions in any number; infinity where their masks differ.

    Args:
        expected: what is right.
        actual: what is compared with it.
        model: whose tower it is.
        tower: which.
    """
    largest = 0.0
    for batch in _CHECKED:
        given = example(model, tower, batch)
        (right, counted), (found, mask) = expected(given), actual(given)
        if not torch.equal(counted, mask):
            return float("inf")
        largest = max(largest, float((found - right).abs().max()))
    return largest


def example(model: FilipModel, tower: Tower, batch: int) -> Tensor:
    """Noise in 0..1 as images, or captions of random ids and different lengths."""
    config, generator = model.config, torch.Generator().manual_seed(batch)
    if tower == "image":
        shape = (batch, 3, config.image_size, config.image_size)
        return torch.rand(shape, generator=generator)
    shape = (batch, config.context_length)
    # the end may be any id: none of the others may be taken for it
    ids = torch.randint(config.vocab_size - 1, shape, generator=generator)
    ids += ids >= config.end
    ends = torch.randint(1, config.context_length, (batch,), generator=generator)
    ids[torch.arange(batch), ends] = config.end
    return ids


def _check(deviation: float, format: str, what: str) -> float:
    if not deviation <= TOLERANCE[format]:
        limit = f"{deviation:.2g}, more than {TOLERANCE[format]:g}"
        raise RuntimeError(f"{what} differs from the network by {limit}")
    return deviation
