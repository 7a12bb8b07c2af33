"""Sliceable bottleneck block of DS-ResNet."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ds_net_plus.layers.norm import DSGroupNorm, SwitchableBN
from ds_net_plus.layers.slicing import ConvAct, DSConv2d, apply_channel_mask, channel_mask

EXPANSION = 4


def make_norm(widths: Sequence[int], norm: str, group_size: int) -> SwitchableBN | DSGroupNorm:
    """The norm of a width list: "bn" keeps statistics for each, "gn" needs none."""
    return SwitchableBN(widths) if norm == "bn" else DSGroupNorm(widths, group_size)


class DSBottleneck(nn.Module):
    """1x1 -> 3x3 (stride) -> 1x1 of four times the width, plus the input, or its projection.

    Each convolution has its norm, and ReLU follows all but the last norm; then the sum.
    """

    def __init__(
        self,
        in_widths: Sequence[int],
        mid_widths: Sequence[int],
        stride: int = 1,
        projected: bool = False,
        norm: str = "gn",
        group_size: int = 16,
    ) -> None:
        """Stores the block at its widest.

        Args:
            in_widths: ascending widths of the input.
            mid_widths: ascending widths of the 3x3 convolution; the output has four times as many.
            stride: of the 3x3 convolution and of the projection.
            projected: whether a 1x1 convolution makes the input fit the output.
            norm: "gn" or "bn".
            group_size: channels of a group of "gn".
        """
        super().__init__()
        mid, out = tuple(mid_widths), tuple(EXPANSION * width for width in mid_widths)
        self.stride = stride
        self.conv1 = DSConv2d(in_widths[-1], mid[-1])
        self.bn1 = make_norm(mid, norm, group_size)
        self.conv2 = DSConv2d(mid[-1], mid[-1], 3, stride)
        self.bn2 = make_norm(mid, norm, group_size)
        self.conv3 = DSConv2d(mid[-1], out[-1])
        self.bn3 = make_norm(out, norm, group_size)
        self.downsample = DSConv2d(in_widths[-1], out[-1], 1, stride) if projected else None
        self.downsample_bn = make_norm(out, norm, group_size) if projected else None

    def forward(
        self, x: Float[Tensor, "batch in_ height width"], mid: int
    ) -> Float[Tensor, "batch out height2 width2"]:
        """The block at middle width `mid`."""
        return self.outer(self.inner(x, mid), x, mid)

    def inner(
        self, x: Float[Tensor, "batch in_ height width"], mid: int
    ) -> Float[Tensor, "batch mid height2 width2"]:
        """The first two convolutions."""
        y = F.relu(self.bn1(self.conv1(x, mid)))
        return F.relu(self.bn2(self.conv2(y, mid)))

    def outer(
        self,
        y: Float[Tensor, "batch mid height2 width2"],
        x: Float[Tensor, "batch in_ height width"],
        mid: int,
        stride: int | None = None,
    ) -> Float[Tensor, "batch out height2 width2"]:
        """The third convolution and the sum; `mid` sets the output's width.

        Args:
            y: what `inner` gave, perhaps of another middle width.
            x: the block's input.
            mid: a quarter of the output's width.
            stride: of the projection, where `x` has been strided already.
        """
        y, out = self.bn3(self.conv3(y, EXPANSION * mid)), EXPANSION * mid
        if self.downsample is not None:
            assert self.downsample_bn is not None
            weight = self.downsample.weight[:out, : x.shape[1]]
            x = F.conv2d(x, weight, None, self.stride if stride is None else stride)
            x = self.downsample_bn(x)
        return F.relu(y + x)

    def masked(
        self,
        x: Float[Tensor, "batch in_ height width"],
        gate: Float[Tensor, "batch routes"],
        mids: Sequence[int],
    ) -> Float[Tensor, "batch out height2 width2"]:
        """The block at middle width mids[-1], masked to each sample's width."""
        outs = [EXPANSION * mid for mid in mids]

        def layer(conv: DSConv2d, norm: nn.Module, x: Tensor, widths: Sequence[int]) -> Tensor:
            y = apply_channel_mask(conv(x, widths[-1]), channel_mask(gate, widths))
            return cast("SwitchableBN", norm).masked(y, gate, widths)

        y = F.relu(layer(self.conv1, self.bn1, x, mids))
        y = F.relu(layer(self.conv2, self.bn2, y, mids))
        y = layer(self.conv3, self.bn3, y, outs)
        if self.downsample is not None:
            assert self.downsample_bn is not None
            x = layer(self.downsample, self.downsample_bn, x, outs)
        return F.relu(y + x)

    def materialize(self, in_: int, mid: int, fold_bn: bool = True) -> "PlainBottleneck":
        """The plain block of one pair of widths."""
        outer = self.materialize_outer(in_, mid, mid, fold_bn)
        return PlainBottleneck(self.materialize_inner(in_, mid, fold_bn), *outer)

    def materialize_inner(self, in_: int, mid: int, fold_bn: bool = True) -> nn.Sequential:
        """`inner` at one pair of widths."""
        return nn.Sequential(
            plain_layer(self.conv1, self.bn1, in_, mid, fold_bn, act="relu"),
            plain_layer(self.conv2, self.bn2, mid, mid, fold_bn, act="relu"),
        )

    def materialize_outer(
        self, in_: int, from_: int, mid: int, fold_bn: bool = True, stride: int | None = None
    ) -> tuple[nn.Module, nn.Module | None]:
        """The third convolution, and the projection if there is one."""
        out = EXPANSION * mid
        last = plain_layer(self.conv3, self.bn3, from_, out, fold_bn)
        if self.downsample is None:
            return last, None
        projection = plain_layer(self.downsample, self.downsample_bn, in_, out, fold_bn)
        if stride is not None:
            projection.conv.stride = (stride, stride)
        return last, projection

    def madds(self, in_: int, from_: int, mid: int, side: int) -> int:
        """Multiply-adds of one image whose map has `side` x `side` pixels at the input.

        Args:
            in_: width of the input.
            from_: width of the first two convolutions.
            mid: a quarter of the output's width.
            side: of the input.
        """
        after, out = -(-side // self.stride), EXPANSION * mid
        total = in_ * from_ * side**2 + (9 * from_ * from_ + from_ * out) * after**2
        return total + (in_ * out * after**2 if self.downsample is not None else 0)

    def params(self, in_: int, from_: int, mid: int) -> int:
        """Weights and affine pairs inside the prefixes, arguments as those of `madds`."""
        out = EXPANSION * mid
        total = in_ * from_ + 9 * from_ * from_ + from_ * out + 4 * from_ + 2 * out
        return total + (in_ * out + 2 * out if self.downsample is not None else 0)


def plain_layer(
    conv: DSConv2d, norm: nn.Module | None, in_: int, out: int, fold_bn: bool, act: str = "none"
) -> ConvAct:
    """A plain convolution with its norm, batch norm folded in, and its activation."""
    norm = cast("SwitchableBN", norm).materialize(out)
    return ConvAct(conv.materialize(in_, out), norm, act, fold_bn)


class PlainBottleneck(nn.Module):
    """A `DSBottleneck` of one pair of widths."""

    def __init__(self, inner: nn.Module, last: nn.Module, projection: nn.Module | None) -> None:
        """Takes the first two layers, the third and the projection if there is one."""
        super().__init__()
        self.inner, self.last, self.projection = inner, last, projection

    def forward(
        self, x: Float[Tensor, "batch in_ height width"]
    ) -> Float[Tensor, "batch out height2 width2"]:
        """ReLU of the branch plus the input or its projection."""
        return self.join(self.inner(x), x)

    def join(self, y: Tensor, x: Tensor) -> Tensor:
        """The third layer and the sum."""
        y = self.last(y)
        y += x if self.projection is None else self.projection(x)
        return F.relu_(y)


class PlainInBlockGate(nn.Module):
    """Two convolutions and the gate; hands on their map and the strided input, side by side."""

    def __init__(self, inner: nn.Module, gate: nn.Module, stride: int) -> None:
        """Takes the plain layers."""
        super().__init__()
        self.inner, self.gate, self.stride = inner, gate, stride

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(features, gate logits)."""
        y, logits = self.gate(self.inner(x))
        return torch.cat([y, x[:, :, :: self.stride, :: self.stride]], 1), logits


class PlainJoin(nn.Module):
    """The third convolution of a block, its projection and their sum, from both maps."""

    def __init__(self, own: int, last: nn.Module, projection: nn.Module | None) -> None:
        """`own` channels are the branch's, the others the block's input."""
        super().__init__()
        self.own, self.last, self.projection = own, last, projection

    def forward(self, features: Tensor) -> Tensor:
        """The block's output."""
        y, x = self.last(features[:, : self.own]), features[:, self.own :]
        return F.relu(y + (x if self.projection is None else self.projection(x)))


class PlainPath(nn.Module):
    """Plain parts in a row, of which some also return gate logits."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        """Takes the parts in order."""
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits."""
        for part in self.parts:
            outputs = part(x)
            x = outputs[0] if isinstance(outputs, tuple) else outputs
        return x
