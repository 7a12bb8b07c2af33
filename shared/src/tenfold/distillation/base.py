"""The base class that all distillation losses share, and the registry that knows them by name."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tenfold.errors import UserError

Signal = TypeVar("Signal")
LossClass = TypeVar("LossClass", bound="type[DistillationLoss[Any]]")

_LOSSES: dict[str, type[DistillationLoss[Any]]] = {}


class DistillationLoss(nn.Module, ABC, Generic[Signal]):
    """A distance between what a student and what a teacher say about the same batch.

    ``Signal`` is what the loss compares: one tensor (``DistillationLoss[Tensor]``: logits) or
    features under the names of their taps (``DistillationLoss[Mapping[str, Tensor]]``). Adaptors
    that are trained with the student are ordinary submodules, hence found by ``parameters()``.

    Two rules hold for every subclass: the teacher's side is a constant, no gradient flows into
    it; and the result is a scalar averaged over the batch, so that it does not depend on how many
    images a process holds.

    Attributes:
        name: the name under which the loss is registered.
    """

    name: ClassVar[str]

    @abstractmethod
    def forward(self, student: Signal, teacher: Signal, /) -> Float[Tensor, ""]:
        """Return the loss of ``student`` against the constant ``teacher``, a scalar."""


def register(name: str) -> Callable[[LossClass], LossClass]:
    """Class decorator that makes a loss known to `create_loss` as ``name``.

    Raises:
        ValueError: if another class already has this name.
    """

    def add(cls: LossClass) -> LossClass:
        known = _LOSSES.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"loss name {name!r} is taken by {known.__module__}.{known.__name__}")
        cls.name = name
        _LOSSES[name] = cls
        return cls

    return add


def create_loss(name: str, **kwargs: Any) -> DistillationLoss[Any]:
    """Build the loss registered as ``name``; ``kwargs`` go to its constructor.

    Raises:
        UserError: if no loss has this name.
    """
    if name not in _LOSSES:
        near = difflib.get_close_matches(name, _LOSSES, n=1)
        known = ", ".join(available_losses())
        fix = f"did you mean {near[0]!r}? Known: {known}" if near else f"known: {known}"
        raise UserError(f"no distillation loss is called {name!r}", fix=fix)
    return _LOSSES[name](**kwargs)


def available_losses() -> tuple[str, ...]:
    """Names that `create_loss` knows, in alphabetical order."""
    return tuple(sorted(_LOSSES))


def in_full_precision(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Raise half-precision values to float32; leave float32 and float64 as they are.

    Sums of exponentials over many classes lose their small terms in float16 and bfloat16.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse a student and a teacher of different shapes instead of broadcasting them.

    Raises:
        ValueError: naming both shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}: "
            "both must have the same batch and the same classes"
        )
