"""ResNet-50 for CIFAR: four stages of bottleneck blocks on a 3×3 stem, no max-pooling."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ickd.model.base import Block, TappedNet, init_convs, run_stage
from tenfold.distillation import Taps

_EXPANSION = 4


class Bottleneck(Block):
    """1×1, 3×3 and 1×1 convolution with a shortcut, ReLU after the sum.

    Args:
        in_channels: width of the input.
        planes: width of the 3×3 convolution; the output is four times as wide.
        stride: of the 3×3 convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        channels = _EXPANSION * planes
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(planes, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu3 = nn.ReLU()

    def with_preact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the sum before the last ReLU."""
        shortcut = self.shortcut(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        before = self.bn3(self.conv3(x)) + shortcut
        return self.relu3(before), before


def _stage(in_channels: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(in_channels, planes, stride)
    rest = (Bottleneck(_EXPANSION * planes, planes) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


class ResNet50(TappedNet):
    """ResNet with bottleneck blocks for small images.

    Args:
        num_classes: length of the logits.
        blocks: of each of the four stages.
    """

    def __init__(
        self, num_classes: int = 100, blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.tap_names = ("relu", "layer1", "layer2", "layer3", "layer4")
        self.tap_channels = (64, 256, 512, 1024, 2048)
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _stage(64, 64, blocks[0], 1)
        self.layer2 = _stage(256, 128, blocks[1], 2)
        self.layer3 = _stage(512, 256, blocks[2], 2)
        self.layer4 = _stage(1024, 512, blocks[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(2048, num_classes)
        init_convs(self.modules())

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of normalised images of any size."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.avgpool(x).flatten(1))

    def taps(self, x: Float[Tensor, "batch 3 height width"]) -> Taps:
        """F_0 after the stem's ReLU, F_1 .. F_4 after that of each stage."""
        x = self.relu(self.bn1(self.conv1(x)))
        maps, preacts = [x], [x]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x, before = run_stage(stage, x)
            maps.append(x)
            preacts.append(before)
        pooled = self.avgpool(x).flatten(1)
        return Taps(tuple(maps), pooled, self.linear(pooled), tuple(preacts))
