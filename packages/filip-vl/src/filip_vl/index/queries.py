"""What an index is asked: a text or a picture, as tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from filip_vl.alignment import caption_words
from filip_vl.data import eval_transform
from filip_vl.model import FilipModel, TokenBatch
from tenfold.errors import UserError


@dataclass(frozen=True)
class QueryWord:
    """A word of a query.

    Attributes:
        text: as people write it.
        rows: which of the query's tokens are its.
        spoken: False for the start and the end of a text.
    """

    text: str
    rows: tuple[int, ...]
    spoken: bool = True


@dataclass(frozen=True)
class Query:
    """What to look for.

    Attributes:
        tokens: normalised, those that count.
        words: of a text; of a picture none.
        grid: of a picture, rows and columns of its patches, to which the last tokens belong.
    """

    tokens: Float[Tensor, "words dim"]
    words: tuple[QueryWord, ...] = ()
    grid: tuple[int, int] | None = None


@torch.inference_mode()
def text_query(model: FilipModel, text: str) -> Query:
    """A text as a query.

    Args:
        model: with a tokenizer, in eval mode.
        text: what the pictures should show.

    Raises:
        UserError: no word, or a model without a tokenizer.
    """
    if model.tokenizer is None:
        what = "the checkpoint has no tokenizer, so that it cannot read a text"
        raise UserError(what, fix="search by a picture, or convert it with its tokenizer")
    if not text.strip():
        raise UserError("no words to look for")
    encoded = model.encode_text([text])
    tokens = _counted(encoded)
    if model.config.pooled:
        return Query(tokens, (QueryWord(text.strip(), (0,)),))
    return Query(tokens, _words(model, text, encoded))


@torch.inference_mode()
def image_query(model: FilipModel, image: Image.Image) -> Query:
    """A picture as a query: what is found has a good match for each of its patches.

    Args:
        model: in eval mode.
        image: RGB.
    """
    like = model.logit_scale
    pixels = eval_transform(model.config.image_size)(image)
    encoded = model.encode_image(pixels[None].to(like.device, like.dtype))
    return Query(_counted(encoded), grid=encoded.grid)


def _counted(encoded: TokenBatch) -> Float[Tensor, "words dim"]:
    return encoded.normalized()[0][encoded.mask[0]].float().cpu()


def _words(model: FilipModel, text: str, encoded: TokenBatch) -> tuple[QueryWord, ...]:
    """The words with their rows, and what else counts, in the order of the text."""
    assert model.tokenizer is not None
    assert encoded.strings is not None
    mask: Bool[Tensor, " length"] = encoded.mask[0].cpu()
    row_of = {int(position): row for row, position in enumerate(mask.nonzero().flatten())}
    spoken = caption_words(model.tokenizer, text, model.config.context_length)
    words = [
        QueryWord(word.text, rows)
        for word in spoken
        if (rows := tuple(row_of[n] for n in word.positions if n in row_of))
    ]
    taken = {row for word in words for row in word.rows}
    for position, row in row_of.items():
        if row not in taken:
            words.append(QueryWord(encoded.strings[0][position], (row,), spoken=False))
    return tuple(sorted(words, key=lambda word: word.rows))
