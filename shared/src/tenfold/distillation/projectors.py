"""Adaptors between a student's and a teacher's features: trained with the student, thrown away.

Submodules carry the names of the published programs, so that their state dicts load.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.errors import UserError


class Embedding(nn.Module):
    """1x1 convolution and batch norm that lift a map to other channels (ICKD, section 3.2).

    Args:
        channels_in: channels of the student's map.
        channels_out: channels of the teacher's.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.l2norm = nn.BatchNorm2d(channels_out)

    def forward(
        self, x: Float[Tensor, "batch channels_in height width"]
    ) -> Float[Tensor, "batch channels_out height width"]:
        """Lift a map.

        Raises:
            UserError: other channels than it was made for, or a batch of one pixel in training,
                whose statistics do not exist.
        """
        check_input(x, self.conv2d.in_channels, "the embedding")
        return self.l2norm(_for_batch_norm(self.conv2d(x), self.training, "the embedding"))


class ConvReg(nn.Module):
    """Convolution and batch norm that bring a map to another width and size (FitNets).

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015,
    https://arxiv.org/abs/1412.6550, section 2.2, in the form of the CIFAR comparison of CRD's
    authors: a stride where the student is twice as large, a transposed convolution where it is half
    as large, a kernel of one more than the difference where it is larger by anything else. Where it
    is smaller by anything else, a 1x1 convolution that leaves the size to the loss.

    Args:
        shape_in: (channels, height, width) of the student's map.
        shape_out: likewise of the teacher's.
        relu: end in a ReLU, as hints after their activation want it.
    """

    def __init__(
        self, shape_in: Sequence[int], shape_out: Sequence[int], relu: bool = True
    ) -> None:
        super().__init__()
        (channels_in, *size_in), (channels_out, *size_out) = shape_in, shape_out
        self.channels_in = channels_in
        if size_in[0] == 2 * size_out[0]:
            self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
        elif 2 * size_in[0] == size_out[0]:
            self.conv = nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1)
        else:
            more = [a - b for a, b in zip(size_in, size_out, strict=True)]
            kernel = (1 + more[0], 1 + more[1]) if min(more) >= 0 else (1, 1)
            self.conv = nn.Conv2d(channels_in, channels_out, kernel)
        self.bn = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch channels_in height_in width_in"]
    ) -> Float[Tensor, "batch channels_out height_out width_out"]:
        """Bring a map to the teacher's shape.

        Raises:
            UserError: as `Embedding`.
        """
        check_input(x, self.channels_in, "the regressor")
        return self.relu(self.bn(_for_batch_norm(self.conv(x), self.training, "the regressor")))


def boundary_connector(shape_in: Sequence[int], shape_out: Sequence[int]) -> nn.Module:
    """The adaptor of activation boundaries: nothing for equal shapes, else `ConvReg` without ReLU.

    Args:
        shape_in: (channels, height, width) of the student's map.
        shape_out: likewise of the teacher's.
    """
    if tuple(shape_in) == tuple(shape_out):
        return nn.Identity()
    return ConvReg(shape_in, shape_out, relu=False)


class NormedConv(nn.Sequential):
    """Convolution without bias and batch norm, without activation, that keep the size of a map.

    The adaptor of the overhaul of feature distillation (1x1), and a part of ReviewKD's fusion.

    Args:
        channels_in: channels of the map it takes.
        channels_out: channels of the map it gives.
        kernel: its odd size.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 1) -> None:
        conv = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(channels_out))
        self.channels_in = channels_in

    def forward(
        self, input: Float[Tensor, "batch channels_in height width"]
    ) -> Float[Tensor, "batch channels_out height width"]:
        """Convolve and normalize.

        Raises:
            UserError: as `Embedding`.
        """
        check_input(input, self.channels_in, "the connector")
        return self[1](_for_batch_norm(self[0](input), self.training, "the connector"))


class Paraphraser(nn.Module):
    """Autoencoder of the teacher's last map, whose code is the factor to transfer.

    Kim et al., "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS
    2018, https://arxiv.org/abs/1802.04977, section 3.1: three 3x3 convolutions, C to C to rate·C to
    rate·C, and three transposed ones back, each followed by a leaky ReLU of 0.1.

    Args:
        channels: C, those of the teacher's map.
        rate: of the factor's channels to them.
    """

    def __init__(self, channels: int, rate: float = 0.5) -> None:
        super().__init__()
        factor = factor_channels(channels, rate)
        self.channels = channels
        self.encoder = _encoder(channels, factor, normed=False)
        layers: list[nn.Module] = []
        for inner, outer in ((factor, factor), (factor, channels), (channels, channels)):
            conv = nn.ConvTranspose2d(inner, outer, 3, padding=1)
            layers += [conv, nn.Identity(), nn.LeakyReLU(0.1)]
        self.decoder = nn.Sequential(*layers)

    def factor(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch factor height width"]:
        """The code of a map.

        Raises:
            UserError: other channels than it was made for.
        """
        check_input(x, self.channels, "the paraphraser")
        return self.encoder(x)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The map as the code tells it."""
        return self.decoder(self.factor(x))


