"""Factor transfer: the student translates itself into a paraphrase of the teacher."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation.at import attention_map
from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.maps import adapt, pool_to_smaller, stage_pairs
from tenfold.distillation.projectors import Paraphraser, Translator, check_input
from tenfold.distillation.taps import Taps, check_maps


@register("ft")
class FTLoss(DistillationLoss[Tensor]):
    r"""Mean difference of the attention maps of two factors.

    .. math::  L = \operatorname{mean}\, |Q(T(f^s)) - Q(P(f^t))|^{p}, \qquad
               Q(f) = \frac{q}{\lVert q \rVert_2}, \quad q = \operatorname{mean}_c f_c^2

    P is the encoder of the paraphraser, an autoencoder of the teacher's last map. It is trained
    first, with `reconstruction` alone, 30 epochs in the CIFAR comparison of CRD's authors, then
    frozen (``paraphraser.requires_grad_(False)``); `forward` gives it no gradient in any case. T is
    the translator, trained with the student.

    Kim et al., "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS
    2018, https://arxiv.org/abs/1802.04977, equations 1 and 3. The larger of two factors is averaged
    down.

    Example:
        >>> loss = FTLoss(channels_s=64, channels_t=256)
        >>> loss.reconstruction(teacher_map).backward()  # the first stage, without student
        >>> loss(student_map, teacher_map).backward()  # the second

    Args:
        channels_s: channels of the student's map.
        channels_t: channels of the teacher's; as many as the student's if left out.
        rate: of the factor's channels to the teacher's.
        p: the power of the difference.

    Raises:
        ValueError: a rate that leaves no factor, or a power that is not positive.
    """

    signal = "deepest"
    default_weight = 200.0

    def __init__(
        self, channels_s: int, channels_t: int | None = None, rate: float = 0.5, p: float = 1.0
    ) -> None:
        super().__init__()
        if not p > 0:
            raise ValueError(f"p must be positive, not {p}")
        channels_t = channels_s if channels_t is None else channels_t
        self.paraphraser = Paraphraser(channels_t, rate)
        self.translator = Translator(channels_s, channels_t, rate)
        self.p = float(p)

    @classmethod
    def for_taps(cls, student: Taps, teacher: Taps, **kwargs: Any) -> FTLoss:
        """Build the loss for two networks; see `DistillationLoss.for_taps`."""
        maps = student.signal(cls.signal), teacher.signal(cls.signal)
        check_maps(*maps, cls.name)
        return cls(maps[0].shape[1], maps[1].shape[1], **kwargs)

    def reconstruction(self, teacher: Tensor) -> Float[Tensor, ""]:
        """Mean squared error of the paraphraser, what its own training lowers.

        Args:
            teacher: (batch, channels_t, height, width); taken as constant.

        Raises:
            UserError: a shape that does not fit.
        """
        ((t, _),) = stage_pairs(teacher.detach(), teacher, self.name)
        with torch.autocast(t.device.type, enabled=False):
            return F.mse_loss(adapt(self.paraphraser, t), t)

    def forward(self, student: Tensor, teacher: Tensor) -> Float[Tensor, ""]:
        """Compare a map with a map.

        Args:
            student: (batch, channels_s, height, width).
            teacher: (batch, channels_t, height, width); taken as constant.

        Raises:
            UserError: shapes that do not fit.
        """
        ((s, t),) = stage_pairs(student, teacher, self.name)
        check_input(t, self.paraphraser.channels, "the paraphraser")
        with torch.autocast(s.device.type, enabled=False):
            with torch.no_grad():
                paraphrase = adapt(self.paraphraser.encoder, t)
            return factor_distance(adapt(self.translator, s), paraphrase, self.p)

    def extra_repr(self) -> str:
        """Show the power in the printed module."""
        return f"p={self.p:g}"


def factor_distance(
    student: Float[Tensor, "batch factor_s height_s width_s"],
    teacher: Float[Tensor, "batch factor_t height_t width_t"],
    p: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean |Q_s − Q_t|^p of two factors, the larger averaged down."""
    s, t = map(attention_map, pool_to_smaller(student, teacher))
    return (s - t).abs().pow(p).mean()
