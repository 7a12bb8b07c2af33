"""Knowledge distillation with a temperature, from logits to logits."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation.base import (
    DistillationLoss,
    check_same_shape,
    in_full_precision,
    register,
)


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
        student_logits: Float[Tensor, "*batch classes"],
        teacher_logits: Float[Tensor, "*batch classes"],
    ) -> Float[Tensor, ""]:
        """Compare logits with logits.

        Args:
            student_logits: z^s, any real numbers.
            teacher_logits: z^t, any real numbers; taken as constants.

        Raises:
            ValueError: if the shapes differ.
        """
        check_same_shape(student_logits, teacher_logits)
        log_p = (in_full_precision(student_logits) / self.temperature).log_softmax(-1)
        log_t = (in_full_precision(teacher_logits.detach()) / self.temperature).log_softmax(-1)
        divergence = F.kl_div(log_p, log_t, reduction="none", log_target=True).sum(-1)
        return self.temperature**2 * divergence.mean()

    def extra_repr(self) -> str:
        """Show the temperature in the printed module."""
        return f"temperature={self.temperature:g}"
