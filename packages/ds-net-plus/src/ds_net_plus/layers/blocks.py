"""Blocks of DS-MBNet."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ds_net_plus.layers.gate import MultiHeadGate
from ds_net_plus.layers.norm import SwitchableBN
from ds_net_plus.layers.slicing import (
    ConvAct,
    DSConv2d,
    DSDepthwiseConv2d,
    apply_channel_mask,
    channel_mask,
    check_widths,
)
from tenfold.errors import UserError


class DSDepthwiseSeparable(nn.Module):
    """dw -> BN -> SiLU -> gate -> pw -> BN -> SiLU, the block of DS-MBNet."""

    def __init__(
        self,
        in_widths: Sequence[int],
        out_widths: Sequence[int],
        kernel_size: int = 3,
        stride: int = 1,
        squeeze_ratio: float = 0.25,
        gate_outputs: int = 0,
        attention: str = "sigmoid",
    ) -> None:
        """Makes a block between two width lists; `gate_outputs` > 0 adds the slimming head."""
        super().__init__()
        self.in_widths = check_widths(in_widths, "block input widths")
        self.out_widths = check_widths(out_widths, "block output widths")
        self.conv_dw = DSDepthwiseConv2d(self.in_widths[-1], kernel_size, stride)
        self.bn1 = SwitchableBN(self.in_widths)
        self.gate = MultiHeadGate(self.in_widths[-1], gate_outputs, squeeze_ratio, attention)
        self.conv_pw = DSConv2d(self.in_widths[-1], self.out_widths[-1])
        self.bn2 = SwitchableBN(self.out_widths)

    def depthwise(
        self, x: Float[Tensor, "batch in_ height width"], kernel: int | None = None
    ) -> Float[Tensor, "batch in_ height2 width2"]:
        """The part before the gate, with the inner `kernel` taps (None: all)."""
        return F.silu(self.bn1(self.conv_dw(x, kernel)))

    def pointwise(
        self, x: Float[Tensor, "batch in_ height width"], out: int
    ) -> Float[Tensor, "batch out_ height width"]:
        """The part after the gate."""
        return F.silu(self.bn2(self.conv_pw(x, out)))

    def forward(
        self, x: Float[Tensor, "batch in_ height width"], out: int, kernel: int | None = None
    ) -> Float[Tensor, "batch out_ height2 width2"]:
        """The block at input width x.shape[1] and output width `out`."""
        return self.pointwise(self.gate(self.depthwise(x, kernel)), out)

    def masked_pointwise(
        self,
        x: Float[Tensor, "batch in_ height width"],
        gate: Float[Tensor, "batch routes"],
        widths: Sequence[int],
    ) -> Float[Tensor, "batch out height width"]:
        """`pointwise` computed at widths[-1] and masked to each sample's width."""
        y = apply_channel_mask(self.conv_pw(x, widths[-1]), channel_mask(gate, widths))
        return F.silu(self.bn2.masked(y, gate, widths))

    def masked(
        self,
        x: Float[Tensor, "batch in_ height width"],
        gate: Float[Tensor, "batch routes"],
        in_widths: Sequence[int],
        out_widths: Sequence[int],
        kernels: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch out height2 width2"]:
        """The block computed at its widest and masked, differentiable in the gate.

        Where routes have different `kernels`, each is run on all images and weighted by the gate.
        """
        mask = channel_mask(gate, in_widths)
        if kernels is None or len(set(kernels)) == 1:
            y = self.conv_dw(x, None if kernels is None else kernels[0])
        else:
            weights = {
                k: gate[:, [j for j, kernel in enumerate(kernels) if kernel == k]].sum(1)
                for k in kernels
            }
            y = torch.stack(
                [w[:, None, None, None] * self.conv_dw(x, k) for k, w in weights.items()]
            ).sum(0)
        y = apply_channel_mask(y, mask)
        y = self.gate.masked(F.silu(self.bn1.masked(y, gate, in_widths)), mask)
        return self.masked_pointwise(y, gate, out_widths)

    def materialize(
        self, in_: int, out: int, fold_bn: bool = True, kernel: int | None = None
    ) -> nn.Sequential:
        """The plain block of one pair of widths."""
        return nn.Sequential(
            self.materialize_depthwise(in_, fold_bn, kernel),
            self.gate.materialize(in_),
            self.materialize_pointwise(in_, out, fold_bn),
        )

    def materialize_depthwise(
        self, in_: int, fold_bn: bool = True, kernel: int | None = None
    ) -> ConvAct:
        """`depthwise` at one width."""
        conv, bn = self.conv_dw.materialize(in_, kernel), self.bn1.materialize(in_)
        return ConvAct(conv, bn, fold_bn=fold_bn)

    def materialize_pointwise(self, in_: int, out: int, fold_bn: bool = True) -> ConvAct:
        """`pointwise` at one pair of widths."""
        conv, bn = self.conv_pw.materialize(in_, out), self.bn2.materialize(out)
        return ConvAct(conv, bn, fold_bn=fold_bn)


def make_divisible(channels: float, divisor: int = 8) -> int:
    """`channels` rounded to a multiple of `divisor`, never more than 10 % below it."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class DSInvertedResidual(nn.Module):
    """pw -> BN -> SiLU -> dw -> BN -> SiLU -> gate -> pw -> BN, plus its input where asked for."""

    def __init__(
        self,
        in_widths: Sequence[int],
        out_widths: Sequence[int],
        kernel_size: int = 3,
        stride: int = 1,
        expansion: float = 6.0,
        squeeze_ratio: float = 0.25,
        residual: bool = False,
        gate_outputs: int = 0,
        attention: str = "sigmoid",
    ) -> None:
        """Makes a block whose middle width is make_divisible(expansion * input width).

        Raises:
            UserError: `residual` with a stride above 1 or with different width lists.
        """
        super().__init__()
        self.in_widths = check_widths(in_widths, "block input widths")
        self.out_widths = check_widths(out_widths, "block output widths")
        if residual and (stride != 1 or self.in_widths != self.out_widths):
            raise UserError("a residual needs stride 1 and equal input and output widths")
        self.residual = residual
        self.middle = tuple(make_divisible(expansion * width) for width in self.in_widths)
        self.conv_pw = DSConv2d(self.in_widths[-1], self.middle[-1])
        self.bn1 = SwitchableBN(self.middle)
        self.conv_dw = DSDepthwiseConv2d(self.middle[-1], kernel_size, stride)
        self.bn2 = SwitchableBN(self.middle)
        self.gate = MultiHeadGate(self.middle[-1], gate_outputs, squeeze_ratio, attention)
        self.conv_pwl = DSConv2d(self.middle[-1], self.out_widths[-1])
        self.bn3 = SwitchableBN(self.out_widths)
        if residual:  # a fresh block is the identity
            nn.init.zeros_(self.bn3.affine(self.out_widths[-1])[0])

    def forward(
        self, x: Float[Tensor, "batch in_ height width"], out: int
    ) -> Float[Tensor, "batch out_ height2 width2"]:
        """The block at input width x.shape[1] and output width `out`."""
        middle = self.middle[self.in_widths.index(x.shape[1])]
        y = F.silu(self.bn1(self.conv_pw(x, middle)))
        y = self.gate(F.silu(self.bn2(self.conv_dw(y))))
        y = self.bn3(self.conv_pwl(y, out))
        return x + y if self.residual else y
