"""A plain vision transformer of timm (ViT, DeiT) as `DSViT`.

Source: Training data-efficient image transformers (DeiT, 2021); timm's vision_transformer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ds_net_plus.convert.importance import Readers
from ds_net_plus.convert.structure import check_structure
from ds_net_plus.layers import DSLayerNorm
from ds_net_plus.model import DSViT, create_model
from tenfold.attention import to_head_major
from tenfold.errors import UserError

EMBEDDING = "embedding"
_NAMES = {192: "ds_vit_tiny", 384: "ds_vit_small", 768: "ds_vit_base"}
_HEAD_SHARES = (1 / 3, 1 / 2, 3 / 4, 1)
_UNIT_SHARES = (1 / 4, 1 / 2, 3 / 4, 1)
OPTIONS = ("routes", "front_blocks", "sort_embedding")
# arguments that the network's own sizes decide
FIXED = ("num_classes", "front", "head_dim", "patch_size", "in_channels", "image_size")


class Sizes(NamedTuple):
    """Sizes of a vision transformer, the same in all of its blocks."""

    features: int
    heads: int
    hidden: int
    depth: int

    @property
    def ratio(self) -> float:
        """Hidden units over features."""
        return _plain(self.hidden / self.features)


def _plain(number: float) -> float:
    """An int where it is one."""
    return int(number) if number == int(number) else number


def sizes(model: VisionTransformer) -> Sizes:
    """Read off the first block."""
    first: Any = model.blocks[0]
    features, depth = model.embed_dim, len(list(model.blocks))
    heads = getattr(getattr(first, "attn", None), "num_heads", 1)
    units = getattr(getattr(getattr(first, "mlp", None), "fc1", None), "out_features", 4 * features)
    return Sizes(features, heads, units, depth)


def _colours(model: VisionTransformer) -> int:
    return getattr(model.patch_embed.proj, "in_channels", 3)


def check(model: VisionTransformer) -> None:
    """Makes sure that `DSViT` computes the same.

    Raises:
        UserError: names what does not fit.
    """
    size, patch = sizes(model), model.patch_embed.patch_size
    image = model.patch_embed.img_size or (0, 0)
    norm = DSLayerNorm(1).eps
    others = [
        text
        for bad, text in (
            (model.global_pool != "token", f"its pooling is {model.global_pool!r}, not 'token'"),
            (patch[0] != patch[1] or image[0] != image[1], "its images or patches are no squares"),
            (model.num_classes < 1, "it has no classifier"),
            (size.hidden % 8, f"its {size.hidden} hidden units are no multiple of 8"),
        )
        if bad
    ]
    with torch.device("meta"):
        plain = VisionTransformer(
            img_size=image,
            patch_size=patch,  # pyright: ignore[reportArgumentType]
            in_chans=_colours(model),
            num_classes=model.num_classes,
            embed_dim=size.features,
            depth=size.depth,
            num_heads=size.heads,
            mlp_ratio=size.ratio,
            norm_layer=lambda features, **kwargs: nn.LayerNorm(features, norm, **kwargs),  # pyright: ignore[reportArgumentType]
        )
    fix = "take a plain ViT or DeiT, such as deit_small_patch16_224"
    check_structure(model, plain, others, fix)


def build(
    model: VisionTransformer,
    routes: Sequence[Sequence[float]] | None = None,
    front_blocks: int | None = None,
    **overrides: object,
) -> DSViT:
    """A `DSViT` with a front of full size and routes up to the whole network; weights of its own.

    Args:
        model: a network that passes `check`.
        routes: (features, heads, MLP ratio, blocks) of every route; those of `default_routes`
            where None.
        front_blocks: blocks in front of the gate; 2 where None.
        **overrides: other constructor arguments.

    Raises:
        UserError: no block is left behind the front, or the last route is not the whole network.
    """
    size, front_blocks = sizes(model), 2 if front_blocks is None else front_blocks
    behind = size.depth - front_blocks
    if front_blocks < 0 or behind < 1:
        raise UserError(f"front_blocks must be 0 to {size.depth - 1}, got {front_blocks}")
    routes = default_routes(size, behind) if routes is None else routes
    routes = [[_plain(number) for number in route] for route in routes]
    arguments = {
        "num_classes": model.num_classes,
        "front": (size.features, size.heads, size.ratio),
        "front_blocks": front_blocks,
        "routes": routes,
        "head_dim": size.features // size.heads,
        "patch_size": model.patch_embed.patch_size[0],
        "in_channels": _colours(model),
        "image_size": model.patch_embed.img_size[0],
        "gate_outputs": max(2, min(4, len(routes))),
    }
    net = create_model(_NAMES.get(size.features, "ds_vit_small"), **{**arguments, **overrides})
    assert isinstance(net, DSViT)
    whole = (size.features, size.heads, size.hidden, behind)
    if tuple(net.widths[-1]) != whole:
        what = "goes beyond" if any(map(int.__gt__, net.widths[-1], whole)) else "is less than"
        full = [size.features, size.heads, size.ratio, behind]
        raise UserError(
            f"the last route {list(routes[-1])} {what} the whole network",
            fix=f"end with {full}: features, heads, MLP ratio and blocks behind the front",
        )
    return net


def default_routes(size: Sizes, blocks: int) -> list[list[float]]:
    """Four routes of full width and depth, with a share of the heads and hidden units each."""
    shares = _UNIT_SHARES
    if size.heads == 3:  # one or two heads of three, with half of the hidden units in either case
        shares = (1 / 2, *_UNIT_SHARES[1:])
    return [
        [size.features, max(1, round(heads * size.heads)), units * size.ratio, blocks]
        for heads, units in zip(_HEAD_SHARES, shares, strict=True)
    ]


def magnitude_scores(model: VisionTransformer) -> dict[str, Float[Tensor, " units"]]:
    """Mean |w|: of a head's qkv rows plus its proj columns; fc1 row times fc2 column of a unit."""
    size, state, scores = sizes(model), model.state_dict(), {}
    for block in _blocks(size):
        qkv, proj = (state[f"{block}.attn.{name}.weight"].abs() for name in ("qkv", "proj"))
        rows = qkv.unflatten(0, (3, size.heads, -1)).mean((0, 2, 3))
        columns = proj.unflatten(1, (size.heads, -1)).mean((0, 2))
        scores[f"{block}.attn"] = rows + columns
        fc1, fc2 = (state[f"{block}.mlp.{name}.weight"].abs() for name in ("fc1", "fc2"))
        scores[f"{block}.mlp"] = fc1.mean(1) * fc2.mean(0)
    return scores


