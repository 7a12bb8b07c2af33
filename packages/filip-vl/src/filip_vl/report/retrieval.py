"""What was found: captions with their best images, and hits with the patches that matched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from filip_vl.report.common import (
    RIGHT,
    bare,
    check_counts,
    empty_figure,
    number,
    outline,
    panel,
    pixels,
    short,
    show,
    word_colors,
    wrapped,
)
from tenfold.plotting import INK, MUTED, style

_MOST = 60  # hits of a sheet that can be looked through
_TILE, _UNDER = 1.05, 0.24  # inches of a picture, and of the line under it


class Query(NamedTuple):
    """A caption and the images that it found.

    Attributes:
        caption: that was looked for.
        images: the best ones, best first.
        scores: s^T of each.
        right: whether each is an image of the caption.
        rank: of the best right image, 1 for the first.
        wanted: a right image, shown where it is not among the best.
    """

    caption: str
    images: Sequence[Any]
    scores: Sequence[float]
    right: Sequence[bool]
    rank: int
    wanted: Any = None


class Hit(NamedTuple):
    """An image that a search found.

    Attributes:
        image: as it is shown.
        score: by which it was found.
        grid: rows and columns of its patches.
        patches: for every word of the query its best patch (row, column), None for no patch.
        name: such as the name of its file.
    """

    image: Any
    score: float
    grid: tuple[int, int]
    patches: Sequence[tuple[int, int] | None]
    name: str = ""


def retrieval_sheet(queries: Sequence[Query], heading: str = "") -> Figure:
    """A row for each caption, with the images that it found; right ones have a green frame.

    Where none of them is right, the wanted image stands behind them: with failures alone, this is
    their gallery.

    Args:
        queries: from top to bottom.
        heading: over everything.

    Raises:
        ValueError: no query, or images and scores that are not one for one.
    """
    check_counts(queries=queries)
    for query in queries:
        check_counts(images=query.images, scores=query.scores, right=query.right)
    most = max(len(query.images) for query in queries)
    missed = any(_is_missed(query) for query in queries)
    columns, text = most + missed, 2.5
    height = len(queries) * (_TILE + _UNDER) + 0.35
    fig = empty_figure(text + columns * (_TILE + 0.12), height, heading)
    with style():
        widths = [text, *[_TILE] * columns]
        grid = fig.add_gridspec(len(queries), 1 + columns, width_ratios=widths)
    for row, query in enumerate(queries):
        _tell(panel(fig, grid, row, 0), query)
        for place, image in enumerate(query.images):
            ax = panel(fig, grid, row, 1 + place)
            frame = RIGHT if query.right[place] else None
            _tile(ax, image, number(query.scores[place], 3), frame)
            if row == 0:
                with style():
                    ax.set_title(str(1 + place), size=9.5, loc="center", pad=5, color=MUTED)
        if _is_missed(query):
            _tile(panel(fig, grid, row, 1 + most), query.wanted, "wanted", RIGHT)
    return fig


def _is_missed(query: Query) -> bool:
    return query.wanted is not None and not any(query.right)


def _tell(ax: Axes, query: Query) -> None:
    with style():
        ax.set(xlim=(0, 1), ylim=(0, 1))
        ax.set_axis_off()
        text = wrapped(query.caption, 33, 4)
        ax.text(0, 0.62, text, va="center", size=9, linespacing=1.35)
        lines = text.count("\n") + 1
        told, color = f"right image at rank {query.rank}", RIGHT if query.rank == 1 else MUTED
        ax.text(0, 0.62 - 0.11 * lines - 0.05, told, va="top", size=8, color=color)


def _tile(ax: Axes, image: Any, below: str, frame: str | None) -> None:
    show(ax, image)
    with style():
        ax.set_xlabel(below, size=8, color=frame or MUTED, labelpad=3)
    if frame is not None:
        _frame(ax, frame)


def _frame(ax: Axes, color: str) -> None:
    box = Rectangle((0, 0), 1, 1, transform=ax.transAxes, fill=False, ec=color, lw=3)
    box.set_clip_on(False)
    ax.add_patch(box)


def contact_sheet(
    words: Sequence[str],
    hits: Sequence[Hit],
    columns: int = 5,
    heading: str = "",
    picture: Any = None,
) -> Figure:
    """The hits of a search; on each, every word's best patch is outlined in the word's colour.

    Of many hits the best 60 are drawn, and the heading says so.

    Args:
        words: of the query; none where it is a picture.
        hits: best first.
        columns: pictures in a row.
        heading: over everything.
        picture: that was looked for, drawn before the hits.

    Raises:
        ValueError: no hit, neither words nor a picture, or not one patch for each word.
    """
    check_counts(hits=hits)
    if picture is None:
        check_counts(words=words)
    for hit in hits:
        if len(hit.patches) != len(words):
            check_counts(words=words, patches=hit.patches)
    if len(hits) > _MOST:
        heading = f"{heading} (the best {_MOST} of {len(hits):,})".strip()
        hits = hits[:_MOST]
    before = int(picture is not None)
    tiles = before + len(hits)
    columns = min(columns, max(3, tiles))
    rows, side = math.ceil(tiles / columns), 1.7
    width = columns * (side + 0.12) + 0.1
    used = [any(hit.patches[n] is not None for hit in hits) for n in range(len(words))]
    colors = [
        color if shown else MUTED
        for color, shown in zip(word_colors(len(words)), used, strict=True)
    ]
    lines = _legend_lines(words, colors, int(9.5 * width)) if words else []
    tops = 0.25 * len(lines)
    shown = [*([picture] * before), *(hit.image for hit in hits)]
    tall = max(min(2.0, p.shape[0] / p.shape[1]) for p in map(pixels, shown))
    fig = empty_figure(width, rows * (side * tall + 0.28) + tops + 0.25, heading)
    with style():
        heights = [*([tops] if lines else []), *[side * tall + 0.28] * rows]
        grid = fig.add_gridspec(len(heights), columns, height_ratios=heights)
    if lines:
        _write_query(panel(fig, grid, 0, slice(0, columns)), lines)
    above = len(heights) - rows
    panels = [
        panel(fig, grid, above + place // columns, place % columns)
        for place in range(rows * columns)
    ]
    if picture is not None:
        show(panels[0], picture)
        _frame(panels[0], INK)
        with style():
            panels[0].set_xlabel("looked for", size=8, color=INK, weight="bold", labelpad=3)
    for ax, hit in zip(panels[before:], hits, strict=False):
        show(ax, hit.image, hit.grid)
        _outline_words(ax, hit, colors)
        told = f"{number(hit.score, 3)}  {short(hit.name, 18)}".strip()
        with style():
            ax.set_xlabel(told, size=8, color=MUTED, labelpad=3)
    for ax in panels[tiles:]:
        bare(ax)
    return fig


def _outline_words(ax: Axes, hit: Hit, colors: Sequence[str]) -> None:
    """Frames inside one another where several words chose one patch."""
    taken: dict[tuple[int, int], int] = {}
    for patch, color in zip(hit.patches, colors, strict=True):
        if patch is not None:
            within = taken.get(patch, 0)
            taken[patch] = within + 1
            outline(ax, *patch, color, inset=min(0.06 + 0.11 * within, 0.45))


def _legend_lines(
    words: Sequence[str], colors: Sequence[str], letters: int
) -> list[list[tuple[str, str]]]:
    """The query's words and their colours, in lines of so many letters."""
    lines: list[list[tuple[str, str]]] = [[]]
    used = 0
    for word, color in zip(words, colors, strict=True):
        if lines[-1] and used + len(word) + 1 > letters:
            lines.append([])
            used = 0
        lines[-1].append((word, color))
        used += len(word) + 1
    return lines


def _write_query(ax: Axes, lines: Sequence[Sequence[tuple[str, str]]]) -> None:
    """The query, each word in its colour."""
    with style():
        ax.set(xlim=(0, 1), ylim=(len(lines), 0))
        ax.set_axis_off()
        for line, words in enumerate(lines):
            last: Text | None = None
            for word, color in words:
                look = {"color": color, "weight": "bold", "size": 10.5, "va": "center"}
                if last is None:
                    last = ax.text(0, line + 0.5, word, **look)
                else:
                    look |= {"xycoords": last, "textcoords": "offset points"}
                    last = ax.annotate(word, (1, 0.5), (5, 0), **look)
