"""What every network with taps shares: where its taps lie, and the initialisation of most."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal, cast

from jaxtyping import Float
from torch import Tensor, nn

from tenfold.distillation import Taps


class TappedNet(nn.Module, ABC):
    """A network that tells its features beside its logits.

    The maps can be had in two ways that give the same tensors: `taps`, or forward hooks on the
    modules `tap_names`.

    Attributes:
        num_classes: length of the logits.
        tap_names: modules whose outputs are F_0 .. F_-2, and after them the ICKD tap where it is
            none of these maps. The last name is always the ICKD tap's.
        tap_channels: their widths.
    """

    num_classes: int
    tap_names: tuple[str, ...]
    tap_channels: tuple[int, ...]

    @property
    def tap_width(self) -> int:
        """Channels of the ICKD tap."""
        return self.tap_channels[-1]

    @abstractmethod
    def taps(self, x: Float[Tensor, "batch channels height width"]) -> Taps:
        """The features and logits of a batch of normalised images."""


class Block(nn.Module, ABC):
    """A residual unit that can also tell its sum before the last activation."""

    @abstractmethod
    def with_preact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and what it was before its last activation."""

    def forward(self, x: Tensor) -> Tensor:
        """The output alone."""
        return self.with_preact(x)[0]


def run_stage(stage: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a stage that ends in a `Block`, and that block's sum before its activation."""
    *blocks, last = stage
    for block in blocks:
        x = block(x)
    return cast(Block, last).with_preact(x)


def init_convs(
    modules: Iterable[nn.Module], mode: Literal["fan_out", "fan_in"] = "fan_out"
) -> None:
    """Kaiming-normal: standard deviation √(2 / (k² · out)) (He et al. 2015), grouped or not.

    Batch norms start as torch makes them, with weight 1 and bias 0.

    Args:
        modules: those that are no convolutions stay as they are.
        mode: "fan_in" takes the channels that a kernel reads instead of the outputs.
    """
    for module in modules:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
