"""Learning rates of both stages: linear warm-up, cosine, cooldown."""

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tenfold.errors import UserError


def learning_rate_factor(
    t: float, total: float, warmup: float, cooldown: float, start: float, floor: float
) -> float:
    """Linear warm-up from `start` to 1, cosine to `floor`, then constant: shares of the peak.

    The cosine runs over [0, total - cooldown]; the warm-up hides its beginning, as in timm.
    """
    if t < warmup:
        return start + (1 - start) * t / warmup
    span = total - cooldown
    if t >= span:
        return floor
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t / span))


def check_schedule(epochs: int, warmup: float, cooldown: float) -> None:
    """Makes sure that a run has room for its schedule.

    Raises:
        UserError: warm-up and cooldown leave no epoch between them.
    """
    if 0 < epochs <= warmup + cooldown:
        raise UserError(
            f"{epochs} epochs have no room for {warmup:g} of warm-up and {cooldown:g} of cooldown",
            fix="raise --trainer.max_epochs, or lower --model.warmup and --model.cooldown",
        )


def cosine_schedule(
    optimizer: Optimizer, steps: int, epochs: int, options: Mapping[str, Any]
) -> LambdaLR:
    """A scheduler of `learning_rate_factor`, moved once an epoch or after every step.

    Args:
        optimizer: what it drives.
        steps: optimizer steps of the run.
        epochs: of the run; where it has none set, all steps count as one.
        options: `lr`, `warmup`, `cooldown`, `warmup_lr`, `min_lr`, and `schedule`, which is "epoch"
            or "step".

    Raises:
        UserError: the run has no room for the schedule.
    """
    check_schedule(epochs, options["warmup"], options["cooldown"])
    per_epoch = steps / epochs if epochs > 0 else 1.0
    unit = 1.0 if options["schedule"] == "epoch" else per_epoch

    def factor(t: int) -> float:
        return learning_rate_factor(
            t / unit,
            steps / per_epoch,
            options["warmup"],
            options["cooldown"],
            options["warmup_lr"] / options["lr"],
            options["min_lr"] / options["lr"],
        )

    return LambdaLR(optimizer, factor)
