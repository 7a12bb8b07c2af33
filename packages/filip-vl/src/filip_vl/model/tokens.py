"""What the towers hand on: tokens of a batch, with their mask and what they stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tenfold.errors import UserError


class TokenBatch(NamedTuple):
    """Token vectors of a batch of images or captions.

    Attributes:
        tokens: not normalised.
        mask: True where there is a token that counts.
        grid: of images, rows and columns of the patches; the last rows x columns tokens are the
            patches row by row, and with `include_cls` the class token is before them. None where
            the tokens are no patches.
        strings: of captions given as text, what stands at every position that has a token.
    """

    tokens: Float[Tensor, "batch tokens embed"]
    mask: Bool[Tensor, "batch tokens"]
    grid: tuple[int, int] | None = None
    strings: list[list[str]] | None = None

    def normalized(self) -> Float[Tensor, "batch tokens embed"]:
        """The tokens at length 1, in float32 or better; a token of zeros stays one."""
        dtype = torch.promote_types(self.tokens.dtype, torch.float32)
        return F.normalize(self.tokens.to(dtype), dim=-1, eps=1e-12)


class FilipOutput(NamedTuple):
    """What `FilipModel` makes of a batch of pairs.

    Attributes:
        image: tokens of the images.
        text: tokens of the captions.
        logit_scale: logarithm of 1 / temperature, within its bounds: what `FilipLoss` takes.
    """

    image: TokenBatch
    text: TokenBatch
    logit_scale: Float[Tensor, ""]


class NotFiniteError(UserError, FloatingPointError):
    """Tokens that are not finite: of weights that diverged, or of broken pixels."""


def check_finite(batch: TokenBatch, tower: str) -> None:
    """Refuse tokens that are not finite.

    Args:
        batch: tokens that a tower made.
        tower: "image" or "text", for the message.

    Raises:
        NotFiniteError: a token that counts is not finite; the first such row is named.
    """
    bad = ~batch.tokens.isfinite().all(-1) & batch.mask
    rows = bad.any(-1)
    if rows.any():
        row = int(rows.byte().argmax())
        raise NotFiniteError(
            f"{tower} tower: {int(bad[row].sum())} of the tokens in row {row} are not finite "
            f"({int(rows.sum())} of {len(rows)} rows have such tokens)"
        )


def first_end(ids: Int64[Tensor, "batch length"], end_id: int) -> Int64[Tensor, " batch"]:
    """Position of each caption's first end token; the last one where there is none.

    Args:
        ids: captions.
        end_id: the end's id.
    """
    ends = ids == end_id
    return torch.where(ends.any(1), ends.int().argmax(1), ids.shape[1] - 1)


def check_ends(ids: Int64[Tensor, "batch length"], end_id: int) -> None:
    """Refuse captions without an end.

    Raises:
        ValueError: the rows that have none are named.
    """
    missing = ~(ids == end_id).any(1)
    if missing.any():
        rows = missing.nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise ValueError(f"captions without an end token (id {end_id}): rows {shown}")


def crop_to_longest(
    ids: Int64[Tensor, "batch length"], end_id: int, multiple: int = 8
) -> Int64[Tensor, "batch fewer"]:
    """Captions without the columns that are padding in all of them.

    Attention looks back only and padding comes last, so the tokens that count stay what they are,
    exactly, and the text tower has less to do.

    Args:
        ids: captions, each with an end.
        end_id: the end's id.
        multiple: the length is rounded up to one, for fewer different shapes.

    Raises:
        ValueError: a caption without an end.
    """
    check_ends(ids, end_id)
    longest = int(first_end(ids, end_id).max()) + 1
    return ids[:, : -(-longest // multiple) * multiple]
