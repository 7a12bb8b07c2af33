"""Activation boundaries: which neurons fire, not how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.maps import Maps, adapt, pool_to_smaller, stage_pairs
from tenfold.distillation.projectors import boundary_connector
from tenfold.distillation.taps import Taps, check_maps

_SCALE = 3e-3


@register("ab")
class ABLoss(DistillationLoss[Maps]):
    r"""Hinge loss on the sign of every pre-activation, of every stage.

    With m the margin, an entry s of the student, t of the teacher and k stages,

    .. math::  L = \frac{0.003}{B} \sum_{i=0}^{k-1} 2^{i-k+1} \sum
               \begin{cases} \max(s + m, 0)^2 & t \le 0 \\ \max(m - s, 0)^2 & t > 0 \end{cases}

    Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
    Neurons", AAAI 2019, https://arxiv.org/abs/1811.03233, equations 4 and 5. It prepares the
    student before the task is trained. A stage of other shape goes through a connector.

    Example:
        >>> loss = ABLoss([(16, 16, 16), (32, 8, 8)], [(64, 16, 16), (128, 8, 8)])
        >>> loss(student_preactivations, teacher_preactivations).backward()

    Args:
        shapes_s: (channels, height, width) of the student's maps, from shallow to deep.
        shapes_t: of the teacher's.
        margin: m > 0.

    Raises:
        ValueError: lists of different lengths, or a margin that is not positive.
    """

    signal = "preact_stages"
    stage = "init"

    def __init__(
        self,
        shapes_s: Sequence[Sequence[int]],
        shapes_t: Sequence[Sequence[int]],
        margin: float = 1.0,
    ) -> None:
        super().__init__()
        if not margin > 0:
            raise ValueError(f"margin must be positive, not {margin}")
        shapes = zip(shapes_s, shapes_t, strict=True)
        self.connectors = nn.ModuleList(boundary_connector(s, t) for s, t in shapes)
        self.margin = float(margin)

    @classmethod
    def for_taps(cls, student: Taps, teacher: Taps, **kwargs: Any) -> ABLoss:
        """Build the loss for two networks; see `DistillationLoss.for_taps`."""
        pairs = stage_pairs(student.signal(cls.signal), teacher.signal(cls.signal), cls.name)
        return cls([s.shape[1:] for s, _ in pairs], [t.shape[1:] for _, t in pairs], **kwargs)

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
            for i, (connector, (s, t)) in enumerate(zip(self.connectors, pairs, strict=True)):
                s = adapt(connector, s)
                check_maps(s, t, self.name, channels=True)
                distance = boundary_distance(*pool_to_smaller(s, t), self.margin)
                terms.append(2.0 ** (i - len(pairs) + 1) * distance)
            return _SCALE * torch.stack(terms).sum() / len(pairs[0][0])

    def extra_repr(self) -> str:
        """Show the margin in the printed module."""
        return f"margin={self.margin:g}"


def boundary_distance(
    student: Float[Tensor, "*shape"], teacher: Float[Tensor, "*shape"], margin: float = 1.0
) -> Float[Tensor, ""]:
    """Squared shortfall of the student's entries behind the margin on the teacher's side of 0."""
    shortfall = torch.where(teacher > 0, margin - student, student + margin)
    return shortfall.clamp_min(0).square().sum()
