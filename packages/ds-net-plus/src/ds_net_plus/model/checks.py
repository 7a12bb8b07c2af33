"""What is made sure of before a network's answers are believed, and its budget table."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ds_net_plus.layers import SwitchableBN
from ds_net_plus.model.base import DynamicNet
from ds_net_plus.model.routes import NotFiniteError, RouteLike
from tenfold.errors import UserError


def check_finite(logits: Float[Tensor, "batch ..."]) -> None:
    """Makes sure that class logits of a batch mean something.

    Raises:
        NotFiniteError: NaN or infinite logits; names the first image that has them.
    """
    bad = (~logits.isfinite().flatten(1).all(1)).nonzero()
    if len(bad):
        raise NotFiniteError("the class logits are not finite", int(bad[0]))


def check_statistics(net: DynamicNet, routes: Sequence[RouteLike]) -> None:
    """Makes sure that the batch-norm statistics of `routes` were measured.

    Raises:
        UserError: a set that these routes use still has mean 0 and variance 1 exactly.
    """
    used: set[tuple[SwitchableBN, int]] = set()
    hooks = [
        bn.register_forward_pre_hook(lambda layer, args: used.add((layer, args[0].shape[1])))  # pyright: ignore[reportArgumentType]
        for bn in net.modules()
        if isinstance(bn, SwitchableBN)
    ]
    training = net.training
    parameter = next(net.parameters())
    try:
        for route in routes if hooks else ():
            used.clear()
            blank = parameter.new_zeros(1, net.in_channels, 32, 32)
            with torch.no_grad():
                net.eval()(blank, route=route)
            for layer, width in used:
                bn = layer.statistics(width)
                if not bool(bn.running_mean.any()) and bool((bn.running_var == 1).all()):  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
                    raise UserError(
                        f"batch-norm statistics of route {route} (width {width}) were never "
                        "measured",
                        fix="run recalibrate on the checkpoint",
                    )
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()


def tau_for_budget(net: DynamicNet, budget: float) -> float:
    """The tau whose calibrated cost is `budget`, interpolated in the table of `calibrate-budget`.

    A budget above the dearest entry is that entry's tau: more is not wanted by the gate.

    Args:
        net: a network with `budgets`.
        budget: target share of the widest routed MAdds, 0..1.

    Raises:
        UserError: there is no table, or the budget lies outside it.
    """
    if not net.budgets:
        raise UserError(
            "this checkpoint has no budget table", fix="run calibrate-budget on it, or give --tau"
        )
    taus, costs = zip(*sorted(net.budgets, key=lambda pair: pair[1]), strict=True)
    target = budget * net.madds(net.routing_space[-1])
    if not costs[0] <= target or budget > 1:
        low = costs[0] / net.madds(net.routing_space[-1])
        raise UserError(f"budget {budget} is not feasible", fix=f"choose {low:.3f} to 1")
    return float(np.interp(target, costs, taus))


def count_madds(model: DynamicNet, route: RouteLike, size: int | None = None) -> int:
    """Multiply-adds of one image on one route: convolutions, gates' attention, pools, classifier.

    Args:
        model: the network.
        route: route index or "largest".
        size: image side in pixels; the network's own where None.

    Raises:
        UserError: no such route.
    """
    return model.madds(model.check_route(route), size)
