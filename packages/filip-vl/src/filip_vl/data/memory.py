"""Pairs that are in memory already."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from filip_vl.data.pairs import Pairs, gather
from tenfold.errors import UserError


def pairs_in_memory(pairs: Sequence[tuple[Any, str | Sequence[str]]], name: str = "pair") -> Pairs:
    """Images with captions as they are.

    Args:
        pairs: (image, caption or captions); an image is PIL's, a uint8 array (height, width, 3) or
            (height, width), the bytes of a file, or its path.
        name: what a pair is called in messages.

    Raises:
        UserError: no pair.
        ValueError: an array that is no picture.
    """
    if not len(pairs):
        raise UserError("no pairs of image and caption")
    records = []
    for number, (image, captions) in enumerate(pairs):
        if not isinstance(image, Image.Image | bytes | str) and hasattr(image, "__array__"):
            image = np.asarray(image)
            colours = image.shape[2:] in ((), (3,), (4,)) and image.ndim >= 2
            if image.dtype != np.uint8 or not colours:
                what = f"image {number} is a {image.dtype} array of shape {image.shape}"
                raise ValueError(f"{what}, not uint8 (height, width, 3)")
        texts = [captions] if isinstance(captions, str) else list(captions)
        records.append((image, texts, f"{name} {number}"))
    return gather(records)
