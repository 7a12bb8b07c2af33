"""The pieces of the fusions: gates, a maximum that keeps little, sums in a wide precision."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Gate(nn.Module):
    """Logits of the layers: a linear map (d) -> 1 for each, or (d) -> (d) by channel."""

    def __init__(self, width: int, rows: int, channels: int | None) -> None:
        super().__init__()
        outputs = () if channels is None else (channels,)
        self.weight = nn.Parameter(torch.empty(rows, *outputs, width))
        self.bias = nn.Parameter(torch.empty(rows, *outputs))

    def forward(
        self, hidden: Float[Tensor, "batch tokens width"], i: int
    ) -> Float[Tensor, "batch tokens channels"]:
        """The logits of layer i, of one channel or of d, in float32 or better."""
        row = i if len(self.weight) > 1 else 0
        weight = self.weight[row].view(-1, self.weight.shape[-1])
        return widen(F.linear(hidden, weight, self.bias[row].view(-1)))


class Maximum(torch.autograd.Function):
    """The largest of several tensors, element by element.

    A running maximum keeps one byte an element for the way back, the number of the winner;
    torch.maximum would keep both operands of each step.
    """

    @staticmethod
    def forward(ctx: Any, *states: Tensor) -> Tensor:
        """The maximum; of equal ones the first wins."""
        largest = states[0].clone()
        number = torch.uint8 if len(states) <= 256 else torch.int16
        winner = torch.zeros_like(largest, dtype=number)
        for i, hidden in enumerate(states[1:], 1):
            winner.masked_fill_(hidden > largest, i)
            largest = torch.maximum(largest, hidden)
        ctx.save_for_backward(winner)
        return largest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each tensor, where it won."""
        (winner,) = ctx.saved_tensors
        return tuple(
            torch.where(winner == i, grads[0], 0) if needed else None
            for i, needed in enumerate(ctx.needs_input_grad)
        )


def add_product(total: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Add hidden weight^T to a contiguous total, in place."""
    alike = total.dtype == hidden.dtype == weight.dtype
    if alike and not torch.is_autocast_enabled(hidden.device.type):
        total.flatten(0, 1).addmm_(hidden.flatten(0, 1), weight.T)
        return total
    # Products of half precision are added up in float32, so that many layers lose nothing.
    return total.add_(F.linear(hidden, weight))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Float32 for half precision, else the same."""
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """The same numbers in float32 or better."""
    return x.to(wide(x.dtype))
