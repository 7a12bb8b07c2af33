"""What the pictures share: colours and names of routes, units, measured times, saving."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

from ds_net_plus.evaluate import Point, RouteTable
from tenfold.plotting import save

# Cool to hot, cheap to wide; all from Okabe and Ito, apart in lightness as well as in hue.
_ROUTES = LinearSegmentedColormap.from_list(
    "routes", ["#56B4E9", "#009E73", "#E69F00", "#D55E00", "#8F3B00"]
)


@dataclass(frozen=True)
class Latency:
    """Measured wall-clock of one image, in milliseconds.

    Attributes:
        static: one for each route of the table.
        points: one for each dynamic point, in the order of the points.
        setting: how it was measured, such as "batch 32, 2 threads".
    """

    static: Sequence[float]
    points: Sequence[float]
    setting: str = ""


def route_colors(count: int) -> list[str]:
    """One colour a route, from cool (cheap) to hot (wide), safe for the colour-blind."""
    if count <= 4:
        return [to_hex(_ROUTES(k / 4)) for k in range(count)]
    return [to_hex(_ROUTES(k / (count - 1))) for k in range(count)]


def route_names(count: int, routes: Sequence[int | str] | None = None) -> list[str]:
    """Names of the routes of a routing space.

    Args:
        count: number of routes.
        routes: their indices in the network; 0 to count - 1 where None.

    Raises:
        ValueError: not one index a route.
    """
    indices = range(count) if routes is None else routes
    if len(indices) != count:
        raise ValueError(f"{len(indices)} route indices for {count} routes")
    return [f"route {k}" for k in indices]


def madds_unit(largest: float) -> tuple[float, str]:
    """(divisor, letter) that make counts up to `largest` readable."""
    return (1e9, "G") if largest >= 2e9 else (1e6, "M")


def short(value: float) -> str:
    """Three significant digits, never in powers of ten: 0.287, 4.53, 55.5, 1107."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def headline_point(table: RouteTable, points: Sequence[Point], tolerance: float = 0.005) -> int:
    """Index of the cheapest point at most `tolerance` below the widest route's top-1.

    The most accurate point where none comes that near.
    """
    wanted = table.static_top1()[-1] - tolerance
    good = [i for i, point in enumerate(points) if point.top1 >= wanted]
    if good:
        return min(good, key=lambda i: points[i].madds)
    return max(range(len(points)), key=lambda i: points[i].top1)


def save_all(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Writes every figure as <folder>/<name>.png.

    Returns:
        The paths, in the order of the figures.
    """
    return [save(fig, Path(folder) / f"{name}.png") for name, fig in figures.items()]
