"""A frozen teacher made faster: its forward pass compiled, features and all."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ickd.networks import Network
from tenfold.distillation import Taps


class CompiledNetwork(nn.Module):
    """A frozen copy of a network that says the same, through `torch.compile`.

    The compiler does not see hooks that come and go with a forward pass, so here they stay. The
    first pass of every size of batch takes up to a minute.

    Args:
        network: on any device; not changed.
        backend: of `torch.compile`.
    """

    def __init__(self, network: Network, backend: str = "inductor") -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._hooks = ExitStack()
        read = self._hooks.enter_context(self.network.reading())
        self._read = torch.compile(read, backend=backend)
        self._classify = torch.compile(self.network.net, backend=backend)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of pixels in 0..1, (batch, colours, height, width)."""
        logits = self._classify(self.network.prepare(pixels))
        return self.network.resize_logits(logits, pixels)

    def taps(self, pixels: Tensor) -> Taps:
        """Logits and features of pixels in 0..1, (batch, colours, height, width)."""
        return self.network.resize_taps(self._read(self.network.prepare(pixels)), pixels)
