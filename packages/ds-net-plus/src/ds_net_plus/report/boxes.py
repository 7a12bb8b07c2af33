"""Images with the boxes that were found on them, and those that are there."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from torch import Tensor

from ds_net_plus.metrics import Truth
from ds_net_plus.report.common import madds_unit, route_colors, short
from ds_net_plus.report.gallery import Statistic
from tenfold.plotting import INK, MUTED, PALETTE, PAPER, figure, style

_TILE, _CAPTION, _TITLE = 2.1, 0.14, 0.48  # inches


def detections(
    images: Tensor,
    results: Sequence[Mapping[str, Tensor]],
    *,
    truths: Sequence[Truth] = (),
    sizes: Sequence[tuple[int, int]] | Tensor | None = None,
    names: Sequence[str] = (),
    routes: Tensor | Sequence[int] | None = None,
    madds: Tensor | Sequence[int] | None = None,
    mean: Statistic = 0.0,
    std: Statistic = 1.0,
    min_score: float = 0.3,
    columns: int = 4,
    title: str = "What the detector finds",
) -> Figure:
    """A grid of images: solid boxes were found, dashed ones are there, dotted ones are difficult.

    A found box has the colour of its class and tells class and score; the frame of an image has the
    colour of its route, from cool (cheap) to hot (wide).

    Args:
        images: (N, C, H, W), normalised, C = 1 or 3.
        results: boxes, scores and labels of each image.
        truths: the objects of each image; none are drawn if empty.
        sizes: (height, width) in whose pixels the boxes are; those of `images` where None.
        names: of the classes; their numbers where empty.
        routes: the route of each image, (N,) or (N, gates); not told where None.
        madds: of each image; not told where None.
        mean: subtracted in the normalisation, of all channels or of each.
        std: divided by in the normalisation.
        min_score: of the boxes that are drawn.
        columns: of the grid.
        title: over everything.

    Raises:
        ValueError: there is no image, or results or truths are not one an image.
    """
    count = len(images)
    if not count or len(results) != count or len(truths or results) != count:
        raise ValueError(f"{len(results)} results and {len(truths)} truths for {count} images")
    pictures = _pictures(images, mean, std)
    shapes = [tuple(images.shape[-2:])] * count if sizes is None else torch.as_tensor(sizes)
    captions, frames = _captions(routes, madds, count)
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    width, height = columns * _TILE, rows * (_TILE + _CAPTION) + _TITLE
    fig, panels = figure(width, height, rows=rows, columns=columns)
    with style():
        _head(fig, title, bool(truths))
        for ax in panels[count:]:
            ax.set_axis_off()
        for n, ax in enumerate(panels[:count]):
            height, width = (int(side) for side in shapes[n])
            _show(ax, pictures[n], (height, width), captions[n], frames[n])
            if truths:
                _draw_truth(ax, truths[n])
            _draw_found(ax, results[n], names, min_score)
    return fig


def _head(fig: Figure, title: str, truths: bool) -> None:
    """The title, and below it what the lines mean."""
    height = fig.get_size_inches()[1]
    layout = ConstrainedLayoutEngine(
        h_pad=0.03, w_pad=0.05, hspace=0, wspace=0, rect=(0, 0, 1, 1 - _TITLE / height)
    )
    fig.set_layout_engine(layout)
    fig.text(0.01, 1 - 0.17 / height, title, va="center", size=11, weight="bold")
    note = "solid: found" + ("   dashed: there   dotted: there, but difficult" if truths else "")
    fig.text(0.01, 1 - 0.37 / height, note, va="center", color=MUTED, size=8)


def _pictures(images: Tensor, mean: Statistic, std: Statistic) -> Any:
    scale, shift = (torch.as_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (std, mean))
    pixels = (images.detach().cpu().float() * scale + shift).clamp(0, 1)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def _captions(
    routes: Tensor | Sequence[int] | None, madds: Tensor | Sequence[int] | None, count: int
) -> tuple[list[str], list[str]]:
    """What is told of each image, and the colour of its frame."""
    parts: list[list[str]] = [[] for _ in range(count)]
    frames = [MUTED] * count
    if routes is not None:
        paths = torch.as_tensor(routes).reshape(count, -1).tolist()
        colors = route_colors(1 + max(2, *(k for path in paths for k in path)))
        for n, path in enumerate(paths):
            name = "-".join(map(str, path)) if min(path) >= 0 else "largest"
            parts[n].append(f"route {name}")
            frames[n] = colors[round(sum(path) / len(path))]
    if madds is not None:
        costs = torch.as_tensor(madds).tolist()
        unit, letter = madds_unit(max(costs))
        for n, cost in enumerate(costs):
            parts[n].append(f"{short(cost / unit)} {letter}")
    return [" · ".join(texts) for texts in parts], frames


def _show(ax: Axes, picture: Any, size: tuple[int, int], caption: str, frame: str) -> None:
    height, width = size
    ax.imshow(picture, extent=(0, width, height, 0), interpolation="antialiased")
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=frame, linewidth=2.2)
    ax.set_xlabel(caption, size=8, color=INK, labelpad=4)


def _draw_truth(ax: Axes, truth: Truth) -> None:
    for box, difficult in zip(truth.boxes.tolist(), truth.difficult.tolist(), strict=True):
        line = ":" if difficult else "--"
        for color, width in ((INK, 2.0), (PAPER, 1.0)):  # light on dark, to be seen on any image
            ax.add_patch(_rectangle(box, ec=color, lw=width, ls=line, fill=False, zorder=3))


def _draw_found(
    ax: Axes, result: Mapping[str, Tensor], names: Sequence[str], min_score: float
) -> None:
    """The least certain first, so that the best lie on top."""
    kept = result["scores"] >= min_score
    parts = [result[key][kept].tolist()[::-1] for key in ("boxes", "scores", "labels")]
    width, height = ax.get_xlim()[1], ax.get_ylim()[0]
    for box, score, label in zip(*parts, strict=True):
        color = PALETTE[label % len(PALETTE)]
        ax.add_patch(_rectangle(box, ec=color, lw=1.6, fill=False, zorder=4))
        above = box[1] > 0.09 * height
        right = box[0] > 0.62 * width  # a tag must not leave the image
        ax.text(
            box[2] if right else box[0],
            box[1],
            f"{names[label] if names else label} {score:.2f}",
            ha="right" if right else "left",
            va="bottom" if above else "top",
            size=6,
            color=PAPER,
            bbox={"facecolor": color, "edgecolor": color, "pad": 0.6, "linewidth": 0.6},
            zorder=5,
            clip_on=True,
        )


def _rectangle(box: Sequence[float], **look: Any) -> Rectangle:
    x0, y0, x1, y1 = box
    return Rectangle((x0, y0), x1 - x0, y1 - y0, **look)
