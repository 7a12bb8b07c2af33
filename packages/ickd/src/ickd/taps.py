"""Reading features of any network: hooks on named modules, and which names are worth a hook.

A tap is the name of a module, as `named_modules` has it. Two suffixes read outputs that are no maps
(batch, channels, height, width): "blocks.11:tokens=1" takes tokens (batch, tokens, channels) and
drops the first one (the class token); "layers.3:nhwc" takes maps whose channels come last.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.errors import UserError


@contextmanager
def tap(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, every forward pass of `model` puts the named features into the dict.

    >>> with tap(model, ["layer3", "layer4"]) as features:
    ...     logits = model(images)
    >>> features["layer4"].shape
    torch.Size([8, 512, 7, 7])

    Args:
        model: any network.
        names: of modules, with the suffixes of this file; where a module runs several times in a
            pass, its last output stays. An output that the next layer overwrites, as an in-place
            ReLU does, is seen as overwritten.

    Yields:
        A dict of maps (batch, channels, height, width) by name, filled by each forward pass.

    Raises:
        UserError: there is no such module (names the closest), or its output is no map.
    """
    features: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in names:
            keep = partial(_keep, features, name, _reader(name))
            stack.callback(find_module(model, name).register_forward_hook(keep).remove)
        yield features


def _keep(
    features: dict[str, Tensor],
    name: str,
    read: Callable[[Any], Tensor],
    module: nn.Module,
    inputs: Any,
    output: Any,
) -> None:
    features[name] = read(output)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module that a tap names.

    Raises:
        UserError: there is none; the closest names are told.
    """
    path = name.partition(":")[0]
    known = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    if path in known:
        return known[path]
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.4) or [*known]
    fix = f"the closest are {', '.join(near[:3])}; ickd taps lists all"
    raise UserError(f"{type(model).__name__} has no module {path!r} to tap", fix=fix)


def _reader(name: str) -> Callable[[Any], Tensor]:
    """What turns the output of a tapped module into a map."""
    _, _, form = name.partition(":")
    tokens = re.fullmatch(r"tokens(?:=(\d+))?", form)
    if form and form != "nhwc" and not tokens:
        raise UserError(f"tap {name!r} has an unknown suffix", fix="use :tokens=N or :nhwc")

    def read(output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            kind = type(output).__name__
            raise UserError(f"tap {name!r} gives a {kind}, not a tensor", fix="tap a module inside")
        if tokens and output.ndim == 3:
            return tokens_to_map(output, int(tokens[1] or 0))
        if form == "nhwc" and output.ndim == 4:
            return output.permute(0, 3, 1, 2)
        if form or output.ndim != 4:
            raise _no_map(name, output)
        return output

    return read


def _no_map(name: str, output: Tensor) -> UserError:
    path = name.partition(":")[0]
    shape, fix = tuple(output.shape), "tap a module in front of the pooling"
    if output.ndim == 4:
        what = f"tap {name!r} gives {shape}, not tokens (batch, tokens, channels)"
        return UserError(what, fix=f"if this is a map, write {path} alone")
    if output.ndim == 3:
        fix = f"if these are tokens, write {path}:tokens=1 (one is dropped)"
    what = f"tap {name!r} gives {shape}, not a map (batch, channels, height, width)"
    return UserError(what, fix=fix)


def tokens_to_map(tokens: Tensor, drop: int = 0) -> Tensor:
    """Tokens (batch, tokens, channels) as maps, square where their number is a square.

    Args:
        tokens: of a transformer.
        drop: tokens in front that are no patches, such as the class token.

    Raises:
        UserError: none are left.
    """
    kept = tokens[:, drop:].mT
    count = kept.shape[2]
    if not count:
        raise UserError(
            f"all of {tokens.shape[1]} tokens are dropped", fix=f"drop less than {drop}"
        )
    side = math.isqrt(count)
    shape = (side, side) if side * side == count else (1, count)
    return kept.unflatten(2, shape)


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Inside, a network is in eval mode and keeps no graph; then every module's mode is back.

    Args:
        model: any network.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


# -- which names there are ---------------------------------------------------------------------


@dataclass(frozen=True)
class TapPoint:
    """A module as a place to tap.

    Attributes:
        name: as `tap` takes it.
        kind: class of the module.
        shape: of its output for one image, without the batch, None if it is no tensor.
        parameters: trainable numbers in it.
        spatial: whether its output is a map of more than one pixel, or tokens.
        suggested: "ickd" for the tap that ICKD compares, "stage" for the last map of a resolution.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    spatial: bool
    suggested: str = ""


