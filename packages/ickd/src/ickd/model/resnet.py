"""CIFAR ResNets: three stages of basic blocks on a 3×3 stem (He et al. 2016, section 4.2)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ickd.model.base import Block, TappedNet, init_convs, run_stage
from tenfold.distillation import Taps


class BasicBlock(Block):
    """Two 3×3 convolutions with a shortcut, ReLU after the sum.

    Args:
        in_channels: width of the input.
        channels: width of the output.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU()

    def with_preact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the sum before the last ReLU."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        before = self.bn2(self.conv2(x)) + shortcut
        return self.relu2(before), before


def basic_stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` basic blocks, the first of which changes width and resolution."""
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


class ResNet(TappedNet):
    """ResNet of depth 6n + 2 for small images.

    Args:
        depth: 6n + 2, for n blocks in each of three stages.
        widths: of the stem and of the stages; four times as wide in the nets called x4.
        num_classes: length of the logits.

    Raises:
        ValueError: no such depth.
    """

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        num_classes: int = 100,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"the depth of a CIFAR ResNet is 6n + 2, not {depth}")
        stem, first, second, third = widths
        self.num_classes = num_classes
        self.tap_names = ("relu", "layer1", "layer2", "layer3")
        self.tap_channels = tuple(widths)
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = basic_stage(stem, first, blocks, 1)
        self.layer2 = basic_stage(first, second, blocks, 2)
        self.layer3 = basic_stage(second, third, blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        init_convs(self.modules())

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of normalised images of any size."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))

    def taps(self, x: Float[Tensor, "batch 3 height width"]) -> Taps:
        """F_0 after the stem's ReLU, F_1 .. F_3 after that of each stage."""
        x = self.relu(self.bn1(self.conv1(x)))
        maps, preacts = [x], [x]
        for stage in (self.layer1, self.layer2, self.layer3):
            x, before = run_stage(stage, x)
            maps.append(x)
            preacts.append(before)
        pooled = self.avgpool(x).flatten(1)
        return Taps(tuple(maps), pooled, self.fc(pooled), tuple(preacts))
