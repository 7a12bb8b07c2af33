"""The flow of a solution procedure: how the channels of one layer go with those of the next."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.maps import Maps, pool_to_smaller, stage_pairs


def flow_matrix(
    bottom: Float[Tensor, "batch channels_bottom height_bottom width_bottom"],
    top: Float[Tensor, "batch channels_top height_top width_top"],
) -> Float[Tensor, "batch channels_bottom channels_top"]:
    """Inner products of the channels of two maps, averaged over pixels.

    The larger map is averaged down to the size of the smaller.
    """
    bottom, top = pool_to_smaller(bottom, top)
    return bottom.flatten(2) @ top.flatten(2).mT / top[0, 0].numel()


@register("fsp")
class FSPLoss(DistillationLoss[Maps]):
    r"""Mean squared difference of the flow matrices between consecutive maps.

    .. math::  L = \sum_i \operatorname{mean}\, (M^s_i - M^t_i)^2, \qquad
               M_i = \frac{1}{p} \sum_{pixels} f_i \otimes f_{i+1}

    Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
    Transfer Learning", CVPR 2017, equations 1 and 2 (the mean over all entries, as in the CIFAR
    comparison of CRD's authors). It prepares the trunk of the student before the task is trained.
    Both networks need equal widths stage by stage; sizes may differ.

    Example:
        >>> FSPLoss()(student_maps, teacher_maps).backward()
    """

    signal = "trunk"
    default_weight = 50.0
    stage = "init"

    def forward(self, student: Maps, teacher: Maps) -> Float[Tensor, ""]:
        """Compare maps with maps.

        Args:
            student: two or more maps (batch, channels, height, width), from shallow to deep.
            teacher: as many, of the same channels; taken as constants.

        Raises:
            UserError: stages or shapes that do not fit.
        """
        pairs = stage_pairs(student, teacher, self.name, channels=True, at_least=2)
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            terms = [
                F.mse_loss(flow_matrix(s_bottom, s_top), flow_matrix(t_bottom, t_top))
                for (s_bottom, t_bottom), (s_top, t_top) in pairwise(pairs)
            ]
            return torch.stack(terms).sum()
