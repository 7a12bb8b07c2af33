"""Probabilistic knowledge transfer (PKT): how likely each image picks each other as neighbour."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.rows import vectors
from tenfold.distributed import whole_batch

_EPS = 1e-7


@register("pkt")
class PKTLoss(DistillationLoss[Tensor]):
    r"""Divergence between the teacher's and the student's neighbourhoods.

    With K_ij = (cos(x_i, x_j) + 1) / 2, every row divided by its sum,

    .. math::  L = \frac{1}{B^2} \sum_{ij} K^t_{ij}
               \log \frac{K^t_{ij} + 10^{-7}}{K^s_{ij} + 10^{-7}}

    Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV
    2018, https://arxiv.org/abs/1803.10837. B counts the images of all ranks.

    Example:
        >>> loss = PKTLoss()
        >>> loss(student_vector, teacher_vector).backward()
    """

    signal = "pooled"
    default_weight = 30000.0

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
            UserError: different batches.
        """
        s, t = (whole_batch(x) for x in vectors(student, teacher, self.name))
        with torch.autocast(s.device.type, enabled=False):
            k_s, k_t = _neighbours(s), _neighbours(t)
        return (k_t * ((k_t + _EPS) / (k_s + _EPS)).log()).mean().to(s.dtype)


def _neighbours(x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch batch"]:
    x = x if x.device.type == "mps" else x.double()
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    # A zero vector stays zero; divided by the eps it would have gradients of 1e7
    unit = x / torch.where(length > 0, length + _EPS, 1)
    k = (unit @ unit.mT + 1) / 2
    return k / k.sum(1, keepdim=True)
