"""What every dynamic network shares: routes, the gate's decision and grouped execution."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ds_net_plus.layers import SwitchableBN
from tenfold.errors import UserError

LARGEST = "largest"
RouteLike = int | str


@dataclass(frozen=True)
class Route:
    """One sub-network: its active widths and what an image costs on it.

    Attributes:
        index: position among the network's routes, narrowest first.
        widths: active widths of the gated stages.
        madds: multiply-adds of one image at the network's own image size.
        params: active parameters, the slimming head not counted.
    """

    index: int
    widths: tuple[int, ...]
    madds: int
    params: int


class Front(NamedTuple):
    """What the fixed front hands on: features for the routes, a vector for the slimming head."""

    features: Float[Tensor, "batch channels height width"]
    gate_input: Float[Tensor, "batch hidden"]


class DynamicOutput(NamedTuple):
    """Result of dynamic inference, in the order of the input batch."""

    logits: Float[Tensor, "batch classes"]
    routes: Int[Tensor, "batch gates"]
    madds: Int[Tensor, " batch"]


class DynamicNet(nn.Module):
    """A network with a fixed front, one gate and `num_routes` nested routes behind it.

    A family supplies `front`, `rest`, `masked_rest`, `gate_logits`, `gate_parameters`,
    `route_widths`, `madds`, `active_params`, `materialize_front` and `materialize_rest`.

    Attributes:
        name: registered name of the configuration.
        config: the constructor's arguments.
        num_routes, num_classes, in_channels, image_size: what the configuration fixes.
        gate_outputs: number of outputs of the slimming head.
        gate_score: what a gate output means: "logit" (paper) or "probability" (value gate).
        gate_trained: False where a checkpoint says that its gate was never trained, else None
            (unknown) or True.
        budgets: (tau, mean MAdds) pairs found by `calibrate-budget`, tau ascending.
    """

    name: str
    config: dict[str, object]
    num_routes: int
    num_classes: int
    in_channels: int
    image_size: int
    gate_outputs: int

    def __init__(self) -> None:
        """Starts with the gate untrained as far as is known."""
        super().__init__()
        self.gate_score = "logit"
        self.gate_trained: bool | None = None
        self.budgets: list[tuple[float, float]] = []
        self._routing_space: tuple[int, ...] = ()

    def front(self, x: Tensor, largest: bool = False) -> Front:
        """Runs the part that every route shares (in mode `largest`, its widest form)."""
        raise NotImplementedError

    def rest(self, features: Tensor, route: RouteLike) -> Tensor:
        """Class logits of one route, from the front's features."""
        raise NotImplementedError

    def masked_rest(self, features: Tensor, gate: Tensor, space: Sequence[int]) -> Tensor:
        """Class logits from a dense run at the widest route of `space`, masked by `gate`."""
        raise NotImplementedError

    def gate_logits(self, gate_input: Tensor) -> Tensor:
        """The slimming head: (batch, gate_outputs), output j standing for routing_space[j]."""
        raise NotImplementedError

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters that Stage II trains; the last one is the weight of the output layer."""
        raise NotImplementedError

    def route_widths(self, route: RouteLike) -> tuple[int, ...]:
        """Active widths of the gated stages on one route."""
        raise NotImplementedError

    def madds(self, route: RouteLike, size: int | None = None) -> int:
        """Multiply-adds of one image of `size` x `size` pixels on one route."""
        raise NotImplementedError

    def active_params(self, route: RouteLike) -> int:
        """Parameters that one route uses, the slimming head not counted."""
        raise NotImplementedError

    def materialize_front(self, largest: bool = False, fold_bn: bool = True) -> nn.Module:
        """Plain module of the front: image -> (features, gate logits)."""
        raise NotImplementedError

    def materialize_rest(self, route: RouteLike, fold_bn: bool = True) -> nn.Module:
        """Plain module of what follows the front on one route: features -> class logits."""
        raise NotImplementedError

    def materialize(self, route: RouteLike, fold_bn: bool = True) -> nn.Module:
        """The whole sub-network as a plain module: image -> class logits.

        Args:
            route: a route index or "largest".
            fold_bn: fold the batch norms into the convolutions; else they stay layers.
        """
        front = self.materialize_front(self.check_route(route) == LARGEST, fold_bn)
        return PlainRoute(front, self.materialize_rest(route, fold_bn)).eval()

    @property
    def routes(self) -> list[Route]:
        """Every route, narrowest first, costed at the network's own image size."""
        return [
            Route(k, self.route_widths(k), self.madds(k), self.active_params(k))
            for k in range(self.num_routes)
        ]

    @property
    def routing_space(self) -> tuple[int, ...]:
        """The routes among which the gate chooses, one for each output of the slimming head."""
        return self._routing_space

    @routing_space.setter
    def routing_space(self, space: Sequence[int]) -> None:
        self._routing_space = self.check_space(space)

    def check_route(self, route: RouteLike) -> RouteLike:
        """Returns a valid route.

        Raises:
            UserError: not "largest" and not an index below `num_routes`; the line lists them all.
        """
        if route == LARGEST or (isinstance(route, int) and 0 <= route < self.num_routes):
            return route
        raise UserError(
            f"route {route!r} does not exist", fix=f"choose {self._listing()} or 'largest'"
        )

    def check_space(self, space: Sequence[int]) -> tuple[int, ...]:
        """Returns a valid routing space as a tuple.

        Raises:
            UserError: out of range, not strictly ascending, fewer than two routes, or not as many
                as the slimming head has outputs.
        """
        space = tuple(int(route) for route in space)
        ascending = all(low < high for low, high in pairwise(space))
        if len(space) < 2 or not ascending or space[0] < 0 or space[-1] >= self.num_routes:
            raise UserError(
                f"routing space {list(space)} must be two or more ascending route indices",
                fix=f"choose from {self._listing()}",
            )
        if len(space) != self.gate_outputs:
            raise UserError(
                f"routing space {list(space)} has {len(space)} routes, the slimming head "
                f"{self.gate_outputs} outputs",
                fix=f"name {self.gate_outputs} routes, or build the network with gate_outputs="
                f"{len(space)}",
            )
        return space

    def _listing(self) -> str:
        return ", ".join(
            f"{r.index} (widths {'/'.join(map(str, r.widths))}, {r.madds / 1e6:.1f} M MAdds)"
            for r in self.routes
        )

    def check_gate(self) -> None:
        """Makes sure that dynamic inference would mean something.

        Raises:
            UserError: the checkpoint says that the gate is untrained, or its output layer is zero.
        """
        weight = self.gate_parameters()[-1]
        if self.gate_trained is False or not bool(weight.detach().any()):
            raise UserError(
                "the gate of this network has not been trained",
                fix="run train-gate on the checkpoint, or choose a static --route",
            )

    def forward(
        self,
        x: Float[Tensor, "batch colours height width"],
        route: RouteLike | None = None,
        *,
        tau: float = 0.0,
        noise: Float[Tensor, "batch outputs"] | None = None,
    ) -> Float[Tensor, "batch classes"] | DynamicOutput:
        """Runs one static route, or lets the gate choose a route for each image.

        Args:
            x: normalised images.
            route: a route index or "largest"; None for dynamic inference.
            tau: price of compute in the gate's decision, see `choose_routes` (dynamic only).
            noise: added to the route logits before the decision; Gumbel noise here reproduces
                the official evaluation (dynamic only).

        Returns:
            Class logits of the static route, or a `DynamicOutput`.

        Raises:
            UserError: no such route, an untrained gate, or an image that is not finite.
        """
        if route is not None:
            route = self.check_route(route)
            return self.rest(self.front(x, largest=route == LARGEST).features, route)
        if not self.gate_trained:  # a look at the weights would wait for the device
            self.check_gate()
        front = self.front(x)
        logits = self.gate_logits(front.gate_input)
        choice = self.decide(logits if noise is None else logits + noise, tau, x.shape[-1])
        return self.dispatch(front.features, choice, self.rest, self.space_madds(x.shape[-1]))

    def space_madds(self, size: int | None = None) -> list[int]:
        """MAdds of every route of the routing space."""
        return [self.madds(route, size) for route in self.routing_space]

    def decide(
        self,
        gate_logits: Float[Tensor, "batch outputs"],
        tau: float = 0.0,
        size: int | None = None,
        routes: Sequence[int] | None = None,
    ) -> Tensor:
        """Positions in the routing space that the gate chooses, on the host.

        The only transfer from device to host in dynamic inference.

        Args:
            gate_logits: the slimming head's output.
            tau: price of compute, see `choose_routes`.
            size: image side that the price is for; the network's own where None.
            routes: the routes of the space that may be chosen; all where None.

        Raises:
            UserError: an image whose gate logits are not finite, named by its batch index.
        """
        scores = self.scores(gate_logits)
        if routes is not None and tuple(routes) != self.routing_space:
            allowed = torch.tensor([route in routes for route in self.routing_space])
            scores = scores.masked_fill(~allowed.to(scores.device), float("-inf"))
        choice = choose_routes(scores, self.space_madds(size), tau)
        finite = gate_logits.isfinite().all(1)
        choice = torch.where(finite, choice, -1).cpu()
        if bool((choice < 0).any()):
            index = int((choice < 0).nonzero()[0])
            raise UserError(
                "the gate's logits are not finite",
                where=f"image {index} of the batch",
                fix="look for NaN or infinite values in that image",
            )
        return choice

    def scores(self, gate_logits: Tensor) -> Tensor:
        """What the decision compares: logits, or the value gate's probabilities."""
        return gate_logits.sigmoid() if self.gate_score == "probability" else gate_logits

    def dispatch(
        self,
        features: Tensor,
        choice: Int[Tensor, " batch"],
        run: Callable[[Tensor, int], Tensor],
        madds: Sequence[int],
    ) -> DynamicOutput:
        """Runs each image's route on groups of images that share it; keeps the batch order."""
        space = torch.tensor(self.routing_space)
        logits = run_grouped(
            features, choice, lambda group, j: run(group, self.routing_space[j]), self.num_classes
        )
        device = features.device
        costs = torch.tensor(madds, dtype=torch.int64)[choice]
        return DynamicOutput(logits, space[choice][:, None].to(device), costs.to(device))

    def gate_state(self) -> dict[str, object]:
        """The gate's metadata for a checkpoint; the state dict holds weights alone."""
        return {
            "routing_space": list(self.routing_space),
            "gate_score": self.gate_score,
            "gate_trained": self.gate_trained,
            "budgets": [list(pair) for pair in self.budgets],
        }

    def load_gate_state(self, state: dict) -> None:
        """Takes over the metadata written by `gate_state`."""
        self.routing_space = state["routing_space"]
        self.gate_score = state["gate_score"]
        self.gate_trained = state["gate_trained"]
        self.budgets = [(float(tau), float(cost)) for tau, cost in state["budgets"]]


