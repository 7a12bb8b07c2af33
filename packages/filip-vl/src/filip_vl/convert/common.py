"""What reading a published checkpoint gives, and how it fits a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tenfold.errors import UserError

HEADS = frozenset(
    ("visual.proj", "visual.proj_bias", "text_projection", "text_projection_bias", "logit_scale")
)
"""Keys that may start anew; all others belong to the towers."""

_TOWERS = ("visual.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.")
_SHOWN = 3


@dataclass(frozen=True)
class Converted:
    """A published checkpoint under this package's names.

    Attributes:
        source: the program that wrote it.
        fields: of the configuration, as far as the file tells them.
        state: the weights, in the precision of the file.
        ignored: keys of the file, under its own names, that are not in `state`.
        notes: what the person should know, a line each.
    """

    source: str
    fields: dict[str, Any]
    state: dict[str, Tensor]
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What became of the keys of a published checkpoint.

    Attributes:
        source: the program that wrote it.
        matched: keys of the model that come from the file.
        reinitialised: keys of the model that start from random values.
        ignored: keys of the file that the model has no place for.
        notes: what the person should know, a line each.
    """

    source: str
    matched: tuple[str, ...] = ()
    reinitialised: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def summary(self) -> str:
        """Some lines: the counts, what starts anew or is left out, the notes."""
        lines = [f"{self.source}: {len(self.matched)} keys matched"]
        if self.reinitialised:
            lines.append(f"re-initialised: {', '.join(self.reinitialised)}")
        if self.ignored:
            lines.append(f"ignored: {', '.join(self.ignored)}")
        return "\n".join([*lines, *self.notes])


def fit_state(
    converted: Converted, wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], ConversionReport]:
    """The weights for a model, in float32, and what became of all keys.

    Args:
        converted: a published checkpoint.
        wanted: the model's state dict; only its keys and shapes are looked at.

    Returns:
        The part of the model's state dict that the file gives, and the report; what the file does
        not give are projections and the temperature.

    Raises:
        UserError: a key of a tower is missing, has another shape or no place in the model, or holds
            numbers that are not finite.
    """
    state = converted.state
    towers = [key for key in wanted if key not in HEADS]
    _refuse("the checkpoint lacks {} of the towers", (key for key in towers if key not in state))
    _refuse(
        "{} of the towers have other shapes than the configuration says",
        (key for key in towers if state[key].shape != wanted[key].shape),
    )
    extra = [key for key in state if key not in wanted]
    _refuse(
        "the checkpoint has {} that are no part of CLIP's towers",
        (key for key in extra if key.startswith(_TOWERS) and key not in HEADS),
    )
    matched = [key for key in wanted if key in state and state[key].shape == wanted[key].shape]
    _refuse("{} hold numbers that are not finite", (k for k in matched if not _finite(state[k])))
    report = ConversionReport(
        source=converted.source,
        matched=tuple(matched),
        reinitialised=tuple(key for key in wanted if key not in matched),
        ignored=(*converted.ignored, *extra),
        notes=converted.notes,
    )
    return {key: state[key].float() for key in matched}, report


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _refuse(what: str, keys: Iterable[str]) -> None:
    """Raises UserError with the first of the keys, if there are any."""
    found = list(keys)
    if found:
        more = ", ..." if len(found) > _SHOWN else ""
        named = f"{len(found)} keys ({', '.join(found[:_SHOWN])}{more})"
        raise UserError(what.format(named))
