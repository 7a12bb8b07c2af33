"""The metrics of classification, regression, choice and masked words, task by task.

Every metric takes a model's output and its batch, and computes a dict of figures (0 to 1, except
perplexity) in which `score` is the one that says how good it is; higher is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import (
    Accuracy,
    F1Score,
    MatthewsCorrCoef,
    Metric,
    PearsonCorrCoef,
    SpearmanCorrCoef,
    SumMetric,
)
from torchmetrics.text import Perplexity

IGNORED = -100
"""Label of a token that was not masked."""

GLUE_METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy_m", "accuracy_mm"),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}
"""The figures of each GLUE task."""

LEFT_OUT = "wnli"
"""The task that does not count in the average of GLUE."""


def glue_score(task: str, figures: Mapping[str, Any]) -> float:
    """The mean of a task's figures; of MNLI, that of matched and mismatched.

    Raises:
        KeyError: an unknown task, or a figure that is missing.
    """
    return fmean(float(figures[name]) for name in GLUE_METRICS[task])


def glue_average(results: Mapping[str, Mapping[str, Any]]) -> float:
    """The mean over tasks of their score, WNLI left out, MNLI the mean of matched and mismatched.

    Args:
        results: figures of each task.

    Raises:
        ValueError: no task but WNLI.
    """
    counted = [task for task in results if task != LEFT_OUT]
    if not counted:
        raise ValueError("no task of GLUE to average over; WNLI is left out")
    return fmean(glue_score(task, results[task]) for task in counted)


def _metric(name: str, labels: int) -> Metric:
    task = "binary" if labels == 2 else "multiclass"
    classes: dict[str, Any] = {} if labels == 2 else {"num_classes": labels}
    match name.removesuffix("_mm").removesuffix("_m"):
        case "accuracy" if labels == 2:
            return Accuracy(task="binary")
        case "accuracy":
            return Accuracy(task="multiclass", num_classes=labels, average="micro")
        case "f1":
            return F1Score(task="binary")
        case "matthews":
            return MatthewsCorrCoef(task=task, **classes)
        case "pearson":
            return PearsonCorrCoef()
        case "spearman":
            return SpearmanCorrCoef()
        case other:
            raise ValueError(f"no metric {other!r}")


class TaskMetric(nn.Module):
    """Figures of a task whose items have one label each.

    Items without a label (-1, or NaN where the label is a score) do not count. The children
    synchronise across processes when they are computed.

    Args:
        names: of the figures; "accuracy_m" and "accuracy_mm" count items that `mismatched` does
            not, and does, mark.
        labels: number of classes, or 1 for a score.
        mismatched: for each item of the split, by its `index`.
    """

    def __init__(
        self, names: tuple[str, ...], labels: int, mismatched: Tensor | None = None
    ) -> None:
        super().__init__()
        self.labels = labels
        self.metrics = nn.ModuleDict({name: _metric(name, labels) for name in names})
        self.seen = nn.ModuleDict({name: SumMetric() for name in names})
        self.mismatched = mismatched

    def update(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Takes the output of a model.

        Args:
            outputs: `logits`, (b, classes) or (b, 1).
            batch: `labels`, (b); for matched and mismatched items `index` too.
        """
        logits, labels = outputs["logits"].detach(), batch["labels"]
        if self.labels == 1:
            known, predicted = ~labels.isnan(), logits.float().reshape(-1)
        else:
            known, predicted = labels >= 0, logits.argmax(-1)
        for name in self.metrics:
            chosen = known
            if name.endswith(("_m", "_mm")):
                assert self.mismatched is not None
                other = self.mismatched[batch["index"].cpu()].to(known.device)
                chosen = known & (other if name.endswith("_mm") else ~other)
            _child(self.seen, name).update(chosen.sum())
            if chosen.any():
                _child(self.metrics, name).update(predicted[chosen], labels[chosen])

    def compute(self) -> dict[str, Tensor]:
        """The figures, and `score`, their mean; NaN for one of which no labelled item was seen."""
        found = {}
        for name in self.metrics:
            # the count is that of all processes: all of them take the same way
            seen = _child(self.seen, name).compute() > 0
            nothing = torch.tensor(torch.nan, device=seen.device)
            found[name] = _child(self.metrics, name).compute().float() if seen else nothing
        return found | {"score": torch.stack(list(found.values())).mean()}

    def reset(self) -> None:
        """Forgets what was seen."""
        for name in self.metrics:
            _child(self.metrics, name).reset()
            _child(self.seen, name).reset()


def _child(metrics: nn.ModuleDict, name: str) -> Metric:
    metric = metrics[name]
    assert isinstance(metric, Metric)
    return metric


class GlueMetric(TaskMetric):
    """The figures of a GLUE task.

    Args:
        task: such as "cola".
        mismatched: for MNLI, which items are of the mismatched split; None if all are matched.
    """

    def __init__(self, task: str, mismatched: Tensor | None = None) -> None:
        labels = {"stsb": 1, "mnli": 3}.get(task, 2)
        if task == "mnli" and mismatched is None:
            super().__init__(("accuracy",), labels)
        else:
            super().__init__(GLUE_METRICS[task], labels, mismatched)


class ChoiceMetric(TaskMetric):
    """Accuracy of multiple choice.

    Args:
        choices: number of them.
    """

    def __init__(self, choices: int) -> None:
        # two choices are two classes of which neither is the positive one: accuracy is the same
        super().__init__(("accuracy",), choices)


class MaskedWordsMetric(nn.Module):
    """Perplexity and accuracy at the masked tokens; the score is the accuracy."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.perplexity = Perplexity()
        self.accuracy = Accuracy(task="multiclass", num_classes=vocabulary, average="micro")

    def update(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Takes the output of a model.

        Args:
            outputs: `logits`, (b, n, vocabulary).
            batch: `labels`, (b, n), -100 where a token was not masked.
        """
        masked = batch["labels"] != IGNORED
        logits, labels = outputs["logits"].detach()[masked].float(), batch["labels"][masked]
        self.perplexity.update(logits[None], labels[None])
        self.accuracy.update(logits.argmax(-1), labels)

    def compute(self) -> dict[str, Tensor]:
        """perplexity, accuracy, score."""
        accuracy = self.accuracy.compute()
        return {"perplexity": self.perplexity.compute(), "accuracy": accuracy, "score": accuracy}

    def reset(self) -> None:
        """Forgets what was seen."""
        self.perplexity.reset()
        self.accuracy.reset()
