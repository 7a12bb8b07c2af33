"""Who smooths: what each part of a block adds to ln d_M, and what the norms divide by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from numpy import ndarray

from bert_oversmoothing.report.axes import layer_axis, log_axis
from bert_oversmoothing.report.common import (
    HALO,
    PARTS,
    empty_figure,
    known,
    panel,
    title,
    under,
)
from bert_oversmoothing.report.tables import Tables
from bert_oversmoothing.report.words import signed
from tenfold.plotting import INK, MUTED, PALETTE, curve, style

_FINAL = "log_final_norm"


def contributions(tables: Tables) -> Figure | None:
    """What every part of every block adds to ln d_M, in stacked bars, and their sum.

    A final norm, which is no part of a block, has a bar of its own behind the last one.
    """
    parts = {name: np.array(tables.column(name)) for name in PARTS if known(tables.column(name))}
    final = float(parts.pop(_FINAL)[-1]) if _FINAL in parts else None
    if not parts:
        return None
    share = np.array(tables.column("top_token_share"))
    heights = [4.0, 1.0] if known(share) else [1.0]
    fig = empty_figure(9.6, 4.4 + (0.9 if known(share) else 0.0))
    with style():
        grid = fig.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=[3.4, 1])
    blocks, total = panel(fig, grid, 0, 0), panel(fig, grid, 0, 1)
    _draw_blocks(blocks, parts, final)
    _draw_total(total, parts, final)
    if known(share):
        _draw_share(panel(fig, grid, 1, 0), share, final is not None)
    under(fig, blocks)
    return fig


def _draw_blocks(ax: Axes, parts: Mapping[str, np.ndarray], final: float | None) -> None:
    count = len(next(iter(parts.values()))) - 1
    blocks = np.arange(1, count + 1)
    up, down = np.zeros(count), np.zeros(count)
    with style():
        for name, values in parts.items():
            label, color = PARTS[name]
            values = np.nan_to_num(values[1:])
            bottom = np.where(values > 0, up, down)
            ax.bar(blocks, values, bottom=bottom, width=0.72, color=color, label=label)
            up, down = up + values.clip(min=0), down + values.clip(max=0)
        if final is not None:
            label, color = PARTS[_FINAL]
            ax.bar([count + 1], [final], width=0.72, color=color, label=label)
        ax.axhline(0, color=INK, lw=0.9)
        ax.grid(visible=False, axis="x")
    look: dict[str, Any] = {"color": INK, "marker": "D", "linestyle": ""}
    curve(ax, blocks, up + down, label="net", **look)
    with style():
        ax.set_ylabel("added to ln $d_M$")
    title(ax, "Who smooths", "below 0: the part pulls the tokens together; exact, mean over texts")
    _block_axis(ax, count, final is not None, PARTS[_FINAL][0])


def _block_axis(ax: Axes, count: int, final: bool, name: str = "") -> None:
    """Numbers of blocks, and behind them room for the final norm, with its name."""
    layer_axis(ax, count, "block", first=1)
    if not final:
        return
    ticks = [int(n) for n in ax.get_xticks() if 1 <= n <= count]
    # A name in two lines is as wide as this share of the panel.
    ticks = [n for n in ticks if not name or count + 1 - n >= 0.055 * (count + 1)]
    with style():
        ax.set_xlim(0.5, count + 1.5)
        behind = [(count + 1, name.replace(" ", "\n"))] if name else []
        places = [*((n, str(n)) for n in ticks), *behind]
        ax.set_xticks([n for n, _ in places], [label for _, label in places])


def _draw_total(ax: Axes, parts: Mapping[str, np.ndarray], final: float | None) -> None:
    sums = [float(np.nansum(values)) for values in parts.values()]
    together = f"together {signed(sum(sums))}"
    parts = dict(parts)
    rows = [float(n) for n in range(len(sums))]
    if final is not None:  # behind the blocks, a little apart
        sums, parts[_FINAL] = [*sums, final], np.empty(0)
        rows.append(len(rows) + 0.5)
    names = [PARTS[name][0] for name in parts]
    low, high = min(0.0, *sums), max(0.0, *sums)
    room = 0.6 * max(high - low, 1e-3)  # for the numbers at the bars
    with style():
        ax.barh(rows, sums, height=0.6, color=[PARTS[name][1] for name in parts])
        ax.axvline(0, color=INK, lw=0.9)
        for row, value in zip(rows, sums, strict=True):
            place = (4 if value >= 0 else -4, 0)
            side = "left" if value >= 0 else "right"
            look: dict[str, Any] = {"ha": side, "va": "center", "size": 8.5, "path_effects": HALO}
            ax.annotate(signed(value), (value, row), place, textcoords="offset points", **look)
        ax.set_yticks(rows, [name.replace(" + ", "\n+ ") for name in names])
        ax.tick_params(axis="y", length=0)
        ax.grid(visible=False, axis="y")
        ax.set(xlim=(low - room, high + room), ylim=(rows[-1] + 0.7, -0.7))
        if final is not None:
            ax.axhline(rows[-1] - 0.75, color=MUTED, lw=0.8, ls=":")
        ax.set_xlabel("added to ln $d_M$")
    title(ax, "All blocks", together)


def _draw_share(ax: Axes, share: np.ndarray, final: bool) -> None:
    with style():
        ax.bar(np.arange(1, len(share)), 100 * share[1:], width=0.72, color=MUTED)
        ax.set_ylim(0, 100)
        ax.grid(visible=False, axis="x")
        ax.set_ylabel("%")
        ax.set_title("Largest token's share of $d_M^2$", size=9.5, pad=5)
    _block_axis(ax, len(share) - 1, final)


def scales(tables: Tables) -> Figure | None:
    """How the divisors of the two norms are distributed in every block, as violins."""
    drawn = {
        name: tables.sample[f"{name}_quantiles"]
        for name in ("sigma_product", "sigma1", "sigma2")
        if known(tables.sample.get(f"{name}_quantiles", np.empty(0)).flat)
    }
    if not drawn:
        return None
    small = [name for name in drawn if name != "sigma_product"]
    big = "sigma_product" in drawn
    height = (3.3 if big else 0.6) + (2.7 if small else 0.0)
    fig = empty_figure(9.6, height)
    with style():
        heights = [1.35, 1.0] if big and small else [1.0]
        grid = fig.add_gridspec(len(heights), max(1, len(small)), height_ratios=heights)
    if big:
        _draw_product(panel(fig, grid, 0, slice(0, None)), tables, drawn["sigma_product"])
    _draw_norms(fig, grid, tables, {name: drawn[name] for name in small})
    under(fig, fig.axes[0])
    return fig


def _draw_product(ax: Axes, tables: Tables, quantiles: np.ndarray) -> None:
    _violins(ax, quantiles, PALETTE[0])
    blocks = np.arange(1, len(quantiles) + 1)
    look: dict[str, Any] = {"marker": "v", "linestyle": "", "color": PALETTE[1]}
    curve(ax, blocks, quantiles[:, 0], label="smallest of any text", **look)
    mean = np.array(tables.column("sigma_product_min"))
    if len(mean) == len(blocks) + 1 and known(mean):
        look = {"marker": "D", "linestyle": "", "color": INK}
        curve(ax, blocks, mean[1:], label="mean over texts", **look)
    with style():
        ax.axhline(1, color=INK, ls="--", lw=1.2, label="threshold 1")
        ax.set_ylabel("$\\min\\sigma_1\\,\\min\\sigma_2$")
    below = "one violin a block, over texts"
    if tables.run.get("order") != "pre":  # which no divisor makes contract
        below += "; the paper's v < 1 needs more than 1, and that alone does not suffice"
    title(ax, "Product of the smallest divisors of a text", below)
    _finish(ax, len(blocks))


def _draw_norms(
    fig: Figure, grid: GridSpec, tables: Tables, drawn: Mapping[str, np.ndarray]
) -> None:
    for column, (name, quantiles) in enumerate(drawn.items()):
        ax = panel(fig, grid, -1, column)
        _violins(ax, quantiles, PALETTE[5])
        look: dict[str, Any] = {"marker": "v", "linestyle": "", "color": PALETTE[1]}
        lowest = np.array(tables.column(f"{name}_lowest"))[1:]
        if not known(lowest):
            lowest = quantiles[:, 0]
        curve(ax, np.arange(1, len(quantiles) + 1), lowest, label="smallest of any token", **look)
        place = name[-1]
        with style():
            ax.set_ylabel(f"$\\sigma_{place}$")
        order = {"1": "first", "2": "second"}[place]
        title(ax, f"Divisors of the {order} norm", "over tokens; marked: the smallest")
        _finish(ax, len(quantiles))


def _finish(ax: Axes, count: int) -> None:
    with style():
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, 0.8), max(high, 1.25))
        ax.grid(visible=False, axis="x")
    log_axis(ax)
    layer_axis(ax, count, "block", first=1)


def _violins(ax: Axes, quantiles: Float[ndarray, "blocks quantiles"], color: str) -> None:
    """One violin a row of quantiles, as wide as their density on the logarithmic axis."""
    outlines, middles = [], []
    for block, row in enumerate(quantiles, 1):
        logs = np.log10(row[np.isfinite(row) & (row > 0)])
        if not len(logs):
            continue
        middles.append((block, 10 ** np.median(logs)))
        if np.ptp(logs) < 1e-6:  # one value has no density
            continue
        # A normal kernel of Scott's width around every quantile.
        heights = np.linspace(logs.min(), logs.max(), 60)
        apart = (heights[:, None] - logs) / (logs.std() * len(logs) ** -0.2)
        density = np.exp(-0.5 * apart**2).sum(1)
        half = 0.4 * density / density.max()
        sides = np.concatenate([block - half, (block + half)[::-1]])
        outlines.append(np.column_stack([sides, 10 ** np.concatenate([heights, heights[::-1]])]))
    with style():
        if outlines:
            ax.add_collection(PolyCollection(outlines, color=color, alpha=0.55, lw=0.6))
        if middles:
            at, level = np.array(middles).T
            ax.hlines(level, at - 0.16, at + 0.16, color=INK, lw=1.4)
        ax.autoscale_view()
