"""shapes: the embedded default task, pictures of two to four coloured shapes and their captions.

A caption names all objects, so that one vector for a picture must hold the whole set of colours and
shapes, while vectors of tokens can match each phrase with its patch. Which object a pixel belongs
to is known, so that localisation is a number.

Every scene is a function of (seed, index) alone: all its random numbers come from one counter-based
Philox generator (Salmon et al., 2011) whose key they are, so neither the number of scenes nor their
order can change it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from numpy import ndarray

SIZE, CELLS = 48, 3
"""Side of the pictures in pixels, and cells along it."""

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 220, 50),
    "purple": (160, 60, 200),
    "cyan": (60, 210, 220),
    "orange": (240, 140, 30),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
PREFIXES = ("a photo of", "a picture of", "an image of", "there is", "")
CLASS_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
CLASS_TEMPLATE = "a photo of a {}"

TRAIN_PAIRS, TEST_PAIRS, GROUPS = 4000, 400, 60
"""Size of the default sets; `GROUPS` counts groups of near duplicates."""

TRAIN_SEED, TEST_SEED = 1000, 7
"""Training set s has the seed `TRAIN_SEED` + s."""

_KINDS = len(CLASS_NAMES)
_CELL = SIZE // CELLS
_MOST = 4  # objects in a scene
_GROUP = 4  # scenes in a group of near duplicates
# Which of the unrelated streams of a key is read.
_SCENES, _GROUPS, _SINGLES = range(3)

_BASE, _SLOPE = (30.0, 130.0), (-25.0, 25.0)
_LUMINANCE_NOISE, _CHROMA_NOISE = 18.0, 7.2
_RADIUS = (0.32 * _CELL, 0.45 * _CELL)
_TINT, _GRAIN = 12.0, 8.0


class Shape(NamedTuple):
    """One object: its looks, and its place in pixels (x to the right, y down)."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """Colour and shape, a class name."""
        return f"{self.colour} {self.shape}"


class Phrase(NamedTuple):
    """Where in the caption an object is named: first character and the one behind the last."""

    article: tuple[int, int]
    colour: tuple[int, int]
    shape: tuple[int, int]


class Scene(NamedTuple):
    """A picture and its caption.

    Object n of `objects` fills the pixels where `instances` is n + 1 (0 is the background) and is
    named by phrase n.
    """

    image: UInt8[ndarray, "48 48 3"]
    instances: Int64[ndarray, "48 48"]
    objects: tuple[Shape, ...]
    caption: str
    phrases: tuple[Phrase, ...]


class _Wording(NamedTuple):
    """What a caption says besides the objects: how it begins, and their order."""

    prefix: str
    order: tuple[int, ...]


class _Canvas(NamedTuple):
    """All of a picture but its objects; noise is standard normal."""

    base: Float[ndarray, " 3"]
    slope: Float[ndarray, "2 3"]
    luminance: Float[ndarray, "48 48"]
    chroma: Float[ndarray, "48 48 3"]
    tint: Float[ndarray, "4 3"]
    grain: Float[ndarray, "48 48 3"]


class _Stream:
    """Random numbers of one key (seed, index).

    They are made from Philox's bits by this class, not by NumPy's distributions, which may change
    from one version to the next.
    """

    def __init__(self, domain: int, seed: int, index: int) -> None:
        key = np.array([seed % 2**64, index % 2**64], dtype=np.uint64)
        counter = np.array([0, 0, 0, domain], dtype=np.uint64)
        self._bits = np.random.Philox(counter=counter, key=key)

    def uniform(self, *shape: int) -> Float[ndarray, "..."]:
        """The next numbers, in the open interval (0, 1)."""
        bits = self._bits.random_raw(math.prod(shape))
        return (((bits >> np.uint64(11)) + 0.5) * 2.0**-53).reshape(shape)

    def number(self) -> float:
        """The next number, in the open interval (0, 1)."""
        return ((self._bits.random_raw() >> 11) + 0.5) * 2.0**-53

    def between(self, low: float, high: float, *shape: int) -> Float[ndarray, "..."]:
        """The next numbers, uniform from `low` to `high`."""
        return low + (high - low) * self.uniform(*shape)

    def below(self, stop: int) -> int:
        """The next integer from 0 to `stop` - 1."""
        return int(stop * self.number())

    def chosen(self, count: int, stop: int) -> list[int]:
        """The next `count` different integers from 0 to `stop` - 1, in random order."""
        return np.argsort(self.uniform(stop))[:count].tolist()

    def normal(self, *shape: int) -> Float[ndarray, "..."]:
        """The next numbers, standard normal (Box and Muller, 1958)."""
        count = math.prod(shape)
        length, angle = self.uniform(2, (count + 1) // 2)
        length, angle = np.sqrt(-2 * np.log(length)), 2 * np.pi * angle
        numbers = np.concatenate([length * np.cos(angle), length * np.sin(angle)])
        return numbers[:count].reshape(shape)


def scene(seed: int, index: int) -> Scene:
    """Scene `index` of the set `seed` (section 9).

    Two to four objects in different cells of a 3 × 3 grid, no two of them the same colour and
    shape.

    Args:
        seed: of the set, any integer.
        index: of the scene in the set, 0 or more.

    Example:
        >>> scene(seed=7, index=0).caption
        'an orange circle and a cyan cross and a purple ring and a green square'
    """
    stream = _Stream(_SCENES, seed, index)
    objects, wording = _draw(stream)
    return _assemble(objects, wording, _canvas(stream))


def near_duplicates(seed: int, group: int) -> tuple[Scene, ...]:
    """Four scenes of which the last three differ from the first in one colour or one shape each.

    Everything else, every pixel of the background and every other word included, is the same. No
    two of the four show the same set of objects. They are meant for retrieval inside the group,
    where chance is 1/4.

    Args:
        seed: of the set, any integer.
        group: index of the group in the set, 0 or more.
    """
    stream = _Stream(_GROUPS, seed, group)
    objects, wording = _draw(stream)
    canvas, variants = _canvas(stream), [objects]
    while len(variants) < _GROUP:
        variant = _altered(stream, objects)
        names = {shape.name for shape in variant}
        if len(names) == len(variant) and all(names != _names(other) for other in variants):
            variants.append(variant)
    return tuple(_assemble(variant, wording, canvas) for variant in variants)


def single_object(seed: int, index: int) -> Scene:
    """A lone object of class `index` mod 48, in any cell.

    No training scene has fewer than two objects, so these are out of distribution. The caption is
    `CLASS_TEMPLATE` with the class name.

    Args:
        seed: of the set, any integer.
        index: of the picture in the set, 0 or more.
    """
    stream = _Stream(_SINGLES, seed, index)
    colour, shape = CLASS_NAMES[index % _KINDS].split()
    (lone,) = _placed(stream, [(colour, shape)])
    pixels = _render((lone,), _canvas(stream))
    caption = CLASS_TEMPLATE.format(lone.name)
    return Scene(*pixels, (lone,), caption, (_phrase_at(len("a photo of "), "a", lone),))


def exchanged_caption(scene: Scene) -> str | None:
    """The caption with two objects' colours exchanged, which is false (section 5.6, binding).

    The objects are the first two whose colours and shapes both differ; None if there are none,
    since an exchange would then name the same objects.
    """
    for n, first in enumerate(scene.objects):
        for m, second in enumerate(scene.objects[:n]):
            if first.colour != second.colour and first.shape != second.shape:
                objects = list(scene.objects)
                objects[n] = first._replace(colour=second.colour)
                objects[m] = second._replace(colour=first.colour)
                return _worded(objects, _wording_of(scene))[0]
    return None


def _names(objects: Sequence[Shape]) -> set[str]:
    return {shape.name for shape in objects}


def _draw(stream: _Stream) -> tuple[tuple[Shape, ...], _Wording]:
    """Objects and how they are told."""
    count = 2 + stream.below(_MOST - 1)
    kinds = [CLASS_NAMES[kind].split() for kind in stream.chosen(count, _KINDS)]
    objects = _placed(stream, [(colour, shape) for colour, shape in kinds])
    prefix = PREFIXES[stream.below(len(PREFIXES))]
    return objects, _Wording(prefix, tuple(stream.chosen(count, count)))


def _placed(stream: _Stream, kinds: Sequence[tuple[str, str]]) -> tuple[Shape, ...]:
    """Objects in different cells, up to a pixel beside their middle."""
    objects = []
    for (colour, shape), cell in zip(kinds, stream.chosen(len(kinds), CELLS**2), strict=True):
        row, column = divmod(cell, CELLS)
        x, y = (_CELL * n + (_CELL - 1) / 2 + stream.below(3) - 1 for n in (column, row))
        objects.append(Shape(colour, shape, x, y, float(stream.between(*_RADIUS, 1)[0])))
    return tuple(objects)


def _altered(stream: _Stream, objects: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """The objects with one colour or one shape drawn anew."""
    n = stream.below(len(objects))
    if stream.below(2):
        shape = objects[n]._replace(colour=tuple(COLOURS)[stream.below(len(COLOURS))])
    else:
        shape = objects[n]._replace(shape=SHAPES[stream.below(len(SHAPES))])
    return (*objects[:n], shape, *objects[n + 1 :])


def _canvas(stream: _Stream) -> _Canvas:
    return _Canvas(
        base=stream.between(*_BASE, 3),
        slope=stream.between(*_SLOPE, 2, 3),
        luminance=stream.normal(SIZE, SIZE),
        chroma=stream.normal(SIZE, SIZE, 3),
        tint=stream.normal(_MOST, 3),
        grain=stream.normal(SIZE, SIZE, 3),
    )


def _assemble(objects: tuple[Shape, ...], wording: _Wording, canvas: _Canvas) -> Scene:
    return Scene(*_render(objects, canvas), objects, *_worded(objects, wording))


def _render(
    objects: Sequence[Shape], canvas: _Canvas
) -> tuple[UInt8[ndarray, "48 48 3"], Int64[ndarray, "48 48"]]:
    """The picture, and which object is seen at each pixel, counted from 1."""
    along = np.linspace(-0.5, 0.5, SIZE)[:, None]
    across, down = along * canvas.slope[0], along * canvas.slope[1]
    noise = _LUMINANCE_NOISE * canvas.luminance[..., None] + _CHROMA_NOISE * canvas.chroma
    value = canvas.base + across[None, :] + down[:, None] + noise
    instances = np.zeros((SIZE, SIZE), dtype=np.int64)
    pixel = np.arange(SIZE)
    for n, shape in enumerate(objects):
        inside = _inside(shape, pixel[None, :] - shape.x, pixel[:, None] - shape.y)
        fill = np.array(COLOURS[shape.colour]) + _TINT * canvas.tint[n]
        value[inside] = fill + _GRAIN * canvas.grain[inside]
        instances[inside] = n + 1
    return np.clip(np.rint(value), 0, 255).astype(np.uint8), instances


def _inside(
    shape: Shape, x: Float[ndarray, "1 width"], y: Float[ndarray, "height 1"]
) -> Bool[ndarray, "height width"]:
    """Which points, seen from the object's middle, belong to it."""
    r = shape.radius
    match shape.shape:
        case "circle":
            return x**2 + y**2 <= r**2
        case "square":
            return (abs(x) <= 0.85 * r) & (abs(y) <= 0.85 * r)
        case "triangle":
            return (-r <= y) & (y <= 0.8 * r) & (abs(x) <= 0.55 * (y + r))
        case "cross":
            thin, long = 0.32 * r, r
            upright = (abs(x) <= thin) & (abs(y) <= long)
            return upright | ((abs(x) <= long) & (abs(y) <= thin))
        case "ring":
            distance = x**2 + y**2
            return (distance <= r**2) & (distance >= (0.55 * r) ** 2)
        case "diamond":
            return abs(x) + abs(y) <= 1.1 * r
    raise ValueError(f"a shape is one of {SHAPES}, not {shape.shape!r}")


def _worded(objects: Sequence[Shape], wording: _Wording) -> tuple[str, tuple[Phrase, ...]]:
    """Caption, and where in it every object is named."""
    caption, phrases = wording.prefix, {}
    for place, n in enumerate(wording.order):
        caption += " and " if place else " " if caption else ""
        article = "an" if objects[n].colour[0] in "aeiou" else "a"
        phrases[n] = _phrase_at(len(caption), article, objects[n])
        caption += f"{article} {objects[n].name}"
    return caption, tuple(phrases[n] for n in range(len(objects)))


def _phrase_at(first: int, article: str, shape: Shape) -> Phrase:
    spans = []
    for word in (article, shape.colour, shape.shape):
        spans.append((first, first + len(word)))
        first += len(word) + 1
    return Phrase(*spans)


def _wording_of(scene: Scene) -> _Wording:
    """What `_worded` was given for a scene."""
    order = sorted(range(len(scene.objects)), key=lambda n: scene.phrases[n].article)
    return _Wording(scene.caption[: scene.phrases[order[0]].article[0]].strip(), tuple(order))
