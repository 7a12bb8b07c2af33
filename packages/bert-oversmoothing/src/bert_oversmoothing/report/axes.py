"""Axes of layers and of logarithms, and names at the ends of lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from tenfold.plotting import style

_LEADS = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
)


def layer_axis(ax: Axes, last: int, name: str = "layer", first: int = 0) -> None:
    """Whole numbers of layers along the x axis."""
    with style():
        ax.set_xlim(first - 0.5, last + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=13, integer=True, min_n_ticks=1))
        ax.set_xlabel(name)


def log_axis(ax: Axes, axis: Literal["x", "y"] = "y") -> None:
    """A logarithmic axis with plain numbers at it; its limits must stand."""
    with style():
        (ax.set_xscale if axis == "x" else ax.set_yscale)("log")
        low, high = sorted(ax.get_xlim() if axis == "x" else ax.get_ylim())
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        choices = [
            [tick for p in powers for lead in leads if low <= (tick := lead * 10.0**p) <= high]
            for leads in _LEADS
        ]
        ticks = min(choices, key=lambda found: abs(len(found) - 5))
        if len(ticks) < 3:  # less than a third of a decade
            places = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
            ticks = [float(tick) for tick in places if low <= tick <= high]
        names = [_power(tick) for tick in ticks]
        (ax.set_xticks if axis == "x" else ax.set_yticks)(ticks, names)
        (ax.xaxis if axis == "x" else ax.yaxis).set_minor_locator(NullLocator())


def _power(tick: float) -> str:
    if 9.99e-4 < tick < 99_999:
        return f"{tick:g}"
    exponent = math.floor(math.log10(tick) + 1e-9)
    lead = tick / 10.0**exponent
    return (
        "" if abs(lead - 1) < 1e-6 else f"{lead:g}\N{MULTIPLICATION SIGN}"
    ) + f"$10^{{{exponent}}}$"


def spaced(ax: Axes, heights: Sequence[float], gap: float) -> list[float]:
    """Heights in units of the panel, moved apart as little as need be, in the order given.

    Args:
        ax: the panel; its limits must stand.
        heights: in data units.
        gap: the least distance, as a share of the panel's height.
    """
    shares = ax.transAxes.inverted().transform(
        ax.transData.transform([(0.0, height) for height in heights])
    )[:, 1]
    order = np.argsort(shares, kind="stable")
    places, blocks = np.empty(len(shares)), []
    # Labels that touch form a block around their mean; blocks that touch are joined.
    for share in shares[order]:
        blocks.append([share])
        while len(blocks) > 1 and _low(blocks[-1], gap) - _high(blocks[-2], gap) < gap:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    found = [_low(block, gap) + gap * n for block in blocks for n in range(len(block))]
    places[order] = np.array(found)
    return places.tolist()


def _low(block: Sequence[float], gap: float) -> float:
    low = float(np.mean(block)) - gap * (len(block) - 1) / 2
    return max(0.0, min(low, 1.0 - gap * (len(block) - 1)))


def _high(block: Sequence[float], gap: float) -> float:
    return _low(block, gap) + gap * (len(block) - 1)


def end_labels(ax: Axes, ends: Mapping[str, tuple[float, str]], gap: float = 0.06) -> None:
    """Names to the right of a panel at the heights at which their lines end.

    Args:
        ax: the panel; its limits must stand.
        ends: by name, the last value of its line and its colour.
        gap: the least distance of two names, as a share of the panel's height.
    """
    if not ends:
        return
    heights = [height for height, _ in ends.values()]
    for (name, (height, color)), place in zip(ends.items(), spaced(ax, heights, gap), strict=True):
        share = ax.transAxes.inverted().transform(ax.transData.transform((0, height)))[1]
        with style():
            look = {"transform": ax.transAxes, "clip_on": False}
            ax.plot([1.0, 1.03], [share, place], color=color, lw=0.9, marker="", **look)
            text = {"color": color, "size": 9, "va": "center", "weight": "bold"}
            ax.annotate(name, (1.04, place), xycoords="axes fraction", **text)
