"""Every named network in timm's registry.

Importing `ds_net_plus.model` is enough; timm has no mechanism that would find them by itself:

    >>> import ds_net_plus.model, timm
    >>> model = timm.create_model("ds_mbnet", num_classes=10)  # class logits, on the widest route
    >>> model = timm.create_model("ds_mbnet", features_only=True, out_indices=(2, 3, 4), route=0)

An entry takes timm's arguments (`num_classes`, `in_chans`, `img_size`, `drop_rate`,
`drop_path_rate`, `global_pool`), those of the network's constructor, and `route`: an index, one for
each gate, "largest", or "dynamic" for the gates' choice. It returns the `DynamicNet` itself.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from ds_net_plus.model.base import DynamicNet
from ds_net_plus.model.cnn import DSConvNet
from ds_net_plus.model.ecosystem import normalisation
from ds_net_plus.model.mobilenet import DSMobileNet
from ds_net_plus.model.registry import MODELS, create_model
from ds_net_plus.model.resnet import DSResNet
from ds_net_plus.model.vit import DSViT
from tenfold.errors import UserError

DYNAMIC = "dynamic"
_FIRST_CONV = {
    DSMobileNet: "conv_stem",
    DSResNet: "conv1",
    DSConvNet: "stem.0.conv",
    DSViT: "embedding.proj",
}
_OURS = {
    "in_chans": "in_channels",
    "img_size": "image_size",
    "drop_rate": "dropout",
    "drop_path_rate": "drop_path",
}
_SMALL = 64  # pixels; images below are not cropped


def _describe(name: str) -> dict[str, Any]:
    """What timm keeps of a network: how images reach it, and the names of its outer layers."""
    build, arguments = MODELS[name]
    defaults = {key: value.default for key, value in _parameters(build).items()}
    settings = {**defaults, **arguments}
    colours, size = settings["in_channels"], settings["image_size"]
    crop = 1.0 if size < _SMALL else 0.9 if build is DSViT else 0.875
    return {
        "num_classes": settings["num_classes"],
        "input_size": (colours, size, size),
        "interpolation": "bicubic",
        "crop_pct": crop,
        "first_conv": _FIRST_CONV[build],  # pyright: ignore[reportArgumentType]
        "classifier": "classifier",
        "paper_ids": ("arXiv:2103.13258", "arXiv:2109.10060"),
        **normalisation(colours),
    }


def _parameters(build: Callable[..., DynamicNet]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(build).parameters


def _arguments(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of timm under our names; a rate of 0 fits a network that has no such layer.

    Raises:
        UserError: a rate for which the network has no layer, or images that are not square.
    """
    known, arguments = _parameters(MODELS[name][0]), dict(options)
    for theirs, ours in _OURS.items():
        value = arguments.pop(theirs, None)
        if value is None:
            continue
        if theirs == "img_size":
            value = _side(value)
        if ours in known:
            arguments[ours] = value
        elif value:
            raise UserError(f"there is no {theirs}", where=f"model {name}", fix="leave it out")
    return arguments


def _side(size: int | Sequence[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"img_size {size} is not square", fix="give one side")
    return sides.pop()


def _route(net: DynamicNet, route: Any) -> Any:
    """The default route that `route=` asks for; the widest where None."""
    if route == DYNAMIC:
        return None
    return net.check_route(net.num_routes - 1 if route is None else route)


def _net(
    name: str,
    route: Any = None,
    global_pool: str | None = None,
    device: Any = None,
    dtype: Any = None,
    gate: Mapping[str, Any] | None = None,
    **options: Any,
) -> DynamicNet:
    net = create_model(name, **_arguments(name, options))
    net.check_pool(global_pool)
    net.default_route = _route(net, route)
    if gate is not None:
        net.load_gate_state(dict(gate))
    return net.to(device=device, dtype=dtype)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """What an entry of the registry returns.

    Raises:
        UserError: weights that nobody has published, or arguments that do not fit.
    """
    source = {key: options.get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay")}
    config = resolve_pretrained_cfg(name, **source)
    if not pretrained:
        options.pop("gate", None)  # of weights that are not loaded
    elif not (config.has_weights or config.state_dict):
        raise UserError(
            f"there are no released weights of {name}",
            fix='leave out pretrained, or name a folder or repository: "local-dir:FOLDER", '
            '"hf-hub:user/name"',
        )
    return build_model_with_cfg(
        partial(_net, name),
        name,
        pretrained,
        feature_cfg={"out_indices": None, "feature_cls": "getter"},
        **options,
    )


def _register(name: str) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        return _create(name, pretrained, options)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{MODELS[name][0].__name__} `{name}`, see `ds_net_plus.model.timm_models`."
    return register_model(entry)


default_cfgs = generate_default_cfgs({name: _describe(name) for name in MODELS})
globals().update({name: _register(name) for name in MODELS})
