"""From images to normalised pixels: training with augmentation, and evaluation."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torchvision.transforms import v2

from tenfold.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue in 0..1, over CLIP's training images."""

CROP_SCALE = (0.2, 1.0)
_JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue

Augmentation = Literal["paper", "mindformers", "crop", "none"]
Transform = Callable[[Any], Any]


def train_transform(
    size: int, augment: str = "paper", crop_scale: Sequence[float] = CROP_SCALE
) -> Transform:
    """Augmentation of training images (section 3.10 of the paper's appendix names the policy).

    "paper" takes a random part of the image, resizes it (bicubic), flips half of the images and
    applies AutoAugment's ImageNet policy (Cubuk et al., CVPR 2019); "mindformers" adds jitter of
    colour before the policy; "crop" is the random part alone, as CLIP was trained; "none" is
    `eval_transform`. Flips and colours change what captions say where they name sides or colours.

    Args:
        size: side of the result in pixels.
        augment: one of `Augmentation`.
        crop_scale: smallest and largest share of the area that a crop keeps.

    Raises:
        UserError: no such augmentation, or shares that are none.
    """
    if augment not in get_args(Augmentation):
        known = ", ".join(get_args(Augmentation))
        raise UserError(f"augment must be one of {known}, got {augment!r}")
    if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        shares = ", ".join(map(str, crop_scale))
        raise UserError(f"crop_scale must be two rising shares above 0 up to 1, got {shares}")
    if augment == "none":
        return eval_transform(size)
    bicubic = v2.InterpolationMode.BICUBIC
    scale = (crop_scale[0], crop_scale[1])
    steps: list[Any] = [v2.RandomResizedCrop(size, scale, interpolation=bicubic, antialias=True)]
    if augment != "crop":
        steps.append(v2.RandomHorizontalFlip())
    if augment == "mindformers":
        steps.append(v2.ColorJitter(*_JITTER))
    if augment != "crop":
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET))
    return v2.Compose([*steps, *_to_pixels()])


def eval_transform(size: int) -> Transform:
    """Resizes the shorter side (bicubic), crops the centre and normalises.

    Args:
        size: side of the result in pixels.
    """
    bicubic = v2.InterpolationMode.BICUBIC
    resize = v2.Resize(size, interpolation=bicubic, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(size), *_to_pixels()])


def _to_pixels() -> list[Any]:
    scale = v2.ToDtype(torch.float32, scale=True)
    return [v2.PILToTensor(), scale, v2.Normalize(CLIP_MEAN, CLIP_STD)]
