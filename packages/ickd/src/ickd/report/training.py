"""A run as Lightning's CSV log tells it."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from ickd.report.common import PLAIN, STUDENT
from tenfold.plotting import INK, PALETTE, curve, describe, figure, legend, style
from tenfold.plotting.logs import Log, Series, read_log, smooth

_NAMES = {
    "ce": "ce: labels",
    "kd": "kd: the teacher's logits",
    "ickd": "ickd: channel correlation",
    "ickd_grid": "ickd_grid: channel correlation in cells",
}
_COLORS = {"ce": INK, "kd": PALETTE[0], "ickd": STUDENT, "ickd_grid": STUDENT}
_OTHER_COLORS = (PALETTE[1], PALETTE[3], PALETTE[4], PALETTE[5])
_NO_TERMS = {"loss", "dead_student", "dead_teacher"}
_SCORES = {"val/top1": "validation top-1 (%)", "val/miou": "validation mIoU (%)"}
_FEW = 30  # values of a curve up to which each one gets a marker


def training_curves(
    log: Log,
    others: Mapping[str, Log] | None = None,
    *,
    name: str = "distilled student",
    heading: str = "",
) -> Figure:
    """The terms of the loss as they are weighted, and the validated score, where there are any.

    Args:
        log: of the run: "step", "train/ce", "train/kd", "train/ickd" and others by the names of
            their losses, "val/top1" or "val/miou", "val/teacher".
        others: further runs by name, whose scores are drawn too, such as the plain student's.
        name: of the first run.
        heading: over everything.

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
    count = bool(terms) + (score is not None)
    fig, panels = figure(4.8 * count, 3.8 + (0.35 if heading else 0), columns=count)
    if heading:
        with style():
            fig.suptitle(heading, x=0.012, ha="left", size=13, weight="bold")
    if terms:
        _draw_terms(panels[0], terms)
    if score is not None:
        runs = {name: columns} | {key: read_log(other) for key, other in (others or {}).items()}
        _draw_scores(panels[-1], {key: run[score] for key, run in runs.items() if score in run})
        if "val/teacher" in columns:
            _draw_teacher(panels[-1], float(columns["val/teacher"][1][-1]))
        describe(panels[-1], title="What the student reaches", x="step", y=_SCORES[score])
        legend(panels[-1])
    return fig


def _draw_terms(ax: Axes, terms: Mapping[str, Series]) -> None:
    spare = iter(_OTHER_COLORS * len(terms))
    ordered = [key for key in _NAMES if key in terms] + [key for key in terms if key not in _NAMES]
    for key in ordered:
        steps, values = terms[key]
        color = _COLORS.get(key) or next(spare)
        with style():
            ax.plot(steps, values, color=color, alpha=0.22, lw=0.8, marker="")
        label, marker = _NAMES.get(key, key), _marker(steps)
        curve(ax, steps, smooth(values), label=label, color=color, marker=marker)
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    legend(ax)
    describe(ax, title="Terms of the loss, weighted", x="step", y="loss")


def _draw_scores(ax: Axes, scores: Mapping[str, Series]) -> None:
    first, *others = scores
    grey = [PLAIN, *_OTHER_COLORS]
    looks = {first: (STUDENT, "-")} | {
        key: (grey[k % len(grey)], "--") for k, key in enumerate(others)
    }
    for key, (color, line) in looks.items():
        steps, values = scores[key]
        marker = _marker(steps)
        curve(ax, steps, 100 * values, label=key, color=color, linestyle=line, marker=marker)


def _marker(steps: Float[ndarray, " values"]) -> str:
    """Values of short curves are seen each; of a single one there is no line at all."""
    return "o" if len(steps) < _FEW else ""


def _draw_teacher(ax: Axes, value: float) -> None:
    with style():
        ax.axhline(100 * value, color=INK, lw=1.2, ls=(0, (1, 1.5)), label="teacher", zorder=1)
