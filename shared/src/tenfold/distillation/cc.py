"""Correlation congruence (CC), in the form of RepDistiller's comparison."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.embeds import LinearEmbed
from tenfold.distillation.rows import vectors
from tenfold.distillation.taps import Taps
from tenfold.distributed import whole_batch


@register("cc")
class CCLoss(DistillationLoss[Tensor]):
    r"""Inner products of the embeddings' differences of images that follow each other.

    With δ_i = |e_s(v^s_i) - e_t(v^t_i)|, entry by entry, and linear embeddings e of both sides,
    both of them trained,

    .. math::  L = \frac{1}{B - 1} \sum_{i < B} \langle \delta_i, \delta_{i + 1} \rangle

    Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019,
    https://arxiv.org/abs/1904.01802, as its authors shared it with RepDistiller; the paper writes
    a kernel formula instead. Images follow each other across all ranks. A batch of one image has no
    pair and gives 0.

    Example:
        >>> loss = CCLoss(dim_s=64, dim_t=256)
        >>> loss(student_vector, teacher_vector).backward()

    Args:
        dim_s: entries of the student's vector.
        dim_t: of the teacher's.
        dim: of the embeddings.
    """

    signal = "pooled"
    default_weight = 0.02

    def __init__(self, dim_s: int, dim_t: int, dim: int = 128) -> None:
        super().__init__()
        self.embed_s = LinearEmbed(dim_s, dim)
        self.embed_t = LinearEmbed(dim_t, dim)

    @classmethod
    def for_taps(cls, student: Taps, teacher: Taps, **kwargs: Any) -> CCLoss:
        """Build the loss for two networks; see `DistillationLoss.for_taps`."""
        s, t = vectors(student.signal(cls.signal), teacher.signal(cls.signal), cls.name)
        return cls(s.shape[1], t.shape[1], **kwargs)

    def forward(
        self,
        student: Float[Tensor, "batch_s ..."],
        teacher: Float[Tensor, "batch_t ..."],
    ) -> Float[Tensor, ""]:
        """Compare a vector with a vector.

        Args:
            student: the pooled vector of the student.
            teacher: that of the teacher, of the same images; taken as constant.

        Raises:
            UserError: different batches, or other widths than the embeddings'.
        """
        s, t = vectors(student, teacher, self.name)
        delta = whole_batch((self.embed_s(s) - self.embed_t(t)).abs())
        return (delta[:-1] * delta[1:]).sum() / max(len(delta) - 1, 1)
