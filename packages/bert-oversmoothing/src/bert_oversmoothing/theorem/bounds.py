"""The factor v by which a Transformer block multiplies d_M at most, as the paper has it and tight.

Letters in shapes: B texts, n tokens, h heads. All arithmetic is in float64 on the CPU: the inputs
are a few numbers per text, and the weights are read once.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bert_oversmoothing.theorem.activations import lipschitz

Order = Literal["post", "pre"]
"""Where a block's layer norms stand: after its two residual sums, or before its two branches."""


@dataclass(frozen=True)
class BlockWeights:
    """What the bound reads of a block, each matrix as `torch.nn.Linear` keeps it (out x in).

    Biases are absent: they move all tokens alike, and so leave d_M as it is.

    Attributes:
        value: the value maps of all heads, one below the other.
        output: the projection of attention, its columns those of the heads side by side.
        heads: h, which divides the rows of `value`.
        w1: the first feed-forward map; for a gated unit both its maps.
        w2: the second feed-forward map.
        gamma1: gains of the first norm (post-norm: after attention; pre-norm: before it).
        gamma2: gains of the second norm.
        activation: a name that `lipschitz` knows; any other means that there is no bound.
        order: "post" or "pre".
        scale1: LayerScale of the attention branch, None for none.
        scale2: LayerScale of the feed-forward branch, None for none.
        eps: what the norms add to the variance; their σ contains it.
    """

    value: Float[Tensor, "values width"]
    output: Float[Tensor, "width values"]
    heads: int
    w1: Float[Tensor, "w1_rows width"]
    w2: Float[Tensor, "width w2_columns"]
    gamma1: Float[Tensor, " width"]
    gamma2: Float[Tensor, " width"]
    activation: str
    order: Order
    scale1: Float[Tensor, " width"] | None = None
    scale2: Float[Tensor, " width"] | None = None
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.heads < 1 or self.value.shape[0] % self.heads:
            raise ValueError(f"{self.value.shape[0]} value rows do not split over {self.heads}")


@dataclass(frozen=True)
class BlockNorms:
    """The numbers of a block's weights that v is made of.

    Attributes:
        vo_h: ||W_k^V W_k^O||_2 of each head, in float64.
        w1: ||W_1||_2.
        w2: ||W_2||_2.
        gain1: max |γ| of the first norm.
        gain2: max |γ| of the second norm.
        scale1: max modulus of the LayerScale of attention, 1 for none.
        scale2: max modulus of the LayerScale of the feed-forward branch, 1 for none.
        lipschitz: the constant of the activation, None if it has none.
        order: "post" or "pre".
    """

    vo_h: Float[Tensor, " heads"]
    w1: float
    w2: float
    gain1: float
    gain2: float
    scale1: float
    scale2: float
    lipschitz: float | None
    order: Order


def vo_norms(
    value: Float[Tensor, "values width"], output: Float[Tensor, "width values"], heads: int
) -> Float[Tensor, " {heads}"]:
    """||W_k^V W_k^O||_2 of each head k, in float64, without forming a product of width x width.

    Args:
        value: weight of the value map (out x in), head after head.
        output: weight of the output projection (out x in).
        heads: h, which divides the rows of `value`.

    Orthonormal factors do not change a norm, so W_k^V and the transpose of W_k^O are each replaced
    by the triangle of their QR factors. Gram matrices would cost the same and square the rounding.
    """
    value_hed = _exact(value).unflatten(0, (heads, -1))
    output_hde = _exact(output).unflatten(1, (heads, -1)).transpose(0, 1)
    value_hee = torch.linalg.qr(value_hed.mT, mode="r").R
    output_hee = torch.linalg.qr(output_hde, mode="r").R
    return torch.linalg.matrix_norm(value_hee @ output_hee.mT, ord=2)


def block_norms(weights: BlockWeights) -> BlockNorms:
    """Read a block's weights once; the bounds of all texts then need these numbers only."""
    return BlockNorms(
        vo_h=vo_norms(weights.value, weights.output, weights.heads),
        w1=float(torch.linalg.matrix_norm(_exact(weights.w1), ord=2)),
        w2=float(torch.linalg.matrix_norm(_exact(weights.w2), ord=2)),
        gain1=_largest(weights.gamma1),
        gain2=_largest(weights.gamma2),
        scale1=1.0 if weights.scale1 is None else _largest(weights.scale1),
        scale2=1.0 if weights.scale2 is None else _largest(weights.scale2),
        lipschitz=lipschitz(weights.activation),
        order=weights.order,
    )


