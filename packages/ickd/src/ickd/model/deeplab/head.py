"""The two heads of DeepLabV3+: atrous spatial pyramid pooling, and the decoder.

Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation",
ECCV 2018, with plain instead of separable convolutions.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tenfold.errors import UserError

WIDTH = 256
"""Channels of every map in the heads but the low-level one."""

LOW_WIDTH = 48
"""Channels to which the decoder reduces the low-level map."""

DILATIONS = {16: (1, 6, 12, 18), 8: (1, 12, 24, 36)}
"""Of the four branches, by output stride; the first is a 1x1 convolution."""

_BEFORE_RELU = 6  # of last_conv's modules: two convolutions, the last batch norm's ReLU left out


def resize(
    x: Float[Tensor, "batch channels height width"], size: tuple[int, int]
) -> Float[Tensor, "batch channels high wide"]:
    """Bilinear resizing that keeps the corners' values."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class AtrousBranch(nn.Module):
    """A convolution, 1x1 or dilated 3x3, a batch norm and a ReLU."""

    def __init__(self, width_in: int, dilation: int) -> None:
        super().__init__()
        if dilation == 1:
            self.atrous_conv = nn.Conv2d(width_in, WIDTH, 1, bias=False)
        else:
            self.atrous_conv = nn.Conv2d(
                width_in, WIDTH, 3, padding=dilation, dilation=dilation, bias=False
            )
        self.bn = nn.BatchNorm2d(WIDTH)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch wide height width"]:
        """A map of the same size."""
        return F.relu(self.bn(self.atrous_conv(x)))


class ASPP(nn.Module):
    """Four branches of different reach and the image's mean, concatenated and projected.

    Args:
        width_in: channels of the backbone's last map.
        output_stride: of that map; sets the dilations.
    """

    def __init__(self, width_in: int, output_stride: int = 16) -> None:
        super().__init__()
        first, second, third, fourth = DILATIONS[output_stride]
        self.aspp1 = AtrousBranch(width_in, first)
        self.aspp2 = AtrousBranch(width_in, second)
        self.aspp3 = AtrousBranch(width_in, third)
        self.aspp4 = AtrousBranch(width_in, fourth)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width_in, WIDTH, 1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
        )
        self.conv1 = nn.Conv2d(5 * WIDTH, WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.dropout = nn.Dropout(0.5)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch wide height width"]:
        """The activated projection, with dropout in training."""
        return self.activate(self.project(x))

    def project(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch wide height width"]:
        """The projection before its ReLU.

        Raises:
            UserError: a training batch of one image, whose mean has no variance over the batch.
        """
        norm = self.global_avg_pool[2]
        if isinstance(norm, nn.BatchNorm2d) and norm.training and len(x) == 1:
            raise UserError(
                "DeepLab cannot be trained on a batch of one image: the batch norm behind its "
                "image pooling has a single value for each channel",
                fix="use at least two images on each device, or synchronised batch norms",
            )
        pooled = resize(self.global_avg_pool(x), (x.shape[2], x.shape[3]))
        branches = [self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x), pooled]
        return self.bn1(self.conv1(torch.cat(branches, 1)))

    def activate(
        self, projected: Float[Tensor, "batch wide height width"]
    ) -> Float[Tensor, "batch wide height width"]:
        """ReLU and dropout of a projection."""
        return self.dropout(F.relu(projected))


class Decoder(nn.Module):
    """Refines ASPP's map with the backbone's map at stride 4, and classifies every pixel there.

    Args:
        low_width: channels of the low-level map.
        num_classes: channels of the result.
    """

    def __init__(self, low_width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(low_width, LOW_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(LOW_WIDTH)
        self.last_conv = nn.Sequential(
            nn.Conv2d(WIDTH + LOW_WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(WIDTH, num_classes, 1),
        )

    def forward(
        self,
        deep: Float[Tensor, "batch wide height width"],
        low: Float[Tensor, "batch channels high narrow"],
    ) -> Float[Tensor, "batch classes high narrow"]:
        """Logits at the low-level map's size."""
        return self.last_conv(self.merge(deep, low))

    def merge(
        self,
        deep: Float[Tensor, "batch wide height width"],
        low: Float[Tensor, "batch channels high narrow"],
    ) -> Float[Tensor, "batch both high narrow"]:
        """The enlarged deep map and behind it the reduced low-level one."""
        low = F.relu(self.bn1(self.conv1(low)))
        return torch.cat([resize(deep, (low.shape[2], low.shape[3])), low], 1)

    def with_tap(
        self,
        deep: Float[Tensor, "batch wide height width"],
        low: Float[Tensor, "batch channels high narrow"],
    ) -> tuple[Float[Tensor, "batch classes high narrow"], Float[Tensor, "batch wide high narrow"]]:
        """Logits, and the last map before its ReLU (the one that ICKD compares)."""
        layers = list(self.last_conv)
        tap = self.merge(deep, low)
        for layer in layers[:_BEFORE_RELU]:
            tap = layer(tap)
        logits = tap
        for layer in layers[_BEFORE_RELU:]:
            logits = layer(logits)
        return logits, tap
