"""DS-ViT: a vision transformer whose heads, MLPs, embedding and depth are sliced per image."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ds_net_plus.layers import (
    DSBlock,
    DSLayerNorm,
    PatchEmbedding,
    TokenGate,
    channel_mask,
    make_classifier,
)
from ds_net_plus.model.arguments import plain_arguments
from ds_net_plus.model.base import DynamicNet
from ds_net_plus.model.features import TOKENS, Maps
from ds_net_plus.model.routes import LARGEST, Front, RouteLike, default_space, half
from tenfold.errors import UserError


class BlockWidths(NamedTuple):
    """Active sizes of the blocks of one route.

    Attributes:
        features: of the tokens (embedding dimension).
        heads: of every attention.
        hidden: units of every MLP.
        blocks: how many.
    """

    features: int
    heads: int
    hidden: int
    blocks: int


class DSViT(DynamicNet):
    """Pre-norm vision transformer (DeiT) with a fixed front, one gate and nested routes behind it.

    The front is the patch embedding and a few blocks of fixed size. A route keeps the first heads,
    hidden units and blocks, and the first features: a narrower one drops the others of every token;
    a wider one appends the late embedding, the patch projection's further rows. So it is the
    narrower one plus a residual. Mode "largest" is the widest route.
    """

    global_pool = "token"

    def __init__(
        self,
        num_classes: int = 1000,
        front: Sequence[float] = (384, 3, 2),
        front_blocks: int = 2,
        routes: Sequence[Sequence[float]] = (
            (384, 2, 1, 10),
            (384, 3, 2, 10),
            (384, 4, 3, 10),
            (384, 6, 4, 10),
        ),
        head_dim: int = 64,
        patch_size: int = 16,
        drop_path: float = 0.1,
        gate_outputs: int = 4,
        gate_hidden: int = 0,
        squeeze_ratio: float = 0.25,
        strict: bool = False,
        in_channels: int = 3,
        image_size: int = 224,
    ) -> None:
        """Builds the network; the defaults are the DeiT-S-sized `ds_vit_small`.

        Args:
            num_classes: outputs of the classifier.
            front: (features, heads, MLP ratio) of the front.
            front_blocks: blocks of the front.
            routes: (features, heads, MLP ratio, blocks) of every route, none ever descending.
            head_dim: channels of a head.
            patch_size: side of a patch in pixels.
            drop_path: stochastic depth of the last block, in training and mode "largest" only.
            gate_outputs: routes among which the gate chooses.
            gate_hidden: hidden units of the slimming head; a linear one where 0.
            squeeze_ratio: squeeze width of the gate over the front's features.
            strict: refuse images of another size instead of resampling the position table.
            in_channels: colours of the images.
            image_size: side of the images that the position table is stored for.

        Raises:
            UserError: routes that are not nested, sizes below 1, or an image size that is no
                multiple of the patch size.
        """
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = plain_arguments(config)
        self.name = "ds_vit_small"
        if len(front) != 3:
            raise UserError(f"front must be features, heads and MLP ratio, got {list(front)}")
        self.front_widths = _widths((*front, front_blocks))
        self.widths = _check_routes(routes)
        if min(self.front_widths[:3]) < 1 or front_blocks < 0 or image_size % patch_size:
            raise UserError(
                f"a front of {list(front)} x {front_blocks} or images of {image_size} pixels "
                f"cannot be built",
                fix=f"choose sizes from 1 on, and image_size a multiple of {patch_size}",
            )
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.num_routes, self.gate_outputs = len(self.widths), gate_outputs
        self.patch_size, self.head_dim = patch_size, head_dim
        self.drop_path, self.strict = drop_path, strict

        first, most = self.front_widths, BlockWidths(*map(max, zip(*self.widths, strict=True)))
        embedded = max(first.features, most.features)
        self.embedding = PatchEmbedding(embedded, patch_size, image_size, in_channels, strict)
        self.front_layers = nn.ModuleList(
            DSBlock(first.features, first.heads, first.hidden, head_dim)
            for _ in range(first.blocks)
        )
        self.gate = TokenGate(first.features, gate_outputs, squeeze_ratio, gate_hidden)
        self.blocks = nn.ModuleList(
            DSBlock(most.features, most.heads, most.hidden, head_dim) for _ in range(most.blocks)
        )
        self.norm = DSLayerNorm(most.features)
        self.classifier = make_classifier(most.features, num_classes)
        self.routing_space = default_space(self.num_routes, gate_outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """DeiT's initialisation: normal of 0.02 truncated at 2; the slimming head at zero."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.gate.reset_attention()
        nn.init.zeros_(self.gate_parameters()[-1])

    @property
    def widening(self) -> bool:
        """Whether a route has more features than the front, so that it needs the pixels again."""
        return self.widths[-1].features > self.front_widths.features

    def block_widths(self, route: RouteLike) -> BlockWidths:
        """Active sizes behind the gate on one route."""
        return self.widths[self.path(route)[0]]

    def front(
        self,
        x: Float[Tensor, "batch colours height width"],
        largest: bool = False,
        maps: Maps | None = None,
    ) -> Front:
        """Embedding, the front's blocks and the gate's attention."""
        first = self.front_widths
        pixels = self.embedding.pixels(x) if self.widening else None
        x = self.embedding(x, first.features)
        for j, block in enumerate(self.front_layers):
            keep = self._keep(x, j) if self.training and largest else None
            x = block(x, first.heads, first.hidden, keep)
        hidden = self.gate.squeeze(x)
        x = self.gate.rescale(x, hidden)
        return Front(x if pixels is None else torch.cat([x, pixels], 2), hidden)

    def _entered(self, features: Tensor, width: int) -> Tensor:
        """Tokens of the wanted width, from the front's and the pixels behind them."""
        own = self.front_widths.features
        x = features[..., : min(width, own)]
        if width <= own:
            return x
        return torch.cat([x, self.embedding.late(features[..., own:], own, width)], 2)

    def rest(
        self,
        features: Float[Tensor, "batch tokens features"],
        route: RouteLike,
        maps: Maps | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """The route's blocks, final norm and classifier on the class token."""
        width = self.block_widths(route)
        x = self._entered(features, width.features)
        drop = self.training and route == LARGEST
        for j, block in enumerate(self.blocks[: width.blocks]):
            keep = self._keep(x, len(self.front_layers) + j) if drop else None
            x = block(x, width.heads, width.hidden, keep)
        if maps is not None:
            y = self.norm(x).transpose(1, 2)
            maps[TOKENS], maps[self.patch_size] = y, y[..., 1:].unflatten(2, _grid(x))
        return self.classifier(self.norm(x[:, 0]))

    def _keep(self, x: Tensor, j: int) -> Tensor:
        """Stochastic depth of the j-th block, rising linearly from none in the first one."""
        share = 1 - self.drop_path * j / max(len(self.front_layers) + len(self.blocks) - 1, 1)
        return x.new_empty(len(x), 1, 1).bernoulli_(share) / share

    def masked_rest(
        self,
        features: Float[Tensor, "batch tokens features"],
        gate: Float[Tensor, "batch routes"],
        space: Sequence[int],
    ) -> Float[Tensor, "batch classes"]:
        """Dense run at the widest route of `space`: features, heads, units and blocks masked."""
        widths = [self.widths[k] for k in space]
        x = self._entered(features, widths[-1].features)
        channels = channel_mask(gate, [w.features for w in widths])
        heads = channel_mask(gate, [w.heads for w in widths])
        hidden = channel_mask(gate, [w.hidden for w in widths])
        depth = channel_mask(gate, [w.blocks for w in widths])
        x = x * channels[:, None]
        for j, block in enumerate(self.blocks[: widths[-1].blocks]):
            x = block.masked(x, channels, heads, hidden, depth[:, j])  # pyright: ignore[reportCallIssue]
        return self.classifier(self.norm.masked(x[:, :1], channels[:, None])[:, 0])

    def gate_logits(
        self, gate_input: Float[Tensor, "batch hidden"], gate: int = 0
    ) -> Float[Tensor, "batch outputs"]:
        """The slimming head."""
        return self.gate.logits(gate_input)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The slimming head's weights, that of the output layer last."""
        return list(self.gate.head.parameters())

    def no_weight_decay(self) -> set[str]:
        """The position table."""
        return {"embedding.positions"}

    def route_widths(self, route: RouteLike) -> tuple[int, ...]:
        """(features, heads, hidden units, blocks) behind the gate."""
        return tuple(self.block_widths(route))

    def map_channels(self, route: RouteLike = LARGEST) -> dict[int, int]:
        """One map, of the patches."""
        return {self.patch_size: self.block_widths(route).features}

    def madds(self, route: RouteLike, size: int | None = None) -> int:
        """Patch projection, both products of attention, all linear layers; gate not counted."""
        patches = half(size or self.image_size, self.patch_size) ** 2
        width, pixels = self.block_widths(route), self.in_channels * self.patch_size**2
        embedded = max(self.front_widths.features, width.features)
        total = embedded * pixels * patches + width.features * self.num_classes
        for blocks in (self.front_widths, width):
            inner = blocks.heads * self.head_dim
            linear = 4 * blocks.features * inner + 2 * blocks.features * blocks.hidden
            tokens = patches + 1
            total += blocks.blocks * (tokens * linear + 2 * tokens**2 * inner)
        return total

    def active_params(self, route: RouteLike) -> int:
        """Weights, biases, positions and class token of the route; the gate is not counted."""
        width, pixels = self.block_widths(route), self.in_channels * self.patch_size**2
        embedded = max(self.front_widths.features, width.features)
        total = embedded * (pixels + 1) + embedded * (len(self.embedding.positions) + 1)
        for blocks in (self.front_widths, width):
            d, m, inner = blocks.features, blocks.hidden, blocks.heads * self.head_dim
            block = (d + 1) * 3 * inner + (inner + 1) * d + (d + 1) * m + (m + 1) * d + 4 * d
            total += blocks.blocks * block
        return total + 2 * width.features + (width.features + 1) * self.num_classes

    def materialize_front(self, largest: bool = False, fold_bn: bool = True) -> nn.Module:
        """Plain front: image -> (packed tokens, gate logits)."""
        return PlainViTFront(self).eval()

    def materialize_rest(
        self, route: RouteLike, fold_bn: bool = True, share_storage: bool = False
    ) -> nn.Module:
        """Plain blocks and classifier of one route: tokens -> class logits."""
        return PlainViTRest(self, self.check_route(route), share_storage).eval()


def _widths(sizes: Sequence[float]) -> BlockWidths:
    """(features, heads, MLP ratio, blocks) with the ratio as units, a multiple of 8."""
    features, heads, ratio, blocks = sizes
    if any(size != int(size) for size in (features, heads, blocks)):
        raise UserError(f"features, heads and blocks must be whole numbers, got {list(sizes)}")
    hidden = round(int(ratio * features) / 8) * 8
    return BlockWidths(int(features), int(heads), hidden, int(blocks))


def _check_routes(routes: Sequence[Sequence[float]]) -> tuple[BlockWidths, ...]:
    if any(len(route) != 4 for route in routes) or len(routes) < 2:
        raise UserError("routes must be two or more lists of features, heads, MLP ratio and blocks")
    widths = tuple(map(_widths, routes))
    nested = all(
        low != high and all(a <= b for a, b in zip(low, high, strict=True))
        for low, high in pairwise(widths)
    )
    if not nested or min(map(min, widths)) < 1:
        raise UserError(
            f"routes {[list(route) for route in routes]} are not nested",
            fix="let no size fall from one route to the next, and start at 1 or more",
        )
    return widths


def _grid(tokens: Tensor) -> tuple[int, int]:
    """Rows and columns of square images' patches."""
    side = round((tokens.shape[1] - 1) ** 0.5)
    return side, side


class PlainViTFront(nn.Module):
    """Embedding, blocks and gate: image -> (tokens, gate logits)."""

    def __init__(self, net: DSViT) -> None:
        """Takes the front's part of the weights."""
        super().__init__()
        first = net.front_widths
        self.embedding, self.widening = net.embedding.materialize(0, first.features), net.widening
        self.blocks = nn.Sequential(
            *(
                block.materialize(first.features, first.heads, first.hidden)  # pyright: ignore[reportCallIssue]
                for block in net.front_layers
            )
        )
        self.gate = copy.deepcopy(net.gate)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, gate logits)."""
        y = self.blocks(self.embedding(x))
        hidden = self.gate.squeeze(y)
        y = self.gate.rescale(y, hidden)
        if self.widening:
            y = torch.cat([y, self.embedding.pixels(x)], 2)
        return y, self.gate.logits(hidden)


class PlainViTRest(nn.Module):
    """Blocks, norm and classifier of one route: tokens -> class logits."""

    def __init__(self, net: DSViT, route: RouteLike, share_storage: bool) -> None:
        """Takes the route's part of the weights, or views of it."""
        super().__init__()
        width = net.block_widths(route)
        self.own, self.features = net.front_widths.features, width.features
        self.late = None
        if width.features > self.own:
            self.late = net.embedding.materialize(self.own, width.features)
        self.blocks = nn.Sequential(
            *(
                block.materialize(width.features, width.heads, width.hidden, share_storage)  # pyright: ignore[reportCallIssue]
                for block in net.blocks[: width.blocks]
            )
        )
        self.norm = net.norm.materialize(width.features)
        self.head = net.classifier.materialize(width.features, share_storage)

    def forward(self, features: Tensor) -> Tensor:
        """Class logits."""
        x = features[..., : min(self.features, self.own)]
        if self.late is not None:
            added = self.late.late(features[..., self.own :], 0, self.features - self.own)
            x = torch.cat([x, added], 2)
        return self.head(self.norm(self.blocks(x)[:, 0]))
