"""A vocabulary of whole words, learned from captions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

import regex

from filip_vl.tokenizers.base import START, CaptionTokenizer, Span, clean_caption
from tenfold.errors import UserError

UNKNOWN = "<unknown>"

_PATTERN = r"\w+|[^\w\s]"
_UNKNOWN_ID = 1


class WordTokenizer(CaptionTokenizer):
    """Lower-cased words and single punctuation marks, one id each.

    Ids are 0 padding, 1 unknown, the words, start, end.

    Args:
        words: in the order of their ids.

    Raises:
        UserError: a word twice, or none.

    Example:
        >>> tokenizer = WordTokenizer.train(["a red ring", "a blue ring"])
        >>> tokenizer.encode("A green ring", context_length=6)
        Encoded(ids=tensor([[6, 2, 1, 3, 7, 0]]), lengths=tensor([5]))
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._numbers = {word: n for n, word in enumerate(self.words, _UNKNOWN_ID + 1)}
        if not self.words:
            raise UserError("the vocabulary has no word", fix="train it on captions")
        if len(self._numbers) < len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise UserError(f"the vocabulary has the word {twice!r} twice")
        super().__init__(_PATTERN, len(self.words) + _UNKNOWN_ID + 3)

    @classmethod
    def train(cls, captions: Iterable[str], max_vocab: int = 8192) -> WordTokenizer:
        """Learn the words of captions.

        Args:
            captions: any order gives the same vocabulary.
            max_vocab: largest number of ids, padding, unknown, start and end included; the most
                frequent words are kept, and of equally frequent ones the first of the alphabet.

        Raises:
            UserError: no room for a word, or no word in any caption.
        """
        room = max_vocab - _UNKNOWN_ID - 3
        if room < 1:
            raise UserError(f"max_vocab must be 5 or more, got {max_vocab}")
        counts = Counter(
            word for caption in captions for word in regex.findall(_PATTERN, clean_caption(caption))
        )
        return cls(sorted(counts, key=lambda word: (-counts[word], word))[:room])

    @classmethod
    def from_json(cls, text: str) -> WordTokenizer:
        """The tokenizer that `to_json` described."""
        return cls(json.loads(text)["words"])

    def to_json(self) -> str:
        """All there is to know about the tokenizer: its words."""
        return json.dumps({"type": "word", "words": self.words})

    def decode(self, ids: Iterable[int]) -> str:
        """The words of one caption, a blank between two of them."""
        texts = []
        for token in ids:
            if token == self.end_id:
                break
            if token not in (self.pad_id, self.start_id):
                texts.append(self._text(token))
        return " ".join(texts)

    def _cut(self, word: str) -> tuple[int, ...]:
        return (self._numbers.get(word, _UNKNOWN_ID),)

    def _ends(self, word: str, ids: tuple[int, ...]) -> list[Span]:
        return [(0, len(word))]

    def _text(self, token: int) -> str:
        if token == self.start_id:
            return START
        return UNKNOWN if token == _UNKNOWN_ID else self.words[token - _UNKNOWN_ID - 1]
