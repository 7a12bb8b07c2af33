"""What a gate is worth: every route's answer on a split, and the metrics computed from them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ds_net_plus.model import (
    DynamicNet,
    DynamicOutput,
    check_finite,
    check_statistics,
    choose_routes,
    naming_images,
)
from ds_net_plus.steps import upstream_inputs
from tenfold.errors import UserError


@dataclass(frozen=True)
class RouteTable:
    """Answers of every route of the routing space on a split of N images.

    Attributes:
        gate_input: what the slimming head reads.
        scores: the gate's opinion of the K routes (logits or probabilities).
        logits: class logits of every route.
        labels: classes.
        madds: cost of the routes, ascending.
        hard: the generator's difficulty flag, where there is one.

    With several gates the routes are those that all gates agree on, `gate_input` and `scores` are
    what the gates read and think on one path (the first of several), and what they decide is a
    matter of running them (`sweep`): a decision depends on those before it.
    """

    gate_input: Float[Tensor, "images ... hidden"]
    scores: Float[Tensor, "images ... routes"]
    logits: Float[Tensor, "images routes classes"]
    labels: Int[Tensor, " images"]
    madds: tuple[int, ...]
    hard: Bool[Tensor, " images"] | None = None

    @property
    def correct(self) -> Bool[Tensor, "images routes"]:
        """Whether each route classifies each image correctly (top-1)."""
        return self.logits.argmax(2) == self.labels[:, None]

    def static_top1(self) -> list[float]:
        """Top-1 of every route run on all images."""
        return self.correct.double().mean(0).tolist()


@dataclass(frozen=True)
class Point:
    """An operating point.

    Attributes:
        tau: price of compute that leads to it.
        top1: accuracy, 0..1.
        madds: mean MAdds of an image.
        shares: share of images on every route of the space.
    """

    tau: float
    top1: float
    madds: float
    shares: tuple[float, ...]


@torch.no_grad()
def collect(
    net: DynamicNet,
    batches: Iterable,
    size: int | None = None,
    upstream: Sequence[Sequence[int]] | None = None,
) -> RouteTable:
    """Runs every route of the routing space on every batch, the front once for all.

    Args:
        net: run in eval mode, and left so.
        batches: objects with `image`, `label` and (may be None) `hard`.
        size: image side for the costs; that of the images where None.
        upstream: with several gates, the paths on which their inputs are read; `gate_input` then
            is (images, paths, hidden). Where None, the widest path alone, without that dimension.

    Raises:
        UserError: no images, logits that are not finite (names the image), or statistics that
            were never measured.
    """
    net.eval()
    check_statistics(net, net.routing_space)
    device = next(net.parameters()).device
    paths = upstream or [[net.routing_space[-1]] * net.num_gates]
    columns: dict[str, list[Tensor]] = {k: [] for k in ("input", "logits", "label", "hard")}
    seen = 0
    for batch in batches:
        image = batch.image.to(device)
        size = size or image.shape[-1]
        front = net.front(image)
        logits = torch.stack([net.rest(front.features, k) for k in net.routing_space], 1)
        with naming_images(range(seen, seen + len(image))):
            check_finite(logits)
        inputs = [upstream_inputs(net, *front, path).cpu() for path in paths]
        columns["input"].append(inputs[0] if upstream is None else torch.stack(inputs, 1))
        columns["logits"].append(logits.cpu())
        columns["label"].append(batch.label.cpu())
        if batch.hard is not None:
            columns["hard"].append(batch.hard.cpu())
        seen += len(image)
    if not seen:
        raise UserError("there are no images to evaluate on")
    gate_input = torch.cat(columns["input"])
    return RouteTable(
        gate_input,
        _scores(net, gate_input),
        torch.cat(columns["logits"]),
        torch.cat(columns["label"]),
        tuple(net.space_madds(size)),
        torch.cat(columns["hard"]) if columns["hard"] else None,
    )


def with_gate(table: RouteTable, net: DynamicNet) -> RouteTable:
    """The same answers under another gate of the same supernet."""
    return replace(table, scores=_scores(net, table.gate_input))


@torch.no_grad()
def _scores(net: DynamicNet, gate_input: Tensor) -> Tensor:
    device = next(net.parameters()).device
    one = gate_input if gate_input.ndim == 2 else gate_input[:, 0]
    return net.scores(net.all_gate_logits(one.to(device))).cpu()


def restrict(table: RouteTable, positions: Sequence[int]) -> RouteTable:
    """The same answers where the gate may choose among some positions of the space only."""
    allowed = torch.tensor([j in positions for j in range(len(table.madds))])
    return replace(table, scores=table.scores.masked_fill(~allowed, float("-inf")))


def point_at(table: RouteTable, tau: float = 0.0) -> Point:
    """Accuracy and cost of a single gate's decisions at one price of compute."""
    if table.scores.ndim != 2:
        raise ValueError("decisions of several gates depend on one another: use sweep")
    return point_of(table, choose_routes(table.scores, table.madds, tau), tau)


