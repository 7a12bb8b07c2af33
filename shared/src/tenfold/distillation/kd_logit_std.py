"""Distillation of standardised logits: the student need not copy the teacher's scale."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.kd import KnowledgeDistillation
from tenfold.distillation.rows import logit_rows

_EPS = 1e-7


@register("kd_logit_std")
class KDLogitStdLoss(DistillationLoss[Tensor]):
    r"""`KnowledgeDistillation` of rows that have been given mean 0 and standard deviation 1.

    .. math::  z \leftarrow \frac{z - \operatorname{mean}(z)}{\operatorname{std}(z) + 10^{-7}}

    along the classes, with the unbiased standard deviation, on both sides. A small student keeps
    the teacher's order of the classes without having to produce logits as large.

    Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024,
    https://arxiv.org/abs/2403.01427. A row of equal logits, such as those of a zero classifier,
    stays zero and has no gradient.

    Example:
        >>> loss = KDLogitStdLoss(temperature=2.0)
        >>> loss(student(x), teacher(x)).backward()

    Args:
        temperature: T > 0.
        t_squared: multiply by T², as `KnowledgeDistillation` does; torchdistill leaves it out where
            it mixes in no cross-entropy.

    Raises:
        ValueError: if ``temperature`` is not a positive number.
    """

    def __init__(self, temperature: float = 4.0, *, t_squared: bool = True) -> None:
        super().__init__()
        self.kd = KnowledgeDistillation(temperature)
        self.t_squared = t_squared

    def forward(
        self,
        student_logits: Float[Tensor, "batch classes *pixels"],
        teacher_logits: Float[Tensor, "batch classes *pixels"],
    ) -> Float[Tensor, ""]:
        """Compare logits with logits.

        Args:
            student_logits: z^s of two or more classes, any real numbers.
            teacher_logits: z^t, likewise; taken as constants.

        Raises:
            ValueError: if the shapes differ.
        """
        s, t = logit_rows(student_logits, teacher_logits)
        loss = self.kd(_standardise(s), _standardise(t))
        return loss if self.t_squared else loss / self.kd.temperature**2

    def extra_repr(self) -> str:
        """Show the option in the printed module."""
        return f"t_squared={self.t_squared}"


def _standardise(z: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows classes"]:
    deviation = z.std(1, keepdim=True)
    return torch.where(deviation > 0, (z - z.mean(1, keepdim=True)) / (deviation + _EPS), 0)