def embedding_scores(model: nn.Module) -> Float[Tensor, " features"]:
    """Mean |w| over all layer norms of each feature of the tokens."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.LayerNorm)]
    return torch.stack([norm.weight.detach().abs() for norm in norms]).mean(0)


def readers(model: VisionTransformer) -> dict[str, Readers]:
    """The projections that read heads, and those that read hidden units."""
    size, found = sizes(model), {}
    for block in _blocks(size):
        proj, fc2 = (model.get_submodule(f"{block}.{name}") for name in ("attn.proj", "mlp.fc2"))
        found[f"{block}.attn"] = Readers((proj,), size.features // size.heads)
        found[f"{block}.mlp"] = Readers((fc2,))
    return found


def reordered(
    model: VisionTransformer, orders: Mapping[str, Int[Tensor, " units"]]
) -> dict[str, Tensor]:
    """The state dict of the same function with its units in another order.

    Args:
        model: a network that passes `check`.
        orders: of the heads ("blocks.0.attn") and hidden units ("blocks.0.mlp") of a block, or of
            the features ("embedding"); what is left out stays.
    """
    size, state = sizes(model), {k: v.detach() for k, v in model.state_dict().items()}

    def take(order: Tensor, *places: tuple[str, int]) -> None:
        for key, dim in places:
            state[key] = state[key].index_select(dim, order)

    for block in _blocks(size):
        if (order := orders.get(f"{block}.attn")) is not None:
            channels = torch.arange(size.features, device=order.device)
            columns = channels.unflatten(0, (size.heads, -1))[order].flatten()
            rows = torch.cat([columns + part * size.features for part in range(3)])
            attn = f"{block}.attn"
            take(rows, (f"{attn}.qkv.weight", 0), (f"{attn}.qkv.bias", 0))
            take(columns, (f"{attn}.proj.weight", 1))
        if (order := orders.get(f"{block}.mlp")) is not None:
            mlp = f"{block}.mlp"
            take(order, (f"{mlp}.fc1.weight", 0), (f"{mlp}.fc1.bias", 0), (f"{mlp}.fc2.weight", 1))
    if EMBEDDING in orders:
        take(orders[EMBEDDING], *_feature_places(size))
    return state


def _blocks(size: Sizes) -> list[str]:
    return [f"blocks.{j}" for j in range(size.depth)]


def _feature_places(size: Sizes) -> list[tuple[str, int]]:
    """Every weight with the features of the tokens along one dimension, and which it is."""
    places = [("cls_token", 2), ("pos_embed", 2), ("norm.weight", 0), ("norm.bias", 0)]
    places += [("patch_embed.proj.weight", 0), ("patch_embed.proj.bias", 0), ("head.weight", 1)]
    for block in _blocks(size):
        places += [(f"{block}.{key}.weight", 1) for key in ("attn.qkv", "mlp.fc1")]
        for key in ("norm1", "norm2", "attn.proj", "mlp.fc2"):
            places += [(f"{block}.{key}.weight", 0), (f"{block}.{key}.bias", 0)]
    return places


def renamed(net: DSViT, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of timm under the keys of `net`, query-key-value rows head-major."""
    ours = {
        "embedding.proj.weight": state["patch_embed.proj.weight"],
        "embedding.proj.bias": state["patch_embed.proj.bias"],
        "embedding.cls_token": state["cls_token"][0, 0],
        "embedding.positions": state["pos_embed"][0],
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
        "classifier.weight": state["head.weight"],
        "classifier.bias": state["head.bias"],
    }
    front = net.front_widths.blocks
    for key, value in state.items():
        if key.startswith("blocks."):
            _, number, rest = key.split(".", 2)
            j = int(number)
            home = f"front_layers.{j}" if j < front else f"blocks.{j - front}"
            if rest.startswith("attn.qkv."):
                value = to_head_major(value, net.front_widths.heads)
            ours[f"{home}.{rest.removeprefix('mlp.')}"] = value
    return ours
