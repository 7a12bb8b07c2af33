"""Attention transfer: where a map is active."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.maps import Maps, pool_to_smaller, stage_pairs


def attention_map(
    feature: Float[Tensor, "batch channels height width"], power: float = 2.0
) -> Float[Tensor, "batch pixels"]:
    """How active every pixel is: mean over channels of |f|^power, of length one per image."""
    magnitude = feature.square() if power == 2 else feature.abs().pow(power)
    return F.normalize(magnitude.mean(1).flatten(1), dim=1)


@register("at")
class ATLoss(DistillationLoss[Maps]):
    r"""Squared difference of spatial attention maps, of every stage.

    .. math::  L = \sum_{stages} \operatorname{mean}_{b,p} (Q(f^s) - Q(f^t))^2, \qquad
               Q(f) = \frac{q}{\lVert q \rVert_2}, \quad q = \operatorname{mean}_c |f_c|^{power}

    Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017,
    https://arxiv.org/abs/1612.03928, equation 2 (the mean square for the norm, as its program
    has it). The larger of two maps is averaged down; channels may differ.

    Example:
        >>> ATLoss()(student_maps, teacher_maps).backward()

    Args:
        power: 2 in the paper; larger ones look at the strongest channels only.

    Raises:
        ValueError: if ``power`` is not a positive number.
    """

    signal = "stages"
    default_weight = 1000.0

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        if not (power > 0 and math.isfinite(power)):
            raise ValueError(f"power must be a positive number, not {power}")
        self.power = float(power)

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
            return torch.stack([self._distance(s, t) for s, t in pairs]).sum()

    def _distance(
        self,
        student: Float[Tensor, "batch channels_s height_s width_s"],
        teacher: Float[Tensor, "batch channels_t height_t width_t"],
    ) -> Float[Tensor, ""]:
        s, t = pool_to_smaller(student, teacher)
        return F.mse_loss(attention_map(s, self.power), attention_map(t, self.power))

    def extra_repr(self) -> str:
        """Show the power in the printed module."""
        return f"power={self.power:g}"
