"""An image under its words: which word each patch chose, and where each word looks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from filip_vl.alignment import Alignment
from filip_vl.report.common import (
    CLASS_WORD,
    bare,
    check_counts,
    empty_figure,
    number,
    outline,
    panel,
    pixels,
    short,
    show,
    title,
)
from tenfold.plotting import INK, MUTED, PAPER, style

_DIM = 0.58  # how much darker the patches become that did not choose the label
_HEAT = LinearSegmentedColormap.from_list(
    "filip-heat", ["#0B2239", "#0072B2", "#7FC6A4", "#F7D84A", "#E0241B"]
)
_SIDE = 3.3  # inches of a picture
_LISTED = 26  # tokens beside the map


def plot_alignment(image: Any, found: Alignment, heading: str = "") -> Figure:
    """The paper's picture (section 3.9): at every patch the index of the word that it chose.

    Patches that chose a word of the label stay as they are and have a red index; the others are
    darker and have a white one. Beside it, what the indices stand for.

    Args:
        image: what the model saw, see `filip_vl.report.common.pixels`.
        found: its alignment with a caption.
        heading: over everything.
    """
    height, width = pixels(image).shape[:2]
    lines = min(len(found.strings), _LISTED)
    tall = max(_SIDE * min(2.0, height / width), 0.135 * lines)
    fig = empty_figure(2 * _SIDE + 2.3, tall + 0.55, heading)
    with style():
        grid = fig.add_gridspec(1, 3, width_ratios=[_SIDE, _SIDE, 2.1])
    plain, indexed, beside = (panel(fig, grid, 0, column) for column in range(3))
    show(plain, image)
    rows, columns = found.index.shape
    title(plain, "Image", f"{rows} \N{MULTIPLICATION SIGN} {columns} patches")
    draw_index(indexed, image, found)
    label = " ".join(found.strings[n] for n in found.label)
    if label:
        title(indexed, "Word of each patch", f"label: {short(label, 30)}", below_color=CLASS_WORD)
    else:
        title(indexed, "Word of each patch", "by its index")
    for ax in (plain, indexed):
        ax.set_anchor("N")  # with its heading as high as that of the words
    _list_tokens(beside, found, tall)
    return fig


def draw_index(ax: Axes, image: Any, found: Alignment) -> None:
    """Draw the image with the index of every patch's word on one panel; see `plot_alignment`."""
    rows, columns = found.index.shape
    show(ax, image, (rows, columns))
    dark = np.zeros((rows, columns, 4))
    if found.label:
        dark[..., 3] = np.where(found.on_label.cpu().numpy(), 0, _DIM)
    size = min(10.0, 0.42 * 72 * _SIDE / max(rows, columns))
    with style():
        look = {"extent": (0, columns, rows, 0), "aspect": ax.get_aspect()}
        ax.imshow(dark, interpolation="nearest", **look)
        for (row, column), index in np.ndenumerate(found.index.cpu().numpy()):
            red = bool(found.on_label[row, column])
            halo = withStroke(
                linewidth=(0.4 if red else 0.28) * size, foreground=PAPER if red else INK
            )
            ink, weight = (CLASS_WORD, "bold") if red else (PAPER, "normal")
            ax.text(
                column + 0.5,
                row + 0.5,
                str(index),
                size=size,
                ha="center",
                va="center",
                path_effects=[halo],
                color=ink,
                weight=weight,
            )


def _list_tokens(ax: Axes, found: Alignment, tall: float) -> None:
    """Index, token and number of patches, from the top of a panel of so many inches."""
    chosen = torch.bincount(found.index.flatten().cpu(), minlength=len(found.strings)).tolist()
    listed = list(range(len(found.strings)))
    if len(listed) > _LISTED:  # those that are in the picture, the most frequent of them
        most = sorted(listed, key=lambda n: (n not in found.label, -chosen[n]))[:_LISTED]
        listed = sorted(n for n in most if chosen[n] or n in found.label)
    room = max(len(listed), int(tall / 0.27))
    size = min(9.0, 0.66 * 72 * tall / room)
    with style():
        ax.set(xlim=(0, 1), ylim=(room - 0.3, -0.7))
        ax.set_axis_off()
        for line, n in enumerate(listed):
            color = CLASS_WORD if n in found.label else INK if chosen[n] else MUTED
            weight = "bold" if n in found.label else "normal"
            look = {"size": size, "color": color, "va": "center", "weight": weight}
            ax.text(0.1, line, str(n), ha="right", **look)
            ax.text(0.16, line, short(found.strings[n], 17), **look)
            ax.text(1.0, line, str(chosen[n] or ""), ha="right", **look)
    title(ax, "Words", "with the patches that chose them")


