"""How much of the theoretical speed-up a machine gives back."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tenfold.plotting import INK, PALETTE, PAPER, bars, describe, figure, style

# Fill of each measured series, and the ink that reads well on it.
_BARS = ((PALETTE[0], PAPER), (PALETTE[5], INK), (PALETTE[2], PAPER), (PALETTE[4], INK))
Profile = Sequence[Mapping[str, float]]


def speedups(rows: Profile, columns: Sequence[str]) -> dict[str, list[float]]:
    """The last row's value over every row's: how many times cheaper each route is.

    Args:
        rows: one a route, the widest last.
        columns: of the rows: "madds", or measured milliseconds.
    """
    return {name: [rows[-1][name] / row[name] for row in rows] for name in columns}


def speedup_bars(
    rows: Profile, times: Mapping[str, str] | None = None, *, setting: str = ""
) -> Figure:
    """Realised speed-up of every route over the widest, under the line that MAdds promise.

    Args:
        rows: one a route, the widest last: `route`, `madds` and milliseconds.
        times: column of `rows` -> its name in the legend; {"ms": "realised"} where None.
        setting: where it was measured, for the title.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("there is no route to compare")
    times = {"ms": "realised"} if times is None else times
    ideal = speedups(rows, ["madds"])["madds"]
    realised = {times[k]: v for k, v in speedups(rows, list(times)).items()}
    looks = dict(zip(realised, _BARS, strict=False))
    fig, (ax,) = figure(min(9.6, max(5.6, 1.6 + 0.42 * len(rows) * len(times))), 3.8)
    names = [f"route {row['route']:g}" for row in rows]
    bars(ax, names, realised, colors={k: fill for k, (fill, _) in looks.items()}, fmt="")
    _write_inside(ax, [ink for _, ink in looks.values()], crowded=len(rows) * len(times) > 12)
    highest = [max(column) for column in zip(ideal, *realised.values(), strict=True)]
    with style():
        for k, height in enumerate(ideal):
            ax.plot([k - 0.44, k + 0.44], [height, height], color=INK, lw=1.8, zorder=4)
            note = ax.annotate(
                f"{height:.2f}×", (k, highest[k]), (0, 4), textcoords="offset points"
            )
            note.set(ha="center", va="bottom", weight="bold", size=8.5)
        line = Line2D([], [], color=INK, lw=1.8, label="ideal: ratio of multiply-adds")
        ax.legend(handles=[line, *ax.containers], loc="upper right")
    ax.set_ylim(0, 1.15 * max(highest))
    where = f" ({setting})" if setting else ""
    describe(ax, title=f"Speed-up over the widest route{where}", y="times faster")
    return fig


def _write_inside(ax: Axes, inks: Sequence[str], crowded: bool) -> None:
    """Values inside the tops of the bars, where the ideal line cannot meet them."""
    with style():
        for container, ink in zip(ax.containers, inks, strict=True):
            ax.bar_label(
                container,  # pyright: ignore[reportArgumentType]
                fmt="{:.2f}×",
                padding=-28 if crowded else -14,
                fontsize=7.5 if crowded else 8.5,
                color=ink,
                rotation=90 if crowded else 0,
            )
