"""Making, describing and saving figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tenfold.errors import UserError
from tenfold.plotting.labels import settle_labels
from tenfold.plotting.style import DPI, style

LegendPlace = Literal[
    "best",
    "upper left",
    "upper center",
    "upper right",
    "center left",
    "center right",
    "lower left",
    "lower center",
    "lower right",
]


def figure(
    width: float = 6.4, height: float = 4.0, *, rows: int = 1, columns: int = 1
) -> tuple[Figure, tuple[Axes, ...]]:
    """Make an empty figure.

    Args:
        width: in inches; 6.4 fills the text width of a README.
        height: in inches.
        rows: of panels.
        columns: of panels.

    Returns:
        The figure and its panels, row by row.
    """
    with style():
        fig = bare_figure(width, height, layout="constrained")
        panels = fig.subplots(rows, columns, squeeze=False)
    return fig, tuple(panels.flat)


def bare_figure(width: float, height: float, layout: Any = None) -> Figure:
    """Make a figure without panels, detached from pyplot."""
    fig = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(fig)
    return fig


def describe(ax: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Set the title of a panel and the names of its axes (with their units)."""
    with style():
        ax.set_title(title)
        ax.set_xlabel(x)
        ax.set_ylabel(y)


def legend(ax: Axes, *, loc: LegendPlace = "best", columns: int = 1) -> None:
    """Explain the labelled artists of a panel, without a frame around it."""
    with style():
        ax.legend(loc=loc, ncols=columns)


def check_picture(path: str | Path) -> None:
    """Make sure that `save` can write there, before what is drawn is computed.

    Raises:
        UserError: it does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise UserError("pictures are written as .png", where=str(path), fix="name it so")


def save(fig: Figure, path: str | Path) -> Path:
    """Settle the labels and write the figure as PNG, making its folder if need be.

    The same figure gives the same bytes, so that a picture in git changes only when it changes.

    Returns:
        ``path``.

    Raises:
        UserError: if ``path`` does not end in .png.
    """
    path = Path(path)
    check_picture(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    settle_labels(fig)
    with style():
        fig.savefig(path, dpi=DPI, format="png", metadata={"Software": None})
    return path
