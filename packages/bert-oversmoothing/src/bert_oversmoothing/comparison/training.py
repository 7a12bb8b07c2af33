"""Several models of the odd run, trained at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from bert_oversmoothing.comparison.heads import BATCH, Head, decaying
from bert_oversmoothing.encoder import Encoder, EncoderConfig, stack
from bert_oversmoothing.synthetic import OddRun, span_loss
from tenfold.progress import track

TASK = OddRun()
LR, CLIP, WARMUP = 3e-3, 1.0, 20


class Models(nn.Module):
    """Several models of the odd run, each with a head of its own, which are trained at once.

    The encoders start alike and are one module with an axis of models; what a model learns is what
    it would learn alone.

    Args:
        heads: a name for each model.
        config: of all encoders.
        seed: of the start.
        dtype: of all parameters.
    """

    def __init__(
        self,
        heads: Sequence[str],
        config: EncoderConfig,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.names = tuple(heads)
        one = Encoder(config, generator=torch.Generator().manual_seed(seed)).to(dtype)
        self.encoder = stack([one] * len(heads))
        self.heads = nn.ModuleList(Head(name, config, 2, seed, dtype) for name in heads)

    @property
    def readers(self) -> list[Head]:
        """The head of each model."""
        return [head for head in self.heads if isinstance(head, Head)]

    def states(self, ids: Int64[Tensor, "b n"]) -> list[tuple[Tensor, ...]]:
        """Of every model its states (b, n, d) of all layers."""
        # to take models one by one would make the backward pass fill a whole layer for each
        layers = [hidden.unbind(0) for hidden in self.encoder(ids).hidden_states]
        return list(zip(*layers, strict=True))

    def forward(self, ids: Int64[Tensor, "b n"]) -> list[Float[Tensor, "b n 2"]]:
        """Logits of start and end, of every model."""
        return [head(own) for head, own in zip(self.readers, self.states(ids), strict=True)]

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups of parameters for AdamW, which works element by element."""
        heads = [group for head in self.readers for group in head.groups(lr)]
        return [*decaying(self.encoder.named_parameters(), lr), *heads]

    @torch.no_grad()
    def clip(self, most: float) -> Float[Tensor, " M"]:
        """Clip the gradient of each model, encoder and head together, to a norm of its own.

        Returns:
            The norms before.
        """
        shared = [p.grad for p in self.encoder.parameters() if p.grad is not None]
        own = [[p.grad for p in h.parameters() if p.grad is not None] for h in self.heads]
        square = torch.stack([g.flatten(1).square().sum(1) for g in shared]).sum(0)
        square += torch.stack([torch.stack([g.square().sum() for g in gs]).sum() for gs in own])
        norm = square.sqrt()
        factor = (most / (norm + 1e-6)).clamp(max=1)
        for gradient in shared:
            gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))
        for gradients, scale in zip(own, factor, strict=True):
            for gradient in gradients:
                gradient.mul_(scale)
        return norm


def train(models: Models, seed: int, steps: int, label: str | None = None) -> list[list[float]]:
    """Train models on the items of a seed, all on the same batches.

    AdamW; the rate rises for 20 steps and then falls to 0.

    Args:
        models: changed in place.
        seed: of the items.
        steps: of the optimiser.
        label: of the progress that is shown, None for none.

    Returns:
        `losses[model][step]`.
    """
    optimizer = torch.optim.AdamW(models.groups(LR))
    warmup = min(WARMUP, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    losses = []
    for step in track(range(steps), label=label) if label else range(steps):
        items = TASK.items(seed, range(BATCH * step, BATCH * (step + 1)))
        each = torch.stack([span_loss(logits, items) for logits in models(items.ids)])
        optimizer.zero_grad()
        each.sum().backward()
        models.clip(CLIP)
        optimizer.step()
        schedule.step()
        losses.append(each.detach())
    return torch.stack(losses, 1).tolist() if losses else [[] for _ in models.names]
