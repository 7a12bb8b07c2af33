"""DeepLabV3+ on three backbones, as the segmentation experiments of ICKD use it."""

from jaxtyping import Float
from torch import Tensor, nn

from ickd.model.base import init_convs
from ickd.model.deeplab.head import ASPP, WIDTH, Decoder, resize
from ickd.model.deeplab.mobilenet_v2 import MobileNetV2
from ickd.model.deeplab.resnet import resnet18, resnet101
from tenfold.distillation.taps import Taps
from tenfold.errors import UserError

BACKBONES = {"resnet18": resnet18, "resnet101": resnet101, "mobilenet_v2": MobileNetV2}
ALIASES = {"mobilenet": "mobilenet_v2"}


class DeepLab(nn.Module):
    """An image in, a class for every pixel out.

    Example:
        >>> net = create_deeplab("resnet18")
        >>> net(images).shape  # (batch, 21, height, width)

    Args:
        backbone: "resnet18", "resnet101", or "mobilenet_v2" (or "mobilenet").
        num_classes: 21 for VOC.
        output_stride: of the backbone's last map, 16 (the published networks) or 8.

    Attributes:
        tap_names: the modules whose outputs `taps` gives; those of MobileNetV2's three expansions
            have the padding of their block around them.
        tap_channels: their widths.

    Raises:
        UserError: an unknown backbone.
    """

    def __init__(
        self, backbone: str = "resnet18", num_classes: int = 21, output_stride: int = 16
    ) -> None:
        super().__init__()
        name = ALIASES.get(backbone, backbone)
        if name not in BACKBONES:
            fix = f"choose {', '.join(BACKBONES)}"
            raise UserError(f"DeepLab has no backbone called {backbone!r}", fix=fix)
        self.backbone_name, self.num_classes = name, num_classes
        self.output_stride = output_stride
        self.backbone = BACKBONES[name](output_stride)
        self.aspp = ASPP(self.backbone.deep_width, output_stride)
        self.decoder = Decoder(self.backbone.low_width, num_classes)
        self.tap_names = (*self.backbone.tap_names, "aspp.bn1", "decoder.last_conv.5")
        self.tap_channels = (*self.backbone.tap_channels, WIDTH, WIDTH)
        init_convs([*self.aspp.modules(), *self.decoder.modules()], "fan_in")

    def forward(
        self, x: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Logits at the size of the input.

        Args:
            x: normalised pixels.
        """
        features = self.backbone(x)
        logits = self.decoder(self.aspp(features.deep), features.low)
        return resize(logits, (x.shape[2], x.shape[3]))

    def taps(self, x: Float[Tensor, "batch 3 height width"]) -> Taps:
        """Logits, and the six maps that the segmentation experiments distil (section 3.3).

        The same computation as `forward`, dropouts included.

        Args:
            x: normalised pixels.

        Returns:
            `maps` and `preacts` are both the six maps before their ReLU: four of the backbone, the
            projection of ASPP, and the decoder's last one, which is `last` too (256 channels at
            stride 4); `logits` have the size of the input. There is no pooled vector.
        """
        features = self.backbone(x)
        projected = self.aspp.project(features.deep)
        logits, last = self.decoder.with_tap(self.aspp.activate(projected), features.low)
        maps = (*features.distilled, projected, last)
        logits = resize(logits, (x.shape[2], x.shape[3]))
        return Taps(maps=maps, preacts=maps, logits=logits, last=last, stem=False)


def create_deeplab(backbone: str, num_classes: int = 21, output_stride: int = 16) -> DeepLab:
    """Build a `DeepLab` with random weights; see there for the arguments."""
    return DeepLab(backbone, num_classes, output_stride)
