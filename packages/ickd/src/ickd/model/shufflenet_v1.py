"""ShuffleNet with grouped convolutions for small images (Zhang et al. 2018)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ickd.model.base import Block, TappedNet, run_stage
from tenfold.distillation import Taps

_STEM = 24
_WIDTHS = (240, 480, 960)
_BLOCKS = (4, 8, 4)
_GROUPS = 3


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave groups of channels: the first of each group, then the second of each, ..."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnit(Block):
    """Grouped 1×1, shuffle, 3×3 per channel, grouped 1×1; ReLU after sum or concatenation.

    Args:
        in_channels: width of the input.
        channels: width of the output.
        stride: 1 adds the input; 2 appends it, pooled, to a path that is that much narrower.
        groups: of both 1×1 convolutions, but for the first one's of a unit that follows the stem.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        width = channels if stride == 1 else channels - in_channels
        inner = width // 4
        self.groups = 1 if in_channels == _STEM else groups
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, width, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.pool = None if stride == 1 else nn.AvgPool2d(3, 2, 1)
        self.relu3 = nn.ReLU()

    def with_preact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the sum or concatenation before the last ReLU."""
        y = self.relu1(self.bn1(self.conv1(x)))
        # The paper has no ReLU after the convolution per channel; the reference has.
        y = self.relu2(self.bn2(self.conv2(shuffle_channels(y, self.groups))))
        y = self.bn3(self.conv3(y))
        before = y + x if self.pool is None else torch.cat([y, self.pool(x)], 1)
        return self.relu3(before), before


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    first = ShuffleUnit(in_channels, channels, 2, _GROUPS)
    rest = (ShuffleUnit(channels, channels, 1, _GROUPS) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


class ShuffleNetV1(TappedNet):
    """ShuffleNet with 3 groups.

    Args:
        num_classes: length of the logits.
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        first, second, third = _WIDTHS
        self.num_classes = num_classes
        self.tap_names = ("relu", "layer1", "layer2", "layer3")
        self.tap_channels = (_STEM, *_WIDTHS)
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1 = _stage(_STEM, first, _BLOCKS[0])
        self.layer2 = _stage(first, second, _BLOCKS[1])
        self.layer3 = _stage(second, third, _BLOCKS[2])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(third, num_classes)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of normalised images of any size."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))

    def taps(self, x: Float[Tensor, "batch 3 height width"]) -> Taps:
        """F_0 after the stem's ReLU, F_1 .. F_3 after that of each stage."""
        x = self.relu(self.bn1(self.conv1(x)))
        maps, preacts = [x], [x]
        for stage in (self.layer1, self.layer2, self.layer3):
            x, before = run_stage(stage, x)
            maps.append(x)
            preacts.append(before)
        pooled = self.avgpool(x).flatten(1)
        return Taps(tuple(maps), pooled, self.linear(pooled), tuple(preacts))
