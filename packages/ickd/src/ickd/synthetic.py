"""The two embedded tasks: bound-gratings, to classify, and textured-blobs, to segment.

In bound-gratings the class says which two gratings occur together, so that it is carried by the
co-activation of channels; in textured-blobs a region's class is its texture, whatever its shape.

Every image is a function of (seed, index) alone: all its random numbers come from one counter-based
Philox generator (Salmon et al., 2011) whose key they are, so neither the number of images nor their
order can change it. What the classes look like comes from `task_seed` alone. Images are 8-bit
pixels, so that a file on disk holds the very same numbers; `(pixel / 255 - MEAN) / STD` gives back
the generator's values.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, Shaped, UInt8
from numpy import ndarray
from scipy.special import ndtri
from torch import Tensor

GratingClasses = Literal["coarse3", "coarse2", "fine16"]
"""24 types that share 3 labels or 2 (label = type mod labels), or 16 types, each with its own."""

TASK_SEED = 7
GRATINGS_SIZE, BLOBS_SIZE = 16, 24
GRATINGS_MEAN, GRATINGS_STD = 0.5, 1 / 12
BLOBS_MEAN, BLOBS_STD = 0.5, 1 / 8
BLOB_CLASSES = ("background", *(f"texture {180 * k // 5} degrees" for k in range(5)))

_TYPES_AND_LABELS: dict[str, tuple[int, int]] = {
    "coarse3": (24, 3),
    "coarse2": (24, 2),
    "fine16": (16, 16),
}
_CHUNK = 256  # images that are drawn at once
# Which of the four unrelated streams of a key is read.
_GRATINGS, _GRATINGS_TABLE, _BLOBS, _BLOBS_TABLE = range(4)

_OWN_AMPLITUDE = 2.0
_CLUTTER = 2
_CLUTTER_AMPLITUDE = 1.2
_ENVELOPE = 3.0  # standard deviation in pixels; a grating's centre keeps as far from the border
_GRATINGS_NOISE = 0.6

_TEXTURES = 5
_ELLIPSES = 3
_HALF_AXES = (3.0, 7.0)
_CENTRES = (0.0, BLOBS_SIZE - 1.0)  # anywhere: the border cuts ellipses off
_BACKGROUND_AMPLITUDE = 0.5
_WAVE, _TINT = 1.2, 0.3  # a texture is its colour times (wave · cosine + tint)
_BLOBS_NOISE = 0.5


class Gratings(NamedTuple):
    """Images of bound-gratings, their label, and their type, of which the label may be a part."""

    image: UInt8[Tensor, "batch 3 size size"]
    label: Int64[Tensor, " batch"]
    fine: Int64[Tensor, " batch"]


class Blobs(NamedTuple):
    """Images of textured-blobs and the class of every pixel: 0 background, k texture k - 1."""

    image: UInt8[Tensor, "batch 3 24 24"]
    label: Int64[Tensor, "batch 24 24"]


class _Waves(NamedTuple):
    """Plane waves `colour · cos(2π frequency · (along − along of the centre) + phase)`.

    Angles say where a wave runs: x to the right, y down; lengths are pixels.
    """

    colour: Float[ndarray, "batch waves 3"]  # times the amplitude
    angle: Float[ndarray, "batch waves"]
    frequency: Float[ndarray, "batch waves"]
    phase: Float[ndarray, "batch waves"]
    centre: Float[ndarray, "batch waves 2"]  # (x, y)


class _GratingScene(NamedTuple):
    """What is on each image of bound-gratings: its own two waves, then the clutter."""

    fine: Int[ndarray, " batch"]
    waves: _Waves
    noise: Float[ndarray, "batch 3 size size"]  # standard normal


class _BlobScene(NamedTuple):
    """What is on each image of textured-blobs.

    The first wave is the background's and the others fill an ellipse each, of which a later one
    hides an earlier one. An ellipse's angle is that of its first half-axis.
    """

    texture: Int[ndarray, "batch ellipses"]
    waves: _Waves
    centre: Float[ndarray, "batch ellipses 2"]  # (x, y)
    half_axes: Float[ndarray, "batch ellipses 2"]
    angle: Float[ndarray, "batch ellipses"]
    noise: Float[ndarray, "batch 3 24 24"]  # standard normal


class _Streams:
    """One stream of random numbers per key (seed, index), read side by side.

    The numbers are made from Philox's bits by this class, not by NumPy's distributions, which may
    change from one version to the next.
    """

    def __init__(self, domain: int, seed: int, indices: range, length: int) -> None:
        counter = np.array([0, 0, 0, domain], dtype=np.uint64)
        bits = np.empty((len(indices), length), dtype=np.uint64)
        for row, index in enumerate(indices):
            key = np.array([seed % 2**64, index % 2**64], dtype=np.uint64)
            bits[row] = np.random.Philox(counter=counter, key=key).random_raw(length)
        self._uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
        self._used = 0

    def uniform(self, *shape: int) -> Float[ndarray, "batch ..."]:
        """The next numbers of every stream, in the open interval (0, 1)."""
        first, self._used = self._used, self._used + int(np.prod(shape))
        if self._used > self._uniform.shape[1]:
            raise ValueError(f"the streams have {self._uniform.shape[1]} numbers, not {self._used}")
        return self._uniform[:, first : self._used].reshape(-1, *shape)

    def between(self, low: float, high: float, *shape: int) -> Float[ndarray, "batch ..."]:
        """The next numbers, uniform from `low` to `high`."""
        return low + (high - low) * self.uniform(*shape)

    def normal(self, *shape: int) -> Float[ndarray, "batch ..."]:
        """The next numbers, standard normal."""
        return ndtri(self.uniform(*shape))

    def direction(self, *shape: int) -> Float[ndarray, "batch ... 3"]:
        """The next unit vectors, uniform on the sphere."""
        vector = self.normal(*shape, 3)
        return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def grating_class_names(classes: GratingClasses = "coarse3") -> tuple[str, ...]:
    """What the labels stand for, in their order."""
    types, labels = _types_and_labels(classes)
    if types == labels:
        return tuple(f"type {label}" for label in range(labels))
    return tuple(f"types {label} mod {labels}" for label in range(labels))


def bound_gratings(
    count: int,
    seed: int,
    *,
    classes: GratingClasses = "coarse3",
    task_seed: int = TASK_SEED,
    size: int = GRATINGS_SIZE,
) -> Gratings:
    """The first `count` images of a set (section 9.1).

    An image shows the two gratings of its type (frequency, orientation and colour their own, a
    little jittered, anywhere), two random ones that belong to no type, and noise.

    Args:
        count: number of images, at least 1.
        seed: of the set, any integer.
        classes: "coarse3" and "coarse2" have 24 types and label = type mod 3 or 2, "fine16" has
            16 types, each a class.
        task_seed: of what the types look like.
        size: side of the images, at least 8.

    Raises:
        ValueError: no image, an image too small, or classes that do not exist.

    Example:
        >>> bound_gratings(800, seed=1).image.shape
        torch.Size([800, 3, 16, 16])
    """
    types, labels = _types_and_labels(classes)
    if count < 1 or size < 8:
        raise ValueError(f"at least 1 image of at least 8 pixels, not {count} of {size}")
    image = np.empty((count, 3, size, size), dtype=np.uint8)
    fine = np.empty(count, dtype=np.int64)
    for part in _chunks(count):
        scene = _draw_gratings(seed, part, types, task_seed, size)
        image[part.start : part.stop] = _to_pixels(_render_gratings(scene), GRATINGS_STD)
        fine[part.start : part.stop] = scene.fine
    return Gratings(*map(torch.from_numpy, (image, fine % labels, fine)))


def textured_blobs(count: int, seed: int, *, task_seed: int = TASK_SEED) -> Blobs:
    """The first `count` images of a set (section 9.2).

    Args:
        count: number of images, at least 1.
        seed: of the set, any integer.
        task_seed: of what the textures look like.

    Raises:
        ValueError: no image.

    Example:
        >>> textured_blobs(100, seed=1).label.shape
        torch.Size([100, 24, 24])
    """
    if count < 1:
        raise ValueError(f"at least 1 image, not {count}")
    image = np.empty((count, 3, BLOBS_SIZE, BLOBS_SIZE), dtype=np.uint8)
    label = np.empty((count, BLOBS_SIZE, BLOBS_SIZE), dtype=np.int64)
    for part in _chunks(count):
        scene = _draw_blobs(seed, part, task_seed)
        owner = _visible_ellipse(scene)
        image[part.start : part.stop] = _to_pixels(_render_blobs(scene, owner), BLOBS_STD)
        label[part.start : part.stop] = _classes_of(scene, owner)
    return Blobs(torch.from_numpy(image), torch.from_numpy(label))


def _types_and_labels(classes: str) -> tuple[int, int]:
    if classes not in _TYPES_AND_LABELS:
        raise ValueError(f"classes must be one of {tuple(_TYPES_AND_LABELS)}, got {classes!r}")
    return _TYPES_AND_LABELS[classes]


def _chunks(count: int) -> list[range]:
    return [range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]


def _to_pixels(value: Float[ndarray, "..."], std: float) -> UInt8[ndarray, "..."]:
    """Values as 8-bit pixels, 0 in the middle."""
    return np.clip(np.rint(255 * (0.5 + std * value)), 0, 255).astype(np.uint8)


class _Table(NamedTuple):
    """What the waves of a class (or texture) look like."""

    angle: Float[ndarray, "classes waves"]
    frequency: Float[ndarray, "classes waves"]
    colour: Float[ndarray, "classes waves 3"]


def _grating_types(types: int, task_seed: int) -> _Table:
    """The two gratings of every type."""
    streams = _Streams(_GRATINGS_TABLE, task_seed, range(types), 10)
    angle = streams.between(0, np.pi, 2)
    return _Table(angle, streams.between(0.18, 0.40, 2), streams.direction(2))


def _draw_gratings(
    seed: int, indices: range, types: int, task_seed: int, size: int
) -> _GratingScene:
    streams = _Streams(_GRATINGS, seed, indices, 37 + 3 * size**2)
    fine = (types * streams.uniform()).astype(np.int64)
    own, clutter = _own_waves(streams, fine, types, task_seed, size), _clutter(streams, size)
    waves = _Waves(*(np.concatenate(pair, axis=1) for pair in zip(own, clutter, strict=True)))
    return _GratingScene(fine, waves, streams.normal(3, size, size))


def _own_waves(
    streams: _Streams, fine: Int[ndarray, " batch"], types: int, task_seed: int, size: int
) -> _Waves:
    """The two gratings of each image's type, jittered."""
    table = _grating_types(types, task_seed)
    amplitude = _OWN_AMPLITUDE * streams.between(0.8, 1.2, 2)
    return _Waves(
        colour=amplitude[..., None] * (table.colour[fine] + 0.25 * streams.normal(2, 3)),
        angle=table.angle[fine] + 0.15 * streams.normal(2),
        frequency=table.frequency[fine] * (1 + 0.08 * streams.normal(2)),
        phase=streams.between(0, 2 * np.pi, 2),
        centre=streams.between(_ENVELOPE, size - _ENVELOPE, 2, 2),
    )


