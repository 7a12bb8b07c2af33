"""SQuAD 1.1 and 2.0: exact match and F1, with and without answers, and the best thresholds.

Every figure is in per cent, under the name that the official evaluation gives it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from bert_oversmoothing.metrics.spans import (
    MAX_TOKENS,
    N_BEST,
    NO_PLACE,
    Candidates,
    Passages,
    Prediction,
    candidates,
    predictions,
)
from tenfold.errors import UserError

Version = Literal["1.1", "2.0"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra blanks.

    >>> normalize_answer("The  Duke's, a cat")
    'dukes cat'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(prediction: str, gold: str) -> float:
    """1 if the two are the same once normalised, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(gold))


def token_f1(prediction: str, gold: str, version: Version = "2.0") -> float:
    """Harmonic mean of precision and recall of words, counted as often as they come.

    Args:
        prediction: what is answered.
        gold: what is accepted.
        version: in 2.0 two texts without any word agree, in 1.1 they do not.
    """
    predicted, wanted = normalize_answer(prediction).split(), normalize_answer(gold).split()
    if version == "2.0" and not (predicted and wanted):
        return float(predicted == wanted)
    same = (Counter(predicted) & Counter(wanted)).total()
    return 2 * same / (len(predicted) + len(wanted)) if same else 0.0


def best_over_golds(
    prediction: str, golds: Sequence[str], version: Version = "2.0"
) -> tuple[float, float]:
    """Exact match and F1 with the best of the accepted answers.

    Args:
        prediction: what is answered; empty for "no answer".
        golds: accepted answers. In 2.0 those that are empty once normalised do not count, and
            where there is no other only an empty prediction is right.
        version: of SQuAD.
    """
    if version == "2.0":
        golds = [gold for gold in golds if normalize_answer(gold)] or [""]
    return (
        max((exact(prediction, gold) for gold in golds), default=0.0),
        max((token_f1(prediction, gold, version) for gold in golds), default=0.0),
    )


def best_threshold(
    texts: Sequence[str],
    scores: Sequence[float],
    null: Sequence[float],
    answerable: Sequence[bool],
) -> tuple[float, float]:
    """The threshold of the null odds that gives the highest mean score.

    Beginning with no answer to any question, questions are answered in rising order of their null
    odds. The threshold is the odds of the one at which the sum of scores is first at its highest,
    0 where it never rises. As in the official evaluation, questions of equal odds come one after
    the other, although no threshold parts them.

    Args:
        texts: answers, before any threshold.
        scores: of these answers.
        null: odds that there is no answer.
        answerable: whether there is one.

    Returns:
        The mean score in per cent, and the threshold.
    """
    order = np.argsort(np.asarray(null), kind="stable")
    has = np.asarray(answerable, bool)
    filled = np.array([bool(text) for text in texts])
    gain = np.where(has, np.asarray(scores), np.where(filled, -1.0, 0.0))[order]
    none = float((~has).sum())
    total = np.cumsum(np.concatenate(([none], gain)))
    best = int(total.argmax())
    threshold = float(np.asarray(null)[order[best - 1]]) if best else 0.0
    return 100 * float(total[best]) / len(has), threshold


def evaluate_squad(
    texts: Mapping[str, str],
    golds: Mapping[str, Sequence[str]],
    version: Version = "1.1",
    null: Mapping[str, float] | None = None,
    null_threshold: float | None = None,
) -> dict[str, float]:
    """The official figures.

    Args:
        texts: answer to each question.
        golds: accepted answers of each; in 2.0 none where the question has no answer.
        version: of SQuAD.
        null: odds that a question has no answer; with them, in 2.0, the best thresholds.
        null_threshold: a question whose odds are above counts as not answered.

    Returns:
        exact, f1, total; in 2.0 also HasAns_*, NoAns_*, and with `null` best_exact,
        best_exact_thresh, best_f1, best_f1_thresh.

    Raises:
        UserError: no question, or one without a prediction.
    """
    absent = [name for name in golds if name not in texts]
    if absent or not golds:
        what = f"{len(absent)} of {len(golds)} questions have no prediction"
        raise UserError(what, where=absent[0] if absent else None)
    names = list(golds)
    answers = [texts[name] for name in names]
    raw = np.array(
        [best_over_golds(texts[name], golds[name], version) for name in names], np.float64
    )
    if version == "1.1":
        return _figures("", raw)
    has = np.array([bool(golds[name]) for name in names])
    odds = None if null is None else np.array([null[name] for name in names])
    final = raw
    if odds is not None and null_threshold is not None:
        final = np.where((odds > null_threshold)[:, None], (~has)[:, None].astype(float), raw)
    figures = _figures("", final)
    for prefix, chosen in (("HasAns_", has), ("NoAns_", ~has)):
        if chosen.any():
            figures |= _figures(prefix, final[chosen])
    if odds is not None:
        for column, name in enumerate(("exact", "f1")):
            best, at = best_threshold(answers, raw[:, column].tolist(), odds.tolist(), has.tolist())
            figures |= {f"best_{name}": best, f"best_{name}_thresh": at}
    return figures


