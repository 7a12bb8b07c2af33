"""Scenes of a few glyphs with their boxes: the embedded default of object detection.

A scene shows one to four glyphs of the classes of glyph-mix, turned a little, in colours of their
own, over a shaded and noisy ground with stray strokes. In an easy scene (60 %) each is the first
glyph of its class, large and bold; in a hard one it is one of the class's six others, smaller and
thinner, as in glyph-mix. One glyph in ten is so faint that it is marked as difficult, as PASCAL VOC
marks its own. Every scene is a function of (seed, index).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ds_net_plus.synthetic import GLYPHS_PER_CLASS, HARD_SHARE, NUM_CLASSES, alphabet
from tenfold.training import mix

SCENE_CLASSES = tuple(f"glyph{c}" for c in range(NUM_CLASSES))

_MOST = 4  # glyphs in a scene
_SIDE = {False: (0.24, 0.45), True: (0.2, 0.34)}  # by hardness, as a share of the scene's side
_RADIUS = {False: 0.14, True: 0.1}  # half of a stroke's width, as a share of half the glyph's side
_TURN = math.radians(12)
_DIFFICULT_SHARE = 0.1
_LARGEST_OVERLAP = 0.1  # of the smaller box
_TRIES = 20  # places tried for a glyph before it is left out


class SceneItem(NamedTuple):
    """One scene: pixels, and for each glyph its box (x0, y0, x1, y1), class and difficulty."""

    image: UInt8[Tensor, "3 size size"]
    boxes: Float[Tensor, "objects 4"]
    labels: Int[Tensor, " objects"]
    difficult: Bool[Tensor, " objects"]


class _Glyph(NamedTuple):
    strokes: Float[Tensor, "4 2 2"]  # stroke, end, (x, y) in pixels
    radius: float  # half of a stroke's width
    box: Float[Tensor, " 4"]


def glyph_scene(index: int, seed: int = 0, size: int = 128) -> SceneItem:
    """The scene of this index.

    Args:
        index: which one, 0 or more.
        seed: of the split: 0 for training, 77 for validation, 99 for testing.
        size: side in pixels, at least 32.

    Raises:
        ValueError: a size in which a glyph has no room.
    """
    if size < 32:
        raise ValueError(f"scenes need at least 32 pixels a side, not {size}")
    generator = torch.Generator().manual_seed(mix(seed, index))
    canvas = _ground(size, generator)
    boxes, labels, difficult = [], [], []
    hard = _uniform(generator, 0, 1) < HARD_SHARE
    for _ in range(1 + int(_uniform(generator, 0, _MOST))):
        label = int(_uniform(generator, 0, len(SCENE_CLASSES)))
        faint = _uniform(generator, 0, 1) < _DIFFICULT_SHARE
        glyph = _place(label, hard, boxes, size, generator)
        if glyph is None:
            continue
        contrast = _uniform(generator, 0.12, 0.2) if faint else _uniform(generator, 0.6, 1.0)
        _paint(canvas, glyph.strokes, glyph.radius, contrast, _colour(generator))
        boxes.append(glyph.box)
        labels.append(label)
        difficult.append(faint)
    noise = torch.randn(canvas.shape, generator=generator).mul_(_uniform(generator, 0.02, 0.06))
    pixels = (canvas + noise).clamp_(0, 1).mul_(255).round_().byte()
    return SceneItem(
        pixels, torch.stack(boxes), torch.tensor(labels), torch.tensor(difficult, dtype=torch.bool)
    )


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _colour(generator: torch.Generator) -> Tensor:
    """A light colour (3, 1, 1): the ground is dark."""
    return torch.rand(3, 1, 1, generator=generator).mul_(0.6).add_(0.4)


def _ground(size: int, generator: torch.Generator) -> Tensor:
    """A dark plane of light from one side, with two to four thin strokes."""
    ramp = torch.linspace(-0.5, 0.5, size)
    slope = torch.rand(2, 3, generator=generator).sub_(0.5).mul_(0.25)[..., None, None]
    canvas = slope[0] * ramp + slope[1] * ramp[:, None] + _uniform(generator, 0.12, 0.3)
    for _ in range(2 + int(_uniform(generator, 0, 3))):
        middle = torch.rand(2, generator=generator) * size
        angle, half = _uniform(generator, 0, math.pi), _uniform(generator, 0.05, 0.2) * size
        step = torch.tensor([math.cos(angle), math.sin(angle)]) * half
        stroke = torch.stack([middle - step, middle + step])[None]
        contrast = _uniform(generator, 0.2, 0.5)
        _paint(canvas, stroke, size / 128, contrast, _colour(generator))
    return canvas


def _place(
    label: int, hard: bool, taken: list[Tensor], size: int, generator: torch.Generator
) -> _Glyph | None:
    """A glyph of the class where it hides no other, None if there is no such place."""
    variant = 1 + int(_uniform(generator, 0, GLYPHS_PER_CLASS - 1)) if hard else 0
    lattice = alphabet()[label * GLYPHS_PER_CLASS + variant].float()
    for _ in range(_TRIES):
        half, turn = (
            _uniform(generator, *_SIDE[hard]) * size / 2,
            _uniform(generator, -_TURN, _TURN),
        )
        cos, sin = math.cos(turn), math.sin(turn)
        radius = half * _RADIUS[hard]
        strokes = lattice @ torch.tensor([[cos, sin], [-sin, cos]]) * half
        low, high = strokes.flatten(0, 1).aminmax(dim=0)
        room = size - (high - low) - 2 * radius
        corner = torch.rand(2, generator=generator) * room
        strokes = strokes - low + radius + corner
        box = torch.cat([corner, corner + (high - low) + 2 * radius])
        if all(_overlap(box, other) <= _LARGEST_OVERLAP for other in taken):
            return _Glyph(strokes, radius, box)
    return None


def _overlap(a: Tensor, b: Tensor) -> float:
    """Common area as a share of the smaller box."""
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp_(min=0)
    areas = torch.stack([(box[2:] - box[:2]).prod() for box in (a, b)])
    return float(sides.prod() / areas.min())


def _paint(canvas: Tensor, strokes: Tensor, radius: float, contrast: float, colour: Tensor) -> None:
    """Mixes a colour into the canvas (3, size, size) along strokes (n, 2, 2), in place.

    Only the pixels around the strokes are visited: most of a scene is ground.
    """
    size, points = canvas.shape[-1], strokes.flatten(0, 1)
    low = (points.amin(0) - radius - 1).floor().clamp(0, size).long().tolist()
    high = (points.amax(0) + radius + 2).ceil().clamp(0, size).long().tolist()
    x = torch.arange(low[0], high[0]) + 0.5
    y = torch.arange(low[1], high[1]) + 0.5
    start, along = strokes[:, 0, :, None, None], (strokes[:, 1] - strokes[:, 0])[..., None, None]
    dx, dy = x[None, None, :] - start[:, 0], y[None, :, None] - start[:, 1]
    share = (dx * along[:, 0] + dy * along[:, 1]) / along.square().sum(1).clamp_(min=1e-6)
    share = share.clamp_(0, 1)
    squared = (dx - share * along[:, 0]).square() + (dy - share * along[:, 1]).square()
    ink = (radius + 0.5 - squared.amin(0).sqrt_()).clamp_(0, 1).mul_(contrast)
    patch = canvas[:, low[1] : high[1], low[0] : high[0]]
    patch.lerp_(colour.expand_as(patch), ink.expand_as(patch))
