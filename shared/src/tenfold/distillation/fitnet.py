"""Hints of an inner map (FitNets)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.maps import adapt, pool_to_smaller, stage_pairs
from tenfold.distillation.projectors import ConvReg
from tenfold.distillation.taps import Taps, check_maps


@register("fitnet")
class FitNetLoss(DistillationLoss[Tensor]):
    r"""Mean squared error between a map of the teacher and a regression of it from the student's.

    .. math::  L = \operatorname{mean}\, (R(f^s) - f^t)^2

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015,
    https://arxiv.org/abs/1412.6550, equation 3, trained together with the task as in the CIFAR
    comparison of CRD's authors, on the feature F_2. If the regressed map and the teacher's differ
    in size, the larger is averaged down.

    Example:
        >>> loss = FitNetLoss((32, 16, 16), (64, 16, 16))
        >>> loss(student_map, teacher_map).backward()

    Args:
        shape_s: (channels, height, width) of the student's map.
        shape_t: likewise of the teacher's.
    """

    signal = "hint"
    default_weight = 100.0

    def __init__(self, shape_s: Sequence[int], shape_t: Sequence[int]) -> None:
        super().__init__()
        self.regressor = ConvReg(shape_s, shape_t)

    @classmethod
    def for_taps(cls, student: Taps, teacher: Taps, **kwargs: Any) -> FitNetLoss:
        """Build the loss for two networks; see `DistillationLoss.for_taps`."""
        maps = student.signal(cls.signal), teacher.signal(cls.signal)
        check_maps(*maps, cls.name)
        return cls(maps[0].shape[1:], maps[1].shape[1:], **kwargs)

    def forward(self, student: Tensor, teacher: Tensor) -> Float[Tensor, ""]:
        """Compare a map with a map.

        Args:
            student: (batch, channels, height, width) as ``shape_s``.
            teacher: likewise as ``shape_t``; taken as constant.

        Raises:
            UserError: shapes that do not fit.
        """
        ((s, t),) = stage_pairs(student, teacher, self.name)
        with torch.autocast(s.device.type, enabled=False):
            s = adapt(self.regressor, s)
            check_maps(s, t, self.name, channels=True)
            return F.mse_loss(*pool_to_smaller(s, t))
