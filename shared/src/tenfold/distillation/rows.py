"""Rows, one for each image: what logit and relation losses compare, and the labels beside them."""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor

from tenfold.distillation.base import check_same_shape, in_full_precision
from tenfold.errors import UserError

UNLABELLED = -1
"""The label of an image without one."""


def logit_rows(
    student: Float[Tensor, "batch classes *pixels"], teacher: Float[Tensor, "batch classes *pixels"]
) -> tuple[Float[Tensor, "rows classes"], Float[Tensor, "rows classes"]]:
    """Both sides' logits as rows, in full precision, the teacher's as constants.

    Args:
        student: (batch, classes), or (batch, classes, height, width) in dense prediction, where
            every pixel is a row.
        teacher: likewise.

    Raises:
        ValueError: if the shapes differ, or are neither.
    """
    check_same_shape(student, teacher)
    if student.ndim not in (2, 4):
        shape = tuple(student.shape)
        raise ValueError(f"logits are (batch, classes) or (batch, classes, h, w), got {shape}")
    s, t = (in_full_precision(z).movedim(1, -1).flatten(0, -2) for z in (student, teacher.detach()))
    return s, t.to(s.dtype)


def label_rows(
    labels: Shaped[Tensor, " batch *pixels"] | None, rows: Float[Tensor, "rows classes"], loss: str
) -> Shaped[Tensor, " rows"]:
    """Labels, one for each row of logits.

    Raises:
        UserError: there are none, or not as many as rows.
    """
    if labels is None:
        fix = f"give the loader labels, {UNLABELLED} where an image has none, or choose kd"
        raise UserError(f"{loss} needs the labels of the batch", fix=fix)
    flat = labels.flatten().long()
    if len(flat) != len(rows):
        raise UserError(f"{loss} met {len(flat)} labels for {len(rows)} rows of logits")
    return flat


def vectors(
    student: Float[Tensor, "batch_s ..."], teacher: Float[Tensor, "batch_t ..."], loss: str
) -> tuple[Float[Tensor, "batch dim_s"], Float[Tensor, "batch dim_t"]]:
    """Both sides' features as one vector for each image, in full precision, the teacher's constant.

    Args:
        student: a pooled vector or a map.
        teacher: of the same images; its other dimensions may differ.
        loss: named in the message.

    Raises:
        UserError: different batches, or features that are no vectors or have no entries.
    """
    ours, theirs = tuple(student.shape), tuple(teacher.shape)
    both = f"student {ours}, teacher {theirs}"
    if len(ours) < 2 or len(theirs) < 2:
        raise UserError(f"{loss} compares features of images, (batch, ...), got {both}")
    if 0 in ours or 0 in theirs:
        raise UserError(f"{loss} met features without entries: {both}")
    if ours[0] != theirs[0]:
        raise UserError(f"{loss} met features of different batches: {both}")
    s, t = in_full_precision(student).flatten(1), in_full_precision(teacher.detach()).flatten(1)
    return s, t.to(s.dtype)