def _clutter(streams: _Streams, size: int) -> _Waves:
    amplitude = _CLUTTER_AMPLITUDE * streams.uniform(_CLUTTER)
    return _Waves(
        colour=amplitude[..., None] * streams.direction(_CLUTTER),
        angle=streams.between(0, np.pi, _CLUTTER),
        frequency=streams.between(0.15, 0.40, _CLUTTER),
        phase=streams.between(0, 2 * np.pi, _CLUTTER),
        centre=streams.between(_ENVELOPE, size - _ENVELOPE, _CLUTTER, 2),
    )


def _offsets(
    centre: Float[ndarray, "batch things 2"], size: int
) -> tuple[Float[ndarray, "batch things 1 size"], Float[ndarray, "batch things size 1"]]:
    """How far right and how far below a centre every column and every row lies."""
    pixel = np.arange(size)
    return pixel - centre[..., None, None, 0], pixel[:, None] - centre[..., None, None, 1]


def _cosines(waves: _Waves, size: int) -> Float[ndarray, "batch waves size size"]:
    x, y = _offsets(waves.centre, size)
    angle, frequency = waves.angle[..., None, None], waves.frequency[..., None, None]
    along = x * np.cos(angle) + y * np.sin(angle)
    return np.cos(2 * np.pi * frequency * along + waves.phase[..., None, None])


