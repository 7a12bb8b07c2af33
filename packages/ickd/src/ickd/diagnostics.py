"""What distillation does to a map: its distance to the teacher's, its rank, its redundancy.

The diagnostics of section 5. All is computed in float64 from sums over pixels, batch by batch, so
that no more than (channels, channels) is kept of any number of images.

>>> lift = fit_channel_map(student_maps, teacher_maps)  # on some images
>>> icc_distance(student_test, teacher_test, lift)  # on others
0.54
>>> effective_rank(student_test)
33.8

Legend of the shape suffixes: c channels, n pixels of all images together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation import ICCLoss, dead_channels, grid_cells, icc_matrix
from tenfold.distillation.ickd import Normalize
from tenfold.distillation.maps import pool_to_smaller
from tenfold.distillation.taps import check_maps
from tenfold.errors import UserError

Maps: TypeAlias = Tensor | Iterable[Tensor]
"""A batch of maps (batch, channels, height, width), or batches of them, read once."""

Correlation: TypeAlias = Normalize | Literal["cosine"]
"""How products of channels are normalised: "cosine" divides each by both channels' lengths."""

Lift: TypeAlias = Callable[[Tensor], Tensor]
"""What brings a student's map to the teacher's channels: a `ChannelMap`, or a trained embedding."""

HOMOLOGOUS = 0.5
"""Two channels are homologous if their correlation is above this, or below its negative."""

_RELATIVE_ZERO = 1e-12
"""Share of the largest eigenvalue or variance below which one is rounding."""


class ChannelMap(NamedTuple):
    """A 1x1 convolution with bias, as least squares fits it."""

    weight: Float[Tensor, "channels_out channels_in"]
    bias: Float[Tensor, " channels_out"]

    def __call__(
        self, maps: Float[Tensor, "batch channels_in height width"]
    ) -> Float[Tensor, "batch channels_out height width"]:
        """Bring maps to the other channels, in float64."""
        return F.conv2d(_double(maps), self.weight[:, :, None, None], self.bias)


class Diversity(NamedTuple):
    """All diagnostics of one tap.

    Attributes:
        images: how many were measured.
        effective_rank: see the function; 0 to `channels`.
        homology_ratio: see the function; 0..1.
        dead: share of channels without a say in an image, mean over images (section 11).
        spectrum: singular values of the centred map, divided by their sum, largest first.
        icc: `mean_icc` in its cosine form, of the lifted map where there is a lift.
        icc_distance: to the teacher, 0..4; None without one.
    """

    images: int
    effective_rank: float
    homology_ratio: float
    dead: float
    spectrum: Float[Tensor, " channels"]
    icc: Float[Tensor, "channels_t channels_t"]
    icc_distance: float | None

    @property
    def channels(self) -> int:
        """Channels of the map itself."""
        return len(self.spectrum)


