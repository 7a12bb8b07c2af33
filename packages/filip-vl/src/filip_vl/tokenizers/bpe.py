"""CLIP's byte-pair encoding."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

from filip_vl.tokenizers.base import END, START, CaptionTokenizer, Span
from filip_vl.tokenizers.files import read_merges
from tenfold.errors import UserError

Layout = Literal["clip", "declip"]
"""Ids behind the merges: start and end, or a mask symbol before them."""

_OPENAI_START, _OPENAI_END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_PATTERN = (
    r"<start_of_text>|<end_of_text>|<\|startoftext\|>|<\|endoftext\|>"
    r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)


def _byte_letters() -> dict[int, str]:
    """A printable letter for every byte, in the order of the vocabulary."""
    themselves = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(themselves))
    letters = {byte: chr(byte) for byte in themselves}
    return letters | {byte: chr(256 + n) for n, byte in enumerate(others)}


class BPETokenizer(CaptionTokenizer):
    """CLIP's tokenizer: lower-cased words as byte pairs.

    The vocabulary is the 256 byte letters, the same at the end of a word, a symbol per merge, start
    and end: 49,408 ids with the released merges. Specials typed into a caption become their id, in
    the spelling of open_clip or of OpenAI, so that an end ends the caption.

    Args:
        merges: "first second" per merge, or where they are: CLIP's released file (plain or
            gzipped), a folder or `tokenizer.json` of Hugging Face, or that of a converted
            checkpoint.
        layout: "declip" has a mask symbol before the start (49406 mask, 49407 start, 49408 end).

    Raises:
        UserError: no merges there, or no merges of this kind.

    Example:
        >>> tokenizer = BPETokenizer(["t h", "th e</w>"])
        >>> tokenizer.tokens("the tin")
        ['<start_of_text>', 'the', 't', 'i', 'n', '<end_of_text>']
        >>> tokenizer.encode("the tin", context_length=8)
        Encoded(ids=tensor([[514, 513,  83,  72, 333, 515,   0,   0]]), lengths=tensor([6]))
    """

    def __init__(
        self, merges: str | PathLike[str] | Sequence[str], *, layout: str = "clip"
    ) -> None:
        if layout not in get_args(Layout):
            known = ", ".join(get_args(Layout))
            raise UserError(f"the layout must be one of {known}, got {layout!r}")
        vocabulary = None
        if isinstance(merges, str | PathLike):
            merges, vocabulary = read_merges(Path(merges))
        self.layout = layout
        self.merges = tuple(merges)
        symbols = _symbols(self.merges)
        if vocabulary is not None:
            _check_order(symbols, vocabulary)
        super().__init__(_PATTERN, len(symbols) + (3 if layout == "declip" else 2))
        letters = _byte_letters()
        self._ids_of_bytes = {byte: symbols[letter] for byte, letter in letters.items()}
        self._ids_of_last_bytes = {byte: symbols[a + _WORD_END] for byte, a in letters.items()}
        self._joined = _joined(self.merges, symbols)
        self._bytes = _bytes_of(symbols, letters)
        self._ends_word = [symbol.endswith(_WORD_END) for symbol in symbols]
        for name in (START, _OPENAI_START):
            self._known[name] = (self.start_id,)
        for name in (END, _OPENAI_END):
            self._known[name] = (self.end_id,)

    @classmethod
    def from_json(cls, text: str) -> BPETokenizer:
        """The tokenizer that `to_json` described."""
        content = json.loads(text)
        return cls(content["merges"], layout=content["layout"])

    def to_json(self) -> str:
        """All there is to know about the tokenizer: its merges and its layout."""
        return json.dumps({"type": "bpe", "layout": self.layout, "merges": self.merges})

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text of the ids of one caption, a blank behind every word and none in it."""
        text = bytearray()
        for token in ids:
            if token == self.end_id:
                break
            if token < len(self._bytes):
                text += self._bytes[token] + b" " * self._ends_word[token]
        return text.decode("utf-8", errors="replace").strip()

    def _cut(self, word: str) -> tuple[int, ...]:
        content = word.encode("utf-8")
        ids = [self._ids_of_bytes[byte] for byte in content[:-1]]
        ids.append(self._ids_of_last_bytes[content[-1]])
        while len(ids) > 1:
            # the lowest rank wins, and the pairs of one rank are all the same
            rank, joined, pair = min(
                (*self._joined.get(pair, _NEVER), pair) for pair in set(pairwise(ids))
            )
            if rank == _NEVER[0]:
                break
            ids = _join(ids, pair, joined)
        return tuple(ids)

    def _ends(self, word: str, ids: tuple[int, ...]) -> list[Span]:
        character = [n for n, letter in enumerate(word) for _ in letter.encode("utf-8")]
        spans, first = [], 0
        for token in ids:
            behind = first + len(self._bytes[token])
            spans.append((character[first], character[behind - 1] + 1))
            first = behind
        return spans

    def _text(self, token: int) -> str:
        if token == self.start_id:
            return START
        return self._bytes[token].decode("utf-8", errors="backslashreplace")


_NEVER = (2**62, -1)  # rank and id of a pair that no merge joins


def _symbols(merges: Sequence[str]) -> dict[str, int]:
    """Ids of the symbols, without start and end.

    Raises:
        UserError: something that is no merge.
    """
    letters = [*_byte_letters().values()]
    symbols = {symbol: n for n, symbol in enumerate([*letters, *(a + _WORD_END for a in letters)])}
    for n, merge in enumerate(merges, 1):
        parts = merge.split()
        if len(parts) != 2 or not all(part in symbols for part in parts):
            raise UserError(
                f"merge {n} does not join two symbols that are there before it: {merge!r}",
                where="merges",
            )
        if "".join(parts) in symbols:
            raise UserError(f"merge {n} makes a symbol once more: {merge!r}", where="merges")
        symbols["".join(parts)] = len(symbols)
    return symbols


def _check_order(symbols: dict[str, int], vocabulary: dict[str, int]) -> None:
    """Refuse a vocabulary whose ids are in another order than CLIP's."""
    for symbol, number in symbols.items():
        if vocabulary.get(symbol) != number:
            raise UserError(
                f"not CLIP's vocabulary: {symbol!r} has the id {vocabulary.get(symbol)}, not "
                f"{number}",
                fix="give the merges without the vocabulary of another order",
            )


def _joined(
    merges: Sequence[str], symbols: dict[str, int]
) -> dict[tuple[int, int], tuple[int, int]]:
    """Rank and id of what every pair of ids is joined to."""
    joined = {}
    for rank, merge in enumerate(merges):
        first, second = merge.split()
        joined[symbols[first], symbols[second]] = rank, symbols[first + second]
    return joined


def _join(ids: Sequence[int], pair: tuple[int, int], joined: int) -> list[int]:
    """Join a pair wherever it stands, from left to right."""
    result, n = [], 0
    while n < len(ids):
        found = n + 1 < len(ids) and (ids[n], ids[n + 1]) == pair
        result.append(joined if found else ids[n])
        n += 2 if found else 1
    return result


def _bytes_of(symbols: Iterable[str], letters: dict[int, str]) -> list[bytes]:
    bytes_of_letters = {letter: byte for byte, letter in letters.items()}
    return [
        bytes(bytes_of_letters[letter] for letter in symbol.removesuffix(_WORD_END))
        for symbol in symbols
    ]
