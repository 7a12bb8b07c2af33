"""FILIP beside CLIP: what each reaches, and what the loss costs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from filip_vl.report.common import CLIP, FILIP, check_counts, empty_figure, panel, title
from tenfold.plotting import INK, PALETTE, PAPER, bars, curve, describe, style

_OTHERS = (PALETTE[1], PALETTE[2], PALETTE[4])
# What a logarithmic axis may have labels at, times the powers of ten, the most usual first.
_LEADS = ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1,))


class Cost(NamedTuple):
    """What one way to compute the loss costs at one batch size.

    Attributes:
        batch: pairs.
        seconds: of a forward and backward pass.
        peak_bytes: of memory over what was held before.
    """

    batch: int
    seconds: float
    peak_bytes: float


def comparison_bars(
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    chance: Mapping[str, float] | None = None,
    heading: str = "",
) -> Figure:
    """Bars of every metric for every network: mean over the seeds, and a dot for each seed.

    Args:
        scores: by network, such as "FILIP" and "CLIP", then by metric: one value a seed, 0..1.
        chance: of metrics that have one, drawn as a line.
        heading: over everything.

    Raises:
        ValueError: no network, or networks with other metrics, or without seeds.
    """
    check_counts(networks=list(scores))
    metrics = list(next(iter(scores.values())))
    if any(list(other) != metrics for other in scores.values()):
        raise ValueError("the networks have different metrics")
    for name, rows in scores.items():
        if not all(len(values) for values in rows.values()):
            raise ValueError(f"{name} has a metric without values")
    means = {n: [100 * float(np.mean(rows[m])) for m in metrics] for n, rows in scores.items()}
    colors = _colors(list(scores))
    group = 1.05 * max(2, len(scores)) / 2
    width = max(5.6, 1.0 + group * len(metrics))
    fig = empty_figure(width, 3.7, heading)
    with style():
        ax = fig.add_subplot()
    letters = int(13 * (width - 1.0) / len(metrics))
    labels = [textwrap.fill(metric, letters) for metric in metrics]
    bars(ax, labels, means, colors=colors, fmt="")
    tops = _draw_seeds(ax, scores, metrics)
    with style():
        for (place, top), text in tops.items():
            ax.annotate(text, (place, top), (0, 5), "data", "offset points", ha="center", size=8)
        for column, metric in enumerate(metrics):
            if chance and metric in chance:
                level = 100 * chance[metric]
                look = {"color": INK, "lw": 1.2, "ls": (0, (2, 1.5)), "zorder": 4}
                ax.plot([column - 0.45, column + 0.45], [level, level], marker="", **look)
        if chance:
            ax.plot([], [], color=INK, lw=1.2, ls=(0, (2, 1.5)), marker="", label="chance")
        ax.set_ylim(0, max(100.0, max(top for _, top in tops)) * 1.04 + 4)
        handles, names = ax.get_legend_handles_labels()
        order = sorted(range(len(names)), key=lambda n: names[n] == "chance")
        told = [handles[n] for n in order], [names[n] for n in order]
        fig.legend(*told, loc="outside lower center", ncols=len(names))
    seeds = max(len(values) for rows in scores.values() for values in rows.values())
    below = f"mean and each of {seeds} seeds" if seeds > 1 else "one seed"
    title(ax, "What each reaches", below)
    ax.set_ylabel("%")
    return fig


def _draw_seeds(
    ax: Axes, scores: Mapping[str, Mapping[str, Sequence[float]]], metrics: Sequence[str]
) -> dict[tuple[float, float], str]:
    """A dot for each seed; returns where the mean may be written over each bar."""
    width, tops = 0.8 / len(scores), {}
    for index, rows in enumerate(scores.values()):
        for column, metric in enumerate(metrics):
            place = column + (index - (len(scores) - 1) / 2) * width
            values = 100 * np.array(rows[metric], float)
            if len(values) > 1:
                spread = np.linspace(-0.22, 0.22, len(values)) * width
                with style():
                    look = {"markersize": 4, "markeredgecolor": PAPER, "markeredgewidth": 0.7}
                    ax.plot(place + spread, values, "o", color=INK, alpha=0.8, zorder=5, **look)
            tops[place, float(values.max())] = f"{values.mean():.1f}"
    return tops


def cost_curves(
    costs: Mapping[str, Sequence[Cost]], unit: str = "CPU", heading: str = ""
) -> Figure:
    """Throughput and peak memory of the loss against the batch size, on logarithmic axes.

    Args:
        costs: by the way to compute it, such as "naive" and "tiled".
        unit: on what it was measured.
        heading: over everything.

    Raises:
        ValueError: nothing measured.
    """
    check_counts(costs=list(costs))
    fig = empty_figure(8.2, 3.5, heading)
    with style():
        grid = fig.add_gridspec(1, 2)
    speed, memory = panel(fig, grid, 0, 0), panel(fig, grid, 0, 1)
    known = {"naive": CLIP, "tiled": FILIP}
    spare = iter(_OTHERS * len(costs))
    for name, rows in costs.items():
        color = known.get(name) or next(spare)
        rows = sorted(rows)
        batch = [row.batch for row in rows]
        curve(speed, batch, [row.batch / row.seconds for row in rows], label=name, color=color)
        curve(memory, batch, [row.peak_bytes / 2**20 for row in rows], label=name, color=color)
    batches = sorted({row.batch for rows in costs.values() for row in rows})
    for ax in (speed, memory):
        with style():
            ax.set_xscale("log", base=2)
            ax.set_xticks(batches, [str(batch) for batch in batches])
        _log_scale(ax)
        ax.minorticks_off()
    describe(speed, title="Throughput", x="batch", y=f"pairs a second ({unit})")
    describe(memory, title="Peak memory", x="batch", y="MiB over the inputs")
    with style():
        fig.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=len(costs))
    return fig


def _log_scale(ax: Axes) -> None:
    """A logarithmic axis from one of its labels to another; 4 to 9 of them where possible."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return
    with style():
        ax.set_yscale("log")
        choices = [_steps(values.min(), values.max(), leads) for leads in _LEADS]
        nearest = min(choices, key=lambda found: abs(len(found) - 6))
        ticks = next((found for found in choices if 4 <= len(found) <= 9), nearest)
        names = [f"{tick:,.0f}" if tick >= 100 else f"{tick:g}" for tick in ticks]
        ax.set_yticks(ticks, names)
        ax.set_ylim(ticks[0] / 1.05, ticks[-1] * 1.05)


def _steps(low: float, high: float, leads: Sequence[float]) -> list[float]:
    """The leads times powers of ten, from the last that is not over low to the first not under."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [float(f"{lead}e{power}") for power in powers for lead in leads]
    first = max(n for n, step in enumerate(steps) if step <= low)
    last = min(n for n, step in enumerate(steps) if step >= high)
    return steps[first : max(last, first + 1) + 1]  # one value may lie exactly at a step


def _colors(names: Sequence[str]) -> dict[str, str]:
    """FILIP and CLIP have theirs; others have further ones."""
    spare = iter(_OTHERS * len(names))
    known = {"filip": FILIP, "clip": CLIP}
    taken: dict[str, str] = {}
    for name in names:
        color = known.pop(name.lower().split()[0], None)
        taken[name] = color or next(spare)
    return taken