def heat_maps(
    image: Any,
    maps: Mapping[str, Float[Tensor, "rows columns"]],
    heading: str = "",
) -> Figure:
    """The image beside maps of heat over its patches, each with colours of its own range.

    Args:
        image: see `filip_vl.report.common.pixels`.
        maps: by what stands over them, such as the similarity to a label, or the attention.
        heading: over everything.

    Raises:
        ValueError: no map.
    """
    check_counts(maps=list(maps))
    tall, wide = pixels(image).shape[:2]
    height = _SIDE * min(2.0, tall / wide)
    fig = empty_figure((_SIDE + 0.35) * (1 + len(maps)), height + 1.0, heading)
    with style():
        grid = fig.add_gridspec(1, 1 + len(maps))
    first = panel(fig, grid, 0, 0)
    rows, columns = next(iter(maps.values())).shape
    show(first, image, (rows, columns))
    with style():  # the patches, to find those of a map
        look = {"colors": PAPER, "lw": 0.7, "alpha": 0.55}
        first.vlines(range(1, columns), 0, rows, **look)
        first.hlines(range(1, rows), 0, columns, **look)
    title(first, "Image", f"{rows} \N{MULTIPLICATION SIGN} {columns} patches")
    for column, (name, heat) in enumerate(maps.items(), 1):
        ax = panel(fig, grid, 0, column)
        values = heat.detach().float().cpu().numpy()
        norm = Normalize(float(values.min()), max(float(values.max()), float(values.min()) + 1e-9))
        _draw_heat(ax, image, heat, norm)
        title(ax, short(name, 34), "of every patch")
        _bar(ax, norm, height, height * wide / tall)
    return fig


def word_strips(image: Any, found: Alignment, heading: str = "", columns: int = 8) -> Figure:
    """The image, then a map of heat for each word of the caption, all with the same colours.

    A frame marks the patch that a word likes best, the one that counts in s^T.

    Args:
        image: see `filip_vl.report.common.pixels`.
        found: its alignment with a caption.
        heading: over everything.
        columns: pictures in a row.

    Raises:
        ValueError: a caption without words.
    """
    check_counts(words=found.words)
    count = 1 + len(found.words)
    columns = min(columns, count)
    rows, side = math.ceil(count / columns), 1.25
    high, wide = pixels(image).shape[:2]
    height = rows * (side * min(2.0, high / wide) + 0.5) + 0.55
    fig = empty_figure(max(5.2, columns * (side + 0.12)), height, heading)
    maps = found.word_maps.float().cpu().numpy()
    norm = Normalize(float(maps.min()), max(float(maps.max()), float(maps.min()) + 1e-9))
    with style():
        grid = fig.add_gridspec(rows, columns)
    panels = [panel(fig, grid, *divmod(place, columns)) for place in range(count)]
    show(panels[0], image)
    title(panels[0], "Image", size=9.5)
    for ax, word, heat in zip(panels[1:], found.words, found.word_maps, strict=True):
        _draw_heat(ax, image, heat, norm)
        row, column = divmod(int(heat.argmax()), heat.shape[1])
        outline(ax, row, column, INK)
        outline(ax, row, column, PAPER, inset=0.1)
        best = number(float(heat.max()))
        with style():
            ax.set_xlabel(best, size=8, color=MUTED, labelpad=3)
        title(ax, short(word.text, 12), size=9.5)
    _shared_bar(fig, panels, norm)
    return fig


def _draw_heat(ax: Axes, image: Any, heat: Float[Tensor, "rows columns"], norm: Normalize) -> None:
    """A map as what it is, a value a patch, in the shape of its image.

    Nothing shines through: a colour must be found again in the bar.
    """
    rows, columns = heat.shape
    tall, wide = pixels(image).shape[:2]
    with style():
        ax.imshow(
            heat.detach().float().cpu().numpy(),
            cmap=_HEAT,
            norm=norm,
            extent=(0, columns, rows, 0),
            interpolation="nearest",
            aspect=tall * columns / (wide * rows),
        )
        bare(ax)


def _bar(ax: Axes, norm: Normalize, height: float, width: float) -> None:
    """Colours under a panel of so many inches, as wide as it is."""
    with style():
        inset = ax.inset_axes((0, -0.22 / height, 1, 0.12 / height))
        bar = ax.figure.colorbar(ScalarMappable(norm, _HEAT), cax=inset, orientation="horizontal")
    _label_bar(bar, norm, 5 if width > 2.8 else 3)
    # the outermost labels must not leave the panel
    labels = bar.ax.get_xticklabels()
    if len(labels) > 1:
        labels[0].set_horizontalalignment("left")
        labels[-1].set_horizontalalignment("right")


def _shared_bar(fig: Figure, panels: list[Axes], norm: Normalize) -> None:
    with style():
        look = {"orientation": "horizontal", "aspect": 50, "pad": 0.02, "shrink": 0.6}
        bar = fig.colorbar(ScalarMappable(norm, _HEAT), ax=panels, **look)
        bar.set_label("similarity of patch and word (frame: the word's best patch)", size=8.5)
    _label_bar(bar, norm)


def _label_bar(bar: Colorbar, norm: Normalize, count: int = 5) -> None:
    """So many values from end to end, with the digits that tell them apart."""
    low, high = float(norm.vmin or 0), float(norm.vmax or 0)
    with style():
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=2.5)
        if high - low < 1e-8:  # one value has one label
            bar.set_ticks([(low + high) / 2], labels=[number(low)])
            return
        digits = max(2, 1 - math.floor(math.log10((high - low) / (count - 1))))
        ticks = np.linspace(low, high, count)
        bar.set_ticks(ticks.tolist(), labels=[number(float(tick), digits) for tick in ticks])
