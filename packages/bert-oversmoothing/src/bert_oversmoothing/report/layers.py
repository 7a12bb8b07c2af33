"""Curves over the layers: similarity, distance and its bound, ranks, identity, spectrum."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bert_oversmoothing.report.axes import layer_axis, log_axis
from bert_oversmoothing.report.common import (
    HALO,
    RAMP,
    color_bar,
    empty_figure,
    known,
    panel,
    title,
    under,
)
from bert_oversmoothing.report.tables import Tables
from tenfold.plotting import INK, MUTED, PALETTE, curve, points, style


def similarity(tables: Tables) -> Figure | None:
    """Cosine similarity by layer, beside what texts share with one another."""
    cosine = np.array(tables.column("cosine"))
    if not known(cosine):
        return None
    between, excess, centred = (
        np.array(tables.column(f"cosine_{name}")) for name in ("between", "excess", "without_mean")
    )
    fig = empty_figure(7.4, 4.4)
    with style():
        ax = fig.add_subplot()
    _draw(ax, tables, "cosine", "inside a text", PALETTE[0])
    layers = np.arange(len(cosine))
    for values, name, color, marker, line in (
        (between, "between different texts (anisotropy)", PALETTE[1], "s", "--"),
        (excess, "excess: inside minus between", PALETTE[2], "D", "-."),
        (centred, "inside, after removing the corpus mean", PALETTE[3], "^", ":"),
    ):
        if known(values):
            curve(ax, layers, values, label=name, color=color, marker=marker, linestyle=line)
    fused = tables.run.get("fused_cosine")
    if isinstance(fused, int | float):
        last = layers[-1:]
        points(ax, last, [fused], label="inside, of the fused states", color=INK, marker="*")
    with style():
        ax.axhline(0, color=MUTED, lw=0.8, zorder=1)
        ax.set_ylim(top=1.02)
        ax.set_ylabel("cosine similarity of tokens")
    title(ax, "Token similarity by layer", "mean over texts; band: 5 to 95 % of the texts")
    layer_axis(ax, len(cosine) - 1)
    under(fig, ax, columns=2)
    return fig


def distance(tables: Tables) -> Figure | None:
    """Distance to the matrices of equal rows on a logarithmic axis, and the theorem's bound."""
    relative, logs = (np.array(tables.column(n)) for n in ("relative_distance", "log_contraction"))
    if not (known(relative) or known(logs)):
        return None
    blocks = known(logs) or known(tables.column("v_tight"))
    fig = empty_figure(9.6 if blocks else 6.4, 4.2)
    with style():
        grid = fig.add_gridspec(1, 2 if blocks else 1)
    ax = panel(fig, grid, 0, 0)
    _draw(ax, tables, "relative_distance", "$d_M(H_l)\\,/\\,\\|H_l\\|_F$", PALETTE[0])
    if known(logs):
        _draw_distance(ax, tables, logs)
    with style():
        ax.set_yscale("log")
        ax.set_ylabel("distance (logarithmic)")
    log_axis(ax)
    title(ax, "Distance to equal rows", "band: 5 to 95 % of the texts")
    layer_axis(ax, len(relative) - 1)
    if blocks:
        _draw_factors(panel(fig, grid, 0, 1), tables)
    under(fig, *fig.axes, columns=3)
    return fig


def _draw_distance(ax: Axes, tables: Tables, logs: np.ndarray) -> None:
    """Measured d_M over that of layer 0, and where the bound lets it go."""
    travelled = np.concatenate([[0.0], np.cumsum(logs[1:])])
    measured = np.exp(travelled)
    look: dict[str, Any] = {"color": PALETTE[2], "marker": "s"}
    curve(ax, np.arange(len(logs)), measured, label="$d_M(H_l)\\,/\\,d_M(H_0)$", **look)
    label = "bound on it over blocks with v < 1"
    for run in _contracting(np.array(tables.column("v_tight"))):
        start = run[0] - 1
        steps = np.log([tables.column("v_tight")[block] for block in run])
        bound = measured[start] * np.exp(np.concatenate([[0.0], np.cumsum(steps)]))
        with style():
            look = {"color": INK, "ls": "--", "marker": "", "lw": 1.4, "label": label}
            ax.plot([start, *run], bound, **look)
        label = "_again"


