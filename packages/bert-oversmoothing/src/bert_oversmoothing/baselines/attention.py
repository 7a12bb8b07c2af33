"""Pre-norm Transformer blocks with a remedy inside, and a small vision transformer of them.

Shapes: b images or texts, n tokens, d width, h heads, e = d / h.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Remedy = Literal["none", "attnscale", "featscale", "neutreno"]


class BlockOutput(NamedTuple):
    """What a block makes of its tokens.

    Attributes:
        hidden: the tokens after it.
        value: the values of its attention, before any blending; NeuTRENO wants the first block's.
    """

    hidden: Float[Tensor, "b n d"]
    value: Float[Tensor, "b h n e"]


def attn_scale(
    attention_bhnn: Float[Tensor, "b h n n"],
    lamb_h: Float[Tensor, " h"],
    mask_bn: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b h n n"]:
    r"""AttnScale: J + (1 + lamb) (A - J), J the mean over the real keys.

    Source: Wang et al., "Anti-Oversmoothing in Deep Vision Transformers via the Fourier Domain
    Analysis", ICLR 2022. Masks are ours; without them J = 1 1^T / n. Rows still sum to 1, and
    padded keys keep weight 0.

    Args:
        attention_bhnn: rows sum to 1.
        lamb_h: 0 changes nothing, -1 leaves the mean alone.
        mask_bn: True where a token is real.
    """
    if mask_bn is None:
        low = torch.full_like(attention_bhnn, 1 / attention_bhnn.shape[-1])
    else:
        real = mask_bn.to(attention_bhnn.dtype)
        low = (real / real.sum(1, keepdim=True).clamp(min=1))[:, None, None, :]
    return low + (1 + lamb_h[:, None, None]) * (attention_bhnn - low)


def feat_scale(
    branch_bnd: Float[Tensor, "b n d"],
    lamb1_d: Float[Tensor, " d"],
    lamb2_d: Float[Tensor, " d"],
    mask_bn: Bool[Tensor, "b n"] | None = None,
    *,
    double: bool = False,
) -> Float[Tensor, "b n d"]:
    """FeatScale: a branch plus its mean over tokens and what is left of it, scaled by channel.

    Source: Wang et al., ICLR 2022 (see `attn_scale`). Masks are ours: the mean is over real tokens.

    Args:
        branch_bnd: what attention adds to the tokens.
        lamb1_d: of the mean; 0 changes nothing.
        lamb2_d: of the rest; 0 changes nothing.
        mask_bn: True where a token is real.
        double: add the scaled parts twice, as the authors' program does; their text adds them once.
    """
    if mask_bn is None:
        low = branch_bnd.mean(1, keepdim=True)
    else:
        real = branch_bnd.masked_fill(~mask_bn[..., None], 0)
        low = real.sum(1, keepdim=True) / mask_bn.sum(1)[:, None, None].clamp(min=1)
    scaled = lamb1_d * low + lamb2_d * (branch_bnd - low)
    return branch_bnd + (2 * scaled if double else scaled)


def neutreno(
    mixed_bhne: Float[Tensor, "b h n e"],
    value_bhne: Float[Tensor, "b h n e"],
    first_value_bhne: Float[Tensor, "b h n e"],
    alpha: float = 0.6,
) -> Float[Tensor, "b h n e"]:
    """NeuTRENO: A V + alpha (V0 - V), V0 the values of the first block.

    Source: Nguyen et al., "Mitigating Over-smoothing in Transformers via Regularized Nonlocal
    Functionals", NeurIPS 2023.
    """
    return mixed_bhne + alpha * (first_value_bhne - value_bhne)


class Attention(nn.Module):
    """Self-attention with one linear map for queries, keys and values, in this order.

    Args:
        width: of the tokens.
        heads: a divisor of `width`.
        qkv_bias: the map has a bias.
        attn_drop: dropout of the attention weights.
        drop: dropout of the result.

    Raises:
        ValueError: `heads` does not divide `width`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} is no multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.attn_drop, self.drop = nn.Dropout(attn_drop), nn.Dropout(drop)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b n"] | None = None,
        first_value: Float[Tensor, "b h n e"] | None = None,
    ) -> BlockOutput:
        """What attention adds to the tokens, and its values; see `Block.forward`."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = query @ key.mT * query.shape[-1] ** -0.5
        if mask is not None:
            # a finite number, so that a row without any real key stays finite
            logits = logits.masked_fill(~mask[:, None, None, :], torch.finfo(logits.dtype).min)
        attention = self.attn_drop(self._reweighed(logits.softmax(-1), mask))
        mixed = self._blended(attention @ value, value, first_value)
        return BlockOutput(self.drop(self.proj(mixed.transpose(1, 2).flatten(2))), value)

    def _reweighed(self, attention: Tensor, mask: Tensor | None) -> Tensor:
        return attention

    def _blended(self, mixed: Tensor, value: Tensor, first_value: Tensor | None) -> Tensor:
        return mixed


class _AttnScaleAttention(Attention):
    def __init__(self, width: int, heads: int, *options: Any) -> None:
        super().__init__(width, heads, *options)
        self.lamb = nn.Parameter(torch.zeros(heads))

    def _reweighed(self, attention: Tensor, mask: Tensor | None) -> Tensor:
        return attn_scale(attention, self.lamb, mask)


class _NeuTRENOAttention(Attention):
    alpha: float = 0.6

    def _blended(self, mixed: Tensor, value: Tensor, first_value: Tensor | None) -> Tensor:
        return mixed if first_value is None else neutreno(mixed, value, first_value, self.alpha)


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """A plain pre-norm block, H + MHA(LN1(H)) and then + MLP(LN2(.)), with an erf-GELU.

    Its parameters are called norm1, attn.qkv, attn.proj, norm2, mlp.fc1 and mlp.fc2.

    Args:
        width: of the tokens.
        heads: a divisor of `width`.
        mlp_ratio: width of the MLP's hidden layer, in widths.
        qkv_bias: queries, keys and values have a bias.
        eps: of the layer norms.
        attn_drop: dropout of the attention weights.
        drop: dropout of both branches and of the MLP's hidden layer.

    Raises:
        ValueError: `heads` does not divide `width`.
    """

    _attention: type[Attention] = Attention

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        qkv_bias: bool = True,
        eps: float = 1e-5,
        attn_drop: float = 0.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = self._attention(width, heads, qkv_bias, attn_drop, drop)
        self.mlp = _MLP(width, int(width * mlp_ratio), drop)

    def forward(
        self,
        hidden: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b n"] | Int[Tensor, "b n"] | None = None,
        first_value: Float[Tensor, "b h n e"] | None = None,
    ) -> BlockOutput:
        """The tokens after the block.

        Args:
            hidden: the tokens before it.
            mask: True or not 0 where a token is real; padding changes no real token, and what comes
                out at its own places means nothing.
            first_value: values of the first block, None in that block; NeuTRENO alone reads them.
        """
        mask = None if mask is None else mask.bool()
        branch, value = self.attn(self.norm1(hidden), mask, first_value)
        hidden = hidden + self._scaled(branch, mask)
        return BlockOutput(hidden + self.mlp(self.norm2(hidden)), value)

    def _scaled(self, branch: Tensor, mask: Tensor | None) -> Tensor:
        return branch


class AttnScale(Block):
    """A block whose attention is pushed off its mean by `attn.lamb` (h), 0 before training.

    See `attn_scale` for the equation and `Block` for the arguments.

    Example:
        >>> AttnScale(32, 4)(torch.randn(2, 9, 32)).hidden.shape
        torch.Size([2, 9, 32])
    """

    _attention = _AttnScaleAttention


class FeatScale(Block):
    """A block that scales what attention adds by `lamb1` and `lamb2` (d), 0 before training.

    See `feat_scale` for the equation.

    Args:
        width: of the tokens.
        heads: a divisor of `width`.
        mlp_ratio: see `Block`.
        double: add the scaled parts twice, as the authors' program does.
        options: see `Block`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        double: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(width, heads, mlp_ratio, **options)
        self.scaled_twice = double
        self.lamb1, self.lamb2 = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def _scaled(self, branch: Tensor, mask: Tensor | None) -> Tensor:
        return feat_scale(branch, self.lamb1, self.lamb2, mask, double=self.scaled_twice)