def _figures(prefix: str, scores: np.ndarray) -> dict[str, float]:
    exact_match, f1 = (100 * scores.mean(0)).tolist()
    return {f"{prefix}exact": exact_match, f"{prefix}f1": f1, f"{prefix}total": len(scores)}


class SquadMetric(Metric):
    """Exact match and F1 of the questions whose windows were seen, over all processes.

    Only character offsets and scores are kept; a window that comes twice counts once.

    Args:
        passages: what the windows are of.
        version: of SQuAD.
        n_best: spans to keep of each window; figures need one.
        max_tokens: of the longest answer.
        null_threshold: in 2.0, nothing is answered where the null score exceeds that of the best
            span by more.
        **kwargs: of `torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True

    windows: list[Tensor]
    scores: list[Tensor]
    places: list[Tensor]
    nulls: list[Tensor]

    def __init__(
        self,
        passages: Passages,
        version: Version = "1.1",
        n_best: int = N_BEST,
        max_tokens: int = MAX_TOKENS,
        null_threshold: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.passages = passages
        self.version: Version = version
        self.n_best, self.max_tokens, self.null_threshold = n_best, max_tokens, null_threshold
        for name in ("windows", "scores", "places", "nulls"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Takes the logits of windows.

        Args:
            outputs: `start_logits` and `end_logits`, (b, n).
            batch: `index`, (b), the numbers of the windows.
        """
        start, end, index = outputs["start_logits"], outputs["end_logits"], batch["index"]
        offsets = torch.full((*start.shape, 2), NO_PLACE, dtype=torch.int64)
        for row, window in enumerate(index.tolist()):
            known = torch.from_numpy(self.passages.offsets[window].astype(np.int64))
            offsets[row, : len(known)] = known[: start.shape[1]]
        found = candidates(
            start.detach(), end.detach(), offsets.to(start.device), self.n_best, self.max_tokens
        )
        self.windows.append(index)
        self.scores.append(found.score)
        self.places.append(found.place)
        self.nulls.append(found.null)

    def compute(self) -> dict[str, Tensor]:
        """The figures of `evaluate_squad`, and `score`, which is F1; NaN if nothing was seen."""
        answers = self._answers()
        known = {name: gold for name, gold in self._golds() if gold is not None}
        answers = [answer for answer in answers if answer.id in known]
        if not answers:
            return dict.fromkeys(("exact", "f1", "score"), torch.tensor(torch.nan))
        figures = evaluate_squad(
            {answer.id: answer.best for answer in answers},
            {answer.id: known[answer.id] for answer in answers},
            self.version,
            {answer.id: answer.null_odds for answer in answers},
            self.null_threshold,
        )
        figures["score"] = figures["f1"]
        return {name: torch.tensor(float(value)) for name, value in figures.items()}

    def predictions(self) -> list[Prediction]:
        """The answer to every question seen by this process, with its n best spans."""
        return self._answers()

    def _golds(self) -> Iterable[tuple[str, tuple[str, ...] | None]]:
        return zip(self.passages.ids, self.passages.golds, strict=True)

    def _answers(self) -> list[Prediction]:
        def joined(state: Any) -> Tensor:
            return torch.cat(state) if isinstance(state, list) else state

        if isinstance(self.windows, list) and not self.windows:
            return []
        found = Candidates(joined(self.scores), joined(self.places), joined(self.nulls))
        seen = joined(self.windows).tolist()
        threshold = None if self.version == "1.1" else self.null_threshold
        return predictions(self.passages, seen, found, threshold)
