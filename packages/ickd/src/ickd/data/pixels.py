"""Small images in memory as 8-bit pixels: whole batches by index, cropped and flipped by key."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from tenfold.data import Draw, as_draw
from tenfold.training import mix


class Batch(NamedTuple):
    """A batch of images.

    Attributes:
        image: pixels in 0..1, not normalised: every network has its own normalisation.
        label: classes, -1 where there are none.
        index: position in the training split (or in another one), whatever part of it is used.
    """

    image: Float[Tensor, "batch 3 height width"]
    label: Int[Tensor, " batch"]
    index: Int[Tensor, " batch"]  # pyright: ignore[reportIncompatibleMethodOverride]


class Pixels(NamedTuple):
    """A split in memory; fields as those of `Batch`, but pixels are 0..255."""

    image: UInt8[Tensor, "items 3 height width"]
    label: Int[Tensor, " items"]
    index: Int[Tensor, " items"]  # pyright: ignore[reportIncompatibleMethodOverride]


class PixelItems(Dataset[Batch]):
    """Batches of images in memory, ten times faster than images one by one.

    Args:
        pixels: the split.
        pad: zero pixels around an image before a crop of its own size is drawn; images that are
            padded are also flipped, half of them. 0 leaves images as they are.
        seed: crop and flip are a function of (seed, epoch, index of the image).
    """

    def __init__(self, pixels: Pixels, pad: int = 0, seed: int = 0) -> None:
        self.pixels, self.pad, self.seed = pixels, pad, seed

    def __len__(self) -> int:
        return len(self.pixels.image)

    def __getitems__(self, keys: Sequence[Draw | int]) -> Batch:
        draws = [as_draw(key) for key in keys]
        rows = torch.tensor([draw.index for draw in draws])
        image, label, index = (field.index_select(0, rows) for field in self.pixels)
        if self.pad:
            epochs = (draw.epoch for draw in draws)
            keyed = zip(epochs, index.tolist(), strict=True)
            numbers = (mix(self.seed, epoch, position) for epoch, position in keyed)
            image = crop_and_flip(image, *draw_crops(numbers, self.pad), self.pad)
        return Batch(image.float().mul_(1 / 255), label, index)  # torchvision's scaling, bit by bit

    def __getitem__(self, key: Draw | int) -> Batch:
        return Batch(*(field[0] for field in self.__getitems__([key])))


def draw_crops(
    numbers: Iterable[int], pad: int
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """(top, left, flip) out of one random 64-bit number for each image: 0..2 pad, 0..2 pad, 0..1.

    As far from uniform as 2^64 is from a multiple of the number of outcomes.
    """
    crops = []
    for number in numbers:
        rest, top = divmod(number, 2 * pad + 1)
        rest, left = divmod(rest, 2 * pad + 1)
        crops.append((top, left, rest % 2))
    top, left, flip = torch.tensor(crops).unbind(1)
    return top, left, flip


def crop_and_flip(
    image: UInt8[Tensor, "batch 3 height width"],
    top: Int[Tensor, " batch"],
    left: Int[Tensor, " batch"],
    flip: Int[Tensor, " batch"],
    pad: int,
) -> UInt8[Tensor, "batch 3 height width"]:
    """Each image's own window on the zero-padded image, mirrored where `flip` is 1."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (pad, pad, pad, pad))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: nothing is copied yet
    cropped = windows[torch.arange(len(image)), :, top, left]
    return torch.where(flip.bool().view(-1, 1, 1, 1), cropped.flip(3), cropped)
