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
    fix = "give the tokenizer that the network was trained with"
    if vocab_size == tokenizer.vocab_size + 1:
        fix = "it may have DeCLIP's mask symbol: --tokenizer-layout declip"
    raise UserError(
        f"the tokenizer has {tokenizer.vocab_size} ids, the network {vocab_size}", fix=fix
    )
