"""Norms that work on a prefix of the channels (DS-Net++ section 3; DS-Net for the batch norm)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ds_net_plus.layers.slicing import apply_channel_mask, channel_mask, check_widths
from tenfold.errors import UserError

BN_EPS = 1e-5
BN_MOMENTUM = 0.1


class SwitchableBN(nn.Module):
    """Batch norm with one set of statistics per width and one affine pair, sliced.

    The statistics are those of the input's own width, an entry of `widths`. `aux_bn[-1]` holds the
    affine parameters. In training mode the active set follows with momentum 0.1 (unbiased variance)
    and the batch counter is left alone, as in the official program.
    """

    def __init__(self, widths: Sequence[int], affine: bool = True) -> None:
        """Makes one statistics set for each of the ascending `widths`, and the affine pair."""
        super().__init__()
        self.widths = check_widths(widths, "norm widths")
        self.aux_bn = nn.ModuleList(
            nn.BatchNorm2d(width, BN_EPS, BN_MOMENTUM, affine and width == self.widths[-1])
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
        self, x: Float[Tensor, "batch channels *space"]
    ) -> Float[Tensor, "batch channels *space"]:
        """Normalises with the statistics of width x.shape[1] (batch statistics in training).

        Raises:
            UserError: in training, a single value of every channel, which has no variance.
        """
        if self.training and x.shape[0] * x.shape[2:].numel() == 1:
            raise UserError(
                "batch norm cannot learn from one image whose map has one pixel",
                fix="choose a larger --data.batch_size, or images of more pixels",
            )
        bn = self.statistics(x.shape[1])
        free = self.aux_bn[-1].weight is None
        scale, shift = (None, None) if free else self.affine(x.shape[1])
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
        means = torch.stack([_pad(bn.running_mean, widths[-1]) for bn in sets])
        vars_ = torch.stack([_pad(bn.running_var, widths[-1]) for bn in sets])
        with torch.autocast(x.device.type, enabled=False):  # statistics in full precision
            mean, var = gate.to(means.dtype) @ means, gate.to(means.dtype) @ vars_
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


class DSGroupNorm(nn.GroupNorm):
    """Group norm with groups of a fixed size, so that it commutes with slicing.

    GN(x)[:, :c] = GN(x[:, :c]) for every multiple c of the group size: one set of weights serves
    every route and no statistics are kept. For networks with several gates.
    """

    def __init__(self, widths: Sequence[int], group_size: int = 16, eps: float = 1e-5) -> None:
        """Stores the affine pair of the widest of the ascending `widths`.

        Raises:
            UserError: a width that is not a multiple of the group size.
        """
        self.widths, self.group_size = check_widths(widths, "norm widths"), group_size
        odd = [width for width in self.widths if group_size < 1 or width % group_size]
        if odd:
            raise UserError(
                f"norm widths {odd} are not multiples of the group size {group_size}",
                fix="choose widths that are, or batch norm",
            )
        super().__init__(self.widths[-1] // group_size, self.widths[-1], eps)

    def forward(
        self, input: Float[Tensor, "batch channels *space"]
    ) -> Float[Tensor, "batch channels *space"]:
        """Normalises the groups that the input has."""
        width = input.shape[1]
        groups = width // self.group_size
        return F.group_norm(input, groups, self.weight[:width], self.bias[:width], self.eps)

    def masked(
        self,
        x: Float[Tensor, "batch channels height width"],
        gate: Float[Tensor, "batch routes"],
        widths: Sequence[int],
    ) -> Float[Tensor, "batch channels height width"]:
        """The norm at widths[-1], masked to each sample's width: no group crosses a width."""
        return apply_channel_mask(self(x), channel_mask(gate, widths))

    def materialize(self, width: int) -> nn.GroupNorm:
        """The plain group norm of one width."""
        plain = nn.GroupNorm(width // self.group_size, width, self.eps)
        plain.weight.data = self.weight[:width].detach().clone()
        plain.bias.data = self.bias[:width].detach().clone()
        return plain


class DSLayerNorm(nn.LayerNorm):
    """Layer norm over the active features: statistics of these alone, affine pair sliced."""

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        """Stores the affine pair of the largest number of features."""
        super().__init__(features, eps)

    def forward(self, input: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Normalises the last dimension, whatever its width."""
        width = input.shape[-1]
        return F.layer_norm(input, (width,), self.weight[:width], self.bias[:width], self.eps)

    def masked(
        self,
        x: Float[Tensor, "batch tokens features"],
        mask: Float[Tensor, "batch 1 features"],
    ) -> Float[Tensor, "batch tokens features"]:
        """Normalises over the features that each sample's mask keeps, and masks the result."""
        count = mask.sum(-1, keepdim=True)
        mean = (x * mask).sum(-1, keepdim=True) / count
        var = ((x - mean).square() * mask).sum(-1, keepdim=True) / count
        width = x.shape[-1]
        y = (x - mean) * torch.rsqrt(var + self.eps) * self.weight[:width] + self.bias[:width]
        return y * mask

    def materialize(self, width: int) -> nn.LayerNorm:
        """The plain layer norm of one width."""
        plain = nn.LayerNorm(width, self.eps)
        plain.weight.data = self.weight[:width].detach().clone()
        plain.bias.data = self.bias[:width].detach().clone()
        return plain
