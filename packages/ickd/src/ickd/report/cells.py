"""Channel correlations in every cell of a grid: what ICKD-S compares."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray
from torch import Tensor

from ickd.report.common import (
    around,
    color_bar,
    distance_text,
    empty_figure,
    matrix,
    off_diagonal,
    panel,
    title,
)
from ickd.report.correlation import COLORS, NAMES
from ickd.report.order import ChannelOrder, cluster_channels
from tenfold.plotting import PAPER, heatmap, style

MOST_CELLS = 8
"""Rows or columns of cells beyond which a matrix in each is too small to be seen."""


MOST_NUMBERS = 6
"""Rows or columns of cells up to which each one has its distance written in."""


class CellCorrelations(NamedTuple):
    """What a network says in every cell of one grid.

    Attributes:
        icc: of the map that was brought to the teacher's channels, see `diagnostics.cell_icc`.
        distances: ICC distance to the teacher, None for the teacher itself.
        images: over which the distances are means.
    """

    icc: Float[Tensor, "n m channels channels"]
    distances: Float[Tensor, "n m"] | None = None
    images: int = 1


def icc_cells(
    teacher: CellCorrelations,
    student: CellCorrelations,
    plain: CellCorrelations | None = None,
    *,
    image: Float[ndarray, "height width 3"] | None = None,
    names: Sequence[str] = NAMES,
    heading: str = "",
    doubtful: Collection[int] = (),
) -> Figure:
    """A matrix of channel correlations in every cell, and the distance to the teacher's in each.

    All matrices have one order of channels, that of a clustering of the teacher's mean.

    Args:
        teacher: its correlations.
        student: of the distilled student.
        plain: of the other one.
        image: that the maps belong to, 0..1; left out where they are means over many.
        names: of the three networks.
        heading: over everything.
        doubtful: positions of networks whose lift was fitted on too few pixels; their distances are
            marked as unreliable.

    Raises:
        ValueError: grids or channels that differ, more than `MOST_CELLS` rows or columns, or a
            student without distances.
    """
    found = [network for network in (teacher, student, plain) if network is not None]
    _check(found)
    cells = [network.icc.double().numpy() for network in found]
    order = cluster_channels(cells[0].mean((0, 1)))
    columns = len(found)
    fig = empty_figure(9.6 if columns == 3 else 7.2, 6.3 + (0.35 if heading else 0))
    with style():
        grid = fig.add_gridspec(2, columns)
        if heading:
            fig.suptitle(heading, x=0.012, ha="left", size=13, weight="bold")
    top = [panel(fig, grid, 0, k) for k in range(columns)]
    n, m = teacher.icc.shape[:2]
    for ax, name, color in zip(top, names, COLORS, strict=False):
        title(ax, name, f"{n}×{m} cells of {len(order.channels)} channels", color)
    _draw_mosaics(top, cells, order)
    below = [panel(fig, grid, 1, k) for k in range(columns)]
    _draw_image(below[0], image, (n, m))
    _draw_distances(below[1:], found[1:], names[1:], [k in doubtful for k in range(1, columns)])
    return fig


def _check(found: Sequence[CellCorrelations]) -> None:
    shapes = {tuple(network.icc.shape) for network in found}
    if len(shapes) > 1:
        raise ValueError(f"correlations of different grids or channels: {shapes}")
    (shape,) = shapes
    if max(shape[:2]) > MOST_CELLS:
        what = f"a grid of {shape[0]}x{shape[1]} cells"
        raise ValueError(f"{what} cannot be seen; at most {MOST_CELLS}x{MOST_CELLS} can")
    if any(network.distances is None for network in found[1:]):
        raise ValueError("a student needs its distances to the teacher")


def mosaic(
    cells: Float[ndarray, "n m channels channels"], order: ChannelOrder
) -> Float[ndarray, "_ _"]:
    """One matrix out of the cells' matrices, in an order of channels, with gaps of NaN between."""
    n, m, channels, _ = cells.shape
    gap = max(1, round(0.06 * channels))
    step = channels + gap
    whole = np.full((n * step - gap, m * step - gap), np.nan)
    for row, column in np.ndindex(n, m):
        top, left = row * step, column * step
        whole[top : top + channels, left : left + channels] = order.arrange(cells[row, column])
    return whole


def _draw_mosaics(
    panels: Sequence[Axes],
    cells: Sequence[Float[ndarray, "n m channels channels"]],
    order: ChannelOrder,
) -> None:
    pairs = [off_diagonal(c) for c in cells[0].reshape(-1, *cells[0].shape[2:])]
    norm = around(float(np.median(pairs)), np.concatenate([c.ravel() for c in cells]), 0.005)
    for ax, values in zip(panels, cells, strict=True):
        matrix(ax, mosaic(values, order), norm)
        ax.spines[:].set_visible(False)
    color_bar(panels, norm, "correlation (white: the median)")


def _draw_image(
    ax: Axes, image: Float[ndarray, "height width 3"] | None, grid: tuple[int, int]
) -> None:
    """The image under its grid; without one, nothing."""
    if image is None:
        ax.set_axis_off()
        return
    height, width = image.shape[:2]
    with style():
        ax.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
        for k in range(1, grid[0]):
            ax.axhline(k * height / grid[0], color=PAPER, lw=1.2)
        for k in range(1, grid[1]):
            ax.axvline(k * width / grid[1], color=PAPER, lw=1.2)
        ax.set(xticks=[], yticks=[], anchor="N")
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    title(ax, "Image", "and the cells of the grid")


def _draw_distances(
    panels: Sequence[Axes],
    students: Sequence[CellCorrelations],
    names: Sequence[str],
    doubts: Sequence[bool],
) -> None:
    values = [s.distances.numpy() for s in students if s.distances is not None]
    limits = 0.8 * min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    n, m = values[0].shape
    fmt = "{:.2f}" if max(n, m) <= MOST_NUMBERS else ""
    looks = zip(names, COLORS[1:], doubts, strict=False)
    for ax, cells, one, (name, color, doubtful) in zip(
        panels, values, students, looks, strict=False
    ):
        heatmap(ax, cells, rows=[""] * n, columns=[""] * m, fmt=fmt, limits=limits)
        ax.set(aspect="equal", anchor="N")
        images = "" if one.images == 1 else f" of {one.images} images"
        mean = distance_text(float(cells.mean()), doubtful=doubtful)
        title(ax, f"{name}: ICC distance", f"mean{images} {mean}", color)