def _contracting(bounds: np.ndarray) -> list[list[int]]:
    """Runs of consecutive blocks whose bound promises contraction."""
    runs: list[list[int]] = []
    for block in np.flatnonzero(bounds < 1).tolist():
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _draw_factors(ax: Axes, tables: Tables) -> None:
    """What a block does to d_M, measured and as the bounds have it."""
    logs, tight, paper = (
        np.array(tables.column(name)) for name in ("log_contraction", "v_tight", "v_paper")
    )
    blocks, last = np.arange(1, len(logs)), len(logs) - 1
    look: dict[str, Any] = {"measured $c_l$ (geometric mean)": (np.exp(logs), PALETTE[2], "D", "-")}
    look["bound v, tight"] = tight, PALETTE[1], "v", "-"
    look["bound v, the paper's"] = paper, PALETTE[4], "^", "--"
    for name, (values, color, marker, line) in look.items():
        if known(values):
            curve(ax, blocks, values[1:], label=name, color=color, marker=marker, linestyle=line)
    with style():
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, 0.5), max(high, 2.0))
    log_axis(ax)
    with style():
        ax.axhspan(ax.get_ylim()[0], 1, color=PALETTE[0], alpha=0.07, lw=0, zorder=0)
        ax.axhline(1, color=INK, lw=1, zorder=1)
        place = {"xytext": (5, 4), "textcoords": "offset points", "va": "bottom"}
        text = {"size": 8.5, "color": PALETTE[0], "path_effects": HALO}
        ax.annotate("contraction", (0, 0), xycoords="axes fraction", **place, **text)
        ax.set_ylabel("factor on $d_M$ (logarithmic)")
    title(ax, "Contraction by block", bound_note(tables))
    layer_axis(ax, last, "block", first=1)


def bound_note(tables: Tables) -> str:
    """Where the theorem's bound says something, in a line."""
    bounds = [v for v in tables.column("v_tight") if np.isfinite(v)]
    if not bounds:
        return "no bound is known for this family"
    told = sum(v < 1 for v in bounds)
    if not told:
        return f"bound vacuous (v \N{GREATER-THAN OR EQUAL TO} 1) in all {len(bounds)} blocks"
    return f"bound says something (v < 1) in {told} of {len(bounds)} blocks"


def ranks(tables: Tables) -> Figure | None:
    """Effective and stable rank by layer, as they are and of the centred states."""
    names = {
        "effective_rank": ("effective rank", PALETTE[0], "o", "-"),
        "effective_rank_centred": ("effective rank, centred", PALETTE[0], "^", "--"),
        "stable_rank": ("stable rank", PALETTE[1], "s", "-"),
        "stable_rank_centred": ("stable rank, centred", PALETTE[1], "D", "--"),
    }
    return _curves(tables, names, "Rank by layer", "mean over the sample of texts", "rank")


def identity(tables: Tables) -> Figure | None:
    """How much of a token's own first vector its states keep."""
    names = {
        "identity_cosine": ("cosine with its own first vector", PALETTE[0], "o", "-"),
        "identity_accuracy": ("nearest first vector is its own", PALETTE[1], "s", "--"),
    }
    below = "each token against the layer-0 vectors of its text"
    fig = _curves(tables, names, "Identity retained", below, "share or cosine")
    if fig:
        with style():
            low = min(0.0, *(np.nanmin(tables.column(n)) for n in names if known(tables.column(n))))
            fig.axes[0].set_ylim(low - 0.04, 1.04)
    return fig


def _curves(
    tables: Tables, names: dict[str, tuple[str, str, str, str]], head: str, below: str, unit: str
) -> Figure | None:
    shown = {name: tables.column(name) for name in names if known(tables.column(name))}
    if not shown:
        return None
    fig = empty_figure(6.4, 4.0)
    with style():
        ax = fig.add_subplot()
    for name, values in shown.items():
        label, color, marker, line = names[name]
        look: dict[str, Any] = {"color": color, "marker": marker, "linestyle": line}
        curve(ax, np.arange(len(values)), values, label=label, **look)
    with style():
        ax.set_ylabel(unit)
    title(ax, head, below)
    layer_axis(ax, len(tables.layers) - 1)
    under(fig, ax, columns=2)
    return fig


def _draw(ax: Axes, tables: Tables, name: str, label: str, color: str) -> None:
    """A measure with its band."""
    values, low, high = (np.array(tables.column(f"{name}{end}")) for end in ("", "_p5", "_p95"))
    if known(values):
        band = (low, high) if known(low) and known(high) else None
        curve(ax, np.arange(len(values)), values, label=label, color=color, band=band)


def spectrum(tables: Tables) -> Figure | None:
    """Singular values over the largest, one line a layer."""
    values = tables.sample.get("spectrum")
    if values is None or not known(values.flat):
        return None
    last = len(values) - 1
    fig = empty_figure(6.8, 4.2)
    with style():
        ax = fig.add_subplot()
        for layer, row in enumerate(values):
            shown = np.where(row > 0, row, np.nan)
            color = RAMP(layer / max(last, 1))
            ax.plot(np.arange(1, len(row) + 1), shown, color=color, lw=1.5, marker="")
        ax.set_yscale("log")
        low = np.nanmin(np.where(values > 1e-6, values, np.nan), initial=1.0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(ylim=(low / 1.5, 1.4), xlabel="singular value", ylabel="size over the largest")
    log_axis(ax)
    about = "steep: the tokens lie near a line; mean over the sample, 0 beyond a text"
    title(ax, "Singular values by layer", about)
    color_bar(ax, Normalize(0, max(last, 1)), "layer", RAMP, whole=True)
    return fig