def point_of(table: RouteTable, choice: Int[Tensor, " images"], tau: float = 0.0) -> Point:
    """Accuracy and cost of given decisions."""
    top1 = table.correct.gather(1, choice[:, None]).double().mean()
    shares = choice.bincount(minlength=len(table.madds)).double() / len(choice)
    cost = shares @ torch.tensor(table.madds, dtype=torch.float64)
    return Point(tau, float(top1), float(cost), tuple(shares.tolist()))


@torch.no_grad()
def sweep(net: DynamicNet, batches: Iterable, taus: Sequence[float]) -> list[Point]:
    """Accuracy and cost of any number of gates at each price, by running them.

    Args:
        net: run in eval mode, and left so.
        batches: objects with `image` and `label`, gone through once.
        taus: prices of compute.

    Returns:
        A point for each; its shares are those of the routes over all gates.

    Raises:
        UserError: no images, or gate or class logits that are not finite (names the image).
    """
    net.eval()
    device = next(net.parameters()).device
    routes = torch.tensor(net.routing_space)
    correct, cost, seen = ([0.0] * len(taus) for _ in range(3))
    counts = [torch.zeros(len(routes), dtype=torch.float64) for _ in taus]
    for batch in batches:
        image, label = batch.image.to(device), batch.label.to(device)
        for t, tau in enumerate(taus):
            with naming_images(range(int(seen[t]), int(seen[t]) + len(image))):
                output: DynamicOutput = net(image, tau=tau)  # pyright: ignore[reportAssignmentType]
                check_finite(output.logits)
            correct[t] += float((output.logits.argmax(1) == label).sum())
            cost[t] += float(output.madds.double().sum())
            counts[t] += (output.routes.cpu()[..., None] == routes).double().sum((0, 1))
            seen[t] += len(image)
    if not all(seen):
        raise UserError("there are no images to evaluate on")
    return [
        Point(tau, right / n, madds / n, tuple((used / used.sum()).tolist()))
        for tau, right, madds, used, n in zip(taus, correct, cost, counts, seen, strict=True)
    ]


def cost_curve(
    net: DynamicNet,
    batches: Callable[[], Iterable],
    madds: Sequence[int],
    runs: int = 24,
    step: float = 0.03,
) -> list[Point]:
    """Operating points from the dearest that the gates reach to the cheapest, tau ascending.

    Prices spread out from 0 until nothing changes at either end, then fall into the widest gaps.

    Args:
        net: every point is a run over all images.
        batches: makes the images to run on.
        madds: cost of every route of the space at their size.
        runs: at most so many runs.
        step: gaps of this share of the widest route's cost are narrow enough.
    """
    first = sweep(net, batches(), (-0.1, 0.0, 0.1))
    points = {point.tau: point for point in first}
    step *= madds[-1]
    while len(points) < runs:
        least, most = min(points), max(points)
        if points[most].madds > madds[0] + step and most < 1e4:
            tau = 2 * most
        elif points[least].madds < madds[-1] - step and least > -1e4:
            tau = 2 * least
        else:
            pairs = list(pairwise(sorted(points)))
            gaps = [points[a].madds - points[b].madds for a, b in pairs]
            if max(gaps) <= step:
                break
            tau = sum(pairs[gaps.index(max(gaps))]) / 2
        (points[tau],) = sweep(net, batches(), [tau])
    return [points[tau] for tau in sorted(points)]


def operating_points(
    net: DynamicNet, table: RouteTable, batches: Callable[[], Iterable], taus: Sequence[float]
) -> list[Point]:
    """Points at given prices: from the table of a single gate, else by running the network.

    Args:
        net: the network.
        table: every route's answers on the images.
        batches: makes the images, where they have to be run.
        taus: prices of compute.
    """
    if net.num_gates > 1:
        return sweep(net, batches(), taus)
    return [point_at(table, tau) for tau in taus]


