"""The picture of the method: how the channels of teacher and students relate."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy import ndarray

from ickd.diagnostics import HOMOLOGOUS, Diversity
from ickd.report.common import (
    PLAIN,
    STUDENT,
    TEACHER,
    around,
    caption,
    color_bar,
    distance_text,
    empty_figure,
    matrix,
    number,
    off_diagonal,
    panel,
    title,
)
from ickd.report.order import ChannelOrder, cluster_channels
from tenfold.plotting import INK, PAPER, describe, style

NAMES = ("Teacher", "Distilled student", "Plain student")
COLORS = (TEACHER, STUDENT, PLAIN)
_LINES = ("-", "-", (0, (4, 1.6)))
_FLOOR = 1e-4
"""Singular values below this share of the largest are not shown."""
_STRIPS = ("#8B949E", "#C9D1D9")
_ORDER = "side by side, alike ones together (hierarchical clustering; grey strips: groups)"
_LIFTED = (
    f"Rows and columns: the teacher's channels, {_ORDER}, in one order for all. The students' "
    "channels are brought to them by a linear map that least squares fits on other images."
)
_OWN = f"Rows and columns: the network's channels, {_ORDER}."
HOMOLOGY = (
    f"Homologous pairs: two channels with a |correlation| over all pixels above {HOMOLOGOUS:g}."
)
DISTANCE = (
    "ICC distance: squared distance between the rows of both channel correlations, brought to "
    "unit length; mean over channels and images, 0 to 4."
)
_DOUBT = "Unreliable (?): too few pixels to fit the linear map on; take more images."


class _Network(NamedTuple):
    """One network as the panels draw it."""

    name: str
    color: str
    line: str | tuple[float, tuple[float, ...]]
    found: Diversity
    correlation: Float[ndarray, "channels channels"]
    doubtful: bool = False


def icc_triptych(
    teacher: Diversity,
    student: Diversity | None = None,
    plain: Diversity | None = None,
    *,
    names: Sequence[str] = NAMES,
    heading: str = "",
    doubtful: Collection[int] = (),
) -> Figure:
    """Channel correlations of a teacher, of its student, and of a student that had no teacher.

    All matrices have one order of channels, that of a hierarchical clustering of the teacher's;
    the students' maps have been brought to the teacher's channels by their lift. White is the
    median of the teacher's pairs. Below: what differs from the teacher, the figures of diversity,
    the histogram of all pairs of channels and the singular values.

    Args:
        teacher: diagnostics of its tap.
        student: of the distilled student, lifted to the teacher's channels.
        plain: likewise of the other one.
        names: of the three networks.
        heading: over everything.
        doubtful: positions of networks whose lift was fitted on too few pixels; their distance is
            marked as unreliable.

    Raises:
        ValueError: correlations of different sizes: a student that was not lifted.
    """
    found = [d for d in (teacher, student, plain) if d is not None]
    present = [i for i, d in enumerate((teacher, student, plain)) if d is not None]
    networks = [
        _Network(names[i], COLORS[i], _LINES[i], d, d.icc.double().numpy(), i in doubtful)
        for i, d in zip(present, found, strict=True)
    ]
    sizes = {network.correlation.shape for network in networks}
    if len(sizes) > 1:
        raise ValueError(f"correlations of different channels, {sizes}: lift the students")
    order = cluster_channels(networks[0].correlation)
    return _lay_out(networks, order, heading)


def _lay_out(networks: Sequence[_Network], order: ChannelOrder, heading: str) -> Figure:
    """Matrices; figures beside the differences; histogram and spectrum."""
    several = len(networks) > 1
    columns = max(2, len(networks))
    height = (3.15 if several else 0) + 3.15 + 2.7 + (0.35 if heading else 0)
    width = 9.6 if columns == 3 else 7.2
    fig = empty_figure(width, height)
    with style():
        ratios = [1, 1, 0.8] if several else [1, 0.8]
        grid = fig.add_gridspec(len(ratios), 2 * columns, height_ratios=ratios)
        if heading:
            fig.suptitle(heading, x=0.012, ha="left", size=13, weight="bold")
    caption(fig, _captions(networks))
    squares = [slice(2 * k, 2 * k + 2) for k in range(columns)]
    _draw_matrices([panel(fig, grid, 0, at) for at in squares[: len(networks)]], networks, order)
    beside = panel(fig, grid, 1, squares[0]) if several else panel(fig, grid, 0, squares[1])
    _draw_figures(beside, networks)
    if several:
        panels = [panel(fig, grid, 1, at) for at in squares[1 : len(networks)]]
        _draw_differences(panels, networks, order)
    _draw_histogram(panel(fig, grid, -1, slice(0, columns)), networks)
    _draw_spectrum(panel(fig, grid, -1, slice(columns, None)), networks)
    return fig


def _captions(networks: Sequence[_Network]) -> list[str]:
    if len(networks) == 1:
        return [_OWN, HOMOLOGY]
    doubt = [_DOUBT] if any(network.doubtful for network in networks) else []
    return [_LIFTED, f"{HOMOLOGY} {DISTANCE}", *doubt]


def _draw_matrices(
    panels: Sequence[Axes], networks: Sequence[_Network], order: ChannelOrder
) -> None:
    pairs = [off_diagonal(network.correlation) for network in networks]
    typical = float(np.median(pairs[0]))
    norm = around(typical, np.concatenate([*pairs, [1.0]]), 0.0)
    for ax, network in zip(panels, networks, strict=True):
        matrix(ax, order.arrange(network.correlation), norm)
        _mark_groups(ax, order)
        title(ax, network.name, _subtitle(network), network.color)
    color_bar(panels, norm, "mean correlation (white: the median)")


def _subtitle(network: _Network) -> str:
    channels = f"{network.found.channels} channels"
    if network.found.icc_distance is None:
        return channels
    distance = distance_text(network.found.icc_distance, doubtful=network.doubtful)
    return f"{channels} · ICC distance {distance}"


def _draw_differences(
    panels: Sequence[Axes], networks: Sequence[_Network], order: ChannelOrder
) -> None:
    teacher, students = networks[0], networks[1:]
    gaps = [student.correlation - teacher.correlation for student in students]
    limit = float(np.quantile(np.abs(np.concatenate([g.ravel() for g in gaps])), 0.995)) or 1e-6
    norm = Normalize(-limit, limit)
    for ax, student, gap in zip(panels, students, gaps, strict=True):
        matrix(ax, order.arrange(gap), norm)
        _mark_groups(ax, order)
        mean = float(np.abs(off_diagonal(gap)).mean())
        title(ax, f"{student.name} − teacher", f"mean |difference| {number(mean)}", student.color)
    color_bar(panels, norm, "difference of correlations")


def _mark_groups(ax: Axes, order: ChannelOrder) -> None:
    """Thin seams between the groups, and strips of two greys at the left and at the top."""
    count = len(order.channels)
    edges = [0, *order.borders, count]
    with style():
        for border in order.borders:
            ax.axhline(border - 0.5, color=PAPER, lw=0.7)
            ax.axvline(border - 0.5, color=PAPER, lw=0.7)
        for index, (start, stop) in enumerate(itertools.pairwise(edges)):
            color = _STRIPS[index % 2]
            a, length = start / count, (stop - start) / count
            for corner, size in (
                ((-0.032, 1 - a - length), (0.02, length)),
                ((a, 1.012), (length, 0.02)),
            ):
                patch = Rectangle(corner, *size, transform=ax.transAxes, clip_on=False)
                patch.set(facecolor=color, edgecolor=PAPER, linewidth=0.6)
                ax.add_patch(patch)


def _draw_figures(ax: Axes, networks: Sequence[_Network]) -> None:
    """Bars of the three figures, each on a scale of its own."""
    rows = {
        "effective rank": [n.found.effective_rank for n in networks],
        f"homologous pairs, |ρ| > {HOMOLOGOUS:g} (%)": [
            100 * n.found.homology_ratio for n in networks
        ],
        "ICC distance to the teacher": [n.found.icc_distance for n in networks],
    }
    rows = {name: values for name, values in rows.items() if any(v is not None for v in values)}
    with style():
        ax.set_axis_off()
        y = 0.0
        for name, values in rows.items():
            ax.text(0, y, name, va="center", size=8.5, color=INK)
            y += 0.75
            largest = max(v for v in values if v is not None) or 1.0
            for network, value in zip(networks, values, strict=True):
                if value is None:
                    continue
                ax.barh(y, 0.72 * value / largest, height=0.58, color=network.color)
                text = number(value, 3 if "ICC" in name else 1)
                text += " ?" if network.doubtful and "ICC" in name else ""
                ax.text(0.72 * value / largest + 0.02, y, text, va="center", size=8.5)
                y += 0.68
            y += 0.45
        ax.set(xlim=(0, 1), ylim=(max(y, 7.0) - 0.5, -0.5))  # bars of a few keep their size
    title(ax, "Diversity", "rank and pairs: of own channels")


def _draw_histogram(ax: Axes, networks: Sequence[_Network]) -> None:
    pairs = [off_diagonal(n.correlation) for n in networks]
    edges = np.linspace(min(map(np.min, pairs)), max(map(np.max, pairs)), 31)
    with style():
        for network, values in zip(networks, pairs, strict=True):
            share, _ = np.histogram(values, edges)
            look = {"color": network.color, "linewidth": 1.8, "linestyle": network.line}
            ax.stairs(100 * share / len(values), edges, label=network.name, **look)
            ax.stairs(100 * share / len(values), edges, fill=True, alpha=0.1, color=network.color)
        ax.set_ylim(bottom=0)
    describe(
        ax, title="All pairs of channels", x="mean channel correlation", y="share of pairs (%)"
    )


def _draw_spectrum(ax: Axes, networks: Sequence[_Network]) -> None:
    with style():
        for network in networks:
            values = network.found.spectrum.numpy()
            kept = values[values > 0]
            place = np.arange(1, len(kept) + 1)
            look = {"color": network.color, "linestyle": network.line, "marker": ""}
            ax.plot(place, 100 * kept, label=network.name, **look)
        ax.set_yscale("log")
        highest = max(float(network.found.spectrum[0]) for network in networks)
        floor = max(ax.get_ylim()[0], 100 * _FLOOR * highest)
        for network in networks:
            values = network.found.spectrum.numpy()
            rank = network.found.effective_rank
            height = np.interp(rank, np.arange(1, len(values) + 1), 100 * values)
            ax.vlines(rank, floor, height, color=network.color, lw=1.2, ls=(0, (1, 1.5)))
            ax.plot(rank, height, "o", color=network.color, ms=6)
        ax.set_ylim(bottom=floor)
        ax.yaxis.set_major_formatter("{x:g}")
        if len(networks) > 1:
            ax.legend(loc="upper right")
    describe(
        ax,
        title="Singular values",
        x="position (dot: effective rank)",
        y="share of their sum (%)",
    )
