"""Knowledge review: deeper maps of the student help to match the teacher's shallower ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, register
from tenfold.distillation.maps import Maps, stage_pairs
from tenfold.distillation.projectors import ABF
from tenfold.distillation.taps import Taps, check_maps

_MOST_CHANNELS = 512
_LEVELS = (4, 2, 1)


@register("reviewkd")
class ReviewKDLoss(DistillationLoss[Maps]):
    r"""Hierarchical distance between fused maps of the student and the teacher's maps.

    From deep to shallow, a fusion block (`ABF`) mixes the student's map with what the deeper block
    carried on; `hierarchical_context` compares what it says with the teacher's map of that level.
    The levels are the maps before their activation, F_1 .. F_-2, and the pooled vector as a map of
    one pixel.

    Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021,
    https://arxiv.org/abs/2104.09044, section 3. Its program warms the weight up over 20 epochs.

    Example:
        >>> loss = ReviewKDLoss([16, 32, 64, 64], [32, 64, 128, 128])
        >>> loss(student_levels, teacher_levels).backward()

    Args:
        channels_s: of the student's levels, from shallow to deep.
        channels_t: of the teacher's.
        channels_mid: what is carried on; those of the deepest level, at most 512, if left out.

    Raises:
        ValueError: lists of different lengths.
    """

    signal = "preact_stages"
    default_warmup = 20

    def __init__(
        self,
        channels_s: Sequence[int],
        channels_t: Sequence[int],
        channels_mid: int | None = None,
    ) -> None:
        super().__init__()
        mid = min(_MOST_CHANNELS, channels_s[-1]) if channels_mid is None else channels_mid
        widths = list(zip(channels_s, channels_t, strict=True))
        # In the order in which they run: the deepest first, which has nothing to fuse with.
        self.abfs = nn.ModuleList(
            ABF(s, mid, t, fuse=i > 0) for i, (s, t) in enumerate(reversed(widths))
        )

    @classmethod
    def for_taps(cls, student: Taps, teacher: Taps, **kwargs: Any) -> ReviewKDLoss:
        """Build the loss for two networks; see `DistillationLoss.for_taps`."""
        pairs = stage_pairs(review_levels(student), review_levels(teacher), cls.name)
        return cls([s.shape[1] for s, _ in pairs], [t.shape[1] for _, t in pairs], **kwargs)

    def terms(
        self, student: Taps, teacher: Taps, batch: Mapping[str, Tensor]
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the loss for everything that two networks say; see `DistillationLoss.terms`."""
        return {self.name: self(review_levels(student), review_levels(teacher))}

    def forward(self, student: Maps, teacher: Maps) -> Float[Tensor, ""]:
        """Compare levels with levels.

        Args:
            student: one map (batch, channels, height, width) or a list, from shallow to deep.
            teacher: as many; taken as constants.

        Raises:
            UserError: stages or shapes that do not fit.
        """
        pairs = stage_pairs(student, teacher, self.name, exactly=len(self.abfs))
        dtype = self.abfs[0].get_parameter("conv1.0.weight").dtype
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            carried, terms = None, []
            for abf, (s, t) in zip(self.abfs, reversed(pairs), strict=True):
                said, carried = abf(s.to(dtype), carried, t.shape[2:])
                said = said.to(s.dtype)
                check_maps(said, t, self.name, channels=True)
                terms.append(hierarchical_context(said, t))
            return torch.stack(terms).sum()


def review_levels(taps: Taps) -> list[Tensor]:
    """What a network is reviewed by: F_1 .. F_-2 before their activation, and the pooled vector.

    Raises:
        UserError: it has no such maps, or no pooled vector.
    """
    return [*taps.signal("preact_stages"), taps.signal("pooled")[:, :, None, None]]


def hierarchical_context(
    student: Float[Tensor, "batch channels height width"],
    teacher: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, ""]:
    """Weighted mean of squared errors at full size and averaged down to 4, 2 and 1 (HCL).

    Full size weighs 1, every smaller one half of the one before; sizes that are not below the map's
    are left out, so that maps of one pixel have the plain mean squared error.
    """
    weight = total = 1.0
    loss = F.mse_loss(student, teacher)
    for size in _LEVELS:
        if size >= student.shape[2]:
            continue
        weight /= 2
        total += weight
        small_s, small_t = (F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
        loss = loss + weight * F.mse_loss(small_s, small_t)
    return loss / total
