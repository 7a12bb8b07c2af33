"""The 22 CIFAR networks of the distillation literature, under RepDistiller's names.

>>> student = create("resnet8x4", num_classes=10)
>>> info("resnet8x4").macs
177071104
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ickd.model.base import TappedNet
from ickd.model.mobilenet_v2 import MobileNetV2
from ickd.model.resnet import ResNet
from ickd.model.resnet50 import ResNet50
from ickd.model.shufflenet_v1 import ShuffleNetV1
from ickd.model.shufflenet_v2 import ShuffleNetV2
from ickd.model.vgg import VGG
from ickd.model.wide_resnet import WideResNet
from tenfold.errors import UserError


@dataclass(frozen=True)
class ZooInfo:
    """What is known of a network of the zoo, for CIFAR-100: 100 classes, 32×32 pixels.

    Attributes:
        parameters: number of trainable numbers.
        macs: multiply-adds of convolutions and linear layers for one image.
        tap_width: channels of the ICKD tap.
        top1: accuracy in percent of the network trained without a teacher, as RepDistiller
            publishes it (last epoch, mean of 5 runs); None where it does not.
    """

    parameters: int
    macs: int
    tap_width: int
    top1: float | None = None


_X4 = (32, 64, 128, 256)
_ZOO: dict[str, tuple[Callable[..., TappedNet], ZooInfo]] = {
    "resnet8": (partial(ResNet, 8), ZooInfo(83_892, 12_507_392, 64)),
    "resnet14": (partial(ResNet, 14), ZooInfo(181_108, 26_663_168, 64)),
    "resnet20": (partial(ResNet, 20), ZooInfo(278_324, 40_818_944, 64, 69.06)),
    "resnet32": (partial(ResNet, 32), ZooInfo(472_756, 69_130_496, 64, 71.14)),
    "resnet44": (partial(ResNet, 44), ZooInfo(667_188, 97_442_048, 64)),
    "resnet56": (partial(ResNet, 56), ZooInfo(861_620, 125_753_600, 64, 72.34)),
    "resnet110": (partial(ResNet, 110), ZooInfo(1_736_564, 253_155_584, 64, 74.31)),
    "resnet8x4": (partial(ResNet, 8, _X4), ZooInfo(1_233_540, 177_071_104, 256, 72.50)),
    "resnet32x4": (partial(ResNet, 32, _X4), ZooInfo(7_433_860, 1_083_040_768, 256, 79.42)),
    "ResNet50": (ResNet50, ZooInfo(23_705_252, 1_298_014_208, 2048, 79.34)),
    "wrn_16_1": (partial(WideResNet, 16, 1), ZooInfo(180_916, 26_663_168, 64)),
    "wrn_16_2": (partial(WideResNet, 16, 2), ZooInfo(703_284, 101_118_464, 128, 73.26)),
    "wrn_40_1": (partial(WideResNet, 40, 1), ZooInfo(569_780, 83_286_272, 64, 71.98)),
    "wrn_40_2": (partial(WideResNet, 40, 2), ZooInfo(2_255_156, 327_610_880, 128, 75.61)),
    "vgg8": (partial(VGG, 8), ZooInfo(3_965_028, 96_192_512, 512, 70.36)),
    "vgg11": (partial(VGG, 11), ZooInfo(9_277_284, 209_438_720, 512)),
    "vgg13": (partial(VGG, 13), ZooInfo(9_462_180, 284_936_192, 512, 74.64)),
    "vgg16": (partial(VGG, 16), ZooInfo(14_774_436, 398_182_400, 512)),
    "vgg19": (partial(VGG, 19), ZooInfo(20_086_692, 511_428_608, 512)),
    "MobileNetV2": (MobileNetV2, ZooInfo(812_836, 6_523_648, 1280, 64.60)),
    "ShuffleV1": (ShuffleNetV1, ZooInfo(949_258, 38_691_456, 960, 70.50)),
    "ShuffleV2": (ShuffleNetV2, ZooInfo(1_355_528, 44_504_448, 1024, 71.82)),
}


def names() -> list[str]:
    """The names that `create` takes."""
    return list(_ZOO)


def create(name: str, num_classes: int = 100) -> TappedNet:
    """A randomly initialised network.

    Args:
        name: one of `names`.
        num_classes: length of the logits; the rest of the network does not depend on it.

    Raises:
        UserError: no such network, or no class.
    """
    if num_classes < 1:
        raise UserError(f"a classifier needs at least one class, not {num_classes}")
    return _entry(name)[0](num_classes=num_classes)


def info(name: str) -> ZooInfo:
    """Size, cost and published accuracy of a network.

    Raises:
        UserError: no such network.
    """
    return _entry(name)[1]


def _entry(name: str) -> tuple[Callable[..., TappedNet], ZooInfo]:
    if name in _ZOO:
        return _ZOO[name]
    folded = {known.lower(): known for known in _ZOO}
    close = difflib.get_close_matches(name.lower(), folded, n=3)
    choice = ", ".join(folded[match] for match in close) if close else ", ".join(_ZOO)
    raise UserError(f"no network of the zoo is called {name!r}", fix=f"choose {choice}")
