"""Knowledge distillation with a temperature, from logits to logits."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.rows import logit_rows


@register("kd")
class KnowledgeDistillation(DistillationLoss[Tensor]):
    r"""Kullback-Leibler divergence between softened outputs, averaged over the batch.

    .. math::  L = \frac{T^2}{B} \sum_b \operatorname{KL}\bigl(
               \operatorname{softmax}(z^t_b / T) \,\|\, \operatorname{softmax}(z^s_b / T)\bigr)

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
    https://arxiv.org/abs/1503.02531. The factor T^2 keeps the gradient's size while T grows, since
    both softmax derivatives shrink as 1/T; for large T the gradient tends to that of matching
    logits whose mean over the classes has been taken out.

    Example:
        >>> loss = KnowledgeDistillation(temperature=4.0)
        >>> loss(student(x), teacher(x)).backward()

    Args:
        temperature: T > 0; larger values weigh the small probabilities more.

    Raises:
        ValueError: if ``temperature`` is not a positive number.
    """

    default_weight = 0.9
    default_ce_weight = 0.1

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be a positive number, not {temperature}")
        self.temperature = float(temperature)

    def forward(
        self,
        student_logits: Float[Tensor, "batch classes *pixels"],
        teacher_logits: Float[Tensor, "batch classes *pixels"],
    ) -> Float[Tensor, ""]:
        """Compare logits with logits.

        Args:
            student_logits: z^s, any real numbers; every pixel of a dense prediction is a row.
            teacher_logits: z^t, likewise; taken as constants.

        Raises:
            ValueError: if the shapes differ.
        """
        s, t = (z / self.temperature for z in logit_rows(student_logits, teacher_logits))
        # probabilities, not their logarithms: a class that the teacher masks with -inf counts 0
        divergence = F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
        return self.temperature**2 * divergence

    def extra_repr(self) -> str:
        """Show the temperature in the printed module."""
        return f"temperature={self.temperature:g}"
