"""What the pictures share: colours of networks and words, pixels, texts, saving."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Rectangle
from numpy import ndarray

from tenfold.plotting import MUTED, PALETTE, figure, save, style

FILIP, CLIP = PALETTE[0], MUTED
"""Colours of the method and of its baseline."""

RIGHT, WRONG = PALETTE[2], PALETTE[1]
"""Colours of what was found and what was not."""

CLASS_WORD = "#E0241B"
"""The paper's red of the patches that chose a class word."""

WORDS = (*PALETTE, "#8C564B", "#7F3FBF", "#B5BD00", "#17202A")
"""Colours of the words of a query, in their order, then again."""


def pixels(image: Any) -> Float[ndarray, "height width 3"]:
    """A picture as matplotlib shows it.

    Args:
        image: (height, width, 3), or as a tensor (3, height, width); bytes, or 0..1.

    Raises:
        ValueError: another shape, or values that are neither.
    """
    if hasattr(image, "detach"):
        image = np.moveaxis(image.detach().cpu().numpy(), 0, -1)
    found = np.asarray(image)
    if found.ndim != 3 or found.shape[2] != 3:
        raise ValueError(f"a picture is (height, width, 3), not {found.shape}")
    found = found / 255.0 if found.dtype == np.uint8 else found.astype(float)
    if found.min() < -1e-3 or found.max() > 1 + 1e-3:
        raise ValueError(f"picture values in {found.min():.3g}..{found.max():.3g}, not 0..1")
    return found.clip(0, 1)


def show(ax: Axes, image: Any, grid: tuple[int, int] | None = None) -> None:
    """Draw a picture without ticks; with a grid, in units of its patches."""
    shown = pixels(image)
    rows, columns = grid or shown.shape[:2]
    with style():
        # few pixels are shown as what they are, not blurred
        smooth = "nearest" if max(shown.shape) < 100 else "antialiased"
        extent = (0, columns, rows, 0)
        tall, wide = shown.shape[:2]
        ratio = tall * columns / (wide * rows)
        ax.imshow(shown, extent=extent, interpolation=smooth, aspect=ratio)
        bare(ax)


def bare(ax: Axes) -> None:
    """Take away ticks, grid and spines."""
    with style():
        ax.set(xticks=[], yticks=[])
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)


def outline(ax: Axes, row: float, column: float, color: str, inset: float = 0.0) -> None:
    """A frame around a patch of a picture that is shown in units of patches."""
    side = 1 - 2 * inset
    frame = Rectangle((column + inset, row + inset), side, side, fill=False, ec=color, lw=2.2)
    frame.set_joinstyle("round")
    ax.add_patch(frame)


def empty_figure(width: float, height: float, heading: str = "") -> Figure:
    """A figure in the house style whose panels are still to be placed; sizes in inches.

    A heading that is too long for a line goes on in the next, and the figure grows.
    """
    lines = textwrap.wrap(heading, int(8 * width))
    fig, panels = figure(width, height + (0.16 + 0.22 * len(lines) if lines else 0))
    panels[0].remove()
    if lines:
        with style():
            fig.suptitle("\n".join(lines), x=0.012, ha="left", size=13, weight="bold")
    return fig


def panel(fig: Figure, grid: GridSpec, row: slice | int, column: slice | int) -> Axes:
    """A new panel over some cells of a grid."""
    with style():
        return fig.add_subplot(grid[row, column])


def title(ax: Axes, text: str, below: str = "", size: float = 11, below_color: str = MUTED) -> None:
    """A panel's title in two lines: a bold one, and a plain one under it."""
    with style():
        ax.set_title(text, size=size, pad=21 if below else 8)
        note = ax.annotate(below, (0, 1), (0, 7), "axes fraction", "offset points")
        note.set(va="bottom", color=below_color, size=8.5)
        note.set_in_layout(False)  # a long line must not push the panels apart


def short(text: str, letters: int) -> str:
    """A text that fits, cut between words where it can be."""
    if len(text) <= letters:
        return text
    cut = textwrap.shorten(text, letters, placeholder=" \N{HORIZONTAL ELLIPSIS}")
    return cut if len(cut) > letters // 2 else text[: letters - 1] + "\N{HORIZONTAL ELLIPSIS}"


def middle_cut(text: str, letters: int) -> str:
    """A text that fits, with both of its ends: captions often differ in their last words alone."""
    text = " ".join(text.split())
    if len(text) <= letters:
        return text
    half = max(1, (letters - 3) // 2)
    start, end = text[:half], text[-half:]
    # whole words, unless that would take away the most of what there is room for
    if text[half] != " " and start.rfind(" ") >= half // 2 > 0:
        start = start[: start.rfind(" ")]
    if text[-half - 1] != " " and 0 <= end.find(" ") <= half // 2:
        end = end[end.find(" ") :]
    return f"{start.strip()} \N{HORIZONTAL ELLIPSIS} {end.strip()}"


def wrapped(text: str, letters: int, lines: int) -> str:
    """A text in so many lines at most, of so many letters each; cut in the middle if need be."""
    room = letters * lines
    while len(found := textwrap.wrap(middle_cut(text, room), letters)) > lines:
        room -= 1
    return "\n".join(found)


def number(value: float, digits: int = 2) -> str:
    """A number with a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def word_colors(count: int) -> list[str]:
    """A colour for each word."""
    return [WORDS[n % len(WORDS)] for n in range(count)]


def check_counts(**counts: Sequence[Any]) -> None:
    """Refuse lists that should be one for one and are not.

    Raises:
        ValueError: their names and lengths, or that they are empty.
    """
    sizes = {name: len(values) for name, values in counts.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{count} {name}" for name, count in sizes.items())
        raise ValueError(f"not one for one: {told}")
    if not next(iter(sizes.values())):
        raise ValueError(f"there are no {next(iter(sizes))} to show")


def save_all(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Write every figure as <folder>/<name>.png.

    Returns:
        The paths, in the order of the figures.
    """
    return [save(fig, Path(folder) / f"{name}.png") for name, fig in figures.items()]
