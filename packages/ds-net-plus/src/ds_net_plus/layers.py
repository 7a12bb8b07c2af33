"""Sliceable layers: each stores its largest tensor and computes with a prefix of it.

The active output size is an argument of the call and the active input size is read from the input,
so no layer carries hidden state. Every layer can `materialize` into the plain layer of one width.

Sources: DS-Net (CVPR 2021) and DS-Net++ (TPAMI 2022), dynamic weight slicing; DS-Net section 3.3
for the double-headed gate.
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
        return F.conv2d(
            input, self.weight[:out, : input.shape[1]], bias, self.stride, self.padding, self.dilation
        )

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


class MultiHeadGate(nn.Module):
    """Double-headed gate (DS-Net section 3.3): channel attention and route logits from one squeeze.

    z = mean over space of X; h = ReLU(W1[:, :C] z + b1); a = sigmoid(W2[:C] h + b2[:C]);
    X' = X a; route logits = W3 h. The squeeze width is int(squeeze_ratio * channels), whatever C.
    """

    def __init__(
        self,
        channels: int,
        outputs: int = 0,
        squeeze_ratio: float = 0.25,
        attention: str = "sigmoid",
    ) -> None:
        """Makes the attention head and, where `outputs` > 0, the slimming head.

        Args:
            channels: the largest number of input channels.
            outputs: number of route logits, 0 for an attention head alone.
            squeeze_ratio: squeeze width over channels.
            attention: "sigmoid", or "tanh1p": X (1 + tanh(.)), which starts as the identity.
        """
        super().__init__()
        if attention not in ("sigmoid", "tanh1p"):
            raise UserError(f"attention must be 'sigmoid' or 'tanh1p', got {attention!r}")
        hidden = int(squeeze_ratio * channels)
        self.attention = attention
        self.conv_reduce = nn.Conv2d(channels, hidden, 1)
        self.conv_expand = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False)) if outputs else None

    def squeeze(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch hidden"]:
        """h, the vector that both heads read."""
        z = x.mean((2, 3))
        weight = self.conv_reduce.weight[:, : x.shape[1], 0, 0]
        return F.relu(F.linear(z, weight, self.conv_reduce.bias))

    def excite(
        self, hidden: Float[Tensor, "batch hidden"], channels: int
    ) -> Float[Tensor, "batch channels"]:
        """Attention before its nonlinearity, for the first `channels` channels."""
        assert self.conv_expand.bias is not None
        weight = self.conv_expand.weight[:channels, :, 0, 0]
        return F.linear(hidden, weight, self.conv_expand.bias[:channels])

    def rescale(
        self,
        x: Float[Tensor, "batch channels height width"],
        excitation: Float[Tensor, "batch channels"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Multiplies each channel of `x` by its attention."""
        return x * _attention(excitation, self.attention)[:, :, None, None]

    def logits(self, hidden: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch outputs"]:
        """Route logits, before any noise."""
        assert self.gate is not None, "this gate has no slimming head"
        return F.linear(hidden, self.gate[0].weight[:, :, 0, 0])  # pyright: ignore[reportArgumentType]

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The attention head alone: X'."""
        return self.rescale(x, self.excite(self.squeeze(x), x.shape[1]))

    def masked(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Float[Tensor, "batch channels"],
    ) -> Float[Tensor, "batch channels height width"]:
        """The attention head with its expansion masked before the nonlinearity."""
        return self.rescale(x, self.excite(self.squeeze(x), x.shape[1]) * mask)

    def materialize(self, channels: int, slimming: bool = False) -> "PlainGate":
        """The gate of one width, as two plain linear layers (three with the slimming head)."""
        layers = [
            _linear(self.conv_reduce.weight[:, :channels, 0, 0], self.conv_reduce.bias),
            _linear(
                self.conv_expand.weight[:channels, :, 0, 0],
                None if self.conv_expand.bias is None else self.conv_expand.bias[:channels],
            ),
        ]
        if slimming:
            assert self.gate is not None
            layers.append(_linear(self.gate[0].weight[:, :, 0, 0], None))  # pyright: ignore[reportArgumentType]
        return PlainGate(layers, self.attention)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    plain.weight.data = weight.detach().clone()
    if bias is not None:
        plain.bias.data = bias.detach().clone()
    return plain


def _attention(excitation: Tensor, kind: str) -> Tensor:
    return torch.sigmoid(excitation) if kind == "sigmoid" else 1 + torch.tanh(excitation)


class PlainGate(nn.Module):
    """`MultiHeadGate` at one width; with three layers it also returns the route logits."""

    def __init__(self, layers: Sequence[nn.Linear], attention: str) -> None:
        """Takes the reduce, expand and (for a gate block) slimming layers."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """X', or (X', route logits) where the slimming head is present."""
        hidden = F.relu(self.layers[0](x.mean((2, 3))))
        y = x * _attention(self.layers[1](hidden), self.attention)[:, :, None, None]
        return (y, self.layers[2](hidden)) if len(self.layers) == 3 else y


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
        self, x: Float[Tensor, "batch in_ height width"]
    ) -> Float[Tensor, "batch in_ height2 width2"]:
        """The part before the gate."""
        return F.silu(self.bn1(self.conv_dw(x)))

    def pointwise(
        self, x: Float[Tensor, "batch in_ height width"], out: int
    ) -> Float[Tensor, "batch out_ height width"]:
        """The part after the gate."""
        return F.silu(self.bn2(self.conv_pw(x, out)))

    def forward(
        self, x: Float[Tensor, "batch in_ height width"], out: int
    ) -> Float[Tensor, "batch out_ height2 width2"]:
        """The block at input width x.shape[1] and output width `out`."""
        return self.pointwise(self.gate(self.depthwise(x)), out)

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
    ) -> Float[Tensor, "batch out height2 width2"]:
        """The block computed at its widest and masked, differentiable in the gate."""
        mask = channel_mask(gate, in_widths)
        y = apply_channel_mask(self.conv_dw(x), mask)
        y = self.gate.masked(F.silu(self.bn1.masked(y, gate, in_widths)), mask)
        return self.masked_pointwise(y, gate, out_widths)

    def materialize(self, in_: int, out: int, fold_bn: bool = True) -> nn.Sequential:
        """The plain block of one pair of widths."""
        return nn.Sequential(
            self.materialize_depthwise(in_, fold_bn),
            self.gate.materialize(in_),
            self.materialize_pointwise(in_, out, fold_bn),
        )

    def materialize_depthwise(self, in_: int, fold_bn: bool = True) -> ConvAct:
        """`depthwise` at one width."""
        conv, bn = self.conv_dw.materialize(in_), self.bn1.materialize(in_)
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

    def forward(
        self, x: Float[Tensor, "batch in_ height width"], out: int
    ) -> Float[Tensor, "batch out_ height2 width2"]:
        """The block at input width x.shape[1] and output width `out`."""
        middle = self.middle[self.in_widths.index(x.shape[1])]
        y = F.silu(self.bn1(self.conv_pw(x, middle)))
        y = self.gate(F.silu(self.bn2(self.conv_dw(y))))
        y = self.bn3(self.conv_pwl(y, out))
        return x + y if self.residual else y


def init_official(module: nn.Module) -> None:
    """Convolutions N(0, sqrt(2 / fan_out)) with fan_out = k k out / groups, batch norms 1 and 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 * layer.groups / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
