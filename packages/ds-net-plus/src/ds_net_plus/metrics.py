"""Mean average precision of detections: PASCAL VOC 2007's eleven points, and COCO's at IoU 0.5.

Boxes are (x0, y0, x1, y1) of the half-open pixel range [x0, x1) x [y0, y1). VOC's files name the
first and the last pixel, counted from 1, so x0 = xmin - 1 and x1 = xmax, and the development kit's
xmax - xmin + 1 is x1 - x0: its "plus one" is in the convention already, and adding another here
would be wrong.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

POINTS = 10  # recall 0, 1/10, ..., 10/10
_MISSING = "AP50 is left out: it needs pycocotools, pip install 'ds-net-plus[detection]'"


class Truth(NamedTuple):
    """The objects of one image."""

    boxes: Float[Tensor, "objects 4"]
    labels: Int[Tensor, " objects"]
    difficult: Bool[Tensor, " objects"]


def match_detections(
    boxes: Float[Tensor, "detections 4"],
    truth: Float[Tensor, "objects 4"],
    difficult: Bool[Tensor, " objects"],
    threshold: float = 0.5,
) -> Int[Tensor, " detections"]:
    """What every detection of one class in one image is, by the development kit's rule.

    A detection belongs to the object with which its IoU is largest, and to no other. It is a true
    positive if that IoU reaches the threshold and no better detection has claimed the object; a
    second claim is a false positive. On a difficult object it is neither, however often.

    Args:
        boxes: the most confident first.
        truth: the class's objects, difficult ones as well.
        difficult: which of them do not count.
        threshold: of the IoU; reaching it is enough.

    Returns:
        1 (true positive), 0 (false positive) or -1 (ignored) for each detection.
    """
    verdict = torch.zeros(len(boxes), dtype=torch.int64)
    if not len(boxes) or not len(truth):
        return verdict
    overlap, owner = box_iou(boxes.double().cpu(), truth.double().cpu()).max(1)
    claimed: set[int] = set()
    for n in (overlap >= threshold).nonzero()[:, 0].tolist():
        target = int(owner[n])
        if difficult[target]:
            verdict[n] = -1
        elif target not in claimed:
            claimed.add(target)
            verdict[n] = 1
    return verdict


def average_precision_11(
    scores: Float[Tensor, " detections"], verdict: Int[Tensor, " detections"], positives: int
) -> float:
    """Mean over recall 0, 0.1, ..., 1 of the best precision at that recall or more.

    Recalls are compared as whole numbers, 10 * true positives >= point * positives: rounding, which
    makes 3 * 0.1 more than 3 / 10, cannot lose a point.

    Args:
        scores: of all detections of a class, in any order; equals keep theirs.
        verdict: see `match_detections`.
        positives: objects of the class that are not difficult.

    Returns:
        NaN where there is no positive.
    """
    if positives == 0:
        return float("nan")
    counted = verdict[scores.argsort(descending=True, stable=True)]
    counted = counted[counted >= 0]
    hits = counted.cumsum(0)
    precision = hits.double() / torch.arange(1, len(hits) + 1)
    total = 0.0
    for point in range(POINTS + 1):
        reached = precision[POINTS * hits >= point * positives]
        total += float(reached.max()) if len(reached) else 0.0
    return total / (POINTS + 1)


class VOCMeanAP(Metric):
    """VOC 2007's mean average precision: eleven points, IoU 0.5, difficult objects ignored.

    The mean is over the classes that have an object which is not difficult.

    Example:
        >>> metric = VOCMeanAP(num_classes=20)
        >>> metric.update(detector(images).results, truths)
        >>> float(metric.compute())
    """

    full_state_update = False
    higher_is_better = True
    detections: list[Tensor]
    truth: list[Tensor]

    def __init__(self, num_classes: int, threshold: float = 0.5) -> None:
        """`threshold` is the IoU that counts as found."""
        super().__init__()
        self.num_classes, self.threshold = num_classes, threshold
        self.add_state("detections", [], dist_reduce_fx="cat")
        self.add_state("truth", [], dist_reduce_fx="cat")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self,
        results: Sequence[dict[str, Tensor]],
        truths: Sequence[Truth],
        index: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Adds images.

        Args:
            results: boxes, scores and labels of each image.
            truths: the objects of each image, in the same coordinates.
            index: a number for each image that no other has, on any rank; counted where None.
        """
        first = int(self.images)  # pyright: ignore[reportArgumentType]
        numbers = range(first, first + len(results)) if index is None else [int(n) for n in index]
        for number, found, there in zip(numbers, results, truths, strict=True):
            self.detections.append(_rows(number, found["labels"], found["scores"], found["boxes"]))
            self.truth.append(_rows(number, there.labels, there.difficult, there.boxes))
        self.images += len(results)  # pyright: ignore[reportOperatorIssue, reportAttributeAccessIssue]

    def compute(self) -> Float[Tensor, ""]:
        """The mean over classes, 0..1; NaN where nothing can be found."""
        return self.per_class().nanmean()

    def per_class(self) -> Float[Tensor, " classes"]:
        """The average precision of every class, NaN where it has no countable object."""
        found, there = (_joined(state) for state in (self.detections, self.truth))
        return torch.tensor(
            [
                self._class_ap(found[found[:, 1] == k], there[there[:, 1] == k])
                for k in range(self.num_classes)
            ],
            dtype=torch.float64,
        ).to(self.device)

    def _class_ap(self, found: Tensor, there: Tensor) -> float:
        order = found[:, 2].argsort(descending=True, stable=True)
        found = found[order]
        verdict = torch.zeros(len(found), dtype=torch.int64)
        for image in found[:, 0].unique():
            mine, objects = found[:, 0] == image, there[there[:, 0] == image]
            verdict[mine] = match_detections(
                found[mine, 3:], objects[:, 3:], objects[:, 2] > 0, self.threshold
            )
        return average_precision_11(found[:, 2], verdict, int((there[:, 2] == 0).sum()))


def _rows(image: int, labels: Tensor, third: Tensor, boxes: Tensor) -> Tensor:
    """(n, 7): image, label, score or difficulty, box; float64 holds each of them exactly."""
    number = torch.full_like(labels, image)
    columns = (number[:, None], labels[:, None], third[:, None], boxes)
    return torch.cat([column.double() for column in columns], 1)


def _joined(state: list[Tensor] | Tensor) -> Tensor:
    """A list state as one tensor on the host; after synchronisation it is one already."""
    parts = [state] if isinstance(state, Tensor) else state
    return torch.cat([torch.zeros(0, 7, dtype=torch.float64), *(part.cpu() for part in parts)])


def coco_ap50() -> MeanAveragePrecision | str:
    """COCO's average precision at IoU 0.5, or a line that says how to get what it needs.

    Difficult objects are to be handed over as "iscrowd", which COCO ignores in its own way.
    """
    try:
        with torch.device("cpu"):  # it computes with numbers already when it is built
            metric = MeanAveragePrecision(iou_thresholds=[0.5])
    except ModuleNotFoundError:
        return _MISSING
    metric.warn_on_many_detections = False  # COCO counts the best hundred of an image
    return metric


def as_coco(truth: Truth) -> dict[str, Any]:
    """The objects of an image as torchmetrics' MeanAveragePrecision takes them."""
    return {
        "boxes": truth.boxes,
        "labels": truth.labels,
        "iscrowd": truth.difficult.to(torch.int64),
    }
