"""What is fed to the model: texts, images or ready batches, with what may not be measured left out.

Legend of the shape suffixes: b texts, n tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenfold.errors import UserError
from tenfold.images import read_image

_CHUNK = 1000  # texts that the tokenizer is given at a time


class Batch(NamedTuple):
    """Some texts.

    Attributes:
        inputs: what the model takes.
        mask_bn: the real tokens, or None where all are.
        counted_bn: those of them that the measures of states see, or None for all tokens.
        rows: which of the given texts they are.
    """

    inputs: dict[str, Tensor]
    mask_bn: Bool[Tensor, "b n"] | None
    counted_bn: Bool[Tensor, "b n"] | None
    rows: list[int]


@dataclass
class Counts:
    """Texts that were given, and those of them (by their place) that were not simply used."""

    given: int = 0
    empty: list[int] = field(default_factory=list)
    single: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    nan: list[int] = field(default_factory=list)


@runtime_checkable
@runtime_checkable
class Corpus(Protocol):
    """Texts, images or batches.

    Attributes:
        counts: what was left out before the model saw anything.
        usable: places of those that are left, the longest first.
        special: True if special tokens do not count.
        prefix: so many of an image's first tokens do not count.
    """

    counts: Counts
    usable: list[int]
    special: bool
    prefix: int

    def batches(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        """The texts of some places, in that order."""
        ...

    def length(self, row: int) -> int:
        """How many tokens a text has, 0 where only the model knows."""
        ...

    def counted_words(self, row: int) -> list[str]:
        """The tokens of a text that count as words, none where there are no words."""
        ...

    def name(self, row: int) -> str:
        """What a text is called in a message."""
        ...


class Texts:
    """Texts behind a tokenizer; only their ids are kept.

    Padding is put on the right whatever the tokenizer's side, so that absolute positions are those
    of the text alone.

    Args:
        texts: to be analysed.
        tokenizer: of the model.
        max_length: tokens above which a text is cut.
        exclude_special: do not count [CLS], [SEP] and the like.
        on_long: "truncate" or "error".

    Raises:
        UserError: a text is too long and that is an error.
    """

    prefix = 0

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Any,
        max_length: int,
        *,
        exclude_special: bool = False,
        on_long: Literal["truncate", "error"] = "truncate",
    ) -> None:
        self.texts, self.tokenizer, self.special = texts, tokenizer, exclude_special
        self.max_length, self.on_long = max_length, on_long
        self.counts = Counts(given=len(texts))
        ids, special, lengths = [], [], []
        for start in range(0, len(texts), _CHUNK):
            encoded = self._encode(texts[start : start + _CHUNK], start)
            lengths += map(len, encoded["input_ids"])
            ids += [np.fromiter(row, np.int32) for row in encoded["input_ids"]]
            special += [np.fromiter(row, bool) for row in encoded["special_tokens_mask"]]
        self.ends = np.cumsum(lengths, dtype=np.int64)
        self.ids, self.specials = _joined(ids, np.int32), _joined(special, bool)
        self.usable = [row for row in range(len(texts)) if self._counts(row)]
        self.usable.sort(key=self.length, reverse=True)

    def _encode(self, texts: Sequence[str], start: int) -> dict[str, list[list[int]]]:
        options = {
            "return_special_tokens_mask": True,
            "return_attention_mask": False,
            "verbose": False,  # a text too long for the model is our own business
        }
        encoded = dict(self.tokenizer([*texts], **options))
        for place, ids in enumerate(encoded["input_ids"]):
            if len(ids) <= self.max_length:
                continue
            if self.on_long == "error":
                what = f"text {start + place} has {len(ids)} tokens, more than {self.max_length}"
                raise UserError(what, fix="shorten it, or --on-long truncate")
            self.counts.truncated.append(start + place)
            limits = {"truncation": True, "max_length": self.max_length}
            cut = self.tokenizer([texts[place]], **options, **limits)
            for key in ("input_ids", "special_tokens_mask"):
                encoded[key][place] = cut[key][0]
        return encoded

    def _counts(self, row: int) -> bool:
        """Whether a text can be measured; if not, it is counted as what it is."""
        special = self._of(self.specials, row)
        own = int((~special).sum())
        if not own or not self.texts[row].strip():
            self.counts.empty.append(row)
            return False
        if (own if self.special else len(special)) < 2:
            self.counts.single.append(row)
            return False
        return True

    def _of(self, flat: np.ndarray, row: int) -> np.ndarray:
        return flat[self.ends[row - 1] if row else 0 : self.ends[row]]

    def length(self, row: int) -> int:
        """How many tokens a text has."""
        return len(self._of(self.ids, row))

    def counted_words(self, row: int) -> list[str]:
        """The tokens of a text that count."""
        ids, special = self._of(self.ids, row), self._of(self.specials, row)
        counted = ids[~special] if self.special else ids
        return self.tokenizer.convert_ids_to_tokens(counted.tolist())

    def name(self, row: int) -> str:
        """A text by its place and its first words."""
        text = " ".join(self.texts[row].split())
        return f"text {row}, {text[:40]!r}"

    def batches(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        """The texts of some places, in that order."""
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        for start in range(0, len(rows), size):
            some = [*rows[start : start + size]]
            ids = [self._of(self.ids, row) for row in some]
            shape = len(some), max(map(len, ids))
            ids_bn, special_bn = np.full(shape, pad, np.int64), np.ones(shape, bool)
            mask_bn = np.zeros(shape, bool)
            for place, (row, own) in enumerate(zip(some, ids, strict=True)):
                ids_bn[place, : len(own)], mask_bn[place, : len(own)] = own, True
                special_bn[place, : len(own)] = self._of(self.specials, row)
            mask = torch.from_numpy(mask_bn)
            counted = torch.from_numpy(mask_bn & ~special_bn) if self.special else mask
            inputs = {"input_ids": torch.from_numpy(ids_bn), "attention_mask": mask.long()}
            yield Batch(inputs, mask, counted, some)


class Images:
    """Images behind an image processor.

    Args:
        images: files or PIL images.
        processor: of the model.
        prefix: tokens in front of the patches that do not count.
    """

    def __init__(self, images: Sequence[Any], processor: Any, prefix: int = 0) -> None:
        self.images, self.processor, self.prefix = images, processor, prefix
        self.special = prefix > 0
        self.counts = Counts(given=len(images))
        self.usable = [*range(len(images))]

    def length(self, row: int) -> int:
        """Only the model knows, and all are alike."""
        return 0

    def counted_words(self, row: int) -> list[str]:
        """Patches have no words."""
        return []

    def name(self, row: int) -> str:
        """An image by its file."""
        image = self.images[row]
        return str(image) if isinstance(image, str | Path) else f"image {row}"

    def batches(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        """The images of some places, in that order."""
        for start in range(0, len(rows), size):
            some = [*rows[start : start + size]]
            images = [read_image(self.images[row]) for row in some]
            inputs = self.processor(images=images, return_tensors="pt")
            yield Batch({"pixel_values": inputs["pixel_values"]}, None, None, some)


class Ready:
    """Batches that someone else has made, with padding wherever it lies.

    A text is counted by its place over all batches. Without an `attention_mask` all tokens are
    real; a text whose mask is zero is empty.

    Args:
        batches: what the model takes, with the texts along the first axis of every tensor.
    """

    special, prefix = False, 0

    def __init__(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.made = batches
        self.home = [(k, row) for k, batch in enumerate(batches) for row in range(_rows(batch))]
        self.counts = Counts(given=len(self.home))
        self.lengths, self.usable = [], []
        for batch in batches:
            mask = batch.get("attention_mask")
            some = [0] * _rows(batch) if mask is None else (mask != 0).sum(1).tolist()
            self.lengths += some
        for row, length in enumerate(self.lengths):
            if self._mask(row) is None or length >= 2:
                self.usable.append(row)
            else:
                (self.counts.single if length else self.counts.empty).append(row)

    def _mask(self, row: int) -> Tensor | None:
        return self.made[self.home[row][0]].get("attention_mask")

    def length(self, row: int) -> int:
        """How many tokens a text has, 0 without a mask."""
        return self.lengths[row]

    def counted_words(self, row: int) -> list[str]:
        """Ids have no words here."""
        return []

    def name(self, row: int) -> str:
        """A text by its place."""
        return f"text {row}"

    def batches(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        """The texts of some places, in that order as far as it keeps batches together."""
        of_batch: dict[int, list[int]] = {}
        for row in rows:
            of_batch.setdefault(self.home[row][0], []).append(row)
        for number, some in of_batch.items():
            places = [self.home[row][1] for row in some]
            batch = {key: value[places] for key, value in self.made[number].items()}
            mask = batch.get("attention_mask")
            real = None if mask is None else mask != 0
            yield Batch(batch, real, real, some)


def _rows(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def _joined(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def longest_text(model: PreTrainedModel, tokenizer: Any, max_length: int) -> int:
    """The tokens that a text may have: as asked for, or as the model and its tokenizer allow."""
    limits = [max_length, getattr(tokenizer, "model_max_length", max_length)]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts its positions from behind the padding's id.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - first)
            break
    else:
        limits.append(getattr(model.config, "max_position_embeddings", None) or max_length)
    return int(min(limits))


def prefix_tokens(model: PreTrainedModel) -> int:
    """Tokens of a vision model in front of its patches: class, distillation, registers."""
    names = ("cls_token", "distillation_token", "class_embedding", "register_tokens")
    found = 0
    for name, value in [*model.named_parameters()]:
        if name.rpartition(".")[2] in names:
            found += value.shape[1] if value.ndim == 3 else 1
    return found
