"""The theorem held against random blocks, and the error of each layer's head against CosSim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure

from bert_oversmoothing.report.axes import layer_axis, log_axis
from bert_oversmoothing.report.common import (
    HALO,
    RAMP,
    color_bar,
    empty_figure,
    panel,
    title,
    under,
)
from bert_oversmoothing.theorem.check import Trial
from tenfold.plotting import INK, MUTED, PALETTE, curve, points, save, style

_ORDERS = {"post": "Post-norm blocks", "pre": "Pre-norm blocks"}
_MARKERS = "osD^vP"
_NAMED = 8  # groups up to which each is in the legend


def theorem(trials: Sequence[Trial], blocks: Sequence[int] | None = None) -> Figure:
    """Measured ratio of d_M against its bound, both logarithmic, post-norm and pre-norm apart.

    Args:
        trials: each a point.
        blocks: of each trial the number of its block in a model, which tells them apart; the
            deviation of its weights if left out.

    Raises:
        ValueError: no trials.
    """
    orders = [order for order in _ORDERS if any(t.design.order == order for t in trials)]
    if not orders:
        raise ValueError("there are no trials to show")
    fig = empty_figure(max(5.6, 4.9 * len(orders)), 4.9)
    with style():
        grid = fig.add_gridspec(1, len(orders))
    groups = [t.design.std for t in trials] if blocks is None else [float(n) for n in blocks]
    levels = sorted({*groups})
    for column, order in enumerate(orders):
        ax = panel(fig, grid, 0, column)
        pairs = [p for p in zip(trials, groups, strict=True) if p[0].design.order == order]
        found = [t for t, _ in pairs]
        bounds, ratios = [t.v_tight for t in found], [t.ratio for t in found]
        left, right = 0.6 * min(0.9, *bounds), 1.6 * max(2.0, *bounds)
        low, high = 0.7 * min(0.7, *ratios), 1.5 * max(1.5, *ratios)
        with style():
            ax.set(xlim=(left, right), ylim=(low, high))
        log_axis(ax, "x")
        log_axis(ax)
        _draw_regions(ax, left, right, high)
        _draw_trials(ax, pairs, levels, "weights of std" if blocks is None else "block")
        broken = sum(t.violation for t in found)
        told = sum(not t.vacuous for t in found)
        what = "blocks" if blocks is None else "trials"
        below = f"{len(found)} {what}, {broken} violations, v < 1 in {told}"
        title(ax, _ORDERS[order], below)
        with style():
            ax.set_xlabel("bound v, tight")
            ax.set_ylabel("measured ratio of $d_M$" if column == 0 else "")
    under(fig, fig.axes[0])
    if len(levels) > _NAMED:  # such as of the blocks of a model
        name = "std of the weights" if blocks is None else "block"
        color_bar([*fig.axes], _norm(levels), name, RAMP, whole=blocks is not None)
    return fig


def _draw_regions(ax: Axes, left: float, right: float, high: float) -> None:
    with style():
        ax.axvspan(left, 1, color=PALETTE[2], alpha=0.1, lw=0, zorder=0)
        ax.axhline(1, color=MUTED, lw=0.8, zorder=1)
        ends = [left, min(right, high)]
        ax.plot(ends, ends, color=INK, lw=1.2, ls="--", marker="", label="ratio = bound")
        ax.fill_between(ends, ends, high, color=PALETTE[1], alpha=0.07, lw=0, zorder=0)
        look: dict[str, Any] = {"size": 8.5, "path_effects": HALO, "textcoords": "offset points"}
        place = {"xycoords": ("data", "axes fraction"), "xytext": (5, 5)}
        ax.annotate("v < 1", (left, 0), color=PALETTE[2], va="bottom", **place, **look)
        place["xytext"] = (5, -5)
        ax.annotate("theorem broken", (left, 1), color=PALETTE[1], va="top", **place, **look)


def _draw_trials(
    ax: Axes, trials: Sequence[tuple[Trial, float]], levels: Sequence[float], name: str
) -> None:
    """The points of every group, of the levels in order, and rings around violations."""
    named = len(levels) <= _NAMED
    for index, level in enumerate(levels):
        found = [t for t, group in trials if group == level]
        points(
            ax,
            [t.v_tight for t in found],
            [t.ratio for t in found],
            label=f"{name} {level:.3g}" if named else "",
            color=to_hex(RAMP(index / max(1, len(levels) - 1) if named else _norm(levels)(level))),
            marker=_MARKERS[index % len(_MARKERS)] if named else "o",
            size=6.5,
        )
    broken = [t for t, _ in trials if t.violation]
    if broken:
        with style():
            ring: dict[str, Any] = {"mfc": "none", "mec": PALETTE[1], "mew": 2, "ms": 12}
            at = [t.v_tight for t in broken], [t.ratio for t in broken]
            ax.plot(*at, "o", label="violation", **ring)


def _norm(levels: Sequence[float]) -> Normalize:
    return Normalize(min(levels), max(levels))


def draw_theorem(
    trials: Sequence[Trial], path: str | Path, blocks: Sequence[int] | None = None
) -> Path:
    """Write `theorem` as a picture.

    Returns:
        ``path``.
    """
    return save(theorem(trials, blocks), path)


def probe(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Error of a head at each layer against the token similarity there (the paper's Figure 1b).

    Args:
        rows: of each layer "layer", "cosine" and "error" (a share), "error_std" if several
            seeds were run, and "error_most_frequent", the same in every row, of always naming the
            most frequent label, if that is an answer.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("there are no layers to show")
    rows = sorted(rows, key=lambda row: row["layer"])
    layers = [int(row["layer"]) for row in rows]
    cosine = np.array([float(row["cosine"]) for row in rows])
    error = 100 * np.array([float(row["error"]) for row in rows])
    spread = 100 * np.array([float(row.get("error_std") or math.nan) for row in rows])
    spread = spread if np.isfinite(spread).any() else None
    best = int(np.nanargmin(error))
    fig = empty_figure(9.8, 4.3)
    with style():
        grid = fig.add_gridspec(2, 2, width_ratios=[1.35, 1])
    ax = panel(fig, grid, slice(0, 2), 0)
    with style():
        ax.plot(cosine, error, color=MUTED, lw=1, marker="", alpha=0.6)
    names = [str(layer) for layer in layers]
    points(ax, cosine, error, labels=names, y_error=spread, color=PALETTE[0], size=7)
    with style():
        ring = {"mfc": "none", "mec": PALETTE[1], "mew": 2, "ms": 13, "zorder": 5}
        ax.plot(cosine[[best]], error[[best]], "o", **ring)
        ax.margins(0.09)
        ax.set(xlabel="token similarity of the layer", ylabel="error of its head (%)")
    panels = [ax, panel(fig, grid, 0, 1)]
    if (constant := rows[0].get("error_most_frequent")) is not None:
        _draw_constant(panels, 100 * float(constant))
    title(ax, "Error against similarity", f"ring: least error, layer {layers[best]}")
    _draw_by_layer(panels[1], layers, error, best, "error (%)", spread)
    lowest = int(np.nanargmin(cosine))
    _draw_by_layer(panel(fig, grid, 1, 1), layers, cosine, lowest, "similarity")
    title(fig.axes[1], "By layer", "ring: the least")
    under(fig, ax)
    return fig


def _draw_constant(panels: Sequence[Axes], error: float) -> None:
    """A line at the error of who always names the same label."""
    with style():
        for ax in panels:
            ax.axhline(error, color=INK, lw=1, ls="--", label="always the most frequent label")


def _draw_by_layer(
    ax: Axes,
    layers: Sequence[int],
    values: np.ndarray,
    least: int,
    name: str,
    spread: np.ndarray | None = None,
) -> None:
    curve(ax, layers, values, color=PALETTE[0], y_error=spread).set_markersize(5)
    with style():
        ax.margins(y=0.2)
        ring = {"mfc": "none", "mec": PALETTE[1], "mew": 2, "ms": 11, "zorder": 5}
        ax.plot([layers[least]], values[[least]], "o", **ring)
        ax.set_ylabel(name)
    layer_axis(ax, layers[-1], first=layers[0])


def draw_probe(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write `probe` as a picture.

    Returns:
        ``path``.
    """
    return save(probe(rows), path)
