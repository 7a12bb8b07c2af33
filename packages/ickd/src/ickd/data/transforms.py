"""What happens to a photograph before the networks: torchvision's transforms, pixels in 0..1."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import v2

from ickd.networks import CIFAR100_MEAN, CIFAR100_STD, IMAGENET_MEAN, IMAGENET_STD
from ickd.synthetic import GRATINGS_MEAN, GRATINGS_STD
from tenfold.errors import UserError

AUGMENTATIONS = ("none", "cifar", "imagenet")

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
Transform = Callable[[Image.Image], Any]

_IMAGENET: Statistics = (IMAGENET_MEAN, IMAGENET_STD)
_STATISTICS: dict[str, Statistics] = {
    "generated": ((GRATINGS_MEAN,) * 3, (GRATINGS_STD,) * 3),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (CIFAR100_MEAN, CIFAR100_STD),
}


def statistics(source: str) -> Statistics:
    """(mean, std) of each colour, of pixels in 0..1; ImageNet's for a source without its own."""
    return _STATISTICS.get(source, _IMAGENET)


def padding(size: int) -> int:
    """Zero pixels around an image of a side before it is cropped: 4 for the 32 pixels of CIFAR."""
    return size // 8


def train_transform(augment: str, size: int, crop: float | None) -> Transform:
    """Augmentation of training images.

    "none" leaves them as in evaluation; "cifar" takes from there a crop out of the image with a
    zero border, and flips half of them; "imagenet" takes random parts of the whole image (8 to
    100 % of the area, sides 3:4 to 4:3), resizes them and flips half.

    Args:
        augment: one of `AUGMENTATIONS`.
        size: side of the result in pixels.
        crop: see `eval_transform`.

    Raises:
        UserError: an unknown augmentation.
    """
    if augment not in AUGMENTATIONS:
        raise UserError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {augment!r}")
    if augment == "none":
        return eval_transform(size, crop)
    if augment == "imagenet":
        steps = [v2.RandomResizedCrop(size, antialias=True)]
    else:
        steps = [*_framing(size, crop), v2.RandomCrop(size, padding=padding(size))]
    scale = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([*steps, v2.RandomHorizontalFlip(), v2.PILToTensor(), scale])


def eval_transform(size: int, crop: float | None) -> Transform:
    """Resizes the short side to size / crop and crops the centre (bilinear).

    Args:
        size: side of the result in pixels.
        crop: share of the resized image's side that is kept; None resizes to `size` x `size` alone,
            for images that are small and square.
    """
    scale = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([*_framing(size, crop), v2.PILToTensor(), scale])


def pixel_transform(size: int, crop: float | None) -> Transform:
    """As `eval_transform`, but 8-bit: what is kept in memory."""
    return v2.Compose([*_framing(size, crop), v2.PILToTensor()])


def _framing(size: int, crop: float | None) -> list[Any]:
    if crop is None:
        return [_Fit(size)]
    return [v2.Resize(int(size / crop), antialias=True), v2.CenterCrop(size)]


class _Fit:
    """Resizes to a square unless the image has that size already."""

    def __init__(self, size: int) -> None:
        self.size = (size, size)

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.size == self.size:
            return image
        return image.resize(self.size, Image.Resampling.BILINEAR)
