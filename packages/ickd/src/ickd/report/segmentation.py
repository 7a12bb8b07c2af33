"""Images under the classes of their pixels: the truth, and what each network says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy import ndarray
from torch import Tensor

from ickd.metrics import IGNORE, confusion_matrix, mean_iou
from ickd.report.common import PLAIN, STUDENT, TEACHER, number
from tenfold.plotting import INK, MUTED, PALETTE, figure, style

_OPACITY = 0.68
_TILE, _PAD, _SCORE, _HEAD = 1.75, 0.04, 0.27, 0.6  # inches


class _Column(NamedTuple):
    """One column of pictures: what stands over it, and the classes that it lays over the images."""

    name: str
    color: str
    classes: Int[Tensor, "images _ _"] | None


def segmentation_overlays(
    images: Float[Tensor, "images 3 height width"] | UInt8[Tensor, "images 3 height width"],
    truth: Int[Tensor, "images height width"],
    student: Int[Tensor, "images _ _"],
    plain: Int[Tensor, "images _ _"] | None = None,
    teacher: Int[Tensor, "images _ _"] | None = None,
    *,
    class_names: Sequence[str],
    background: int | None = 0,
    heading: str = "",
) -> Figure:
    """A row for each image: the image, the truth, and what teacher and students say.

    Under every prediction stands its mIoU over the classes of the image.

    Args:
        images: pixels in 0..1, or 8-bit ones.
        truth: classes, 255 where there is none.
        student: classes that the distilled student predicts.
        plain: likewise the plain student.
        teacher: likewise the teacher.
        class_names: of all classes; those that occur are explained at the bottom.
        background: a class that covers nothing, None if there is none.
        heading: over everything.

    Raises:
        ValueError: no image, or pictures of different number or size.
    """
    columns = [
        _Column("Image", INK, None),
        _Column("Truth", INK, truth),
        _Column("Teacher", TEACHER, teacher),
        _Column("Distilled student", STUDENT, student),
        _Column("Plain student", PLAIN, plain),
    ]
    columns = [c for c in columns if c.name == "Image" or c.classes is not None]
    _check(images, columns)
    count, tall = len(images), images.shape[2] / images.shape[3]
    width = len(columns) * _TILE
    height = count * ((_TILE - 2 * _PAD) * tall + _SCORE) + _HEAD + (0.35 if heading else 0)
    fig, panels = figure(width, height, rows=count, columns=len(columns))
    fig.set_layout_engine("constrained", w_pad=_PAD, h_pad=_PAD, wspace=0, hspace=0)
    pixels = images.float() / (255 if images.dtype == torch.uint8 else 1)
    for row in range(count):
        photo = pixels[row].clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        for k, column in enumerate(columns):
            ax = panels[row * len(columns) + k]
            classes = None if column.classes is None else column.classes[row].cpu()
            _show(ax, photo, classes, len(class_names), background)
            if column.name not in ("Image", "Truth") and classes is not None:
                _tell_score(ax, classes, truth[row].cpu(), len(class_names))
            if row == 0:
                with style():
                    ax.set_title(column.name, color=column.color, size=10, pad=6)
    _explain(fig, [c.classes for c in columns if c.classes is not None], class_names, background)
    if heading:
        with style():
            fig.suptitle(heading, x=0.012, ha="left", size=13, weight="bold")
    return fig


def class_colors(count: int) -> list[str | tuple[float, float, float]]:
    """A colour for each of up to 24 classes, then again: the palette, then its tints and shades."""
    plain = [np.array(to_rgb(color)) for color in PALETTE]
    tints = [0.5 + 0.5 * color for color in plain]
    shades = [0.55 * color for color in plain]
    greyed = [0.5 * color + 0.25 for color in plain]
    known = [tuple(float(c) for c in color) for color in [*plain, *tints, *shades, *greyed]]
    return [known[k % len(known)] for k in range(count)]  # pyright: ignore[reportReturnType]


def overlay(
    photo: Float[ndarray, "height width 3"],
    classes: Int[ndarray, "height width"],
    num_classes: int,
    background: int | None = 0,
) -> Float[ndarray, "height width 3"]:
    """The image in grey, with every class in its colour over it.

    Args:
        photo: pixels in 0..1.
        classes: of every pixel; those that are no class (255) become white.
        num_classes: how many classes there are.
        background: a class that covers nothing.
    """
    grey = np.repeat(photo.mean(2, keepdims=True), 3, axis=2)
    colors = np.array(class_colors(num_classes))
    known = (classes >= 0) & (classes < num_classes)
    painted = (1 - _OPACITY) * grey + _OPACITY * colors[np.where(known, classes, 0)]
    painted[~known] = 1.0
    if background is not None:
        painted[classes == background] = grey[classes == background]
    return painted


def _check(images: Tensor, columns: Sequence[_Column]) -> None:
    wanted = (len(images), *images.shape[2:])
    for column in columns:
        if column.classes is not None and tuple(column.classes.shape) != wanted:
            found = tuple(column.classes.shape)
            raise ValueError(f"{column.name.lower()} is {found} for images {wanted}")
    if not len(images):
        raise ValueError("there is no image to show")


def _show(
    ax: Axes,
    photo: Float[ndarray, "height width 3"],
    classes: Tensor | None,
    num_classes: int,
    background: int | None,
) -> None:
    picture = photo
    if classes is not None:
        picture = overlay(photo, classes.numpy(), num_classes, background)
    with style():
        ax.imshow(picture, interpolation="nearest" if max(photo.shape) < 100 else "antialiased")
        ax.set(xticks=[], yticks=[])
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)


def _tell_score(ax: Axes, classes: Tensor, truth: Tensor, num_classes: int) -> None:
    iou = float(mean_iou(confusion_matrix(classes, truth, num_classes, IGNORE)))
    with style():
        ax.set_xlabel(f"mIoU {number(100 * iou, 0)}", size=8, color=MUTED, labelpad=3)


def _explain(
    fig: Figure, shown: Sequence[Tensor], names: Sequence[str], background: int | None
) -> None:
    """A legend of the classes that occur."""
    present = sorted({int(k) for classes in shown for k in classes.unique()})
    colors = class_colors(len(names))
    patches = [
        Patch(color=colors[k], label=names[k])
        for k in present
        if k < len(names) and k != background
    ]
    with style():
        look = {"handlelength": 1.0, "handleheight": 1.0, "columnspacing": 1.2, "fontsize": 8.5}
        fig.legend(
            handles=patches, loc="outside lower center", ncols=min(6, max(1, len(patches))), **look
        )
