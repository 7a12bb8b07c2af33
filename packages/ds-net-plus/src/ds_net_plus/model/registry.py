"""Named configurations, and the same network with another gate."""

import re
from collections.abc import Callable, Sequence

import torch

from ds_net_plus.model.base import DynamicNet
from ds_net_plus.model.cnn import DSConvNet
from ds_net_plus.model.mobilenet import DSMobileNet
from ds_net_plus.model.resnet import DSResNet
from ds_net_plus.model.vit import DSViT
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
    "ds_resnet50": (DSResNet, {}),
    "ds_resnet50_bn": (DSResNet, {"gates": 1}),
    "ds_resnet101": (DSResNet, {"depths": (3, 4, 23, 3)}),
    "ds_resnet_cifar": (
        DSResNet,
        {
            "num_classes": 10,
            "depths": (1, 2, 2),
            "base_widths": (32, 64, 128),
            "gates": 3,
            "group_size": 8,
            "stem": "small",
            "stem_width": 32,
            "image_size": 32,
        },
    ),
    "ds_vit_tiny": (
        DSViT,
        {
            "front": (192, 3, 2),
            "routes": ((192, 1, 2, 10), (192, 2, 2, 10), (192, 2, 3, 10), (192, 3, 4, 10)),
        },
    ),
    "ds_vit_small": (DSViT, {}),
    "ds_vit_small_embed": (
        DSViT,
        {
            "front": (192, 3, 4),
            "routes": ((192, 3, 4, 10), (256, 4, 4, 10), (320, 5, 4, 10), (384, 6, 4, 10)),
        },
    ),
    "ds_vit_small_depth": (
        DSViT,
        {"front": (384, 6, 4), "routes": tuple((384, 6, 4, blocks) for blocks in (4, 6, 8, 10))},
    ),
    "ds_vit_base": (
        DSViT,
        {
            "front": (768, 6, 2),
            "routes": ((768, 4, 1, 10), (768, 6, 2, 10), (768, 9, 3, 10), (768, 12, 4, 10)),
        },
    ),
    "ds_vit_cifar": (
        DSViT,
        {
            "num_classes": 10,
            "front": (128, 2, 2),
            "front_blocks": 1,
            "routes": ((128, 1, 1, 5), (128, 2, 2, 5), (128, 3, 3, 5), (128, 4, 4, 5)),
            "head_dim": 32,
            "patch_size": 4,
            "gate_hidden": 64,
            "image_size": 32,
        },
    ),
    "ds_vit_glyph": (
        DSViT,
        {
            "num_classes": 10,
            "front": (96, 3, 2),
            "front_blocks": 1,
            "routes": ((96, 1, 1, 4), (96, 2, 2, 4), (96, 4, 3, 4), (96, 6, 4, 4)),
            "head_dim": 16,
            "patch_size": 8,
            "drop_path": 0.0,
            "gate_hidden": 64,
            "in_channels": 1,
            "image_size": 32,
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
        what = re.sub(r"^[\w.]*__init__\(\) ", "", str(error))
        raise UserError(what, where=f"model {name}") from error
    net.name = name
    return net


def reset_gate(net: DynamicNet, seed: int) -> None:
    """Fresh gates: hidden layers at random, the output layers at zero."""
    generator = torch.Generator().manual_seed(seed)
    heads = {id(head) for head in net.gate_heads()}
    with torch.no_grad():
        for parameter in net.gate_parameters():
            bound = parameter.shape[-1] ** -0.5
            parameter.uniform_(-bound, bound, generator=generator)
            if id(parameter) in heads:
                parameter.zero_()


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