class NeuTRENO(Block):
    """A block that blends values of the first block into its own; it has no parameter more.

    See `neutreno` for the equation, with alpha = 0.6, and `Block` for the arguments.
    """

    _attention = _NeuTRENOAttention


BLOCKS: dict[Remedy, type[Block]] = {
    "none": Block,
    "attnscale": AttnScale,
    "featscale": FeatScale,
    "neutreno": NeuTRENO,
}
"""The block of each remedy."""


class _PatchEmbed(nn.Module):
    def __init__(self, width: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n d"]:
        return self.proj(images).flatten(2).mT


class VisionTransformer(nn.Module):
    """A vision transformer whose every block has one remedy, with the parameter names of DeiT.

    The class token comes first, the position embedding is added after it, and a linear head reads
    the class token behind the final norm. The authors' sizes are a depth of 12 or 24 with width
    384 and 6 heads (small) or 768 and 12 (base).

    Args:
        remedy: "none", "attnscale", "featscale" or "neutreno".
        image_size: side of the images, a multiple of `patch_size`.
        patch_size: side of a patch.
        channels: of the images.
        classes: outputs of the head.
        width: of the tokens.
        depth: number of blocks.
        heads: a divisor of `width`.
        eps: of every layer norm.
        drop: dropout of the embeddings too; see `Block`.
        block_options: more of the blocks' arguments, such as `double` of FeatScale.

    Raises:
        ValueError: a remedy that does not exist, or sizes that do not divide each other.
    """

    def __init__(
        self,
        remedy: Remedy = "attnscale",
        *,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        classes: int = 1000,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        eps: float = 1e-6,
        drop: float = 0.0,
        **block_options: Any,
    ) -> None:
        super().__init__()
        if remedy not in BLOCKS:
            raise ValueError(f"remedy must be one of {get_args(Remedy)}, got {remedy!r}")
        if image_size % patch_size:
            raise ValueError(f"images of {image_size} do not divide into patches of {patch_size}")
        self.patch_embed = _PatchEmbed(width, patch_size, channels)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, (image_size // patch_size) ** 2 + 1, width))
        self.pos_drop = nn.Dropout(drop)
        block = BLOCKS[remedy]
        self.blocks = nn.ModuleList(
            block(width, heads, eps=eps, drop=drop, **block_options) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps)
        self.head = nn.Linear(width, classes)
        self._reset()

    def _reset(self) -> None:
        """DeiT's start: truncated normals of 0.02, biases 0; the convolution keeps torch's."""
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b classes"]:
        """Class logits."""
        return self.head(self.norm(self.hidden_states(images)[-1])[:, 0])

    def hidden_states(
        self, images: Float[Tensor, "b c height width"]
    ) -> tuple[Float[Tensor, "b n d"], ...]:
        """The embeddings, and the tokens after each block, before the final norm."""
        patches = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        states, first_value = [self.pos_drop(tokens + self.pos_embed)], None
        for block in self.blocks:
            hidden, value = block(states[-1], None, first_value)
            first_value = value if first_value is None else first_value
            states.append(hidden)
        return tuple(states)
