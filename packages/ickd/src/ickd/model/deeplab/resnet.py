"""ResNet with dilated last stages, whose blocks start with the ReLU that others end with.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; dilation as in Chen et al.,
"Rethinking Atrous Convolution for Semantic Image Segmentation", 2017. The function is the usual
ResNet's; only the place of the last ReLU differs, so that a stage's output is the sum before it.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ickd.model.base import init_convs
from ickd.model.deeplab.features import Features, check_output_stride

MULTI_GRID = (1, 2, 4)
"""Factors of the dilation in the three blocks of ResNet-101's last stage."""


def _conv3x3(width_in: int, width_out: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, stride, dilation, dilation, bias=False)


def _shortcut(width_in: int, width_out: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and width_in == width_out:
        return None
    conv = nn.Conv2d(width_in, width_out, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width_out))


class BasicBlock(nn.Module):
    """ReLU, two 3x3 convolutions with the same dilation, plus the shortcut; no ReLU at the end."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(width_in, width, stride, dilation)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, 1, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(width_in, width, stride)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch wide high narrow"]:
        """The sum before its ReLU, of an input that is one itself."""
        x = F.relu(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return y + (x if self.downsample is None else self.downsample(x))


class Bottleneck(nn.Module):
    """ReLU, 1x1, 3x3 (stride, dilation) and 1x1 convolutions, plus the shortcut; no ReLU after."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        wide = self.expansion * width
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.downsample = _shortcut(width_in, wide, stride)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch wide high narrow"]:
        """The sum before its ReLU, of an input that is one itself."""
        x = F.relu(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return y + (x if self.downsample is None else self.downsample(x))


class ResNet(nn.Module):
    """The trunk of a ResNet, keys as torchvision's.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks in each of the four stages.
        output_stride: of the last map, 16 or 8.
        multi_grid: factors of the last stage's dilation, one for each of its blocks.

    Attributes:
        low_width: channels of `Features.low`.
        deep_width: channels of `Features.deep`.
        tap_names: modules of the `DeepLab` whose outputs are `Features.distilled`.
        tap_channels: their widths.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        output_stride: int = 16,
        multi_grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_output_stride(output_stride)
        strides = (1, 2, 2, 1) if output_stride == 16 else (1, 2, 1, 1)
        dilations = (1, 1, 1, 2) if output_stride == 16 else (1, 1, 2, 4)
        widths = tuple(64 * 2**stage * block.expansion for stage in range(4))
        self.low_width, self.deep_width = widths[0], widths[3]
        self.tap_names, self.tap_channels = tuple(f"backbone.layer{n}" for n in range(1, 5)), widths
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, width_in = [], 64
        for stage, depth in enumerate(depths):
            grid = multi_grid if stage == 3 and multi_grid is not None else [1] * depth
            blocks = []
            for index in range(depth):
                stride = strides[stage] if index == 0 else 1
                dilation = dilations[stage] * grid[index]
                blocks.append(block(width_in, 64 * 2**stage, stride, dilation))
                width_in = widths[stage]
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        init_convs(self.modules())

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Features:
        """The maps of a batch.

        Returns:
            `low` and `deep` are the activated sums of the first and the last stage, `distilled`
            the sums of all four before their ReLU.
        """
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        sums = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            sums.append(x)
        return Features(F.relu(sums[0]), F.relu(x), tuple(sums))


def resnet18(output_stride: int = 16) -> ResNet:
    """ResNet-18; its last stage has the one dilation throughout."""
    return ResNet(BasicBlock, (2, 2, 2, 2), output_stride)


def resnet101(output_stride: int = 16) -> ResNet:
    """ResNet-101 with multi-grid dilations in its last stage: 2, 4, 8 at stride 16."""
    return ResNet(Bottleneck, (3, 4, 23, 3), output_stride, MULTI_GRID)
