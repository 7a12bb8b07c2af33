"""Similarity preservation (SP): which images of a batch resemble each other."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.rows import vectors
from tenfold.distributed import whole_batch

_EPS = 1e-12


@register("sp")
class SPLoss(DistillationLoss[Tensor]):
    r"""Squared distance between the batch's similarity matrices of student and teacher.

    With X the flattened maps, (batch, channels x pixels), and every row of X Xᵀ divided by its
    length,

    .. math::  L = \frac{1}{B^2} \lVert \hat G(X^t) - \hat G(X^s) \rVert_F^2

    Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019,
    https://arxiv.org/abs/1907.09682. Both maps may have any shape; B counts the images of all
    ranks.

    Example:
        >>> loss = SPLoss()
        >>> loss(student_map, teacher_map).backward()
    """

    signal = "deepest"
    default_weight = 3000.0

    def forward(
        self,
        student: Float[Tensor, "batch_s ..."],
        teacher: Float[Tensor, "batch_t ..."],
    ) -> Float[Tensor, ""]:
        """Compare a map with a map.

        Args:
            student: the last map of the student.
            teacher: that of the teacher, of the same images; taken as constant.

        Raises:
            UserError: different batches, or a map without entries.
        """
        s, t = (whole_batch(x) for x in vectors(student, teacher, self.name))
        with torch.autocast(s.device.type, enabled=False):
            difference = _similarities(t) - _similarities(s)
        return difference.square().mean()


def _similarities(x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch batch"]:
    """X Xᵀ, every row of length 1; the row of an image without activations stays zero."""
    g = x @ x.mT
    length = torch.linalg.vector_norm(g, dim=1, keepdim=True)
    # A zero row divided by the eps would have gradients of 1e12
    return g / torch.where(length > 0, length.clamp_min(_EPS), 1)