def price_list(
    net: DynamicNet, table: RouteTable, batches: Callable[[], Iterable], targets: Sequence[float]
) -> list[float]:
    """The price that leads to each target of mean MAdds; targets out of reach are left out.

    Args:
        net: the network.
        table: every route's answers on the images that prices are set on.
        batches: makes these images, where they have to be run.
        targets: mean MAdds of an image.
    """
    if net.num_gates == 1:
        allowed = [
            cost for j, cost in enumerate(table.madds) if table.scores[:, j].isfinite().any()
        ]
        return [
            calibrate_tau(table.scores, table.madds, target)
            for target in targets
            if allowed[0] <= target <= allowed[-1]
        ]
    curve = cost_curve(net, batches, table.madds)
    costs = [point.madds for point in curve]
    return [tau_at(curve, target) for target in targets if min(costs) <= target <= max(costs)]


def tau_at(curve: Sequence[Point], target: float) -> float:
    """The price whose mean MAdds are `target`, interpolated on a `cost_curve`.

    Raises:
        UserError: the target is not feasible.
    """
    costs = np.minimum.accumulate([point.madds for point in curve])
    if not costs[-1] <= target <= costs[0]:
        raise UserError(
            f"target {target:g} lies outside what the gates do",
            fix=f"choose a target from {costs[-1]:g} to {costs[0]:g}",
        )
    return float(np.interp(target, costs[::-1], [point.tau for point in curve][::-1]))


def calibrate_tau(
    scores: Float[Tensor, "images routes"],
    madds: Sequence[int],
    target: float,
    costs: Sequence[float] | None = None,
) -> float:
    """Smallest tau at which the mean cost of the gate's decisions is at most `target`.

    Negative where the gate alone spends less than the target. Found by bisection.

    Args:
        scores: the gate's opinion of every route, -inf for those that it may not choose.
        madds: MAdds of the routes, ascending, which the decision prices.
        target: mean cost, between that of the cheapest and of the dearest route.
        costs: what `target` is measured in, such as milliseconds; MAdds where None.

    Raises:
        UserError: the target is not feasible.
    """
    prices = torch.tensor(madds if costs is None else costs, dtype=torch.float64)
    allowed = scores.isfinite().any(0)
    least, most = float(prices[allowed].min()), float(prices[allowed].max())
    if not least <= target <= most:
        raise UserError(
            f"target {target:g} lies outside what the routes can do",
            fix=f"choose a target from {least:g} to {most:g}",
        )
    # beyond this price every decision is that of cost alone
    gap = min(high - low for low, high in pairwise(madds))
    finite = scores[:, allowed]
    high = float(finite.max() - finite.min() + 1) * madds[-1] / gap
    low = -high
    for _ in range(60):
        middle = (low + high) / 2
        mean = float(prices[choose_routes(scores, madds, middle)].mean())
        low, high = (low, middle) if mean <= target else (middle, high)
    return high


def gain_at_equal_madds(point: Point, table: RouteTable) -> float:
    """top-1 minus the static curve, linearly interpolated in MAdds, at the point's mean MAdds."""
    return point.top1 - float(np.interp(point.madds, table.madds, table.static_top1()))


def saving_at_equal_accuracy(point: Point, table: RouteTable) -> float:
    """MAdds of the static curve at the point's top-1 over the point's MAdds.

    The static curve is followed from the cheapest route to the first crossing; the widest route
    counts where the point is more accurate than all of it.
    """
    curve = table.static_top1()
    needed = float(table.madds[-1])
    if point.top1 <= curve[0]:
        needed = float(table.madds[0])
    else:
        for k in range(len(curve) - 1):
            if curve[k] < point.top1 <= curve[k + 1]:
                share = (point.top1 - curve[k]) / (curve[k + 1] - curve[k])
                needed = table.madds[k] + share * (table.madds[k + 1] - table.madds[k])
                break
    return needed / point.madds


def random_routing(table: RouteTable, shares: Sequence[float]) -> tuple[float, float]:
    """Expected (MAdds, top-1) of routes drawn at random with the given shares."""
    cost = float(np.dot(shares, table.madds))
    return cost, float(np.dot(shares, table.static_top1()))


def oracle(table: RouteTable) -> Point:
    """Every image on its cheapest correct route, the cheapest of all where none is correct."""
    correct = table.correct
    return point_of(table, torch.where(correct.any(1), correct.int().argmax(1), 0))
