"""Which tokens count: checks of the masks, and tokens packed without their padding.

Legend of the shape names: a side has `rows` (images, or texts) of `length` tokens of width `dim`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class PackedTokens:
    """The valid tokens of all rows behind each other, without padding.

    Attributes:
        tokens: row after row, in the order of `rows`.
        offsets: where each packed row starts, and behind the last one where it ends.
        rows: the row of the padded tokens that each packed row came from.
        positions: where each token was in the padded tokens, counted through rows and positions.
    """

    tokens: Float[Tensor, "total dim"]
    offsets: Int[Tensor, " bounds"]
    rows: Int[Tensor, " rows"]
    positions: Int[Tensor, " total"]

    def pad(
        self, packed: Float[Tensor, "total dim"], length: int
    ) -> Float[Tensor, "rows length dim"]:
        """Put one vector for each packed token where the token was; zeros at the padding."""
        padded = packed.new_zeros(len(self.rows) * length, packed.shape[1])
        return padded.index_copy_(0, self.positions, packed).unflatten(0, (-1, length))


def pack(
    tokens: Float[Tensor, "rows length dim"],
    mask: Bool[Tensor, "rows length"] | None = None,
    rows: Int[Tensor, " rows"] | None = None,
) -> PackedTokens:
    """Take the valid tokens out of padded ones; the mask need not be a prefix.

    Args:
        tokens: padded tokens.
        mask: True where a token is valid; all are if left out.
        rows: the order in which rows are packed, such as by length; as they are if left out.
    """
    count, length, dim = tokens.shape
    rows = torch.arange(count, device=tokens.device) if rows is None else rows
    positions = rows.unsqueeze(1) * length + torch.arange(length, device=tokens.device)
    sizes = torch.full_like(rows, length)
    if mask is not None:
        valid = mask.index_select(0, rows)
        positions, sizes = positions[valid], valid.sum(1)
    positions = positions.flatten()
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int()
    packed = tokens.reshape(-1, dim).index_select(0, positions)
    return PackedTokens(packed, offsets, rows, positions)


def check_tokens(image_tokens: Tensor, text_tokens: Tensor) -> None:
    """Refuse tokens that cannot be compared.

    Raises:
        ValueError: not (rows, tokens, width), no token at all, widths or devices that differ.
    """
    sides = {"image": image_tokens, "text": text_tokens}
    for side, tokens in sides.items():
        if tokens.ndim != 3 or tokens.shape[1] == 0:
            raise ValueError(
                f"{side} tokens have shape {tuple(tokens.shape)}: they must be (rows, tokens, "
                "width) with at least one token a row"
            )
    if image_tokens.shape[2] != text_tokens.shape[2]:
        widths = image_tokens.shape[2], text_tokens.shape[2]
        raise ValueError(f"image tokens have width {widths[0]}, text tokens {widths[1]}")
    if image_tokens.device != text_tokens.device:
        devices = image_tokens.device, text_tokens.device
        raise ValueError(f"image tokens are on {devices[0]}, text tokens on {devices[1]}")


def check_mask(mask: Tensor | None, tokens: Tensor, side: str) -> Tensor | None:
    """Refuse a mask that does not fit; one that hides nothing is as good as none.

    Args:
        mask: True where a token is valid.
        tokens: what it masks, (rows, length, dim).
        side: "image" or "text", for the message.

    Returns:
        The mask, or None where all tokens are valid.

    Raises:
        ValueError: another shape or type, or rows without a valid token, which are named: the mean
            over no token is no number.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"the {side} mask is {mask.dtype} of shape {tuple(mask.shape)}: it must be torch.bool "
            f"of shape {tuple(tokens.shape[:2])}, True where a token is valid"
        )
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        named = ", ".join(map(str, empty[:5])) + more
        raise ValueError(f"no valid token in {side} row {named}")
    return None if mask.all() else mask


def place_type(places: int) -> torch.dtype:
    """The smallest type that holds positions below a number of places."""
    if places <= 1 << 8:
        return torch.uint8
    return torch.int16 if places <= 1 << 15 else torch.int32
