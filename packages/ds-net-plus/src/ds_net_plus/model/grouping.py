"""Which route an image takes, and running a batch in groups that share one."""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tenfold.errors import UserError

# (gate logits, gate) -> position in the routing space of every image, on the host
Decide = Callable[[Tensor, int], Tensor]
# (features, gate, route before or None, route) -> features
Enter = Callable[[Tensor, int, int | None, int], Tensor]
# (features, gate, route, images of the group) -> (features, the next gate's logits or None)
Stage = Callable[[Tensor, int, int, Tensor], tuple[Tensor, Tensor | None]]


def choose_routes(
    scores: Float[Tensor, "batch routes"], madds: Sequence[int], tau: float = 0.0
) -> Int[Tensor, " batch"]:
    """argmax_k (score_k - tau * MAdds_k / MAdds_last), the cheapest of equals.

    Args:
        scores: the gate's opinion of every route.
        madds: cost of the routes, ascending.
        tau: price of compute; 0 leaves the decision to the gate alone.

    Raises:
        UserError: a tau that is no number.
    """
    if not math.isfinite(tau):
        raise UserError(f"tau must be a finite number, got {tau}")
    kept = (tuple(madds), scores.device, scores.dtype)
    # a tensor made while a program is traced must not outlive it
    traced = torch.compiler.is_compiling() or isinstance(scores, FakeTensor)
    price = _prices.__wrapped__(*kept) if traced else _prices(*kept)
    return (scores - tau * price).argmax(1)


@cache
@torch.inference_mode(False)
def _prices(madds: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Relative costs, kept on the device: no transfer for each batch."""
    return torch.tensor([cost / madds[-1] for cost in madds]).to(device, dtype)


def run_grouped(
    features: Float[Tensor, "batch ..."],
    gate_logits: Float[Tensor, "batch routes"],
    space: Sequence[int],
    gates: int,
    decide: Decide,
    enter: Enter,
    stage: Stage,
) -> tuple[Tensor, Int[Tensor, "batch gates"]]:
    """Runs every image behind its gates' choices, on groups of images that share weights.

    The first layers of a stage depend on the route before and on the new one: `enter` runs once
    for each such pair in use. Groups of the same new route are merged: `stage` runs once for each.
    Neither sees an empty group.

    Args:
        features: the front's, for all images.
        gate_logits: the first gate's.
        space: routes that the positions of `decide` stand for.
        gates: number of gates.
        decide: makes one decision for the whole batch; the one transfer to the host of a gate.
        enter: the part of a stage that reads the width of the stage before.
        stage: the rest of a stage.

    Returns:
        The last stage's output and the positions chosen, both in the order of the batch; with no
        image the features as they are.
    """
    groups: list[tuple[int | None, Tensor, Tensor]] = [
        (None, torch.arange(len(features)), features)
    ]
    choices = []
    for gate in range(gates):
        choices.append(decide(gate_logits, gate))
        entered = _enter(groups, choices[-1], space, gate, enter)
        groups, logits = [], []
        for route, (index, merged) in entered.items():
            merged, following = stage(merged, gate, route, index)
            groups.append((route, index, merged))
            logits.append(following)
        if gate + 1 < gates and groups:
            gate_logits = scatter([(i, g) for (_, i, _), g in zip(groups, logits, strict=True)])
    positions = torch.stack(choices, 1)
    if not groups:
        return features, positions
    return scatter([(index, outputs) for _, index, outputs in groups]), positions


def _enter(
    groups: Sequence[tuple[int | None, Tensor, Tensor]],
    choice: Tensor,
    space: Sequence[int],
    gate: int,
    enter: Enter,
) -> dict[int, tuple[Tensor, Tensor]]:
    """(images, features) of every new route in use, narrowest first."""
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for before, index, features in groups:
        mine = choice[index]
        for j in mine.unique().tolist():
            member = (mine == j).nonzero()[:, 0]
            chosen = features
            if len(member) < len(index):
                chosen = features.index_select(0, member.to(features.device, non_blocking=True))
            entered = enter(chosen, gate, before, space[j])
            parts.setdefault(space[j], []).append((index[member], entered))
    return {
        route: (torch.cat([i for i, _ in pairs]), _cat([f for _, f in pairs]))
        for route, pairs in sorted(parts.items())
    }


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scatter(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows of groups in the order of the batch.

    Args:
        parts: (images on the host, rows) of every group; together every image once.
    """
    index = torch.cat([index for index, _ in parts])
    rows = _cat([rows for _, rows in parts])
    if bool((index == torch.arange(len(index))).all()):
        return rows
    return torch.empty_like(rows).index_copy_(0, index.to(rows.device, non_blocking=True), rows)
