"""Stage I as Lightning's CSV log tells it."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ds_net_plus.report.common import route_colors
from tenfold.plotting import INK, MUTED, curve, describe, figure, legend
from tenfold.plotting.logs import Log, Series, read_log, smooth

# Name, colour and line; the random routes come first, so that the sandwich's ends lie over them.
_LOSSES = {
    "train/loss_R1": ("R: random routes between", MUTED, ":"),
    "train/loss_R2": ("", MUTED, ":"),
    "train/loss_S": ("S: smallest", route_colors(4)[0], "-"),
    "train/loss_L": ("L: largest", INK, "-"),
}


def training_curves(log: Log, *, watched: str = "teacher (moving average)") -> Figure:
    """Losses of the sandwich's modes, and validated accuracy of the routes.

    Args:
        log: Lightning's metrics.csv, or its rows: `step`, `train/loss_L`, `train/loss_S`,
            `train/loss_R1` and so on, `val/top1_<route>`, `val/top1_largest`; empty where not
            logged.
        watched: the copy whose accuracy was validated, see `SupernetModule`'s `weights`.

    Raises:
        ValueError: none of these columns.
    """
    columns = read_log(log)
    losses = {n: s for n, s in columns.items() if n in _LOSSES}
    accuracy = {n: s for n, s in columns.items() if n.startswith("val/top1_")}
    if not losses and not accuracy:
        raise ValueError("the log has neither train/loss_* nor val/top1_* columns")
    fig, panels = figure(9.6, 3.8, columns=2)
    _draw_losses(panels[0], losses)
    _draw_accuracy(panels[1], accuracy)
    describe(panels[0], title="Stage I: training losses", x="step", y="cross-entropy (nats)")
    describe(panels[1], title=f"Accuracy of the {watched}", x="step", y="validation top-1 (%)")
    return fig


def _draw_losses(ax: Axes, losses: Mapping[str, Series]) -> None:
    for name, (label, color, line) in _LOSSES.items():
        if name not in losses:
            continue
        steps, values = losses[name]
        curve(
            ax, steps, smooth(values, parts=25), label=label, color=color, marker="", linestyle=line
        )
    if losses:
        legend(ax, loc="upper right")


def _draw_accuracy(ax: Axes, accuracy: Mapping[str, Series]) -> None:
    routes = sorted((n for n in accuracy if not n.endswith("largest")), key=_index)
    look = dict(zip(routes, route_colors(len(routes)), strict=True))
    for name in ("val/top1_largest", *reversed(routes)):  # the most accurate is named first
        if name in accuracy:
            steps, values = accuracy[name]
            curve(
                ax,
                steps,
                100 * values,
                label=f"route {_index(name)}" if name in look else "largest",
                color=look.get(name, INK),
                linestyle="-" if name in look else "--",
                marker="o" if len(steps) < 30 else "",
            )
    if accuracy:
        legend(ax, loc="lower right")


def _index(name: str) -> int:
    return int(name.rpartition("_")[2])
