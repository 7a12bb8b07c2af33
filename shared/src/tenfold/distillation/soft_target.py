"""Soft-target cross-entropy: learn a distribution over the classes instead of one label."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from tenfold.distillation.base import DistillationLoss, in_full_precision, register
from tenfold.distillation.rows import logit_rows
from tenfold.distillation.taps import Taps


@register("soft_target")
class SoftTargetCrossEntropy(DistillationLoss[Tensor]):
    r"""Cross-entropy against target probabilities, averaged over the batch.

    .. math::  L = -\frac{1}{B} \sum_b \sum_c t_{bc} \log \operatorname{softmax}(z_b)_c

    This is the in-place bootstrapping term of DS-Net (Li et al., "Dynamic Slimmable Network",
    CVPR 2021, https://arxiv.org/abs/2103.13258), with t the softmax of the EMA teacher's logits,
    and the loss for mixup and label-smoothed targets. Its gradient, (softmax(z) - t) / B, is that
    of KL(t || softmax(z)); the two differ by the entropy of t.

    Example:
        >>> loss = SoftTargetCrossEntropy()
        >>> loss(student(x), teacher(x).softmax(-1)).backward()
    """

    def forward(
        self,
        student_logits: Float[Tensor, "batch classes *pixels"],
        target_probs: Float[Tensor, "batch classes *pixels"],
    ) -> Float[Tensor, ""]:
        """Compare logits with probabilities.

        Args:
            student_logits: z, any real numbers.
            target_probs: t, in [0, 1], rows summing to 1; taken as constants.

        Raises:
            ValueError: if the shapes differ.
        """
        s, t = logit_rows(student_logits, target_probs)
        return -(t * s.log_softmax(1)).sum(1).mean()

    def terms(
        self, student: Taps, teacher: Taps, batch: Mapping[str, Tensor]
    ) -> dict[str, Float[Tensor, ""]]:
        """Compare with the teacher's probabilities, the softmax of its logits."""
        said = in_full_precision(teacher.signal(self.signal)).softmax(1)
        return super().terms(student, Taps(logits=said), batch)
