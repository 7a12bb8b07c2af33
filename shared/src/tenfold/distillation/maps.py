"""What the feature losses do to maps before they compare them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.distillation.base import in_full_precision
from tenfold.distillation.taps import check_maps, check_stages
from tenfold.errors import UserError

Maps: TypeAlias = Tensor | Sequence[Tensor]
"""One map (batch, channels, height, width), or a list of them from shallow to deep."""


def stage_pairs(
    student: Maps,
    teacher: Maps,
    loss: str,
    *,
    channels: bool = False,
    at_least: int = 1,
    exactly: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Pair the maps of two networks, stage by stage, fit for arithmetic.

    Args:
        student: one map, or a list of them.
        teacher: as many.
        loss: named in the messages.
        channels: whether the channels of a pair must agree.
        at_least: how many stages the loss needs.
        exactly: for how many stages it has adaptors.

    Returns:
        For every stage the student's map and the teacher's: raised to full precision, of one
        dtype, the teacher's without gradient.

    Raises:
        UserError: too few stages or too many, or shapes that do not belong together.
    """
    ours = [student] if isinstance(student, Tensor) else list(student)
    theirs = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    check_stages(ours, theirs, loss)
    if len(ours) < at_least:
        what = f"{loss} needs {at_least} or more stages, got {len(ours)}"
        raise UserError(what, fix="name more tap points")
    if exactly is not None and len(ours) != exactly:
        raise UserError(f"{loss} has adaptors for {exactly} stages, got {len(ours)}")
    pairs = []
    for s, t in zip(ours, theirs, strict=True):
        check_maps(s, t, loss, channels=channels)
        s = in_full_precision(s)
        pairs.append((s, in_full_precision(t.detach()).to(s.dtype)))
    return pairs


def pool_to_smaller(
    a: Float[Tensor, "batch channels_a height_a width_a"],
    b: Float[Tensor, "batch channels_b height_b width_b"],
) -> tuple[
    Float[Tensor, "batch channels_a height width"], Float[Tensor, "batch channels_b height width"]
]:
    """Average the larger of two maps down to the size of the smaller, side by side."""
    size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    a, b = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))
    return a, b


def adapt(
    adaptor: nn.Module, feature: Float[Tensor, "batch channels_in height_in width_in"]
) -> Float[Tensor, "batch channels height width"]:
    """Run an adaptor in the precision of its own weights; the result has the feature's."""
    weight = next(adaptor.parameters(), feature)
    return adaptor(feature.to(weight.dtype)).to(feature.dtype)
