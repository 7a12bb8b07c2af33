"""Segmentation metrics: by hand, against torchmetrics, and summed over processes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassJaccardIndex,
)

from ickd.metrics import (
    SegmentationMetrics,
    class_iou,
    confusion_matrix,
    frequency_weighted_iou,
    mean_class_accuracy,
    mean_iou,
    pixel_accuracy,
)

# Class 0: 3 of 4 right; 1: 1 of 2; 2: never true, predicted once; 3: occurs nowhere.
TRUTH = torch.tensor([[[0, 0, 0, 0], [1, 1, 255, 255]]])
PREDICTED = torch.tensor([[[0, 0, 0, 2], [1, 0, 1, 3]]])


def test_by_hand():
    metrics = SegmentationMetrics(4)
    metrics.update(PREDICTED, TRUTH)
    assert metrics.confusion.tolist() == [[3, 0, 1, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    iou = metrics.class_iou()
    assert iou[:3].tolist() == pytest.approx([3 / 5, 1 / 2, 0])
    assert iou[3].isnan()
    found = metrics.compute()
    assert float(found["miou"]) == pytest.approx((3 / 5 + 1 / 2 + 0) / 3)
    assert float(found["pixel_accuracy"]) == pytest.approx(4 / 6)
    assert float(found["class_accuracy"]) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert float(found["fwiou"]) == pytest.approx(4 / 6 * 3 / 5 + 2 / 6 * 1 / 2)


def slow_figures(predicted: np.ndarray, truth: np.ndarray, classes: int) -> dict[str, float]:
    """The definitions of section 5, pixel by pixel."""
    hits, asked, said = ([0] * classes for _ in range(3))
    for p, t in zip(predicted.ravel().tolist(), truth.ravel().tolist(), strict=True):
        if 0 <= t < classes:
            asked[t] += 1
            said[p] += 1
            hits[t] += p == t
    total = sum(asked)
    union = [a + s - h for a, s, h in zip(asked, said, hits, strict=True)]
    ious = [h / u for h, u in zip(hits, union, strict=True) if u]
    return {
        "miou": sum(ious) / len(ious),
        "pixel_accuracy": sum(hits) / total,
        "class_accuracy": float(np.mean([h / a for h, a in zip(hits, asked, strict=True) if a])),
        "fwiou": sum(a / total * h / u for a, h, u in zip(asked, hits, union, strict=True) if u),
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.integers(0, 2**31 - 1), st.sampled_from([0, 1, 3]))
def test_against_torchmetrics_and_the_definitions(classes, seed, unused):
    generator = np.random.default_rng(seed)
    used = max(1, classes - unused)  # the last classes are absent from the truth
    truth = generator.integers(0, used, (2, 5, 6))
    truth[generator.random(truth.shape) < 0.2] = 255
    truth[0, 0, 0] = 0
    predicted = generator.integers(0, classes if seed % 2 else used, truth.shape)
    ours = SegmentationMetrics(classes)
    p, t = torch.from_numpy(predicted), torch.from_numpy(truth)
    ours.update(p[:1], t[:1])
    ours.update(p[1:], t[1:])
    found = {name: float(value) for name, value in ours.compute().items()}
    assert found == pytest.approx(slow_figures(predicted, truth, classes), rel=1e-6)
    peer = MulticlassJaccardIndex(classes, average="macro", ignore_index=255)
    assert found["miou"] == pytest.approx(float(peer(p, t)), rel=1e-6)
    micro = MulticlassAccuracy(classes, average="micro", ignore_index=255)
    assert found["pixel_accuracy"] == pytest.approx(float(micro(p, t)), rel=1e-6)
    counts = MulticlassConfusionMatrix(classes, ignore_index=255)
    assert torch.equal(ours.confusion, counts(p, t).long())


def test_macro_accuracy_is_another_thing():
    macro = MulticlassAccuracy(4, average="macro", ignore_index=255)
    assert float(macro(PREDICTED, TRUTH)) == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert float(mean_class_accuracy(confusion_matrix(PREDICTED, TRUTH, 4))) == 0.625


def test_logits_are_resized_to_the_labels():
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1] = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])  # class 1 right of the middle
    truth = torch.zeros(1, 4, 6, dtype=torch.int64)
    truth[:, :, 3:] = 1
    metrics = SegmentationMetrics(2)
    metrics.update(logits, truth)
    assert metrics.compute()["miou"] == 1
    metrics.reset()
    metrics.update(logits, torch.tensor([[[0, 1], [1, 1]]]))
    assert metrics.confusion.tolist() == [[1, 0], [1, 2]]


def test_an_ignored_class_and_labels_of_no_class():
    truth = torch.tensor([[[0, 1, 7, -1]]])
    confusion = confusion_matrix(torch.zeros_like(truth), truth, 3, ignore_index=1)
    assert confusion.sum() == confusion[0, 0] == 1


def test_nothing_counted_is_not_a_number():
    empty = torch.zeros(3, 3, dtype=torch.int64)
    figures = (mean_iou, pixel_accuracy, mean_class_accuracy, frequency_weighted_iou)
    assert all(figure(empty).isnan() for figure in figures)
    assert class_iou(empty).isnan().all()


def test_sums_over_processes():
    rank0, rank1 = SegmentationMetrics(4), SegmentationMetrics(4)
    rank0.update(PREDICTED, TRUTH)
    rank1.update(TRUTH.clamp(max=3), TRUTH)
    both = SegmentationMetrics(
        4,
        distributed_available_fn=lambda: True,
        dist_sync_fn=lambda confusion, group: [confusion, rank1.confusion],
    )
    both.update(PREDICTED, TRUTH)
    together = SegmentationMetrics(4)
    together.update(PREDICTED, TRUTH)
    together.update(TRUTH.clamp(max=3), TRUTH)
    assert both.compute() == together.compute()
    assert both.compute() != rank0.compute()


def test_shapes_and_classes_that_do_not_fit():
    metrics = SegmentationMetrics(3)
    with pytest.raises(ValueError, match="4 logits for 3 classes"):
        metrics.update(torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2).long())
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) and \(1, 3, 3\)"):
        metrics.update(torch.zeros(1, 2, 2).long(), torch.zeros(1, 3, 3).long())
    with pytest.raises(ValueError, match="classes from 0 to 2"):
        metrics.update(torch.full((1, 2, 2), 5), torch.zeros(1, 2, 2).long())
