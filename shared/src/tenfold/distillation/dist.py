"""DIST: the teacher's order of classes and of images, instead of its probabilities."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.rows import logit_rows
from tenfold.distributed import whole_batch


@register("dist")
class DISTLoss(DistillationLoss[Tensor]):
    r"""One minus Pearson's correlation of softened outputs, along classes and along images.

    .. math::  L = \tau^2 \bigl[\beta (1 - \operatorname{mean}_b \rho_b)
               + \gamma (1 - \operatorname{mean}_c \rho_c)\bigr]

    ρ_b correlates row b, ρ_c column c of softmax(z / τ) of student and teacher. It does not see
    how sharp the teacher is, only what it prefers. Columns run over the batch of all ranks.

    Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022,
    https://arxiv.org/abs/2205.10536.

    A row or column that is constant up to rounding, such as those of a zero classifier or of a
    batch of one image, has no correlation: it counts ρ = 0 and has no gradient.

    Example:
        >>> loss = DISTLoss(beta=1.0, gamma=1.0, temperature=1.0)
        >>> loss(student(x), teacher(x)).backward()

    Args:
        beta: weight of the relations between classes (rows).
        gamma: weight of the relations between images (columns).
        temperature: τ > 0.

    Raises:
        ValueError: if ``temperature`` is not a positive number.
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be a positive number, not {temperature}")
        self.beta, self.gamma, self.temperature = float(beta), float(gamma), float(temperature)

    def forward(
        self,
        student_logits: Float[Tensor, "batch classes *pixels"],
        teacher_logits: Float[Tensor, "batch classes *pixels"],
    ) -> Float[Tensor, ""]:
        """Compare logits with logits.

        Args:
            student_logits: z^s, any real numbers.
            teacher_logits: z^t, any real numbers; taken as constants.

        Raises:
            ValueError: if the shapes differ.
        """
        both = (whole_batch(z) for z in logit_rows(student_logits, teacher_logits))
        s, t = ((z / self.temperature).softmax(1) for z in both)
        between_classes = 1 - _pearson(s, t).mean()
        between_images = 1 - _pearson(s.mT, t.mT).mean()
        return self.temperature**2 * (self.beta * between_classes + self.gamma * between_images)

    def extra_repr(self) -> str:
        """Show the weights in the printed module."""
        return f"beta={self.beta:g}, gamma={self.gamma:g}, temperature={self.temperature:g}"


def _pearson(
    s: Float[Tensor, "rows entries"], t: Float[Tensor, "rows entries"]
) -> Float[Tensor, " rows"]:
    """Correlation of every row of ``s`` with that of ``t``, 0 where one of them is constant."""
    deviations = [x - x.mean(1, keepdim=True) for x in (s, t)]
    sizes = [torch.linalg.vector_norm(d.detach(), dim=1) for d in deviations]
    rounding = 16 * torch.finfo(s.dtype).eps
    varies = [
        size > rounding * torch.linalg.vector_norm(x.detach(), dim=1)
        for size, x in zip(sizes, (s, t), strict=True)
    ]
    both = (varies[0] & varies[1]).unsqueeze(1)
    return F.cosine_similarity(*(torch.where(both, d, 0) for d in deviations), dim=1)
