"""The overhaul of feature distillation: a margin for what the teacher's ReLU hides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tenfold.distillation.base import DistillationLoss, in_full_precision, register
from tenfold.distillation.maps import Maps, adapt, pool_to_smaller, stage_pairs
from tenfold.distillation.projectors import NormedConv
from tenfold.distillation.taps import Taps, check_maps

Form = Literal["classification", "overhaul"]

_RARE = 1e-3
"""Below this share of negative entries their mean says nothing."""


def margin_from_bn(
    weight: Float[Tensor, " channels"], bias: Float[Tensor, " channels"]
) -> Float[Tensor, " channels"]:
    r"""Expected value of a negative pre-activation, from the batch norm that makes it.

    Entries of a channel are taken as normal, of mean β (the bias) and deviation s = |γ| (the
    weight). Their mean below zero is

    .. math::  m = \beta - s \, \frac{e^{-(\beta / s)^2 / 2}}{\sqrt{2 \pi}\, \Phi(-\beta / s)}

    and −3s where fewer than one in a thousand is negative.

    Args:
        weight: γ of the teacher's batch norm before a ReLU.
        bias: β.

    Returns:
        Margins, none above zero.
    """
    s, mean = weight.detach().double().abs(), bias.detach().double()
    # A weight of zero leaves a constant channel; the bound makes z infinite or zero, never NaN.
    z = mean / s.clamp_min(torch.finfo(s.dtype).tiny)
    below = torch.special.ndtr(-z)
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    expected = mean - s * density / below.clamp_min(_RARE)
    return torch.where(below > _RARE, expected, -3 * s).clamp_max(0).to(weight.dtype)


def margin_from_map(
    preactivation: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, " channels"]:
    """Mean negative entry of every channel of a map, where no batch norm tells it.

    Minus three deviations where fewer than one in a thousand is negative, as in `margin_from_bn`.
    """
    x_cn = in_full_precision(preactivation.detach()).transpose(0, 1).flatten(1)
    share = (x_cn < 0).to(x_cn.dtype).mean(1)
    expected = x_cn.clamp_max(0).mean(1) / share.clamp_min(_RARE)
    return torch.where(share > _RARE, expected, -3 * x_cn.std(1, correction=0))


@register("ofd")
class OFDLoss(DistillationLoss[Maps]):
    r"""Partial squared distance of pre-activations, of every stage.

    With m the margin of the teacher's channel and t' = max(t, m),

    .. math::  L = \frac{1}{B} \sum_i \frac{1}{d_i} \sum (s - t')^2 \, [s > t' \text{ or } t' > 0]

    so that a student below a teacher that does not fire is left in peace. Heo et al., "A
    Comprehensive Overhaul of Feature Distillation", ICCV 2019, https://arxiv.org/abs/1904.01866,
    equations 1 to 5. The student goes through a 1x1 convolution and a batch norm; the larger of two
    maps is averaged down, after it.

    The published programs write the sum in two ways, which agree as no margin is above zero. They
    differ in the divisors: stages count alike in the "classification" form; in the "overhaul" form
    stage i of k, from 1, is divided by 2^(k−i). That form's program divides by the batch outside.

    Example:
        >>> margins = [margin_from_bn(bn.weight, bn.bias) for bn in teacher_norms]
        >>> loss = OFDLoss([16, 32, 64], margins)
        >>> loss(student_preactivations, teacher_preactivations).backward()

    Args:
        channels_s: of the student's maps, from shallow to deep.
        margins: of the teacher's channels, a vector a stage, none above zero.
        form: whose divisors.
        dividers: d of every stage, instead of the form's (8, 4, 2, 1, 1, 16 in segmentation).

    Raises:
        ValueError: lists of different lengths, an unknown form, a margin above zero or a divider
            that is not positive.
    """

    signal = "preact_stages"
    default_weight = 1e-3

    def __init__(
        self,
        channels_s: Sequence[int],
        margins: Sequence[Float[Tensor, " _"]],
        form: Form = "classification",
        dividers: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if form not in ("classification", "overhaul"):
            raise ValueError(f"form must be 'classification' or 'overhaul', got {form!r}")
        if dividers is None:
            k = len(margins)
            dividers = [1.0 if form == "classification" else 2.0 ** (k - i - 1) for i in range(k)]
        if len(dividers) != len(margins) or not all(d > 0 for d in dividers):
            raise ValueError(f"{len(margins)} positive dividers are needed, got {list(dividers)}")
        if not all(m.is_meta or bool((m <= 0).all()) for m in margins):
            raise ValueError("a margin above zero is no mean of negative entries")
        widths = zip(channels_s, margins, strict=True)
        self.connectors = nn.ModuleList(NormedConv(c, len(m)) for c, m in widths)
        for i, margin in enumerate(margins):
            self.register_buffer(f"margin{i}", margin.detach().clone())
        self.form: Form = form
        self.dividers = tuple(float(d) for d in dividers)

    @classmethod
    def for_taps(cls, student: Taps, teacher: Taps, **kwargs: Any) -> OFDLoss:
        """Build the loss for two networks; see `DistillationLoss.for_taps`.

        Margins that are not given are measured on the teacher's taps (`margin_from_map`).
        """
        pairs = stage_pairs(student.signal(cls.signal), teacher.signal(cls.signal), cls.name)
        margins = kwargs.pop("margins", None)
        if margins is None:
            margins = [margin_from_map(t) for _, t in pairs]
        return cls([s.shape[1] for s, _ in pairs], margins, **kwargs)

    @property
    def margins(self) -> list[Float[Tensor, " _"]]:
        """The margins, a vector a stage."""
        return [self.get_buffer(f"margin{i}") for i in range(len(self.connectors))]

    def forward(self, student: Maps, teacher: Maps) -> Float[Tensor, ""]:
        """Compare maps before their activation.

        Args:
            student: one map (batch, channels, height, width) or a list of them.
            teacher: as many; taken as constants.

        Raises:
            UserError: stages or shapes that do not fit.
        """
        pairs = stage_pairs(student, teacher, self.name, exactly=len(self.connectors))
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            terms = []
            stages = zip(self.connectors, pairs, self.margins, self.dividers, strict=True)
            for connector, (s, t), margin, divider in stages:
                s = adapt(connector, s)
                check_maps(s, t, self.name, channels=True)
                terms.append(partial_distance(*pool_to_smaller(s, t), margin) / divider)
            return torch.stack(terms).sum()

    def extra_repr(self) -> str:
        """Show the divisors in the printed module."""
        return f"form={self.form!r}, dividers={self.dividers}"


def partial_distance(
    student: Float[Tensor, "batch channels height width"],
    teacher: Float[Tensor, "batch channels height width"],
    margin: Float[Tensor, " channels"],
) -> Float[Tensor, ""]:
    """(s − t')² where s > t' or t' > 0, with t' = max(t, m): a sum, averaged over the batch."""
    target = teacher.maximum(margin.to(teacher.dtype).view(-1, 1, 1))
    counts = (student > target) | (target > 0)
    return torch.where(counts, (student - target).square(), 0).sum() / len(student)
