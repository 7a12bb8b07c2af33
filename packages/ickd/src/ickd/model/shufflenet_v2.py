"""ShuffleNetV2 for small images (Ma et al. 2018)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ickd.model.base import Block, TappedNet, run_stage
from ickd.model.shufflenet_v1 import shuffle_channels
from tenfold.distillation import Taps

WIDTHS = {  # of the three stages and of the head, by the net's size
    0.5: (48, 96, 192, 1024),
    1: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2: (224, 488, 976, 2048),
}
_STEM = 24
_BLOCKS = (3, 7, 3)  # after the halving one of each stage
_GROUPS = 2


def _per_channel(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)


class BasicBlock(Block):
    """Keeps the first half of the channels, and runs the second through three convolutions.

    Args:
        channels: width of the input and of the output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.kept = half
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = _per_channel(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()

    def _paths(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, x = x[:, : self.kept], x[:, self.kept :]
        x = self.relu1(self.bn1(self.conv1(x)))
        return kept, self.bn3(self.conv3(self.bn2(self.conv2(x))))

    def _join(self, kept: Tensor, before: Tensor) -> Tensor:
        return shuffle_channels(torch.cat([kept, self.relu3(before)], 1), _GROUPS)

    def with_preact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the two halves before the last ReLU, which are not shuffled."""
        kept, before = self._paths(x)
        return self._join(kept, before), torch.cat([kept, before], 1)

    def forward(self, x: Tensor) -> Tensor:
        """The output alone."""
        return self._join(*self._paths(x))


class DownBlock(nn.Module):
    """Halves the resolution on two paths, the left of two convolutions and the right of three.

    Args:
        in_channels: width of the input.
        channels: width of the output, half of it from each path.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _per_channel(in_channels, 2)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.conv4 = _per_channel(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu5 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Both paths, shuffled."""
        left = self.bn1(self.conv1(x))
        left = self.relu2(self.bn2(self.conv2(left)))
        right = self.relu3(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        right = self.relu5(self.bn5(self.conv5(right)))
        return shuffle_channels(torch.cat([left, right], 1), _GROUPS)


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    rest = (BasicBlock(channels) for _ in range(blocks))
    return nn.Sequential(DownBlock(in_channels, channels), *rest)


class ShuffleNetV2(TappedNet):
    """ShuffleNetV2 without the stem's pooling.

    The ICKD tap is the head's map; the last map of the stage features is the third stage's.

    Args:
        num_classes: length of the logits.
        size: 0.5, 1, 1.5 or 2.

    Raises:
        ValueError: no such size.
    """

    def __init__(self, num_classes: int = 100, size: float = 1) -> None:
        super().__init__()
        if size not in WIDTHS:
            raise ValueError(f"the size of a ShuffleNetV2 is one of {tuple(WIDTHS)}, not {size}")
        first, second, third, head = WIDTHS[size]
        self.num_classes = num_classes
        self.tap_names = ("relu", "layer1", "layer2", "layer3", "relu2")
        self.tap_channels = (_STEM, first, second, third, head)
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1 = _stage(_STEM, first, _BLOCKS[0])
        self.layer2 = _stage(first, second, _BLOCKS[1])
        self.layer3 = _stage(second, third, _BLOCKS[2])
        self.conv2 = nn.Conv2d(third, head, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(head)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(head, num_classes)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of normalised images of any size."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(self.avgpool(x).flatten(1))

    def taps(self, x: Float[Tensor, "batch 3 height width"]) -> Taps:
        """F_0 after the stem's ReLU, F_1 .. F_3 after each stage; the ICKD tap after the head's."""
        x = self.relu(self.bn1(self.conv1(x)))
        maps, preacts = [x], [x]
        for stage in (self.layer1, self.layer2, self.layer3):
            x, before = run_stage(stage, x)
            maps.append(x)
            preacts.append(before)
        last = self.relu2(self.bn2(self.conv2(x)))
        pooled = self.avgpool(last).flatten(1)
        return Taps(tuple(maps), pooled, self.linear(pooled), tuple(preacts), last)
