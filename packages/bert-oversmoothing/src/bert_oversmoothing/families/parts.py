"""An encoder as the diagnostics see it: blocks, norms, weights.

Shapes: n tokens, d width, h heads, k width of a head, f width of the feed-forward part. Weights
are read as torch keeps them, out x in.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bert_oversmoothing.diagnostics.measures import norm_scale
from bert_oversmoothing.families.layouts import FAMILIES, Layout
from tenfold.errors import UserError


class Norm(NamedTuple):
    """A normalisation of the width: its module, its eps, and whether it centres (RMS does not)."""

    module: nn.Module
    eps: float
    centred: bool

    def sigma(self, input_bnd: Float[Tensor, "*B n d"]) -> Float[Tensor, "*B n"]:
        """The divisor of every token: sqrt(var + eps), or sqrt(mean square + eps) uncentred."""
        return norm_scale(input_bnd, self.eps, centred=self.centred)


class BlockTensors(NamedTuple):
    """The weights of a block that the theorem reads; views of the model's own parameters.

    `up_fd` is None for a gated feed-forward part, a gamma where the norm is the identity or has
    no gain, a scale where there is no LayerScale.
    """

    value_hkd: Float[Tensor, "h k d"]
    output_hdk: Float[Tensor, "h d k"]
    up_fd: Float[Tensor, "f d"] | None
    down_df: Float[Tensor, "d f"]
    gamma1_d: Float[Tensor, " d"] | None
    gamma2_d: Float[Tensor, " d"] | None
    scale1_d: Float[Tensor, " d"] | None
    scale2_d: Float[Tensor, " d"] | None


@dataclass(frozen=True, eq=False)
class Block:
    """One block. `state` is the module whose output is the next hidden state: nearly always itself.

    `norms` are in the order of the forward pass, None where the place holds an identity.
    """

    module: nn.Module
    state: nn.Module
    norms: tuple[Norm | None, ...]
    attention: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class Encoder:
    """What the diagnostics have to know of a model. `family` is None where it is unknown."""

    model: PreTrainedModel
    family: str | None
    width: int
    heads: int | None
    blocks: tuple[Block, ...]
    final_norm: Norm | None = None
    order: Literal["post", "pre"] | None = None
    d_ff: int | None = None
    activation: str | None = None
    gated: bool = False
    causal: bool = False
    notes: tuple[str, ...] = ()
    layout: Layout | None = None
    map_index: int = 1  # where an attention module's output holds its map

    def unbounded(self, index: int) -> str | None:
        """Why the theorem says nothing about block `index` (from 0), or None where it does."""
        if self.layout is None:
            return "unknown family"
        if self.gated:
            return "gated feed-forward parts have no Lipschitz constant"
        if getattr(self.model.config, "talking_head", False):
            return "talking heads mix the maps, whose rows then do not sum to 1"
        if self.blocks[index].state is not self.blocks[index].module:
            return "a convolution follows the block"
        return None

    def tensors(self, index: int) -> BlockTensors:
        """The weights of block `index` (from 0).

        Raises:
            UserError: The family is unknown.
        """
        if self.layout is None or self.heads is None:
            raise UserError(
                "the weights of an unknown family cannot be read",
                where=self.model.config.model_type,
                fix=f"known are {', '.join(FAMILIES)}",
            )
        block, layout, h = self.blocks[index], self.layout, self.heads
        value, output = (part(block.module, path).weight for path in (layout.value, layout.output))
        match layout.packing:
            case "apart":
                value_hkd = value.unflatten(0, (h, -1))
            case "qkv":
                value_hkd = value.unflatten(0, (3, h, -1))[2]
            case "heads":
                value_hkd = value.unflatten(0, (h, 3, -1))[:, 2]
        up = part(block.module, layout.up).weight.detach() if layout.up else None
        first, second = block.norms[:2]
        scales = (part(block.module, path) for path in layout.scales or ())
        # BEiT without LayerScale holds the number 1 in its place.
        scale1_d, scale2_d = [
            scale.detach() if isinstance(scale, Tensor) else None for scale in scales
        ] or (None, None)
        return BlockTensors(
            value_hkd.detach(),
            output.unflatten(1, (h, -1)).transpose(0, 1).detach(),
            up,
            part(block.module, layout.down).weight.detach(),
            _gain(first),
            _gain(second),
            scale1_d,
            scale2_d,
        )


def _gain(norm: Norm | None) -> Tensor | None:
    weight = getattr(norm.module, "weight", None) if norm else None
    return weight.detach() if isinstance(weight, Tensor) else None


def part(root: nn.Module, path: str) -> Any:
    """The module or parameter at a dotted path; AttributeError where there is none."""
    return attrgetter(path)(root)
