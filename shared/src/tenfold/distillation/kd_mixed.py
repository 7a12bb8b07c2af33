"""Labels and a teacher in one number: cross-entropy and distillation, mixed."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.kd import KnowledgeDistillation
from tenfold.distillation.rows import UNLABELLED, label_rows, logit_rows


@register("kd_mixed")
class KDMixedLoss(DistillationLoss[Tensor]):
    r"""A weighted mean of the cross-entropy and of `KnowledgeDistillation`.

    .. math::  L = a \operatorname{CE}(z^s, y) + (1 - a) \, L_{kd}(z^s, z^t)

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
    https://arxiv.org/abs/1503.02531, as torchdistill writes it. The labels are inside, so that no
    other cross-entropy belongs beside it (``default_ce_weight`` is 0). Images without a label
    (-1) have no part in the cross-entropy, which is a mean over the others.

    Example:
        >>> loss = KDMixedLoss(alpha=0.1, temperature=4.0)
        >>> loss(student(x), teacher(x), labels).backward()

    Args:
        alpha: a in [0, 1], the share of the labels.
        temperature: of the distillation, T > 0.

    Raises:
        ValueError: an argument out of its range.
    """

    default_ce_weight = 0.0
    reads = ("label",)

    def __init__(self, alpha: float = 0.1, temperature: float = 4.0) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], not {alpha}")
        self.alpha = float(alpha)
        self.kd = KnowledgeDistillation(temperature)

    def forward(
        self,
        student_logits: Float[Tensor, "batch classes *pixels"],
        teacher_logits: Float[Tensor, "batch classes *pixels"],
        labels: Int[Tensor, " batch *pixels"] | None = None,
    ) -> Float[Tensor, ""]:
        """Compare logits with logits and labels.

        Args:
            student_logits: z^s, any real numbers.
            teacher_logits: z^t, any real numbers; taken as constants.
            labels: y, -1 for an image without one.

        Raises:
            ValueError: if the logits' shapes differ.
            UserError: no labels, or not one for each row of logits.
        """
        s, t = logit_rows(student_logits, teacher_logits)
        y = label_rows(labels, s, self.name)
        hard = F.cross_entropy(s, y, ignore_index=UNLABELLED, reduction="sum")
        hard = hard / (y != UNLABELLED).sum().clamp_min(1)
        return self.alpha * hard + (1 - self.alpha) * self.kd(s, t)

    def extra_repr(self) -> str:
        """Show the share of the labels in the printed module."""
        return f"alpha={self.alpha:g}"
