"""One look for all figures: curves, points, bars, heat maps and picture grids.

Everything is drawn on `matplotlib.figure.Figure` objects with the Agg canvas; pyplot, its window
system and its global state are never touched, so the helpers work in a thread, in a notebook and
on a machine without a display. Colours are told apart by people with colour-blindness, and the
fonts come with matplotlib.

>>> fig, (ax,) = figure()
>>> curve(ax, madds, accuracy, y_error=std, label="static routes")
>>> points(ax, [31.0], [91.2], labels=["tau 0.1"], color=PALETTE[1], label="dynamic")
>>> describe(ax, title="Accuracy against cost", x="MAdds (M)", y="top-1 (%)")
>>> legend(ax)
>>> save(fig, "figures/cost.png")
"""

from tenfold.plotting.charts import bars, curve, heatmap, points
from tenfold.plotting.figures import check_picture, describe, figure, legend, save
from tenfold.plotting.labels import settle_labels
from tenfold.plotting.pictures import Tile, TileGroup, image_grid
from tenfold.plotting.style import DPI, FAINT, INK, MUTED, PALETTE, PAPER, style

__all__ = [
    "DPI",
    "FAINT",
    "INK",
    "MUTED",
    "PALETTE",
    "PAPER",
    "Tile",
    "TileGroup",
    "bars",
    "check_picture",
    "curve",
    "describe",
    "figure",
    "heatmap",
    "image_grid",
    "legend",
    "points",
    "save",
    "settle_labels",
    "style",
]
