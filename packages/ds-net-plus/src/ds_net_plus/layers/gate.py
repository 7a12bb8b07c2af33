"""The double-headed gate: channel attention and route logits from one squeeze (DS-Net 3.3)."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tenfold.errors import UserError


class MultiHeadGate(nn.Module):
    """Double-headed gate (DS-Net section 3.3): channel attention and route logits from one squeeze.

    z = mean over space of X; h = ReLU(W1[:, :C] z + b1); a = sigmoid(W2[:C] h + b2[:C]);
    X' = X a; route logits = W3 h. The squeeze width is int(squeeze_ratio * channels), whatever C.
    """

    def __init__(
        self,
        channels: int,
        outputs: int = 0,
        squeeze_ratio: float = 0.25,
        attention: str = "sigmoid",
    ) -> None:
        """Makes the attention head and, where `outputs` > 0, the slimming head.

        Args:
            channels: the largest number of input channels.
            outputs: number of route logits, 0 for an attention head alone.
            squeeze_ratio: squeeze width over channels.
            attention: "sigmoid", or "tanh1p": X (1 + tanh(.)), which starts as the identity.

        Raises:
            UserError: an unknown attention, or no room for h.
        """
        super().__init__()
        if attention not in ("sigmoid", "tanh1p"):
            raise UserError(f"attention must be 'sigmoid' or 'tanh1p', got {attention!r}")
        hidden = int(squeeze_ratio * channels)
        if hidden < 1:
            raise UserError(f"squeeze ratio {squeeze_ratio} leaves nothing of {channels} channels")
        self.attention = attention
        self.conv_reduce = nn.Conv2d(channels, hidden, 1)
        self.conv_expand = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False)) if outputs else None
        self.reset_attention()

    def reset_attention(self) -> None:
        """Makes an attention head of kind "tanh1p" the identity; leaves a sigmoid as it is."""
        if self.attention == "tanh1p":
            assert self.conv_expand.bias is not None
            nn.init.zeros_(self.conv_expand.weight)
            nn.init.zeros_(self.conv_expand.bias)

    def squeeze(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch hidden"]:
        """h, the vector that both heads read."""
        z = x.mean((2, 3))
        weight = self.conv_reduce.weight[:, : x.shape[1], 0, 0]
        return F.relu(F.linear(z, weight, self.conv_reduce.bias))

    def excite(
        self, hidden: Float[Tensor, "batch hidden"], channels: int
    ) -> Float[Tensor, "batch channels"]:
        """Attention before its nonlinearity, for the first `channels` channels."""
        assert self.conv_expand.bias is not None
        weight = self.conv_expand.weight[:channels, :, 0, 0]
        return F.linear(hidden, weight, self.conv_expand.bias[:channels])

    def rescale(
        self,
        x: Float[Tensor, "batch channels height width"],
        excitation: Float[Tensor, "batch channels"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Multiplies each channel of `x` by its attention."""
        return x * _attention(excitation, self.attention)[:, :, None, None]

    def _head(self) -> Tensor:
        assert self.gate is not None, "this gate has no slimming head"
        return cast("nn.Conv2d", self.gate[0]).weight

    def logits(self, hidden: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch outputs"]:
        """Route logits, before any noise."""
        return F.linear(hidden, self._head()[:, :, 0, 0])

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The attention head alone: X'."""
        return self.rescale(x, self.excite(self.squeeze(x), x.shape[1]))

    def masked(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Float[Tensor, "batch channels"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The attention head with its expansion masked before the nonlinearity."""
        return self.rescale(x, self.excite(self.squeeze(x), x.shape[1]) * mask)

    def materialize(
        self, channels: int, slimming: bool = False, inplace: bool = True
    ) -> "PlainGate":
        """The gate of one width, as two plain linear layers (three with the slimming head).

        Args:
            channels: the width.
            slimming: with the slimming head.
            inplace: whether the plain gate may overwrite its input.
        """
        layers = [
            _linear(self.conv_reduce.weight[:, :channels, 0, 0], self.conv_reduce.bias),
            _linear(
                self.conv_expand.weight[:channels, :, 0, 0],
                None if self.conv_expand.bias is None else self.conv_expand.bias[:channels],
            ),
        ]
        if slimming:
            layers.append(_linear(self._head()[:, :, 0, 0], None))
        return PlainGate(layers, self.attention, inplace)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    plain.weight.data = weight.detach().clone()
    if bias is not None:
        plain.bias.data = bias.detach().clone()
    return plain


def _attention(excitation: Tensor, kind: str) -> Tensor:
    return torch.sigmoid(excitation) if kind == "sigmoid" else 1 + torch.tanh(excitation)


class PlainGate(nn.Module):
    """`MultiHeadGate` at one width; with three layers it also returns the route logits."""

    def __init__(self, layers: Sequence[nn.Linear], attention: str, inplace: bool = True) -> None:
        """Takes the reduce, expand and (for a gate block) slimming layers."""
        super().__init__()
        self.inplace = inplace
        self.layers = nn.ModuleList(layers)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """X', or (X', route logits) where the slimming head is present."""
        hidden = F.relu(self.layers[0](x.mean((2, 3))))
        attention = _attention(self.layers[1](hidden), self.attention)[:, :, None, None]
        y = x.mul_(attention) if self.inplace else x * attention
        return (y, self.layers[2](hidden)) if len(self.layers) == 3 else y
