"""What every dynamic network shares: routes, the gates' decisions and grouped execution."""

import itertools
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ds_net_plus.model.ecosystem import HubFace, TimmFace
from ds_net_plus.model.features import Features, Maps, feature_maps
from ds_net_plus.model.grouping import Decide, Enter, Stage, choose_routes, run_grouped
from ds_net_plus.model.routes import (
    LARGEST,
    DynamicOutput,
    Front,
    PlainRoute,
    Route,
    RouteLike,
    check_choice,
)
from tenfold.errors import UserError


class DynamicNet(TimmFace, HubFace):
    """A network with a fixed front and, behind one gate or several, nested routes.

    A route is an index k (the same at every gate), one index for each gate, or "largest". A family
    supplies `front`, `rest`, `masked_rest`, `gate_logits`, `gate_parameters`, `route_widths`,
    `madds`, `active_params`, `map_channels`, `materialize_front` and `materialize_rest`; with
    several gates also `enter`, `stage`, `masked_stage`, `widen`, `gate_heads` and the plain forms
    of the first two, of which the whole rest of the network is the default.

    Attributes:
        name: registered name of the configuration.
        config: the constructor's arguments.
        num_routes, num_classes, in_channels, image_size: what the configuration fixes.
        num_gates: how many decisions an image meets.
        gate_outputs: number of outputs of every slimming head.
        gate_score: what a gate output means: "logit" (paper) or "probability" (value gate).
        gate_trained: False where a checkpoint says that its gate was never trained, else None
            (unknown) or True.
        budgets: (tau, mean MAdds) pairs found by `calibrate-budget`, tau ascending.
        default_route: what `forward` runs when it is told nothing; None leaves it to the gate.
    """

    name: str
    config: dict[str, object]
    num_routes: int
    num_classes: int
    in_channels: int
    image_size: int
    gate_outputs: int
    num_gates: int = 1

    def __init__(self) -> None:
        """Starts with the gate untrained as far as is known."""
        super().__init__()
        self.gate_score = "logit"
        self.gate_trained: bool | None = None
        self.budgets: list[tuple[float, float]] = []
        self.default_route: RouteLike | None = None
        self._routing_space: tuple[int, ...] = ()
        self._costs: dict[tuple, int] = {}

    def front(self, x: Tensor, largest: bool = False, maps: Maps | None = None) -> Front:
        """Runs the part that every route shares (in mode `largest`, its widest form).

        Args:
            x: images.
            largest: the widest form.
            maps: collects the last feature map of each stride.
        """
        raise NotImplementedError

    def rest(self, features: Tensor, route: RouteLike, maps: Maps | None = None) -> Tensor:
        """Class logits of one route, from the front's features."""
        raise NotImplementedError

    def masked_rest(self, features: Tensor, gate: Tensor, space: Sequence[int]) -> Tensor:
        """Class logits from a dense run at the widest route of `space`, masked by `gate`."""
        raise NotImplementedError

    def gate_logits(self, gate_input: Tensor, gate: int = 0) -> Tensor:
        """A slimming head: (batch, gate_outputs), output j standing for routing_space[j]."""
        raise NotImplementedError

    def gate_sizes(self) -> list[int]:
        """Length of what every gate reads; needed with several gates alone."""
        raise NotImplementedError

    def all_gate_logits(
        self, gate_inputs: Float[Tensor, "batch all_hidden"]
    ) -> Float[Tensor, "batch ... outputs"]:
        """Logits of all gates, (batch, gates, outputs), or (batch, outputs) of a single one.

        Args:
            gate_inputs: what the gates read, side by side.
        """
        if self.num_gates == 1:
            return self.gate_logits(gate_inputs)
        parts = gate_inputs.split(self.gate_sizes(), 1)
        return torch.stack([self.gate_logits(part, g) for g, part in enumerate(parts)], 1)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters that Stage II trains; the weights of the output layers come last."""
        raise NotImplementedError

    def gate_heads(self) -> list[nn.Parameter]:
        """The weight of the output layer of every gate."""
        return self.gate_parameters()[-1:]

    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that are no weights."""
        return set()

    def route_widths(self, route: RouteLike) -> tuple[int, ...]:
        """Active widths of the gated stages on one route."""
        raise NotImplementedError

    def madds(self, route: RouteLike, size: int | None = None) -> int:
        """Multiply-adds of one image of `size` x `size` pixels on one route."""
        raise NotImplementedError

    def active_params(self, route: RouteLike) -> int:
        """Parameters that one route uses, the slimming head not counted."""
        raise NotImplementedError

    def map_channels(self, route: RouteLike = LARGEST) -> dict[int, int]:
        """Widths of a route's feature maps, by stride."""
        raise NotImplementedError

    def materialize_front(self, largest: bool = False, fold_bn: bool = True) -> nn.Module:
        """Plain module of the front: image -> (features, gate logits)."""
        raise NotImplementedError

    def materialize_rest(
        self, route: RouteLike, fold_bn: bool = True, share_storage: bool = False
    ) -> nn.Module:
        """Plain module of what follows the front on one route: features -> class logits.

        Args:
            route: a route.
            fold_bn: fold the batch norms into the convolutions; else they stay layers.
            share_storage: linear layers stay views of this network's weights, where they can.
        """
        raise NotImplementedError

    def enter(self, features: Tensor, gate: int, route: int) -> Tensor:
        """The layers behind a gate that read the width of the stage before; none with one gate."""
        return features

    def stage(self, features: Tensor, gate: int, route: int, maps: Maps | None = None) -> Front:
        """What follows `enter` up to and with the next gate's attention, or to the class logits."""
        return Front(self.rest(features, route, maps), features.new_empty(len(features), 0))

    def masked_stage(
        self, features: Tensor, gate: int, choice: Tensor, space: Sequence[int]
    ) -> Front:
        """`enter` and `stage` in a dense run at the widest route of `space`, masked by `choice`."""
        return Front(
            self.masked_rest(features, choice, space), features.new_empty(len(features), 0)
        )

    @property
    def maskable(self) -> bool:
        """Whether `masked_stage` can run."""
        return True

    def widen(self, features: Tensor, gate: int) -> Tensor:
        """Features in front of a gate, zero-padded to those of the widest route."""
        return features

    def materialize_enter(
        self, gate: int, before: int | None, route: int, fold_bn: bool = True
    ) -> nn.Module:
        """Plain module of `enter`, for the route `before` of the last stage."""
        return nn.Identity()

    def materialize_stage(
        self, gate: int, route: int, fold_bn: bool = True, share_storage: bool = False
    ) -> nn.Module:
        """Plain module of `stage`: features -> (features, gate logits), or -> class logits."""
        return self.materialize_rest(route, fold_bn, share_storage)

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

    def path(self, route: RouteLike) -> tuple[int, ...]:
        """The index at every gate; that of the last width in mode "largest"."""
        if isinstance(route, tuple):
            return route
        return (self.num_routes - 1 if route == LARGEST else int(route),) * self.num_gates

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
            UserError: not "largest", not an index below `num_routes` and not one such index for
                each gate; the line lists them all.
        """
        if route == LARGEST or (isinstance(route, int) and 0 <= route < self.num_routes):
            return route
        if isinstance(route, tuple | list) and len(route) == self.num_gates:
            path = tuple(route)
            if all(isinstance(k, int) and 0 <= k < self.num_routes for k in path):
                return path if self.num_gates > 1 else path[0]
        choose = f"choose {self._listing()} or 'largest'"
        if self.num_gates > 1:
            example = ",".join(str(g % self.num_routes) for g in range(self.num_gates))
            choose += f"; or an index for each of the {self.num_gates} gates, such as {example}"
        raise UserError(f"route {route!r} does not exist", fix=choose)

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
        zero = any(not bool(weight.detach().any()) for weight in self.gate_heads())
        if self.gate_trained is False or zero:
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
        noise: Float[Tensor, "batch ... outputs"] | None = None,
    ) -> Float[Tensor, "batch classes"] | DynamicOutput:
        """Runs one static route, or lets the gates choose a route for each image.

        Args:
            x: normalised images.
            route: a route index, one for each gate, or "largest"; None for `default_route`, and
                where that is None too for dynamic inference.
            tau: price of compute in the gates' decisions, see `choose_routes` (dynamic only).
            noise: added to the route logits before the decision, (batch, gates, outputs) with
                several gates; Gumbel noise here reproduces the official evaluation (dynamic only).

        Returns:
            Class logits of the static route, or a `DynamicOutput`.

        Raises:
            UserError: no such route, an untrained gate, or an image that is not finite.
        """
        route = self.default_route if route is None else route
        if route is not None:
            route = self.check_route(route)
            return self.rest(self.front(x, largest=route == LARGEST).features, route)
        if not self.gate_trained:  # a look at the weights would wait for the device
            self.check_gate()
        features, gate_input = self.front(x)
        decide = self.decider(x, tau, noise)
        return self.dispatch(features, self.gate_logits(gate_input), decide, size=x.shape[-1])

    def decider(self, x: Tensor, tau: float, noise: Tensor | None = None) -> Decide:
        """The decision of every gate, for images of the size of `x`."""

        def decide(gate_logits: Tensor, gate: int) -> Tensor:
            if noise is not None:
                gate_logits = gate_logits + (noise if noise.ndim == 2 else noise[:, gate])
            return self.decide(gate_logits, tau, x.shape[-1])

        return decide

    def space_madds(self, size: int | None = None) -> list[int]:
        """MAdds of every route of the routing space."""
        return [self._cost(route, size) for route in self.routing_space]

    def path_madds(self, size: int | None = None) -> Int[Tensor, "..."]:
        """MAdds of every path through the routing space, with one dimension for each gate."""
        paths = itertools.product(self.routing_space, repeat=self.num_gates)
        costs = [self._cost(path if self.num_gates > 1 else path[0], size) for path in paths]
        return torch.tensor(costs).view((len(self.routing_space),) * self.num_gates)

    def _cost(self, route: RouteLike, size: int | None) -> int:
        key = (route, size or self.image_size)
        if key not in self._costs:
            self._costs[key] = self.madds(route, size)
        return self._costs[key]

    def decide(
        self,
        gate_logits: Float[Tensor, "batch outputs"],
        tau: float = 0.0,
        size: int | None = None,
        routes: Sequence[int] | None = None,
    ) -> Int[Tensor, " batch"]:
        """Positions in the routing space that a gate chooses, on the host.

        The only transfer from device to host of a gate in dynamic inference. Every gate pays the
        price of the whole route, so that one tau means the same at all of them.

        Args:
            gate_logits: the slimming head's output.
            tau: price of compute, see `choose_routes`.
            size: image side that the price is for; the network's own where None.
            routes: the routes of the space that may be chosen; all where None.

        Raises:
            UserError: an image whose gate logits are not finite, named by its batch index.
        """
        return check_choice(self.choose(gate_logits, tau, size, routes).cpu())

    def choose(
        self,
        gate_logits: Float[Tensor, "batch outputs"],
        tau: float = 0.0,
        size: int | None = None,
        routes: Sequence[int] | None = None,
    ) -> Int[Tensor, " batch"]:
        """`decide` before its transfer: on the device, -1 for logits that are not finite."""
        scores = self.scores(gate_logits)
        if routes is not None and tuple(routes) != self.routing_space:
            allowed = [0.0 if route in routes else -math.inf for route in self.routing_space]
            penalty = torch.tensor(allowed, dtype=scores.dtype)
            scores = scores + penalty.to(scores.device, non_blocking=True)
        choice = choose_routes(scores, self.space_madds(size), tau)
        return torch.where(gate_logits.isfinite().all(1), choice, -1)

    def scores(self, gate_logits: Tensor) -> Tensor:
        """What the decision compares: logits, or the value gate's probabilities."""
        return gate_logits.sigmoid() if self.gate_score == "probability" else gate_logits

    def dispatch(
        self,
        features: Tensor,
        gate_logits: Tensor,
        decide: Decide,
        *,
        enter: Enter | None = None,
        stage: Stage | None = None,
        size: int | None = None,
    ) -> DynamicOutput:
        """Runs each image's route on groups of images that share weights; keeps the batch order.

        Args:
            features: the front's.
            gate_logits: the first gate's.
            decide: makes every gate's decision for the batch.
            enter: runs `enter`; this network's own where None.
            stage: runs `stage`; this network's own where None.
            size: image side that costs are stated for; the network's own where None.
        """
        logits, positions = run_grouped(
            features,
            gate_logits,
            self.routing_space,
            self.num_gates,
            decide,
            enter or (lambda x, gate, before, route: self.enter(x, gate, route)),
            stage or self.run_stage,
        )
        if not len(positions):
            logits = features.new_empty((0, self.num_classes))
        routes, costs = self._chosen(positions, size)
        there = {"device": logits.device, "non_blocking": True}  # or the device would be waited for
        return DynamicOutput(logits, routes.to(**there), costs.to(**there))

    def run_stage(
        self, x: Tensor, gate: int, route: int, index: Tensor, maps: Maps | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`stage` as `run_grouped` wants it: features, and the next gate's logits if there is one.

        Args:
            x: features behind `enter`.
            gate: number of the gate.
            route: route of the stage.
            index: images of the group, not used.
            maps: collects the last feature map of each stride.
        """
        features, gate_input = self.stage(x, gate, route, maps)
        last = gate + 1 == self.num_gates
        return features, None if last else self.gate_logits(gate_input, gate + 1)

    def _chosen(self, positions: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
        """Routes and MAdds of positions in the routing space, on the host."""
        routes = torch.tensor(self.routing_space)[positions]
        costs = [
            self._cost(path[0] if self.num_gates == 1 else tuple(path), size)
            for path in routes.tolist()
        ]
        return routes, torch.tensor(costs, dtype=torch.int64)

    def feature_channels(self, levels: Sequence[int] = (8, 16, 32)) -> list[int]:
        """Channels of the maps of `features`.

        Raises:
            UserError: a level that the network does not have.
        """
        known = self.map_channels()
        unknown = [level for level in levels if level not in known]
        if unknown or not levels:
            raise UserError(
                f"{self.name} has no feature map of stride {', '.join(map(str, unknown))}",
                fix=f"choose levels from {', '.join(map(str, sorted(known)))}",
            )
        return [known[level] for level in levels]

    def features(
        self,
        x: Float[Tensor, "batch colours height width"],
        route: RouteLike | None = None,
        levels: Sequence[int] = (8, 16, 32),
        tau: float = 0.0,
    ) -> Features:
        """Feature maps for a detector, on one route or on those that the gates choose.

        Narrow maps are zero-padded: a convolution of a padded map equals the sliced one.

        Args:
            x: normalised images.
            route: as in `forward`.
            levels: strides of the maps, such as 8, 16 and 32.
            tau: price of compute (dynamic only).

        Raises:
            UserError: a level or route that does not exist, or an untrained gate.
        """
        return feature_maps(self, x, route, levels, tau)

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
