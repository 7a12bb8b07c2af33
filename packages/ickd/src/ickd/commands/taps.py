"""taps: which modules of a network can be tapped, and which are worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from json import dumps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ickd.commands.common import open_model
from ickd.networks import Network
from ickd.taps import TapPoint, tap, tap_points
from tenfold.console import columns
from tenfold.errors import UserError

_BATCH = 2  # of one image, a tensor without a batch could pass for one with it


def taps(
    model: str,
    *,
    input: list[int] | None = None,
    json: bool | Path = False,
    num_classes: int | None = None,
) -> None:
    """List every module of a network: output, parameters, whether it is a map, and what to tap.

    Args:
        model: a network such as timm:resnet18 or zoo:resnet20, a checkpoint, or a model folder.
        input: channels, height and width of an image, such as [3,224,224]; the network's own if
            left out.
        json: print JSON instead of the table, or write it to this file.
        num_classes: of a network that is named.
    """
    options = {"num_classes": num_classes} | _size_of(input)
    network = open_model(model, **options)
    images = example_images(network, input)
    points = list_points(network, images)
    if json is False:
        print(points_table(points))
        print("\n".join(_advice(points)))
        return
    text = dumps(as_json(network, images, points), indent=2)
    if json is True:
        print(text)
    else:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {json}")


def _size_of(shape: Sequence[int] | None) -> dict[str, Any]:
    """The option of a network for images of this shape: one of one's own may take no others."""
    if shape is None:
        return {}
    if len(shape) != 3 or min(shape) < 1:
        what = f"--input must be channels, height and width, got {list(shape)}"
        raise UserError(what, fix="write it as [3,224,224]")
    return {"image_size": max(shape[1:])}


def example_images(network: Network, shape: Sequence[int] | None) -> Tensor:
    """Images of noise, normalised: what tells the maps of two modules apart.

    Args:
        network: whose input they are.
        shape: (channels, height, width), the network's own where None.
    """
    like = network.example(_BATCH)
    shape = tuple(like.shape[1:] if shape is None else shape)
    return torch.randn((_BATCH, *shape), generator=torch.Generator().manual_seed(0)).to(like)


def list_points(network: Network, images: Tensor) -> list[TapPoint]:
    """Every module: those that run in the order in which they finish, then the others.

    Where the network tells its own features, these are the suggested ones.

    Args:
        network: in eval mode.
        images: normalised, at least two.

    Raises:
        UserError: it does not take such images.
    """
    net = network.net
    try:
        points = tap_points(net, images)
        if not network.tap_names:
            points = _mark_own(network, images, points)
    except (RuntimeError, ValueError, AssertionError) as error:
        shape = tuple(images.shape[1:])
        line = str(error).partition("\n")[0]
        raise UserError(f"{network.name} does not take images {shape}: {line}") from error
    listed = {point.name.partition(":")[0] for point in points}
    for name, module in net.named_modules():
        if name and name not in listed:
            count = sum(p.numel() for p in module.parameters())
            points.append(TapPoint(name, type(module).__name__, None, count, spatial=False))
    return points


@torch.no_grad()
def _mark_own(network: Network, images: Tensor, points: list[TapPoint]) -> list[TapPoint]:
    """Marks the modules that give what the network's own `taps` gives.

    Where several give the same, as a sequence and its last layer do, the name that the network
    itself uses is taken, or else the outermost.
    """
    net: Any = network.net  # of ours: it has taps
    own, known = net.taps(images), getattr(net, "tap_names", ())
    maps = [p.name for p in points if p.shape is not None and len(p.shape) == 3]
    with tap(net, maps) as features:
        net(images)
    marks: dict[str, str] = {}
    for wanted, mark in [*((map_, "stage") for map_ in own.maps), (own.signal("last"), "ickd")]:
        same = [n for n in maps if torch.equal(features[n], wanted)]
        if same:
            marks[min(same, key=lambda n: (n not in known, n.count(".")))] = mark
    return [replace(point, suggested=marks.get(point.name, "")) for point in points]


def points_table(points: Sequence[TapPoint]) -> str:
    """The modules in columns."""
    rows = [["module", "kind", "suggested", "output", "parameters", "spatial"]]
    for point in points:
        shape = "–" if point.shape is None else "x".join(map(str, point.shape))
        spatial = "yes" if point.spatial else ""
        row = [point.name, point.kind, point.suggested, shape, f"{point.parameters:,}", spatial]
        rows.append(row)
    return columns(rows, left=3)


def as_json(network: Network, images: Tensor, points: Sequence[TapPoint]) -> dict[str, Any]:
    """What the table says, as plain values."""
    marked = [point.name for point in points if point.suggested]
    return {
        "model": network.name,
        "input": list(images.shape[1:]),
        "stages": marked,
        "ickd": next((point.name for point in points if point.suggested == "ickd"), None),
        "modules": [asdict(point) for point in points],
    }


def _advice(points: Sequence[TapPoint]) -> list[str]:
    marked = [point.name for point in points if point.suggested]
    last = next((point.name for point in points if point.suggested == "ickd"), None)
    lines = [f"stages, shallow to deep: {', '.join(marked)}"] if marked else []
    if last is not None:
        lines.append(f"tap for ICKD: {last}")
    return lines or ["no module gives a map"]
