"""Variational information distillation: how well the student predicts the teacher's map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.maps import Maps, adapt, pool_to_smaller, stage_pairs
from tenfold.distillation.projectors import check_input
from tenfold.distillation.taps import Taps

_MIN_VARIANCE = 1e-5


class VIDStage(nn.Module):
    r"""Gaussian negative log-likelihood of the teacher's map, given the student's.

    The mean is a small network of 1x1 convolutions, the variance one number a channel,
    σ² = log(1 + e^a) + 1e-5. Both are trained: `log_scale`, the a of the formula, is a parameter.

    Args:
        channels_s: channels of the student's map.
        channels_t: those of the teacher's.
        channels_mid: those inside; as many as the teacher's if left out.
        variance: σ² at the start.
    """

    def __init__(
        self,
        channels_s: int,
        channels_t: int,
        channels_mid: int | None = None,
        variance: float = 5.0,
    ) -> None:
        super().__init__()
        self.channels_s = channels_s
        channels_mid = channels_t if channels_mid is None else channels_mid
        self.regressor = nn.Sequential(
            nn.Conv2d(channels_s, channels_mid, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels_mid, channels_mid, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels_mid, channels_t, 1, bias=False),
        )
        if not variance > _MIN_VARIANCE:
            raise ValueError(f"variance must be above {_MIN_VARIANCE:g}, not {variance}")
        start = math.log(math.expm1(variance - _MIN_VARIANCE))
        self.log_scale = nn.Parameter(torch.full((channels_t,), start))

    def variance(self) -> Float[Tensor, " channels_t"]:
        """σ² of every channel."""
        return F.softplus(self.log_scale) + _MIN_VARIANCE

    def forward(
        self,
        student: Float[Tensor, "batch channels_s height_s width_s"],
        teacher: Float[Tensor, "batch channels_t height_t width_t"],
    ) -> Float[Tensor, ""]:
        """Mean of ½ [(μ − f_t)² / σ² + log σ²], the larger map averaged down first.

        Raises:
            UserError: other channels than it was made for.
        """
        s, t = pool_to_smaller(student, teacher)
        check_input(s, self.channels_s, "a stage of vid")
        check_input(t, len(self.log_scale), "a stage of vid")
        mean = adapt(self.regressor, s)
        variance = self.variance().to(mean.dtype).view(-1, 1, 1)
        return 0.5 * ((mean - t).square() / variance + variance.log()).mean()


@register("vid")
class VIDLoss(DistillationLoss[Maps]):
    r"""A variational bound on the information that student and teacher share, of every stage.

    .. math::  L = \sum_{stages} \operatorname{mean}\, \tfrac12 \Bigl[
               \frac{(\mu(f^s) - f^t)^2}{\sigma^2} + \log \sigma^2 \Bigr]

    Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019,
    https://arxiv.org/abs/1904.05835, equation 5. It may be negative: a variance below one is a
    confident prediction.

    Example:
        >>> loss = VIDLoss(channels_s=[16, 32, 64], channels_t=[32, 64, 128])
        >>> loss(student_maps, teacher_maps).backward()

    Args:
        channels_s: of the student's maps, from shallow to deep.
        channels_t: of the teacher's.
        channels_mid: inside the regressors; as many as the teacher's if left out.
        variance: σ² at the start.

    Raises:
        ValueError: lists of different lengths, or a variance not above 1e-5.
    """

    signal = "stages"

    def __init__(
        self,
        channels_s: Sequence[int],
        channels_t: Sequence[int],
        channels_mid: Sequence[int] | None = None,
        variance: float = 5.0,
    ) -> None:
        super().__init__()
        middles = channels_t if channels_mid is None else channels_mid
        widths = zip(channels_s, channels_t, middles, strict=True)
        self.stages = nn.ModuleList(VIDStage(s, t, mid, variance) for s, t, mid in widths)

    @classmethod
    def for_taps(cls, student: Taps, teacher: Taps, **kwargs: Any) -> VIDLoss:
        """Build the loss for two networks; see `DistillationLoss.for_taps`."""
        pairs = stage_pairs(student.signal(cls.signal), teacher.signal(cls.signal), cls.name)
        return cls([s.shape[1] for s, _ in pairs], [t.shape[1] for _, t in pairs], **kwargs)

    def forward(self, student: Maps, teacher: Maps) -> Float[Tensor, ""]:
        """Compare maps with maps.

        Args:
            student: one map (batch, channels, height, width) or a list of them.
            teacher: as many, of any sizes; taken as constants.

        Raises:
            UserError: stages or shapes that do not fit.
        """
        pairs = stage_pairs(student, teacher, self.name, exactly=len(self.stages))
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            terms = [stage(s, t) for stage, (s, t) in zip(self.stages, pairs, strict=True)]
            return torch.stack(terms).sum()
