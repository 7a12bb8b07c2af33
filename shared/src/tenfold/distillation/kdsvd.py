"""Singular vectors of consecutive maps and their relation (KD-SVD).

Legend of the shape suffixes: b batch, p pixels, c channels, n singular vectors.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.maps import Maps, stage_pairs
from tenfold.errors import UserError

_SPARE = 3
"""The student offers so many more vectors than the teacher asks for."""


@register("kdsvd")
class KDSVDLoss(DistillationLoss[Maps]):
    r"""Squared difference of the relations between the main directions of consecutive maps.

    Of every image's map, as a matrix (pixels, channels), the k leading right singular vectors are
    taken, V (channels, k). The student offers k + 3; to each of the teacher's goes the one of
    largest |cosine|, with the sign of that cosine. Both sides are scaled by the teacher's singular
    values, of length one. Then

    .. math::  L = \frac{1}{B} \sum_i \lVert R^s_i - R^t_i \rVert^2, \qquad
               R_i[c, c', j] = \exp\bigl(-(V_i[c, j] - V_{i-1}[c', j])^2 / 8\bigr)

    Lee, Kim and Song, "Self-supervised Knowledge Distillation Using Singular Value Decomposition",
    ECCV 2018, https://arxiv.org/abs/1807.06819, section 3, in the form of the CIFAR comparison of
    CRD's authors. Both networks need equal widths stage by stage; sizes may differ.

    The teacher's signs are those of the decomposition, as there: another library of linear algebra
    may flip the vectors of an image at one stage, and so its target.

    The gradient is that of the singular vectors, but equal singular values among those that nobody
    asks for (two dead channels make them) do not turn it into NaN, as differentiating the whole
    decomposition would.

    Example:
        >>> KDSVDLoss()(student_maps, teacher_maps).backward()

    Args:
        k: singular vectors of the teacher.

    Raises:
        ValueError: if ``k`` is not positive.
    """

    signal = "stages"

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be 1 or more, not {k}")
        self.k = k

    def forward(self, student: Maps, teacher: Maps) -> Float[Tensor, ""]:
        """Compare maps with maps.

        Args:
            student: two or more maps (batch, channels, height, width), from shallow to deep.
            teacher: as many, of the same channels; taken as constants.

        Raises:
            UserError: stages or shapes that do not fit, maps too small for k, or entries that are
                not finite.
        """
        pairs = stage_pairs(student, teacher, self.name, channels=True, at_least=2)
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            directions = [self._directions(s, t) for s, t in pairs]
            terms = [
                (_relation(s, s_before) - _relation(t, t_before)).square().sum()
                for (s_before, t_before), (s, t) in pairwise(directions)
            ]
            return torch.stack(terms).sum() / len(pairs[0][0])

    def _directions(
        self,
        student: Float[Tensor, "batch c height_s width_s"],
        teacher: Float[Tensor, "batch c height_t width_t"],
    ) -> tuple[Float[Tensor, "batch c n"], Float[Tensor, "batch c n"]]:
        """Of one stage: the student's directions, chosen by the teacher's, and the teacher's."""
        v_t, values = right_singular_vectors(teacher.flatten(2).mT, self.k)
        if v_t.shape[2] < self.k:
            what = f"kdsvd wants {self.k} singular vectors, but a map {tuple(teacher.shape)} has"
            raise UserError(f"{what} {v_t.shape[2]}", fix="choose a smaller k")
        v_s, _ = right_singular_vectors(student.flatten(2).mT, self.k + _SPARE)
        scale = F.normalize(values, dim=1).unsqueeze(1)
        cosine = v_t.mT @ v_s
        nearest = cosine.detach().abs().argmax(2, keepdim=True)
        sign = cosine.detach().gather(2, nearest).sign().mT
        chosen = v_s.gather(2, nearest.mT.expand(-1, v_s.shape[1], -1))
        return chosen * sign * scale, v_t * scale

    def extra_repr(self) -> str:
        """Show k in the printed module."""
        return f"k={self.k}"


def _relation(
    deep: Float[Tensor, "b c n"], shallow: Float[Tensor, "b d n"]
) -> Float[Tensor, "b c d n"]:
    return (-(deep.unsqueeze(2) - shallow.unsqueeze(1)).square() / 8).exp()


def right_singular_vectors(
    f_bpc: Float[Tensor, "b p c"], n: int
) -> tuple[Float[Tensor, "b c n"], Float[Tensor, "b n"]]:
    """Leading right singular vectors, with their gradient, and singular values, without.

    Args:
        f_bpc: matrices.
        n: how many vectors; fewer come where the smaller side of the matrix is shorter.

    Raises:
        UserError: entries that are not finite.
    """
    with torch.no_grad():
        try:
            _, values, vectors_brc = torch.linalg.svd(f_bpc, full_matrices=False)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            what = "kdsvd met a map that has no singular vectors: are its entries finite?"
            raise UserError(what) from error
        values, vectors_brc = (x.nan_to_num(0, 0, 0) for x in (values, vectors_brc))
    leading = vectors_brc[:, :n].mT
    if f_bpc.requires_grad:
        leading = leading + _first_order(f_bpc, values.square(), vectors_brc, n)
    return leading, values[:, :n]


def _first_order(
    f_bpc: Float[Tensor, "b p c"],
    eigenvalues: Float[Tensor, "b r"],
    vectors_brc: Float[Tensor, "b r c"],
    n: int,
) -> Float[Tensor, "b c n"]:
    """Zero, with the gradient of the first n eigenvectors of G = FᵀF.

    Perturbation theory: dv_j = (λ_j − G)⁺ dG v_j, split into the known eigenvectors and the null
    space of G, where λ_j − G = λ_j. Pairs of equal eigenvalues have no preferred direction.
    """
    lead = eigenvalues[:, None, :n]
    floor = torch.finfo(f_bpc.dtype).eps * eigenvalues[:, :1, None]
    moved = f_bpc.mT @ (f_bpc @ vectors_brc[:, :n].mT)
    moved = moved - moved.detach()
    outside = _inverse(lead, floor)
    inside = _inverse(lead - eigenvalues.unsqueeze(2), floor)
    along = vectors_brc @ moved
    return outside * moved + vectors_brc.mT @ ((inside - outside) * along)


def _inverse(x: Float[Tensor, "b _ n"], floor: Float[Tensor, "b 1 1"]) -> Float[Tensor, "b _ n"]:
    far = x.abs() > floor
    return torch.where(far, 1 / torch.where(far, x, 1), 0)
