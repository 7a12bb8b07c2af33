"""DeepLabV3+ with ResNet-18, ResNet-101 and MobileNetV2 backbones."""

from ickd.model.deeplab.network import (
    BACKBONES,
    DeepLab,
    create_deeplab,
)
from ickd.model.deeplab.weights import (
    drop_duplicates,
    load_backbone,
    load_deeplab,
    with_duplicates,
)

__all__ = [
    "BACKBONES",
    "DeepLab",
    "create_deeplab",
    "drop_duplicates",
    "load_backbone",
    "load_deeplab",
    "with_duplicates",
]
