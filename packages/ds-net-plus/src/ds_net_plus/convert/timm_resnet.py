"""A plain bottleneck ResNet of timm as `DSResNet` with switchable batch norm.

Source: Deep residual learning for image recognition (2016); timm's resnet.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from ds_net_plus.convert.importance import Readers
from ds_net_plus.convert.structure import check_structure
from ds_net_plus.layers import BN_EPS, DSConv2d, DSLinear, SwitchableBN
from ds_net_plus.model import DSResNet, create_model
from tenfold.errors import UserError

STAGES = 4
_NAMES: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "ds_resnet50", (3, 4, 23, 3): "ds_resnet101"}
_STATISTICS = ("running_mean", "running_var")
_AFFINE = ("weight", "bias")
OPTIONS = ("rhos", "gates")
# arguments that the network's own sizes decide, or that the full route would not be exact without
FIXED = (
    "num_classes",
    "depths",
    "base_widths",
    "norm",
    "gate_position",
    "front_rho",
    "stem",
    "stem_width",
    "attention",
    "in_channels",
)


class Space(NamedTuple):
    """Channels that may be put in another order together.

    Attributes:
        writers: convolutions with these channels as their output; a batch norm follows each.
        readers: convolutions, or the classifier, with these channels as their input.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]


def _stages(model: ResNet) -> list[nn.Module]:
    return [model.get_submodule(f"layer{s + 1}") for s in range(STAGES)]


def _base_widths(model: ResNet) -> tuple[int, ...]:
    return tuple(stage.get_submodule("0.conv1").weight.shape[0] for stage in _stages(model))  # pyright: ignore[reportAttributeAccessIssue, reportReturnType, reportIndexIssue]


def _depths(model: ResNet) -> tuple[int, ...]:
    return tuple(len(list(stage.children())) for stage in _stages(model))


def _colours(model: ResNet) -> int:
    return next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d)).in_channels


def check(model: ResNet) -> None:
    """Makes sure that `DSResNet` computes the same.

    Raises:
        UserError: names what does not fit.
    """
    widths, entries = _base_widths(model), [stage.get_submodule("0") for stage in _stages(model)]
    others = [
        text
        for bad, text in (
            (model.num_classes < 1, "it has no classifier"),
            (any(w % 8 for w in widths), f"its middle widths {list(widths)} are no multiples of 8"),
            (any(e.downsample is None for e in entries), "a stage begins without a projection"),
        )
        if bad
    ]
    with torch.device("meta"):
        plain = ResNet(
            Bottleneck,  # pyright: ignore[reportArgumentType]
            _depths(model),
            model.num_classes,
            _colours(model),
            channels=widths,
            norm_layer=lambda width, **kwargs: nn.BatchNorm2d(width, BN_EPS, **kwargs),  # pyright: ignore[reportArgumentType]
        )
    fix = "take a plain bottleneck ResNet, such as resnet50, resnet101 or resnet152"
    check_structure(model, plain, others, fix)


def build(
    model: ResNet,
    rhos: Sequence[float] | None = None,
    gates: int | None = None,
    **overrides: object,
) -> DSResNet:
    """A `DSResNet` with batch norm, exact where rho is 1; weights of its own.

    Args:
        model: a network that passes `check`.
        rhos: ascending slimming ratios up to 1; quarters where None.
        gates: 4, one for each stage, or 1; 4 where None.
        **overrides: other constructor arguments.

    Raises:
        UserError: the last ratio is not 1.
    """
    rhos = (0.25, 0.5, 0.75, 1.0) if rhos is None else rhos
    if not rhos or rhos[-1] != 1:
        raise UserError(f"rhos must end with 1, the whole network, got {list(rhos)}")
    gates, depths = STAGES if gates is None else gates, _depths(model)
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    arguments = {
        "num_classes": model.num_classes,
        "depths": depths,
        "base_widths": _base_widths(model),
        "rhos": rhos,
        "gates": gates,
        "norm": "bn",
        "front_rho": 1.0,
        "stem": "imagenet",
        "stem_width": model.conv1.out_channels,
        "attention": "tanh1p",
        "in_channels": _colours(model),
        "image_size": config.get("input_size", (3, 224, 224))[-1],
        "gate_outputs": max(2, min(4, len(rhos))),
    }
    name = _NAMES.get(depths, "ds_resnet50")
    if gates == 1 and name == "ds_resnet50":
        name = "ds_resnet50_bn"
    net = create_model(name, **{**arguments, **overrides})
    assert isinstance(net, DSResNet)
    return net


