"""Multi-head self-attention whose heads and features can be sliced.

Storage is head-major: the rows of the query-key-value projection are ordered
[head][q, k, v][channel of the head]. The first h heads are then the first rows of one weight and
one bias, which a matrix product reads in place, and fewer features are fewer columns.

Source: Attention is all you need (2017), section 3.2; the order of the rows is that of DS-Net++.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

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
