"""Optimisers and learning rates of the recipes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from tenfold.errors import UserError

OptimizerName = Literal["sgd", "adamw"]
ScheduleName = Literal["constant", "multistep", "cosine", "poly", "onecycle"]

FAST = 10.0
"""Learning rate of a segmentation head and of adaptors beside it, in those of the backbone."""


def parameter_groups(
    parts: Iterable[tuple[nn.Module, float]], lr: float, weight_decay: float, *, decay_all: bool
) -> list[dict[str, Any]]:
    """Groups of parameters by learning rate and weight decay.

    Args:
        parts: modules, and the factor of their learning rate.
        lr: of factor 1.
        weight_decay: of weights; norms and biases have none unless `decay_all`.
        decay_all: decay everything, as the papers do.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module, factor in parts:
        for parameter in module.parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                decay = weight_decay if decay_all or parameter.ndim > 1 else 0.0
                groups.setdefault((factor, decay), []).append(parameter)
    return [
        {"params": members, "lr": lr * factor, "weight_decay": decay}
        for (factor, decay), members in groups.items()
    ]


def make_optimizer(
    groups: list[dict[str, Any]], name: str, lr: float, momentum: float, nesterov: bool
) -> Optimizer:
    """SGD or AdamW over parameter groups.

    Raises:
        UserError: another name, numbers out of range, or nothing to train.
    """
    if not (math.isfinite(lr) and lr > 0):
        raise UserError(f"lr must be above 0, got {lr}")
    if not 0 <= momentum < 1:
        raise UserError(f"momentum must be from 0 to below 1, got {momentum}")
    for group in groups:
        if not (math.isfinite(group["weight_decay"]) and group["weight_decay"] >= 0):
            raise UserError(f"weight_decay must be 0 or more, got {group['weight_decay']}")
    if not groups:
        raise UserError("all weights of the student are frozen", fix="let some require gradients")
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=momentum, nesterov=nesterov and momentum > 0)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr)
    raise UserError(f"optimizer must be one of {', '.join(get_args(OptimizerName))}, got {name!r}")


def make_schedule(
    optimizer: Optimizer,
    name: str,
    *,
    steps: int,
    per_epoch: int,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    warmup: float = 0.0,
    init_epochs: int = 0,
    init_factor: float = 1.0,
) -> LRScheduler:
    """The learning rate after every step.

    Args:
        optimizer: its groups hold the highest learning rates.
        name: "constant"; "multistep", times `gamma` after each milestone; "cosine" to 0; "poly",
            (1 - progress)^0.9; "onecycle", of torch. Progress runs from 0 to 1 over the steps
            behind preparation and warm-up.
        steps: of the whole run.
        per_epoch: steps of an epoch.
        milestones: epochs, counted from 1 without the preparation, after which the rate falls.
        gamma: see `name`.
        warmup: share of the steps in which the rate grows; of "onecycle" 0.3 if it is 0.
        init_epochs: epochs of preparation in front, whose rate is constant.
        init_factor: that rate, in those of the optimizer.

    Raises:
        UserError: another name, or a warm-up that leaves nothing.
    """
    if name not in get_args(ScheduleName):
        known = ", ".join(get_args(ScheduleName))
        raise UserError(f"schedule must be one of {known}, got {name!r}")
    if not 0 <= warmup < 1:
        raise UserError(f"warmup must be a share of the steps from 0 to below 1, got {warmup}")
    start = init_epochs * per_epoch
    if name == "onecycle":
        return _LateOneCycle(optimizer, start, init_factor, steps - start, warmup or 0.3)
    growing = warmup * (steps - start)

    def factor(step: int) -> float:
        step -= start
        if step < 0:
            return init_factor
        if step < growing:
            return min(1.0, (step + 1) / growing)
        if name == "multistep":
            epoch = step // max(per_epoch, 1)
            return gamma ** sum(epoch >= milestone for milestone in milestones)
        left = 1 - min(1.0, (step - growing) / max(steps - start - growing, 1))
        if name == "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        return left**0.9 if name == "poly" else 1.0

    return LambdaLR(optimizer, factor)


class _LateOneCycle(OneCycleLR):
    """Torch's cycle of rates and momenta, with steps of a constant rate in front of it.

    Args:
        optimizer: its groups hold the highest learning rates.
        wait: steps in front.
        factor: their rate, in the highest ones.
        steps: of the cycle.
        warmup: share of these in which the rate grows.
    """

    def __init__(
        self, optimizer: Optimizer, wait: int, factor: float, steps: int, warmup: float
    ) -> None:
        top = [group["lr"] for group in optimizer.param_groups]
        self.wait, self.constant = wait, [rate * factor for rate in top]
        super().__init__(optimizer, top, total_steps=max(steps, 2), pct_start=warmup)

    def get_lr(self) -> Any:
        """The rates of the present step."""
        if self.last_epoch < self.wait:
            return self.constant
        self.last_epoch -= self.wait
        try:
            return super().get_lr()
        finally:
            self.last_epoch += self.wait
