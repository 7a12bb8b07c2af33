"""The generated pairs of `filip_vl.synthetic` as a source like any other."""

from functools import lru_cache

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from filip_vl.data.pairs import Computed, Pairs
from filip_vl.synthetic import CLASS_NAMES, PREFIXES, SIZE, scene

CONTEXT_LENGTH = 24


@lru_cache(maxsize=4)  # the training and validation scenes of a comparison, once for all its runs
def shape_pairs(seed: int, count: int) -> Pairs:
    """The first scenes of a set with their captions, drawn when they are wanted and then kept.

    Args:
        seed: of the set.
        count: number of scenes; each takes 7 KiB.
    """
    scenes = _Scenes(seed, count)
    return Pairs(
        Computed(count, scenes.image),
        Computed(count, lambda index: [scenes.caption(index)]),
        Computed(count, lambda index: f"scene {index} of set {seed}"),
    )


def shape_vocabulary() -> list[str]:
    """Captions with every word that a scene's caption can have, whatever set it is of."""
    objects = " and ".join(f"a {name}" for name in CLASS_NAMES)
    return [f"{prefix} {objects} and an {CLASS_NAMES[0]}".strip() for prefix in PREFIXES]


class _Scenes:
    """Scenes that are drawn once."""

    def __init__(self, seed: int, count: int) -> None:
        self._seed = seed
        self._images = np.zeros((count, SIZE, SIZE, 3), dtype=np.uint8)
        self._captions: dict[int, str] = {}

    def image(self, index: int) -> UInt8[ndarray, "48 48 3"]:
        self._draw(index)
        return self._images[index]

    def caption(self, index: int) -> str:
        self._draw(index)
        return self._captions[index]

    def _draw(self, index: int) -> None:
        if index not in self._captions:
            drawn = scene(self._seed, index)
            self._images[index], self._captions[index] = drawn.image, drawn.caption
