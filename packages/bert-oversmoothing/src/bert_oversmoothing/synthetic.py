"""The embedded tasks: find the odd run, and name the class of every token.

In the first a question names a category, and the context has one run of words of that category
among words of the others: every token must keep what it is and learn one thing from afar. In the
second, meant for a frozen encoder, the class of a token is a function of its id alone.

Every item is a function of (seed, index) alone: all its random numbers come from one counter-based
Philox generator (Salmon et al., 2011) whose key they are, so neither the number of items nor their
order can change it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from numpy import ndarray
from torch import Tensor

from tenfold.errors import UserError

PAD, CLS, SEP = 0, 1, 2
LONGEST_RUN = 3
CHOICES = 4

VALIDATION_SEED, VALIDATION_ITEMS = 0, 384

PROBE_VOCABULARY, PROBE_TOKENS, PROBE_CLASSES = 64, 24, 8
PROBE_TRAIN, PROBE_TEST = 400, 100

_FIRST_QUESTION = 3
_CONTEXT = 3  # place of the first context word, after CLS, question and SEP
# Which of the unrelated streams of a key is read.
_TRAIN, _VALIDATION, _PROBE_TRAIN, _PROBE_TEST = range(4)

Split = Literal["train", "validation"]
Label = Literal["parity", "after"]


class Items(NamedTuple):
    """Odd-run items.

    Attributes:
        ids: CLS, question, SEP, context words, SEP.
        start: place of the run's first word in `ids`.
        end: place of its last word.
        category: of the run, which the question names.
    """

    ids: Int64[Tensor, "b n"]
    start: Int64[Tensor, " b"]
    end: Int64[Tensor, " b"]
    category: Int64[Tensor, " b"]


class ChoiceItems(NamedTuple):
    """Odd-run items as multiple choice: "which of four spans is the run?".

    Attributes:
        ids: of each choice, the item followed by the words of a span, SEP, and padding.
        mask: True where a token is no padding.
        label: which of the spans is the run.
    """

    ids: Int64[Tensor, "b 4 n"]
    mask: Bool[Tensor, "b 4 n"]
    label: Int64[Tensor, " b"]


class Probe(NamedTuple):
    """Sequences of the frozen probe and the class of every token."""

    ids: Int64[Tensor, "b 24"]
    label: Int64[Tensor, "b 24"]


class _Streams:
    """One stream of random numbers per key (seed, index), read side by side.

    The numbers are made from Philox's bits by this class, not by NumPy's distributions, which may
    change from one version to the next.
    """

    def __init__(self, domain: int, seed: int, indices: Sequence[int], length: int) -> None:
        counter = np.array([0, 0, 0, domain], dtype=np.uint64)
        bits = np.empty((len(indices), length), dtype=np.uint64)
        for row, index in enumerate(indices):
            key = np.array([seed % 2**64, index % 2**64], dtype=np.uint64)
            bits[row] = np.random.Philox(counter=counter, key=key).random_raw(length)
        self._uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
        self._used = 0

    def uniform(self, count: int) -> Float[ndarray, "b count"]:
        """The next numbers of every stream, in the open interval (0, 1)."""
        first, self._used = self._used, self._used + count
        return self._uniform[:, first : self._used]

    def below(self, stop: int | Int64[ndarray, " b"]) -> Int64[ndarray, " b"]:
        """The next integer of every stream, from 0 to `stop` - 1."""
        return (stop * self.uniform(1)[:, 0]).astype(np.int64)


@dataclass(frozen=True)
class OddRun:
    """The generator of "find the odd run".

    Attributes:
        categories: number of categories, C.
        words: number of words of each, W.
        context: number of context words, T.

    Raises:
        ValueError: less than 2 categories, no word, or less than 4 context words.

    Example:
        >>> OddRun().items(seed=0, indices=range(32)).ids.shape
        torch.Size([32, 16])
    """

    categories: int = 4
    words: int = 4
    context: int = 12

    def __post_init__(self) -> None:
        if self.categories < 2 or self.words < 1 or self.context < 4:
            raise ValueError(f"at least 2 categories, 1 word each and 4 context words, not {self}")

    @property
    def vocab_size(self) -> int:
        """Number of ids: padding, CLS, SEP, a question per category, the words."""
        return _FIRST_QUESTION + self.categories * (1 + self.words)

    @property
    def tokens(self) -> int:
        """Length of an item, n = T + 4."""
        return self.context + 4

    @property
    def choice_tokens(self) -> int:
        """Length of an item of multiple choice."""
        return self.tokens + LONGEST_RUN + 1

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The word of every id."""
        categories = range(self.categories)
        return (
            *("[PAD]", "[CLS]", "[SEP]"),
            *(f"c{category}" for category in categories),
            *(f"c{category}w{word}" for category in categories for word in range(self.words)),
        )

    def items(self, seed: int, indices: Sequence[int], split: Split = "train") -> Items:
        """The items of a seed with these indices.

        Run length (1 to 3) and category are uniform, the start is uniform among the places where
        the run fits, its words are random ones of its category and the others random ones of the
        other categories.

        Args:
            seed: any integer.
            indices: any integers; training items have no end.
            split: the two have no random number in common.
        """
        streams = self._streams(seed, indices, split)
        category = streams.below(self.categories)
        length = 1 + streams.below(LONGEST_RUN)
        offset = streams.below(self.context - length + 1)
        place = np.arange(self.context)
        inside = (place >= offset[:, None]) & (place < (offset + length)[:, None])
        draw = streams.uniform(self.context)
        own = category[:, None] * self.words + (self.words * draw).astype(np.int64)
        # one of the words of the other categories, whose numbers leave out this category's
        other = ((self.categories - 1) * self.words * draw).astype(np.int64)
        other += np.where(other >= category[:, None] * self.words, self.words, 0)
        first_word = _FIRST_QUESTION + self.categories
        ids = np.full((len(indices), self.tokens), SEP, dtype=np.int64)
        ids[:, 0], ids[:, 1] = CLS, _FIRST_QUESTION + category
        ids[:, _CONTEXT:-1] = first_word + np.where(inside, own, other)
        start = _CONTEXT + offset
        return Items(*map(torch.from_numpy, (ids, start, start + length - 1, category)))

    def validation(self) -> Items:
        """The 384 fixed items of the validation."""
        return self.items(VALIDATION_SEED, range(VALIDATION_ITEMS), "validation")

    def labels(self, items: Items, label: Label) -> Int64[Tensor, " b"]:
        """The label of each item in the classification form.

        Args:
            items: of this generator.
            label: "parity" is the run's length mod 2 (2 classes); "after" is the category of the
                word after the run, or C where the run ends the context (C + 1 classes).

        Raises:
            ValueError: a label that does not exist.
        """
        if label == "parity":
            return (items.end - items.start + 1) % 2
        if label != "after":
            raise ValueError(f"label must be 'parity' or 'after', got {label!r}")
        after = items.ids.gather(1, items.end[:, None] + 1)[:, 0]
        category = (after - _FIRST_QUESTION - self.categories).div(
            self.words, rounding_mode="floor"
        )
        return torch.where(after == SEP, self.categories, category)

    def choices(self, seed: int, indices: Sequence[int], split: Split = "train") -> ChoiceItems:
        """The items of a seed as four-way multiple choice.

        The three wrong spans are random ones of 1 to 3 words of the context; no two of the four
        have the same words. The place of the right one is uniform.
        """
        items = self.items(seed, indices, split)
        streams = self._streams(seed, indices, split)
        streams.uniform(3 + self.context)  # those of the items themselves
        label = streams.below(CHOICES)
        spans = self._spans
        order = np.argsort(streams.uniform(len(spans)), axis=1)
        ids = torch.full((len(indices), CHOICES, self.choice_tokens), PAD)
        for row, (item, start, end) in enumerate(
            zip(items.ids.tolist(), items.start.tolist(), items.end.tolist(), strict=True)
        ):
            run = item[start : end + 1]
            texts = _wrong_texts(run, (item[slice(*spans[index])] for index in order[row]))
            texts.insert(int(label[row]), run)
            for choice, text in enumerate(texts):
                whole = torch.tensor([*item, *text, SEP])
                ids[row, choice, : len(whole)] = whole
        return ChoiceItems(ids, ids != PAD, torch.from_numpy(label))

    def _streams(self, seed: int, indices: Sequence[int], split: Split) -> _Streams:
        domain = {"train": _TRAIN, "validation": _VALIDATION}[split]
        return _Streams(domain, seed, indices, 4 + self.context + len(self._spans))

    @property
    def _spans(self) -> list[tuple[int, int]]:
        """Every span of 1 to 3 context words: its first place, and the one behind its last."""
        last = _CONTEXT + self.context
        return [
            (start, start + length)
            for length in range(1, LONGEST_RUN + 1)
            for start in range(_CONTEXT, last - length + 1)
        ]


