"""What predict writes: a row for every item, question or masked token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bert_oversmoothing.metrics import Prediction

Row = dict[str, Any]


def label_rows(
    logits: Tensor, index: Sequence[int], names: Sequence[str] = (), *, choices: bool = False
) -> list[Row]:
    """Label and probabilities of every item; of a regression the score.

    Args:
        logits: (batch, classes), or (batch, 1) of a regression.
        index: numbers of the items.
        names: of the classes, where they have some.
        choices: the classes are choices, which have numbers alone.
    """
    logits = logits.float()
    if logits.shape[1] == 1 and not choices:
        scores = logits[:, 0].tolist()
        return [{"index": i, "score": score} for i, score in zip(index, scores, strict=True)]
    heads = [f"p_{n if choices or not names else names[n]}" for n in range(logits.shape[1])]
    shares = logits.softmax(1)
    rows = []
    for i, best, share in zip(index, shares.argmax(1).tolist(), shares.tolist(), strict=True):
        label = best if choices or not names else names[best]
        rows.append({"index": i, "label": label, **dict(zip(heads, share, strict=True))})
    return rows


def token_rows(
    logits: Tensor, index: Sequence[int], mask: Tensor, names: Sequence[str] = ()
) -> list[Row]:
    """The labels of the real tokens of every item, with blanks between them."""
    labels = logits.argmax(-1)
    rows = []
    for i, found, real in zip(index, labels, mask.bool(), strict=True):
        numbers = found[real].tolist()
        rows.append(
            {"index": i, "labels": " ".join(str(names[n] if names else n) for n in numbers)}
        )
    return rows


def word_rows(
    logits: Tensor, index: Sequence[int], batch: Mapping[str, Tensor], mask_id: int, words: Any
) -> list[Row]:
    """What stands behind every mask: the most probable word, and how probable it is.

    Args:
        logits: (batch, tokens, words).
        index: numbers of the items.
        batch: with `input_ids`.
        mask_id: of the mask.
        words: makes a word of its id.
    """
    rows = []
    for row, place in (batch["input_ids"] == mask_id).nonzero().tolist():
        share = logits[row, place].float().softmax(0)
        best = int(share.argmax())
        word = {"word": words(best), "probability": float(share[best])}
        rows.append({"index": index[row], "place": place, **word})
    return rows


def answer_rows(answers: Sequence[Prediction]) -> list[Row]:
    """The answer to every question, from those of its windows that have been seen."""
    return [
        {
            "id": answer.id,
            "answer": answer.text,
            "best": answer.best,
            "null_odds": answer.null_odds,
            "probability": answer.n_best[0].probability if answer.n_best else 0.0,
        }
        for answer in answers
    ]
