"""The odd run as question, classification or choice, in the batches that models take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bert_oversmoothing.metrics.spans import NO_PLACE, Passages
from bert_oversmoothing.synthetic import (
    VALIDATION_ITEMS,
    VALIDATION_SEED,
    OddRun,
    answer_mask,
)
from bert_oversmoothing.synthetic import Split as Stream
from tenfold.data import Draw, as_draw

Form = Literal["qa", "parity", "after", "choice"]

TRAIN_ITEMS = 4800
"""Of an epoch: 150 batches of 32."""

TOKENIZER = "tokenizer"
"""Folder of the tokenizer beside written items."""


def label_names(task: OddRun, form: Form) -> tuple[str, ...]:
    """Names of the classes of a form; none where it has no classes."""
    if form == "parity":
        return "even", "odd"
    return (*(f"c{n}" for n in range(task.categories)), "end") if form == "after" else ()


class OddRunItems(Dataset[Any]):
    """Odd-run items; a whole batch is made at once, of tensors.

    Training items never come twice: those of epoch e are numbered from e times `size`. Validation
    has the 384 fixed items first, and behind them come those of the test.

    Args:
        task: the generator.
        form: what is asked.
        split: "train", "val" or "test".
        size: items in an epoch.
        seed: of training items.
    """

    def __init__(self, task: OddRun, form: Form, split: str, size: int, seed: int = 0) -> None:
        self.task, self.size = task, size
        self.form: Form = form
        self.stream: Stream = "train" if split == "train" else "validation"
        self.seed = seed if split == "train" else VALIDATION_SEED
        self.first = VALIDATION_ITEMS if split == "test" else 0

    def __len__(self) -> int:
        return self.size

    def numbers(self, draws: Sequence[Draw]) -> list[int]:
        """Numbers of some draws' items in their stream."""
        return [self.first + draw.epoch * self.size + draw.index for draw in draws]

    def __getitems__(self, keys: Sequence[Draw | int]) -> dict[str, Tensor]:
        draws = [as_draw(key) for key in keys]
        numbers, index = self.numbers(draws), torch.tensor([draw.index for draw in draws])
        if self.form == "choice":
            choices = self.task.choices(self.seed, numbers, self.stream)
            batch = {"input_ids": choices.ids, "attention_mask": choices.mask.long()}
            return batch | {"labels": choices.label, "index": index}
        items = self.task.items(self.seed, numbers, self.stream)
        batch = {"input_ids": items.ids, "attention_mask": torch.ones_like(items.ids)}
        if self.form == "qa":
            batch |= {"start_positions": items.start, "end_positions": items.end}
        else:
            batch["labels"] = self.task.labels(items, self.form)
        return batch | {"index": index}

    def __getitem__(self, key: Draw | int) -> dict[str, Tensor]:
        return {name: column[0] for name, column in self.__getitems__([key]).items()}

    def passages(self) -> Passages:
        """What answers are read from, as the reader of SQuAD gives it for the same items."""
        items = self.task.items(self.seed, range(self.first, self.first + self.size), self.stream)
        words, inside = self.task.vocabulary, answer_mask(items.ids[0]).numpy()
        contexts, golds, offsets = [], [], []
        rows = zip(items.ids.numpy(), items.start.tolist(), items.end.tolist(), strict=True)
        for ids, start, end in rows:
            texts = [words[token] for token in ids[inside]]
            last = np.cumsum([len(text) + 1 for text in texts]) - 1
            place = np.full((len(ids), 2), NO_PLACE, np.int32)
            place[inside, 0], place[inside, 1] = last - [len(text) for text in texts], last
            contexts.append(" ".join(texts))
            golds.append((contexts[-1][place[start, 0] : place[end, 1]],))
            offsets.append(place)
        names = [f"{self.stream}-{self.first + number}" for number in range(self.size)]
        return Passages(names, contexts, golds, range(self.size), offsets)
