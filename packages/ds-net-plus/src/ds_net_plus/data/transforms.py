"""What happens to an image before the network: timm's and torchvision's transforms by name."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms_factory import create_transform
from torchvision.transforms import v2

from ds_net_plus.synthetic import MEAN, STD
from tenfold.errors import UserError

AUGMENTATIONS = ("none", "light", "rand-m7", "imagenet", "deit")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Transform = Callable[[Image.Image], Any]


def normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each colour, of pixels in 0..1: ImageNet's, or those of the grey glyphs."""
    return ((MEAN,), (STD,)) if channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)


def train_transform(
    augment: str, size: int, mean: Sequence[float], std: Sequence[float]
) -> Transform:
    """Augmentation of training images.

    "none" resizes; "light" adds a shifted crop and a flip; "rand-m7" adds RandAugment of
    magnitude 7; "imagenet" is the recipe of the paper: random resized crop with random
    interpolation, flip, RandAugment m9 std 0.5, random erasing of 20 % with noise; "deit" is the
    same with bicubic interpolation and erasing of 25 %.

    Args:
        augment: one of `AUGMENTATIONS`.
        size: side of the result in pixels.
        mean: of the normalisation, one value for each colour.
        std: of the normalisation.

    Raises:
        UserError: an unknown augmentation, or "imagenet" and "deit" for grey images.
    """
    if augment not in AUGMENTATIONS:
        raise UserError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {augment!r}")
    if augment in ("imagenet", "deit"):
        if len(mean) != 3:
            raise UserError(f"augment {augment} needs colour images")
        return create_transform(  # pyright: ignore[reportReturnType]
            size,
            is_training=True,
            auto_augment="rand-m9-mstd0.5",
            interpolation="random" if augment == "imagenet" else "bicubic",
            re_prob=0.2 if augment == "imagenet" else 0.25,
            re_mode="pixel",
            color_jitter=None,  # pyright: ignore[reportArgumentType]
            mean=tuple(mean),
            std=tuple(std),
        )
    steps: list[Any] = [_Fit(size)]
    if augment != "none":
        steps += [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]
    if augment == "rand-m7":
        fill = tuple(round(255 * m) for m in mean)
        steps.append(rand_augment_transform("rand-m7-mstd0.5", {"img_mean": fill}))
    return v2.Compose([*steps, *_to_tensor(mean, std)])


def eval_transform(
    size: int, mean: Sequence[float], std: Sequence[float], crop: float | None = 0.875
) -> Transform:
    """Resizes the short side to size / crop, crops the centre, normalises (bicubic).

    Args:
        size: side of the result in pixels.
        mean: of the normalisation.
        std: of the normalisation.
        crop: share of the resized image's side that is kept; None resizes to `size` x `size` alone,
            for images that are small and square.
    """
    if crop is None:
        return v2.Compose([_Fit(size), *_to_tensor(mean, std)])
    resize = v2.Resize(int(size / crop), v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size), *_to_tensor(mean, std)])


class _Fit:
    """Resizes to a square unless the image has that size already."""

    def __init__(self, size: int) -> None:
        self.size = (size, size)

    def __call__(self, image: Image.Image) -> Image.Image:
        return (
            image if image.size == self.size else image.resize(self.size, Image.Resampling.BICUBIC)
        )


def _to_tensor(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    grey = [v2.Grayscale(1)] if len(mean) == 1 else []
    scale = v2.ToDtype(torch.float32, scale=True)
    return [*grey, v2.PILToTensor(), scale, v2.Normalize(list(mean), list(std))]
