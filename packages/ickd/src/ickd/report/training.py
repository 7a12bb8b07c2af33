"""A run as Lightning's CSV log tells it."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ickd.report.common import PLAIN, STUDENT
from tenfold.plotting import INK, PALETTE, curve, describe, figure, legend, style
from tenfold.plotting.logs import Log, Series, read_log, smooth

_NAMES = {
    "ce": "CE: labels",
    "kd": "KL: the teacher's logits",
    "ickd": "CC: channel correlation",
    "ickd_grid": "CC: channel correlation in cells",
}
_COLORS = {"ce": INK, "kd": PALETTE[0], "ickd": STUDENT, "ickd_grid": STUDENT}
_OTHER_COLORS = (PALETTE[1], PALETTE[3], PALETTE[4], PALETTE[5])
_NO_TERMS = {"loss", "dead_student", "dead_teacher"}
_SCORES = {"val/top1": "validation top-1 (%)", "val/miou": "validation mIoU (%)"}
_FEW = 30  # validations up to which each one gets a marker


def training_curves(
    log: Log, others: Mapping[str, Log] | None = None, *, name: str = "distilled student"
) -> Figure:
    """The terms of the loss as they are weighted, and the validated score.

    Args:
        log: of the run: "step", "train/ce", "train/kd", "train/ickd" and others by the names of
            their losses, "val/top1" or "val/miou", "val/teacher".
        others: further runs by name, whose scores are drawn too, such as the plain student's.
        name: of the first run.

    Raises:
        ValueError: no term and no score in the log.
    """
    columns = read_log(log)
    terms = {
        key.removeprefix("train/"): series
        for key, series in columns.items()
        if key.startswith("train/") and key.removeprefix("train/") not in _NO_TERMS
    }
    score = next((key for key in _SCORES if key in columns), None)
    if not terms and score is None:
        raise ValueError("the log has neither terms (train/...) nor a score (val/top1, val/miou)")
    fig, panels = figure(9.6, 3.8, columns=2)
    _draw_terms(panels[0], terms)
    describe(panels[0], title="Terms of the loss, weighted", x="step", y="loss")
    if score is None:
        panels[1].set_axis_off()
        return fig
    runs = {name: columns} | {key: read_log(other) for key, other in (others or {}).items()}
    _draw_scores(panels[1], {key: run[score] for key, run in runs.items() if score in run})
    if "val/teacher" in columns:
        _draw_teacher(panels[1], float(columns["val/teacher"][1][-1]))
    describe(panels[1], title="What the student reaches", x="step", y=_SCORES[score])
    legend(panels[1], loc="lower right")
    return fig


def _draw_terms(ax: Axes, terms: Mapping[str, Series]) -> None:
    spare = iter(_OTHER_COLORS * len(terms))
    ordered = [key for key in _NAMES if key in terms] + [key for key in terms if key not in _NAMES]
    for key in ordered:
        steps, values = terms[key]
        color = _COLORS.get(key) or next(spare)
        with style():
            ax.plot(steps, values, color=color, alpha=0.22, lw=0.8, marker="")
        curve(ax, steps, smooth(values), label=_NAMES.get(key, key), color=color, marker="")
    if terms:
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        legend(ax, loc="upper right")


def _draw_scores(ax: Axes, scores: Mapping[str, Series]) -> None:
    first, *others = scores
    grey = [PLAIN, *_OTHER_COLORS]
    looks = {first: (STUDENT, "-")} | {
        key: (grey[k % len(grey)], "--") for k, key in enumerate(others)
    }
    for key, (color, line) in looks.items():
        steps, values = scores[key]
        marker = "o" if len(steps) < _FEW else ""
        curve(ax, steps, 100 * values, label=key, color=color, linestyle=line, marker=marker)


def _draw_teacher(ax: Axes, value: float) -> None:
    with style():
        ax.axhline(100 * value, color=INK, lw=1.2, ls=(0, (1, 1.5)), label="teacher", zorder=1)
