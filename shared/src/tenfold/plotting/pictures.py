"""Grids of pictures with captions, coloured frames and group headers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from tenfold.plotting.figures import bare_figure
from tenfold.plotting.style import MUTED, style

# Measures of a picture grid in inches.
_MARGIN, _GAP, _CAPTION, _HEADER, _TITLE = 0.15, 0.09, 0.17, 0.34, 0.32


@dataclass(frozen=True)
class Tile:
    """One picture of an `image_grid`.

    Attributes:
        image: (H, W) or (H, W, 3 or 4), 0..255 if uint8, else 0..1; a torch tensor the other way
            round, (C, H, W).
        caption: small text under it.
        frame: colour of a frame around it.
    """

    image: Any
    caption: str = ""
    frame: str | None = None


@dataclass(frozen=True)
class TileGroup:
    """Pictures under one header.

    Attributes:
        header: what they have in common.
        tiles: the pictures.
        note: a remark after the header.
        color: of the stroke before the header.
    """

    header: str
    tiles: Sequence[Tile]
    note: str = ""
    color: str = MUTED


def image_grid(
    groups: Sequence[TileGroup], *, columns: int = 8, tile: float = 0.9, title: str = ""
) -> Figure:
    """Lay pictures out in rows under the headers of their groups.

    Args:
        groups: from top to bottom; one without pictures keeps its header.
        columns: pictures in a row; a longer group goes on in the next one.
        tile: edge of a picture in inches; one that is not square is fitted in.
        title: over everything.

    Raises:
        ValueError: if a picture has a wrong shape or range.
    """
    step = tile + _GAP
    captions = [_CAPTION if any(t.caption for t in group.tiles) else 0.0 for group in groups]
    heights = [
        _HEADER + math.ceil(len(group.tiles) / columns) * (step + caption)
        for group, caption in zip(groups, captions, strict=True)
    ]
    width = 2 * _MARGIN + columns * step - _GAP
    height = 2 * _MARGIN + sum(heights) + (_TITLE if title else 0.0)
    with style():
        fig = bare_figure(width, height)
        # One panel over the whole figure, measured in inches from the upper left corner.
        ax = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        ax.set_axis_off()
        ax.autoscale(enable=False)  # or every picture would set the limits to itself
        top = _MARGIN
        if title:
            ax.text(_MARGIN, top + 0.1, title, va="center", size=11, weight="bold")
            top += _TITLE
        for group, caption, extent in zip(groups, captions, heights, strict=True):
            _draw_header(ax, group, top)
            for index, item in enumerate(group.tiles):
                row, column = divmod(index, columns)
                y = top + _HEADER + row * (step + caption)
                _draw_tile(ax, item, _MARGIN + column * step, y, tile)
            top += extent
    return fig


def _draw_header(ax: Axes, group: TileGroup, top: float) -> None:
    middle = top + 0.15
    ax.add_patch(Rectangle((_MARGIN, middle - 0.09), 0.05, 0.18, color=group.color, lw=0))
    name = ax.text(_MARGIN + 0.13, middle, group.header, va="center", size=9.5, weight="bold")
    ax.annotate(
        group.note,
        (1, 0.5),
        xycoords=name,
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=MUTED,
        size=8.5,
    )


def _draw_tile(ax: Axes, item: Tile, x: float, y: float, tile: float) -> None:
    pixels = _pixels(item.image)
    scale = tile / max(pixels.shape[:2])
    height, width = pixels.shape[0] * scale, pixels.shape[1] * scale
    left, top = x + (tile - width) / 2, y + (tile - height) / 2
    extent = (left, left + width, top + height, top)
    ax.imshow(pixels, extent=extent, aspect="auto", cmap="gray", vmin=0, vmax=1)
    if item.frame is not None:
        frame = Rectangle((left, top), width, height, fill=False, ec=item.frame, lw=2.2)
        frame.set_joinstyle("round")
        ax.add_patch(frame)
    ax.text(x + tile / 2, y + tile + 0.09, item.caption, ha="center", va="center", size=7.5)


def _pixels(image: Any) -> NDArray[np.floating]:
    if hasattr(image, "detach"):
        image = image.detach().cpu().numpy()
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    pixels = np.asarray(image)
    pixels = pixels / 255.0 if pixels.dtype == np.uint8 else pixels.astype(float)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (3, 4)):
        raise ValueError(f"a picture is (H, W) or (H, W, 3 or 4), not {pixels.shape}")
    if not (pixels.min() >= -1e-3 and pixels.max() <= 1 + 1e-3):
        raise ValueError(f"picture values in {pixels.min():.3g}..{pixels.max():.3g}, not 0..1")
    return pixels.clip(0, 1)
