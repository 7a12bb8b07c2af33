"""The objective: cross-entropy and any distillation losses, each with its weight (section 3.5)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ickd.metrics import IGNORE
from ickd.module.batches import as_batch
from ickd.module.margins import teacher_margins
from ickd.networks import Network
from tenfold.distillation import (
    CRDLoss,
    DistillationLoss,
    FTLoss,
    ICCLoss,
    OFDLoss,
    Taps,
    loss_class,
)
from tenfold.distillation.base import in_full_precision
from tenfold.distillation.rows import UNLABELLED
from tenfold.errors import UserError


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

    Left-out weights are the losses' defaults, 1 for kd beside others (section 4.5) and for losses
    that only prepare the student; "none" means no loss.

    Raises:
        UserError: an unknown loss, or a weight that is no number.
    """
    if isinstance(losses, str):
        losses = dict.fromkeys(part.strip() for part in losses.split("+"))
    choices = []
    for name, value in (losses or {}).items():
        if name == "none":
            continue
        loss_class(name)  # tells of an unknown one
        given = dict(value) if isinstance(value, Mapping) else {"weight": value}
        weight: Any = given.pop("weight", None)
        warmup: Any = given.pop("warmup", 0)
        weight = usual_weight(name, alone=len(losses or {}) == 1) if weight is None else weight
        for what, number in (("weight", weight), ("warmup", warmup)):
            sound = isinstance(number, int | float) and math.isfinite(number) and number >= 0
            if not sound:
                raise UserError(f"the {what} of {name} must be 0 or more, got {number!r}")
        choices.append(LossChoice(name, float(weight), int(warmup), given))
    return choices


def usual_weight(name: str, *, alone: bool) -> float:
    """The weight of a loss where none is given, alone or beside others."""
    loss = loss_class(name)
    beside = loss.default_ce_weight < 1 and not alone  # kd's 0.9 belongs to 0.1 of cross-entropy
    return 1.0 if beside or loss.stage == "init" else loss.default_weight


def usual_ce_weight(losses: str | Mapping[str, Any] | None) -> float:
    """The factor of the cross-entropy where none is given: 1, but for a lone loss its own.

    A loss whose weight is given leaves it at 1, too.
    """
    names = losses.split("+") if isinstance(losses, str) else list(losses or {})
    given = isinstance(losses, Mapping) and any(
        (value.get("weight") if isinstance(value, Mapping) else value) is not None
        for value in losses.values()
    )
    if len(names) != 1 or given or names[0].strip() == "none":
        return 1.0
    return loss_class(names[0].strip()).default_ce_weight


