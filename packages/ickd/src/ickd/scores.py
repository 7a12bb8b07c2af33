"""What losses reach on one pair of networks, and what that says when seeds are paired."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from scipy import stats

ALONE = "none"
"""What the student without distillation is called among losses."""

ScoredSplit = Literal["test", "val"]


class Difference(NamedTuple):
    """A paired difference over seeds, in points.

    Attributes:
        mean: of the differences, seed by seed.
        low: of the 95 % confidence interval (Student); -inf for one seed.
        high: likewise.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        scores: accuracy or mIoU in per cent, by loss, one a seed.
        seconds: median time of a training step by loss.
        teacher: score of the teacher; NaN if it has none.
        metric: "top-1" or "mIoU".
        runs: every run, as it is in results.json.
        memory: bytes for an image of the tensors that a training step makes, at the worst moment;
            NaN where a run was finished by an older one.
        start: what the students started from: "scratch", "pretrained" or a file.
        split: images that scores are of: "test", or "val" where these are others.
        cached: whether a teacher's features were read, so that its pass is not in `seconds`.
        busy: whether the machine had more work than cores in a run, so that `seconds` are doubtful.
    """

    scores: dict[str, list[float]]
    seconds: dict[str, float]
    teacher: float
    metric: str
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    start: str = "scratch"
    split: ScoredSplit = "test"
    cached: bool = False
    busy: bool = False

    def differences(self, losses: str, to: str = ALONE) -> list[float] | None:
        """How much better a loss is than another one, seed by seed; None without the other."""
        if to not in self.scores or losses == to:
            return None
        pairs = zip(self.scores[losses], self.scores[to], strict=True)
        return [ours - theirs for ours, theirs in pairs]

    def difference(self, losses: str, to: str = ALONE) -> Difference | None:
        """The same over all seeds."""
        apart = self.differences(losses, to)
        return None if apart is None else paired(apart)


def paired(differences: Sequence[float]) -> Difference:
    """Mean and Student's 95 % interval of differences that belong to seeds."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(mean, float("-inf"), float("inf"))
    error = statistics.stdev(differences) / len(differences) ** 0.5
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return Difference(mean, mean - half, mean + half)
