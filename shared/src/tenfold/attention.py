"""Multi-head self-attention whose heads and features can be sliced, and CLIP's transformer.

In `SelfAttention` storage is head-major: the rows of the query-key-value projection are ordered
[head][q, k, v][channel of the head]. The first h heads are then the first rows of one weight and
one bias, which a matrix product reads in place, and fewer features are fewer columns.
`TransformerBlock` and `Transformer` have the names and the order of rows of CLIP's checkpoints.

Source: Attention is all you need (2017), section 3.2; the order of the rows is that of DS-Net++.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tenfold.errors import UserError


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim)) V for each active head, then the output projection.

    The number of active heads is an argument of the call, that of active features is read from the
    input: the layer has no hidden state. With all of both it is ordinary multi-head attention.

    Example:
        >>> attention = SelfAttention(features=384, heads=6)
        >>> attention(tokens).shape, attention(tokens[..., :192], heads=3).shape
        (torch.Size([8, 197, 384]), torch.Size([8, 197, 192]))
    """

    def __init__(self, features: int, heads: int, head_dim: int = 64, bias: bool = True) -> None:
        """Stores the weights of all heads and features.

        Args:
            features: the largest width of the tokens.
            heads: the largest number of heads.
            head_dim: channels of a head, the same however many are active.
            bias: of both projections.

        Raises:
            UserError: a size below 1.
        """
        super().__init__()
        if min(features, heads, head_dim) < 1:
            raise UserError(
                f"attention needs features, heads and channels, got {features}, {heads}, {head_dim}"
            )
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(features, 3 * heads * head_dim, bias)
        self.proj = nn.Linear(heads * head_dim, features, bias)

    def forward(
        self,
        x: Float[Tensor, "batch tokens features"],
        heads: int | None = None,
        *,
        mask: Bool[Tensor, "#batch #heads #tokens tokens"] | None = None,
        head_gate: Float[Tensor, "batch heads"] | None = None,
    ) -> Float[Tensor, "batch tokens features"]:
        """Attends among the tokens of each sequence.

        Args:
            x: tokens of the largest width or fewer features.
            heads: the first so many are active; all where None.
            mask: True where a token may look; all may where None.
            head_gate: factor of each head's output, such as 1 and 0 for heads on and off.

        Raises:
            UserError: more heads than there are.
        """
        heads = self.check_heads(heads)
        rows = 3 * heads * self.head_dim
        width = x.shape[-1]
        weight, bias = self.qkv.weight[:rows, :width], _first(self.qkv.bias, rows)
        qkv = F.linear(x, weight, bias).unflatten(-1, (heads, 3, self.head_dim))
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each (batch, heads, tokens, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        if head_gate is not None:
            y = y * head_gate[:, :, None, None]
        y = y.transpose(1, 2).flatten(2)
        weight = self.proj.weight[:width, : heads * self.head_dim]
        return F.linear(y, weight, _first(self.proj.bias, width))

    def check_heads(self, heads: int | None) -> int:
        """The number of active heads, all where None.

        Raises:
            UserError: none, or more than there are.
        """
        if heads is None:
            return self.heads
        if not 1 <= heads <= self.heads:
            raise UserError(f"{heads} heads of {self.heads} stored ones cannot be active")
        return heads

    def materialize(
        self, features: int, heads: int | None = None, share_storage: bool = False
    ) -> "SelfAttention":
        """The layer of one width and number of heads, with weights of its own.

        Args:
            features: width of the tokens.
            heads: number of heads.
            share_storage: weights that are views of this layer's instead.
        """
        heads = self.check_heads(heads)
        inner = heads * self.head_dim
        plain = SelfAttention.__new__(SelfAttention)
        nn.Module.__init__(plain)
        plain.heads, plain.head_dim = heads, self.head_dim
        plain.qkv = slice_linear(self.qkv, features, 3 * inner, share_storage)
        plain.proj = slice_linear(self.proj, inner, features, share_storage)
        return plain


def slice_linear(layer: nn.Linear, in_: int, out: int, share_storage: bool = False) -> nn.Linear:
    """The linear layer of the first `in_` inputs and `out` outputs, without gradients.

    Args:
        layer: any linear layer.
        in_: inputs to keep.
        out: outputs to keep.
        share_storage: views of the layer's weights instead of copies; a matrix product reads them
            at the same speed.
    """
    plain = nn.Linear(1, 1, layer.bias is not None, device="meta")
    plain.in_features, plain.out_features = in_, out
    weight, bias = layer.weight.detach()[:out, :in_], _first(layer.bias, out)
    plain.weight = nn.Parameter(weight if share_storage else weight.clone(), requires_grad=False)
    if bias is not None:
        bias = bias.detach()
        plain.bias = nn.Parameter(bias if share_storage else bias.clone(), requires_grad=False)
    return plain


def _first(bias: Tensor | None, count: int) -> Tensor | None:
    return None if bias is None else bias[:count]


def to_head_major(rows: Float[Tensor, "rows ..."], heads: int) -> Float[Tensor, "rows ..."]:
    """Rows of a query-key-value projection from [q, k, v][head] (timm) to [head][q, k, v].

    Args:
        rows: its weight or its bias.
        heads: number of heads.
    """
    return rows.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def from_head_major(rows: Float[Tensor, "rows ..."], heads: int) -> Float[Tensor, "rows ..."]:
    """Rows of a query-key-value projection from [head][q, k, v] to [q, k, v][head] (timm)."""
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def quick_gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The form of GELU that CLIP was trained with, x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class FusedAttention(nn.Module):
    """Multi-head self-attention whose parameters are named as in `torch.nn.MultiheadAttention`.

    The rows of `in_proj_weight` are [q, k, v][head][channel of the head].

    Args:
        width: of the tokens.
        heads: number of heads; each has width / heads channels.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], causal: bool = False
    ) -> Float[Tensor, "batch tokens width"]:
        """Attends among the tokens of each sequence.

        Args:
            x: tokens.
            causal: whether a token sees only itself and those before it.
        """
        q, k, v = self._heads(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def weights(
        self, x: Float[Tensor, "batch tokens width"], causal: bool = False
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """How much each token (row) looks at each (column), in [0, 1]; rows sum to 1."""
        q, k, _ = self._heads(x)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(-1)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class MLP(nn.Module):
    """Two linear layers with an activation between them, the inner one four times as wide.

    Args:
        width: of the tokens.
        activation: between the layers, "quick_gelu" or "gelu".

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(self, width: int, activation: str = "quick_gelu") -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is none of {', '.join(_ACTIVATIONS)}")
        self.activation = activation
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(
        self, x: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Each token by itself."""
        return self.c_proj(_ACTIVATIONS[self.activation](self.c_fc(x)))


class TransformerBlock(nn.Module):
    """CLIP's pre-norm block: x += attention(ln_1(x)), then x += mlp(ln_2(x)).

    Its parameters have CLIP's names and CLIP's initial values: in_proj N(0, 1/w), out_proj and
    c_proj N(0, 1/(2 w depth)), c_fc N(0, 1/(2 w)) in variances; no bias in attention, the
    framework's default in the MLP.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
    2021, section 2.4.

    Args:
        width: of the tokens, w.
        heads: number of heads.
        activation: of the MLP, whose inner width is 4 w.
        depth: number of blocks in the network, for the initial values.

    Raises:
        ValueError: the heads do not divide the width, or an unknown activation.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        activation: str = "quick_gelu",
        depth: int = 1,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.ln_1 = nn.LayerNorm(width)
        self.attn = FusedAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)
        residual = (2 * depth * width) ** -0.5
        nn.init.normal_(self.attn.out_proj.weight, std=residual)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlp.c_proj.weight, std=residual)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], causal: bool = False
    ) -> Float[Tensor, "batch tokens width"]:
        """The tokens after attention and MLP.

        Args:
            x: tokens.
            causal: whether a token sees only itself and those before it.
        """
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))

    def attention_weights(
        self, x: Float[Tensor, "batch tokens width"], causal: bool = False
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """The attention of the block's input, see `FusedAttention.weights`."""
        return self.attn.weights(self.ln_1(x), causal)


class Transformer(nn.Module):
    """A stack of `TransformerBlock`s, named resblocks as in CLIP.

    Example:
        >>> transformer = Transformer(width=512, layers=12, heads=8)
        >>> transformer(tokens, causal=True).shape
        torch.Size([32, 77, 512])

    Args:
        width: of the tokens.
        layers: number of blocks.
        heads: number of heads in each.
        activation: of the MLPs.

    Raises:
        ValueError: as `TransformerBlock`.
    """

    def __init__(self, width: int, layers: int, heads: int, activation: str = "quick_gelu") -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            TransformerBlock(width, heads, activation, layers) for _ in range(layers)
        )

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        causal: bool = False,
        checkpointing: bool = False,
    ) -> Float[Tensor, "batch tokens width"]:
        """The tokens after all blocks.

        Args:
            x: tokens.
            causal: whether a token sees only itself and those before it.
            checkpointing: keep only the input of each block for the backward pass and compute the
                rest again there: the same gradient, a third more time, far less memory.
        """
        for block in self.resblocks:
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, causal, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, causal)
        return x
