"""What the pictures share: colours of parts and heads, columns of the tables, panels, tokens."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy import ndarray

from bert_oversmoothing.report.words import plain
from tenfold.plotting import DPI, FAINT, MUTED, PALETTE, PAPER, figure, settle_labels, style

PARTS = {
    "log_attention": ("attention + residual", PALETTE[0]),
    "log_norm1": ("first norm", PALETTE[4]),
    "log_feed_forward": ("feed-forward + residual", PALETTE[2]),
    "log_norm2": ("second norm", PALETTE[1]),
    "log_final_norm": ("final norm", PALETTE[3]),
}
"""Parts of a block by their column, in the order in which they act: name and colour."""

FUSIONS = {"concat": PALETTE[0], "gate": PALETTE[2], "max": PALETTE[5]}
"""Colours of the paper's fusions: cool ones."""

BASELINE = "last"
"""The head that reads the last layer alone; grey."""

_PEERS = (PALETTE[1], PALETTE[4], PALETTE[3])

SEQUENTIAL = LinearSegmentedColormap.from_list(
    "smooth", ["#F3F7FB", "#9CC9E3", "#2F8EC4", "#0072B2", "#063A5E"]
).with_extremes(bad=FAINT)
"""Pale to dark blue; grey where there is no value."""

DIVERGING = LinearSegmentedColormap.from_list(
    "smooth-signed",
    ["#8F3B00", "#D55E00", "#F3B98F", "#F7F7F7", "#8FC3E3", "#0072B2", "#063A5E"],
).with_extremes(bad=FAINT)
"""Orange below 0, blue above."""

RAMP = LinearSegmentedColormap.from_list("layers", ["#E69F00", "#C8566B", "#5B3A8C", "#101A3C"])
"""Colours of ordered lines, none of them too pale for white paper."""

HALO = [withStroke(linewidth=2.5, foreground=PAPER)]
"""Around texts that may lie over lines."""


_HEADS = {"last": "last layer", "gate_identity": "gate, identity start"}


def head_colors(names: Sequence[str]) -> dict[str, str]:
    """A colour for each head: grey for the baseline, cool for the fusions, warm for the rest.

    A variant of a fusion, such as "gate_identity", has the colour of that fusion.
    """
    fixed = {BASELINE: MUTED, **FUSIONS}
    stems = {name: name if name in fixed else name.split("_")[0] for name in names}
    others = [name for name, stem in stems.items() if stem not in fixed]
    warm = {name: _PEERS[n % len(_PEERS)] for n, name in enumerate(others)}
    return {name: warm.get(name) or fixed[stem] for name, stem in stems.items()}


def head_label(name: str) -> str:
    """A head's name for people."""
    if name.startswith("best_layer("):
        return f"block {name[11:-1]} alone"
    return _HEADS.get(name, name.replace("_", " "))


def empty_figure(width: float, height: float, heading: str = "") -> Figure:
    """A figure in the house style whose panels are still to be placed; sizes in inches."""
    lines = textwrap.wrap(plain(heading), int(8 * width))
    fig, panels = figure(width, height + (0.16 + 0.22 * len(lines) if lines else 0))
    panels[0].remove()
    if lines:
        with style():
            fig.suptitle("\n".join(lines), x=0.012, ha="left", size=13, weight="bold")
    return fig


def panel(fig: Figure, grid: GridSpec, row: slice | int, column: slice | int, **look: Any) -> Axes:
    """A new panel over some cells of a grid."""
    with style():
        return fig.add_subplot(grid[row, column], **look)


def title(ax: Axes, text: str, below: str = "", lift: float = 0.0) -> None:
    """A panel's title: a bold line, and plain ones under it; lifted over an axis at the top."""
    with style():
        ax.set_title(text, pad=lift + (21 + 12 * below.count("\n") if below else 8))
        note = ax.annotate(below, (0, 1), (0, 7 + lift), "axes fraction", "offset points")
        note.set(va="bottom", color=MUTED, size=8.5)
        note.set_in_layout(False)  # a long line must not push the panels apart


def under(fig: Figure, *panels: Axes, columns: int = 9) -> None:
    """What the panels label, explained under the whole figure."""
    told = [pair for ax in panels for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    if not told:
        return
    # A letter of the legend's size takes about 0.07 inches, a handle half an inch.
    fits = int(fig.get_size_inches()[0] / (0.07 * max(len(name) for _, name in told) + 0.5))
    with style():
        handles, names = zip(*told, strict=True)
        ncols = max(1, min(columns, fits, len(told)))
        fig.legend(handles, names, loc="outside lower center", ncols=ncols)


def matrix(
    ax: Axes,
    values: Float[ndarray, "rows columns"],
    norm: Normalize,
    colors: Colormap = SEQUENTIAL,
    **look: Any,
) -> None:
    """Draw a matrix as cells of colour."""
    with style():
        cells = np.ma.masked_invalid(values)
        ax.imshow(cells, cmap=colors, norm=norm, interpolation="nearest", **look)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)


def color_bar(
    panels: Axes | Iterable[Axes],
    norm: Normalize,
    label: str = "",
    colors: Colormap = SEQUENTIAL,
    *,
    whole: bool = False,
    **look: Any,
) -> None:
    """A bar of colours beside panels; its ticks may be whole numbers alone."""
    axes = [panels] if isinstance(panels, Axes) else [*panels]
    with style():
        fig = axes[-1].figure
        bar = fig.colorbar(ScalarMappable(norm, colors), ax=axes, **{"pad": 0.02, **look})
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=2.5)
        bar.locator = MaxNLocator(nbins=5, integer=whole)
        bar.update_ticks()
        bar.set_label(label, size=8.5)


def known(values: Iterable[float]) -> bool:
    """Whether there is any number among them."""
    return any(math.isfinite(value) for value in values)


def png(fig: Figure) -> bytes:
    """The figure as `tenfold.plotting.save` would write it."""
    settle_labels(fig)
    content = io.BytesIO()
    with style():
        fig.savefig(content, dpi=DPI, format="png", metadata={"Software": None})
    return content.getvalue()
