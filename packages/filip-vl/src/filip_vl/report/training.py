"""Runs as Lightning's CSV log tells them: loss, temperature, retrieval."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from filip_vl.report.common import CLIP, FILIP, empty_figure, panel
from tenfold.plotting import PALETTE, curve, describe, legend, style
from tenfold.plotting.logs import Log, Series, read_log, smooth

_COLORS = (FILIP, CLIP, *PALETTE[1:])
_FEW = 30  # values of a curve up to which each one gets a marker
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
    ax.set_ylim(bottom=0)
    legend(ax)
    describe(ax, title="Contrastive loss", x="step", y="loss")


def _draw_temperature(ax: Axes, found: Mapping[str, Series], colors: Mapping[str, str]) -> None:
    for name, (steps, values) in found.items():
        marker = "o" if len(steps) < _FEW else ""
        curve(ax, steps, values, label=name, color=colors[name], marker=marker)
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
    ax.set_ylim(bottom=0)
    legend(ax)
    describe(ax, title="Retrieval", x="step", y="R@1 (%)")
