"""The learning rate of fine-tuning, and what numbers it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tenfold.errors import UserError

Schedule = Literal["linear", "constant"]

_RANGES = {
    # least, and whether it is allowed itself; largest
    "lr": (0.0, False, math.inf),
    "fusion_lr": (0.0, False, math.inf),
    "weight_decay": (0.0, True, math.inf),
    "warmup": (0.0, True, 1.0),
    "dropout": (0.0, True, 1.0),
    "regulariser": (0.0, True, math.inf),
    "margin": (0.0, True, 2.0),
}


def check_numbers(given: Mapping[str, Any]) -> None:
    """Make sure that the numbers of a module lie where they mean something; None passes.

    Raises:
        UserError: names the first that does not, and its range.
    """
    for name, (least, itself, largest) in _RANGES.items():
        value = given.get(name)
        if value is None:
            continue
        fits = (value >= least if itself else value > least) and value <= largest
        if not (fits and math.isfinite(value)):
            wanted = f"{least:g} or more" if itself else f"above {least:g}"
            wanted += "" if largest == math.inf else f" and at most {largest:g}"
            raise UserError(f"{name} must be {wanted}, got {value}", where=f"--model.{name}")
    if (schedule := given.get("schedule")) not in (None, *get_args(Schedule)):
        known = " or ".join(get_args(Schedule))
        raise UserError(f"schedule must be {known}, got {schedule!r}", where="--model.schedule")


def linear_schedule(
    optimizer: Optimizer, *, steps: int, warmup: float, schedule: Schedule = "linear"
) -> LambdaLR:
    """From 0 up to the optimiser's rates, and down to 0 at the end of the run.

    Args:
        optimizer: its groups hold the highest rates.
        steps: of the whole run, 1 or more.
        warmup: share of them in which the rate grows, 0 to 1; rounded up to whole steps.
        schedule: "constant" stays at the top.

    Returns:
        With the factor s / w at step s < w, then (steps - s) / (steps - w).
    """
    growing = math.ceil(warmup * steps)

    def factor(step: int) -> float:
        if step < growing:
            return step / growing
        if schedule == "constant":
            return 1.0
        return max(0, steps - step) / max(1, steps - growing)

    return LambdaLR(optimizer, factor)
