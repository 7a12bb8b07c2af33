"""Who takes which route: shares of routes, by class and difficulty, and the gate's confusions."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ds_net_plus.evaluate import Point, RouteTable
from ds_net_plus.report.common import madds_unit, route_colors, route_names, short
from tenfold.plotting import PALETTE, bars, describe, figure, heatmap, legend

EASY, HARD, MATCH = PALETTE[5], PALETTE[1], PALETTE[4]


def route_histogram(
    point: Point, routes: Sequence[int] | None = None, madds: Sequence[int] | None = None
) -> Figure:
    """Share of the images on every route at one operating point.

    Args:
        point: supplies the shares.
        routes: indices of the routes in the network; 0 to K - 1 where None.
        madds: cost of every route, written under its name.
    """
    count = len(point.shares)
    names = route_names(count, routes)
    if madds is not None:
        unit, letter = madds_unit(madds[-1])
        names = [f"{n}\n{short(c / unit)} {letter}" for n, c in zip(names, madds, strict=True)]
    fig, (ax,) = figure(max(4.8, 0.8 * count), 3.4)
    bars(ax, names, {"share": [100 * s for s in point.shares]}, fmt="{:.0f} %")
    for bar, color in zip(ax.patches, route_colors(count), strict=True):
        bar.set_facecolor(color)
    describe(
        ax,
        title=f"Routes the gate takes (top-1 {100 * point.top1:.1f} %)",
        x="" if madds is None else "route, and its multiply-adds for an image",
        y="share of images (%)",
    )
    return fig


def class_routes(
    table: RouteTable,
    choice: Int[Tensor, " images"],
    class_names: Sequence[str],
    *,
    routes: Sequence[int] | None = None,
    limit: int = 24,
) -> Figure:
    """Share of routes and mean MAdds by class, cheapest class first; by difficulty if it is known.

    Args:
        table: supplies labels, costs and the difficulty flag.
        choice: position of the route that each image takes.
        class_names: one a class.
        routes: indices of the routes in the network; 0 to K - 1 where None.
        limit: of classes; of more, the cheapest and the dearest are shown.
    """
    names = route_names(len(table.madds), routes)
    shares, present = _shares_by(table.labels, choice, len(class_names), len(names))
    cost = shares @ np.array(table.madds)
    rows = _ends([k for k in np.argsort(cost, kind="stable").tolist() if present[k]], limit)
    split = table.hard is not None
    width, height = 2.6 + 0.8 * len(names), 1.5 + 0.3 * max(len(rows), 6)
    fig, panels = figure(width + (4.0 if split else 0), height, columns=3 if split else 2)
    ratios = [len(names), 0.9, 0.9 * len(names)]
    panels[0].get_gridspec().set_width_ratios(ratios[: len(panels)])  # pyright: ignore[reportOptionalMemberAccess]
    labels = [class_names[k] for k in rows]
    percent = 100 * shares[rows]
    heatmap(panels[0], percent, rows=labels, columns=names, fmt="{:.0f}", limits=(0, 100))
    describe(panels[0], title="Share of routes by class (%)")
    unit, letter = madds_unit(table.madds[-1])
    column = [f"MAdds ({letter})"]
    blank = [""] * len(rows)
    heatmap(panels[1], cost[rows, None] / unit, rows=blank, columns=column, fmt="{:#.3g}")
    describe(panels[1], title="Mean cost")
    if split:
        _difficulty_bars(panels[2], table, choice, names)
    return fig


def _shares_by(
    group: Int[Tensor, " images"], choice: Int[Tensor, " images"], groups: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(shares (groups, count), whether the group has images); shares of an empty group are 0."""
    counts = (group * count + choice).bincount(minlength=groups * count).view(groups, count)
    total = counts.sum(1, keepdim=True)
    return (counts / total.clamp(min=1)).double().numpy(), (total[:, 0] > 0).numpy()


def _ends(order: list[int], limit: int) -> list[int]:
    """The first and the last entries of a list, `limit` in all."""
    last = min(limit, len(order)) // 2
    return order[: min(limit, len(order)) - last] + order[len(order) - last :]


def _difficulty_bars(
    ax: Axes, table: RouteTable, choice: Int[Tensor, " images"], names: Sequence[str]
) -> None:
    assert table.hard is not None
    shares, present = _shares_by(table.hard.long(), choice, 2, len(names))
    kinds = [(k, f"{kind} images") for k, kind in enumerate(("easy", "hard")) if present[k]]
    series = {name: (100 * shares[k]).tolist() for k, name in kinds}
    colors = {name: (EASY, HARD)[k] for k, name in kinds}
    bars(ax, names, series, colors=colors, fmt="{:.0f}")
    describe(ax, title="Easy and hard images", y="share of easy, of hard images (%)")
    legend(ax)


def cheapest_correct(table: RouteTable) -> Int[Tensor, " images"]:
    """Position of the cheapest route that classifies each image correctly, -1 where none does."""
    correct = table.correct
    return torch.where(correct.any(1), correct.int().argmax(1), -1)


def gate_confusion(
    table: RouteTable,
    choice: Int[Tensor, " images"],
    targets: Int[Tensor, " images"],
    *,
    routes: Sequence[int] | None = None,
    target: str = "cheapest correct route",
) -> Figure:
    """Where the gate sends the images that should take each route.

    Args:
        table: supplies the routes.
        choice: position of the route that each image takes.
        targets: position that it should take, such as `sgs_targets` or `cheapest_correct`; -1
            where no route is right.
        routes: indices of the routes in the network; 0 to K - 1 where None.
        target: what the targets are.
    """
    count = len(table.madds)
    names = route_names(count, routes)
    counts = ((targets + 1) * count + choice).bincount(minlength=(count + 1) * count)
    counts = counts.view(count + 1, count).roll(-1, 0).numpy()  # -1 comes last
    rows = np.flatnonzero(counts.sum(1)).tolist()
    counts = counts[rows]
    total = counts.sum(1)
    kinds = [[*names, "none correct"][k] for k in rows]
    labels = [f"{kind}\n{n:,} images" for kind, n in zip(kinds, total, strict=True)]
    fig, (ax,) = figure(2.4 + 0.95 * count, 1.7 + 0.55 * len(rows))
    percent = 100 * counts / total[:, None]
    heatmap(ax, percent, rows=labels, columns=names, fmt="{:.0f} %", limits=(0, 100))
    _annotate_cells(ax, counts, [(row, k) for row, k in enumerate(rows) if k < count])
    where = "route chosen (framed where it is the target)"
    describe(ax, title="What the gate chooses", x=where, y=target)
    return fig


def _annotate_cells(ax: Axes, counts: np.ndarray, matches: Sequence[tuple[int, int]]) -> None:
    """Adds the count under every percentage, and frames the cells of `matches`."""
    for text in ax.texts:
        column, row = (round(p) for p in text.get_position())
        text.set_text(f"{text.get_text()}\n{counts[row, column]:,}")
    for row, column in matches:
        corner = (column - 0.46, row - 0.45)
        ax.add_patch(Rectangle(corner, 0.92, 0.9, fill=False, ec=MATCH, lw=2.0))
