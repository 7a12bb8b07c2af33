"""Which tokens of a caption a word, a phrase or a label stands on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from filip_vl.tokenizers import Tokenizer
from tenfold.errors import UserError

_WORD = re.compile(r"\w+(?:[-']\w+)*|[^\w\s]+")


class Word(NamedTuple):
    """A word, or a run of punctuation, and the positions of its tokens."""

    text: str
    positions: tuple[int, ...]


def positions_within(
    spans: Sequence[tuple[int, int] | None], start: int, stop: int
) -> tuple[int, ...]:
    """Positions of the tokens that have a character between two places of the text.

    Args:
        spans: of `Tokenizer.spans`.
        start: the first character.
        stop: the one behind the last.
    """
    return tuple(
        n for n, span in enumerate(spans) if span is not None and span[0] < stop and span[1] > start
    )


def caption_words(tokenizer: Tokenizer, text: str, context_length: int = 77) -> list[Word]:
    """The words of a caption, of which one may have several tokens; not its start and end.

    Args:
        tokenizer: of the caption.
        text: the caption, as people write it.
        context_length: words that are cut off are left out.
    """
    spans = tokenizer.spans(text, context_length)
    words, taken = [], set()
    for match in _WORD.finditer(tokenizer.clean(text)):
        positions = [n for n in positions_within(spans, *match.span()) if n not in taken]
        if positions:
            words.append(Word(match.group(), tuple(positions)))
            taken.update(positions)
    return words


def label_positions(
    tokenizer: Tokenizer, text: str, label: str, context_length: int = 77
) -> tuple[int, ...]:
    """Positions of a label's tokens in a caption, wherever it occurs as whole words.

    Args:
        tokenizer: of the caption.
        text: the caption, such as "a photo of a hot dog."
        label: one or more of its words, such as "hot dog".
        context_length: what is cut off is not found.

    Raises:
        UserError: the label is not in the caption; the caption's tokens are shown.
    """
    cleaned, wanted = tokenizer.clean(text), tokenizer.clean(label)
    spans = tokenizer.spans(text, context_length)
    found: set[int] = set()
    if wanted:
        for match in re.finditer(rf"(?<!\w){re.escape(wanted)}(?!\w)", cleaned):
            found.update(positions_within(spans, *match.span()))
    if not found:
        shown = " ".join(map(repr, tokenizer.tokens(text, context_length)))
        raise UserError(
            f"the label {label!r} is not in the text, whose tokens are {shown}",
            fix="give a word of the text, or a text with the label",
        )
    return tuple(sorted(found))
