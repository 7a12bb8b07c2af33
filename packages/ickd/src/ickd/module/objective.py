"""The objective: cross-entropy and any distillation losses, each with its weight (section 3.5)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ickd.module.margins import teacher_margins
from ickd.networks import Network
from tenfold.distillation import DistillationLoss, ICCLoss, OFDLoss, Taps, loss_class
from tenfold.errors import UserError

UNLABELLED = -1
"""Label of an image that has none; dense labels have 255 where there is none."""
IGNORE = 255


class Pair(NamedTuple):
    """A tap of the student, a tap of the teacher, and the weight of what is compared there."""

    student: str
    teacher: str
    weight: float = 1.0


@dataclass(frozen=True)
class LossChoice:
    """A distillation loss as it is asked for.

    Attributes:
        name: as `tenfold.distillation.get_loss` knows it.
        weight: its factor.
        warmup: epochs over which the factor grows to its full value.
        options: arguments of its constructor.
    """

    name: str
    weight: float
    warmup: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_losses(losses: str | Mapping[str, Any] | None) -> list[LossChoice]:
    """Read "kd+ickd", {"ickd": 2.5, "kd": 1}, or {"dkd": {"weight": 1, "warmup": 20, "beta": 6}}.

    Left-out weights are the losses' defaults; "none" means no loss.

    Raises:
        UserError: an unknown loss, or a weight that is no number.
    """
    if isinstance(losses, str):
        losses = dict.fromkeys(part.strip() for part in losses.split("+"))
    choices = []
    for name, value in (losses or {}).items():
        if name == "none":
            continue
        loss = loss_class(name)
        given = dict(value) if isinstance(value, Mapping) else {"weight": value}
        weight: Any = given.pop("weight", None)
        warmup: Any = given.pop("warmup", 0)
        weight = loss.default_weight if weight is None else weight
        for what, number in (("weight", weight), ("warmup", warmup)):
            sound = isinstance(number, int | float) and math.isfinite(number) and number >= 0
            if not sound:
                raise UserError(f"the {what} of {name} must be 0 or more, got {number!r}")
        choices.append(LossChoice(name, float(weight), int(warmup), given))
    return choices


class Objective(nn.Module):
    """Weighted sum of the cross-entropy and of distillation losses, with their adaptors.

    Args:
        choices: the losses.
        student: taps of any batch, for the adaptors' sizes.
        teacher: taps of the same batch; None without a teacher.
        ce_weight: factor of the cross-entropy.
        pairs: weights of the taps, where they were named in pairs: a loss that compares one map is
            then taken at every pair, with an adaptor of its own.
        init_epochs: epochs in which losses that prepare the student or an adaptor act alone.

    Raises:
        UserError: losses without a teacher, or that these two networks cannot be compared with.
    """

    def __init__(
        self,
        choices: Sequence[LossChoice],
        student: Taps,
        teacher: Taps | None,
        ce_weight: float = 1.0,
        pairs: Sequence[Pair] = (),
        init_epochs: int = 0,
    ) -> None:
        super().__init__()
        self.choices, self.ce_weight = list(choices), ce_weight
        self.pairs, self.init_epochs = list(pairs), init_epochs
        if choices and teacher is None:
            names = ", ".join(choice.name for choice in choices)
            raise UserError(f"{names} need a teacher", fix="name one with --teacher")
        self.losses = nn.ModuleDict()
        for choice in self.choices:
            assert teacher is not None
            for key, ours, theirs, _ in self._places(choice, student, teacher):
                self.losses[key] = _build(choice, ours, theirs)
        prepares = [c.name for c in self.choices if _prepares(self.losses, c.name)]
        if prepares and not init_epochs:
            what = f"{', '.join(prepares)} prepare the student or an adaptor before the task"
            raise UserError(what, fix="give --model.init_epochs, such as 30")

    def _places(
        self, choice: LossChoice, student: Taps, teacher: Taps
    ) -> list[tuple[str, Taps, Taps, float]]:
        """Where a loss is taken: its key, what both sides say there, and the weight."""
        if not self.pairs or loss_class(choice.name).signal not in ("last", "hint"):
            return [(choice.name, student, teacher, 1.0)]
        return [
            (choice.name if not index else f"{choice.name}_{index}", at_s, at_t, pair.weight)
            for index, pair in enumerate(self.pairs)
            for at_s, at_t in [(_at(student, index), _at(teacher, index))]
        ]

    @property
    def needs_taps(self) -> bool:
        """Whether any loss compares more than logits."""
        return any(loss_class(choice.name).signal != "logits" for choice in self.choices)

    def set_labels(self, data: Any) -> None:
        """Hands the training split's labels to the losses that draw negatives by them."""
        for module in self.losses.values():
            loss: Any = module
            if hasattr(loss, "set_labels") and hasattr(data, "train_labels"):
                loss.set_labels(torch.as_tensor(data.train_labels()))

    def set_margins(self, teacher: Network, data: Any) -> None:
        """Gives OFD the margins of the teacher's channels; its weights are in place by now."""
        for loss in self.losses.values():
            if isinstance(loss, OFDLoss):
                batch = next(iter(data.train_dataloader()))
                pixels = batch.image.to(loss.margins[0].device)
                for known, margin in zip(loss.margins, teacher_margins(teacher, pixels), strict=True):
                    known.copy_(margin)

    def preparing(self, epoch: int) -> bool:
        """Whether this epoch only prepares."""
        return epoch < self.init_epochs and any(
            _prepares(self.losses, c.name) for c in self.choices
        )

    def forward(
        self, student: Taps, teacher: Taps | None, batch: Mapping[str, Tensor], epoch: int = 0
    ) -> dict[str, Tensor]:
        """All terms by name, weighted; their sum is the loss.

        Args:
            student: what the student says.
            teacher: what the teacher says; None without one.
            batch: "label" and "index".
            epoch: counted from 0.
        """
        if self.preparing(epoch):
            return self._preparation(student, teacher, batch)
        terms = {}
        if self.ce_weight:
            assert student.logits is not None
            terms["ce"] = self.ce_weight * cross_entropy(student.logits, batch["label"])
        for choice in self.choices:
            assert teacher is not None
            if loss_class(choice.name).stage == "init":
                continue
            grown = min(1.0, (epoch + 1) / choice.warmup) if choice.warmup else 1.0
            for key, ours, theirs, weight in self._places(choice, student, teacher):
                loss: Any = self.losses[key]
                for name, value in loss.terms(_flat(ours), _flat(theirs), batch).items():
                    name = name if key == choice.name else key
                    terms[name] = choice.weight * grown * weight * value
        return terms

    def correlations(
        self, student: Taps, teacher: Taps | None
    ) -> Iterator[tuple[ICCLoss, Tensor, Tensor]]:
        """Every ICC loss with the two maps that it compares, the student's not embedded yet."""
        for choice in self.choices:
            if teacher is None or not issubclass(loss_class(choice.name), ICCLoss):
                continue
            for key, ours, theirs, _ in self._places(choice, student, teacher):
                loss = self.losses[key]
                assert isinstance(loss, ICCLoss)
                yield loss, ours.signal("last"), theirs.signal("last")

    def _preparation(
        self, student: Taps, teacher: Taps | None, batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        assert teacher is not None
        terms = {}
        for choice in self.choices:
            loss: Any = dict(self.losses.items()).get(choice.name)
            if hasattr(loss, "reconstruction"):
                terms[choice.name] = loss.reconstruction(teacher.signal(loss.signal))
            elif loss_class(choice.name).stage == "init":
                terms |= {
                    k: choice.weight * v for k, v in loss.terms(student, teacher, batch).items()
                }
        return terms


def _build(choice: LossChoice, student: Taps, teacher: Taps) -> DistillationLoss[Any]:
    try:
        return loss_class(choice.name).for_taps(_flat(student), _flat(teacher), **choice.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot build the loss {choice.name}: {error}") from error


def _prepares(losses: nn.ModuleDict, name: str) -> bool:
    return loss_class(name).stage == "init" or hasattr(losses[name], "reconstruction")


def _at(taps: Taps, index: int) -> Taps:
    return replace(taps, maps=taps.maps[index : index + 1], last=None)


def _flat(taps: Taps) -> Taps:
    """Dense logits (batch, classes, height, width) as one row for each pixel."""
    logits = taps.logits
    if logits is None or logits.ndim == 2:
        return taps
    return replace(taps, logits=logits.movedim(1, -1).reshape(-1, logits.shape[1]))


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over what has a label, 0 where nothing has one.

    Args:
        logits: (batch, classes) or (batch, classes, height, width).
        label: (batch,), -1 for none; or (batch, height, width), 255 for none.
    """
    ignore = UNLABELLED if label.ndim == 1 else IGNORE
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    total = F.cross_entropy(logits, label, ignore_index=ignore, reduction="sum")
    return total / (label != ignore).sum().clamp_min(1)
