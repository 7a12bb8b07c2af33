"""The headline: accuracy against compute and against time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ds_net_plus.evaluate import (
    Point,
    RouteTable,
    gain_at_equal_madds,
    oracle,
    random_routing,
    saving_at_equal_accuracy,
)
from ds_net_plus.report.common import Latency, headline_point, madds_unit, route_names
from tenfold.plotting import INK, MUTED, PALETTE, PAPER, curve, describe, figure, points, style

_ARROW: dict[str, Any] = {
    "arrowstyle": "-|>",
    "color": INK,
    "lw": 1.4,
    "shrinkA": 0,
    "shrinkB": 0,
    "capstyle": "butt",
}
_WORDS = {"M": "millions", "G": "billions"}
STATIC, DYNAMIC, RANDOM, ORACLE = PALETTE[0], PALETTE[1], MUTED, PALETTE[2]


class _Costs(NamedTuple):
    """Cost of everything in one panel, in the panel's unit."""

    static: Sequence[float]
    points: Sequence[float]
    noun: str  # what is saved, as in "1.9x less time"


def tradeoff(
    table: RouteTable,
    dynamic: Sequence[Point],
    latency: Latency | None = None,
    *,
    routes: Sequence[int] | None = None,
    chosen: int | None = None,
    title: str = "",
) -> Figure:
    """Accuracy against mean MAdds, and against measured time where it is given.

    Args:
        table: the static routes' answers.
        dynamic: operating points of the gate, at least one.
        latency: adds the second panel.
        routes: indices of the table's routes in the network; 0 to K - 1 where None.
        chosen: the point whose gain is pointed out; `headline_point` where None.
        title: over everything.

    Raises:
        ValueError: no points, or times that do not belong to these routes and points.
    """
    _check(table, dynamic, latency)
    chosen = headline_point(table, dynamic) if chosen is None else chosen
    names = route_names(len(table.madds), routes)
    size = (6.0, 1) if latency is None else (9.6, 2)
    fig, panels = figure(size[0], 4.6, columns=size[1])
    unit, letter = madds_unit(table.madds[-1])
    compute = _Costs([c / unit for c in table.madds], [p.madds / unit for p in dynamic], "MAdds")
    _panel(panels[0], table, dynamic, compute, names)
    _oracle(panels[0], table, unit)
    _point_out(panels[0], table, dynamic[chosen], compute, chosen)
    x = f"mean multiply-adds (MAdds) of an image, {_WORDS[letter]}"
    describe(panels[0], title="Accuracy against compute", x=x, y="top-1 accuracy (%)")
    if latency is not None:
        _time_panel(panels[1], table, dynamic, latency, names, chosen)
        panels[1].sharey(panels[0])
    _frame(fig, panels, title)
    return fig


def _time_panel(
    ax: Axes,
    table: RouteTable,
    dynamic: Sequence[Point],
    latency: Latency,
    names: Sequence[str],
    chosen: int,
) -> None:
    times = _Costs(latency.static, latency.points, "time")
    _panel(ax, table, dynamic, times, names)
    _point_out(ax, table, dynamic[chosen], times, chosen)
    setting = f", {latency.setting}" if latency.setting else ""
    describe(ax, title="Accuracy against time", x=f"time of an image (ms{setting})")


def _oracle(ax: Axes, table: RouteTable, unit: float) -> None:
    best = oracle(table)
    label = "oracle: the cheapest correct route"
    place = [best.madds / unit], [100 * best.top1]
    points(ax, *place, label=label, color=ORACLE, marker="*", size=13)


def _check(table: RouteTable, dynamic: Sequence[Point], latency: Latency | None) -> None:
    if not dynamic:
        raise ValueError("a trade-off needs at least one dynamic point")
    if latency is None:
        return
    found, wanted = (len(latency.static), len(latency.points)), (len(table.madds), len(dynamic))
    if found != wanted:
        raise ValueError(f"times of {found} routes and points, but there are {wanted}")


def _panel(
    ax: Axes, table: RouteTable, dynamic: Sequence[Point], costs: _Costs, names: Sequence[str]
) -> None:
    """Dynamic line, static curve and random-routing line."""
    order = sorted(range(len(dynamic)), key=lambda i: dynamic[i].madds)
    x = [costs.points[i] for i in order]
    gated = [100 * dynamic[i].top1 for i in order]
    mixed = [100 * random_routing(table, dynamic[i].shares)[1] for i in order]
    static = [100 * top1 for top1 in table.static_top1()]
    curve(ax, x, gated, label="dynamic: a gate picks each image's route", color=DYNAMIC, marker="D")
    curve(ax, costs.static, static, label="static: one route for all images", color=STATIC)
    points(ax, costs.static, static, labels=names, color=STATIC)
    curve(
        ax,
        x,
        mixed,
        label="random: the gate's mix, shuffled",
        color=RANDOM,
        marker="",
        linestyle="--",
    )
    ax.set_xlim(0, 1.08 * max(*costs.static, *costs.points))


def _point_out(ax: Axes, table: RouteTable, point: Point, costs: _Costs, chosen: int) -> None:
    """Measures the distance from the chosen point to the static curve, as in a technical drawing.

    Across: to the static cost of the same accuracy. Up: from the static accuracy at the same cost.
    """
    x, y = costs.points[chosen], 100 * point.top1
    static = table.static_top1()
    # Both units share the corners of the static curve, so a place on it carries over.
    needed = saving_at_equal_accuracy(point, table) * point.madds
    across = float(np.interp(needed, table.madds, costs.static))
    reached = 100 * float(np.interp(needed, table.madds, static))
    gain = (
        gain_at_equal_madds(point, table)
        if costs.noun == "MAdds"
        else point.top1 - float(np.interp(x, costs.static, static))
    )
    lowest = 100 * min(static)
    floor = lowest - 0.07 * (max(y, 100 * max(static)) - lowest)
    up = f"{100 * gain:+.1f} points at equal {costs.noun}".replace("-", "\N{MINUS SIGN}")
    saving = _saving_text(costs.noun, across / x, point.top1 > max(static))
    with style():
        for side, top in ((x, y), (across, reached)):
            ax.plot([side, side], [floor, top], color=INK, lw=0.8, ls=(0, (1, 2)), zorder=2)
        ax.annotate("", (x, floor), (across, floor), arrowprops=_ARROW)
        ax.annotate("", (x, y), (x, y - 100 * gain), arrowprops={**_ARROW, "shrinkB": 4}, zorder=5)
        # all curves rise: the corner below them is free
        ax.text(
            0.985,
            0.09,
            f"{up}\n{saving}",
            transform=ax.transAxes,
            ha="right",
            va="bottom",
            linespacing=1.5,
            weight="bold",
            path_effects=[withStroke(linewidth=3, foreground=PAPER)],
            zorder=6,
        )


def _saving_text(noun: str, ratio: float, beyond: bool) -> str:
    """What the horizontal arrow says, honest where the point costs more."""
    less = ("fewer" if noun == "MAdds" else "less") if ratio >= 1 else "more"
    where = "than the widest route" if beyond else "at equal accuracy"
    return f"{max(ratio, 1 / ratio):.1f}× {less} {noun} {where}"


def _frame(fig: Figure, panels: Sequence[Axes], title: str) -> None:
    """Legend under all panels, and the title over them."""
    with style():
        handles, labels = panels[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=min(2, len(panels)))
        if title:
            fig.suptitle(title, x=0.012, ha="left", size=13, weight="bold")
