"""What goes wrong in distillation, told in one line each (section 11)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ickd.module.objective import LossChoice
from ickd.networks import Network
from tenfold.distillation import Taps, dead_channels, loss_class
from tenfold.errors import UserError

if TYPE_CHECKING:
    from ickd.module.distiller import Distiller

log = logging.getLogger(__name__)

MANY_DEAD = 0.5


def check_classes(choices: Sequence[LossChoice], student: Taps, teacher: Taps | None) -> None:
    """Refuse to compare logits of different classes; losses on features do not mind.

    Raises:
        UserError: naming both numbers.
    """
    if teacher is None or student.logits is None or teacher.logits is None:
        return
    ours, theirs = student.logits.shape[1], teacher.logits.shape[1]
    compare = [c.name for c in choices if loss_class(c.name).signal == "logits"]
    if compare and ours != theirs:
        raise UserError(
            f"{', '.join(compare)} compares logits, but the student has {ours} classes and the "
            f"teacher {theirs}",
            fix="leave it out (ickd compares features), or give both the same classes",
        )


def warn_of_teacher(
    teacher: Network, student: Network, arguments: Mapping[str, Any], data: Any
) -> None:
    """Tell of a teacher without weights, or that normalises unlike the student."""
    untrained = arguments["teacher_ckpt"] is None and arguments["teacher_init"] == "scratch"
    if untrained and isinstance(arguments.get("teacher"), str):
        log.warning(
            "the teacher %s has random weights; give --model.teacher_ckpt FILE or "
            "--model.teacher_init pretrained",
            teacher.name,
        )
    theirs, usual = teacher.expects, getattr(data, "mean", None)
    if usual is not None and tuple(usual) != theirs.mean:
        log.warning(
            "the teacher %s normalises by mean %s and std %s, as it was trained, the data's are "
            "%s and %s; the student keeps its own, %s",
            teacher.name,
            theirs.mean,
            theirs.std,
            tuple(usual),
            tuple(getattr(data, "std", ())),
            student.expects.mean,
        )


@contextmanager
def naming_terms(teacher: Network | None, taps: Taps | None, batch: Any) -> Iterator[None]:
    """Inside, a complaint of a loss also says whether the teacher gave numbers at all."""
    try:
        yield
    except UserError:
        _check_features("teacher", teacher, taps, batch)
        raise


def check_finite_terms(
    loss: Tensor,
    terms: Mapping[str, Tensor],
    teacher: Network | None,
    taps: Taps | None,
    batch: Any,
) -> None:
    """Stop at a loss that is NaN or infinite, and say where it comes from.

    Raises:
        UserError: the teacher's layer and image, or else the terms of the loss.
    """
    if torch.isfinite(loss):
        return
    _check_features("teacher", teacher, taps, batch)
    values = ", ".join(f"{name} {float(term):.4g}" for name, term in terms.items())
    fix = "lower the learning rate or the weight of the term that is not finite"
    raise UserError(f"the student's loss is not finite: {values}", fix=fix)


def _check_features(who: str, network: Network | None, taps: Taps | None, batch: Any) -> None:
    if network is None or taps is None:
        return
    names = network.tap_names or tuple(f"map {n}" for n in range(len(taps.maps)))
    named = [*zip(names, taps.maps, strict=False), ("pooled", taps.pooled), ("logits", taps.logits)]
    for name, value in named:
        if value is None:
            continue
        bad = ~torch.isfinite(value).flatten(1).all(1)
        if bad.any():
            first = int(bad.nonzero()[0])
            index = int(batch.index[first]) if getattr(batch, "index", None) is not None else first
            raise UserError(
                f"the {who}'s {name} is NaN or infinite for image {index}",
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
        maps = {"student": loss.embed_s(ours), "teacher": theirs}
        loss.train(training)
        for who, value in maps.items():
            share = dead_channels(value).float().mean()
            shares[f"train/dead_{who}"] = share
            if share > MANY_DEAD and who not in module.told:
                module.told.add(who)
                log.warning("%.0f %% of the %s's channels are dead", 100 * float(share), who)
    return shares
