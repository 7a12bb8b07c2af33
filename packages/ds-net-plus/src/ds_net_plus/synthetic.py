"""glyph-mix: the embedded default task, ten classes of line glyphs, easy and hard ones mixed.

Class c owns seven glyphs of an alphabet of seventy. An easy image (60 %) shows the first of them,
large, bold and clean; a hard one (40 %) shows one of the other six, small, thin, turned, noisy and
beside a distractor stroke. Ten easy shapes need few filters and sixty hard ones need many, while
the difficulty itself shows in cheap early features: the situation for which a gate exists.

Every image is a function of (seed, index) alone: all its random numbers come from a SplitMix64
stream (Steele, Lea and Flood, 2014) whose start is a hash of the two, so neither batching, nor
order, nor the number of workers can change it.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from rich.progress import track
from torch import Tensor

NUM_CLASSES = 10
GLYPHS_PER_CLASS = 7
SEGMENTS = 4
HARD_SHARE = 0.4
MEAN, STD = 0.15, 0.3
CLASS_NAMES = tuple(f"glyph {c}" for c in range(NUM_CLASSES))

_ALPHABET_SEED = 1234
_REFERENCE_SIZE = 32  # lengths below are pixels of an image of this size
_CHUNK_PIXELS = 1 << 16  # keeps the working set of one chunk inside the second-level cache


class Glyphs(NamedTuple):
    """A batch of glyph images: normalised pixels, class, and whether the image is a hard one."""

    image: Float[Tensor, "batch 1 size size"]
    label: Int64[Tensor, " batch"]
    hard: Bool[Tensor, " batch"]


class Scene(NamedTuple):
    """What is on each image before it is drawn.

    Lengths are pixels, points are seen from the image centre with x right and y down. The last of
    the five strokes is the distractor; its contrast is 0 on easy images.
    """

    label: Int64[Tensor, " batch"]
    hard: Bool[Tensor, " batch"]
    glyph: Int64[Tensor, " batch"]
    ends: Float[Tensor, "batch 5 2 2"]  # stroke, end, (x, y)
    thickness: Float[Tensor, " batch"]  # half of the stroke's width
    contrast: Float[Tensor, "batch 2"]  # of the glyph, of the distractor
    noise: Float[Tensor, " batch"]  # standard deviation


class _Range(NamedTuple):
    easy: tuple[float, float]
    hard: tuple[float, float]


# Lengths in pixels except `jitter` (lattice units); angles in degrees.
_SCALE = _Range((9.5, 11.5), (6.5, 8.5))
_SHIFT = _Range((-1.5, 1.5), (-3.0, 3.0))
_ROTATION = _Range((-5.0, 5.0), (-15.0, 15.0))
_JITTER = _Range((-0.05, 0.05), (-0.12, 0.12))
_THICKNESS = _Range((1.2, 1.6), (0.9, 1.4))
_CONTRAST = _Range((0.85, 1.0), (0.6, 1.0))
_NOISE = _Range((0.03, 0.06), (0.05, 0.11))
# The distractor of a hard image: its middle may lie anywhere but in the outermost 4 pixels.
_DISTRACTOR_LENGTH = (3.0, 8.0)
_DISTRACTOR_CONTRAST = (0.5, 1.0)
_DISTRACTOR_REACH = (-12.0, 12.0)


def _signed(value: int) -> int:
    """The int64 with the 64 bits of the unsigned `value`: torch has no uint64 arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    """Logical right shift: int64 >> copies the sign bit, the mask removes the copies."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """SplitMix64's finaliser, a bijection of 64-bit words; int64 products wrap as uint64 ones."""
    x = (x ^ _shift_right(x, 30)).mul_(_MIX_1)
    x = (x ^ _shift_right(x, 27)).mul_(_MIX_2)
    return x ^ _shift_right(x, 31)


