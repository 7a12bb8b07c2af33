"""Captions as ids: CLIP's byte-pair encoding, and whole words."""

from __future__ import annotations

import json

from filip_vl.tokenizers.base import Encoded, Tokenizer, clean_caption
from filip_vl.tokenizers.bpe import BPETokenizer
from filip_vl.tokenizers.word import WordTokenizer
from tenfold.errors import UserError

__all__ = [
    "BPETokenizer",
    "Encoded",
    "Tokenizer",
    "WordTokenizer",
    "check_vocabulary",
    "clean_caption",
    "from_json",
    "other_layout",
]


def from_json(text: str) -> BPETokenizer | WordTokenizer:
    """The tokenizer that `to_json` described, as a checkpoint keeps it.

    Raises:
        UserError: no description of a tokenizer of this package.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where="tokenizer") from None
    match content:
        case {"type": "bpe", "merges": [*_], "layout": str(_)}:
            return BPETokenizer.from_json(text)
        case {"type": "word", "words": [*_]}:
            return WordTokenizer.from_json(text)
    raise UserError("not a tokenizer of filip-vl", where="tokenizer")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer whose ids are not those of the network.

    Args:
        tokenizer: of the captions.
        vocab_size: rows of the network's token embedding.

    Raises:
        UserError: the sizes differ.
    """
    if tokenizer.vocab_size == vocab_size:
        return
    layout = other_layout(tokenizer, vocab_size)
    fix = "give the tokenizer that the network was trained with"
    raise UserError(
        f"the tokenizer has {tokenizer.vocab_size} ids, the network {vocab_size}",
        fix=fix if layout is None else f"{layout[1]}: --tokenizer-layout {layout[0]}",
    )


def other_layout(tokenizer: Tokenizer, vocab_size: int) -> tuple[str, str] | None:
    """The layout of CLIP's ids that may be meant where one id is missing or too many, and why.

    Args:
        tokenizer: of the captions.
        vocab_size: rows of the network's token embedding.
    """
    more = 0 if isinstance(tokenizer, WordTokenizer) else vocab_size - tokenizer.vocab_size
    if more == 1:
        return "declip", "the network may have DeCLIP's mask symbol"
    return ("clip", "the network may lack DeCLIP's mask symbol") if more == -1 else None
