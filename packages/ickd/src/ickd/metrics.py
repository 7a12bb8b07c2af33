"""How well a segmentation fits the truth: four figures of one confusion matrix.

Row t, column p of the matrix counts the pixels of class t that were taken for class p.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor
from torchmetrics import Metric

IGNORE = 255
"""The label of pixels that do not count: VOC's object boundaries, and padding."""


def confusion_matrix(
    predicted: Integer[Tensor, "*pixels"],
    truth: Integer[Tensor, "*pixels"],
    num_classes: int,
    ignore_index: int = IGNORE,
) -> Integer[Tensor, "classes classes"]:
    """Count the pixels whose true label is a class.

    Args:
        predicted: classes, 0..num_classes - 1.
        truth: labels; those outside 0..num_classes - 1, and `ignore_index`, do not count.
        num_classes: K.
        ignore_index: a label that does not count, even if it is below K.

    Raises:
        ValueError: a prediction that is no class.
    """
    counted = (truth >= 0) & (truth < num_classes) & (truth != ignore_index)
    rows, columns = truth[counted].long(), predicted[counted].long()
    if columns.numel() and not bool(((columns >= 0) & (columns < num_classes)).all()):
        raise ValueError(f"predictions must be classes from 0 to {num_classes - 1}")
    cells = torch.bincount(rows * num_classes + columns, minlength=num_classes**2)
    return cells.view(num_classes, num_classes)


def class_iou(confusion: Integer[Tensor, "classes classes"]) -> Float[Tensor, " classes"]:
    """TP / (truth + predicted - TP) of each class, in 0..1; NaN for one that occurs in neither."""
    counts = confusion.double()
    hits = counts.diagonal()
    return hits / (counts.sum(0) + counts.sum(1) - hits)


def mean_iou(confusion: Integer[Tensor, "classes classes"]) -> Float[Tensor, ""]:
    """Mean over the classes that occur: a class that is predicted but never true counts as 0."""
    return class_iou(confusion).nanmean()


def pixel_accuracy(confusion: Integer[Tensor, "classes classes"]) -> Float[Tensor, ""]:
    """Share of the pixels that are right, in 0..1."""
    counts = confusion.double()
    return counts.diagonal().sum() / counts.sum()


def mean_class_accuracy(confusion: Integer[Tensor, "classes classes"]) -> Float[Tensor, ""]:
    """Share that is right of each class's pixels, averaged over the classes of the truth.

    torchmetrics' macro accuracy differs: it counts classes that are only predicted, as 0.
    """
    counts = confusion.double()
    return (counts.diagonal() / counts.sum(1)).nanmean()


def frequency_weighted_iou(confusion: Integer[Tensor, "classes classes"]) -> Float[Tensor, ""]:
    """IoU of each class weighted with its share of the true pixels, in 0..1."""
    counts = confusion.double()
    share = counts.sum(1) / counts.sum()
    return (share * class_iou(confusion).nan_to_num()).sum()


class SegmentationMetrics(Metric):
    """mIoU and its companions over all pixels of all batches and processes.

    Example:
        >>> metrics = SegmentationMetrics(num_classes=21)
        >>> metrics.update(net(images), labels)
        >>> metrics.compute()["miou"]

    Args:
        num_classes: K.
        ignore_index: the label of pixels that do not count.
        **kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    confusion: Tensor

    def __init__(self, num_classes: int, ignore_index: int = IGNORE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.ignore_index = num_classes, ignore_index
        empty = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("confusion", empty, dist_reduce_fx="sum")

    def update(self, predicted: Tensor, truth: Integer[Tensor, "batch height width"]) -> None:
        """Count a batch.

        Args:
            predicted: logits (batch, classes, h, w), resized to the labels' size (bilinear, corners
                aligned) where theirs is another, as for labels of the original resolution; or
                classes (batch, height, width).
            truth: labels.

        Raises:
            ValueError: shapes that do not fit.
        """
        if predicted.ndim == 4:
            if predicted.shape[1] != self.num_classes:
                what = f"{predicted.shape[1]} logits for {self.num_classes} classes"
                raise ValueError(f"predictions have {what}")
            size = [int(side) for side in truth.shape[1:]]
            if list(predicted.shape[2:]) != size:
                predicted = F.interpolate(
                    predicted.float(), size, mode="bilinear", align_corners=True
                )
            predicted = predicted.argmax(1)
        if predicted.shape != truth.shape:
            shapes = f"{tuple(predicted.shape)} and {tuple(truth.shape)}"
            raise ValueError(f"predictions and labels have different shapes: {shapes}")
        self.confusion += confusion_matrix(predicted, truth, self.num_classes, self.ignore_index)

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """The four figures in 0..1: "miou", "pixel_accuracy", "class_accuracy" and "fwiou".

        All are NaN as long as no pixel has been counted.
        """
        confusion = self.confusion.cpu()  # some devices have no float64
        figures = {
            "miou": mean_iou(confusion),
            "pixel_accuracy": pixel_accuracy(confusion),
            "class_accuracy": mean_class_accuracy(confusion),
            "fwiou": frequency_weighted_iou(confusion),
        }
        return {name: figure.float().to(self.confusion.device) for name, figure in figures.items()}

    def class_iou(self) -> Float[Tensor, " classes"]:
        """IoU of each class over what this process has counted, see the function `class_iou`."""
        return class_iou(self.confusion.cpu()).float()