class Moments:
    """Mean and scatter of the pixels of maps, batch by batch (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.pixels = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, maps: Float[Tensor, "batch channels height width"]) -> None:
        """Count the pixels of a batch.

        Raises:
            UserError: NaN or infinite values, or other channels than before.
        """
        x_cn = _double(maps).transpose(0, 1).flatten(1)
        mean, pixels = x_cn.mean(1), x_cn.shape[1]
        x_cn = x_cn - mean[:, None]
        if not self.pixels:
            self.mean, self.scatter = torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean))
        if mean.shape != self.mean.shape:
            raise UserError(f"maps of {len(mean)} channels after maps of {len(self.mean)}")
        apart, total = mean - self.mean, self.pixels + pixels
        between = self.pixels * pixels / total * torch.outer(apart, apart)
        self.scatter = self.scatter + x_cn @ x_cn.mT + between
        self.mean = self.mean + pixels / total * apart
        self.pixels = total

    @property
    def rounding(self) -> float:
        """Scatter that is no more than rounding: of a constant channel, or of no direction."""
        largest = (
            self.scatter.diagonal().max() + self.pixels * _RELATIVE_ZERO * self.mean.square().max()
        )
        return float(_RELATIVE_ZERO * largest)


class ChannelMapFit:
    """Least squares for the 1x1 map from a student's channels to a teacher's, batch by batch."""

    def __init__(self) -> None:
        self.moments = Moments()
        self.channels = 0

    def update(
        self,
        student: Float[Tensor, "batch channels_s height_s width_s"],
        teacher: Float[Tensor, "_ channels_t height_t width_t"],
    ) -> None:
        """Count a batch; where the sizes differ, the larger is averaged down to the smaller.

        Only the fit resizes: `icc_distance` compares every map at its own size.

        Raises:
            UserError: maps of different images, with NaN, or of other channels than before.
        """
        check_maps(student, teacher, "the fit of a channel map")
        student, teacher = pool_to_smaller(_double(student), _double(teacher))
        self.channels = student.shape[1]
        self.moments.update(torch.cat([student, teacher], dim=1))

    def solve(self) -> ChannelMap:
        """The map of least squared error; of several, the one with the smallest weights.

        Raises:
            ValueError: nothing was counted.
        """
        if not self.moments.pixels:
            raise ValueError("there is no map to fit")
        c, scatter, mean = self.channels, self.moments.scatter, self.moments.mean
        inverse = torch.linalg.pinv(scatter[:c, :c], rtol=_RELATIVE_ZERO, hermitian=True)
        weight = scatter[c:, :c] @ inverse
        return ChannelMap(weight, mean[c:] - weight @ mean[:c])


class DiversityMeter:
    """Collects the diagnostics of one tap, batch by batch.

    Args:
        lift: brings the map to the teacher's channels; None takes it as it is.
        normalize: of the correlations in the distance, see `tenfold.distillation.icc_matrix`.
        grid: (n, m) cells in which the distance is taken, None for the whole map.
    """

    def __init__(
        self,
        lift: Lift | None = None,
        normalize: Normalize = "row",
        grid: tuple[int, int] | None = None,
    ) -> None:
        self.lift, self.grid = lift, grid
        self.normalize: Normalize = normalize
        self.moments, self.images, self.dead, self.distance = Moments(), 0, 0.0, 0.0
        self.icc = torch.zeros((), dtype=torch.float64)
        self.compared = 0

    def update(
        self,
        maps: Float[Tensor, "batch channels height width"],
        teacher: Float[Tensor, "_ channels_t height_t width_t"] | None = None,
    ) -> None:
        """Count a batch.

        Args:
            maps: of the network that is measured.
            teacher: the teacher's of the same images, to which the distance is taken.

        Raises:
            UserError: maps with NaN, or that cannot be compared.
        """
        self.moments.update(maps)
        self.images += len(maps)
        self.dead += float(dead_channels(maps).double().mean(1).sum())
        lifted = _lifted(maps, self.lift)
        self.icc = self.icc + _correlation(lifted, "cosine").sum(0)
        if teacher is not None:
            self.compared += len(maps)
            self.distance += len(maps) * _distance(lifted, teacher, self.normalize, self.grid)

    def result(self) -> Diversity:
        """The figures of all batches.

        Raises:
            ValueError: nothing was counted.
        """
        if not self.images:
            raise ValueError("there is no map to measure")
        spectrum = _spectrum(self.moments)
        return Diversity(
            self.images,
            _rank(spectrum),
            _homology(self.moments, HOMOLOGOUS),
            self.dead / self.images,
            spectrum,
            self.icc / self.images,
            self.distance / self.compared if self.compared else None,
        )


def fit_channel_map(student: Maps, teacher: Maps) -> ChannelMap:
    """The 1x1 map with bias from a student's channels to a teacher's, by least squares.

    It stands for the embedding of section 3.2 where a student was trained without one, or where it
    was thrown away. Maps of different size are averaged down to the smaller size first.

    Args:
        student: maps of some images.
        teacher: of the same images, in the same batches.

    Raises:
        UserError: maps of different images, or with NaN.
    """
    fit = ChannelMapFit()
    for ours, theirs in zip(_batches(student), _batches(teacher), strict=True):
        fit.update(ours, theirs)
    return fit.solve()


def icc_distance(
    student: Maps,
    teacher: Maps,
    lift: Lift | None = None,
    *,
    normalize: Normalize = "row",
    grid: tuple[int, int] | None = None,
) -> float:
    """L_CC of section 3.1 between two networks, mean over images; 0..4 in the row form.

    Args:
        student: maps of images on which `lift` was not fitted.
        teacher: of the same images, in the same batches; they may have another size.
        lift: brings the student's map to the teacher's channels, see `fit_channel_map`; the trained
            embedding of an `ICCLoss` does too. None takes the map as it is.
        normalize: of the correlations.
        grid: (n, m) cells, over which the mean is taken; None for the whole map.

    Raises:
        UserError: maps of different images or channels, with NaN, or smaller than the grid.
    """
    total, images = 0.0, 0
    for ours, theirs in zip(_batches(student), _batches(teacher), strict=True):
        total += len(ours) * _distance(_lifted(ours, lift), theirs, normalize, grid)
        images += len(ours)
    if not images:
        raise ValueError("there is no map to compare")
    return total / images


def cell_distances(
    student: Maps, teacher: Maps, grid: tuple[int, int], lift: Lift | None = None
) -> Float[Tensor, "n m"]:
    """The row form of L_CC in every cell of a grid, mean over images (section 3.4).

    Args:
        student: maps.
        teacher: of the same images, in the same batches.
        grid: (n, m).
        lift: see `icc_distance`.
    """
    total, images = torch.zeros(grid, dtype=torch.float64), 0
    for ours, theirs in zip(_batches(student), _batches(teacher), strict=True):
        cells = [_cells(x, grid).unbind(1) for x in (_lifted(ours, lift), _double(theirs))]
        values = [_distance(s, t) for s, t in zip(*cells, strict=True)]
        total = total + len(ours) * torch.tensor(values, dtype=torch.float64).view(grid)
        images += len(ours)
    return total / images


def effective_rank(maps: Maps) -> float:
    """How many directions a map's channels really use: exp of an entropy, 0 to channels.

    The entropy is that of the singular values of the centred (channels, images · pixels) matrix,
    divided by their sum (Roy and Vetterli, "The effective rank", 2007). A constant map has 0.

    Args:
        maps: any number of images.
    """
    return _rank(_spectrum(moments(maps)))


def homology_ratio(maps: Maps, threshold: float = HOMOLOGOUS) -> float:
    """Share of the pairs of different channels whose |correlation| is above a threshold, 0..1.

    Correlation is Pearson's, over all pixels of all images. Channels that are constant have none
    and are left out; where fewer than two vary, the ratio is 0.

    Args:
        maps: any number of images.
        threshold: 0..1.
    """
    return _homology(moments(maps), threshold)


def mean_icc(
    maps: Maps, normalize: Correlation = "row", lift: Lift | None = None
) -> Float[Tensor, "channels channels"]:
    """The channel correlation of section 3.1, mean over images, in float64.

    Args:
        maps: any number of images.
        normalize: "row", "frobenius" or "none", see `tenfold.distillation.icc_matrix`; or "cosine",
            symmetric and in -1..1, which is the easiest to read.
        lift: brings every map to other channels first.
    """
    total, images = torch.zeros((), dtype=torch.float64), 0
    for batch in _batches(maps):
        total = total + _correlation(_lifted(batch, lift), normalize).sum(0)
        images += len(batch)
    return total / images


def cell_icc(
    maps: Maps, grid: tuple[int, int], normalize: Correlation = "row", lift: Lift | None = None
) -> Float[Tensor, "n m channels channels"]:
    """`mean_icc` in every cell of a grid.

    Args:
        maps: any number of images.
        grid: (n, m).
        normalize: see `mean_icc`.
        lift: brings every map to other channels first.
    """
    total, images = torch.zeros((), dtype=torch.float64), 0
    for batch in _batches(maps):
        cells = grid_cells(_lifted(batch, lift), grid)
        total = total + _correlation(cells, normalize).unflatten(0, (len(batch), -1)).sum(0)
        images += len(batch)
    return (total / images).unflatten(0, grid)


def diversity(
    maps: Maps,
    teacher: Maps | None = None,
    lift: Lift | None = None,
    *,
    normalize: Normalize = "row",
    grid: tuple[int, int] | None = None,
) -> Diversity:
    """All diagnostics of a tap in one pass.

    Args:
        maps: any number of images.
        teacher: maps of the same images in the same batches, for the distance.
        lift: brings the maps to the teacher's channels.
        normalize: of the correlations in the distance.
        grid: (n, m) cells of the distance.
    """
    meter = DiversityMeter(lift, normalize, grid)
    if teacher is None:
        for batch in _batches(maps):
            meter.update(batch)
    else:
        for ours, theirs in zip(_batches(maps), _batches(teacher), strict=True):
            meter.update(ours, theirs)
    return meter.result()


def moments(maps: Maps) -> Moments:
    """Mean and scatter over the pixels of all images."""
    found = Moments()
    for batch in _batches(maps):
        found.update(batch)
    return found


def _batches(maps: Maps) -> Iterator[Tensor]:
    return iter([maps] if isinstance(maps, Tensor) else maps)


def _double(maps: Tensor) -> Tensor:
    """On the processor, since not every accelerator has float64."""
    found = maps.detach().to("cpu", torch.float64)
    if not torch.isfinite(found).all():
        raise UserError("a map is NaN or infinite", fix="look at the images and at the weights")
    return found


@torch.no_grad()
def _lifted(maps: Tensor, lift: Lift | None) -> Tensor:
    return _double(maps if lift is None else lift(maps))


def _correlation(maps: Tensor, normalize: Correlation) -> Float[Tensor, "batch c c"]:
    if normalize != "cosine":
        return icc_matrix(maps, normalize)
    # a channel that is zero everywhere correlates with none, not even with itself
    return icc_matrix(F.normalize(maps.flatten(2), dim=2, eps=1e-30).unsqueeze(3), "none")


def _distance(
    student: Tensor,
    teacher: Tensor,
    normalize: Normalize = "row",
    grid: tuple[int, int] | None = None,
) -> float:
    """Mean over a batch, of maps that have the same channels already."""
    check_maps(student, teacher, "the ICC distance")
    loss = ICCLoss(student.shape[1], teacher.shape[1], normalize, grid, embed=False)
    return float(loss(student, _double(teacher)))


def _cells(maps: Tensor, grid: tuple[int, int]) -> Float[Tensor, "batch cells channels _ _"]:
    return grid_cells(maps, grid).unflatten(0, (len(maps), -1))


def _spectrum(moments: Moments) -> Float[Tensor, " channels"]:
    """Normalised singular values of the centred map, whose Gram matrix the scatter is."""
    energy = torch.linalg.eigvalsh(moments.scatter).flip(0)
    values = torch.where(energy > moments.rounding, energy, 0).sqrt()
    return values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)


def _rank(spectrum: Float[Tensor, " channels"]) -> float:
    return float(torch.special.entr(spectrum).sum().exp()) if spectrum.any() else 0.0


def _homology(moments: Moments, threshold: float) -> float:
    variance = moments.scatter.diagonal()
    varies = variance > moments.rounding
    if varies.sum() < 2:
        return 0.0
    deviation = variance[varies].sqrt()
    correlation = moments.scatter[varies][:, varies] / torch.outer(deviation, deviation)
    pairs = torch.triu_indices(*correlation.shape, offset=1)
    return float((correlation[*pairs].abs() > threshold).double().mean())