def _render_gratings(scene: _GratingScene) -> Float[ndarray, "batch 3 size size"]:
    """The waves under their round envelopes, and the noise."""
    size = scene.noise.shape[-1]
    x, y = _offsets(scene.waves.centre, size)
    scale = -0.5 / _ENVELOPE**2
    wave = _cosines(scene.waves, size) * np.exp(scale * x**2) * np.exp(scale * y**2)
    return np.einsum("nwc,nwyx->ncyx", scene.waves.colour, wave) + _GRATINGS_NOISE * scene.noise


def _textures(task_seed: int) -> _Table:
    """The five textures, a wave each."""
    streams = _Streams(_BLOBS_TABLE, task_seed, range(_TEXTURES), 4)
    angle = np.pi * np.arange(_TEXTURES)[:, None] / _TEXTURES
    return _Table(angle, streams.between(0.16, 0.28, 1), streams.direction(1))


def _draw_blobs(seed: int, indices: range, task_seed: int) -> _BlobScene:
    streams = _Streams(_BLOBS, seed, indices, 48 + 3 * BLOBS_SIZE**2)
    texture = (_TEXTURES * streams.uniform(_ELLIPSES)).astype(np.int64)
    fillings = _fillings(streams, texture, task_seed)
    waves = _Waves(
        *(np.concatenate(pair, axis=1) for pair in zip(_background(streams), fillings, strict=True))
    )
    return _BlobScene(
        texture,
        waves,
        centre=streams.between(*_CENTRES, _ELLIPSES, 2),
        half_axes=streams.between(*_HALF_AXES, _ELLIPSES, 2),
        angle=streams.between(0, np.pi, _ELLIPSES),
        noise=streams.normal(3, BLOBS_SIZE, BLOBS_SIZE),
    )


