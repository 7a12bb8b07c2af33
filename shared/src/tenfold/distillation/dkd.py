"""Decoupled distillation (DKD): the target's share apart from the other classes' shares."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.rows import UNLABELLED, label_rows, logit_rows
from tenfold.errors import UserError

_MASK = 1000.0
"""Taken off the target's logit: its probability is then 0 in every precision."""


@register("dkd")
class DKDLoss(DistillationLoss[Tensor]):
    r"""Two Kullback-Leibler divergences: target against rest, and among the rest.

    With b = (p_y, 1 - p_y) the softened probabilities of the target and of all other classes
    together, and q the softmax over the other classes alone,

    .. math::  L = \frac{T^2}{B} \sum_b \bigl[\alpha \operatorname{KL}(b^t \,\|\, b^s)
               + \beta \operatorname{KL}(q^t \,\|\, q^s)\bigr]

    Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, https://arxiv.org/abs/2203.08679.
    `KnowledgeDistillation` is the case alpha = 1 and, for every image, beta = 1 - p^t_y. The
    authors raise the whole loss from 0 to its weight in the first 20 epochs.

    Example:
        >>> loss = DKDLoss(alpha=1.0, beta=8.0, temperature=4.0)
        >>> loss(student(x), teacher(x), labels).backward()

    Args:
        alpha: weight of the target's part.
        beta: weight of the others'; the authors take 8 on CIFAR-100, 6 for ShuffleNets and wide
            networks, 2 for thin resnets, and 0.5 with temperature 1 on ImageNet.
        temperature: T > 0.

    Raises:
        ValueError: if ``temperature`` is not a positive number, or a weight is negative.
    """

    reads = ("label",)
    default_warmup = 20

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be a positive number, not {temperature}")
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be 0 or more, not {value}")
        self.alpha, self.beta, self.temperature = float(alpha), float(beta), float(temperature)

    def forward(
        self,
        student_logits: Float[Tensor, "batch classes *pixels"],
        teacher_logits: Float[Tensor, "batch classes *pixels"],
        labels: Int[Tensor, " batch *pixels"] | None = None,
    ) -> Float[Tensor, ""]:
        """Compare logits with logits, apart for the labels and for the other classes.

        Args:
            student_logits: z^s, any real numbers.
            teacher_logits: z^t, any real numbers; taken as constants.
            labels: y, the target class of every row; pixels without one (-1) have no part.

        Raises:
            ValueError: if the logits' shapes differ.
            UserError: no labels, an image without one, or another number of labels than rows.
        """
        s, t = logit_rows(student_logits, teacher_logits)
        y = label_rows(labels, s, self.name)
        told = y > UNLABELLED
        if student_logits.ndim == 2 and not bool(told.all()):
            what = f"{self.name} parts the label's class from the others, but an image has no label"
            raise UserError(what, fix="leave unlabelled images out, or choose kd")
        s, t, y = s[told], t[told], y[told]
        softened, target = (s / self.temperature, t / self.temperature), y.unsqueeze(1)
        binary = _divergence(*(_target_or_rest(z, target) for z in softened))
        among = _divergence(*(_among_rest(z, target) for z in softened))
        return self.temperature**2 * (self.alpha * binary + self.beta * among)

    def extra_repr(self) -> str:
        """Show the weights in the printed module."""
        return f"alpha={self.alpha:g}, beta={self.beta:g}, temperature={self.temperature:g}"


def _target_or_rest(
    z: Float[Tensor, "rows classes"], target: Int[Tensor, "rows 1"]
) -> Float[Tensor, "rows 2"]:
    """Log-probabilities of the target, and of all other classes together."""
    log_p = z.log_softmax(1)
    rest = log_p.scatter(1, target, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, target), rest], 1)


def _among_rest(
    z: Float[Tensor, "rows classes"], target: Int[Tensor, "rows 1"]
) -> Float[Tensor, "rows classes"]:
    """Log-probabilities of the other classes, as if there were no target."""
    return z.scatter(1, target, z.gather(1, target) - _MASK).log_softmax(1)


def _divergence(
    log_s: Float[Tensor, "rows n"], log_t: Float[Tensor, "rows n"]
) -> Float[Tensor, ""]:
    total = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    return total / max(1, len(log_s))
