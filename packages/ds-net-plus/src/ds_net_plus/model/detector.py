"""SSD on the feature maps of a dynamic network: boxes at the cost that an image needs.

The maps of narrow routes are zero-padded, and a 1x1 convolution of a padded map equals the sliced
one: these convolutions alone know the backbone's widths. Behind them every route shares one small
head, whose group norms, unlike batch norms, keep no statistics that would differ among routes.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import box_iou

from ds_net_plus.model.base import DynamicNet
from ds_net_plus.model.checks import check_finite
from ds_net_plus.model.routes import RouteLike, half
from tenfold.errors import UserError

GROUP = 16  # channels of a norm's group

Targets = Sequence[Mapping[str, Tensor]]
"""For each image boxes (n, 4) in its pixels, and labels (n,) from 0."""


class Detections(NamedTuple):
    """What was found on every image, in the order of the batch.

    Attributes:
        results: boxes (n, 4) in pixels of the input, scores and labels (n,) of each image, the
            highest score first.
        routes: the route of each gate, -1 for mode "largest".
        madds: multiply-adds of each image, backbone and head.
    """

    results: list[dict[str, Tensor]]
    routes: Int[Tensor, "batch gates"]
    madds: Int[Tensor, " batch"]


class ImageLosses(NamedTuple):
    """Losses of every image of a batch.

    Attributes:
        bbox_regression, classification: sums over the image's anchors, divided by `matched`.
        matched: its anchors that belong to an object; with none both losses are zero.
    """

    bbox_regression: Float[Tensor, " batch"]
    classification: Float[Tensor, " batch"]
    matched: Int[Tensor, " batch"]

    def mean(self) -> dict[str, Tensor]:
        """SSD's losses: sums over all images, divided by all matched anchors.

        Those of all ranks, so that several ranks have the gradient that one has on all images.
        """
        counts = self.matched.to(self.classification.dtype)
        total = _mean_over_ranks(counts.sum()).clamp(min=1)
        return {
            "bbox_regression": (self.bbox_regression * counts).sum() / total,
            "classification": (self.classification * counts).sum() / total,
        }


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // GROUP, channels)


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, _norm(outputs), nn.ReLU6()]


def _extra(width: int) -> nn.Sequential:
    """A map of half the side: 1x1, depthwise 3x3 of stride 2, 1x1."""
    return nn.Sequential(
        *_conv(width, width), *_conv(width, width, 3, 2, groups=width), *_conv(width, width)
    )


def default_scales(maps: int, first_level: int) -> list[float]:
    """Sides of the default boxes as shares of the image's, one more than there are maps.

    SSD300's: 0.15 to 1.05 in equal steps, before them 0.07 where the first map has stride 8 or
    less.
    """
    fine = [0.07] if first_level <= 8 else []
    count = maps + 1 - len(fine)
    return [*fine, *(0.15 + 0.9 * k / max(count - 1, 1) for k in range(count))]


class Detector(nn.Module):
    """Single-shot detector with a dynamic backbone.

    Anchors, matching, loss, hard negative mining and non-maximum suppression are torchvision's SSD,
    the head is its SSDlite. Images come normalised and in one size: the transform of torchvision's
    detectors is not used.

    Example:
        >>> detector = Detector(create_model("ds_mbnet"), num_classes=20).eval()
        >>> found = detector(torch.randn(4, 3, 300, 300), route=2)
        >>> found.results[0]["boxes"], found.madds
    """

    def __init__(
        self,
        net: DynamicNet,
        num_classes: int,
        levels: Sequence[int] = (8, 16, 32),
        extras: int = 3,
        width: int = 128,
        scales: Sequence[float] | None = None,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.45,
        most: int = 200,
    ) -> None:
        """Builds the head.

        Args:
            net: the backbone, kept as it is.
            num_classes: classes of objects; the background is not counted.
            levels: strides of the backbone's maps.
            extras: further maps, each of half the side.
            width: channels of the head, a multiple of 16.
            scales: sides of the default boxes, see `default_scales`.
            score_threshold: detections below it are dropped.
            nms_threshold: IoU above which the weaker of two boxes of a class is dropped.
            most: detections of an image.

        Raises:
            UserError: a level that the backbone does not have, or sizes that mean nothing.
        """
        super().__init__()
        if num_classes < 1 or extras < 0 or width < GROUP or width % GROUP:
            given = f"num_classes {num_classes}, extras {extras}, width {width}"
            raise UserError(
                f"a detector needs a class, 0 or more extras and a width in {GROUP}s: {given}"
            )
        if list(levels) != sorted(set(levels)):
            raise UserError(f"levels must ascend, got {list(levels)}")
        self.net, self.num_classes, self.levels = net, num_classes, tuple(levels)
        self.laterals = nn.ModuleList(
            nn.Sequential(*_conv(channels, width)) for channels in net.feature_channels(levels)
        )
        self.extras = nn.ModuleList(_extra(width) for _ in range(extras))
        maps = len(self.laterals) + extras
        sides = list(scales or default_scales(maps, self.levels[0]))
        if len(sides) != maps + 1:
            raise UserError(f"{maps} maps need {maps + 1} scales, got {len(sides)}")
        # many small boxes: two shapes less on the finest map, as in SSD
        anchors = DefaultBoxGenerator([[2], *([[2, 3]] * (maps - 1))], scales=sides)
        per_place = anchors.num_anchors_per_location()
        head = SSDLiteHead([width] * maps, per_place, num_classes + 1, partial(_norm))
        self.ssd = SSD(
            nn.Identity(),
            anchors,
            (net.image_size, net.image_size),  # of the transform, which is not used
            num_classes + 1,
            head=head,
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=most,
        )

    def maps(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The head's inputs, from the backbone's maps."""
        maps = [lateral(level) for lateral, level in zip(self.laterals, levels, strict=True)]
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return maps

    def _heads(self, x: Tensor, levels: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The head's outputs, and the anchors that they belong to.

        In the precision of the images: boxes in bf16 would be off by pixels.
        """
        maps = self.maps(levels)
        outputs = {key: value.to(x.dtype) for key, value in self.ssd.head(maps).items()}
        one = ImageList(x[:1], [(x.shape[-2], x.shape[-1])])
        anchors = self.ssd.anchor_generator(one, [m.to(x.dtype) for m in maps])
        return outputs, anchors[0]

    def image_losses(
        self,
        x: Float[Tensor, "batch colours height width"],
        targets: Targets,
        route: RouteLike,
    ) -> ImageLosses:
        """The losses of every image on one static route, each over its own matched anchors.

        Args:
            x: normalised images.
            targets: what is on each.
            route: a route, see `DynamicNet.features`.
        """
        features = self.net.features(x, route=route, levels=self.levels)
        outputs, anchors = self._heads(x, features.maps)
        each, counts = [], []
        for n, target in enumerate(targets):
            boxes, labels = target["boxes"].to(x.dtype), target["labels"] + 1  # 0: the background
            matched = self._match(anchors, boxes)
            one = {key: value[n : n + 1] for key, value in outputs.items()}
            wanted = [{"boxes": boxes, "labels": labels}]
            each.append(self.ssd.compute_loss(wanted, one, [anchors], [matched]))
            counts.append((matched >= 0).sum())
        stacked = {key: torch.stack([loss[key] for loss in each]) for key in each[0]}
        return ImageLosses(matched=torch.stack(counts), **stacked)

    def losses(
        self,
        x: Float[Tensor, "batch colours height width"],
        targets: Targets,
        route: RouteLike,
    ) -> dict[str, Tensor]:
        """The losses "bbox_regression" and "classification" of one static route.

        Args:
            x: normalised images.
            targets: what is on each.
            route: a route, see `DynamicNet.features`.
        """
        return self.image_losses(x, targets, route).mean()

    def _match(self, anchors: Tensor, boxes: Tensor) -> Int[Tensor, " anchors"]:
        """The object of each anchor, below 0 where there is none."""
        if not len(boxes):
            return torch.full((len(anchors),), -1, device=anchors.device)
        return self.ssd.proposal_matcher(box_iou(boxes, anchors))

    def forward(
        self,
        x: Float[Tensor, "batch colours height width"],
        route: RouteLike | None = None,
        tau: float = 0.0,
    ) -> Detections:
        """Finds objects on one static route, or on the route that the gate chooses.

        Args:
            x: normalised images, of any size.
            route: see `DynamicNet.features`; None leaves it to the gate.
            tau: price of compute in the gate's decision.

        Raises:
            UserError: no such route, an untrained gate, or an image that is not finite.
        """
        features = self.net.features(x, route=route, levels=self.levels, tau=tau)
        if not len(x):  # torchvision's head takes no empty batch
            return Detections([], features.routes, features.madds)
        outputs, anchors = self._heads(x, features.maps)
        check_finite(outputs["cls_logits"])
        shapes = [(x.shape[-2], x.shape[-1])] * len(x)
        found = self.ssd.postprocess_detections(outputs, [anchors] * len(x), shapes)
        results = [{**image, "labels": image["labels"] - 1} for image in found]
        return Detections(results, features.routes, features.madds + self.head_madds(x.shape[-1]))

    def head_madds(self, size: int) -> int:
        """Multiply-adds of what follows the backbone, for an image of `size` x `size` pixels.

        The same on every route, since narrow maps are padded.
        """
        sides = [half(size, level) for level in self.levels]
        total = sum(
            _madds(lateral, side) for lateral, side in zip(self.laterals, sides, strict=True)
        )
        for extra in self.extras:
            total += _madds(extra, sides[-1])
            sides.append(half(sides[-1], 2))
        blocks = [
            block
            for head in (self.ssd.head.classification_head, self.ssd.head.regression_head)
            for block in head.module_list  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
        ]
        return total + sum(
            _madds(block, side) for block, side in zip(blocks, sides + sides, strict=True)
        )


def _madds(block: nn.Module, side: int) -> int:
    """Multiply-adds of convolutions one behind the other, from an input of this side."""
    total = 0
    for conv in block.modules():
        if isinstance(conv, nn.Conv2d):
            side = half(side, conv.stride[0])
            total += conv.weight.numel() * side**2
    return total


def _mean_over_ranks(count: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return count
    total = count.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
