"""How layers resemble each other, and how much of its identity a token retains (section 3.3).

Legend of the shape suffixes: k layers, b texts, n tokens, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

GRAM_ENTRIES = 2**23
"""Entries of the Gram matrices that are held at a time, 64 MB in float64."""


def linear_cka(
    states_knd: Float[Tensor, "layers tokens width"],
) -> Float[Tensor, "layers layers"]:
    """Linear centred kernel alignment of every two layers.

    CKA(X, Y) = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) = <G_X, G_Y> / (||G_X||_F ||G_Y||_F) with
    the column means taken off and G_X = X X^T. The first form costs K^2 N d^2 / 2 products and, if
    the tokens are not kept, K^2 d^2 / 2 sums; the second K N^2 d products (half of them, as G is
    symmetric) and the K N d states. So up to N = K d / 2 tokens (5,000 for BERT-base), which a
    sample of texts seldom has, the second is the cheaper in both. It comes in bands of rows, so
    that K N^2 numbers are never held.

    Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019.

    Args:
        states_knd: the same real tokens in every layer.

    Returns:
        Symmetric, in 0..1, ones on the diagonal, float64; NaN for a layer whose tokens are all
        equal. On the CPU if the device has no float64.

    Raises:
        ValueError: no token.
    """
    layers, tokens, _ = states_knd.shape
    if not tokens:
        raise ValueError("there is no token to compare the layers on")
    x_knd = _float64(states_knd)
    x_knd = x_knd - x_knd[:, :1]  # equal rows become zero, which a mean's rounding would spoil
    x_knd = x_knd - x_knd.mean(1, keepdim=True)
    products_kk = x_knd.new_zeros(layers, layers)
    band = max(1, GRAM_ENTRIES // (layers * tokens))
    for first in range(0, tokens, band):
        rows_knd, rest_knd = x_knd[:, first : first + band], x_knd[:, first + band :]
        # The matrices are symmetric: what lies right of the band's own square counts twice.
        for others_knd, times in ((rows_knd, 1), (rest_knd, 2)):
            gram = (rows_knd @ others_knd.mT).flatten(1)
            products_kk += times * (gram @ gram.T)
    norm_k = products_kk.diagonal().sqrt()
    return products_kk / norm_k[:, None] / norm_k


class LayerCKA(Metric):
    """`linear_cka` over the real tokens of all batches and processes together.

    It keeps every token of every layer, K N d numbers: 330 MB for 64 texts of 128 tokens in
    BERT-base. It is meant for a sample, of which every process must have had a batch.

    Example:
        >>> cka = LayerCKA()
        >>> cka.update(output.hidden_states, mask_bn)
        >>> cka.compute()

    Args:
        **kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    states: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("states", [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(
        self,
        hidden_kbnd: Sequence[Float[Tensor, "texts tokens width"]],
        mask_bn: Bool[Tensor, "texts tokens"] | Int[Tensor, "texts tokens"],
    ) -> None:
        """Add a batch.

        Args:
            hidden_kbnd: the states of every layer, all of one width; anything at padded tokens.
            mask_bn: True or not 0 for real tokens.
        """
        mask_bn = mask_bn.bool()
        # Tokens first, for processes join their states along that axis.
        self.states.append(torch.stack([hidden[mask_bn] for hidden in hidden_kbnd], 1))

    def compute(self) -> Float[Tensor, "layers layers"]:
        """See `linear_cka`.

        Raises:
            ValueError: no token.
        """
        if not len(self.states):
            raise ValueError("there is no token to compare the layers on")
        # After processes have joined them, the states are one tensor.
        joined = torch.cat(self.states) if isinstance(self.states, list) else self.states
        return linear_cka(joined.transpose(0, 1))


def identity_cosine(
    hidden_bnd: Float[Tensor, "texts tokens width"],
    origin_bnd: Float[Tensor, "texts tokens width"],
    mask_bn: Bool[Tensor, "texts tokens"],
) -> Float[Tensor, " texts"]:
    """Identity retained: mean over the tokens of the cosine with their own H_0, in -1..1.

    Args:
        hidden_bnd: the states of a layer; anything at padded tokens.
        origin_bnd: H_0.
        mask_bn: True for real tokens.

    Returns:
        Float64; NaN for texts of fewer than two tokens, as in all other measures.
    """
    u_bnd, origin_u_bnd, mask_bn = _unit(hidden_bnd, origin_bnd, mask_bn)
    return _text_mean((u_bnd * origin_u_bnd).sum(-1), mask_bn)


def identity_accuracy(
    hidden_bnd: Float[Tensor, "texts tokens width"],
    origin_bnd: Float[Tensor, "texts tokens width"],
    mask_bn: Bool[Tensor, "texts tokens"],
) -> Float[Tensor, " texts"]:
    """Share of the tokens that are closest to their own row of H_0, of all of their text, in 0..1.

    Closest by cosine. A token that is as close to t rows, its own among them, counts 1 / t: what a
    choice at random would be right in. So collapsed rows give 1 / n.

    Args:
        hidden_bnd: the states of a layer; anything at padded tokens.
        origin_bnd: H_0.
        mask_bn: True for real tokens.

    Returns:
        Float64; NaN for texts of fewer than two tokens.
    """
    u_bnd, origin_u_bnd, mask_bn = _unit(hidden_bnd, origin_bnd, mask_bn)
    cosine_bnn = (u_bnd @ origin_u_bnd.mT).masked_fill(~mask_bn[:, None], -torch.inf)
    # Equal rows may differ in the last digits of a matrix product.
    closest_bnn = cosine_bnn >= cosine_bnn.amax(-1, keepdim=True) - 1e-12
    hit_bn = closest_bnn.diagonal(dim1=1, dim2=2).double() / closest_bnn.sum(-1)
    return _text_mean(hit_bn, mask_bn)


def _unit(hidden_bnd: Tensor, origin_bnd: Tensor, mask_bn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of norm 1, zero at padded tokens, and the mask on their device."""
    hidden_bnd, origin_bnd = _float64(hidden_bnd), _float64(origin_bnd)
    mask_bn = mask_bn.to(hidden_bnd.device)
    padded_bn1 = ~mask_bn[..., None]
    u_bnd, origin_u_bnd = (
        F.normalize(x.masked_fill(padded_bn1, 0), dim=-1, eps=1e-12)
        for x in (hidden_bnd, origin_bnd)
    )
    return u_bnd, origin_u_bnd, mask_bn


def _text_mean(values_bn: Tensor, mask_bn: Tensor) -> Tensor:
    count_b = mask_bn.sum(1)
    mean_b = values_bn.masked_fill(~mask_bn, 0).sum(1) / count_b
    return mean_b.masked_fill(count_b < 2, torch.nan)


def _float64(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()