class PlainRoute(nn.Module):
    """Front and rest of one static route."""

    def __init__(self, front: nn.Module, rest: nn.Module) -> None:
        """Takes a front that returns (features, gate logits) and the rest of the route."""
        super().__init__()
        self.front = front
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        """Class logits."""
        return self.rest(self.front(x)[0])


def choose_routes(
    scores: Float[Tensor, "batch routes"], madds: Sequence[int], tau: float = 0.0
) -> Int[Tensor, " batch"]:
    """argmax_k (score_k - tau * MAdds_k / MAdds_last), the cheapest of equals.

    Args:
        scores: the gate's opinion of every route.
        madds: cost of the routes, ascending.
        tau: price of compute; 0 leaves the decision to the gate alone.
    """
    price = torch.tensor([cost / madds[-1] for cost in madds], device=scores.device)
    return (scores - tau * price.to(scores.dtype)).argmax(1)


def run_grouped(
    features: Tensor,
    choice: Int[Tensor, " batch"],
    run: Callable[[Tensor, int], Tensor],
    outputs: int,
) -> Float[Tensor, "batch outputs"]:
    """Gathers the images of each choice, runs each group once, scatters to the batch order.

    Args:
        features: (batch, ...) on any device.
        choice: position chosen by each image, on the host.
        run: maps (group of features, position) to (group, outputs); never sees an empty group.
        outputs: width of the result, for an empty batch.
    """
    used, counts = choice.unique(return_counts=True)
    if len(used) == 0:
        return features.new_empty((0, outputs))
    if len(used) == 1:
        return run(features, int(used[0]))
    order = choice.argsort(stable=True).to(features.device)
    groups = features.index_select(0, order).split(counts.tolist())
    results = torch.cat([run(g, j) for g, j in zip(groups, used.tolist(), strict=True)])
    return torch.empty_like(results).index_copy_(0, order, results)


def check_finite(logits: Float[Tensor, "batch ..."], first: int = 0) -> None:
    """Makes sure that class logits mean something.

    Args:
        logits: of a batch.
        first: number of the batch's first image.

    Raises:
        UserError: NaN or infinite logits; names the first image that has them.
    """
    bad = (~logits.isfinite().flatten(1).all(1)).nonzero()
    if len(bad):
        raise UserError(
            "the class logits are not finite",
            where=f"image {first + int(bad[0])}",
            fix="look for NaN or infinite values in that image or in the weights",
        )


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
        for route in routes:
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


def default_space(num_routes: int, outputs: int) -> tuple[int, ...]:
    """Evenly spaced routes from the first to the last, one for each gate output."""
    return tuple(j * (num_routes - 1) // max(outputs - 1, 1) for j in range(outputs))


def half(side: int, stride: int) -> int:
    """Side of a feature map after a convolution of this stride that keeps the size otherwise."""
    return -(-side // stride)


def plain_config(value: object) -> object:
    """Tuples and ranges as lists, so that a config survives JSON and YAML unchanged."""
    return [plain_config(v) for v in value] if isinstance(value, list | tuple | range) else value
