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

from tenfold.attention import slice_linear
from tenfold.errors import UserError


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


def official_padding(kernel_size: int, stride: int, dilation: int = 1) -> int:
    """((stride - 1) + dilation * (kernel_size - 1)) // 2, the official program's padding."""
    return ((stride - 1) + dilation * (kernel_size - 1)) // 2


class _DSConv(nn.Conv2d):
    """What both convolutions share: the centre of the kernel, and the padding that goes with it."""

    def _centre(self, weight: Tensor, kernel: int | None) -> tuple[Tensor, tuple[int, int]]:
        """The weight's inner kernel x kernel taps (all where None), and their padding.

        Raises:
            UserError: a kernel that is larger than the stored one or not centred in it.
        """
        largest = self.kernel_size[0]
        if kernel is None or kernel == largest:
            return weight, (int(self.padding[0]), int(self.padding[1]))
        if not 0 < kernel < largest or (largest - kernel) % 2:
            allowed = list(range(2 - largest % 2, largest + 1, 2))
            raise UserError(f"kernel {kernel} is not the centre of {largest}, choose of {allowed}")
        edge = (largest - kernel) // 2
        padding = official_padding(kernel, self.stride[0], self.dilation[0])
        return weight[:, :, edge:-edge, edge:-edge], (padding, padding)

    def _plain(self, weight: Tensor, kernel: int | None, groups: int) -> nn.Conv2d:
        weight, padding = self._centre(weight, kernel)
        out = weight.shape[0]
        plain = nn.Conv2d(
            weight.shape[1] * groups,
            out,
            (weight.shape[2], weight.shape[3]),
            self.stride,  # pyright: ignore[reportArgumentType]
            padding,
            self.dilation,  # pyright: ignore[reportArgumentType]
            groups,
            self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        plain.weight.data = weight.detach().clone(memory_format=torch.contiguous_format)
        if self.bias is not None:
            assert plain.bias is not None
            plain.bias.data = self.bias[:out].detach().clone()
        return plain


class DSConv2d(_DSConv):
    """Convolution over the first channels of its input into the first `out` outputs.

    On request with the centre of its kernel alone, such as the 3x3 of a 5x5 (kernel slicing of
    DS-Net++). The padding is that of the official program, see `official_padding`.
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
        padding = official_padding(kernel_size, stride, dilation)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, 1, bias)

    def forward(
        self,
        input: Float[Tensor, "batch in_ height width"],
        out: int | None = None,
        kernel: int | None = None,
    ) -> Float[Tensor, "batch out_ height2 width2"]:
        """Computes the first `out` output channels with the inner `kernel` taps (None: all)."""
        bias = None if self.bias is None else self.bias[:out]
        weight, padding = self._centre(self.weight[:out, : input.shape[1]], kernel)
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation)

    def materialize(self, in_: int, out: int, kernel: int | None = None) -> nn.Conv2d:
        """The plain convolution of one pair of widths, with its own contiguous weight."""
        return self._plain(self.weight[:out, :in_], kernel, groups=1)


class DSDepthwiseConv2d(_DSConv):
    """Depthwise convolution of the first channels; its width is that of the input."""

    def __init__(
        self, channels: int, kernel_size: int = 3, stride: int = 1, bias: bool = False
    ) -> None:
        """Stores the weight (channels, 1, kernel_size, kernel_size)."""
        padding = official_padding(kernel_size, stride)
        super().__init__(
            channels, channels, kernel_size, stride, padding, groups=channels, bias=bias
        )

    def forward(
        self, input: Float[Tensor, "batch channels height width"], kernel: int | None = None
    ) -> Float[Tensor, "batch channels height2 width2"]:
        """Filters every channel of `input` by the inner `kernel` taps (None: all) of its own."""
        channels = input.shape[1]
        bias = None if self.bias is None else self.bias[:channels]
        weight, padding = self._centre(self.weight[:channels], kernel)
        return F.conv2d(input, weight, bias, self.stride, padding, 1, groups=channels)

    def materialize(self, channels: int, kernel: int | None = None) -> nn.Conv2d:
        """The plain depthwise convolution of one width."""
        return self._plain(self.weight[:channels], kernel, groups=channels)


class DSLinear(nn.Linear):
    """Linear layer that reads the first features of its input; all outputs are computed."""

    def forward(self, input: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        """W[:, :in_] x + b."""
        return F.linear(input, self.weight[:, : input.shape[-1]], self.bias)

    def materialize(self, in_: int, share_storage: bool = False) -> nn.Linear:
        """The plain linear layer of one input width, see `tenfold.attention.slice_linear`."""
        return slice_linear(self, in_, self.out_features, share_storage)


class NoClassifier(nn.Module):
    """Stands for the classifier of a network without classes: hands on the features.

    Those of narrow routes are zero-padded, so that a batch of several routes has one width.
    """

    def __init__(self, features: int) -> None:
        """`features` of the widest route."""
        super().__init__()
        self.features = features

    def forward(self, input: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch features"]:
        """Zeros behind the features that there are."""
        return F.pad(input, (0, self.features - input.shape[-1]))

    def materialize(self, in_: int, share_storage: bool = False) -> "NoClassifier":
        """The same for every width."""
        return NoClassifier(self.features)


def make_classifier(features: int, num_classes: int) -> DSLinear | NoClassifier:
    """A linear layer from the features of the widest route; with 0 classes the features."""
    return DSLinear(features, num_classes) if num_classes else NoClassifier(features)


class ConvAct(nn.Module):
    """A convolution, its norm (a batch norm folded in), and the activation after it, in place."""

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | nn.GroupNorm,
        act: str = "silu",
        fold_bn: bool = True,
    ) -> None:
        """Folds a batch norm into `conv`; another norm, or one not to be folded, stays behind.

        Args:
            conv: a plain convolution.
            norm: of its output.
            act: "silu", "relu" or "none".
            fold_bn: whether to fold.
        """
        super().__init__()
        self.conv, self.norm = conv, norm
        if fold_bn and isinstance(norm, nn.BatchNorm2d):
            self.conv, self.norm = fuse_conv_bn_eval(conv.eval(), norm.eval()), None
        self.act = act

    def forward(
        self, x: Float[Tensor, "batch in_ height width"]
    ) -> Float[Tensor, "batch out height2 width2"]:
        """act(norm(conv(x)))."""
        y = self.conv(x)
        return activate(y if self.norm is None else self.norm(y), self.act)


def activate(x: Tensor, act: str) -> Tensor:
    """The activation of that name, in place."""
    if act == "silu":
        return F.silu(x, inplace=True)
    return F.relu_(x) if act == "relu" else x


def init_official(module: nn.Module) -> None:
    """Convolutions N(0, sqrt(2 / fan_out)) with fan_out = k k out / groups, batch norms 1 and 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 * layer.groups / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
