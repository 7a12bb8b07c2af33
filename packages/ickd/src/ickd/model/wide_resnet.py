"""Wide ResNets with pre-activation blocks (Zagoruyko and Komodakis 2016)."""

from __future__ import annotations

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from ickd.model.base import TappedNet, init_convs
from tenfold.distillation import Taps


class PreactBlock(nn.Module):
    """BN-ReLU-conv3×3-BN-ReLU-conv3×3 with a shortcut, nothing after the sum.

    Where the width changes, the shortcut is a 1×1 convolution of the activated input; else it is
    the raw input.

    Args:
        in_channels: width of the input.
        channels: width of the output.
        stride: of the first convolution and of the shortcut; 1 where the width stays.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.convShortcut = None
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def after_norm(self, x: Tensor, normed: Tensor) -> Tensor:
        """The output, from the input and its first batch norm.

        Apart, so that who taps the normalised input need not run the batch norm twice, which would
        move its running statistics twice.
        """
        active = self.relu1(normed)
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return self.conv2(self.relu2(self.bn2(self.conv1(active)))) + shortcut

    def forward(self, x: Tensor) -> Tensor:
        """The raw sum."""
        return self.after_norm(x, self.bn1(x))


class Stage(nn.Module):
    """Pre-activation blocks, the first of which changes width and resolution."""

    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            PreactBlock(in_channels, channels, stride),
            *(PreactBlock(channels, channels) for _ in range(blocks - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The raw output of the last block."""
        return self.layer(x)

    def with_norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the input after the first block's first batch norm."""
        first, *rest = cast("list[PreactBlock]", list(self.layer))
        normed = first.bn1(x)
        x = first.after_norm(x, normed)
        for block in rest:
            x = block(x)
        return x, normed


class WideResNet(TappedNet):
    """WRN-D-k for small images.

    Args:
        depth: 6n + 4, for n blocks in each of three stages.
        widen: k; the stages are 16k, 32k and 64k wide.
        num_classes: length of the logits.

    Raises:
        ValueError: no such depth.
    """

    def __init__(self, depth: int, widen: int = 1, num_classes: int = 100) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"the depth of a wide ResNet is 6n + 4, not {depth}")
        first, second, third = 16 * widen, 32 * widen, 64 * widen
        self.num_classes = num_classes
        self.tap_names = ("conv1", "block1", "block2", "block3", "relu")
        self.tap_channels = (16, first, second, third, third)
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = Stage(16, first, blocks, 1)
        self.block2 = Stage(first, second, blocks, 2)
        self.block3 = Stage(second, third, blocks, 2)
        self.bn1 = nn.BatchNorm2d(third)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        init_convs(self.modules())
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of normalised images of any size."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.relu(self.bn1(x))
        return self.fc(self.avgpool(x).flatten(1))

    def taps(self, x: Float[Tensor, "batch 3 height width"]) -> Taps:
        """F_0 is the stem's output, F_1 .. F_3 the raw sums; the ICKD tap is the last ReLU.

        Before their activation means: after the batch norm that comes next.
        """
        stem = self.conv1(x)
        first = self.block1(stem)
        second, first_normed = self.block2.with_norm(first)
        third, second_normed = self.block3.with_norm(second)
        third_normed = self.bn1(third)
        last = self.relu(third_normed)
        pooled = self.avgpool(last).flatten(1)
        maps = (stem, first, second, third)
        preacts = (stem, first_normed, second_normed, third_normed)
        return Taps(maps, pooled, self.fc(pooled), preacts, last)
