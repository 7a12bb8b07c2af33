"""VGG with batch norm for small images: five blocks and one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from ickd.model.base import TappedNet, init_convs
from tenfold.distillation import Taps
from tenfold.errors import UserError

WIDTHS = (64, 128, 256, 512, 512)
REPEATS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_LEAST_SIDE = 8
_FOURTH_POOL = 64


def _block(in_channels: int, channels: int, repeats: int) -> nn.Sequential:
    """Convolutions with batch norm and ReLU; the last ReLU is left to the network."""
    layers: list[nn.Module] = []
    for width in [in_channels] + [channels] * (repeats - 1):
        layers += [nn.Conv2d(width, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class VGG(TappedNet):
    """VGG-D with batch norm and a single linear layer.

    Args:
        depth: 8, 11, 13, 16 or 19.
        num_classes: length of the logits.

    Raises:
        ValueError: no such depth.
    """

    def __init__(self, depth: int, num_classes: int = 100) -> None:
        super().__init__()
        if depth not in REPEATS:
            raise ValueError(f"the depth of a VGG is one of {tuple(REPEATS)}, not {depth}")
        repeats = REPEATS[depth]
        self.num_classes = num_classes
        self.tap_names = ("relu0", "relu1", "relu2", "relu3", "relu4")
        self.tap_channels = WIDTHS
        self.block0 = _block(3, WIDTHS[0], repeats[0])
        self.relu0 = nn.ReLU()
        self.block1 = _block(WIDTHS[0], WIDTHS[1], repeats[1])
        self.relu1 = nn.ReLU()
        self.block2 = _block(WIDTHS[1], WIDTHS[2], repeats[2])
        self.relu2 = nn.ReLU()
        self.block3 = _block(WIDTHS[2], WIDTHS[3], repeats[3])
        self.relu3 = nn.ReLU()
        self.block4 = _block(WIDTHS[3], WIDTHS[4], repeats[4])
        self.relu4 = nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(WIDTHS[4], num_classes)
        self._init()

    def _init(self) -> None:
        init_convs(self.modules())
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _stages(self) -> Sequence[tuple[nn.Sequential, nn.ReLU]]:
        """Every block with its last ReLU."""
        return (
            (self.block0, self.relu0),
            (self.block1, self.relu1),
            (self.block2, self.relu2),
            (self.block3, self.relu3),
            (self.block4, self.relu4),
        )

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of normalised images.

        Raises:
            UserError: images of fewer than 8 pixels a side.
        """
        for (block, relu), pool in zip(self._stages(), _pools(x), strict=True):
            x = relu(block(x))
            if pool:
                x = self.maxpool(x)
        return self.classifier(self.avgpool(x).flatten(1))

    def taps(self, x: Float[Tensor, "batch 3 height width"]) -> Taps:
        """F_0 .. F_4 after the last ReLU of every block, before it is pooled.

        Raises:
            UserError: images of fewer than 8 pixels a side.
        """
        maps, preacts = [], []
        for (block, relu), pool in zip(self._stages(), _pools(x), strict=True):
            before = block(x)
            x = relu(before)
            maps.append(x)
            preacts.append(before)
            if pool:
                x = self.maxpool(x)
        pooled = self.avgpool(x).flatten(1)
        preacts[0] = maps[0]  # F_0 has no form of its own in the reference's list
        return Taps(tuple(maps), pooled, self.classifier(pooled), tuple(preacts))


def _pools(x: Tensor) -> tuple[bool, ...]:
    """After which blocks images of this size are halved.

    The reference pools a fourth time where images are 64 pixels tall, and at no other height.
    """
    height, width = x.shape[-2:]
    if min(height, width) < _LEAST_SIDE:
        raise UserError(
            f"images of {height} x {width} pixels vanish in the poolings of a VGG",
            fix=f"give images of {_LEAST_SIDE} pixels a side or more",
        )
    return (True, True, True, height == _FOURTH_POOL, False)
