"""What goes wrong in distillation, told in one line each (section 11)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from ickd.module.objective import LossChoice, Objective
from ickd.networks import Input, Network
from tenfold.distillation import Taps, dead_channels, loss_class
from tenfold.distillation.base import in_full_precision
from tenfold.errors import UserError

if TYPE_CHECKING:
    from ickd.module.distiller import Distiller

log = logging.getLogger(__name__)

MANY_DEAD = 0.5


def check_classes(choices: Sequence[LossChoice], student: Taps, teacher: Taps | None) -> None:
    """Refuse to compare logits of different classes; losses on features do not mind.

    Args:
        choices: the losses.
        student: taps of any batch.
        teacher: taps of the same batch; None without one.

    Raises:
        UserError: naming both numbers, or both shapes where a network changes the batch.
    """
    if teacher is None or student.logits is None or teacher.logits is None:
        return
    shapes = tuple(student.logits.shape), tuple(teacher.logits.shape)
    if shapes[0][0] != shapes[1][0]:
        what = "the student gives logits of shape {} and the teacher {} for the same batch"
        raise UserError(what.format(*shapes), fix="give one row for each image")
    ours, theirs = shapes[0][1], shapes[1][1]
    compare = [c.name for c in choices if loss_class(c.name).signal == "logits"]
    if compare and ours != theirs:
        raise UserError(
            f"{', '.join(compare)} compares logits, but the student has {ours} classes and the "
            f"teacher {theirs}",
            fix="leave it out (ickd compares features), or give both the same classes, "
            f"--model.teacher_options '{{\"num_classes\": {ours}}}'",
        )


def check_strategy(objective: Objective, strategy: Any) -> None:
    """Refuse a strategy that wants every weight to learn in every step, where some wait.

    And one that parts weights among processes before those of the teacher are read.

    Raises:
        UserError: names the strategy that can do it.
    """
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        what = "weights are read, and the teacher made faster, as whole tensors, which fsdp parts"
        raise UserError(what, fix="use --trainer.strategy ddp")
    told = isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get(
        "find_unused_parameters"
    )
    if objective.init_epochs and told:
        what = "epochs of preparation train a part of the weights, which plain ddp refuses"
        raise UserError(what, fix="use --trainer.strategy ddp_find_unused_parameters_true")


def warn_of_teacher(teacher: Network, student: Network, data: Any, *, trained: bool) -> None:
    """Tell of a teacher without weights, or that normalises unlike the data."""
    if not trained:
        published = teacher.name.startswith(("timm:", "torchvision:"))
        way = " or --model.teacher_init pretrained" if published else ""
        what = "the teacher %s has random weights; give --teacher-ckpt FILE%s"
        log.warning(what, teacher.name, way)
    theirs = teacher.expects
    if theirs[:2] == Input()[:2]:  # a module of one's own takes pixels as they are
        return
    usual = [tuple(getattr(data, name, None) or ()) for name in ("mean", "std")]
    pairs = zip(usual, (theirs.mean, theirs.std), strict=True)
    if any(ours and not _close(ours, them) for ours, them in pairs):
        log.warning(
            "the teacher %s normalises by mean %s and std %s, the data's are "
            "%s and %s; the student keeps its own, %s and %s",
            teacher.name,
            *theirs[:2],
            *usual,
            *student.expects[:2],
        )


def _close(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return len(ours) == len(theirs) and all(abs(a - b) < 1e-3 for a, b in pairs)


def warn_of_score(metric: str, teacher: float, student: float, chance: float) -> None:
    """Tell of a teacher that has nothing to teach.

    Args:
        metric: what the scores are.
        teacher: its score on the validation images, in 0..1.
        student: the student's, after its first epochs.
        chance: what guessing gives; 0 if nobody knows.
    """
    reasons = "untrained, or wrong checkpoint, normalisation or order of classes?"
    if teacher < chance + min(0.5 * chance, 0.1):
        log.warning("the teacher is at chance (%s %.3f): %s", metric, teacher, reasons)
    elif teacher <= student:
        log.warning(
            "the teacher (%s %.3f) is not better than the student (%.3f): %s",
            metric,
            teacher,
            student,
            reasons,
        )


@contextmanager
def naming_terms(teacher: Network | None, taps: Taps | None, batch: Any) -> Iterator[None]:
    """Inside, a complaint of a loss also says whether the teacher gave numbers at all."""
    try:
        yield
    except UserError:
        _check_features(teacher, taps, batch)
        raise


def check_finite(
    terms: Mapping[str, Tensor],
    student: Taps,
    teacher: Network | None,
    taps: Taps | None,
    batch: Any,
) -> None:
    """Stop at what is NaN or infinite, and say where it comes from.

    Features are looked at even if the loss is a number: a loss that masks dead channels hides them.

    Args:
        terms: of the loss.
        student: what the student says.
        teacher: None without one.
        taps: what the teacher says.
        batch: that they say it of.

    Raises:
        UserError: the teacher's layer and image, or else the terms of the loss.
    """
    own = [*terms.values(), student.logits]
    said = [] if taps is None else [*taps.maps, taps.last, taps.pooled, taps.logits]
    own, said = ([value for value in some if value is not None] for some in (own, said))
    values = [*own, *said]  # maps before their activation are read again only if something broke
    sums = torch.stack([value.detach().sum(dtype=torch.float32) for value in values])
    if torch.isfinite(sums).all():  # one wait for the device, not one for each
        return
    _check_features(teacher, taps, batch)
    if not torch.isfinite(sums[: len(own)]).all():
        numbers = ", ".join(f"{name} {float(term.detach()):.4g}" for name, term in terms.items())
        what = "the student's loss or output is NaN or infinite"
        fix = "lower the learning rate, or the weight of the term that is not finite"
        raise UserError(f"{what}: {numbers}", fix=fix)


def _named(network: Network, taps: Taps) -> dict[str, Tensor]:
    """Everything that a network says, by the name of the layer."""
    names = [*(network.tap_names or getattr(network.net, "tap_names", ()))]
    last = names[-1] if len(names) > len(taps.maps) else "last map"
    names += [f"map {n}" for n in range(len(names), len(taps.maps))]
    found = dict(zip(names, taps.maps, strict=False))
    before = zip(names, taps.preacts, strict=False)
    found |= {f"{name} before its activation": value for name, value in before}
    rest = {last: taps.last, "pooled vector": taps.pooled, "logits": taps.logits}
    return found | {name: value for name, value in rest.items() if value is not None}


def _check_features(network: Network | None, taps: Taps | None, batch: Any) -> None:
    if network is None or taps is None:
        return
    for name, value in _named(network, taps).items():
        bad = ~torch.isfinite(value).flatten(1).all(1)
        if bad.any():
            first = int(bad.nonzero()[0])
            index = first if batch.index is None else int(batch.index[first])
            raise UserError(
                f"the teacher's {name} is NaN or infinite for image {index}",
                where=network.name,
                fix="look at this image and at the network's weights",
            )


@torch.no_grad()
def warn_of_dead_channels(
    module: Distiller, student: Taps, teacher: Taps | None
) -> dict[str, Tensor]:
    """Shares of channels without a say in what ICKD compares, to be logged.

    The student's are those behind its embedding.
    """
    shares: dict[str, Tensor] = {}
    for loss, ours, theirs in module.objective.correlations(student, teacher):
        training, _ = loss.training, loss.eval()
        with torch.autocast(ours.device.type, enabled=False):  # squares overflow in half precision
            lifted = loss.embed_s(in_full_precision(ours))
            maps = {"student": lifted, "teacher": in_full_precision(theirs)}
            found = {who: dead_channels(value).float().mean() for who, value in maps.items()}
        loss.train(training)
        for who, share in found.items():
            shares[f"train/dead_{who}"] = share
            if share > MANY_DEAD and who not in module.told:
                module.told.add(who)
                log.warning("%.0f %% of the %s's channels are dead", 100 * float(share), who)
    return shares