class _Streams:
    """One SplitMix64 stream per image, read side by side."""

    def __init__(self, seed: int, indices: Int64[Tensor, " batch"]) -> None:
        start = _mix(torch.full_like(indices, seed) + _GOLDEN)
        self._keys = _mix(start + indices * _GOLDEN)
        self._used = 0

    def words(self, count: int) -> Int64[Tensor, "batch count"]:
        """The next `count` 64-bit words of every stream."""
        first, self._used = self._used + 1, self._used + count
        steps = torch.arange(first, first + count, device=self._keys.device)
        return _mix(self._keys[:, None] + steps * _GOLDEN)

    def uniform(self, count: int) -> Float[Tensor, "batch count"]:
        """Float64 numbers in [0, 1) with 53 random bits."""
        return _shift_right(self.words(count), 11).double().mul_(2.0**-53)

    def normal(self, count: int) -> Float[Tensor, "batch count"]:
        """Standard normal float32 numbers: four per word, through a table of 65,536 quantiles.

        A table read is several times faster than Box-Muller, and its bits cannot depend on how a
        vectorised logarithm treats the end of a chunk. |value| <= 4.33.
        """
        words = self.words(-(-count // 4))
        quantiles = words.view(torch.int16)[:, :count].int().add_(1 << 15)
        return _normal_quantiles().to(words.device)[quantiles]


@cache
def _normal_quantiles() -> Float[Tensor, "65536"]:
    levels = torch.arange(1 << 16, dtype=torch.float64).add_(0.5).div_(1 << 16)
    return torch.special.ndtri(levels).float()


@cache
def alphabet() -> Float[Tensor, "70 4 2 2"]:
    """The seventy glyphs: four segments each, (x, y) ends on the lattice {-1, 0, 1}^2.

    Segments have a squared length of at most 5, and two glyphs share at most two of them. The same
    for every seed of the data, so that train and test show the same shapes.
    """
    points = list(itertools.product((-1, 0, 1), repeat=2))
    segments = [(a, b) for a, b in itertools.combinations(points, 2) if _squared_length(a, b) <= 5]
    generator = torch.Generator().manual_seed(_ALPHABET_SEED)
    chosen: list[frozenset[int]] = []
    while len(chosen) < NUM_CLASSES * GLYPHS_PER_CLASS:
        candidate = frozenset(
            torch.randperm(len(segments), generator=generator)[:SEGMENTS].tolist()
        )
        if all(len(candidate & other) <= 2 for other in chosen):
            chosen.append(candidate)
    return torch.tensor([[segments[i] for i in sorted(glyph)] for glyph in chosen]).double()


def _squared_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2


def _between(unit: Tensor, bounds: tuple[float, float]) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * unit


class GlyphMix:
    """The generator of one split.

    Args:
        size: side of the square images in pixels, at least 8. Every length of the drawing grows
            with it (the strokes' thickness too); the noise per pixel stays.
        seed: any integer; 0 is the training split and 99 the test split of the embedded task.

    Example:
        >>> batch = GlyphMix(size=32, seed=0).render(torch.arange(128))
        >>> batch.image.shape
        torch.Size([128, 1, 32, 32])
    """

    def __init__(self, size: int = _REFERENCE_SIZE, seed: int = 0) -> None:
        if size < 8:
            raise ValueError(f"glyph images need at least 8 pixels a side, not {size}")
        self.size = size
        self.seed = seed

    def render(self, indices: Int64[Tensor, " batch"]) -> Glyphs:
        """The images of these indices, in this order, on the device of `indices`."""
        step = max(1, _CHUNK_PIXELS // self.size**2)
        image = torch.empty(len(indices), 1, self.size, self.size, device=indices.device)
        label = torch.empty_like(indices)
        hard = torch.empty_like(indices, dtype=torch.bool)
        for start in range(0, len(indices), step):
            part = slice(start, start + step)
            image[part, 0], label[part], hard[part] = self._render_chunk(indices[part])
        return Glyphs(image, label, hard)

    def _render_chunk(self, indices: Int64[Tensor, " batch"]) -> tuple[Tensor, Tensor, Tensor]:
        streams = _Streams(self.seed, indices)
        scene = self._draw_scene(streams)
        noise = streams.normal(self.size**2).view(-1, self.size, self.size)
        value = self.draw(scene).addcmul_(noise, scene.noise.float()[:, None, None])
        return value.sub_(MEAN).div_(STD), scene.label, scene.hard

    def scene(self, indices: Int64[Tensor, " batch"]) -> Scene:
        """What the images of these indices show, in float64."""
        return self._draw_scene(_Streams(self.seed, indices))

    def _draw_scene(self, streams: _Streams) -> Scene:
        unit = self.size / _REFERENCE_SIZE
        which = streams.uniform(3)
        label = (which[:, 0] * NUM_CLASSES).long()
        hard = which[:, 1] < HARD_SHARE
        variant = torch.where(hard, 1 + (which[:, 2] * (GLYPHS_PER_CLASS - 1)).long(), 0)
        glyph = label * GLYPHS_PER_CLASS + variant

        def draw(bounds: _Range, count: int = 1) -> Tensor:
            u = streams.uniform(count)
            return torch.where(hard[:, None], _between(u, bounds.hard), _between(u, bounds.easy))

        scale, shift, rotation = draw(_SCALE), draw(_SHIFT, 2), draw(_ROTATION)
        lattice = alphabet().to(label.device)[glyph] + draw(_JITTER, SEGMENTS * 4).view(
            -1, SEGMENTS, 2, 2
        )
        ends = _rotate(lattice * scale[:, :, None, None], rotation) + shift[:, None, None, :]
        thickness, contrast, noise = draw(_THICKNESS), draw(_CONTRAST), draw(_NOISE)
        distractor, relative = _draw_distractor(streams)
        contrast = torch.cat([contrast, contrast * relative * hard[:, None]], dim=1)
        ends = torch.cat([ends, distractor], dim=1) * unit
        return Scene(label, hard, glyph, ends, thickness[:, 0] * unit, contrast, noise[:, 0])

    def draw(self, scene: Scene) -> Float[Tensor, "batch size size"]:
        """The ink of a scene without noise, float32 in [0, 1].

        A pixel's ink is clamp(thickness + 0.5 - distance to the stroke, 0, 1), the largest over the
        strokes.
        """
        squared = self._squared_distances(scene.ends.float())
        nearest = torch.stack(
            [squared[:, :SEGMENTS].amin(dim=1), squared[:, SEGMENTS]], dim=1
        ).sqrt_()
        reach = (scene.thickness.float() + 0.5)[:, None, None, None]
        ink = (reach - nearest).clamp_(0, 1).mul_(scene.contrast.float()[:, :, None, None])
        return torch.maximum(ink[:, 0], ink[:, 1])

    def _squared_distances(
        self, ends: Float[Tensor, "batch strokes 2 2"]
    ) -> Float[Tensor, "batch strokes size size"]:
        """Squared distance of every pixel centre to every stroke.

        In the frame of a stroke (origin in its middle, first axis along it) a point (u, v) is
        sqrt(max(|u| - length / 2, 0)^2 + v^2) away, and u and v are sums of a column and a row
        term.
        """
        middle, half = ends.mean(dim=2), (ends[:, :, 1] - ends[:, :, 0]) / 2
        half_length = half.norm(dim=2, keepdim=True)
        cos, sin = (half / half_length).unbind(dim=2)
        pixel = torch.arange(self.size, device=ends.device) - (self.size - 1) / 2
        x, y = pixel - middle[..., :1], pixel - middle[..., 1:]
        cos, sin = cos[..., None], sin[..., None]
        along = (x * cos)[..., None, :] + (y * sin)[..., :, None]
        across = (y * cos)[..., :, None] - (x * sin)[..., None, :]
        beyond = along.abs_().sub_(half_length[..., None]).clamp_(min=0)
        return across.square_().addcmul_(beyond, beyond)


def _rotate(points: Float[Tensor, "batch n 2 2"], degrees: Float[Tensor, "batch 1"]) -> Tensor:
    angle = (degrees * (math.pi / 180))[:, :, None]
    x, y = points.unbind(dim=-1)
    return torch.stack(
        [x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=-1
    )


def _draw_distractor(streams: _Streams) -> tuple[Tensor, Tensor]:
    """The stroke of each image (batch, 1, 2, 2) in reference pixels, its contrast (batch, 1).

    The contrast is relative to the glyph's.
    """
    length, turn, x, y, relative = streams.uniform(5).unbind(dim=1)
    half = _between(length, _DISTRACTOR_LENGTH) / 2
    angle = turn * math.pi  # a stroke has no direction: half a turn covers all
    half_xy = torch.stack([half * angle.cos(), half * angle.sin()], dim=1)
    middle = _between(torch.stack([x, y], dim=1), _DISTRACTOR_REACH)
    stroke = torch.stack([middle - half_xy, middle + half_xy], dim=1)[:, None]
    return stroke, _between(relative, _DISTRACTOR_CONTRAST)[:, None]


def glyph_mix(count: int, seed: int, size: int = _REFERENCE_SIZE, progress: bool = False) -> Glyphs:
    """The first `count` images of a split.

    Args:
        count: number of images, at least 1. The embedded task has 8,000 for training and 4,000 for
            testing.
        seed: 0 for the training split, 99 for the test split.
        size: side of the images.
        progress: show a progress bar.

    Returns:
        All images at once: float32, 4 KB each at size 32.
    """
    generator = GlyphMix(size, seed)
    blocks = torch.arange(count).split(1000)
    bar = track(blocks, description="drawing glyph-mix", disable=not progress)
    return Glyphs(*map(torch.cat, zip(*map(generator.render, bar), strict=True)))
