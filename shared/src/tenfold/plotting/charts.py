"""Curves, points, grouped bars and heat maps on one panel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike, NDArray

from tenfold.plotting.labels import add_label
from tenfold.plotting.style import FAINT, INK, PALETTE, PAPER, style

_ERROR_BAR: dict[str, Any] = {"elinewidth": 1.1, "capthick": 1.1}
_SEQUENTIAL = LinearSegmentedColormap.from_list(
    "tenfold-sequential", ["#F3F7FB", "#9CC9E3", "#2F8EC4", "#0072B2", "#063A5E"]
).with_extremes(bad=FAINT)
_DIVERGING = LinearSegmentedColormap.from_list(
    "tenfold-diverging",
    ["#8F3B00", "#D55E00", "#F3B98F", "#F7F7F7", "#8FC3E3", "#0072B2", "#063A5E"],
).with_extremes(bad=FAINT)


def curve(
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    *,
    label: str = "",
    color: str | None = None,
    marker: str = "o",
    linestyle: str = "-",
    x_error: ArrayLike | None = None,
    y_error: ArrayLike | None = None,
    band: tuple[ArrayLike, ArrayLike] | None = None,
) -> Line2D:
    """Draw a line through points, with error bars or inside a band.

    Args:
        ax: the panel.
        x: abscissae, in the order in which they are to be joined.
        y: ordinates.
        label: its name in the legend.
        color: the next one of the palette if None.
        marker: matplotlib's letter, "" for none.
        linestyle: matplotlib's, such as "-" or "--".
        x_error: half lengths of horizontal error bars, (n,), or (2, n) below and above.
        y_error: the same, vertical.
        band: lower and upper edge of a shaded band, absolute values.
    """
    with style():
        (line,) = ax.plot(
            x,
            y,
            label=label,
            color=color,
            marker=marker,
            linestyle=linestyle,
            zorder=3,
        )
        if x_error is not None or y_error is not None:
            _error_bars(ax, x, y, x_error, y_error, str(line.get_color()))
        if band is not None:
            low, high = (np.asarray(edge, dtype=float) for edge in band)
            ax.fill_between(
                np.asarray(x, dtype=float), low, high, color=line.get_color(), alpha=0.16, lw=0
            )
    return line


def points(
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    *,
    labels: Sequence[str] = (),
    label: str = "",
    color: str = PALETTE[1],
    marker: str = "o",
    size: float = 8.0,
    x_error: ArrayLike | None = None,
    y_error: ArrayLike | None = None,
) -> None:
    """Draw unconnected points, each with its own label if wanted.

    `save` moves every label to the side of its point where it covers no line, no other point and
    no other label.

    Args:
        ax: the panel.
        x: abscissae.
        y: ordinates.
        labels: one text a point, or none at all.
        label: name of the whole set in the legend.
        color: of markers and labels.
        marker: matplotlib's letter.
        size: diameter of the marker, in typographic points.
        x_error: half lengths of horizontal error bars, (n,), or (2, n) below and above.
        y_error: the same, vertical.

    Raises:
        ValueError: if there are labels, but not one a point.
    """
    xs, ys = np.atleast_1d(np.asarray(x, float)), np.atleast_1d(np.asarray(y, float))
    if labels and len(labels) != len(xs):
        raise ValueError(f"{len(labels)} labels for {len(xs)} points")
    with style():
        if x_error is not None or y_error is not None:
            _error_bars(ax, xs, ys, x_error, y_error, color)
        ax.plot(
            xs,
            ys,
            linestyle="",
            label=label,
            color=color,
            marker=marker,
            markersize=size,
            zorder=4,
        )
        for at, text in zip(zip(xs, ys, strict=True), labels, strict=False):
            add_label(ax, text, at, color)


def _error_bars(
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    x_error: ArrayLike | None,
    y_error: ArrayLike | None,
    color: str,
) -> None:
    look = {"fmt": "none", "ecolor": color, "alpha": 0.75, "zorder": 2, **_ERROR_BAR}
    ax.errorbar(x, y, xerr=x_error, yerr=y_error, **look)


def bars(
    ax: Axes,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    errors: Mapping[str, Sequence[float]] | None = None,
    colors: Mapping[str, str] | None = None,
    fmt: str = "{:.1f}",
) -> None:
    """Draw grouped bars: one group a name, in it one bar a series.

    Args:
        ax: the panel.
        groups: names under the groups.
        series: values by series, one a group.
        errors: half lengths of error bars, by series.
        colors: by series; the palette in order if None.
        fmt: how the value over a bar is written; "" for none.

    Raises:
        ValueError: if a series has not one value a group.
    """
    width = 0.8 / len(series)
    centres = np.arange(len(groups))
    with style():
        for index, (name, values) in enumerate(series.items()):
            if len(values) != len(groups):
                raise ValueError(f"{name!r} has {len(values)} values for {len(groups)} groups")
            drawn = ax.bar(
                centres + (index - (len(series) - 1) / 2) * width,
                values,
                width=width * 0.9,
                yerr=None if errors is None else errors.get(name),
                error_kw={"ecolor": INK, **_ERROR_BAR},
                color=PALETTE[index % len(PALETTE)] if colors is None else colors[name],
                label=name,
            )
            if fmt:
                halo = [withStroke(linewidth=2.5, foreground=PAPER)]
                ax.bar_label(drawn, fmt=fmt, padding=3, fontsize=8, path_effects=halo)
        ax.set_xticks(centres, groups)
        ax.tick_params(axis="x", length=0)
        ax.grid(visible=False, axis="x")
        ax.margins(x=0.04, y=0.12)


def heatmap(
    ax: Axes,
    values: ArrayLike,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    fmt: str = "{:.2f}",
    centre: float | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a matrix as coloured cells with their values written in.

    Args:
        ax: the panel.
        values: (rows, columns); NaN leaves a cell empty.
        rows: names of the rows, from the top.
        columns: names of the columns.
        fmt: how a value is written; "" for colours alone.
        centre: value that is neutral; given, the colours diverge from it (signed quantities).
        limits: values of the end colours, with `centre` as far to both sides as the farther; those
            of the data if None.

    Raises:
        ValueError: if names and values do not fit.
    """
    cells = np.asarray(values, dtype=float)
    if cells.shape != (len(rows), len(columns)):
        raise ValueError(f"values are {cells.shape}, names ({len(rows)}, {len(columns)})")
    cmap = _SEQUENTIAL if centre is None else _DIVERGING
    norm = _normalise(cells, centre, limits)
    with style():
        ax.imshow(np.ma.masked_invalid(cells), cmap=cmap, norm=norm, aspect="auto")
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows)
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        # White seams between the cells.
        for edge in range(1, len(columns)):
            ax.axvline(edge - 0.5, color=PAPER, lw=1.5)
        for edge in range(1, len(rows)):
            ax.axhline(edge - 0.5, color=PAPER, lw=1.5)
        for (row, column), value in np.ndenumerate(cells):
            if fmt and math.isfinite(value):
                ink = _readable_on(cmap(norm(value)))
                text = fmt.format(value).replace("-", "\N{MINUS SIGN}")
                ax.text(column, row, text, ha="center", va="center", color=ink, size=8.5)


def _normalise(
    cells: NDArray[np.floating], centre: float | None, limits: tuple[float, float] | None
) -> Normalize:
    finite = cells[np.isfinite(cells)]
    low, high = limits or ((finite.min(), finite.max()) if finite.size else (0.0, 1.0))
    if centre is not None:
        reach = max(abs(high - centre), abs(centre - low)) or 1.0
        low, high = centre - reach, centre + reach
    return Normalize(low, high if high > low else low + 1.0, clip=True)


def _readable_on(rgba: Sequence[float]) -> str:
    # Relative luminance of WCAG 2. Ink and white contrast equally at 0.21, but on a saturated
    # blue white reads better than the formula says, up to 0.3, where its contrast falls to 3.
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if luminance > 0.3 else PAPER
