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
from tenfold.plotting import INK, PALETTE, PAPER, curve, points, save, style

_PANELS = {
    "cosine": ("Token similarity", "cosine, mean over texts"),
    "cosine_excess": ("Excess similarity", "inside a text minus between texts"),
    "relative_distance": ("Distance to equal rows", "over the norm, logarithmic"),
    "log_contraction": ("Contraction", "ln of each block's factor on $d_M$"),
    "effective_rank": ("Effective rank", "mean over the sample of texts"),
    "identity_accuracy": ("Identity retained", "nearest first vector is the token's own"),
}
_TIES = "; below 1 at\nlayer 0: a word that comes twice shares its vector"
_MARKERS = "osD^vP"
_DASHES = ("-", (0, (3, 1.6)), (0, (1, 1.2)), (0, (5, 1.4, 1, 1.4)))
_THIN, _STEP, _THICK = 1.5, 2.2, 7.5


def compare(models: Mapping[str, Tables]) -> Figure:
    """Every measure of several models in a panel; over relative depth if their depths differ.

    Curves that cover one another are all seen: each is thinner than those below it, with other
    dashes, and has its markers elsewhere. A star is the similarity of the fused states.

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
        for index, tables in enumerate(models.values()):
            values = np.array(tables.column(name))
            if known(values):
                layers = np.arange(len(values))
                x = layers if len(depths) == 1 else layers / layers[-1]
                _draw(ax, x, values, index, len(models))
        ties = name == "identity_accuracy" and any(
            tables.column(name)[0] < 1 for tables in models.values()
        )
        head, below = _PANELS[name]
        title(ax, head, below + _TIES * ties)
        _scale(ax, name, depths)
    # Every model is in the legend once, from a panel that has it or not.
    for index, model in enumerate(models):
        name = plain(model, 44)
        _draw(fig.axes[0], np.empty(0), np.empty(0), index, len(models), label=name)
    if "cosine" in shown:
        _draw_fused(fig.axes[shown.index("cosine")], models, depths)
    under(fig, fig.axes[0])
    return fig


def _draw(
    ax: Axes, x: np.ndarray, values: np.ndarray, index: int, count: int, label: str = ""
) -> None:
    color, marker = PALETTE[index % len(PALETTE)], _MARKERS[index % len(_MARKERS)]
    line = curve(ax, x, values, label=label, color=color, marker=marker)
    step = min(_STEP, (_THICK - _THIN) / max(1, count - 1))
    line.set(linewidth=_THIN + step * (count - 1 - index), zorder=3 + index / count)
    line.set_linestyle(_DASHES[index % len(_DASHES)])
    line.set(markersize=6, markeredgecolor=PAPER, markeredgewidth=0.7)
    if len(x) > 0:
        line.set_markevery((index % len(x), min(count, len(x))))


def _draw_fused(ax: Axes, models: Mapping[str, Tables], depths: set[int]) -> None:
    """Stars at the last layer; where they cover one another, smaller ones on larger ones."""
    found = [
        (index, len(tables.layers) - 1, tables.run["fused_cosine"])
        for index, tables in enumerate(models.values())
        if isinstance(tables.run.get("fused_cosine"), int | float)
    ]
    step = min(6.0, 24 / max(1, len(found) - 1))
    for below, (index, last, fused) in enumerate(found):
        color, size = PALETTE[index % len(PALETTE)], 11 + step * (len(found) - 1 - below)
        x = last if len(depths) == 1 else 1
        points(ax, [x], [fused], color=color, marker="*", size=size)
        ax.lines[-1].set(markeredgewidth=0.4, zorder=5, clip_on=False)
    if found:
        points(ax, [], [], label="similarity of the fused states", color=INK, marker="*", size=9)


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
