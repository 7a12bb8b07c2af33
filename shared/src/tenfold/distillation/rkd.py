"""Relational distillation (RKD): distances between images, and the angles of their triangles.

Legend of the shape suffixes: i this rank's images, j and k those of all ranks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.rows import vectors
from tenfold.distributed import own_part, whole_batch

_EPS = 1e-12


@register("rkd")
class RKDLoss(DistillationLoss[Tensor]):
    r"""Smooth L1 distances of all pairwise distances and of all angles.

    .. math::  L = w_d \operatorname{mean}_{ij} l\Bigl(\frac{D^s_{ij}}{\mu^s},
               \frac{D^t_{ij}}{\mu^t}\Bigr)
               + w_a \operatorname{mean}_{ijk} l(A^s_{ijk}, A^t_{ijk})

    D is the Euclidean distance of two vectors (its square at least 1e-12 off the diagonal), μ its
    mean over all pairs of different images, A the cosine of the angle at image i between images j
    and k, zero where one of them is i, and l the smooth L1 loss. The angles come from inner
    products, ⟨x_j - x_i, x_k - x_i⟩ = g_jk - g_ij - g_ik + g_ii, which takes B³ numbers and never
    the B² differences of vectors.

    Park et al., "Relational Knowledge Distillation", CVPR 2019, https://arxiv.org/abs/1904.05068.
    Pairs and triangles are taken over the images of all ranks; every rank computes the angles at
    its own. A batch of one image has neither and gives 0, and images with the same vector form no
    angle.

    Example:
        >>> loss = RKDLoss()
        >>> loss(student_vector, teacher_vector).backward()

    Args:
        distance_weight: w_d.
        angle_weight: w_a.
    """

    signal = "pooled"

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        self.distance_weight, self.angle_weight = float(distance_weight), float(angle_weight)

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
            g_s, g_t = _products(s), _products(t)
        kept = s.dtype
        distance = F.smooth_l1_loss(_distances(g_s).to(kept), _distances(g_t).to(kept))
        angle = F.smooth_l1_loss(_angles(g_s, kept), _angles(g_t, kept))
        return self.distance_weight * distance + self.angle_weight * angle

    def extra_repr(self) -> str:
        """Show the weights in the printed module."""
        return f"distance_weight={self.distance_weight:g}, angle_weight={self.angle_weight:g}"


def _products(x_jd: Float[Tensor, "j d"]) -> Float[Tensor, "j j"]:
    """Inner products. No relation sees a shift, and without the mean they keep more digits.

    In double precision where the device has it: the distance of two images that are nearly the same
    is what is left of much larger products.
    """
    x_jd = x_jd if x_jd.device.type == "mps" else x_jd.double()
    x_jd = x_jd - x_jd.mean(0)
    return x_jd @ x_jd.mT


def _distances(g_jk: Float[Tensor, "j j"]) -> Float[Tensor, "j j"]:
    """Distances over their mean."""
    g_j = g_jk.diagonal()
    d_jk = (g_j.unsqueeze(1) + g_j - 2 * g_jk).clamp_min(_EPS).sqrt()
    count = len(g_jk)
    d_jk = d_jk * (1 - torch.eye(count, dtype=g_jk.dtype, device=g_jk.device))
    return d_jk * (max(count * (count - 1), 1) / d_jk.sum().clamp_min(_EPS))


def _angles(g_jk: Float[Tensor, "j j"], kept: torch.dtype) -> Float[Tensor, "i j j"]:
    """Cosines of the angles at this rank's images, kept in a precision."""
    g_j, own = g_jk.diagonal(), own_part()
    g_ij, g_i = g_jk[own], g_j[own].unsqueeze(1)
    squared_ij, sizes_ij = g_i + g_j - 2 * g_ij, g_i + g_j
    apart_ij = squared_ij > 4 * torch.finfo(g_jk.dtype).eps * sizes_ij
    inverse_ij = torch.where(apart_ij, torch.where(apart_ij, squared_ij, 1).rsqrt(), 0)
    half_ij = g_ij - g_i / 2  # twice in the sum below, and so -g_ij - g_ik + g_ii
    product_ijk = g_jk - half_ij.unsqueeze(2) - half_ij.unsqueeze(1)
    inverse_ij = inverse_ij.to(kept)
    return product_ijk.to(kept) * (inverse_ij.unsqueeze(2) * inverse_ij.unsqueeze(1))
