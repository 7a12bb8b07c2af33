"""What a network says about a batch on its way to the logits: the features that losses compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tenfold.errors import UserError

Signal = Literal["logits", "pooled", "last", "deepest", "hint", "stages", "trunk", "preact_stages"]
"""The part of `Taps` that a loss compares, see `Taps.signal`."""

HINT = 2
"""FitNets compares the feature with this index."""


@dataclass(frozen=True)
class Taps:
    """The features of one network for one batch, from shallow to deep.

    Attributes:
        maps: F_0 .. F_{-2}, each (batch, channels, height, width), after their activation.
        pooled: F_{-1}, the vector before the classifier, (batch, features).
        logits: (batch, classes), or (batch, classes, height, width) in dense prediction.
        preacts: the same maps before their last activation, empty where a network cannot tell.
        last: the map that ICKD compares, where it is not the last of `maps`.
        stem: whether the first map is the stem's, which losses on stages leave out.
    """

    maps: tuple[Tensor, ...] = ()
    pooled: Tensor | None = None
    logits: Tensor | None = None
    preacts: tuple[Tensor, ...] = ()
    last: Tensor | None = None
    stem: bool = True

    def signal(self, wanted: Signal) -> Any:
        """What a loss asks for.

        Args:
            wanted: "logits", "pooled", "last" (what ICKD compares), "deepest" (F_-2), "hint" (F_2,
                or the last of fewer), "stages" (F_1 .. F_-2: without the stem, if there is one),
                "trunk" (F_0 .. F_-2) or "preact_stages" (the stages before their activation).

        Raises:
            UserError: this network has no such part.
        """
        if wanted in ("logits", "pooled"):
            return _there(getattr(self, wanted), wanted)
        if wanted == "last" and self.last is not None:
            return self.last
        maps = self.preacts if wanted == "preact_stages" else self.maps
        _there(maps or None, "maps before their activation" if maps is self.preacts else "map")
        if wanted in ("last", "deepest"):
            return maps[-1]
        if wanted == "hint":
            return maps[min(HINT, len(maps) - 1)]
        whole = wanted == "trunk" or not self.stem or len(maps) == 1
        return list(maps if whole else maps[1:])


def _there(value: Any, name: str) -> Any:
    if value is None:
        fix = "choose another loss, or name tap points"
        raise UserError(f"the network gives no {name}, which the loss compares", fix=fix)
    return value


def check_stages(student: Sequence[Tensor], teacher: Sequence[Tensor], loss: str) -> None:
    """Refuse lists of different length instead of pairing their first stages.

    Raises:
        UserError: naming both lengths.
    """
    if len(student) != len(teacher):
        raise UserError(
            f"{loss} pairs the stages of both networks, but the student has {len(student)} and "
            f"the teacher {len(teacher)}",
            fix="name as many tap points for one as for the other",
        )


def check_maps(student: Tensor, teacher: Tensor, loss: str, *, channels: bool = False) -> None:
    """Make sure that two maps are of the same images, and not empty.

    Args:
        student: (batch, channels, height, width).
        teacher: likewise.
        loss: named in the message.
        channels: whether their channels must agree too.

    Raises:
        UserError: naming both shapes.
    """
    ours, theirs = tuple(student.shape), tuple(teacher.shape)
    both = f"student {ours}, teacher {theirs}"
    if len(ours) != 4 or len(theirs) != 4:
        raise UserError(f"{loss} compares maps (batch, channels, height, width), got {both}")
    if 0 in ours or 0 in theirs:
        raise UserError(f"{loss} met a map without entries: {both}")
    if ours[0] != theirs[0]:
        raise UserError(f"{loss} met maps of different batches: {both}")
    if channels and ours[1] != theirs[1]:
        fix = "give the student an embedding, or choose maps of the same width"
        raise UserError(f"{loss} needs as many channels on both sides: {both}", fix=fix)
