"""Matrices over tokens and layers: similarity of tokens, weights of a gate, CKA of layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from bert_oversmoothing.report.common import (
    DIVERGING,
    SEQUENTIAL,
    color_bar,
    empty_figure,
    known,
    matrix,
    panel,
    title,
)
from bert_oversmoothing.report.tables import Tables
from bert_oversmoothing.report.words import number, plain
from tenfold.plotting import PALETTE, style

_LETTERS = 14  # of a token
_TOKEN = 0.135  # inches that a token's name takes


def token_cosines(tables: Tables) -> Figure | None:
    """Cosine similarity of all tokens of a text, in the first, middle and last layer."""
    last = len(tables.layers) - 1
    layers = {"cosine_first": 0, "cosine_middle": last // 2, "cosine_last": last}
    shown = {
        layers[name]: tables.sample[name]
        for name in layers
        if known(tables.sample.get(name, np.empty(0)).flat)
    }
    if not shown:
        return None
    count = len(next(iter(shown.values())))
    names = _tokens(tables, count)
    named = count <= 32  # three matrices side by side
    side = max(2.5, _TOKEN * count) if named else 3.6
    letters = 0.075 * max(len(name) for name in names) if named else 0.4
    fig = empty_figure(len(shown) * (side + 0.2) + letters + 1.1, side + letters + 0.9)
    with style():
        grid = fig.add_gridspec(1, len(shown))
    lowest = min(float(np.nanmin(values)) for values in shown.values())
    signed = lowest < -0.05  # rounding is no opposite direction
    norm = Normalize(-1.0 if signed else 0.0, 1.0)
    colors = DIVERGING if signed else SEQUENTIAL
    for column, (layer, values) in enumerate(shown.items()):
        ax = panel(fig, grid, 0, column)
        matrix(ax, values, norm, colors)
        _name(ax, names, "x", named=named)
        _name(ax, names if column == 0 else [], "y", named=named)
        title(ax, f"Layer {layer}", f"mean {number(_mean(values))}" if count > 1 else "")
    color_bar(fig.axes, norm, "cosine similarity", colors, aspect=30, shrink=0.8)
    return fig


def _mean(values: np.ndarray) -> float:
    """Of the pairs of different tokens."""
    return float(np.nanmean(values[~np.eye(len(values), dtype=bool)]))


def gate_weights(tables: Tables) -> Figure | None:
    """The weight of every layer at every token of a text (the paper's Figure 7)."""
    values = tables.sample.get("gate_weights")
    if values is None or values.ndim != 2 or not known(values.flat):
        return None
    count, layers = values.shape
    names = _tokens(tables, count)
    numbers = _layers(tables, layers)
    named = count <= 64
    letters = 0.075 * max(len(name) for name in names) if named else 0.4
    width = max(3.6, _TOKEN * 1.15 * min(count, 60))
    fig = empty_figure(width + 3.0, max(1.6, 0.2 * layers) + letters + 1.1)
    with style():
        grid = fig.add_gridspec(1, 2, width_ratios=[width, 1.4])
    ax = panel(fig, grid, 0, 0)
    norm = Normalize(0.0, max(float(np.nanmax(values)), 1e-9))
    matrix(ax, values.T, norm, origin="lower", aspect="auto")
    _name(ax, names, "x", named=named)
    with style():
        ax.set_yticks(range(layers), numbers)
        ax.set_ylabel("layer")
    title(ax, "Weight of every layer at every token", "of one text; a token's weights sum to 1")
    mean = panel(fig, grid, 0, 1, sharey=ax)
    with style():
        mean.barh(range(layers), np.nanmean(values, axis=0), height=0.7, color=PALETTE[0])
        mean.tick_params(axis="y", length=0, labelleft=False)
        mean.grid(visible=False, axis="y")
        mean.locator_params(axis="x", nbins=3)
        mean.set_xlabel("mean weight")
    title(mean, "By layer", f"equal: {1 / layers:.2f}")
    color_bar(ax, norm, "weight")
    return fig


def layer_similarity(tables: Tables) -> Figure | None:
    """Linear CKA between all layers."""
    values = tables.sample.get("cka")
    if values is None or not known(values.flat):
        return None
    side = max(2.8, 0.16 * len(values))
    fig = empty_figure(side + 1.9, side + 1.0)
    with style():
        ax = fig.add_subplot()
    norm = Normalize(0.0, 1.0)
    matrix(ax, values, norm, origin="lower")
    with style():
        ax.set(xlabel="layer", ylabel="layer")
        ticks = [*range(0, len(values), max(1, len(values) // 8))]
        ax.set_xticks(ticks)
        ax.set_yticks(ticks)
    title(ax, "Likeness of layers (CKA)", "1: the same up to rotation and scale")
    color_bar(ax, norm, "linear CKA")
    return fig


def _tokens(tables: Tables, count: int) -> list[str]:
    """Names of the tokens of the text that is shown, their numbers where there are none."""
    text = tables.run.get("sample_text") or {}
    tokens = [plain(str(token), _LETTERS) for token in text.get("tokens") or []]
    return tokens if len(tokens) == count else [str(n) for n in range(count)]


def _layers(tables: Tables, count: int) -> list[str]:
    """Numbers of the layers that are fused."""
    text = tables.run.get("sample_text") or {}
    layers = [str(layer) for layer in text.get("layers") or []]
    return layers if len(layers) == count else [str(n) for n in range(count)]


def _name(ax: Axes, names: Sequence[str], axis: str, *, named: bool) -> None:
    """Every token's name at an axis, or positions alone where there are too many."""
    set_ticks, set_label = (
        (ax.set_xticks, ax.set_xlabel) if axis == "x" else (ax.set_yticks, ax.set_ylabel)
    )
    with style():
        if named:
            set_ticks(range(len(names)), names, size=7.5, rotation=90.0 if axis == "x" else 0.0)
        elif names:
            step = next(s for s in (10, 20, 50, 100, 1000) if len(names) <= 14 * s)
            set_ticks([*range(0, len(names), step)])
            set_label("token")
        else:
            set_ticks([])
