"""Random Transformer blocks in float64 that show every state inside, to hold the theorem against.

Letters in shapes: B texts, n tokens, d width, h heads, e width of a head.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bert_oversmoothing.theorem.activations import activation_function
from bert_oversmoothing.theorem.bounds import BlockWeights, Order


@dataclass(frozen=True)
class BlockDesign:
    """How a random block is drawn.

    Attributes:
        tokens: n of the text that it is tried on, at least 2.
        width: d.
        heads: h, which divides d.
        order: "post" or "pre".
        activation: a name that `activation_function` knows.
        std: of the entries of the matrices, which are normal.
        sharpness: multiplies the query matrix; more of it makes soft attention peaky.
        gain_std: of the norms' gains, which are normal around 1.
        layer_scale: standard deviation of the LayerScale vectors, None for no LayerScale.
        norm: "layer" or "rms" (which does not centre).
    """

    tokens: int
    width: int
    heads: int
    order: Order
    activation: str
    std: float
    sharpness: float = 1.0
    gain_std: float = 0.0
    layer_scale: float | None = None
    norm: Literal["layer", "rms"] = "layer"


@dataclass(frozen=True)
class BlockTrace:
    """What happened inside a block.

    Attributes:
        states: each B x n x d; post-norm H, Attn, LN1, FF, LN2, and pre-norm H, Z, H'.
        attention_bhnn: the row-stochastic attention of each head, 0 on padded keys.
        sigma1_bn: σ of each token at the input of the first norm.
        sigma2_bn: σ of each token at the input of the second norm.
    """

    states: tuple[Float[Tensor, "B n d"], ...]
    attention_bhnn: Float[Tensor, "B h n n"]
    sigma1_bn: Float[Tensor, "B n"]
    sigma2_bn: Float[Tensor, "B n"]


@dataclass(frozen=True)
class RandomBlock:
    """A Transformer block as tensors; `weights` is what the bound reads of it.

    Attributes:
        weights: all that the bound reads.
        query: weight of the query map (out x in).
        key: weight of the key map (out x in).
        bias_o: of the attention's output.
        bias_1: of the first feed-forward map.
        bias_2: of the second feed-forward map.
        beta1: shift of the first norm.
        beta2: shift of the second norm.
        centred: True for layer norm, False for RMSNorm.
    """

    weights: BlockWeights
    query: Float[Tensor, "d d"]
    key: Float[Tensor, "d d"]
    bias_o: Float[Tensor, " d"]
    bias_1: Float[Tensor, " inner"]
    bias_2: Float[Tensor, " d"]
    beta1: Float[Tensor, " d"]
    beta2: Float[Tensor, " d"]
    centred: bool

    def forward(
        self, hidden_bnd: Float[Tensor, "B n d"], mask_bn: Bool[Tensor, "B n"]
    ) -> BlockTrace:
        """Run the block and keep every state; each text has at least one real token."""
        weights = self.weights
        if weights.order == "post":
            branch_bnd, attention_bhnn = self._attend(hidden_bnd, mask_bn)
            attended_bnd = hidden_bnd + branch_bnd
            normed_bnd, sigma1_bn = self._norm(attended_bnd, weights.gamma1, self.beta1)
            summed_bnd = normed_bnd + self._feed_forward(normed_bnd)
            out_bnd, sigma2_bn = self._norm(summed_bnd, weights.gamma2, self.beta2)
            states = (hidden_bnd, attended_bnd, normed_bnd, summed_bnd, out_bnd)
        else:
            normed_bnd, sigma1_bn = self._norm(hidden_bnd, weights.gamma1, self.beta1)
            branch_bnd, attention_bhnn = self._attend(normed_bnd, mask_bn)
            attended_bnd = hidden_bnd + branch_bnd
            normed_bnd, sigma2_bn = self._norm(attended_bnd, weights.gamma2, self.beta2)
            states = (hidden_bnd, attended_bnd, attended_bnd + self._feed_forward(normed_bnd))
        return BlockTrace(states, attention_bhnn, sigma1_bn, sigma2_bn)

    def _attend(
        self, hidden_bnd: Float[Tensor, "B n d"], mask_bn: Bool[Tensor, "B n"]
    ) -> tuple[Float[Tensor, "B n d"], Float[Tensor, "B h n n"]]:
        maps = (self.query, self.key, self.weights.value)
        q_bhne, k_bhne, v_bhne = (
            (hidden_bnd @ m.T).unflatten(2, (self.weights.heads, -1)).transpose(1, 2) for m in maps
        )
        logits_bhnn = q_bhne @ k_bhne.mT / math.sqrt(q_bhne.shape[-1])
        logits_bhnn = logits_bhnn.masked_fill(~mask_bn[:, None, None], -torch.inf)
        attention_bhnn = logits_bhnn.softmax(-1)
        mixed_bnd = (attention_bhnn @ v_bhne).transpose(1, 2).flatten(2)
        branch_bnd = mixed_bnd @ self.weights.output.T + self.bias_o
        return _scaled(branch_bnd, self.weights.scale1), attention_bhnn

    def _feed_forward(self, hidden_bnd: Float[Tensor, "B n d"]) -> Float[Tensor, "B n d"]:
        act = activation_function(self.weights.activation)
        inner = act(hidden_bnd @ self.weights.w1.T + self.bias_1)
        return _scaled(inner @ self.weights.w2.T + self.bias_2, self.weights.scale2)

    def _norm(
        self, x_bnd: Float[Tensor, "B n d"], gamma: Float[Tensor, " d"], beta: Float[Tensor, " d"]
    ) -> tuple[Float[Tensor, "B n d"], Float[Tensor, "B n"]]:
        if self.centred:
            x_bnd = x_bnd - x_bnd.mean(-1, keepdim=True)
        sigma_bn = (x_bnd.square().mean(-1) + self.weights.eps).sqrt()
        return gamma * x_bnd / sigma_bn[..., None] + beta, sigma_bn


def random_block(generator: torch.Generator, design: BlockDesign) -> RandomBlock:
    """Draw a block in float64 with d_ff = 2d; biases and shifts are N(0, 0.1²).

    Raises:
        ValueError: heads that do not divide the width.
    """
    d = design.width
    if d % design.heads:
        raise ValueError(f"width {d} does not split over {design.heads} heads")

    def normal(*shape: int, std: float) -> Tensor:
        return std * torch.randn(shape, generator=generator, dtype=torch.float64)

    def scale() -> Tensor | None:
        return None if design.layer_scale is None else normal(d, std=design.layer_scale)

    weights = BlockWeights(
        value=normal(d, d, std=design.std),
        output=normal(d, d, std=design.std),
        heads=design.heads,
        w1=normal(2 * d, d, std=design.std),
        w2=normal(d, 2 * d, std=design.std),
        gamma1=1 + normal(d, std=design.gain_std),
        gamma2=1 + normal(d, std=design.gain_std),
        activation=design.activation,
        order=design.order,
        scale1=scale(),
        scale2=scale(),
    )
    return RandomBlock(
        weights=weights,
        query=normal(d, d, std=design.std * design.sharpness),
        key=normal(d, d, std=design.std),
        bias_o=normal(d, std=0.1),
        bias_1=normal(2 * d, std=0.1),
        bias_2=normal(d, std=0.1),
        beta1=normal(d, std=0.1),
        beta2=normal(d, std=0.1),
        centred=design.norm == "layer",
    )


def random_tokens(
    generator: torch.Generator, texts: int, tokens: int, width: int
) -> Float[Tensor, "texts tokens width"]:
    """Draw normal token vectors and layer-norm them, as the embeddings of an encoder are."""
    hidden = torch.randn(texts, tokens, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.layer_norm(hidden, (width,))


def _scaled(
    branch_bnd: Float[Tensor, "B n d"], scale: Float[Tensor, " d"] | None
) -> Float[Tensor, "B n d"]:
    return branch_bnd if scale is None else branch_bnd * scale
