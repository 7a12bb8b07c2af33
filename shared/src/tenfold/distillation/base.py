"""The base class that all distillation losses share, and the registry that knows them by name."""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tenfold.distillation.taps import Signal, Taps
from tenfold.errors import UserError

Compared = TypeVar("Compared")
LossClass = TypeVar("LossClass", bound="type[DistillationLoss[Any]]")

_LOSSES: dict[str, type[DistillationLoss[Any]]] = {}


class DistillationLoss(nn.Module, ABC, Generic[Compared]):
    """A distance between what a student and what a teacher say about the same batch.

    ``Compared`` is what `forward` compares: one tensor (logits, a pooled vector, a map) or a list
    of maps, from shallow to deep. `terms` takes the same arguments for every loss: all that both
    networks say, and the batch. Adaptors that are trained with the student are ordinary submodules,
    hence found by ``parameters()``; `for_taps` sizes them.

    Two rules hold for every subclass: the teacher's side is a constant, no gradient flows into
    it; and the result is a scalar averaged over the batch, so that it does not depend on how many
    images a process holds, unless an argument asks for a published program's scale.

    Attributes:
        name: the name under which the loss is registered.
        signal: the part of both networks' `Taps` that it compares.
        default_weight: its factor beside the cross-entropy in the CIFAR comparison of CRD's
            authors, or in its own paper.
        default_ce_weight: the factor of the cross-entropy itself, there.
        default_warmup: epochs over which the weight grows to its full value, there.
        reads: entries of the batch that `forward` takes behind the two signals.
        stage: "joint", or "init" for a loss that prepares the student before the task is trained.
    """

    name: ClassVar[str]
    signal: ClassVar[Signal] = "logits"
    default_weight: ClassVar[float] = 1.0
    default_ce_weight: ClassVar[float] = 1.0
    default_warmup: ClassVar[int] = 0
    reads: ClassVar[tuple[str, ...]] = ()
    stage: ClassVar[Literal["joint", "init"]] = "joint"

    @abstractmethod
    def forward(self, student: Compared, teacher: Compared, /) -> Float[Tensor, ""]:
        """Return the loss of ``student`` against the constant ``teacher``, a scalar."""

    @classmethod
    def for_taps(cls, student: Taps, teacher: Taps, **kwargs: Any) -> DistillationLoss[Any]:
        """Build the loss for two networks, its adaptors sized by what they say about a batch.

        Args:
            student: taps of any batch.
            teacher: taps of the same batch.
            **kwargs: other arguments of the constructor.
        """
        return cls(**kwargs)

    def terms(
        self, student: Taps, teacher: Taps, batch: Mapping[str, Tensor]
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the loss for everything that two networks say, under its name.

        Args:
            student: taps of the batch.
            teacher: taps of the same batch.
            batch: "label", (batch,) classes, and "index", (batch,) positions in the training
                set, for the losses that read them.

        Raises:
            UserError: a part that the loss compares is missing, or its shapes do not fit.
        """
        both = student.signal(self.signal), teacher.signal(self.signal)
        return {self.name: self(*both, *(batch.get(key) for key in self.reads))}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Do as `forward`; or as `terms`, for `loss(student_taps, teacher_taps, batch)`."""
        of_taps = bool(arguments) and isinstance(arguments[0], Taps)
        return (self.terms if of_taps else super().__call__)(*arguments, **options)


def register(name: str) -> Callable[[LossClass], LossClass]:
    """Class decorator that makes a loss known to `create_loss` as ``name``.

    Raises:
        ValueError: if another class already has this name.
    """

    def add(cls: LossClass) -> LossClass:
        known = _LOSSES.get(name)
        if known is not None and _written_at(known) != _written_at(cls):
            raise ValueError(f"loss name {name!r} is taken by {known.__module__}.{known.__name__}")
        cls.name = name
        _LOSSES[name] = cls
        return cls

    return add


def _written_at(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def create_loss(name: str, **kwargs: Any) -> DistillationLoss[Any]:
    """Build the loss registered as ``name``; ``kwargs`` go to its constructor.

    Raises:
        UserError: if no loss has this name, or it takes other arguments.
    """
    kind = loss_class(name)
    check_arguments(kind, **kwargs)
    return kind(**kwargs)


def check_arguments(kind: type[DistillationLoss[Any]], *given: Any, **named: Any) -> None:
    """Make sure that a loss takes these arguments.

    Raises:
        UserError: it does not; tells what it takes.
    """
    takes = inspect.signature(kind)
    try:
        takes.bind(*given, **named)
    except TypeError as error:
        fix = f"it takes {', '.join(map(str, takes.parameters.values()))}"
        raise UserError(f"the loss {kind.name} has {error}", fix=fix) from error


def get_loss(name: str, **kwargs: Any) -> DistillationLoss[Any]:
    """`create_loss` under a shorter name."""
    return create_loss(name, **kwargs)


def loss_class(name: str) -> type[DistillationLoss[Any]]:
    """Return the class registered as ``name``.

    Raises:
        UserError: if no loss has this name.
    """
    if name not in _LOSSES:
        near = difflib.get_close_matches(name, _LOSSES, n=1)
        known = ", ".join(available_losses())
        fix = f"did you mean {near[0]!r}? Known: {known}" if near else f"known: {known}"
        raise UserError(f"no distillation loss is called {name!r}", fix=fix)
    return _LOSSES[name]


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
