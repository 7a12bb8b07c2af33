r"""A concat followed by a linear head is one linear map of all layers.

.. math::  [H_1; \dots; H_K] W^\top + b \text{ and then } F V^\top + c
           \;=\; [H_1; \dots; H_K] (V W)^\top + (V b + c)

For questions V is 2 x d: instead of K d^2 weights, 2 K d are left.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bert_oversmoothing.fusion import Fused, LayerFusion
from bert_oversmoothing.model.base import FusionModel
from tenfold.errors import UserError


class Folded(NamedTuple):
    """A model whose concat and head are one map, and what that saves.

    Attributes:
        model: answers as the one it was made of, up to rounding.
        before: weights of the concat and the head.
        after: weights of the map.
    """

    model: FusionModel
    before: int
    after: int

    def __str__(self) -> str:
        share = f"{self.after / self.before:.2%}"
        return f"concat and head folded: {self.after:,} weights for {self.before:,} ({share})"


def linear_head(model: FusionModel) -> nn.Linear | None:
    """The linear map that reads the fused state and nothing else; None where there is more."""
    head = getattr(model.model, "qa_outputs", None)
    return head if model.task == "qa" and isinstance(head, nn.Linear) else None


def can_fold(model: FusionModel) -> bool:
    """Whether the model is a concat with a linear head."""
    return model.config.fusion == "concat" and linear_head(model) is not None


@torch.no_grad()
def fold(model: FusionModel) -> Folded:
    """Make one map of the concat and the linear head of a model for questions.

    Args:
        model: not changed.

    Raises:
        UserError: another fusion or task, or a head with more in it, as ModernBERT's.
    """
    head = linear_head(model)
    if head is None or not isinstance(model.fusion, LayerFusion) or not can_fold(model):
        what = "only a concat with a linear head for questions can be folded"
        raise UserError(what, where=f"{model.config.fusion}, task {model.task}")
    weight, bias = folded_weights(model.fusion, head)
    folded = copy.deepcopy(model)
    folded.add_module("fusion", FoldedConcat(weight, bias, model.fusion.layers))
    folded.model.qa_outputs = nn.Identity()
    before = sum(p.numel() for part in (model.fusion, head) for p in part.parameters())
    return Folded(folded, before, weight.numel() + bias.numel())


@torch.no_grad()
def folded_weights(
    fusion: LayerFusion, head: nn.Linear
) -> tuple[Float[Tensor, "outputs layers_width"], Float[Tensor, " outputs"]]:
    """Weight and bias of the one map, multiplied in float64."""
    v, w, b = head.weight.double(), fusion.weight.double(), fusion.bias.double()
    bias = v @ b if head.bias is None else v @ b + head.bias
    return (v @ w).to(fusion.weight), bias.to(fusion.weight)


class FoldedConcat(nn.Module):
    """The map in the place of a fusion; what comes out are the answers of the head.

    Args:
        weight: (outputs, layers x width), one layer after the other.
        bias: (outputs).
        layers: their numbers.
    """

    kind, gate_kind = "concat", "softmax"

    def __init__(self, weight: Tensor, bias: Tensor, layers: Sequence[int]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.layers = tuple(layers)

    def forward(
        self, hidden_states: Sequence[Tensor], mask: Tensor | None, *, need_weights: bool = True
    ) -> Fused:
        """The answers of the head."""
        return Fused(F.linear(torch.cat([*hidden_states], -1), self.weight, self.bias), None)

    def stream(self, *, need_weights: bool = True) -> FoldedStream:
        """Take up one layer after the other."""
        return FoldedStream(self)


class FoldedStream:
    """A sum of the answers of the layers so far."""

    def __init__(self, folded: FoldedConcat) -> None:
        self._parts = iter(folded.weight.chunk(len(folded.layers), 1))
        self._bias, self._total = folded.bias, None

    def add(self, hidden: Tensor) -> None:
        """The next layer."""
        part = F.linear(hidden, next(self._parts), self._bias if self._total is None else None)
        self._total = part if self._total is None else self._total + part

    def result(self, mask: Tensor | None) -> Fused:
        """The answers of the head."""
        assert self._total is not None
        return Fused(self._total, None)
