"""Token selection: keep the tokens of each image and text that find a match in the batch.

Yao et al., "FILIP", ICLR 2022, section 3.3 (training efficiency): before communication, a token's
score is its largest similarity with any token of the other side in the local batch, and the best
share of each row stays. This is an approximation that saves the square of the share.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tenfold.contrastive.masks import check_mask, check_tokens, pack

Base = Literal["padded", "valid"]

_TILE_IMAGES, _TILE_WORDS = 1024, 256
"""Patches and words of a tile of similarities, 1 MiB of float32."""
_GPU_TIMES = 16
"""How many times as large both are elsewhere than on a CPU: 256 MiB, and few launches."""

_ROUNDING = 1e-9
"""A share is a decimal that a float hardly hits: 0.29 x 100 must give 29."""


class SelectedTokens(NamedTuple):
    """What is left of a side's tokens, best first.

    Attributes:
        tokens: the chosen vectors, with gradient.
        mask: True where a token is valid: a row with fewer valid tokens keeps all of them.
        positions: where each was in its row.
    """

    tokens: Float[Tensor, "rows kept dim"]
    mask: Bool[Tensor, "rows kept"]
    positions: Int[Tensor, "rows kept"]


def kept_count(fraction: float, length: int) -> int:
    """How many of `length` tokens a share keeps: rounded down, but at least one.

    Raises:
        ValueError: a share that is not in 0..1 (0 excluded).
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in 0..1 (0 excluded), got {fraction}")
    return max(1, math.floor(fraction * length + _ROUNDING))


@torch.no_grad()
def token_scores(
    image_tokens: Float[Tensor, "images patches dim"],
    text_tokens: Float[Tensor, "texts words dim_t"],
    image_mask: Bool[Tensor, "images_m patches_m"] | None = None,
    text_mask: Bool[Tensor, "texts_m words_m"] | None = None,
) -> tuple[Float[Tensor, "images patches"], Float[Tensor, "texts words"]]:
    """Each token's largest similarity with any valid token of the other side, without gradient.

    Args:
        image_tokens: normalised patches.
        text_tokens: normalised words.
        image_mask: True where a patch is valid; all are if left out.
        text_mask: True where a word is valid.

    Returns:
        The scores of patches and of words, -1..1, and -inf at padding; float64 for float64 tokens,
        else float32.

    Raises:
        ValueError: tokens or masks that do not fit, or a row without a valid token.
    """
    check_tokens(image_tokens, text_tokens)
    image_mask = check_mask(image_mask, image_tokens, "image")
    text_mask = check_mask(text_mask, text_tokens, "text")
    dtype = torch.promote_types(image_tokens.dtype, text_tokens.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    sides = pack(image_tokens.to(dtype), image_mask), pack(text_tokens.to(dtype), text_mask)
    v_xd, t_pd = (side.tokens for side in sides)
    best_x, best_p = (side.new_full((len(side),), -torch.inf) for side in (v_xd, t_pd))
    times = 1 if v_xd.device.type == "cpu" else _GPU_TIMES
    rows, words = _TILE_IMAGES * times, _TILE_WORDS * times
    with torch.autocast(v_xd.device.type, enabled=False):
        for first in range(0, len(v_xd), rows):
            xs = slice(first, first + rows)
            for start in range(0, len(t_pd), words):
                ps = slice(start, start + words)
                s_xp = v_xd[xs] @ t_pd[ps].T
                best_x[xs] = best_x[xs].maximum(s_xp.amax(1))
                best_p[ps] = best_p[ps].maximum(s_xp.amax(0))
    shapes = image_tokens.shape[:2], text_tokens.shape[:2]
    image_score, text_score = (
        best.new_full((shape.numel(),), -torch.inf).index_copy_(0, side.positions, best).view(shape)
        for best, side, shape in zip((best_x, best_p), sides, shapes, strict=True)
    )
    return image_score, text_score


def select_tokens(
    tokens: Float[Tensor, "rows length dim"],
    scores: Float[Tensor, "rows_s length_s"],
    mask: Bool[Tensor, "rows_m length_m"] | None = None,
    *,
    fraction: float,
    base: Base = "padded",
    length: int | None = None,
) -> SelectedTokens:
    """Keep a share of each row's valid tokens, those of the largest scores, in descending order.

    The choice has no gradient, the chosen vectors have. On equal scores the first token comes
    first.

    Example:
        >>> image_scores, text_scores = token_scores(v, t, text_mask=mask)
        >>> v, v_mask, _ = select_tokens(v, image_scores, fraction=0.25)
        >>> t, t_mask, _ = select_tokens(t, text_scores, mask, fraction=0.25)
        >>> s_i2t, s_t2i = late_interaction(v, t, v_mask, t_mask)

    Args:
        tokens: of one side.
        scores: see `token_scores`.
        mask: True where a token is valid; all are if left out.
        fraction: the share to keep, 0..1 (0 excluded).
        base: of what it is a share: "padded", the paper's, of the row's length (rounded down, at
            least 1, the same for all rows); "valid" of the row's own valid tokens (rounded up).
        length: that length, where the batch was cropped; as many as there are tokens if left out.

    Raises:
        ValueError: a share or a base that does not exist, scores or mask that do not fit, a row
            without a valid token.
    """
    if base not in get_args(Base):
        raise ValueError(f"base must be one of {get_args(Base)}, got {base!r}")
    if scores.shape != tokens.shape[:2]:
        shapes = tuple(scores.shape), tuple(tokens.shape)
        raise ValueError(f"scores of shape {shapes[0]} do not fit tokens of shape {shapes[1]}")
    mask = check_mask(mask, tokens, "token")
    nominal = kept_count(fraction, tokens.shape[1] if length is None else length)
    valid = torch.full_like(scores[:, 0], tokens.shape[1]) if mask is None else mask.sum(1)
    wanted = torch.full_like(valid, nominal)
    if base == "valid":
        wanted = (valid.double() * fraction - _ROUNDING).ceil()
    wanted = wanted.minimum(valid).long()
    hidden = scores.detach() if mask is None else scores.detach().masked_fill(~mask, -torch.inf)
    kept = int(wanted.max()) if base == "valid" else min(nominal, tokens.shape[1])
    positions = hidden.argsort(dim=1, descending=True, stable=True)[:, :kept]
    chosen = tokens.take_along_dim(positions.unsqueeze(2), 1)
    places = torch.arange(kept, device=tokens.device)
    return SelectedTokens(chosen, places < wanted.unsqueeze(1), positions)
