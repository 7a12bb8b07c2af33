"""Texts and choices as the ids that a model takes, and batches of them.

Items are dicts of lists, without padding; a batch is padded on the right to its longest item.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bert_oversmoothing.data.masking import IGNORED, Masking
from bert_oversmoothing.data.records import Choice, Example
from tenfold.data import BadItem, Draw, as_draw
from tenfold.errors import UserError, first_line

Item = dict[str, Any]


@dataclass(frozen=True)
class Encoder:
    """Texts, or pairs of them, to ids.

    Attributes:
        tokenizer: of transformers.
        max_length: tokens of the longest, special ones included; of a pair the longer text is cut
            first.
    """

    tokenizer: Any
    max_length: int

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, **options: Any
    ) -> list[Item]:
        """The inputs of each text, under the names that the model takes.

        Args:
            texts: the first or only ones.
            pairs: the second ones.
            **options: of the tokenizer; what they add comes under its own name.

        Raises:
            UserError: a text that the tokenizer refuses.
        """
        try:
            encoded = self.tokenizer(
                list(texts),
                None if pairs is None else list(pairs),
                truncation=True,
                max_length=self.max_length,
                **options,
            )
        except Exception as error:  # tokenizers raises bare exceptions
            raise UserError(f"the tokenizer refuses a text: {first_line(error)}") from error
        columns = dict(encoded.data)
        return [
            {name: column[row] for name, column in columns.items()} for row in range(len(texts))
        ]


class _Encoded(Dataset[Any]):
    """Items that are tokenised when they are wanted, a whole batch at once."""

    def fetch(self, draws: Sequence[Draw]) -> tuple[list[Item], list[BadItem]]:
        """The items of some draws; none of them is unusable."""
        items = self.encode(draws)
        for item, draw in zip(items, draws, strict=True):
            item["index"] = draw.index
        return items, []

    def __getitem__(self, key: Draw | int) -> Item:
        return self.fetch([as_draw(key)])[0][0]

    def encode(self, draws: Sequence[Draw]) -> list[Item]:
        """The items without their index."""
        raise NotImplementedError


class TextItems(_Encoded):
    """Texts or pairs, with their labels.

    Args:
        records: of one split; all with a second text, or none.
        encoder: how they become ids.
        regression: whether labels are scores.
        masking: hides words to be found, in the place of labels.
    """

    def __init__(
        self,
        records: Sequence[Example],
        encoder: Encoder,
        regression: bool = False,
        masking: Masking | None = None,
    ) -> None:
        self.records, self.encoder, self.masking = records, encoder, masking
        self.unknown = math.nan if regression else -1
        """Label of an item without one."""
        self.labelled = any(record.label is not None for record in records)

    def __len__(self) -> int:
        return len(self.records)

    def lengths(self) -> list[int]:
        """Characters of each, by which batches of like length are made."""
        return [len(record.text) + len(record.pair or "") for record in self.records]

    def encode(self, draws: Sequence[Draw]) -> list[Item]:
        """The items without their index."""
        records = [self.records[draw.index] for draw in draws]
        pairs = None
        if records[0].pair is not None:
            pairs = [record.pair or "" for record in records]
        texts = [record.text for record in records]
        if self.masking is not None:
            items = self.encoder(texts, pairs, return_special_tokens_mask=True)
            return [self.masking(item, draw) for item, draw in zip(items, draws, strict=True)]
        items = self.encoder(texts, pairs)
        if self.labelled:
            for item, record in zip(items, records, strict=True):
                item["labels"] = self.unknown if record.label is None else record.label
        return items


class ChoiceItems(_Encoded):
    """Multiple choice: each ending as the second text after the context.

    Args:
        records: of one split.
        encoder: how they become ids.

    Raises:
        UserError: records with different numbers of endings.
    """

    def __init__(self, records: Sequence[Choice], encoder: Encoder) -> None:
        self.records, self.encoder = records, encoder
        counts = {len(record.endings) for record in records}
        if len(counts) > 1:
            raise UserError(f"items with different numbers of choices: {sorted(counts)}")
        self.labelled = any(record.label is not None for record in records)

    def __len__(self) -> int:
        return len(self.records)

    def lengths(self) -> list[int]:
        """Characters of each, with its longest ending."""
        return [len(record.context) + max(map(len, record.endings)) for record in self.records]

    def encode(self, draws: Sequence[Draw]) -> list[Item]:
        """The items without their index."""
        records = [self.records[draw.index] for draw in draws]
        contexts = [record.context for record in records for _ in record.endings]
        encoded = self.encoder(contexts, [each for record in records for each in record.endings])
        items, choices = [], len(records[0].endings)
        for row, record in enumerate(records):
            mine = encoded[row * choices : (row + 1) * choices]
            item: Item = {name: [each[name] for each in mine] for name in mine[0]}
            if self.labelled:
                item["labels"] = -1 if record.label is None else record.label
            items.append(item)
        return items


class PadCollate:
    """Items to a batch: lists of tokens are padded on the right to the longest.

    Args:
        tokenizer: whose padding it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        types = getattr(tokenizer, "pad_token_type_id", 0)
        self.padding: Mapping[str, int] = {
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": types,
            "labels": IGNORED,
        }

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Tensors of int64, or float32 for scores: (b), (b, n) or (b, choices, n)."""
        return {name: self._column(name, [item[name] for item in items]) for name in items[0]}

    def _column(self, name: str, values: list[Any]) -> Tensor:
        first = values[0]
        if isinstance(first, int | float):
            kind = torch.float32 if isinstance(first, float) else torch.int64
            return torch.tensor(values, dtype=kind)
        choices = isinstance(first[0], list)
        rows = [row for value in values for row in value] if choices else values
        longest, padding = max(map(len, rows)), self.padding.get(name, 0)
        padded = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])
        return padded.unflatten(0, (len(values), -1)) if choices else padded
