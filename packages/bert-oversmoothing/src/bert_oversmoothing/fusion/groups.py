"""What an optimiser is told of the parameters of a fusion."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from tenfold.errors import UserError


def fusion_parameter_groups(
    fusion: nn.Module, lr: float = 1e-3, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Groups for an optimiser: a fusion learns faster than the encoder, whose rate is 2e-5 to 5e-5.

    At the rate of the encoder alpha would barely leave 0.

    Args:
        fusion: a LayerFusion.
        lr: of all its parameters, above 0.
        weight_decay: 0 or more, of matrices; alpha, gamma, biases and the scalar weights of a mix
            have none.

    Returns:
        At most two groups, none without parameters.

    Raises:
        UserError: a number out of range.
    """
    for name, value, fine in (("fusion_lr", lr, lr > 0), ("weight_decay", weight_decay, True)):
        if not (math.isfinite(value) and value >= 0 and fine):
            raise UserError(f"{name} is out of range: {value}")
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for name, parameter in fusion.named_parameters():
        decays = name.rpartition(".")[2] == "weight"
        groups[weight_decay if decays else 0.0].append(parameter)
    return [
        {"params": members, "lr": lr, "weight_decay": decay}
        for decay, members in groups.items()
        if members
    ]