class Translator(nn.Module):
    """The student's side of factor transfer: the paraphraser's encoder with batch norms.

    Args:
        channels_in: channels of the student's map.
        channels_out: channels of the teacher's; the factor has ``rate`` of them.
        rate: that of the paraphraser.
    """

    def __init__(self, channels_in: int, channels_out: int, rate: float = 0.5) -> None:
        super().__init__()
        self.channels_in = channels_in
        self.encoder = _encoder(channels_in, factor_channels(channels_out, rate), normed=True)

    def forward(
        self, x: Float[Tensor, "batch channels_in height width"]
    ) -> Float[Tensor, "batch factor height width"]:
        """The factor of a map.

        Raises:
            UserError: as `Embedding`.
        """
        check_input(x, self.channels_in, "the translator")
        return self.encoder(_for_batch_norm(x, self.training, "the translator"))


def factor_channels(channels: int, rate: float) -> int:
    """Channels of the factor of a map.

    Raises:
        ValueError: a rate that leaves none.
    """
    if not int(channels * rate) > 0:
        raise ValueError(f"a rate of {rate:g} leaves no factor of {channels} channels")
    return int(channels * rate)


def _encoder(channels: int, factor: int, *, normed: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in ((channels, channels), (channels, factor), (factor, factor)):
        conv = nn.Conv2d(inner, outer, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(outer) if normed else nn.Identity(), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class ABF(nn.Module):
    """Attention-based fusion of a student's map with what deeper maps carried up (ReviewKD).

    Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021,
    https://arxiv.org/abs/2104.09044, section 3.3.

    Args:
        channels_in: channels of the student's map.
        channels_mid: those of what is carried on.
        channels_out: those of the teacher's map of this level.
        fuse: without it, as in the deepest block, nothing is carried in.
    """

    def __init__(
        self, channels_in: int, channels_mid: int, channels_out: int, fuse: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = NormedConv(channels_in, channels_mid)
        self.conv2 = NormedConv(channels_mid, channels_out, kernel=3)
        self.att_conv: nn.Sequential | None = None
        if fuse:
            self.att_conv = nn.Sequential(nn.Conv2d(2 * channels_mid, 2, 1), nn.Sigmoid())

    def forward(
        self,
        x: Float[Tensor, "batch channels_in height width"],
        carried: Float[Tensor, "batch channels_mid _ _"] | None = None,
        size: Sequence[int] | None = None,
    ) -> tuple[
        Float[Tensor, "batch channels_out height_out width_out"],
        Float[Tensor, "batch channels_mid height_out width_out"],
    ]:
        """Fuse a map and what was carried in.

        Args:
            x: the student's map of this level.
            carried: what the deeper block carried on, if this one fuses.
            size: (height, width) of the results, those of the map if left out.

        Returns:
            The map that the teacher's is compared with, and what is carried on.

        Raises:
            ValueError: something carried in where nothing is fused, or the contrary.
            UserError: as `Embedding`.
        """
        if (carried is None) != (self.att_conv is None):
            raise ValueError("a block that fuses, and only such a block, needs what is carried in")
        x = self.conv1(x)
        if carried is not None and self.att_conv is not None:
            carried = _resize(carried, x.shape[2:])
            weight = self.att_conv(torch.cat([x, carried], dim=1))
            x = x * weight[:, :1] + carried * weight[:, 1:]
        x = _resize(x, x.shape[2:] if size is None else size)
        return self.conv2(x), x


def _resize(
    x: Float[Tensor, "batch channels _ _"], size: Sequence[int]
) -> Float[Tensor, "batch channels height width"]:
    height, width = size
    return x if x.shape[2:] == (height, width) else F.interpolate(x, (height, width))


def check_input(x: Tensor, channels: int, who: str) -> None:
    """Refuse what is not a map of the channels that an adaptor was made for.

    Raises:
        UserError: naming both.
    """
    if x.ndim != 4 or x.shape[1] != channels:
        wanted = f"(batch, {channels}, height, width)"
        raise UserError(f"{who} takes maps {wanted}, got {tuple(x.shape)}")


def _for_batch_norm(x: Tensor, training: bool, who: str) -> Tensor:
    """Tell a batch whose statistics do not exist in a person's words."""
    if training and x.numel() == x.shape[1]:
        what = f"{who}'s batch norm cannot train on a single image of a single pixel"
        raise UserError(what, fix="use batches of two or more images")
    return x
