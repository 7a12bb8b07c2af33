"""Ways of reading an encoder, and what they have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bert_oversmoothing.diagnostics import cosine
from bert_oversmoothing.encoder import EncoderConfig
from bert_oversmoothing.fusion import LayerFusion, fusion_parameter_groups

BASELINE = "last"
BATCH, WEIGHT_DECAY = 32, 0.01
PILOT_SEED = 1000
"""Of what chooses and times; of no run that is reported."""


class Head(nn.Module):
    """A fusion of all layers, H_0 among them, and a linear layer on it.

    Args:
        name: kind of the fusion, with "_identity" behind it if it starts as the last layer.
        config: of the encoder that it reads.
        outputs: of the linear layer.
        seed: of its start; the linear layer of every head starts alike.
        dtype: of its parameters.
    """

    def __init__(
        self,
        name: str,
        config: EncoderConfig,
        outputs: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        kind, init = name.removesuffix("_identity"), "random"
        if kind != name:
            init = "identity"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.output = nn.Linear(config.width, outputs)
            self.fusion = LayerFusion(kind, config.width, config.layers + 1, init=init)
        self.to(dtype)

    def forward(self, states: Sequence[Tensor]) -> Float[Tensor, "b n outputs"]:
        """Outputs at every token of the states (b, n, d) of all layers."""
        return self.output(self.fused(states))

    def fused(self, states: Sequence[Tensor]) -> Float[Tensor, "b n d"]:
        """What the linear layer reads."""
        return self.fusion(states, need_weights=False).hidden

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups of parameters for AdamW."""
        linear = decaying(self.output.named_parameters(), lr)
        return [*fusion_parameter_groups(self.fusion, lr, WEIGHT_DECAY), *linear]


def decaying(named: Iterable[tuple[str, nn.Parameter]], lr: float) -> list[dict[str, Any]]:
    """Two groups: matrices and tables, which decay, and biases and norms, which do not."""
    groups: dict[float, list[nn.Parameter]] = {WEIGHT_DECAY: [], 0.0: []}
    for name, parameter in named:
        decays = not name.endswith("bias") and "norm" not in name
        groups[WEIGHT_DECAY if decays else 0.0].append(parameter)
    return [{"params": ps, "lr": lr, "weight_decay": decay} for decay, ps in groups.items()]


@torch.no_grad()
def cosines(states: Iterable[Tensor]) -> list[float]:
    """Mean similarity of the tokens of a text, of every layer (b, n, d)."""
    return [
        cosine(hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.bool)).mean().item()
        for hidden in states
    ]
