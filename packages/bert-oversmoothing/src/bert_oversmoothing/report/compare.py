"""Curves of several models or fusion heads, one over another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bert_oversmoothing.report.axes import layer_axis, log_axis
from bert_oversmoothing.report.common import empty_figure, known, panel, title, under
from bert_oversmoothing.report.tables import Tables
from bert_oversmoothing.report.words import plain
from tenfold.plotting import INK, PALETTE, curve, save, style

_PANELS = {
    "cosine": ("Token similarity", "cosine, mean over texts"),
    "cosine_excess": ("Excess similarity", "inside a text minus between texts"),
    "relative_distance": ("Distance to equal rows", "over the norm, logarithmic"),
    "log_contraction": ("Contraction", "ln of each block's factor on $d_M$"),
    "effective_rank": ("Effective rank", "mean over the sample of texts"),
    "identity_accuracy": ("Identity retained", "nearest first vector is the token's own"),
}
_MARKERS, _LINES = "osD^vP", ("-", "--", ":")


def compare(models: Mapping[str, Tables]) -> Figure:
    """Every measure of several models in a panel; over relative depth if their depths differ.

    Args:
        models: tables of each, by its name.

    Raises:
        ValueError: no model, or none with a measure that could be shown.
    """
    shown = [n for n in _PANELS if any(known(t.column(n)) for t in models.values())]
    if not shown:
        raise ValueError("there is nothing to compare")
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    fig = empty_figure(max(5.2, 3.7 * columns), 3.0 * rows + 0.6)
    with style():
        grid = fig.add_gridspec(rows, columns)
    depths = {len(tables.layers) - 1 for tables in models.values()}
    for place, name in enumerate(shown):
        ax = panel(fig, grid, *divmod(place, columns))
        for index, (model, tables) in enumerate(models.items()):
            values = np.array(tables.column(name))
            if known(values):
                layers = np.arange(len(values))
                _draw(ax, layers if len(depths) == 1 else layers / layers[-1], values, model, index)
        title(ax, *_PANELS[name])
        _scale(ax, name, depths)
    # Every model is in the legend once, from a panel that has it or not.
    for index, model in enumerate(models):
        _draw(fig.axes[0], np.empty(0), np.empty(0), model, index, told=True)
    under(fig, fig.axes[0])
    return fig


def _draw(
    ax: Axes, x: np.ndarray, values: np.ndarray, model: str, index: int, *, told: bool = False
) -> None:
    curve(
        ax,
        x,
        values,
        label=plain(model, 44) if told else "",
        color=PALETTE[index % len(PALETTE)],
        marker=_MARKERS[index % len(_MARKERS)],
        linestyle=_LINES[index // len(PALETTE) % len(_LINES)],
    ).set_markersize(4.5)


def _scale(ax: Axes, name: str, depths: set[int]) -> None:
    if name == "relative_distance":
        with style():
            ax.set_yscale("log")
        log_axis(ax)
    with style():
        if name == "log_contraction":
            ax.axhline(0, color=INK, lw=0.8, zorder=1)
        if len(depths) == 1:
            layer_axis(ax, max(depths))
        else:
            ax.set(xlim=(-0.03, 1.03), xlabel="layer over depth")


def draw_compare(models: Mapping[str, Tables], path: str | Path) -> Path:
    """Write `compare` as a picture.

    Returns:
        ``path``.
    """
    return save(compare(models), path)