def _wrong_texts(run: list[int], candidates: Iterable[list[int]]) -> list[list[int]]:
    """The first three candidates that differ from the run and from each other."""
    texts = [run]
    for text in candidates:
        if text not in texts:
            texts.append(text)
        if len(texts) == CHOICES:
            break
    return texts[1:]


def answer_mask(ids: Int64[Tensor, "*b n"]) -> Bool[Tensor, "*b n"]:
    """True where an answer of an odd-run item can be, at the context words.

    Args:
        ids: of whole items, without padding.
    """
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[..., _CONTEXT:-1] = True
    return mask


def mask_logits(
    logits: Float[Tensor, "*b n ends"], ids: Int64[Tensor, "*b n"]
) -> Float[Tensor, "*b n ends"]:
    """Answer logits of odd-run items with -inf where no answer can be."""
    return logits.masked_fill(~answer_mask(ids)[..., None], -torch.inf)


def span_loss(logits: Float[Tensor, "b n 2"], items: Items) -> Float[Tensor, ""]:
    """Mean of the two cross-entropies of start and end, over the context words; chance is ln T.

    Args:
        logits: of start and end at every token.
        items: what is to be found.
    """
    masked = mask_logits(logits, items.ids)
    start, end = masked.unbind(-1)
    return (F.cross_entropy(start, items.start) + F.cross_entropy(end, items.end)) / 2


