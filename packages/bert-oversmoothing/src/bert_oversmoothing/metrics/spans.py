"""Answers to questions from the logits of windows: the n best spans of the context.

A span starts and ends at tokens of the context and has at most 30 of them; its score is its start
logit plus its end logit. Every such span counts, not only those of the 20 best starts and ends. The
null score, of a question without an answer, is that of token 0, and of several windows the least.

    b windows  n tokens  k best spans
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

N_BEST, MAX_TOKENS = 20, 30

NO_PLACE = -1
"""Character offset of a token that is none of the context, and of a span that does not exist."""


@dataclass(frozen=True)
class Passages:
    """Questions, their contexts, and the windows that were cut from them.

    Attributes:
        ids: of the questions.
        contexts: of each question.
        golds: accepted answers of each question; none where it has no answer, None where the
            answers are unknown.
        question: number of the question of each window.
        offsets: for each window the first character of every token in the context and the one
            behind its last, (n, 2); `NO_PLACE` for tokens outside the context.
    """

    ids: Sequence[str]
    contexts: Sequence[str]
    golds: Sequence[tuple[str, ...] | None]
    question: Sequence[int]
    offsets: Sequence[ndarray]


class Candidates(NamedTuple):
    """The best spans of windows.

    Attributes:
        score: in falling order, -inf where a window has fewer spans.
        place: first character in the context and the one behind the last, or `NO_PLACE`.
        null: score of "no answer".
    """

    score: Float[Tensor, "b k"]
    place: Int64[Tensor, "b k 2"]
    null: Float[Tensor, " b"]


class Span(NamedTuple):
    """A span of a context; no text where the answer is that there is none."""

    text: str
    start: int
    end: int
    score: float
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What is answered to a question.

    Attributes:
        id: of the question.
        text: of the answer; empty where there is none.
        best: text of the best span, whatever the null score.
        null_odds: null score less that of the best span.
        n_best: the best spans, with the probability of each among them.
    """

    id: str
    text: str
    best: str
    null_odds: float
    n_best: tuple[Span, ...]


def candidates(
    start: Float[Tensor, "b n"],
    end: Float[Tensor, "b n"],
    offsets: Int64[Tensor, "b n 2"],
    n_best: int = N_BEST,
    max_tokens: int = MAX_TOKENS,
) -> Candidates:
    """The best spans of each window.

    Args:
        start: logits of the first token of the answer.
        end: of the last one.
        offsets: see `Passages`, padded with `NO_PLACE`.
        n_best: how many spans to keep.
        max_tokens: length of the longest.
    """
    windows, tokens = start.shape
    start, end = start.float(), end.float()
    width = min(max_tokens, tokens)
    inside = offsets[..., 0] != NO_PLACE
    first = start.masked_fill(~inside, -torch.inf)
    last = end.masked_fill(~inside, -torch.inf)
    # last[:, i + w] for every start i and width w, without a loop
    lasts = torch.nn.functional.pad(last, (0, width - 1), value=-torch.inf).unfold(1, width, 1)
    score, index = (first[..., None] + lasts).flatten(1).topk(min(n_best, tokens * width))
    rows = torch.arange(windows, device=start.device)[:, None]
    from_token = index // width
    to_token = (from_token + index % width).clamp(max=tokens - 1)
    place = torch.stack((offsets[rows, from_token, 0], offsets[rows, to_token, 1]), -1)
    place = place.masked_fill(score.isneginf()[..., None], NO_PLACE)
    missing = n_best - score.shape[1]
    score = torch.nn.functional.pad(score, (0, missing), value=-torch.inf)
    place = torch.nn.functional.pad(place, (0, 0, 0, missing), value=NO_PLACE)
    return Candidates(score, place, start[:, 0] + end[:, 0])


def predictions(
    passages: Passages,
    windows: Sequence[int],
    found: Candidates,
    null_threshold: float | None = None,
) -> list[Prediction]:
    """The answer to each question, the best over its windows.

    Args:
        passages: questions and contexts.
        windows: number of the window of each row of `found`; one that comes twice counts once.
        found: best spans of these windows.
        null_threshold: answer nothing where `null_odds` are above it; None always answers.

    Returns:
        A prediction for every question of which there is a window, in their order.
    """
    spans: dict[int, dict[tuple[int, int], float]] = {}
    nulls: dict[int, float] = {}
    n_best = found.score.shape[1]
    rows = zip(
        windows, found.score.tolist(), found.place.tolist(), found.null.tolist(), strict=True
    )
    for window, scores, places, null in rows:
        question = int(passages.question[window])
        mine = spans.setdefault(question, {})
        for score, (first, last) in zip(scores, places, strict=True):
            if first != NO_PLACE:
                mine[first, last] = max(score, mine.get((first, last), -math.inf))
        nulls[question] = min(null, nulls.get(question, math.inf))
    return [
        _predict(passages, question, spans[question], nulls[question], n_best, null_threshold)
        for question in sorted(spans)
    ]


def _predict(
    passages: Passages,
    question: int,
    spans: Mapping[tuple[int, int], float],
    null: float,
    n_best: int,
    threshold: float | None,
) -> Prediction:
    best = sorted(spans.items(), key=lambda span: -span[1])[:n_best]
    scores = np.array([score for _, score in best])
    share = np.exp(scores - scores.max()) if best else scores
    share = share / share.sum() if best else share
    context = passages.contexts[question]
    listed = tuple(
        Span(context[first:last], first, last, score, float(part))
        for ((first, last), score), part in zip(best, share, strict=True)
    )
    text = listed[0].text if listed else ""
    odds = null - listed[0].score if listed else math.inf
    answer = "" if threshold is not None and odds > threshold else text
    return Prediction(passages.ids[question], answer, text, odds, listed)
