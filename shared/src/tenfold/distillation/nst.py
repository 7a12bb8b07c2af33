"""Neuron selectivity transfer: the distribution of activation patterns, in two exact forms.

Legend of the shape suffixes: b batch, c and d channels of the student and the teacher, p pixels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.maps import Maps, pool_to_smaller, stage_pairs


@register("nst")
class NSTLoss(DistillationLoss[Maps]):
    r"""Maximum mean discrepancy between the channels' patterns, with a squared kernel.

    Every channel of an image is a point, its map of p pixels scaled to length one. With
    k(a, b) = ⟨a, b⟩² averaged over all pairs of points and over the batch,

    .. math::  L = \sum_{stages} k(t, t) + k(s, s) - 2 k(s, t)

    Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017,
    https://arxiv.org/abs/1707.01219, equation 9 with its polynomial kernel (d = 2, c = 0). The
    larger of two maps is averaged down; channels may differ.

    With A the matrix (channels, pixels) of such points, the sum of ⟨a_i, b_j⟩² over all pairs is
    also ⟨AᵀA, BᵀB⟩, so that where maps are small the loss is the squared distance of two kernels
    (pixels, pixels): no product of channels is built, and nothing cancels.

    Example:
        >>> NSTLoss()(student_maps, teacher_maps).backward()
    """

    signal = "stages"
    default_weight = 50.0

    def forward(self, student: Maps, teacher: Maps) -> Float[Tensor, ""]:
        """Compare maps with maps.

        Args:
            student: one map (batch, channels, height, width) or a list of them.
            teacher: as many, of any channels and sizes; taken as constants.

        Raises:
            UserError: stages or shapes that do not fit.
        """
        pairs = stage_pairs(student, teacher, self.name)
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            return torch.stack([_discrepancy(s, t) for s, t in pairs]).sum()


def _discrepancy(
    student: Float[Tensor, "batch channels_s height_s width_s"],
    teacher: Float[Tensor, "batch channels_t height_t width_t"],
) -> Float[Tensor, ""]:
    s, t = pool_to_smaller(student, teacher)
    s_bcp, t_bdp = (F.normalize(x.flatten(2), dim=2) for x in (s, t))
    pixels, channels = s_bcp.shape[2], min(s_bcp.shape[1], t_bdp.shape[1])
    form = _from_pixel_kernels if pixels <= channels else _from_channel_products
    return form(s_bcp, t_bdp)


def _from_pixel_kernels(
    s_bcp: Float[Tensor, "b c p"], t_bdp: Float[Tensor, "b d p"]
) -> Float[Tensor, ""]:
    k_s, k_t = (x.mT @ x / x.shape[1] for x in (s_bcp, t_bdp))
    return F.mse_loss(k_s, k_t, reduction="sum") / len(k_s)


def _from_channel_products(
    s_bcp: Float[Tensor, "b c p"], t_bdp: Float[Tensor, "b d p"]
) -> Float[Tensor, ""]:
    tt, ss, st = (
        (a @ b.mT).square().mean() for a, b in ((t_bdp, t_bdp), (s_bcp, s_bcp), (s_bcp, t_bdp))
    )
    return tt + ss - 2 * st
