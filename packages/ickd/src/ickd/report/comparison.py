"""Losses side by side: what each reaches, by how much it beats the plain student, what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ickd.report.common import TEACHER, loss_colors, signed, title
from ickd.scores import ALONE
from tenfold.plotting import MUTED, PAPER, curve, describe, figure, points, style

Cost = Literal["seconds", "memory"]


class LossRow(NamedTuple):
    """One set of losses in a comparison.

    Attributes:
        losses: as "none", "kd" or "kd+ickd".
        scores: one for each seed, in per cent.
        gain: over the plain student, None where there is none; any (mean, low, high), such as an
            `ickd.scores.Difference`.
        seconds: of a training step, None where not measured.
        extra_bytes: of memory for an image, over the plain student's; None where not measured.
    """

    losses: str
    scores: Sequence[float]
    gain: tuple[float, float, float] | None = None
    seconds: float | None = None
    extra_bytes: float | None = None

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.scores))

    @property
    def std(self) -> float:
        """Of one run, from the seeds; 0 for a single one."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else 0.0


def dots(
    rows: Sequence[LossRow], *, teacher: float | None = None, score: str = "top-1 accuracy"
) -> Figure:
    """Every seed and the mean of each loss, and its paired gain over the plain student.

    Args:
        rows: in any order; the best comes first.
        teacher: its score, in per cent.
        score: what the scores are.

    Raises:
        ValueError: no row, or one without scores.
    """
    if not rows or not all(len(row.scores) for row in rows):
        raise ValueError("a comparison needs rows, and scores in each")
    ordered = sorted(rows, key=lambda row: row.mean)
    colors = loss_colors([row.losses for row in ordered])
    gains = any(row.gain is not None for row in rows)
    fig, panels = figure(9.6 if gains else 5.4, 2.0 + 0.36 * len(rows), columns=1 + gains)
    with style():
        fig.set_layout_engine("constrained", wspace=0.08)
    _draw_seeds(panels[0], ordered, colors, teacher)
    name = score if score[1:2].isupper() else score[:1].upper() + score[1:]  # mIoU stays
    title(panels[0], name, "every seed, and the mean of each set of losses")
    _describe_axis(panels[0], f"{score} (%)")
    if gains:
        _draw_gains(panels[1], ordered, colors)
        seeds = len(rows[0].scores)
        below = f"paired over {seeds} seeds, with 95 % intervals"
        title(panels[1], "Gain over the plain student", below if seeds > 1 else "of a single seed")
        _describe_axis(panels[1], "points")
    _explain_lines(fig, panels[0])
    return fig


def _explain_lines(fig: Figure, ax: Axes) -> None:
    """Name the lines across all rows under the panels, where they cover no row."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        with style():
            fig.legend(handles, labels, loc="outside lower left", ncols=2, handlelength=2.4)


def accuracy_against_cost(
    rows: Sequence[LossRow], cost: Cost = "seconds", *, score: str = "top-1 accuracy"
) -> Figure:
    """Where each loss lies between cheap and good; a line joins those that nothing beats.

    Args:
        rows: of which those without this cost are left out.
        cost: "seconds" of a training step, or "memory" for an image over the plain student's.
        score: what the scores are.

    Raises:
        ValueError: the cost was measured for no row.
    """
    known = [(row, value) for row in rows if (value := _cost(row, cost)) is not None]
    if not known:
        raise ValueError(f"no row has its {cost} measured")
    factor, unit = (1e3, "ms") if cost == "seconds" else _bytes_unit([v for _, v in known])
    places = {row.losses: (factor * value, row.mean) for row, value in known}
    colors = loss_colors(list(places))
    fig, (ax,) = figure(7.2, 4.6)
    front = _front(list(places.values()))
    if len(front) > 1:
        x, y = np.array(front).T
        label = "nothing is both cheaper and better"
        curve(ax, x, y, label=label, color=MUTED, marker="", linestyle=":")
    for row, _ in known:
        x, y = places[row.losses]
        error = [row.std] if len(row.scores) > 1 else None
        look = {"color": colors[row.losses], "size": 8.0, "y_error": error}
        points(ax, [x], [y], labels=[row.losses], **look)
    ax.margins(0.1)
    with style():
        if len(front) > 1:
            ax.legend(loc="lower right")
    what = {
        "seconds": f"time of a training step ({unit})",
        "memory": f"extra memory for an image ({unit})",
    }
    describe(ax, title="What a loss gives, and what it costs", x=what[cost], y=f"{score} (%)")
    return fig


def _describe_axis(ax: Axes, x: str) -> None:
    """Name the horizontal axis and leave the title as it is."""
    with style():
        ax.set_xlabel(x)


def _draw_seeds(
    ax: Axes, ordered: Sequence[LossRow], colors: dict[str, str], teacher: float | None
) -> None:
    with style():
        for y, row in enumerate(ordered):
            values, color = np.array(row.scores, float), colors[row.losses]
            if row.losses == ALONE:
                look = {"ls": (0, (4, 1.6)), "label": "plain student (mean)"}
                ax.axvline(row.mean, color=color, lw=1.2, zorder=1, **look)
            ax.plot([values.min(), values.max()], [y, y], color=color, lw=1.2, alpha=0.5)
            ax.plot(values, np.full(len(values), y), "o", color=color, ms=6, alpha=0.5, mew=0)
            ax.plot(row.mean, y, "|", color=color, ms=17, mew=2.6, mec=color, zorder=4)
        if teacher is not None and math.isfinite(teacher):
            look = {"ls": (0, (1, 1.5)), "label": "teacher"}
            ax.axvline(teacher, color=TEACHER, lw=1.2, zorder=1, **look)
        ax.set_yticks(range(len(ordered)), [row.losses for row in ordered])
    _finish_rows(ax, len(ordered))


def _draw_gains(ax: Axes, ordered: Sequence[LossRow], colors: dict[str, str]) -> None:
    beside = ("axes fraction", "data")
    with style():
        ax.axvline(0, color=MUTED, lw=1.2, ls=(0, (4, 1.6)), zorder=1)
        for y, row in enumerate(ordered):
            if row.gain is None:
                continue
            (mean, low, high), color = row.gain, colors[row.losses]
            if math.isfinite(high - low):
                ax.plot([low, high], [y, y], color=color, lw=2.2, alpha=0.45)
            ax.plot(mean, y, "D", color=color, ms=7.5, mec=PAPER, zorder=4)
            note = ax.annotate(signed(mean, 1), (1.01, y), xycoords=beside)
            note.set(va="center", color=color, weight="bold", size=9)
        ax.set_yticks(range(len(ordered)), [""] * len(ordered))
    _finish_rows(ax, len(ordered))


def _finish_rows(ax: Axes, rows: int) -> None:
    """One line of height for each row, without ticks."""
    with style():
        ax.set_ylim(-0.6, rows - 0.4)
        ax.tick_params(axis="y", length=0)
        ax.grid(visible=False, axis="y")


def _cost(row: LossRow, cost: Cost) -> float | None:
    return row.seconds if cost == "seconds" else row.extra_bytes


def _bytes_unit(values: Sequence[float]) -> tuple[float, str]:
    """(factor, unit) that make the largest of them readable."""
    largest = max(values)
    if largest >= 2**20:
        return 2.0**-20, "MiB"
    return (2.0**-10, "KiB") if largest >= 2**10 else (1.0, "bytes")


def _front(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The places that no other one is left of and above, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(places, key=lambda place: (place[0], -place[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front