class Objective(nn.Module):
    """Weighted sum of the cross-entropy and of distillation losses, with their adaptors.

    Args:
        choices: the losses.
        student: taps of any batch, for the adaptors' sizes.
        teacher: taps of the same batch; None without a teacher.
        ce_weight: factor of the cross-entropy.
        pairs: weights of the taps, where they were named in pairs: a loss that compares one map is
            then taken at every pair, with an adaptor of its own.
        init_epochs: epochs in which losses that prepare the student or an adaptor act alone;
            without effect where no loss does.

    Attributes:
        init_epochs: as it takes effect.

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
        if not (math.isfinite(ce_weight) and ce_weight >= 0):
            raise UserError(f"ce_weight must be 0 or more, got {ce_weight}")
        if init_epochs < 0:
            raise UserError(f"init_epochs must be 0 or more, got {init_epochs}")
        self.choices, self.ce_weight = list(choices), ce_weight
        self.pairs = list(pairs)
        if choices and teacher is None:
            names = ", ".join(choice.name for choice in choices)
            raise UserError(f"{names} need a teacher", fix="name one with --teacher")
        self.losses = nn.ModuleDict()
        for choice in self.choices:
            assert teacher is not None
            for key, ours, theirs, _ in self._places(choice, student, teacher):
                self.losses[key] = _build(choice, ours, theirs)
        prepares = [c.name for c in self.choices if prepares_first(c.name)]
        if prepares and not init_epochs:
            what = f"{', '.join(prepares)} prepare the student or an adaptor before the task"
            raise UserError(what, fix="give --model.init_epochs, such as 30")
        self.init_epochs = init_epochs if prepares else 0

    def _places(
        self, choice: LossChoice, student: Taps, teacher: Taps
    ) -> list[tuple[str, Taps, Taps, float]]:
        """Where a loss is taken: its key, what both sides say there, and the weight."""
        if not self.pairs or loss_class(choice.name).signal not in ("last", "deepest", "hint"):
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
        """Gives OFD the margins of the teacher's channels; its weights are in place by now.

        Without a data module they are measured, where no batch norm tells them, on empty images.
        """
        for loss in self.losses.values():
            if isinstance(loss, OFDLoss):
                pixels = teacher.example(2)
                if data is not None:
                    batch = as_batch(next(iter(data.train_dataloader())))
                    pixels = batch.image.to(pixels.device)
                found = teacher_margins(teacher, pixels)
                for known, margin in zip(loss.margins, found, strict=True):
                    known.copy_(margin)

    def preparing(self, epoch: int) -> bool:
        """Whether this epoch only prepares."""
        return epoch < self.init_epochs

    def reads_student(self, epoch: int) -> bool:
        """Whether the student has a part in this epoch; a paraphraser learns without it."""
        inits = (loss_class(choice.name).stage == "init" for choice in self.choices)
        return not self.preparing(epoch) or any(inits)

    @property
    def reads_logits(self) -> bool:
        """Whether the student's classifier has a part in the loss."""
        compared = (loss_class(choice.name).signal == "logits" for choice in self.choices)
        return self.ce_weight > 0 or any(compared)

    @property
    def acts(self) -> bool:
        """Whether the student has anything to learn from after the preparation."""
        joint = (loss_class(choice.name).stage == "joint" for choice in self.choices)
        return self.ce_weight > 0 or any(joint)

    def freeze(self, epoch: int) -> None:
        """Lets what is only prepared learn while it is, and no more afterwards."""
        preparing = self.preparing(epoch)
        for loss in self.losses.values():
            if isinstance(loss, FTLoss):
                loss.paraphraser.requires_grad_(preparing)
            elif isinstance(loss, DistillationLoss) and loss.stage == "init":
                loss.requires_grad_(preparing)

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
        label = _whole_labels(batch["label"])
        batch = {**batch, "label": label}
        if self.preparing(epoch):
            return self._preparation(student, teacher, batch)
        terms = {}
        if self.ce_weight:
            assert student.logits is not None
            terms["ce"] = self.ce_weight * cross_entropy(student.logits, label)
        for choice in self.choices:
            assert teacher is not None
            if loss_class(choice.name).stage == "init":
                continue
            grown = min(1.0, (epoch + 1) / choice.warmup) if choice.warmup else 1.0
            for key, ours, theirs, weight in self._places(choice, student, teacher):
                loss: Any = self.losses[key]
                for name, value in loss.terms(ours, theirs, batch).items():
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
            for key, ours, theirs, weight in self._places(choice, student, teacher):
                loss = self.losses[key]
                assert isinstance(loss, DistillationLoss)
                if isinstance(loss, FTLoss):
                    terms[key] = loss.reconstruction(theirs.signal(loss.signal))
                elif loss.stage == "init":
                    found = loss.terms(ours, theirs, batch)
                    terms |= {k: choice.weight * weight * v for k, v in found.items()}
        return terms


def _build(choice: LossChoice, student: Taps, teacher: Taps) -> DistillationLoss[Any]:
    kind = loss_class(choice.name)
    # YAML and JSON have no tuples
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in choice.options.items()}
    if issubclass(kind, CRDLoss) and options.get("n_data") is None:
        what = f"{choice.name} remembers a vector of every training image, and needs their number"
        raise UserError(what, fix=f'give it, such as {{"{choice.name}": {{"n_data": 50000}}}}')
    try:
        if issubclass(kind, CRDLoss):  # its labels come with the data, see `set_labels`
            sizes = (taps.signal(kind.signal).shape[1] for taps in (student, teacher))
            return kind(*sizes, **options)
        return kind.for_taps(student, teacher, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot build the loss {choice.name}: {error}") from error


def prepares_first(name: str) -> bool:
    """Whether a loss has epochs of its own, in front of the others'."""
    kind = loss_class(name)
    return kind.stage == "init" or issubclass(kind, FTLoss)


def _at(taps: Taps, index: int) -> Taps:
    return replace(taps, maps=taps.maps[index : index + 1], last=None)


def _whole_labels(label: Tensor) -> Tensor:
    """Labels in which nothing but -1 stands for none."""
    return label.masked_fill(label == IGNORE, UNLABELLED) if label.ndim > 1 else label


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over what has a label, 0 where nothing has one.

    Args:
        logits: (batch, classes) or (batch, classes, height, width).
        label: (batch,), or (batch, height, width); -1 for none.
    """
    logits = in_full_precision(logits)
    total = F.cross_entropy(logits, label, ignore_index=UNLABELLED, reduction="sum")
    return total / (label != UNLABELLED).sum().clamp_min(1)
