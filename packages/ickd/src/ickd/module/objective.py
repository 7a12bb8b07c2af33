"""The objective: cross-entropy and any distillation losses, each with its weight (section 3.5)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ickd.cache import named_parts
from ickd.metrics import IGNORE
from ickd.module.batches import as_batch
from ickd.module.margins import teacher_margins
from ickd.networks import Network
from ickd.taps import still
from tenfold.distillation import (
    CRDLoss,
    DistillationLoss,
    FTLoss,
    ICCLoss,
    OFDLoss,
    ReviewKDLoss,
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
        warmup: epochs over which the factor grows to its full value; None for those that the loss
            usually has, and at most half of the run.
        options: arguments of its constructor.
    """

    name: str
    weight: float
    warmup: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_losses(losses: str | Mapping[str, Any] | None) -> list[LossChoice]:
    """Read "kd+ickd", {"ickd": 2.5, "kd": 1}, or {"dkd": {"weight": 1, "warmup": 20, "beta": 6}}.

    Left-out weights are the losses' defaults, 1 for kd beside others (section 4.5) and for losses
    that only prepare the student; "none" means no loss.

    Raises:
        UserError: an unknown loss, or a weight that is no number.
    """
    if not isinstance(losses, str | Mapping | None):
        what = f"losses are names or weights by name, got {losses!r:.60}"
        raise UserError(what, fix='write "kd+ickd" or {"ickd": 2.5, "kd": 1}')
    if isinstance(losses, str):
        losses = dict.fromkeys(part.strip() for part in losses.split("+"))
    choices = []
    for name, value in (losses or {}).items():
        if name == "none":
            continue
        loss_class(name)  # tells of an unknown one
        given = dict(value) if isinstance(value, Mapping) else {"weight": value}
        weight: Any = given.pop("weight", None)
        warmup: Any = given.pop("warmup", None)
        weight = usual_weight(name, alone=len(losses or {}) == 1) if weight is None else weight
        for what, number in (("weight", weight), ("warmup", warmup or 0)):
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if not (is_number and math.isfinite(number) and number >= 0):
                raise UserError(f"the {what} of {name} must be 0 or more, got {number!r}")
        if warmup is not None and warmup != int(warmup):
            raise UserError(f"the warmup of {name} is a number of epochs, got {warmup}")
        warmup = None if warmup is None else int(warmup)
        choices.append(LossChoice(name, float(weight), warmup, given))
    return choices


def usual_weight(name: str, *, alone: bool) -> float:
    """The weight of a loss where none is given, alone or beside others."""
    loss = loss_class(name)
    beside = loss.default_ce_weight < 1 and not alone  # kd's 0.9 belongs to 0.1 of cross-entropy
    return 1.0 if beside or loss.stage == "init" else loss.default_weight


def usual_ce_weight(losses: str | Mapping[str, Any] | None) -> float:
    """The factor of the cross-entropy where none is given: 1, but for a lone loss its own.

    A loss whose weight is given leaves it at 1, too; one with the labels inside (kd_mixed) makes
    it 0, beside others as well.
    """
    names = losses.split("+") if isinstance(losses, str) else list(losses or {})
    names = [name.strip() for name in names if name.strip() != "none"]
    if any(loss_class(name).default_ce_weight == 0 for name in names):
        return 0.0
    given = isinstance(losses, Mapping) and any(
        (value.get("weight") if isinstance(value, Mapping) else value) is not None
        for value in losses.values()
    )
    return 1.0 if len(names) != 1 or given else loss_class(names[0]).default_ce_weight


_ALL_AT_ONCE = ("stages", "trunk", "preact_stages")


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
        teacher_parts: what the losses read of the teacher, by the names of `TeacherCache`.
        task_epochs: how long the task is trained behind them, as far as is known.

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
        self._check_pairs()
        if choices and teacher is None:
            names = ", ".join(choice.name for choice in choices)
            raise UserError(f"{names} need a teacher", fix="name one with --teacher")
        self.losses = nn.ModuleDict()
        for choice in self.choices:
            assert teacher is not None
            for key, ours, theirs, _ in self._places(choice, student, teacher):
                self.losses[key] = _build(choice, ours, theirs)
        self.teacher_parts = () if teacher is None else self._parts_read(student, teacher)
        prepares = [c.name for c in self.choices if prepares_first(c.name)]
        if prepares and not init_epochs:
            what = f"{', '.join(prepares)} prepare the student or an adaptor before the task"
            raise UserError(what, fix="give --model.init_epochs, such as 30")
        self.init_epochs = init_epochs if prepares else 0
        self.task_epochs = math.inf

    def _check_pairs(self) -> None:
        for pair in self.pairs:
            if not (math.isfinite(pair.weight) and pair.weight >= 0):
                raise UserError(f"the weight of a pair must be 0 or more, got {pair.weight}")
        whole = [c.name for c in self.choices if loss_class(c.name).signal in _ALL_AT_ONCE]
        if whole and any(pair.weight != 1 for pair in self.pairs):
            what = f"{', '.join(whole)} compares all pairs at once, their weights do not act on it"
            raise UserError(what, fix="leave the weights of the pairs at 1")

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

    def _parts_read(self, student: Taps, teacher: Taps) -> tuple[str, ...]:
        read: list[Tensor] = []
        for choice in self.choices:
            kind = loss_class(choice.name)
            for _, _, theirs, _ in self._places(choice, student, teacher):
                signal = theirs.signal(kind.signal)
                read += signal if isinstance(signal, list) else [signal]
                if issubclass(kind, ReviewKDLoss):  # compares two signals
                    read.append(theirs.signal("pooled"))
        parts = named_parts(teacher)
        return tuple(n for n, value in parts.items() if any(value is one for one in read))

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
            grown = self._grown(choice, epoch)
            for key, ours, theirs, weight in self._places(choice, student, teacher):
                loss: Any = self.losses[key]
                for name, value in loss.terms(ours, theirs, batch).items():
                    name = name if key == choice.name else key
                    terms[name] = choice.weight * grown * weight * value
        return terms

    def _grown(self, choice: LossChoice, epoch: int) -> float:
        """The share of its weight that a loss has in an epoch of the task."""
        warmup = choice.warmup
        if warmup is None:
            warmup = min(loss_class(choice.name).default_warmup, self.task_epochs / 2)
        return min(1.0, (epoch - self.init_epochs + 1) / warmup) if warmup > 0 else 1.0

    def rehearse(self, student: Taps, teacher: Taps) -> None:
        """Computes every loss once, so that what cannot be compared is told before any training.

        Args:
            student: taps of images as large as those to come.
            teacher: of the same images.

        Raises:
            UserError: shapes that do not fit, or a loss that lacks something.
        """
        assert student.logits is not None
        label = torch.zeros_like(student.logits[:, 0], dtype=torch.int64)
        batch = {"label": label, "index": torch.arange(len(label), device=label.device)}
        places = [p for choice in self.choices for p in self._places(choice, student, teacher)]
        try:
            with still(self), torch.random.fork_rng(devices=[]):  # crd draws
                for key, ours, theirs, _ in places:
                    loss: Any = self.losses[key]
                    loss.terms(ours, theirs, batch)
        except ValueError as error:
            raise UserError(f"the networks cannot be compared: {error}") from error

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
