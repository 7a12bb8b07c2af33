"""Wall-clock beside MAdds: every route, and dynamic execution against its rivals, in one run."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_net_plus.layers import SwitchableBN
from ds_net_plus.model import DynamicNet, RouteLike
from ds_net_plus.model.grouping import Decide
from ds_net_plus.runner import DynamicRunner, fast_route
from tenfold.device import Timing, time_interleaved
from tenfold.errors import UserError


@dataclass(frozen=True)
class RouteProfile:
    """Cost of one route, in theory and on the clock.

    Attributes:
        route: index or "largest".
        widths: active widths of the gated stages.
        params: active parameters.
        madds: multiply-adds of one image.
        ms: median milliseconds per image by batch size.
        p90: 90th percentile of the same.
        theoretical: MAdds of the widest route over this one's.
        realised: time of the widest route over this one's, by batch size.
    """

    route: RouteLike
    widths: tuple[int, ...]
    params: int
    madds: int
    ms: dict[int, float]
    p90: dict[int, float]
    theoretical: float
    realised: dict[int, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def profile_routes(
    net: DynamicNet,
    *,
    routes: Sequence[RouteLike] | None = None,
    image_size: int | None = None,
    batches: Sequence[int] = (),
    repeats: int = 30,
    warmup: int = 10,
) -> list[RouteProfile]:
    """Costs of `routes`; times only for the given batch sizes, all in one interleaved run each.

    Args:
        net: in eval mode, on the device to measure.
        routes: the routing space where None; the widest of it is the yardstick.
        image_size: side in pixels, the network's own where None.
        batches: batch sizes to time.
        repeats: timed rounds.
        warmup: rounds before them.
    """
    routes = list(net.routing_space if routes is None else map(net.check_route, routes))
    size = image_size or net.image_size
    costs = {route: net.madds(route, size) for route in routes}
    widest = max(routes, key=lambda route: costs[route])
    ms: dict[RouteLike, dict[int, float]] = {route: {} for route in routes}
    p90: dict[RouteLike, dict[int, float]] = {route: {} for route in routes}
    for batch in batches:
        x = example_images(net, batch, size)
        plain = {route: fast_route(net, route) for route in routes}
        timings = time_networks({str(r): plain[r] for r in routes}, x, repeats, warmup)
        for route in routes:
            timing = timings[str(route)].per_item(batch)
            ms[route][batch], p90[route][batch] = timing.median_ms, timing.p90_ms
    return [
        RouteProfile(
            route,
            net.route_widths(route),
            net.active_params(route),
            costs[route],
            ms[route],
            p90[route],
            costs[widest] / costs[route],
            {batch: ms[widest][batch] / ms[route][batch] for batch in batches},
        )
        for route in routes
    ]


def example_images(net: DynamicNet, batch: int, size: int) -> Tensor:
    """Standard normal images in the network's precision and place, always the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((batch, net.in_channels, size, size), generator=generator)
    return x.to(next(net.parameters())).contiguous(memory_format=torch.channels_last)


def time_networks(
    networks: dict[str, Callable[[Tensor], object]], x: Tensor, repeats: int = 30, warmup: int = 10
) -> dict[str, Timing]:
    """Interleaved timings of several functions of the same images, without gradients."""
    with torch.inference_mode():
        return time_interleaved(
            {name: (lambda run=run: run(x)) for name, run in networks.items()},
            device=x.device,
            warmup=warmup,
            repeats=repeats,
        )


def mix_to_choice(mix: Sequence[float], batch: int) -> Tensor:
    """Positions in the routing space for a batch in the given shares, spread over the batch.

    Rounding gives every share its nearest count such that all images are used.

    Raises:
        UserError: shares that are negative or do not sum to 1.
    """
    if not (min(mix) >= 0 and abs(sum(mix) - 1) <= 1e-3):
        raise UserError(f"a mix of routes needs shares that sum to 1, got {list(mix)}")
    bounds = (torch.tensor(mix, dtype=torch.float64).cumsum(0) * batch).round().long()
    counts = bounds.diff(prepend=torch.zeros(1, dtype=torch.int64))
    choice = torch.arange(len(mix)).repeat_interleave(counts)
    return choice[torch.randperm(batch, generator=torch.Generator().manual_seed(0))]


def execution_rivals(
    net: DynamicNet, choice: Tensor, size: int
) -> dict[str, Callable[[Tensor], object]]:
    """Ways to run a batch whose images take the routes `choice`, positions in the routing space.

    With several gates `choice` is (batch, gates), or (batch,) for the same route at all of them.
    "widest" and "cheapest": every image on that plain network. "grouped": `DynamicRunner` with
    these choices, its gate and front included. "masked": the path of the mask estimator, one dense
    run at the widest, masked per image; "masked, plain front": the same behind the runner's front.
    "per image": `grouped` one image at a time. "naive widest": the widest route by slicing
    views, norms not folded, NCHW weights. The masked ones where the network can be masked.
    """
    runner, space = DynamicRunner(net), net.routing_space
    choice = choice.view(len(choice), -1).expand(-1, net.num_gates)
    gates = F.one_hot(choice, len(space)).float().to(next(net.parameters()).device)

    def decide(logits: Tensor, gate: int, part: slice = slice(None)) -> Tensor:
        net.decide(logits, size=size)  # the decision is part of the cost; the mix is prescribed
        return choice[part, gate]

    def behind(front: tuple[Tensor, Tensor], chosen: Decide) -> object:
        return runner.run(*front, chosen, size)

    def grouped(x: Tensor) -> object:
        return behind(runner.front(x), decide)

    def one_by_one(x: Tensor) -> object:
        return [
            behind(runner.front(x[n : n + 1]), partial(decide, part=slice(n, n + 1)))
            for n in range(len(x))
        ]

    def masked(features: Tensor) -> object:
        for gate in range(net.num_gates):
            features = net.masked_stage(features, gate, gates[:, gate], space).features
        return features

    rivals: dict[str, Callable[[Tensor], object]] = {
        "widest": fast_route(net, space[-1]),
        "cheapest": fast_route(net, space[0]),
        "grouped": grouped,
        "per image": one_by_one,
        "naive widest": lambda x: net(x.contiguous(), route=space[-1]),
    }
    if net.maskable:
        rivals["masked"] = lambda x: masked(net.front(x).features)
        rivals["masked, plain front"] = lambda x: masked(runner.front(x)[0])
    return rivals


def ordinary_activations(net: DynamicNet, seed: int = 0) -> DynamicNet:
    """Gives an untrained network statistics measured on noise, and a gate that is not zero.

    To be called on a CPU. Without this, activations of a deep random network shrink to denormal
    numbers, on which every arithmetic unit is slow: timings would compare the wrong thing.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((8, net.in_channels, net.image_size, net.image_size), generator=generator)
    norms = [layer for layer in net.modules() if isinstance(layer, SwitchableBN)]

    def measure(layer: SwitchableBN, args: tuple[Tensor, ...]) -> None:
        bn = layer.statistics(args[0].shape[1])
        values = args[0].transpose(0, 1).flatten(1)  # channel by channel
        bn.running_mean = values.mean(1)
        bn.running_var = values.var(1).clamp(min=1e-3)

    hooks = [layer.register_forward_pre_hook(measure) for layer in norms]  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for route in ("largest", *range(net.num_routes)):
            net.eval()(x, route=route)
        for head in net.gate_heads():
            head.normal_(generator=generator)
    for hook in hooks:
        hook.remove()
    return net
