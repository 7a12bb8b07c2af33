"""Which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from filip_vl.report.common import WRONG, empty_figure, panel, short, title
from tenfold.plotting import MUTED, describe, heatmap, style

_VALUES, _NAMED = 14, 40  # classes up to which cells have values, and rows have names
_LISTED = 12  # of the most frequent confusions


def confusion_matrix(
    counts: Int[ndarray, "classes classes"], names: Sequence[str], heading: str = ""
) -> Figure:
    """Share of every class's images that each class was predicted for, and the commonest errors.

    Args:
        counts: row t, column p: images of class t for which p was the best.
        names: of the classes.
        heading: over everything.

    Raises:
        ValueError: not one name for each class, or no class.
    """
    if counts.shape != (len(names), len(names)) or not len(names):
        raise ValueError(f"counts are {counts.shape}, names {len(names)}")
    totals = counts.sum(1, keepdims=True)
    shares = np.where(totals > 0, 100 * counts / np.maximum(totals, 1), np.nan)
    side = min(7.5, max(3.6, 0.4 * len(names)))
    fig = empty_figure(side + 4.2, side + 1.2, heading)
    with style():
        grid = fig.add_gridspec(1, 2, width_ratios=[side + 1.2, 2.8])
    ax = panel(fig, grid, 0, 0)
    shown = [short(name, 18) for name in names] if len(names) <= _NAMED else [""] * len(names)
    fmt = "{:.0f}" if len(names) <= _VALUES else ""
    heatmap(ax, shares, rows=shown, columns=shown, fmt=fmt, limits=(0.0, 100.0))
    with style():
        if len(names) > _VALUES:  # seams would hide the cells
            for line in list(ax.lines):
                line.remove()
        ax.set_aspect("equal")
        ax.tick_params(axis="x", rotation=90)
        right = counts.diagonal().sum() / max(int(counts.sum()), 1)
    describe(ax, x="predicted", y="truth")
    title(ax, "Predicted classes", f"per cent of each class; {100 * right:.1f} % of all are right")
    _list_errors(panel(fig, grid, 0, 1), counts, shares, names, max(_LISTED, int(3.3 * side)))
    return fig


def _list_errors(
    ax: Axes,
    counts: Int[ndarray, "classes classes"],
    shares: Float[ndarray, "classes classes"],
    names: Sequence[str],
    room: int,
) -> None:
    """The errors with the largest share of their class, from the top of so many lines."""
    wrong = np.where(np.eye(len(counts), dtype=bool) | np.isnan(shares), 0, shares)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_LISTED]
    cells = [(int(t), int(p)) for t, p in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    cells = [cell for cell in cells if wrong[cell] > 0]
    with style():
        ax.set(xlim=(0, 1), ylim=(room - 0.3, -0.7))
        ax.set_axis_off()
        if not cells:
            ax.text(0, 0, "none", size=8.5, color=MUTED, va="center")
        for line, (truth, predicted) in enumerate(cells):
            share = f"{wrong[truth, predicted]:.0f} %"
            ax.text(0.17, line, share, ha="right", va="center", size=8.5, color=WRONG)
            told = f"{short(names[truth], 17)} \u2192 {short(names[predicted], 17)}"
            ax.text(0.22, line, told, va="center", size=8.5)
    title(ax, "Commonest errors", "truth \u2192 predicted")
