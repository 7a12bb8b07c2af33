"""The small networks of the embedded tasks, a teacher and a student for each (section 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ickd.model.base import TappedNet
from tenfold.distillation import Taps


def _conv_norm(width_in: int, width: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width_in, width, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width))


class Stage(nn.Module):
    """A body and the ReLU after it; what the body says is the map before its activation."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(
        self, x: Float[Tensor, "batch channels_in height_in width_in"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Run the body, then the ReLU."""
        return F.relu(self.body(x))


class ResidualBody(nn.Module):
    """Two convolutions beside a 1x1 shortcut: a ResNet's first block of a stage, without ReLU."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm(width_in, width, stride)
        self.conv2 = _conv_norm(width, width)
        self.shortcut = nn.Sequential(
            nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        )

    def forward(
        self, x: Float[Tensor, "batch channels_in height_in width_in"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The sum of both paths."""
        return self.conv2(F.relu(self.conv1(x))) + self.shortcut(x)


class _Staged(TappedNet):
    """What both kinds of network share: stages one after the other, the first being the stem.

    The maps are the stages' outputs; the module `stages.<i>.body` gives F_i before its activation.
    """

    def __init__(self, stages: Iterable[Stage], channels: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.tap_names = tuple(f"stages.{i}" for i in range(len(self.stages)))
        self.tap_channels = channels
        self.num_classes = classes

    def _features(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The maps of all stages after and before their activation."""
        maps, preacts = [], []
        for stage in self.stages:
            preacts.append(stage.get_submodule("body")(x))
            x = F.relu(preacts[-1])
            maps.append(x)
        return tuple(maps), tuple(preacts)


class GratingsNet(_Staged):
    """A classifier of 16x16 images: a stem and three stages, to 48 channels of 4x4.

    Args:
        bodies: makes the body of a stage from its widths and its stride.
        num_classes: length of the logits.
    """

    WIDTHS = (12, 12, 24, 48)
    STRIDES = (2, 2, 1)

    def __init__(self, bodies: Callable[[int, int, int], nn.Module], num_classes: int = 3) -> None:
        pairs = zip(self.WIDTHS[:-1], self.WIDTHS[1:], self.STRIDES, strict=True)
        stages = [Stage(_conv_norm(3, self.WIDTHS[0])), *(Stage(bodies(*pair)) for pair in pairs)]
        super().__init__(stages, self.WIDTHS, num_classes)
        self.fc = nn.Linear(self.WIDTHS[-1], num_classes)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Normalised images to logits."""
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))

    def taps(self, x: Float[Tensor, "batch 3 height width"]) -> Taps:
        """Everything that a loss may compare."""
        maps, preacts = self._features(x)
        pooled = maps[-1].mean((2, 3))
        return Taps(maps, pooled, self.fc(pooled), preacts)


class BlobsNet(_Staged):
    """A segmenter of 24x24 images: the last stage is the tap, 32 channels at half the size.

    The maps are those of the stem, of the trunk and of the tap. ICKD compares the tap before its
    ReLU (section 3.3).

    Args:
        width: of the stem; the trunk has twice as many channels.
        dilations: of the trunk's convolutions after the one with stride 2.
        num_classes: length of the logits of a pixel.
    """

    TAP_WIDTH = 32

    def __init__(self, width: int, dilations: tuple[int, ...] = (), num_classes: int = 6) -> None:
        trunk: list[nn.Module] = [_conv_norm(width, 2 * width, stride=2)]
        for dilation in dilations:
            trunk += [nn.ReLU(), _conv_norm(2 * width, 2 * width, dilation=dilation)]
        tap = _conv_norm(2 * width, self.TAP_WIDTH)
        stages = (Stage(_conv_norm(3, width)), Stage(nn.Sequential(*trunk)), Stage(tap))
        super().__init__(stages, (width, 2 * width, self.TAP_WIDTH), num_classes)
        self.tap_names += ("stages.2.body",)
        self.tap_channels += (self.TAP_WIDTH,)
        self.head = nn.Conv2d(self.TAP_WIDTH, num_classes, 1)

    def forward(
        self, x: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Normalised images to logits of every pixel; even heights and widths."""
        for stage in self.stages:
            x = stage(x)
        return self._logits(x)

    def taps(self, x: Float[Tensor, "batch 3 height width"]) -> Taps:
        """Everything that a loss may compare."""
        maps, preacts = self._features(x)
        return Taps(maps, None, self._logits(maps[-1]), preacts, last=preacts[-1])

    def _logits(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(x), scale_factor=2, mode="bilinear", align_corners=False)


def gratings_teacher(num_classes: int = 3) -> GratingsNet:
    """The teacher of bound-gratings, a residual block a stage: 44,055 parameters for 3 classes."""
    return GratingsNet(ResidualBody, num_classes)


def gratings_student(num_classes: int = 3) -> GratingsNet:
    """The student of bound-gratings, a convolution a stage: 14,919 parameters for 3 classes."""
    return GratingsNet(_conv_norm, num_classes)


def blobs_teacher(num_classes: int = 6) -> BlobsNet:
    """The teacher of textured-blobs: 63,082 parameters."""
    return BlobsNet(20, (2, 4, 1), num_classes)


def blobs_student(num_classes: int = 6) -> BlobsNet:
    """The student of textured-blobs: 8,152 parameters."""
    return BlobsNet(10, (), num_classes)


EMBEDDED: dict[str, Callable[..., GratingsNet | BlobsNet]] = {
    "gratings-teacher": gratings_teacher,
    "gratings-student": gratings_student,
    "blobs-teacher": blobs_teacher,
    "blobs-student": blobs_student,
}
"""The four networks by name; each takes `num_classes`."""
