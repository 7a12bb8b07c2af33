r"""Inter-channel correlation (ICKD): how a map's channels relate, in two exact forms.

Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation",
ICCV 2021, https://arxiv.org/abs/2202.03680.

Legend of the shape suffixes: n maps (a batch, or its grid cells), c channels, p and q pixels of the
student's and the teacher's map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, in_full_precision, register
from tenfold.distillation.maps import adapt
from tenfold.distillation.projectors import Embedding
from tenfold.distillation.taps import Taps, check_maps
from tenfold.errors import UserError

Normalize = Literal["row", "none", "frobenius"]
Form = Literal["auto", "direct", "low_memory"]

DEAD = 1e-6
"""A channel is dead in a map if its row norm is below this share of the map's mean row norm."""

_OFFICIAL_EPS = 1e-12


def icc_matrix(
    feature: Float[Tensor, "batch channels height width"], normalize: Normalize = "row"
) -> Float[Tensor, "batch channels channels"]:
    """Inner products of all pairs of channels, G = F Fᵀ with F = (channels, pixels) (section 3.1).

    Args:
        feature: a map.
        normalize: "row" divides every row by its length (rows of zeros stay zero), "frobenius" the
            matrix by its norm, "none" leaves the products.

    Raises:
        ValueError: another normalisation.
    """
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize must be one of {get_args(Normalize)}, got {normalize!r}")
    f_ncp = in_full_precision(feature).flatten(2)
    with torch.autocast(feature.device.type, enabled=False):
        g_ncc = f_ncp @ f_ncp.mT
    if normalize == "none":
        return g_ncc
    shaped = g_ncc if normalize == "row" else g_ncc.flatten(1)
    return F.normalize(shaped, dim=-1, eps=_OFFICIAL_EPS).view_as(g_ncc)


def dead_channels(
    feature: Float[Tensor, "batch channels height width"],
) -> Bool[Tensor, "batch channels"]:
    """Which channels say next to nothing about an image: rows of G below `DEAD` of their mean."""
    f_ncp = in_full_precision(feature).flatten(2)
    with torch.autocast(feature.device.type, enabled=False):
        small = f_ncp.shape[2] <= f_ncp.shape[1]
        squared = _row_norms_squared(f_ncp) if small else (f_ncp @ f_ncp.mT).square().sum(2)
    return ~_alive(squared)


def grid_cells(
    feature: Float[Tensor, "batch channels height width"],
    grid: Sequence[int],
    *,
    reference_compat: bool = False,
) -> Float[Tensor, "cells channels cell_height cell_width"]:
    """Cut maps into n x m cells of equal size, folded into the batch: image by image, row by row.

    Args:
        feature: a map.
        grid: (n, m); trailing rows and columns that fill no cell are dropped.
        reference_compat: as the published program does, keep on cutting cells of ⌊H/n⌋ x ⌊W/m⌋
            while they fit, which may give more than n or m.

    Raises:
        UserError: more cells than pixels.
    """
    (n, m), (height, width) = grid, feature.shape[2:]
    if not (1 <= n <= height and 1 <= m <= width):
        what = f"a grid of {n}x{m} cells does not fit a map of {height}x{width} pixels"
        raise UserError(what, fix=f"choose at most {height}x{width}")
    tall, wide = height // n, width // m
    if reference_compat:
        n, m = height // tall, width // wide
    cut = feature[:, :, : n * tall, : m * wide]
    cells = cut.unflatten(3, (m, wide)).unflatten(2, (n, tall))  # batch, c, n, tall, m, wide
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


