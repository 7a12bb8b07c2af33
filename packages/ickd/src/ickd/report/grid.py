"""The ablation of the grid: how much each division of the map gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from ickd.report.common import PLAIN, STUDENT, number, signed, title
from ickd.scores import ALONE
from tenfold.plotting import INK, MUTED, PALETTE, PAPER, figure, style


def grid_bars(
    rows: Mapping[str, Sequence[float]], *, teacher: float | None = None, baseline: str = ALONE
) -> Figure:
    """Bars of mIoU by grid, over or under the plain student's.

    Bars of differences start at zero, so that their lengths compare; the mIoU stands under each.

    Args:
        rows: mIoU in per cent, one for each seed, by grid ("1×1", "4×4") or other name ("kd"), and
            of the plain student as "none".
        teacher: its mIoU, in per cent.
        baseline: name of the plain student.

    Raises:
        ValueError: no plain student, nothing beside it, or a row without scores.
    """
    if baseline not in rows or len(rows) < 2 or not all(len(row) for row in rows.values()):
        raise ValueError(f"grids are compared with a row {baseline!r}, and need scores each")
    plain = float(np.mean(rows[baseline]))
    names = [name for name in rows if name != baseline]
    fig, (ax,) = figure(max(4.8, 1.6 + 0.95 * len(names)), 4.0)
    with style():
        for x, name in enumerate(names):
            gains = np.array(rows[name], float) - plain
            color = STUDENT if "×" in name or "x" in name else PALETTE[0]
            mean = float(gains.mean())
            ax.bar(x, mean, width=0.62, color=color, alpha=0.85)
            spread = np.linspace(-0.12, 0.12, len(gains)) if len(gains) > 1 else [0.0]
            ax.plot(x + np.array(spread), gains, "o", color=INK, ms=4.5, mec=PAPER, zorder=4)
            below = mean < 0  # the number stands where the bar ends
            end = min(mean, float(gains.min())) if below else max(mean, float(gains.max()))
            place = (0, -5 if below else 5)
            note = ax.annotate(signed(mean, 1), (x, end), place, textcoords="offset points")
            va = "top" if below else "bottom"
            note.set(ha="center", va=va, weight="bold", size=9.5)
        ax.axhline(0, color=PLAIN, lw=1.4)
        means = [float(np.mean(rows[name])) for name in names]
        ticks = [f"{name}\n{number(mean, 1)}" for name, mean in zip(names, means, strict=True)]
        ax.set_xticks(range(len(names)), ticks)
        ax.tick_params(axis="x", length=0)
        ax.grid(visible=False, axis="x")
        ax.use_sticky_edges = False  # bars that all hang leave room over zero too
        ax.margins(x=0.06, y=0.14)
        ax.set_ylabel("mIoU over the plain student (points)")
        ax.set_xlabel("grid, and mIoU (%)", color=MUTED)
    below = f"plain student {number(plain, 1)} %"
    below += "" if teacher is None else f" · teacher {number(teacher, 1)} %"
    title(ax, "What the grid gives", below)
    return fig
