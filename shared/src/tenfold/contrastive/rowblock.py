r"""InfoNCE over several ranks from one block of scores each, exactly.

Every rank holds its own images' rows against the texts of all ranks. The softmax over texts (rows)
is complete on a rank; the one over images (columns) is not: of it, two numbers a text travel, the
largest logit and the sum of exponentials. Images never do (FILIP, section 3.6 of the paper gathers
both sides and computes two rectangular products instead of one).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Num
from torch import Tensor

from tenfold.distributed import own_rows, ranks


def rowblock_info_nce(
    s_i2t: Float[Tensor, "local whole"],
    s_t2i: Float[Tensor, "local whole"],
    scale: Float[Tensor, ""] | float,
    targets: Num[Tensor, "local whole"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    r"""Symmetric InfoNCE of the whole batch, from this rank's images against all texts.

    .. math::
        L = \frac{1}{2B} \sum_i \bigl(\operatorname{lse}_j x_{ij} - \sum_j p_{ij} x_{ij}\bigr)
          + \frac{1}{2B} \sum_j \bigl(\operatorname{lse}_i y_{ij} - \sum_i q_{ij} y_{ij}\bigr)

    with x and y the scaled scores of both directions, p the targets with rows of sum 1 and q those
    with columns of sum 1. Rows and texts are ordered as `tenfold.distributed.gather` orders them.

    The value is that of the whole batch on every rank. The gradient is this rank's share of it
    times the number of ranks, so that DDP, which averages, arrives at the gradient that one rank
    would have.

    Args:
        s_i2t: image-to-text scores.
        s_t2i: text-to-image scores of the same pairs.
        scale: inverse temperature.
        targets: positives 0/1 of the local images; one text each, in order, if left out.
        label_smoothing: share of the target that is spread over all.

    Raises:
        ValueError: shapes that do not belong together, or an image or text without a positive.
    """
    _, world = ranks()
    if s_i2t.shape != s_t2i.shape or s_i2t.shape[1] != len(s_i2t) * world:
        ours, theirs = tuple(s_i2t.shape), tuple(s_t2i.shape)
        what = f"{world} ranks need blocks (b, {world} b) of both directions, got {ours}, {theirs}"
        raise ValueError(what)
    x, y = s_i2t * scale, s_t2i * scale
    p, q = _distributions(x, targets, label_smoothing)
    whole = x.shape[1]
    rows = x.logsumexp(1).sum() - (p * x).sum()
    columns = (q * y).sum()
    share = (rows - columns) / (2 * whole)
    across = _ColumnLogSumExp.apply(y).sum() / (2 * whole)  # pyright: ignore[reportOptionalMemberAccess]
    value = _sum_over_ranks(share.detach()) + across.detach()
    carrier = world * (share + across)
    return carrier + (value - carrier).detach()


def _distributions(
    x: Tensor, targets: Tensor | None, smoothing: float
) -> tuple[Float[Tensor, "local whole"], Float[Tensor, "local whole"]]:
    local, whole = x.shape
    if targets is None:
        positive = torch.zeros_like(x)
        positive[torch.arange(local), torch.arange(whole)[own_rows()]] = 1
    else:
        positive = targets.to(x.dtype)
    if positive.shape != x.shape:
        raise ValueError(f"targets have shape {tuple(positive.shape)}, scores {tuple(x.shape)}")
    of_row, of_column = positive.sum(1, keepdim=True), _sum_over_ranks(positive.sum(0))
    for name, count in (("image", of_row.flatten()), ("text", of_column)):
        if not bool((count > 0).all()):
            raise ValueError(f"{name} {int((count <= 0).nonzero()[0])} has no positive")
    spread = smoothing / whole
    return (
        (1 - smoothing) * positive / of_row + spread,
        (1 - smoothing) * positive / of_column + spread,
    )


def _sum_over_ranks(x: Tensor) -> Tensor:
    if ranks()[1] == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


class _ColumnLogSumExp(torch.autograd.Function):
    """Log-sum-exp over the rows of all ranks; its gradient reaches this rank's rows alone."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        largest = y.max(0).values
        if ranks()[1] > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        lse = largest + _sum_over_ranks((y - largest).exp().sum(0)).log()
        ctx.save_for_backward(y, lse)
        return lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        y, lse = ctx.saved_tensors
        return grads[0] * (y - lse).exp()
