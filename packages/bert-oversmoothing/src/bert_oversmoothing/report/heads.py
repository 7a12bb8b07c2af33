"""Heat maps of the attention heads, layer by layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from bert_oversmoothing.report.common import (
    SEQUENTIAL,
    color_bar,
    empty_figure,
    known,
    matrix,
    panel,
    title,
)
from bert_oversmoothing.report.tables import Tables
from tenfold.plotting import INK, PAPER, style

STATISTICS = {
    "row_entropy": ("Row entropy", "1: looks everywhere alike"),
    "self_mass": ("Self mass", "attention of a token on itself"),
    "sink_mass": ("Sink mass", "attention on the most watched token"),
    "sink_first": ("Sink is the first token", "share of the texts"),
    "sink_last": ("Sink is the last token", "share of the texts"),
    "mean_distance": ("Mean distance", "of the attended tokens, in tokens"),
    "second_modulus": ("Second eigenvalue", "modulus; 0: mixes at once"),
    "asymmetry": ("Asymmetry", "0: as symmetric as a GCN's graph"),
    "vo_norm": ("Norm of $W^{VO}$", "largest singular value"),
}
"""Columns of heads.csv beside λ, and how they are told."""

_SMALL = {"self_mass", "mean_distance", "vo_norm"}
_VALUES = 16 * 12  # cells up to which each has its value written in


def contraction_of_heads(tables: Tables) -> Figure | None:
    """λ of every head of every layer: by how much the head alone can contract."""
    values = head_matrix(tables, "lam")
    if not known(values.flat):
        return None
    heads, layers = values.shape
    fig = empty_figure(max(5.4, 1.9 + 0.42 * layers), 1.6 + 0.3 * max(heads, 2))
    with style():
        ax = fig.add_subplot()
    largest = float(np.nanmax(values))
    small = largest < 0.3  # else all the colours would be pale
    norm = Normalize(0.0, max(largest, 1e-6 if small else 1.0))
    # Three digits tell small values apart, none the smallest.
    fits = values.size <= _VALUES and largest >= 0.01
    _draw(ax, values, norm, digits=(2 + small) * fits)
    symbol = "\N{GREEK SMALL LETTER LAMDA}"
    below = "0: all tokens get the same; 1: like the identity, or a permutation"
    title(ax, f"{symbol} by layer and head", below)
    color_bar(ax, norm, symbol)
    return fig


def head_statistics(tables: Tables) -> Figure | None:
    """The other statistics of the heads, a small heat map for each."""
    found = {name: head_matrix(tables, name) for name in STATISTICS}
    shown = {name: values for name, values in found.items() if known(values.flat)}
    if not shown:
        return None
    heads, layers = next(iter(shown.values())).shape
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    wide = max(3.2, 1.3 + 0.13 * layers)
    fig = empty_figure(wide * columns, rows * (1.35 + max(0.5, 0.11 * heads)))
    with style():
        grid = fig.add_gridspec(rows, columns)
    for place, (name, values) in enumerate(shown.items()):
        ax = panel(fig, grid, *divmod(place, columns))
        # What is small as a rule is drawn over the range of the data, the rest up to 1.
        least = 1e-9 if name in _SMALL else 1.0
        norm = Normalize(0.0, max(least, float(np.nanmax(values))))
        _draw(ax, values, norm)
        title(ax, *STATISTICS[name])
        color_bar(ax, norm)
    return fig


def head_matrix(tables: Tables, name: str) -> np.ndarray:
    """A column of the heads as (heads, layers), NaN where there is no value."""
    layers = len(tables.layers) - 1
    heads = 1 + max((int(row["head"] or 0) for row in tables.heads), default=-1)
    found = np.full((heads, layers), np.nan)
    for row in tables.heads:
        value = row.get(name)
        if isinstance(value, int | float):
            found[int(row["head"] or 0), int(row["layer"] or 1) - 1] = value
    return found


def _draw(ax: Axes, values: np.ndarray, norm: Normalize, digits: int = 0) -> None:
    """Cells with their values to so many digits, if any."""
    heads, layers = values.shape
    extent = (0.5, layers + 0.5, heads - 0.5, -0.5)
    matrix(ax, values, norm, aspect="auto", extent=extent)
    with style():
        ax.set(xlabel="layer", ylabel="head")
        ax.set_xticks(_ticks(1, layers, 12))
        ax.set_yticks(_ticks(0, heads - 1, 8))
        for (head, layer), value in np.ndenumerate(values):
            if digits and math.isfinite(value):
                dark = SEQUENTIAL(norm(value))[1] < 0.6
                text = f"{value:.{digits}f}" if value < 9.995 else f"{value:.0f}"
                look: dict[str, Any] = {"ha": "center", "va": "center", "size": 7.5}
                ax.text(layer + 1, head, text, color=PAPER if dark else INK, **look)


def _ticks(first: int, last: int, most: int) -> list[int]:
    step = next(s for s in (1, 2, 3, 4, 5, 10, 20, 50, 100) if (last - first) // s < most)
    return [*range(first, last + 1, step)]
