"""Sliceable pre-norm transformer block and the gate that reads tokens (DS-Net++)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ds_net_plus.layers.norm import DSLayerNorm
from tenfold.attention import SelfAttention, slice_linear
from tenfold.errors import UserError


class DSBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), with the first heads and hidden units.

    The width of the tokens is read from the input, heads and hidden units are arguments.
    """

    def __init__(self, features: int, heads: int, hidden: int, head_dim: int = 64) -> None:
        """Stores the largest number of features, heads and hidden units."""
        super().__init__()
        self.norm1 = DSLayerNorm(features)
        self.attn = SelfAttention(features, heads, head_dim)
        self.norm2 = DSLayerNorm(features)
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, features)

    def forward(
        self,
        x: Float[Tensor, "batch tokens features"],
        heads: int,
        hidden: int,
        keep: Float[Tensor, "batch 1 1"] | None = None,
    ) -> Float[Tensor, "batch tokens features"]:
        """The block with `heads` heads and `hidden` units.

        Args:
            x: tokens.
            heads: active heads.
            hidden: active units of the MLP.
            keep: factor of both branches for each sample, such as stochastic depth.
        """
        scale = 1.0 if keep is None else keep
        x = x + scale * self.attn(self.norm1(x), heads)
        return x + scale * self._mlp(self.norm2(x), hidden)

    def _mlp(self, x: Tensor, hidden: int) -> Tensor:
        width = x.shape[-1]
        y = F.gelu(F.linear(x, self.fc1.weight[:hidden, :width], self.fc1.bias[:hidden]))
        return F.linear(y, self.fc2.weight[:width, :hidden], self.fc2.bias[:width])

    def masked(
        self,
        x: Float[Tensor, "batch tokens features"],
        features: Float[Tensor, "batch features"],
        heads: Float[Tensor, "batch heads"],
        hidden: Float[Tensor, "batch hidden"],
        keep: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch tokens features"]:
        """The block at its widest, masked to each sample's slices.

        Args:
            x: tokens, zero beyond a sample's features.
            features: mask of features.
            heads: mask of heads.
            hidden: mask of hidden units.
            keep: whether the sample has this block at all.
        """
        width, keep, features = x.shape[-1], keep[:, None, None], features[:, None]
        y = self.attn(self.norm1.masked(x, features), heads.shape[1], head_gate=heads)
        x = x + keep * features * y
        units = hidden.shape[1]
        y = F.linear(
            self.norm2.masked(x, features), self.fc1.weight[:units, :width], self.fc1.bias[:units]
        )
        y = F.gelu(y) * hidden[:, None]
        y = F.linear(y, self.fc2.weight[:width, :units], self.fc2.bias[:width])
        return x + keep * features * y

    def materialize(
        self, features: int, heads: int, hidden: int, share_storage: bool = False
    ) -> "PlainBlock":
        """The plain block of one width, number of heads and of hidden units."""
        return PlainBlock(
            self.norm1.materialize(features),
            self.attn.materialize(features, heads, share_storage),
            self.norm2.materialize(features),
            slice_linear(self.fc1, features, hidden, share_storage),
            slice_linear(self.fc2, hidden, features, share_storage),
        )


class PlainBlock(nn.Module):
    """A `DSBlock` of one width."""

    def __init__(
        self, norm1: nn.Module, attn: nn.Module, norm2: nn.Module, fc1: nn.Module, fc2: nn.Module
    ) -> None:
        """Takes its plain layers."""
        super().__init__()
        self.norm1, self.attn, self.norm2, self.fc1, self.fc2 = norm1, attn, norm2, fc1, fc2

    def forward(
        self, x: Float[Tensor, "batch tokens features"]
    ) -> Float[Tensor, "batch tokens features"]:
        """Attention, then MLP."""
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TokenGate(nn.Module):
    """The double-headed gate on tokens: channel attention and route logits from one squeeze.

    z = mean over tokens of LN(x), without affine pair; h = ReLU(W1 z + b1);
    x' = x (1 + tanh(W2 h + b2)), W2 and b2 zero at first; route logits = W3 h.
    """

    def __init__(
        self, features: int, outputs: int, squeeze_ratio: float = 0.25, hidden: int = 0
    ) -> None:
        """Makes both heads.

        Args:
            features: of the tokens.
            outputs: route logits.
            squeeze_ratio: length of h over `features`.
            hidden: units of a hidden layer in the slimming head; none where 0.

        Raises:
            UserError: no room for h.
        """
        super().__init__()
        squeezed = int(squeeze_ratio * features)
        if squeezed < 1:
            raise UserError(f"squeeze ratio {squeeze_ratio} leaves nothing of {features} features")
        self.reduce = nn.Linear(features, squeezed)
        self.expand = nn.Linear(squeezed, features)
        self.head = nn.Sequential(nn.Linear(hidden or squeezed, outputs, bias=False))
        if hidden:
            self.head = nn.Sequential(nn.Linear(squeezed, hidden), nn.ReLU(), *self.head)
        self.reset_attention()

    def reset_attention(self) -> None:
        """Makes the attention head the identity."""
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def squeeze(self, x: Float[Tensor, "batch tokens features"]) -> Float[Tensor, "batch hidden"]:
        """h, the vector that both heads read."""
        z = F.layer_norm(x, x.shape[-1:], eps=1e-6).mean(1)
        return F.relu(self.reduce(z))

    def rescale(
        self, x: Float[Tensor, "batch tokens features"], hidden: Float[Tensor, "batch hidden"]
    ) -> Float[Tensor, "batch tokens features"]:
        """Every feature of the tokens times its attention."""
        return x * (1 + self.expand(hidden).tanh())[:, None]

    def logits(self, hidden: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch outputs"]:
        """Route logits, before any noise."""
        return self.head(hidden)
