"""Mean squared error of the last map: the plainest feature loss, on ICKD's embedding."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.maps import adapt, pool_to_smaller, stage_pairs
from tenfold.distillation.projectors import Embedding
from tenfold.distillation.taps import Taps, check_maps


@register("mse")
class FeatureMSELoss(DistillationLoss[Tensor]):
    r"""Mean squared error between the teacher's last map and the student's, lifted.

    .. math::  L = \operatorname{mean}\, (C_l(f^s) - f^t)^2

    C_l is the embedding of ICKD, so that the two differ in nothing but the distance. Maps of
    different size: the larger is averaged down, after the embedding.

    Example:
        >>> loss = FeatureMSELoss(channels_s=64, channels_t=256)
        >>> loss(student_map, teacher_map).backward()

    Args:
        channels_s: channels of the student's map.
        channels_t: channels of the teacher's; as many as the student's if left out.
    """

    signal = "last"
    default_weight = 2.0

    def __init__(self, channels_s: int, channels_t: int | None = None) -> None:
        super().__init__()
        self.embed_s = Embedding(channels_s, channels_s if channels_t is None else channels_t)

    @classmethod
    def for_taps(cls, student: Taps, teacher: Taps, **kwargs: Any) -> FeatureMSELoss:
        """Build the loss for two networks; see `DistillationLoss.for_taps`."""
        maps = student.signal(cls.signal), teacher.signal(cls.signal)
        check_maps(*maps, cls.name)
        return cls(maps[0].shape[1], maps[1].shape[1], **kwargs)

    def forward(self, student: Tensor, teacher: Tensor) -> Float[Tensor, ""]:
        """Compare a map with a map.

        Args:
            student: (batch, channels_s, height, width).
            teacher: (batch, channels_t, height, width); taken as constant.

        Raises:
            UserError: shapes that do not fit.
        """
        ((s, t),) = stage_pairs(student, teacher, self.name)
        with torch.autocast(s.device.type, enabled=False):
            s = adapt(self.embed_s, s)
            check_maps(s, t, self.name, channels=True)
            return F.mse_loss(*pool_to_smaller(s, t))
