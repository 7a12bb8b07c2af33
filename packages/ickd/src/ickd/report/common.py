"""What the pictures share: colours of networks and losses, matrices of many channels, saving."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from numpy import ndarray

from ickd.scores import ALONE
from tenfold.plotting import INK, MUTED, PALETTE, PAPER, figure, save, style

TEACHER, STUDENT, PLAIN = INK, PALETTE[2], MUTED
"""Colours of the teacher, of the student that learns from it, and of one that does not."""

MIXED = PALETTE[1]
"""Colour of a student that learns by ICKD and by other losses."""

DIVERGING = LinearSegmentedColormap.from_list(
    "ickd-diverging",
    ["#7A3200", PALETTE[1], "#F3B98F", "#F7F7F7", "#8FC3E3", PALETTE[0], "#04263E"],
).with_extremes(bad=PAPER)
"""Orange below the middle, blue above."""


def empty_figure(width: float, height: float) -> Figure:
    """A figure in the house style whose panels are still to be placed; sizes in inches."""
    fig, panels = figure(width, height)
    panels[0].remove()
    return fig


def panel(fig: Figure, grid: GridSpec, rows: slice | int, columns: slice | int) -> Axes:
    """A new panel over some cells of a grid."""
    with style():
        return fig.add_subplot(grid[rows, columns])


def matrix(ax: Axes, values: Float[ndarray, "rows columns"], norm: Normalize) -> None:
    """Draw a matrix without seams, as one of hundreds of channels needs it.

    Args:
        ax: the panel; it becomes square and loses its ticks.
        values: to be coloured by `DIVERGING`.
        norm: which values the colours stand for.
    """
    with style():
        ax.imshow(values, cmap=DIVERGING, norm=norm, interpolation="nearest")
        ax.set(xticks=[], yticks=[], anchor="N")
        ax.grid(visible=False)
        ax.spines[:].set(visible=True, color=MUTED, linewidth=0.6)


def color_bar(panels: Sequence[Axes], norm: Normalize, label: str) -> None:
    """A colour bar beside the last panel, whose ticks are the ends and the neutral value."""
    middle = getattr(norm, "vcenter", 0.0)
    ticks = [norm.vmin or 0.0, middle, norm.vmax or 0.0]
    with style():
        fig = panels[-1].figure
        colors = ScalarMappable(norm, DIVERGING)
        look = {"shrink": 0.9, "aspect": 26, "pad": 0.015, "panchor": False}
        bar = fig.colorbar(colors, ax=list(panels), **look)
        bar.outline.set_visible(False)
        bar.set_ticks(ticks, labels=[number(tick) for tick in ticks])
        bar.ax.tick_params(length=0)
        bar.set_label(label, labelpad=8, size=8.5)


def off_diagonal(values: Float[ndarray, "channels channels"]) -> Float[ndarray, " pairs"]:
    """All entries but those of a channel with itself."""
    return values[~np.eye(len(values), dtype=bool)]


def around(centre: float, values: Float[ndarray, " values"], quantile: float = 0.005) -> Normalize:
    """Colours that are neutral at `centre` and reach to the extremes of the values on either side.

    Args:
        centre: the neutral value.
        values: all that will be drawn.
        quantile: share of the values that may lie beyond the end colours on each side.
    """
    low, high = np.quantile(values, [quantile, 1 - quantile])
    least = 1e-3 * max(abs(centre), float(np.abs(values).max()), 1e-6)
    return TwoSlopeNorm(centre, min(float(low), centre - least), max(float(high), centre + least))


def title(ax: Axes, text: str, below: str = "", color: str = INK) -> None:
    """A panel's title in two lines: a bold one, and a plain one under it."""
    with style():
        ax.set_title(text, color=color, pad=21 if below else 8)
        note = ax.annotate(below, (0, 1), (0, 7), "axes fraction", "offset points")
        note.set(va="bottom", color=MUTED, size=8.5)
        note.set_in_layout(False)  # a long line must not push the panels apart


def caption(fig: Figure, paragraphs: Sequence[str]) -> None:
    """Paragraphs under everything; the figure grows by their height."""
    width, height = fig.get_size_inches()
    letters = int(15 * width)  # of the size below that go into a line
    lines = [line for text in paragraphs for line in textwrap.wrap(text, letters)]
    fig.set_size_inches(width, height + 0.18 * len(lines))
    with style():
        look = {"size": 8.5, "color": MUTED, "linespacing": 1.45}
        fig.supxlabel("\n".join(lines), x=0.012, ha="left", **look)


def distance_text(value: float, *, doubtful: bool, digits: int = 3) -> str:
    """An ICC distance, marked where the map that it takes was fitted on too few pixels."""
    return number(value, digits) + (" (unreliable)" if doubtful else "")


def number(value: float, digits: int = 2) -> str:
    """A number with a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def signed(value: float, digits: int = 2) -> str:
    """A difference, with its sign always."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def loss_colors(names: Sequence[str]) -> dict[str, str]:
    """One colour for each set of losses, by whether ICKD is in it.

    Grey for none, green for ICKD alone, orange for ICKD beside others, blue for others alone.

    Args:
        names: as "none", "at" and "kd+ickd".
    """
    return {name: _loss_color(name) for name in names}


def _loss_color(name: str) -> str:
    if name == ALONE:
        return PLAIN
    ours = ["ickd" in loss for loss in name.split("+")]
    return STUDENT if all(ours) else MIXED if any(ours) else PALETTE[0]


def save_all(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Write every figure as <folder>/<name>.png.

    Returns:
        The paths, in the order of the figures.
    """
    return [save(fig, Path(folder) / f"{name}.png") for name, fig in figures.items()]