def _background(streams: _Streams) -> _Waves:
    return _Waves(
        colour=_BACKGROUND_AMPLITUDE * streams.direction(1),
        angle=streams.between(0, np.pi, 1),
        frequency=streams.between(0.16, 0.28, 1),
        phase=streams.between(0, 2 * np.pi, 1),
        centre=np.zeros((*streams.uniform().shape, 1, 2)),
    )


def _fillings(streams: _Streams, texture: Int[ndarray, "batch ellipses"], task_seed: int) -> _Waves:
    """The textures of each image's ellipses, jittered."""
    table = _Table(*(part[:, 0] for part in _textures(task_seed)))
    return _Waves(
        colour=table.colour[texture] + 0.35 * streams.normal(_ELLIPSES, 3),
        angle=table.angle[texture] + 0.12 * streams.normal(_ELLIPSES),
        frequency=table.frequency[texture] * (1 + 0.08 * streams.normal(_ELLIPSES)),
        phase=streams.between(0, 2 * np.pi, _ELLIPSES),
        centre=np.zeros((*texture.shape, 2)),
    )


def _visible_ellipse(scene: _BlobScene) -> Int[ndarray, "batch 24 24"]:
    """Which ellipse is seen at each pixel, counted from 1; 0 is the background."""
    x, y = _offsets(scene.centre, BLOBS_SIZE)
    cos, sin = np.cos(scene.angle)[..., None, None], np.sin(scene.angle)[..., None, None]
    first, second = scene.half_axes[..., None, None, 0], scene.half_axes[..., None, None, 1]
    inside = ((x * cos + y * sin) / first) ** 2 + ((y * cos - x * sin) / second) ** 2 <= 1
    owner = np.zeros((len(inside), BLOBS_SIZE, BLOBS_SIZE), dtype=np.int64)
    for ellipse in range(_ELLIPSES):
        owner[inside[:, ellipse]] = ellipse + 1
    return owner


def _pick(
    values: Shaped[ndarray, "batch things *rest"], owner: Int[ndarray, "batch 24 24"]
) -> Shaped[ndarray, "batch 24 24 *rest"]:
    """Every pixel's value, that of the thing that owns it."""
    return values[np.arange(len(owner))[:, None, None], owner]


def _render_blobs(
    scene: _BlobScene, owner: Int[ndarray, "batch 24 24"]
) -> Float[ndarray, "batch 3 24 24"]:
    wave = np.take_along_axis(_cosines(scene.waves, BLOBS_SIZE), owner[:, None], axis=1)[:, 0]
    # the background has no tint, and its colour has its amplitude
    brightness = np.where(owner > 0, _WAVE * wave + _TINT, wave)
    colour = np.moveaxis(_pick(scene.waves.colour, owner), -1, 1)
    return colour * brightness[:, None] + _BLOBS_NOISE * scene.noise


def _classes_of(
    scene: _BlobScene, owner: Int[ndarray, "batch 24 24"]
) -> Int[ndarray, "batch 24 24"]:
    classes = np.concatenate([np.zeros((len(owner), 1), np.int64), scene.texture + 1], axis=1)
    return _pick(classes, owner)