@register("ickd")
class ICCLoss(DistillationLoss[Tensor]):
    r"""Squared distance between the channel correlations of student and teacher.

    With G = F Fᵀ of an image's map F (channels, pixels) and, by default, every row of G divided by
    its length,

    .. math::  L = \frac{1}{B C} \sum_b \lVert \hat G(C_l(f^s_b)) - \hat G(f^t_b) \rVert_F^2

    which lies in 0..4. C_l lifts the student to the teacher's channels: a 1x1 convolution and a
    batch norm, trained with the student and thrown away. Since G is (channels, channels), both maps
    may have any size. With a grid, one distance is taken for every cell (ICKD-S, section 3.4).

    Both forms compute the same number: "direct" builds the matrices, O(C² p); "low_memory" expands
    the square into products of (pixels, pixels) kernels, O(C p²), and never builds one (section
    3.6). "auto" takes the latter where p <= C/2.

    Example:
        >>> loss = ICCLoss(channels_s=64, channels_t=256)
        >>> loss(student_map, teacher_map).backward()

    Args:
        channels_s: channels of the student's map.
        channels_t: channels of the teacher's; as many as the student's if left out.
        normalize: "row" (the published programs'), "none" (the paper's formula, divided by C²
            instead of C) or "frobenius" (G / |G|, the sum of the squared difference).
        grid: (n, m) cells, None for the whole map.
        embed: lift the student; without it both sides must have the same number of channels.
        form: "auto", "direct" or "low_memory".
        reduction: "row_mean", or "sum" for the sum over rows; of the row form.
        cell_reduction: over the cells of a grid, "mean" or "sum".
        per_pixel: divide G by the number of pixels first; of the form "none".
        reference_scale: "imagenet" divides by the batch once more, as that program does; its
            weight then depends on the batch size.
        reference_compat: the published programs' bits: no masks for dead channels, and with a grid
            its extra cells and the sum over cells divided by C·B·B.

    Dead channels (`dead_channels`): in the row form, a row that is dead in the teacher leaves the
    loss, one that is dead in the student counts 1 and has no gradient; the divisor stays B·C.

    Raises:
        ValueError: an option that does not exist, or a grid without cells.
        UserError: without embedding, channels that differ.
    """

    signal = "last"
    default_weight = 2.5

    def __init__(
        self,
        channels_s: int,
        channels_t: int | None = None,
        normalize: Normalize = "row",
        grid: Sequence[int] | None = None,
        embed: bool = True,
        form: Form = "auto",
        *,
        reduction: Literal["row_mean", "sum"] = "row_mean",
        cell_reduction: Literal["mean", "sum"] = "mean",
        per_pixel: bool = False,
        reference_scale: Literal["imagenet"] | None = None,
        reference_compat: bool = False,
    ) -> None:
        super().__init__()
        options = {
            "normalize": (normalize, get_args(Normalize)),
            "form": (form, get_args(Form)),
            "reduction": (reduction, ("row_mean", "sum")),
            "cell_reduction": (cell_reduction, ("mean", "sum")),
            "reference_scale": (reference_scale, (None, "imagenet")),
        }
        for option, (value, known) in options.items():
            if value not in known:
                raise ValueError(f"{option} must be one of {known}, got {value!r}")
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise ValueError(f"grid must be two numbers of 1 or more, got {grid}")
        channels_t = channels_s if channels_t is None else channels_t
        if not embed and channels_s != channels_t:
            raise UserError(
                f"without an embedding the student's {channels_s} channels cannot be compared with "
                f"the teacher's {channels_t}",
                fix="use embed=True",
            )
        self.embed_s = Embedding(channels_s, channels_t) if embed else nn.Identity()
        self.normalize: Normalize = normalize
        self.form: Form = form
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]))
        self.reduction, self.cell_reduction = reduction, cell_reduction
        self.per_pixel, self.reference_scale = per_pixel, reference_scale
        self.reference_compat = reference_compat

    @classmethod
    def for_taps(cls, student: Taps, teacher: Taps, **kwargs: Any) -> ICCLoss:
        """Build the loss for two networks; see `DistillationLoss.for_taps`."""
        maps = student.signal(cls.signal), teacher.signal(cls.signal)
        check_maps(*maps, cls.name)
        return cls(maps[0].shape[1], maps[1].shape[1], **kwargs)

    def forward(
        self,
        student: Float[Tensor, "batch_s channels_s height_s width_s"],
        teacher: Float[Tensor, "batch_t channels_t height_t width_t"],
    ) -> Float[Tensor, ""]:
        """Compare a map with a map.

        Args:
            student: the last map of the student.
            teacher: that of the teacher; taken as constant.

        Raises:
            UserError: shapes that do not fit, or a grid finer than a map.
        """
        check_maps(student, teacher, self.name)
        batch, teacher = len(student), teacher.detach()
        with torch.autocast(student.device.type, enabled=False):
            student = adapt(self.embed_s, in_full_precision(student))
        check_maps(student, teacher, self.name, channels=True)
        if self.grid is not None:
            student, teacher = self._cut(student, teacher, self.grid)
        cells = len(student) // batch
        with torch.autocast(student.device.type, enabled=False):
            s_ncp = in_full_precision(student).flatten(2)
            t_ncq = in_full_precision(teacher).flatten(2).to(s_ncp.dtype)
            total = self._distance(s_ncp, t_ncq)
        total = total / batch
        if self.grid is not None and self.reference_compat:
            return total / batch
        if self.cell_reduction == "mean":
            total = total / cells
        return total / batch if self.reference_scale == "imagenet" else total

    def _cut(
        self, student: Tensor, teacher: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Cells of both maps; the published program's may differ in number."""
        compat, batch = self.reference_compat, len(student)
        cells = [grid_cells(f, grid, reference_compat=compat) for f in (student, teacher)]
        if len(cells[0]) != len(cells[1]):
            ours, theirs = (len(f) // batch for f in cells)
            what = f"the student's map has {ours} cells and the teacher's {theirs}"
            fix = "choose maps of one size, or leave reference_compat out"
            raise UserError(what, fix=fix)
        return cells[0], cells[1]

    def _distance(
        self, s_ncp: Float[Tensor, "n c p"], t_ncq: Float[Tensor, "n c q"]
    ) -> Float[Tensor, ""]:
        """Sum over maps, divided by what belongs to the channels."""
        channels = s_ncp.shape[1]
        pixels = max(s_ncp.shape[2], t_ncq.shape[2])
        small = self.form == "low_memory" or (self.form == "auto" and 2 * pixels <= channels)
        if self.normalize == "row":
            if self.reference_compat:
                total = _row_distance_official(s_ncp, t_ncq)
            else:
                total = (_row_distance_low_memory if small else _row_distance)(s_ncp, t_ncq)
            return total / channels if self.reduction == "row_mean" else total
        products = _products_low_memory if small else _products
        ss, tt, st = products(s_ncp, t_ncq)
        if self.normalize == "frobenius":
            return _unit_distance(ss, tt, st).sum()
        if self.per_pixel:
            p, q = s_ncp.shape[2], t_ncq.shape[2]
            ss, tt, st = ss / p**2, tt / q**2, st / (p * q)
        return (ss + tt - 2 * st).sum() / channels**2

    def extra_repr(self) -> str:
        """Show what differs from one loss to another in the printed module."""
        grid = "" if self.grid is None else f", grid={self.grid}"
        return f"normalize={self.normalize!r}, form={self.form!r}{grid}"


@register("ickd_grid")
class GridICCLoss(ICCLoss):
    """ICC of every cell of a grid, on maps of the same width and without embedding (ICKD-S).

    The decoders of DeepLabV3+ all end in 256 channels (section 3.2). See `ICCLoss`.
    """

    default_weight = 2.0

    def __init__(
        self,
        channels_s: int,
        channels_t: int | None = None,
        normalize: Normalize = "row",
        grid: Sequence[int] = (16, 16),
        embed: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(channels_s, channels_t, normalize, grid, embed, **options)


def _alive(squared_nc: Float[Tensor, "n c"]) -> Bool[Tensor, "n c"]:
    norms = squared_nc.detach().clamp_min(0).sqrt()
    # a row that is no number is not masked: the loss must say so
    return (norms > DEAD * norms.mean(1, keepdim=True)) | ~norms.isfinite()


def _row_norms_squared(f_ncp: Float[Tensor, "n c p"]) -> Float[Tensor, "n c"]:
    """Squared lengths of the rows of F Fᵀ, which is not built."""
    return ((f_ncp @ (f_ncp.mT @ f_ncp)) * f_ncp).sum(2)


def _row_distance(
    s_ncp: Float[Tensor, "n c p"], t_ncq: Float[Tensor, "n c q"]
) -> Float[Tensor, ""]:
    g_s, g_t = s_ncp @ s_ncp.mT, t_ncq @ t_ncq.mT
    squares = g_s.square().sum(2), g_t.square().sum(2)
    masks = [_alive(square) for square in squares]
    hats = [
        g * (alive / torch.where(alive, square, 1).sqrt()).unsqueeze(2)
        for g, square, alive in zip((g_s, g_t), squares, masks, strict=True)
    ]
    return ((hats[0] - hats[1]).square().sum(2) * masks[1]).sum()


def _row_distance_official(
    s_ncp: Float[Tensor, "n c p"], t_ncq: Float[Tensor, "n c q"]
) -> Float[Tensor, ""]:
    hats = [F.normalize(f @ f.mT, dim=2, eps=_OFFICIAL_EPS) for f in (s_ncp, t_ncq)]
    return (hats[0] - hats[1]).square().sum()


def _row_distance_low_memory(
    s_ncp: Float[Tensor, "n c p"], t_ncq: Float[Tensor, "n c q"]
) -> Float[Tensor, ""]:
    cosines, alive_s, alive_t = _RowCosines.apply(s_ncp, t_ncq)  # pyright: ignore[reportGeneralTypeIssues]
    return (alive_t * (1 + alive_s.to(cosines.dtype))).sum() - 2 * cosines


class _RowCosines(torch.autograd.Function):
    """Sum over rows of ⟨G_s,i , G_t,i⟩ / (|G_s,i| |G_t,i|), and which rows are alive.

    No (channels, channels) matrix is built: ⟨G_s,i , G_t,i⟩ = rowsum((T TᵀS) ∘ S)_i and
    |G_s,i|² = rowsum((S SᵀS) ∘ S)_i. The products T TᵀS and S SᵀS are half of the gradient as well,

        d/dS = (A + Aᵀ) S  with  A = diag(a) G_t - diag(b) G_s,

    a_i = 1 / (|G_s,i| |G_t,i|) and b_i = cosine_i / |G_s,i|², so that it takes four more products
    where autograd takes seven.
    """

    @staticmethod
    def forward(
        ctx: Any, s_ncp: Tensor, t_ncq: Tensor
    ) -> tuple[Tensor, Bool[Tensor, "n c"], Bool[Tensor, "n c"]]:
        ssts_ncp = s_ncp @ (s_ncp.mT @ s_ncp)
        ttts_ncp = t_ncq @ (t_ncq.mT @ s_ncp)
        squares = (ssts_ncp * s_ncp).sum(2), _row_norms_squared(t_ncq)
        alive_s, alive_t = map(_alive, squares)
        both = alive_s & alive_t
        inverse = [torch.where(both, square, 1).rsqrt() for square in squares]
        a_nc = inverse[0] * inverse[1] * both
        cosine_nc = (ttts_ncp * s_ncp).sum(2) * a_nc
        b_nc = cosine_nc * inverse[0].square()
        ctx.save_for_backward(s_ncp, t_ncq, ssts_ncp, ttts_ncp, a_nc, b_nc)
        ctx.mark_non_differentiable(alive_s, alive_t)
        return cosine_nc.sum(), alive_s, alive_t

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's doing)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None]:
        s_ncp, t_ncq, ssts_ncp, ttts_ncp, a_nc, b_nc = ctx.saved_tensors
        a_nc1, b_nc1 = a_nc.unsqueeze(2), b_nc.unsqueeze(2)
        gradient = (a_nc1 * ttts_ncp).addcmul_(b_nc1, ssts_ncp, value=-1)
        gradient += t_ncq @ (t_ncq.mT @ (a_nc1 * s_ncp))
        gradient -= s_ncp @ (s_ncp.mT @ (b_nc1 * s_ncp))
        return gradient * grads[0], None


def _unit_distance(
    ss: Float[Tensor, " n"], tt: Float[Tensor, " n"], st: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """|G_s / |G_s| - G_t / |G_t||² out of their products; matrices of zeros stay zero."""
    there = [square != 0 for square in (ss, tt)]
    lengths = [torch.where(t, x, 1).sqrt() for t, x in zip(there, (ss, tt), strict=True)]
    return there[0].to(st.dtype) + there[1] - 2 * st / lengths[0] / lengths[1]


def _products(
    s_ncp: Float[Tensor, "n c p"], t_ncq: Float[Tensor, "n c q"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """⟨G_s, G_s⟩, ⟨G_t, G_t⟩ and ⟨G_s, G_t⟩ of every map."""
    g_s, g_t = s_ncp @ s_ncp.mT, t_ncq @ t_ncq.mT
    return g_s.square().sum((1, 2)), g_t.square().sum((1, 2)), (g_s * g_t).sum((1, 2))


def _products_low_memory(
    s_ncp: Float[Tensor, "n c p"], t_ncq: Float[Tensor, "n c q"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    kernels = s_ncp.mT @ s_ncp, t_ncq.mT @ t_ncq, s_ncp.mT @ t_ncq
    ss, tt, st = (k.square().sum((1, 2)) for k in kernels)
    return ss, tt, st