def tap_points(model: nn.Module, images: Tensor) -> list[TapPoint]:
    """Every module in the order in which it finishes, with what it gives, and the suggestions.

    Args:
        model: any network; run once, in eval mode and without gradients.
        images: a small batch that it accepts.
    """
    shapes: _Shapes = {}
    with still(model), ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                note = partial(_note, shapes, name)
                stack.callback(module.register_forward_hook(note).remove)
        model(images)
    # what timm's and torchvision's transformers tell about their tokens and maps
    prefix = int(getattr(model, "num_prefix_tokens", hasattr(model, "class_token")))
    nhwc = str(getattr(model, "output_fmt", "")).endswith("NHWC")
    points = []
    for name, (module, shape) in shapes.items():
        inner = None if shape is None or len(shape) < 2 or shape[0] != len(images) else shape[1:]
        last = inner is not None and _channels_last(inner, images, module, nhwc)
        points.append(_point(name, module, inner, f":tokens={prefix}", ":nhwc" if last else ""))
    lists = nn.Sequential | nn.ModuleList
    names = {name for name, module in model.named_children() if isinstance(module, lists)}
    return _with_suggestions(points, names - {"classifier", "head"})


_Shapes = dict[str, tuple[nn.Module, tuple[int, ...] | None]]


def _note(shapes: _Shapes, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    shapes.pop(name, None)  # what runs again finishes again
    shapes[name] = module, tuple(output.shape) if isinstance(output, Tensor) else None


def suggest(model: nn.Module, images: Tensor) -> tuple[list[str], str]:
    """Names of the stages (the last map of every resolution) and of the tap for ICKD among them.

    Raises:
        UserError: no module of the network gives a map.
    """
    points = tap_points(model, images)
    stages = [point.name for point in points if point.suggested]
    if not stages:
        fix = "name a module that gives (batch, channels, height, width)"
        raise UserError(f"no module of {type(model).__name__} gives a map", fix=fix)
    return stages, next(point.name for point in points if point.suggested == "ickd")


def _channels_last(shape: tuple[int, ...], images: Tensor, module: nn.Module, usual: bool) -> bool:
    """Whether the first two sides of a map, not its last two, have the proportions of the images.

    Where both have, it is as `usual` for the network, but not behind a convolution.
    """
    if len(shape) != 3:
        return False
    height, width = images.shape[2:]
    first, last = (abs(a * width - b * height) < width for a, b in (shape[:2], shape[1:]))
    return first and (usual and not isinstance(module, nn.Conv2d) if last else True)


def _point(
    name: str, module: nn.Module, shape: tuple[int, ...] | None, tokens: str, order: str
) -> TapPoint:
    kind, parameters = type(module).__name__, sum(p.numel() for p in module.parameters())
    if shape is None:
        return TapPoint(name, kind, None, parameters, spatial=False)
    if len(shape) == 2:
        return TapPoint(f"{name}{tokens}", kind, shape, parameters, shape[0] > 1)
    sides = shape[:2] if order else shape[1:]
    spatial = len(shape) == 3 and sides[0] * sides[1] > 1
    return TapPoint(f"{name}{order}", kind, shape, parameters, spatial)


_DEPTH = 2
"""Dots in the names that are suggested: what lies deeper is the inside of a block."""


def _with_suggestions(points: list[TapPoint], lists: set[str]) -> list[TapPoint]:
    """Marks the last map of every resolution, by its outermost name; the last of all is ICKD's.

    Args:
        points: in the order in which they finish.
        lists: names of the network's own lists of modules, whose items count as its own modules.
    """

    def depth(point: TapPoint) -> int:
        return max(0, point.name.count(".") - (point.name.partition(".")[0] in lists))

    # pooling to a given size makes a map of anything
    spatial = [p for p in points if p.spatial and not p.kind.startswith("Adaptive")]
    shallow = [point for point in spatial if point.name.partition(":")[0].count(".") <= _DEPTH]
    spatial = shallow or spatial
    if not spatial:
        return points
    best: dict[tuple[int, ...], TapPoint] = {}
    for point in spatial:
        known = best.get(_resolution(point))
        if known is None or depth(point) <= depth(known):
            best[_resolution(point)] = point
    last = best[_resolution(spatial[-1])]
    convolutional = len(last.shape or ()) == 3  # a transformer's earlier maps are its patches
    stages = [point for point in best.values() if convolutional and len(point.shape or ()) == 3]
    marks = {point.name: "stage" for point in stages}
    marks[last.name] = "ickd"
    return [replace(point, suggested=marks.get(point.name, "")) for point in points]


def _resolution(point: TapPoint) -> tuple[int, ...]:
    assert point.shape is not None
    if len(point.shape) == 2:
        return point.shape[:1]
    return point.shape[:2] if point.name.endswith(":nhwc") else point.shape[1:]