def spaces(model: ResNet) -> dict[str, Space]:
    """Both middle spaces of every block, and the outputs that the blocks of a stage share."""
    found, depths = {}, _depths(model)
    for s, depth in enumerate(depths, 1):
        blocks = [f"layer{s}.{j}" for j in range(depth)]
        for block in blocks:
            for low, high in (("conv1", "conv2"), ("conv2", "conv3")):
                found[f"{block}.{low}"] = Space((f"{block}.{low}",), (f"{block}.{high}",))
        behind = [f"{block}.conv1" for block in blocks[1:]]
        behind += (
            [f"layer{s + 1}.0.conv1", f"layer{s + 1}.0.downsample.0"] if s < STAGES else ["fc"]
        )
        writers = [f"{blocks[0]}.downsample.0", *(f"{block}.conv3" for block in blocks)]
        found[f"layer{s}"] = Space(tuple(writers), tuple(behind))
    return found


def _norm_of(conv: str) -> str:
    """The batch norm behind a convolution."""
    return conv.replace("downsample.0", "downsample.1").replace("conv", "bn")


def magnitude_scores(model: ResNet) -> dict[str, Float[Tensor, " units"]]:
    """Mean |w| of the rows that write a channel times that of the columns that read it.

    Batch norms are folded into the rows in front of them, since these have no scale of their own.
    """
    state = model.state_dict()

    def size(layer: str, dim: int) -> Tensor:
        weight = state[f"{layer}.weight"].abs()
        if layer != "fc":
            norm = _norm_of(layer)
            gain = state[f"{norm}.weight"] * torch.rsqrt(state[f"{norm}.running_var"] + BN_EPS)
            weight = weight * gain.abs()[:, None, None, None]
        return weight.transpose(0, dim).flatten(1).mean(1)

    return {
        key: torch.stack([size(layer, 0) for layer in space.writers]).mean(0)
        * torch.stack([size(layer, 1) for layer in space.readers]).mean(0)
        for key, space in spaces(model).items()
    }


def readers(model: ResNet) -> dict[str, Readers]:
    """The layers that read the channels of every space."""
    return {
        key: Readers(tuple(model.get_submodule(layer) for layer in space.readers))
        for key, space in spaces(model).items()
    }


def reordered(model: ResNet, orders: Mapping[str, Int[Tensor, " units"]]) -> dict[str, Tensor]:
    """The state dict of the same function with its channels in another order.

    Args:
        model: a network that passes `check`.
        orders: of the channels of `spaces`; what is left out stays.
    """
    state = {key: value.detach() for key, value in model.state_dict().items()}
    for key, space in spaces(model).items():
        if (order := orders.get(key)) is None:
            continue
        for conv in space.writers:
            norm = [f"{_norm_of(conv)}.{name}" for name in _STATISTICS + _AFFINE]
            for name in (f"{conv}.weight", *norm):
                state[name] = state[name][order]
        for layer in space.readers:
            state[f"{layer}.weight"] = state[f"{layer}.weight"][:, order]
    return state


def renamed(net: DSResNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of timm under the keys of `net`, statistics sliced to every width."""
    ours = {}
    for name, layer in net.named_modules():
        home = _timm_name(name)
        if isinstance(layer, SwitchableBN):
            for i, width in enumerate(layer.widths):
                for key in _STATISTICS:
                    ours[f"{name}.aux_bn.{i}.{key}"] = state[f"{home}.{key}"][:width]
                key = "num_batches_tracked"
                ours[f"{name}.aux_bn.{i}.{key}"] = state[f"{home}.{key}"]
            for key in _AFFINE:
                ours[f"{name}.aux_bn.{len(layer.widths) - 1}.{key}"] = state[f"{home}.{key}"]
        elif isinstance(layer, DSConv2d | DSLinear):
            for key in layer.state_dict():
                ours[f"{name}.{key}"] = state[f"{home}.{key}"]
    return ours


def _timm_name(name: str) -> str:
    """The name that timm has for one of our layers."""
    name = re.sub(r"^stages\.(\d+)", lambda match: f"layer{int(match[1]) + 1}", name)
    name = re.sub(r"downsample(_bn)?$", lambda match: f"downsample.{int(bool(match[1]))}", name)
    return "fc" if name == "classifier" else name
