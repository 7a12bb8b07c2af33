"""Who smooths: ln c = ln d_M(out) - ln d_M(in) of a block, split exactly over its parts."""

import torch
from jaxtyping import Float
from torch import Tensor

TERMS = {
    "post": ("attention", "norm1", "feed_forward", "norm2"),
    "pre": ("attention", "feed_forward"),
    "pre_last": ("attention", "feed_forward", "final_norm"),
}
"""The parts of a block in the order in which they act; "pre_last" is the last pre-norm block."""


def log_decomposition(
    distance_sb: Float[Tensor, "states texts"],
) -> Float[Tensor, "states-1 texts"]:
    """What each part of a block adds to ln c, in nats; negative where it smooths.

    The terms of a text sum to its ln c exactly, whatever the bound says.

    Args:
        distance_sb: d_M of the block's input and then of its state after each part: post-norm H,
            Attn, LN1, FF, LN2 (5 states), pre-norm H, Z, H' (3) and the final norm after the last
            block (4).

    Returns:
        One row per name in `TERMS`, float64; all NaN for a text that has no log because one of its
        distances is 0 (or is NaN itself), so that it can be left out and counted.
    """
    logs_sb = distance_sb.detach().to("cpu", torch.float64).log()
    logs_sb = logs_sb.masked_fill(~logs_sb.isfinite().all(0), torch.nan)
    return logs_sb.diff(dim=0)
