"""Embeddings of vectors that CC and CRD train on both sides, and throw away afterwards.

Submodules carry the names of the published programs, so that their state dicts load.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.distillation.base import in_full_precision
from tenfold.errors import UserError


class LinearEmbed(nn.Module):
    """Flatten and project: one linear layer.

    Args:
        dim_in: entries of an image's features.
        dim_out: of the embedding.
        normalize: divide the embedding by its length, as CRD does and CC does not.
    """

    def __init__(self, dim_in: int, dim_out: int = 128, *, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        self.linear = nn.Linear(dim_in, dim_out)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch dim_out"]:
        """Embed a batch, in full precision.

        Raises:
            UserError: other features than it was made for.
        """
        embedded = _linear(self.linear, _flat(x, self.linear.in_features))
        return F.normalize(embedded) if self.normalize else embedded


class MLPEmbed(nn.Module):
    """Flatten and project: two linear layers with a ReLU between them.

    Args:
        dim_in: entries of an image's features.
        dim_out: of the embedding.
        hidden: of the layer between.
        normalize: divide the embedding by its length.
    """

    def __init__(
        self, dim_in: int, dim_out: int = 128, hidden: int | None = None, *, normalize: bool = True
    ) -> None:
        super().__init__()
        self.normalize = normalize
        hidden = 2 * dim_out if hidden is None else hidden
        self.linear1 = nn.Linear(dim_in, hidden)
        self.linear2 = nn.Linear(hidden, dim_out)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch dim_out"]:
        """Embed a batch, in full precision.

        Raises:
            UserError: other features than it was made for.
        """
        hidden = _linear(self.linear1, _flat(x, self.linear1.in_features)).relu()
        embedded = _linear(self.linear2, hidden)
        return F.normalize(embedded) if self.normalize else embedded


def _flat(x: Float[Tensor, "batch ..."], width: int) -> Float[Tensor, "batch dim_in"]:
    flat = x.flatten(1)
    if flat.shape[1] != width:
        raise UserError(f"the embedding takes {width} features an image, got {tuple(x.shape)}")
    return flat


def _linear(layer: nn.Linear, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch m"]:
    """A linear layer outside autocast, whatever precision the module is kept in."""
    weight, bias = in_full_precision(layer.weight), in_full_precision(layer.bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(weight.dtype), weight, bias)
