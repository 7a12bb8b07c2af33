"""MobileNetV2 as a backbone of DeepLab: inverted residuals that pad before they expand.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018. The zeros
around a block's input pass through its expand convolution and batch norm too, which make something
else of them; the depthwise convolution itself is not padded.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ickd.model.base import init_convs
from ickd.model.deeplab.features import Features, check_output_stride

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, width, blocks and stride of each stage, as in the ImageNet network."""

LOW = 3
"""The block whose output the decoder reads."""

EXPANSIONS = (4, 7, 14)
"""The blocks whose expanded input is distilled."""


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise 3x3, project (1x1), each with a batch norm; two ReLU6.

    Args:
        width_in: channels of the input.
        width: channels of the output.
        stride: of the depthwise convolution.
        dilation: of the depthwise convolution.
        expansion: factor of the inner width; 1 leaves the expand convolution out.
    """

    def __init__(
        self, width_in: int, width: int, stride: int, dilation: int, expansion: int
    ) -> None:
        super().__init__()
        inner = expansion * width_in
        expand = [
            nn.Conv2d(width_in, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
        ]
        self.conv = nn.Sequential(
            *(expand if expansion > 1 else []),
            nn.Conv2d(inner, inner, 3, stride, 0, dilation, inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.residual = stride == 1 and width_in == width
        self.margin = dilation  # half of the 2 dilation + 1 pixels that the kernel spans

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch wide high narrow"]:
        """The linear output; the residual is that of the unpadded input."""
        y = self.conv(F.pad(x, [self.margin] * 4))
        return x + y if self.residual else y

    def with_expansion(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch wide high narrow"], Float[Tensor, "batch inner height width"]]:
        """The output, and the expanded input before its ReLU6, without the margin.

        The expanded map is the one that the block uses, computed once: where its batch norm is
        trained, its statistics are those of the padded input.
        """
        layers = list(self.conv)
        expanded = layers[1](layers[0](F.pad(x, [self.margin] * 4)))
        y = expanded
        for layer in layers[2:]:
            y = layer(y)
        inside = slice(self.margin, -self.margin)
        return x + y if self.residual else y, expanded[:, :, inside, inside]


class MobileNetV2(nn.Module):
    """The trunk of MobileNetV2: the stem and 17 blocks.

    Stages that would exceed the output stride keep their size and dilate those after them.

    Args:
        output_stride: of the last map, 16 or 8.

    Attributes:
        low_width: channels of `Features.low`.
        deep_width: channels of `Features.deep`.
        tap_names: modules of the `DeepLab` whose outputs are `Features.distilled`; the first three
            have the padding of their block around them.
        tap_channels: their widths.
    """

    def __init__(self, output_stride: int = 16) -> None:
        super().__init__()
        check_output_stride(output_stride)
        self.low_width, self.deep_width = 24, 320
        stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        blocks: list[nn.Module] = [nn.Sequential(stem, nn.BatchNorm2d(32), nn.ReLU6())]
        width_in, reached, dilation = 32, 2, 1
        for expansion, width, count, stride in STAGES:
            here = dilation
            if reached == output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            for index in range(count):
                s = stride if index == 0 else 1
                blocks.append(InvertedResidual(width_in, width, s, here, expansion))
                width_in = width
        self.features = nn.Sequential(*blocks)
        init_convs(self.modules(), "fan_in")
        inputs = [f"backbone.features.{index}.conv.1" for index in EXPANSIONS]
        self.tap_names = (*inputs, f"backbone.features.{len(blocks) - 1}")
        self.tap_channels = (144, 192, 576, 320)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Features:
        """The maps of a batch.

        Returns:
            `low` and `deep` are linear outputs of blocks 3 and 17; `distilled` are the expanded
            inputs of blocks 4, 7 and 14 before their ReLU6, and the output of block 17.
        """
        low, distilled = x, []
        for index, block in enumerate(self.features):
            if index in EXPANSIONS and isinstance(block, InvertedResidual):
                x, expanded = block.with_expansion(x)
                distilled.append(expanded)
            else:
                x = block(x)
            low = x if index == LOW else low
        return Features(low, x, (*distilled, x))
