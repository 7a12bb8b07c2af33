"""Named configurations, and the same network with another gate."""

from collections.abc import Callable, Sequence

import torch

from ds_net_plus.model.base import DynamicNet
from ds_net_plus.model.cnn import DSConvNet
from ds_net_plus.model.mobilenet import DSMobileNet
from tenfold.errors import UserError

_QUARTERS_96 = ((24, 48, 72, 96), (48, 96, 144, 192))
_QUARTERS_128 = ((32, 64, 96, 128), (64, 128, 192, 256))

MODELS: dict[str, tuple[Callable[..., DynamicNet], dict[str, object]]] = {
    "ds_mbnet": (DSMobileNet, {}),
    "ds_mbnet_cifar": (
        DSMobileNet,
        {"num_classes": 10, "stem_stride": 1, "strides": (1, 1, 2, 2, 2), "image_size": 32},
    ),
    "ds_cnn_tiny": (DSConvNet, {}),
    "ds_cnn_wide": (
        DSConvNet,
        {"stage_widths": _QUARTERS_128, "gate_hidden": 128, "image_size": 48},
    ),
    "ds_cnn_cifar": (
        DSConvNet,
        {
            "front_widths": (16, 24),
            "stage_widths": _QUARTERS_96,
            "depths": (2, 2),
            "gate_hidden": 64,
            "in_channels": 3,
        },
    ),
}


def create_model(name: str, **overrides: object) -> DynamicNet:
    """Builds a named network, untrained.

    Args:
        name: a key of `MODELS`.
        **overrides: constructor arguments that differ from the named configuration.

    Raises:
        UserError: an unknown name or argument.
    """
    if name not in MODELS:
        raise UserError(f"no model is called {name!r}", fix=f"choose from {', '.join(MODELS)}")
    build, arguments = MODELS[name]
    try:
        net = build(**{**arguments, **overrides})
    except TypeError as error:
        raise UserError(str(error).replace("__init__() ", ""), where=f"model {name}") from error
    net.name = name
    return net


def reset_gate(net: DynamicNet, seed: int) -> None:
    """A fresh gate: hidden layers at random, the output layer at zero."""
    generator = torch.Generator().manual_seed(seed)
    *hidden, head = net.gate_parameters()
    with torch.no_grad():
        for parameter in hidden:
            bound = parameter.shape[-1] ** -0.5
            parameter.uniform_(-bound, bound, generator=generator)
        head.zero_()


def with_space(net: DynamicNet, space: Sequence[int]) -> DynamicNet:
    """The same supernet with a fresh gate over other routes, of any number.

    Raises:
        UserError: an invalid routing space.
    """
    if len(space) < 2:
        raise UserError(
            f"routing space {list(space)} must be two or more ascending route indices",
            fix=f"choose from 0 to {net.num_routes - 1}",
        )
    other = create_model(net.name, **{**net.config, "gate_outputs": len(space)})
    other.routing_space = tuple(space)
    gate = {id(p) for p in net.gate_parameters()}
    names = {name for name, p in net.named_parameters() if id(p) in gate}
    state = {k: v for k, v in net.state_dict().items() if k not in names}
    other.load_state_dict({**other.state_dict(), **state})
    return other.eval()