def exact_match(logits: Float[Tensor, "b n 2"], items: Items) -> Bool[Tensor, " b"]:
    """Whether both the largest start and the largest end logit are at the answer's places."""
    start, end = mask_logits(logits, items.ids).argmax(1).unbind(-1)
    return (start == items.start) & (end == items.end)


def write_squad(path: Path, task: OddRun, items: Items, ids: Iterable[str]) -> None:
    """Writes items in the format of SQuAD 1.1, a paragraph each.

    Args:
        path: of the JSON file; its folder exists.
        task: whose items they are.
        items: with words like "c0w3" and questions like "which c2".
        ids: a name for each item.
    """
    words = task.vocabulary
    paragraphs = []
    for name, tokens, start, end in zip(
        ids, items.ids.tolist(), items.start.tolist(), items.end.tolist(), strict=True
    ):
        context = [words[token] for token in tokens[_CONTEXT:-1]]
        before = context[: start - _CONTEXT]
        answer = {
            "text": " ".join(context[start - _CONTEXT : end - _CONTEXT + 1]),
            "answer_start": sum(len(word) + 1 for word in before),
        }
        question = {"id": name, "question": f"which {words[tokens[1]]}", "answers": [answer]}
        paragraphs.append({"context": " ".join(context), "qas": [question]})
    content = {"version": "1.1", "data": [{"title": "odd run", "paragraphs": paragraphs}]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_squad(path: Path, task: OddRun) -> Items:
    """Reads items back that `write_squad` wrote.

    Raises:
        UserError: no such file, no SQuAD 1.1, or an item that is none of `task`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pairs = [
            (paragraph["context"], question)
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
        rows = [_read_item(context, question, task) for context, question in pairs]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        fix = "write it with `bert-oversmoothing data` and the same sizes"
        raise UserError(f"{path} holds no odd-run items: {error}", fix=fix) from error
    if not rows:
        raise UserError(f"{path} holds no item")
    tokens, start, end, category = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Items(tokens, start, end, category)


def _read_item(
    context: str, question: dict[str, Any], task: OddRun
) -> tuple[list[int], int, int, int]:
    """Ids, start, end and category of one question."""
    ids = {word: index for index, word in enumerate(task.vocabulary)}
    words = context.split(" ")
    category = int(question["question"].removeprefix("which c"))
    answer = question["answers"][0]
    first = context[: answer["answer_start"]].count(" ")
    last = first + answer["text"].count(" ")
    if len(words) != task.context or " ".join(words[first : last + 1]) != answer["text"]:
        raise ValueError(f"item {question['id']} has another length, or no answer in its context")
    tokens = [CLS, ids[f"c{category}"], SEP, *(ids[word] for word in words), SEP]
    return tokens, _CONTEXT + first, _CONTEXT + last, category


def probe_task(seed: int) -> tuple[Probe, Probe]:
    """Training and test sequences of the frozen probe: the class of a token is its id mod 8.

    Args:
        seed: any integer.

    Returns:
        400 and 100 sequences of 24 tokens, ids uniform below 64.
    """
    train = _probe(_PROBE_TRAIN, seed, PROBE_TRAIN)
    return train, _probe(_PROBE_TEST, seed, PROBE_TEST)


def _probe(domain: int, seed: int, count: int) -> Probe:
    uniform = _Streams(domain, seed, range(count), PROBE_TOKENS).uniform(PROBE_TOKENS)
    ids = torch.from_numpy((PROBE_VOCABULARY * uniform).astype(np.int64))
    return Probe(ids, ids % PROBE_CLASSES)
