"""A loss that keeps the tokens of a text apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class TokenSimilarityLoss(nn.Module):
    r"""Hinge on the cosine of every two different tokens of a text.

    .. math::  w \operatorname{mean}_{i \ne j} \max(0, \rho - 1 + \cos(h_i, h_j))

    The mean is over the ordered pairs of real tokens of a text, then over the texts with at least
    two; without such a text the loss is 0. Cosines are taken in float32 or better.

    Source: Su et al., "A Contrastive Framework for Neural Text Generation" (SimCTG), NeurIPS 2022,
    where a token's cosine with itself is the 1 of the margin.

    Args:
        margin: rho, cosines above 1 - rho cost.
        weight: w, at least 0.

    Raises:
        ValueError: a margin outside [0, 2], or a negative weight.

    Example:
        >>> loss = TokenSimilarityLoss()
        >>> total = task_loss + loss(hidden_states[-1], attention_mask)
    """

    def __init__(self, margin: float = 0.5, weight: float = 1.0) -> None:
        super().__init__()
        if not 0 <= margin <= 2 or weight < 0:
            raise ValueError(
                f"a margin in [0, 2] and a weight of at least 0, not {margin}, {weight}"
            )
        self.margin, self.weight = margin, weight

    def forward(
        self, hidden_bnd: Float[Tensor, "b n d"], mask_bn: Bool[Tensor, "b n"] | Int[Tensor, "b n"]
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            hidden_bnd: tokens of any float type.
            mask_bn: True or not 0 where a token is real.
        """
        mask_bn = mask_bn.bool()
        dtype = torch.promote_types(hidden_bnd.dtype, torch.float32)
        with torch.autocast(hidden_bnd.device.type, enabled=False):
            # filled first: what stands in padding, NaN included, must reach no gradient
            unit_bnd = F.normalize(
                hidden_bnd.masked_fill(~mask_bn[..., None], 0).to(dtype), dim=-1, eps=1e-12
            )
            cost_bnn = (self.margin - 1 + unit_bnd @ unit_bnd.mT).clamp(min=0)
        pair_bnn = mask_bn[:, :, None] & mask_bn[:, None, :]
        pair_bnn = pair_bnn & ~torch.eye(mask_bn.shape[1], dtype=torch.bool, device=mask_bn.device)
        pairs_b = pair_bnn.sum((1, 2))
        mean_b = (cost_bnn * pair_bnn).sum((1, 2)) / pairs_b.clamp(min=1)
        return self.weight * mean_b.sum() / (pairs_b > 0).sum().clamp(min=1)
