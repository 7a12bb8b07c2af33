"""Scores taken apart: of a batch both ways, and of one pair word by word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy import ndarray
from torch import Tensor

from filip_vl.alignment import Alignment
from filip_vl.report.common import (
    FILIP,
    RIGHT,
    WRONG,
    bare,
    check_counts,
    empty_figure,
    middle_cut,
    number,
    outline,
    panel,
    short,
    show,
    title,
)
from tenfold.plotting import INK, MUTED, describe, heatmap, style

_VALUES = 8  # pairs up to which every cell has its value written in
_MOST = 24  # pairs that can be told apart
_LESS = "#A9C6DB"  # bars that do not stand out


def similarity_matrices(
    s_i2t: Float[Tensor, "pairs pairs"],
    s_t2i: Float[Tensor, "pairs pairs"],
    images: Sequence[Any],
    captions: Sequence[str],
    heading: str = "",
) -> Figure:
    """s^I beside s^T of a batch, both indexed (image, caption).

    A frame marks what each image chose in s^I, row by row, and what each caption chose in s^T,
    column by column: green on the diagonal, where the pairs are, and orange elsewhere.

    Args:
        s_i2t: image to text.
        s_t2i: text to image.
        images: of the batch.
        captions: in the same order.
        heading: over everything.

    Raises:
        ValueError: not one for one, none, or too many pairs to be told apart.
    """
    i2t, t2i = (s.detach().cpu().double().numpy() for s in (s_i2t, s_t2i))
    check_counts(pairs=list(i2t), images=images, captions=captions)
    count = len(images)
    if count > _MOST:
        raise ValueError(f"{count} pairs cannot be told apart: at most {_MOST}")
    side = max(2.6, 0.4 * count)
    fig = empty_figure(2 * side + 1.7, side + 1.25 + 0.19 * count, heading)
    with style():
        widths, heights = [side / count, side, side], [side, 0.19 * count]
        grid = fig.add_gridspec(2, 3, width_ratios=widths, height_ratios=heights)
    _column_of_images(panel(fig, grid, 0, 0), images)
    limits = float(min(i2t.min(), t2i.min())), float(max(i2t.max(), t2i.max()))
    rows, columns = panel(fig, grid, 0, 1), panel(fig, grid, 0, 2)
    hits = _draw_matrix(rows, i2t, list(enumerate(i2t.argmax(1).tolist())), limits)
    title(rows, "s\u1d35, image to text", f"rows choose, {hits}")
    chosen = [(row, column) for column, row in enumerate(t2i.argmax(0).tolist())]
    hits = _draw_matrix(columns, t2i, chosen, limits)
    title(columns, "s\u1d40, text to image", f"columns choose, {hits}")
    with style():
        rows.set_ylabel("image")
    _captions(panel(fig, grid, 1, slice(0, 3)), captions, int(14 * fig.get_size_inches()[0]))
    told = {RIGHT: "chosen, and right", WRONG: "chosen, but of another pair"}
    with style():
        marks = [
            Rectangle((0, 0), 1, 1, fill=False, ec=color, lw=2.2, label=text)
            for color, text in told.items()
        ]
        fig.legend(handles=marks, loc="outside lower center", ncols=2)
    return fig


def _draw_matrix(
    ax: Axes,
    scores: Float[ndarray, "pairs pairs"],
    chosen: Sequence[tuple[int, int]],
    limits: tuple[float, float],
) -> str:
    """Scores with a frame around every choice (row, column); returns how many are right."""
    count = len(scores)
    names = [str(n + 1) for n in range(count)]
    fmt = "{:.2f}" if count <= _VALUES else ""
    heatmap(ax, scores, rows=names, columns=names, fmt=fmt, limits=limits)
    for row, column in chosen:
        outline(ax, row - 0.5, column - 0.5, RIGHT if row == column else WRONG, inset=0.06)
    with style():
        ax.set_xlabel("caption")
    return f"{sum(row == column for row, column in chosen)} of {count} right"


def _column_of_images(ax: Axes, images: Sequence[Any]) -> None:
    """Small pictures in the rows of the matrix beside them."""
    with style():
        ax.set(xlim=(0, 1), ylim=(len(images), 0))
        bare(ax)
    for row, image in enumerate(images):
        inset = ax.inset_axes((0, 1 - (row + 0.95) / len(images), 1, 0.9 / len(images)))
        show(inset, image)


def _captions(ax: Axes, captions: Sequence[str], letters: int) -> None:
    with style():
        ax.set(xlim=(0, 1), ylim=(len(captions) - 0.5, -0.5))
        ax.set_axis_off()
        for line, text in enumerate(captions):
            ax.text(0.02, line, str(line + 1), ha="right", va="center", size=8.5, color=MUTED)
            ax.text(0.03, line, middle_cut(text, letters), va="center", size=8.5)


def contribution_bars(
    images: Sequence[Any],
    found: Sequence[Alignment],
    names: Sequence[str] = (),
    heading: str = "",
) -> Figure:
    """Why images score as they do for one caption: what each word adds to s^T.

    s^T is a mean over the caption's tokens, so that every hit of a search is the sum of its bars.

    Args:
        images: the hits, such as the right image and one that was taken for it.
        found: the alignment of each of them with the same caption.
        names: over the images; their places if left out.
        heading: over everything.

    Raises:
        ValueError: not one for one, none, or alignments with different captions.
    """
    names = names or [f"hit {n + 1}" for n in range(len(images))]
    check_counts(images=images, alignments=found, names=names)
    if any(other.strings != found[0].strings for other in found):
        raise ValueError("the alignments are with different captions")
    shares = [other.word_shares for other in found]
    words = list(shares[0])
    count, tall = len(images), 0.2 * len(words)
    fig = empty_figure(1.1 + 2.3 * count, 1.9 + tall + (1.05 if count > 1 else 0.75), heading)
    with style():
        grid = fig.add_gridspec(2, count, height_ratios=[1.5, tall])
    values = np.array([[100 * row[word] for word in words] for row in shares])
    first: Axes | None = None
    for column, (image, name) in enumerate(zip(images, names, strict=True)):
        above = panel(fig, grid, 0, column)
        show(above, image)
        title(above, short(name, 24), f"s\u1d40 = {number(found[column].s_t2i, 3)}")
        ax = panel(fig, grid, 1, column)
        best = values[column] >= values.max(0) - 1e-9
        _bars(ax, words, values[column], best if count > 1 else np.ones(len(words), bool))
        low, high = min(0.0, values.min()), max(0.0, values.max())
        ax.set_xlim(low - (0.32 * (high - low) if low < 0 else 0), high + 0.32 * (high - low))
        if first is not None:
            ax.set_yticklabels([])
        first = first or ax
        describe(ax, x="share of s\u1d40 (hundredths)")
    if count > 1:
        told = {FILIP: "the largest share of this word", _LESS: "another image has a larger one"}
        with style():
            marks = [Patch(color=color, label=text) for color, text in told.items()]
            fig.legend(handles=marks, loc="outside lower center", ncols=2)
    return fig


def _bars(ax: Axes, words: Sequence[str], values: Float[ndarray, " words"], best: ndarray) -> None:
    """Bars from the top; those that beat the other hits stand out."""
    with style():
        colors = [FILIP if wins else _LESS for wins in best]
        places = np.arange(len(words))
        ax.barh(places, values, color=colors, height=0.74)
        for place, value in enumerate(values):
            side = "left" if value >= 0 else "right"
            text = f" {number(float(value))} "
            ax.text(value, place, text, va="center", ha=side, size=7.5, color=INK)
        ax.set_yticks(places, [short(word, 18) for word in words])
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(words) - 0.4, -0.6)
        ax.axvline(0, color=MUTED, lw=0.8)
        ax.grid(visible=False, axis="y")
