"""Labels beside points, placed where they hide nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox, BboxBase
from numpy.typing import NDArray

from tenfold.plotting.style import PAPER, style

Pixels = NDArray[np.float64]  # (n, 2)

_GID = "tenfold-label"  # marks the annotations that may be moved
# Directions from the point to the label, the most readable first.
_DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
_DISTANCES = (7.0, 13.0)  # from the point to the edge of the label, in typographic points


def add_label(ax: Axes, text: str, at: tuple[float, float], color: str) -> None:
    """Label the data point ``at``; `settle_labels` finds the place."""
    note = ax.annotate(
        text,
        at,
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        va="center",
        color=color,
        fontsize=8.5,
        zorder=5,
        gid=_GID,
        path_effects=[withStroke(linewidth=2.5, foreground=PAPER)],
    )
    note.set_in_layout(False)


def settle_labels(fig: Figure) -> None:
    """Move the labels of `points` to where they cover neither lines, points nor one another.

    Every label tries sixteen places around its point and takes the one that covers least; the
    later labels keep clear of the earlier ones.
    """
    with style():
        layout = fig.get_layout_engine()
        if layout is None:
            fig.draw_without_rendering()
        else:  # which moves all that a drawing would
            layout.execute(fig)
    for ax in fig.axes:
        labels = [t for t in ax.texts if isinstance(t, Annotation) and t.get_gid() == _GID]
        if not labels:
            continue
        ink, taken = _ink(ax), []
        legend = ax.get_legend()
        if legend is not None:
            taken.append(legend.get_window_extent().padded(6.0))
        for label in labels:
            taken.append(_settle(ax, label, ink, taken, fig.dpi / 72))


def _ink(ax: Axes) -> Pixels:
    """Pixels along everything drawn with lines or markers: a sample every few pixels."""
    samples: list[Pixels] = [np.empty((0, 2))]
    for line in ax.lines:
        vertices = np.asarray(line.get_transform().transform_path(line.get_path()).vertices, float)
        joined = line.get_linestyle() not in ("None", "none", " ", "")
        samples.append(_along(vertices) if joined else vertices)
    for collection in ax.collections:
        if isinstance(collection, LineCollection):  # error bars; bands may lie under a label
            for path in collection.get_paths():
                path = collection.get_transform().transform_path(path)
                samples.append(_along(np.asarray(path.vertices, float)))
    found = np.concatenate(samples)
    return found[np.isfinite(found).all(axis=1)]


def _along(vertices: Pixels, every: float = 3.0) -> Pixels:
    pieces = [vertices]
    for start, stop in itertools.pairwise(vertices):
        length = math.hypot(stop[0] - start[0], stop[1] - start[1])
        if math.isfinite(length):
            pieces.append(np.linspace(start, stop, num=2 + int(length / every)))
    return np.concatenate(pieces)


def _settle(ax: Axes, label: Annotation, ink: Pixels, taken: Sequence[Bbox], point: float) -> Bbox:
    """Move one label to its best place and return the box that it covers there.

    All in pixels; ``point`` is the size of a typographic point, in which offsets are given.
    """
    size = label.get_window_extent()
    x, y = ax.transData.transform(label.xy)

    def box_at(place: tuple[float, tuple[int, int]]) -> Bbox:
        distance, (right, up) = place
        gap = distance * point / math.hypot(right, up)
        left = x + right * (gap + size.width / 2) - size.width / 2
        bottom = y + up * (gap + size.height / 2) - size.height / 2
        return Bbox.from_bounds(left, bottom, size.width, size.height)

    places = [box_at(place) for place in itertools.product(_DISTANCES, _DIRECTIONS)]
    # Among equally free places the first one, which is the most readable.
    best = min(places, key=lambda box: _covered(box.padded(point), ax.bbox, ink, taken))
    label.xyann = ((best.x0 + best.x1) / 2 - x) / point, ((best.y0 + best.y1) / 2 - y) / point
    return best


def _covered(box: Bbox, frame: BboxBase, ink: Pixels, taken: Sequence[Bbox]) -> float:
    """How much a label in ``box`` would hide or stick out; 0 is a free place."""
    hidden = ((ink > box.min) & (ink < box.max)).all(axis=1).sum()
    shared = sum(_area(Bbox.intersection(box, other)) for other in taken)
    outside = _area(box) - _area(Bbox.intersection(box, frame))
    # A label on a label, or beyond the panel, is worse than one on a line.
    return float(hidden) + (30.0 * shared + 60.0 * outside) / _area(box)


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else float(box.width * box.height)
