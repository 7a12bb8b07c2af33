"""What every tokenizer offers, and what the two of this package share."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import ftfy
import numpy as np
import regex
import torch
from jaxtyping import Int64
from torch import Tensor

START, END = "<start_of_text>", "<end_of_text>"

Span = tuple[int, int]
"""First character and the one behind the last."""

_CACHED_WORDS = 1 << 18  # web captions never run out of new words


class Encoded(NamedTuple):
    """Captions as ids, padded with 0, and how many ids count: start to first end, inclusive.

    Id 0 may also be a symbol of a caption, so that nothing but the length tells padding from text.
    """

    ids: Int64[Tensor, "batch length"]
    lengths: Int64[Tensor, " batch"]


@runtime_checkable
class Tokenizer(Protocol):
    """Turns captions into ids and says what stands at every position.

    A caption is start, pieces of its words, end. The end is the largest id.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    @property
    def start_id(self) -> int:
        """First id of every caption."""
        ...

    @property
    def end_id(self) -> int:
        """Last id of every caption."""
        ...

    @property
    def pad_id(self) -> int:
        """Id behind the end: 0."""
        ...

    @property
    def truncated(self) -> int:
        """How many of the captions encoded so far were too long."""
        ...

    def clean(self, text: str) -> str:
        """The text that is cut into tokens."""
        ...

    def encode(self, texts: str | Iterable[str], context_length: int = 77) -> Encoded:
        """Ids of captions."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text, up to white space, of the ids of one caption."""
        ...

    def tokens(self, text: str, context_length: int = 77) -> list[str]:
        """What stands at every position of `encode`, start and end included."""
        ...

    def spans(self, text: str, context_length: int = 77) -> list[Span | None]:
        """Characters of `clean(text)` at every position; None for start and end."""
        ...

    def to_json(self) -> str:
        """All there is to know about the tokenizer."""
        ...


class CaptionTokenizer(ABC):
    """A tokenizer that cuts every word of a caption by itself.

    Args:
        pattern: what a word is, in the language of `regex`, upper or lower case.
        vocab_size: number of ids, of which the last two are start and end.
    """

    pad_id = 0

    def __init__(self, pattern: str, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.start_id, self.end_id = vocab_size - 2, vocab_size - 1
        self.truncated = 0
        self._pattern = regex.compile(pattern, regex.IGNORECASE)
        self._known: dict[str, tuple[int, ...]] = {}

    @abstractmethod
    def _cut(self, word: str) -> tuple[int, ...]:
        """Ids of a word."""

    @abstractmethod
    def _ends(self, word: str, ids: tuple[int, ...]) -> Sequence[Span]:
        """Characters of the word that belong to each of its ids."""

    @abstractmethod
    def _text(self, token: int) -> str:
        """What an id stands for, to be read by people."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text, up to white space, of the ids of one caption."""

    @abstractmethod
    def to_json(self) -> str:
        """All there is to know about the tokenizer."""

    def clean(self, text: str) -> str:
        """The text that is cut into tokens: see `clean_caption`."""
        return clean_caption(text)

    def encode(self, texts: str | Iterable[str], context_length: int = 77) -> Encoded:
        """Ids of captions.

        A caption that is too long is cut and its last id is the end.

        Args:
            texts: captions; a string is one caption.
            context_length: number of ids in a row, at least 2.

        Returns:
            Ids, padded with 0 to `context_length`, and lengths from 2 to `context_length`.

        Raises:
            ValueError: no room for start and end.
        """
        _check_length(context_length)
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = np.full((len(texts), context_length), self.pad_id, dtype=np.int64)
        lengths = np.empty(len(texts), dtype=np.int64)
        for row, text in enumerate(texts):
            ids = self._caption(text)
            length = ids.index(self.end_id) + 1
            self.truncated += length > context_length
            if len(ids) > context_length:
                ids[context_length - 1 :] = [self.end_id]
            rows[row, : len(ids)] = ids
            lengths[row] = min(length, context_length)
        return Encoded(torch.from_numpy(rows), torch.from_numpy(lengths))

    def tokens(self, text: str, context_length: int = 77) -> list[str]:
        """What stands at every position of `encode`, start and end included.

        Raises:
            ValueError: no room for start and end.
        """
        _check_length(context_length)
        pieces = [self._text(token) for token, _ in self._pieces(self.clean(text))]
        return [START, *pieces[: context_length - 2], END]

    def spans(self, text: str, context_length: int = 77) -> list[Span | None]:
        """Characters of `clean(text)` at every position of `encode`; None for start and end.

        A character that several ids share, byte by byte, belongs to each of them.

        Raises:
            ValueError: no room for start and end.
        """
        _check_length(context_length)
        pieces = [span for _, span in self._pieces(self.clean(text))]
        return [None, *pieces[: context_length - 2], None]

    def _caption(self, text: str) -> list[int]:
        ids = [self.start_id]
        for word in self._pattern.findall(self.clean(text)):
            ids += self._known.get(word) or self._ids(word)
        return [*ids, self.end_id]

    def _ids(self, word: str) -> tuple[int, ...]:
        ids = self._known.get(word)
        if ids is None:
            ids = self._cut(word)
            if len(self._known) < _CACHED_WORDS:
                self._known[word] = ids
        return ids

    def _pieces(self, cleaned: str) -> Iterator[tuple[int, Span | None]]:
        """Id and place of whatever stands between the start and the first end."""
        for match in self._pattern.finditer(cleaned):
            word, first = match.group(), match.start()
            ids = self._ids(word)
            if ids == (self.end_id,):
                return
            if ids == (self.start_id,):
                yield self.start_id, None
                continue
            for token, (begin, end) in zip(ids, self._ends(word, ids), strict=True):
                yield token, (first + begin, first + end)


def clean_caption(text: str) -> str:
    """CLIP's cleaning: mend the encoding, resolve entities, single blanks, lower case.

    Entities are resolved twice, since captions of the web are often escaped twice.
    """
    # ftfy and html change nothing here, and take most of the time
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _check_length(context_length: int) -> None:
    if context_length < 2:
        raise ValueError(
            f"context_length must be 2 or more for start and end, not {context_length}"
        )
