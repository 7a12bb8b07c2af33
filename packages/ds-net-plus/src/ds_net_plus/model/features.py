"""Feature maps of a dynamic network, for detectors and other heads."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from ds_net_plus.model.base import DynamicNet
    from ds_net_plus.model.routes import RouteLike

Maps = dict[int, Tensor]
"""The last feature map of each stride, of a group of images."""

TOKENS = 0
"""Where a transformer adds all its tokens, normalised, to its maps: (batch, features, tokens)."""


class Features(NamedTuple):
    """Feature maps of a batch, in its order.

    Attributes:
        maps: one for each level, zero beyond the width of an image's route.
        routes: the route of each gate, -1 for mode "largest".
        madds: multiply-adds of each image's whole path, classifier included.
    """

    maps: list[Float[Tensor, "batch channels height width"]]
    routes: Int[Tensor, "batch gates"]
    madds: Int[Tensor, " batch"]


def feature_maps(
    net: "DynamicNet",
    x: Float[Tensor, "batch colours height width"],
    route: "RouteLike | None",
    levels: Sequence[int],
    tau: float,
) -> Features:
    """Maps at the given strides, see `DynamicNet.features`."""
    channels = net.feature_channels(levels)
    route = net.default_route if route is None else route
    run = _dynamic if route is None else _static
    groups, routes, costs = run(net, x, tau if route is None else route)  # pyright: ignore[reportArgumentType]
    maps = [_padded(groups, level, x, width) for level, width in zip(levels, channels, strict=True)]
    return Features(maps, routes.to(x.device), costs.to(x.device))


def default_maps(net: "DynamicNet", x: Float[Tensor, "batch colours height width"]) -> Maps:
    """All maps of the default route by stride, those of a static route in its own widths.

    Where the gates choose, a map is zero beyond the width of an image's route.
    """
    if net.default_route is not None:
        groups, _, _ = _static(net, x, net.default_route)
        return groups[0][1]
    groups, _, _ = _dynamic(net, x, 0.0)
    channels = net.map_channels()
    if any(TOKENS in maps for _, maps in groups):
        channels |= {TOKENS: channels[max(channels)]}
    return {level: _padded(groups, level, x, width) for level, width in channels.items()}


_Groups = list[tuple[Tensor, Maps]]  # (images, their maps)


def _static(net: "DynamicNet", x: Tensor, route: "RouteLike") -> tuple[_Groups, Tensor, Tensor]:
    route, maps = net.check_route(route), {}
    largest = route == "largest"
    net.rest(net.front(x, largest, maps).features, route, maps)
    path = (-1,) * net.num_gates if largest else net.path(route)
    costs = torch.full((len(x),), net.madds(route, x.shape[-1]))
    return [(torch.arange(len(x)), maps)], torch.tensor([path]).expand(len(x), -1), costs


def _dynamic(net: "DynamicNet", x: Tensor, tau: float) -> tuple[_Groups, Tensor, Tensor]:
    net.check_gate()
    maps: Maps = {}
    features, gate_input = net.front(x, maps=maps)
    groups: _Groups = [(torch.arange(len(x)), maps)]

    def stage(x: Tensor, gate: int, route: int, index: Tensor) -> tuple[Tensor, Tensor | None]:
        maps: Maps = {}
        groups.append((index, maps))
        return net.run_stage(x, gate, route, index, maps)

    output = net.dispatch(
        features,
        net.gate_logits(gate_input),
        net.decider(x, tau),
        stage=stage,
        size=x.shape[-1],
    )
    return groups, output.routes, output.madds


def _padded(groups: _Groups, level: int, x: Tensor, channels: int) -> Tensor:
    """One map of all images, zero beyond the width that a group has."""
    found = [(index, maps[level]) for index, maps in groups if level in maps]
    if not found:  # no image took any route
        return x.new_zeros(0, channels, *(-(-side // max(level, 1)) for side in x.shape[2:]))
    example = found[0][1]
    whole = example.new_zeros(len(x), channels, *example.shape[2:])
    for index, part in found:
        whole[index.to(whole.device), : part.shape[1]] = part
    return whole