def min_sigma(sigma_bn: Float[Tensor, "B n"], mask_bn: Bool[Tensor, "B n"]) -> Float[Tensor, " B"]:
    """The smallest σ over the real tokens of each text; NaN for a text without any."""
    smallest_b = sigma_bn.masked_fill(~mask_bn, torch.inf).amin(1)
    return smallest_b.masked_fill(~mask_bn.any(1), torch.nan)


def v_tight(
    norms: BlockNorms,
    lam_bh: Float[Tensor, "B h"],
    sigma1_b: Float[Tensor, " B"],
    sigma2_b: Float[Tensor, " B"],
) -> Float[Tensor, " B"] | None:
    """The bound on d_M(block(H)) / d_M(H) with everything per block and per text.

    Post-norm: g₁ g₂ (1 + s₂ Lip ||W₁|| ||W₂||) (1 + s₁ Σ_k √λ_k ||W_k^VO||) / (σ₁ σ₂); pre-norm:
    (1 + g₁ s₁ Σ_k √λ_k ||W_k^VO|| / σ₁) (1 + g₂ s₂ Lip ||W₁|| ||W₂|| / σ₂), which is at least 1 and
    so never promises contraction; g: largest gains, s: LayerScale. It holds in eval mode. RMSNorm
    needs no other form: σ is then the root mean square.

    Args:
        norms: of the block's weights.
        lam_bh: λ of each head's attention over real tokens, at least 0. It must not be below the
            truth, as a power iteration's is: `diagnostics.graph.Lambda` has `lam_upper`.
        sigma1_b: smallest σ that the first norm meets over the real tokens of each text, above 0.
        sigma2_b: the same for the second norm.

    Returns:
        v in float64 on the CPU, or None where the activation has no Lipschitz constant.
    """
    if norms.lipschitz is None:
        return None
    feed_forward = norms.scale2 * norms.lipschitz * norms.w1 * norms.w2
    norm1_b, norm2_b = norms.gain1 / _exact(sigma1_b), norms.gain2 / _exact(sigma2_b)
    return _chain(norms.order, _attention(norms, lam_bh), feed_forward, norm1_b, norm2_b)


def v_paper(
    norms: BlockNorms,
    lam_bh: Float[Tensor, "B h"],
    sigma1_b: Float[Tensor, " B"],
    sigma2_b: Float[Tensor, " B"],
) -> Float[Tensor, " B"] | None:
    """The paper's v = (1 + s²) (1 + √λ h s) / (σ₁ σ₂), with λ, s and σ of the block and text.

    s is the largest spectral norm of the block's W_k^VO, W₁ and W₂, and λ the largest over its
    heads. Gains, LayerScale and the activation's constant do not enter, so it bounds a block with
    ReLU and gains of 1, and is below `v_tight` for some others. The paper has post-norm blocks
    only; pre-norm blocks get the same chain, (1 + √λ h s / σ₁) (1 + s² / σ₂).

    Arguments and result are those of `v_tight`.
    """
    if norms.lipschitz is None:
        return None
    s = max(float(norms.vo_h.max()), norms.w1, norms.w2)
    attention_b = _exact(lam_bh).clamp_min(0).amax(1).sqrt() * len(norms.vo_h) * s
    return _chain(norms.order, attention_b, s**2, 1 / _exact(sigma1_b), 1 / _exact(sigma2_b))


def attention_bound(
    norms: BlockNorms, lam_bh: Float[Tensor, "B h"], sigma1_b: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """The bound on what attention and its residual multiply d_M by; `sigma1_b` counts in pre-norm.

    It needs no activation's constant, and so exists for gated blocks as well.
    """
    attention_b = _attention(norms, lam_bh)
    return 1 + (
        attention_b if norms.order == "post" else attention_b * norms.gain1 / _exact(sigma1_b)
    )


def _attention(norms: BlockNorms, lam_bh: Float[Tensor, "B h"]) -> Float[Tensor, " B"]:
    """s₁ Σ_k √λ_k ||W_k^VO||; rounding may have left a λ of 0 just below it."""
    return norms.scale1 * (_exact(lam_bh).clamp_min(0).sqrt() @ norms.vo_h)


def _chain(
    order: Order,
    attention_b: Float[Tensor, " B"],
    feed_forward: float,
    norm1_b: Float[Tensor, " B"],
    norm2_b: Float[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """Multiply the bounds of a block's parts in the order in which it applies them."""
    if order == "post":
        return (1 + attention_b) * norm1_b * (1 + feed_forward) * norm2_b
    return (1 + norm1_b * attention_b) * (1 + norm2_b * feed_forward)


def _largest(vector: Float[Tensor, " width"]) -> float:
    return float(_exact(vector).abs().max())


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
