"""Sliceable layers: each stores its largest tensor and computes with a prefix of it.

The active output size is an argument of the call and the active input size is read from the input,
so no layer carries hidden state. Every layer can `materialize` into the plain layer of one width.

Source: DS-Net (CVPR 2021) and DS-Net++ (TPAMI 2022), dynamic weight slicing.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tenfold.errors import UserError

BN_EPS = 1e-5
BN_MOMENTUM = 0.1


def check_widths(widths: Sequence[int], what: str) -> tuple[int, ...]:
    """Returns `widths` as a tuple of ascending positive channel counts.

    Raises:
        UserError: the list is empty, not strictly ascending, or holds a width below 1.
    """
    widths = tuple(int(width) for width in widths)
    if not widths or widths[0] < 1 or any(low >= high for low, high in pairwise(widths)):
        raise UserError(
            f"{what} must be a non-empty, strictly ascending list of positive widths, "
            f"got {list(widths)}",
            fix="list each channel count once, smallest first",
        )
    return widths


def channel_mask(
    gate: Float[Tensor, "batch routes"], widths: Sequence[int]
) -> Float[Tensor, "batch channels"]:
    """Soft membership of each channel: 1 where every route in the gate's support keeps it."""
    channels = torch.arange(widths[-1], device=gate.device)
    table = channels < torch.tensor(widths, device=gate.device)[:, None]
    return gate @ table.to(gate.dtype)


def apply_channel_mask(
    x: Float[Tensor, "batch channels height width"], mask: Float[Tensor, "batch channels"]
) -> Float[Tensor, "batch channels height width"]:
    """Scales each channel of each sample; the gradient reaches the gate through the mask."""
    return x * mask[:, :, None, None]


