"""The pictures of the demo: what over-smoothing destroys, and what reading all layers gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bert_oversmoothing.report.axes import end_labels, layer_axis
from bert_oversmoothing.report.common import (
    BASELINE,
    FUSIONS,
    HALO,
    empty_figure,
    head_colors,
    head_label,
    panel,
    title,
)
from tenfold.plotting import INK, MUTED, PAPER, curve, save, style
from tenfold.plotting.logs import smooth

_MARKERS = {"last": "o", "concat": "s", "gate": "D", "max": "^"}
_NEAREST = 1e-6  # float32 tells no similarity nearer to 1
_SIMILAR = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999)


def frozen_probe(results: Mapping[str, Any]) -> Figure:
    """Accuracy of each head on frozen random encoders, against how far they smooth.

    Args:
        results: "std" of the weights, in order; "cosine" of the last layer by std, "accuracy" by
            head and std, one value a seed; "chance".

    Raises:
        ValueError: no std or no head.
    """
    stds, accuracy = list(results["std"]), results["accuracy"]
    if not stds or not accuracy:
        raise ValueError("there is nothing to show: no std of the weights, or no head")
    cosine = np.array([float(np.mean(results["cosine"][std])) for std in stds])
    places = (1 - cosine).clip(min=_NEAREST)
    fig = empty_figure(7.6, 4.7)
    with style():
        ax = fig.add_subplot()
    colors, ends = head_colors(list(accuracy)), {}
    for head, rows in accuracy.items():
        seeds = [np.asarray(rows[std], float) for std in stds]
        means = np.array([values.mean() for values in seeds])
        low, high = (np.array([f(v) for v in seeds]) for f in (np.min, np.max))
        color, line = colors[head], "-" if head in _MARKERS else "--"
        look: dict[str, Any] = {"marker": _MARKERS.get(head, "v"), "linestyle": line}
        curve(ax, places, means, label=head_label(head), color=color, band=(low, high), **look)
        ends[head_label(head)] = float(means[int(np.argmin(places))]), color
    with style():
        ax.axhline(results["chance"], color=INK, lw=1.1, ls=":", zorder=1)
        note = {"size": 8.5, "color": INK, "path_effects": HALO, "va": "bottom"}
        at = (0.01, results["chance"])
        frame = ("axes fraction", "data")
        ax.annotate("chance", at, (0, 2), xycoords=frame, textcoords="offset points", **note)
        ax.set_ylim(0, 1.04)
        ax.set_ylabel("accuracy")
    _similarity_axis(ax, places, stds)
    title(ax, "What over-smoothing destroys, and who keeps access to it", _seeds(results), lift=30)
    end_labels(ax, ends, gap=0.065)
    return fig


def _seeds(results: Mapping[str, Any]) -> str:
    count = max(len(values) for rows in results["accuracy"].values() for values in rows.values())
    seeds = f"mean of {count} seeds, band: all of them" if count > 1 else "one seed"
    return f"frozen random encoders, a linear probe on each head; {seeds}"


def _similarity_axis(ax: Axes, places: np.ndarray, stds: Sequence[float]) -> None:
    """The axis of 1 - CosSim, logarithmic and turned round, that is labelled with CosSim."""
    with style():
        ax.set_xscale("log")
        farthest, nearest = max(1.25, 1.3 * places.max()), min(0.5, places.min() / 1.5)
        ax.set_xlim(farthest, nearest)
        ticks = [similar for similar in _SIMILAR if 1 - similar >= nearest]
        ax.set_xticks([1 - tick for tick in ticks], [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel("token similarity (CosSim) of the last layer")
        top = ax.secondary_xaxis("top")
        apart = _apart(np.log10(places), 0.07 * np.log10(farthest / nearest))
        top.set_xticks(places[apart], [f"{stds[n]:g}" for n in apart], size=8, color=MUTED)
        top.tick_params(length=2.5)
        top.minorticks_off()
        top.spines["top"].set_visible(False)
        top.set_xlabel("std of the weights", size=8.5, color=MUTED)


def _apart(places: np.ndarray, gap: float) -> list[int]:
    """Those that are far enough from the ones before them."""
    kept: list[int] = []
    for n in range(len(places)):
        if all(abs(places[n] - places[other]) >= gap for other in kept):
            kept.append(n)
    return kept


def draw_frozen_probe(results: Mapping[str, Any], path: str | Path) -> Path:
    """Write `frozen_probe` as a picture.

    Returns:
        ``path``.
    """
    return save(frozen_probe(results), path)


def odd_run(results: Mapping[str, Any]) -> Figure:
    """Exact match of each head on the odd run, its training, and the similarity before and after.

    Args:
        results: "em" by head, one value a seed, and "chance"; if known "loss" by head, one list of
            steps a seed, "chance_loss", "cosine_before" by layer, and "cosine_after" by head and
            layer.

    Raises:
        ValueError: no head.
    """
    if not results["em"]:
        raise ValueError("there is no head to show")
    order = [BASELINE, *FUSIONS]
    known = [head for head in order if head in results["em"]]
    heads = known + [head for head in results["em"] if head not in order]
    colors = head_colors(heads)
    losses, after = results.get("loss") or {}, results.get("cosine_after") or {}
    before = results.get("cosine_before")
    more = bool(losses) + bool(before or after)
    wide = max(5.4, 1.6 + 0.85 * len(heads))
    fig = empty_figure(wide + (5.0 if more else 0), 5.6 if more > 1 else 4.2)
    with style():
        widths = [wide, 5.0][: 1 + bool(more)]
        grid = fig.add_gridspec(max(1, more), len(widths), width_ratios=widths)
    _draw_scores(panel(fig, grid, slice(0, None), 0), results, heads, colors)
    if losses:
        _draw_losses(panel(fig, grid, 0, 1), losses, colors, results.get("chance_loss"))
    if before or after:
        _draw_similarity(panel(fig, grid, more - 1, 1), before, after, colors)
    return fig


def _draw_scores(
    ax: Axes, results: Mapping[str, Any], heads: Sequence[str], colors: Mapping[str, str]
) -> None:
    with style():
        for place, head in enumerate(heads):
            values = np.asarray(results["em"][head], float)
            ax.bar(place, values.mean(), width=0.76, color=colors[head], alpha=0.9)
            look: dict[str, Any] = {"ms": 5, "mec": PAPER, "mew": 0.8, "color": INK, "zorder": 4}
            seeds = len(values) > 1
            if seeds:
                ax.plot(place + np.linspace(-0.33, -0.09, len(values)), values, "o", **look)
            # On the bar, and beside the dots: it is the height of the bar, and of no dot.
            at = place + 0.38 * seeds, values.mean()
            top: dict[str, Any] = {"size": 9, "weight": "bold", "path_effects": HALO}
            top["ha"] = "right" if seeds else "center"
            text = f"{values.mean():.2f}"
            ax.annotate(text, at, (0, 1), textcoords="offset points", va="bottom", **top)
        names = [head_label(head).replace(" ", "\n") for head in heads]
        ax.set_xticks(range(len(heads)), names)
        ax.tick_params(axis="x", length=0)
        ax.grid(visible=False, axis="x")
        ax.axhline(results["chance"], color=INK, lw=1.1, ls=":", zorder=3)
        highest = max(float(np.max(results["em"][head])) for head in heads)
        ax.set(xlim=(-0.6, len(heads) - 0.4), ylim=(0, max(0.2, 1.13 * highest)))
        ax.set_ylabel("exact match")
    seeds = max(len(values) for values in results["em"].values())
    below = "bars: mean; dots: seeds; dotted: chance" if seeds > 1 else "one seed; dotted: chance"
    title(
        ax, "Find the odd run", below + "\ngrey: baseline, cool: the paper's fusions, warm: peers"
    )


def _draw_losses(
    ax: Axes,
    losses: Mapping[str, Sequence[Sequence[float]]],
    colors: Mapping[str, str],
    chance: float | None,
) -> None:
    ends = {}
    with style():
        for head, seeds in losses.items():
            color = colors.get(head, INK)
            for steps in seeds:
                curved = smooth(np.asarray(steps, float), parts=12)
                look: dict[str, Any] = {"color": color, "lw": 0.8, "alpha": 0.35, "marker": ""}
                ax.plot(np.arange(1, len(steps) + 1), curved, **look)
            shared = min(len(steps) for steps in seeds)
            mean = smooth(np.mean([steps[:shared] for steps in seeds], axis=0), parts=12)
            ax.plot(np.arange(1, shared + 1), mean, color=color, lw=2, marker="")
            ends[head_label(head)] = float(mean[-1]), color
        if chance is not None:
            ax.axhline(chance, color=INK, lw=1.1, ls=":", zorder=3)
        ax.set_ylim(bottom=0)
        ax.set(xlabel="step", ylabel="loss")
    title(ax, "Training", "running mean; thin: seeds" + "; dotted: chance" * (chance is not None))
    ax.margins(x=0)
    end_labels(ax, ends, gap=0.11)


def _draw_similarity(
    ax: Axes,
    before: Sequence[float] | None,
    after: Mapping[str, Sequence[float]],
    colors: Mapping[str, str],
) -> None:
    with style():
        ends = {}
        for head, values in after.items():
            color = colors.get(head, INK)
            ax.plot(range(len(values)), values, color=color, lw=1.6, marker="")
            ends[head_label(head)] = float(values[-1]), color
        if before:
            look: dict[str, Any] = {"color": INK, "lw": 1.4, "ls": (0, (2, 1.5)), "marker": ""}
            ax.plot(range(len(before)), before, label="before training", **look)
            ax.legend(loc="best", handlelength=2)
        ax.set_ylim(min(0.0, *ax.get_ylim()), 1.04)
        ax.set_ylabel("CosSim")
    title(ax, "Similarity by layer", "after training, mean over the seeds" if after else "")
    layer_axis(ax, max(map(len, [*after.values(), *([before] if before else [])])) - 1)
    ax.set_xlim(0, ax.get_xlim()[1] - 0.5)
    end_labels(ax, ends, gap=0.11)


def draw_odd_run(results: Mapping[str, Any], path: str | Path) -> Path:
    """Write `odd_run` as a picture.

    Returns:
        ``path``.
    """
    return save(odd_run(results), path)
