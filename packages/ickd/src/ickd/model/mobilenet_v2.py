"""MobileNetV2 of half width for small images (Sandler et al. 2018)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ickd.model.base import TappedNet, init_convs
from tenfold.distillation import Taps

STAGES = (  # expansion, width, repeats, stride
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_TAPPED = (1, 2, 4, 6)  # the stages whose outputs are F_1 .. F_4
_STEM = 32
_HEAD = 1280


class InvertedResidual(nn.Module):
    """Expand by 1×1, 3×3 per channel, project by 1×1 without activation.

    Args:
        in_channels: width of the input.
        channels: width of the output.
        stride: of the 3×3 convolution.
        expansion: how much wider the inside is; the expanding convolution exists even for 1.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The projection, with the input added where they have the same shape."""
        return x + self.conv(x) if self.residual else self.conv(x)


def _conv_bn_relu(in_channels: int, channels: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class MobileNetV2(TappedNet):
    """MobileNetV2 with ReLU, whose last maps have a sixteenth of the image's side.

    The ICKD tap is the head's 1280-wide map; the last map of the stage features is 160 wide.

    Args:
        num_classes: length of the logits.
        width: factor of all widths but the head's.
    """

    def __init__(self, num_classes: int = 100, width: float = 0.5) -> None:
        super().__init__()
        widths = [int(width * channels) for _, channels, _, _ in STAGES]
        stem = int(width * _STEM)
        self.num_classes = num_classes
        self.tap_names = ("conv1", *(f"blocks.{stage}" for stage in _TAPPED), "conv2")
        self.tap_channels = (stem, *(widths[stage] for stage in _TAPPED), _HEAD)
        self.conv1 = _conv_bn_relu(3, stem, 3, 2)
        self.blocks = nn.Sequential()
        for before, after, stage in zip([stem, *widths], widths, STAGES, strict=False):
            expansion, _, repeats, stride = stage
            first = InvertedResidual(before, after, stride, expansion)
            rest = (InvertedResidual(after, after, 1, expansion) for _ in range(repeats - 1))
            self.blocks.append(nn.Sequential(first, *rest))
        self.conv2 = _conv_bn_relu(widths[-1], _HEAD, 1, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        classifier = nn.Linear(_HEAD, num_classes)
        self.classifier = nn.Sequential(classifier)
        init_convs(self.modules())
        nn.init.normal_(classifier.weight, 0.0, 0.01)
        nn.init.zeros_(classifier.bias)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of normalised images of any size."""
        x = self.conv2(self.blocks(self.conv1(x)))
        return self.classifier(self.avgpool(x).flatten(1))

    def taps(self, x: Float[Tensor, "batch 3 height width"]) -> Taps:
        """F_0 after the stem's ReLU, F_1 .. F_4 linear outputs of stages 1, 2, 4 and 6.

        These have no activation, so the maps before their activation are the same.
        """
        x = self.conv1(x)
        maps = [x]
        for index, stage in enumerate(self.blocks):
            x = stage(x)
            if index in _TAPPED:
                maps.append(x)
        last = self.conv2(x)
        pooled = self.avgpool(last).flatten(1)
        return Taps(tuple(maps), pooled, self.classifier(pooled), tuple(maps), last)