class DSConv2d(nn.Conv2d):
    """Convolution over the first channels of its input into the first `out` outputs.

    Padding is ((stride - 1) + dilation * (kernel - 1)) // 2, that of the official program.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = False,
    ) -> None:
        """Stores the weight (out_channels, in_channels, kernel_size, kernel_size)."""
        padding = ((stride - 1) + dilation * (kernel_size - 1)) // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, 1, bias)

    def forward(
        self, input: Float[Tensor, "batch in_ height width"], out: int | None = None
    ) -> Float[Tensor, "batch out_ height2 width2"]:
        """Computes the first `out` output channels (all where None)."""
        bias = None if self.bias is None else self.bias[:out]
        weight = self.weight[:out, : input.shape[1]]
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation)

    def materialize(self, in_: int, out: int) -> nn.Conv2d:
        """The plain convolution of one pair of widths, with its own contiguous weight."""
        return _plain_conv(self, self.weight[:out, :in_], out, groups=1)


class DSDepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of the first channels; its width is that of the input."""

    def __init__(
        self, channels: int, kernel_size: int = 3, stride: int = 1, bias: bool = False
    ) -> None:
        """Stores the weight (channels, 1, kernel_size, kernel_size)."""
        padding = ((stride - 1) + (kernel_size - 1)) // 2
        super().__init__(
            channels, channels, kernel_size, stride, padding, groups=channels, bias=bias
        )

    def forward(
        self, input: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height2 width2"]:
        """Filters every channel of `input` by its own kernel."""
        channels = input.shape[1]
        bias = None if self.bias is None else self.bias[:channels]
        return F.conv2d(
            input, self.weight[:channels], bias, self.stride, self.padding, 1, groups=channels
        )

    def materialize(self, channels: int) -> nn.Conv2d:
        """The plain depthwise convolution of one width."""
        return _plain_conv(self, self.weight[:channels], channels, groups=channels)


def _plain_conv(conv: nn.Conv2d, weight: Tensor, out: int, groups: int) -> nn.Conv2d:
    plain = nn.Conv2d(
        weight.shape[1] * groups,
        out,
        (weight.shape[2], weight.shape[3]),
        conv.stride,  # pyright: ignore[reportArgumentType]
        conv.padding,  # pyright: ignore[reportArgumentType]
        conv.dilation,  # pyright: ignore[reportArgumentType]
        groups,
        conv.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    plain.weight.data = weight.detach().clone()
    if conv.bias is not None:
        assert plain.bias is not None
        plain.bias.data = conv.bias[:out].detach().clone()
    return plain


class DSLinear(nn.Linear):
    """Linear layer that reads the first features of its input; all outputs are computed."""

    def forward(self, input: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        """W[:, :in_] x + b."""
        return F.linear(input, self.weight[:, : input.shape[-1]], self.bias)

    def materialize(self, in_: int) -> nn.Linear:
        """The plain linear layer of one input width."""
        plain = nn.Linear(
            in_,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        plain.weight.data = self.weight[:, :in_].detach().clone()
        if self.bias is not None:
            plain.bias.data = self.bias.detach().clone()
        return plain


class SwitchableBN(nn.Module):
    """Batch norm with one set of statistics per width and one affine pair, sliced.

    The statistics are those of the input's own width, an entry of `widths`. `aux_bn[-1]` holds the
    affine parameters. In training mode the active set follows with momentum 0.1 (unbiased variance)
    and the batch counter is left alone, as in the official program.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        """Makes one statistics set for each of the ascending `widths`."""
        super().__init__()
        self.widths = check_widths(widths, "norm widths")
        self.aux_bn = nn.ModuleList(
            nn.BatchNorm2d(width, BN_EPS, BN_MOMENTUM, affine=width == self.widths[-1])
            for width in self.widths
        )

    def statistics(self, width: int) -> nn.BatchNorm2d:
        """The statistics set of one width.

        Raises:
            UserError: `width` is not one of the layer's widths.
        """
        if width not in self.widths:
            raise UserError(f"width {width} is none of the norm's widths {list(self.widths)}")
        bn = self.aux_bn[self.widths.index(width)]
        assert isinstance(bn, nn.BatchNorm2d)
        return bn

    def affine(self, width: int) -> tuple[Tensor, Tensor]:
        """The first `width` entries of the shared scale and shift."""
        return self.aux_bn[-1].weight[:width], self.aux_bn[-1].bias[:width]  # pyright: ignore[reportIndexIssue, reportReturnType]

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Normalises with the statistics of width x.shape[1] (batch statistics in training)."""
        bn = self.statistics(x.shape[1])
        scale, shift = self.affine(x.shape[1])
        return F.batch_norm(
            x,
            bn.running_mean,
            bn.running_var,
            scale,
            shift,
            self.training,
            bn.momentum or 0.0,
            bn.eps,
        )

    def masked(
        self,
        x: Float[Tensor, "batch channels height width"],
        gate: Float[Tensor, "batch routes"],
        widths: Sequence[int],
    ) -> Float[Tensor, "batch channels height width"]:
        """Normalises each sample with the gate's mixture of statistics, then masks it.

        mean = sum_k g_k pad(mean_k) and likewise the variance, zero padded to widths[-1] channels.
        With a one-hot gate this is the sliced layer, and the gate gets a gradient through mean,
        variance and mask.
        """
        sets = [self.statistics(width) for width in widths]
        mean = gate @ torch.stack([_pad(bn.running_mean, widths[-1]) for bn in sets])
        var = gate @ torch.stack([_pad(bn.running_var, widths[-1]) for bn in sets])
        scale, shift = self.affine(widths[-1])
        gain = scale * torch.rsqrt(var + BN_EPS)
        y = x * gain[:, :, None, None] + (shift - mean * gain)[:, :, None, None]
        return apply_channel_mask(y, channel_mask(gate, widths))

    def materialize(self, width: int) -> nn.BatchNorm2d:
        """The plain batch norm of one width, in eval mode."""
        bn = self.statistics(width)
        scale, shift = self.affine(width)
        plain = nn.BatchNorm2d(width, BN_EPS).to(scale.device, scale.dtype)
        plain.weight.data, plain.bias.data = scale.detach().clone(), shift.detach().clone()
        assert bn.running_mean is not None
        assert bn.running_var is not None
        plain.running_mean = bn.running_mean.clone()
        plain.running_var = bn.running_var.clone()
        return plain.eval()


def _pad(statistic: Tensor | None, width: int) -> Tensor:
    assert statistic is not None
    return F.pad(statistic, (0, width - statistic.shape[0]))


class ConvAct(nn.Module):
    """A convolution with its batch norm folded in, and the activation after it, in place."""

    def __init__(
        self, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: bool = True, fold_bn: bool = True
    ) -> None:
        """Folds `bn` into `conv`, or keeps it behind; SiLU follows unless `act` is false."""
        super().__init__()
        self.conv = fuse_conv_bn_eval(conv.eval(), bn.eval()) if fold_bn else conv
        self.bn = None if fold_bn else bn
        self.act = act

    def forward(
        self, x: Float[Tensor, "batch in_ height width"]
    ) -> Float[Tensor, "batch out height2 width2"]:
        """SiLU(conv(x))."""
        y = self.conv(x) if self.bn is None else self.bn(self.conv(x))
        return F.silu(y, inplace=True) if self.act else y


def init_official(module: nn.Module) -> None:
    """Convolutions N(0, sqrt(2 / fan_out)) with fan_out = k k out / groups, batch norms 1 and 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 * layer.groups / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
