"""What happens to an image and its labels before the network (sections 4.4 and 5).

Both stay PIL images until the end: resizing labels takes the nearest pixel, resizing images is
bilinear (antialiased where it makes them smaller).
"""

import random
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from ickd.metrics import IGNORE

SCALES = (0.5, 2.0)
"""Range of the short side in training, in units of the base size."""

BLUR = 0.5
"""Share of the training images that are blurred, with a radius from 0 to 1."""


class Pair(NamedTuple):
    """An image, (3, height, width) in 0..1, and its labels."""

    image: Float[Tensor, "3 height width"]
    label: Int[Tensor, "high wide"]


def resize_short(
    image: Image.Image, short: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """Make the short side `short` pixels, the long one in proportion, rounded down."""
    width, height = image.size
    if width < height:
        size = (short, max(short, height * short // width))
    else:
        size = (max(short, width * short // height), short)
    return image if size == image.size else image.resize(size, resample)


def to_pair(image: Image.Image, label: Image.Image) -> Pair:
    """Pixels in 0..1, not normalised, and labels as whole numbers."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    classes = torch.from_numpy(np.array(label, dtype=np.uint8))
    return Pair(pixels.contiguous().float() / 255, classes.long())


class TrainTransform:
    """Flip, random scale, random crop, blur.

    Randomness comes from Python's global generator, which the loaders seed for every item.

    Args:
        base_size: of which the short side becomes 0.5 to 2 times as much.
        crop_size: side of the result; what is smaller is padded to the right and below with black.
        reference_compat: label the padding 0 (background), as the published program does, instead
            of 255 (not to be learned).
    """

    def __init__(
        self, base_size: int = 513, crop_size: int = 513, *, reference_compat: bool = False
    ) -> None:
        self.base_size, self.crop_size = base_size, crop_size
        self.label_fill = 0 if reference_compat else IGNORE

    def __call__(self, image: Image.Image, label: UInt8[np.ndarray, "high wide"]) -> Pair:
        """An augmented crop, the same for the image and its labels."""
        mask = Image.fromarray(label)
        if random.random() < 0.5:
            image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
        low, high = (int(scale * self.base_size) for scale in SCALES)
        short = random.randint(low, high)
        image = resize_short(image, short)
        mask = resize_short(mask, short, Image.Resampling.NEAREST)
        image, mask = self._crop(image, mask)
        if random.random() < BLUR:
            image = image.filter(ImageFilter.GaussianBlur(random.random()))
        return to_pair(image, mask)

    def _crop(self, image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
        side = self.crop_size
        right, below = max(side - image.width, 0), max(side - image.height, 0)
        if right or below:
            image = ImageOps.expand(image, (0, 0, right, below), 0)
            mask = ImageOps.expand(mask, (0, 0, right, below), self.label_fill)
        left = random.randint(0, image.width - side)
        top = random.randint(0, image.height - side)
        box = (left, top, left + side, top + side)
        return image.crop(box), mask.crop(box)


class EvalTransform:
    """The image with a short side of `base_size`, uncropped.

    Args:
        base_size: of the short side.
        resize_label: take the labels to the same size, which is the published protocol, or leave
            them as they are on disk.
    """

    def __init__(self, base_size: int = 513, *, resize_label: bool = True) -> None:
        self.base_size, self.resize_label = base_size, resize_label

    def __call__(self, image: Image.Image, label: UInt8[np.ndarray, "high wide"]) -> Pair:
        """The whole image and its labels."""
        mask = Image.fromarray(label)
        if self.resize_label:
            mask = resize_short(mask, self.base_size, Image.Resampling.NEAREST)
        return to_pair(resize_short(image, self.base_size), mask)
