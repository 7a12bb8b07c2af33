"""Runs as Lightning's CSV log tells them: loss, temperature, retrieval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from filip_vl.report.common import CLIP, FILIP, empty_figure, panel
from tenfold.plotting import PALETTE, PAPER, curve, describe, legend, style
from tenfold.plotting.logs import Log, Series, read_log, smooth

_COLORS = (FILIP, CLIP, *PALETTE[1:])
_FEW = 30  # values of a curve up to which each one gets a marker
_DASHES: tuple[Any, ...] = ("-", (0, (2.2, 2.2)), (0, (1, 5)))
_LOSS = "train/loss"
_TEMPERATURE = ("train/temperature", "temperature")
_SCALE = ("train/logit_scale", "logit_scale")
_RECALLS = {"val/i2t_r1": "image to text", "val/t2i_r1": "text to image"}


def training_curves(logs: Mapping[str, Log], heading: str = "") -> Figure:
    """Loss, temperature and validated R@1 of one or several runs, those that were logged.

    Args:
        logs: by the name of the run: "step", "train/loss", "train/temperature" (or its inverse,
            "train/logit_scale"), "val/i2t_r1" and "val/t2i_r1" in 0..1.
        heading: over everything.

    Raises:
        ValueError: none of these in any log.
    """
    runs = {name: read_log(log) for name, log in logs.items()}
    panels = [
        (draw, found)
        for draw, find in ((_draw_loss, _loss), (_draw_temperature, _temperature))
        if (found := {name: x for name, run in runs.items() if (x := find(run)) is not None})
    ]
    recalls = {
        (name, key): run[key] for name, run in runs.items() for key in _RECALLS if key in run
    }
    count = len(panels) + bool(recalls)
    if not count:
        wanted = ", ".join([_LOSS, _TEMPERATURE[0], *_RECALLS])
        raise ValueError(f"the logs have none of {wanted}")
    colors = {name: _COLORS[n % len(_COLORS)] for n, name in enumerate(runs)}
    fig = empty_figure(max(4.6, 3.7 * count), 3.4, heading)
    with style():
        grid = fig.add_gridspec(1, count)
    for column, (draw, found) in enumerate(panels):
        draw(panel(fig, grid, 0, column), found, colors)
    if recalls:
        _draw_recalls(panel(fig, grid, 0, count - 1), recalls, colors)
    return fig


def _loss(run: Mapping[str, Series]) -> Series | None:
    return run.get(_LOSS) or run.get(f"{_LOSS}_step")


def _temperature(run: Mapping[str, Series]) -> Series | None:
    for key in _TEMPERATURE:
        if key in run:
            return run[key]
    for key in _SCALE:
        if key in run:
            steps, values = run[key]
            return steps, 1 / values
    return None


def _draw_loss(ax: Axes, found: Mapping[str, Series], colors: Mapping[str, str]) -> None:
    for name, (steps, values) in found.items():
        with style():
            ax.plot(steps, values, color=colors[name], alpha=0.22, lw=0.8, marker="")
        marker = "o" if len(steps) < _FEW else ""
        curve(ax, steps, smooth(values), label=name, color=colors[name], marker=marker)
    _from_zero(ax)
    legend(ax)
    describe(ax, title="Contrastive loss", x="step", y="loss")


def _draw_temperature(ax: Axes, found: Mapping[str, Series], colors: Mapping[str, str]) -> None:
    for n, (name, (steps, values)) in enumerate(found.items()):
        marker = "o" if len(steps) < _FEW else ""
        line = curve(ax, steps, values, label=name, color=colors[name], marker=marker)
        # runs often keep one temperature: dashes let the wider line under them be seen
        width = max(1.6, 5.0 - 2.0 * n)
        line.set(linewidth=width, linestyle=_DASHES[n % len(_DASHES)])
        line.set_markersize(width + 4)
        if n:
            line.set_path_effects([withStroke(linewidth=width + 1.2, foreground=PAPER)])
    with style():
        ax.axhline(0.01, color=CLIP, lw=1, ls=(0, (1, 1.5)), zorder=1)
        note = ax.annotate(
            "lower bound", (1, 0.01), (0, 3), ax.get_yaxis_transform(), "offset points"
        )
        note.set(ha="right", size=8, color=CLIP)
    highest = max(float(np.nanmax(values)) for _, values in found.values())
    ax.set_ylim(0, 1.15 * highest)
    legend(ax)
    describe(ax, title="Temperature", x="step", y="temperature \u03c4")


def _from_zero(ax: Axes) -> None:
    """Begin at 0, with room for a marker over the highest value."""
    highest = float(ax.dataLim.y1)
    ax.set_ylim(0, 1.08 * highest if 0 < highest < np.inf else 1.0)


def _draw_recalls(
    ax: Axes, recalls: Mapping[tuple[str, str], Series], colors: Mapping[str, str]
) -> None:
    for (name, key), (steps, values) in recalls.items():
        line = "-" if key == "val/i2t_r1" else "--"
        marker = "o" if len(steps) < _FEW else ""
        told = f"{name}, {_RECALLS[key]}"
        curve(
            ax,
            steps,
            100 * values,
            label=told,
            color=colors[name],
            linestyle=line,
            marker=marker,
        )
    _from_zero(ax)
    legend(ax)
    describe(ax, title="Retrieval", x="step", y="R@1 (%)")
