"""DS-CNN: a small residual network with one gate, for embedded tasks and small images."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ds_net_plus.layers import (
    BN_EPS,
    ConvAct,
    DSConv2d,
    SwitchableBN,
    apply_channel_mask,
    channel_mask,
    check_widths,
    init_official,
    make_classifier,
)
from ds_net_plus.model.arguments import plain_arguments
from ds_net_plus.model.base import DynamicNet
from ds_net_plus.model.features import Maps
from ds_net_plus.model.routes import LARGEST, Front, RouteLike, default_space, half
from tenfold.errors import UserError


class ConvBlock(nn.Module):
    """3x3 convolution -> BN -> SiLU, plus its input where stride and widths allow."""

    def __init__(
        self, in_widths: Sequence[int], out_widths: Sequence[int], stride: int, residual: bool
    ) -> None:
        """Makes a block between two width lists."""
        super().__init__()
        self.conv = DSConv2d(in_widths[-1], out_widths[-1], 3, stride)
        self.bn = SwitchableBN(out_widths)
        self.stride, self.residual = stride, residual

    def forward(
        self, x: Float[Tensor, "batch in_ height width"], out: int
    ) -> Float[Tensor, "batch out_ height2 width2"]:
        """The block at output width `out`."""
        y = F.silu(self.bn(self.conv(x, out)))
        return x + y if self.residual else y

    def masked(
        self,
        x: Float[Tensor, "batch in_ height width"],
        gate: Float[Tensor, "batch routes"],
        widths: Sequence[int],
    ) -> Float[Tensor, "batch out_ height2 width2"]:
        """The block at its widest, masked to each sample's width."""
        y = apply_channel_mask(self.conv(x, widths[-1]), channel_mask(gate, widths))
        y = F.silu(self.bn.masked(y, gate, widths))
        return x + y if self.residual else y

    def materialize(self, in_: int, out: int, fold_bn: bool = True) -> nn.Module:
        """The plain block of one pair of widths."""
        conv, bn = self.conv.materialize(in_, out), self.bn.materialize(out)
        block = ConvAct(conv, bn, fold_bn=fold_bn)
        return PlainResidual(block) if self.residual else block


class PlainResidual(nn.Module):
    """x + block(x)."""

    def __init__(self, block: nn.Module) -> None:
        """Takes the residual branch."""
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Adds the branch to its input."""
        return x + self.block(x)


def moments(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch pooled"]:
    """Mean and mean square over space of every channel."""
    flat = x.flatten(2)
    return torch.cat([flat.mean(2), flat.square().mean(2)], 1)


class PooledGate(nn.Module):
    """Moments of every channel, standardised -> Linear -> ReLU -> Linear: the route logits.

    Standardised by statistics that Stage I and recalibration measure, as those of every norm:
    without, a gate learns half as much in the same steps.
    """

    def __init__(self, channels: int, hidden: int, outputs: int) -> None:
        """`channels` feature maps are seen through 2 * channels numbers."""
        super().__init__()
        self.norm = SwitchableBN((2 * channels,), affine=False)
        self.hidden = nn.Linear(2 * channels, hidden)
        self.head = nn.Linear(hidden, outputs)

    def pool(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch pooled"]:
        """The standardised moments."""
        return self.norm(moments(x))

    def materialize(self) -> nn.Sequential:
        """The plain gate, moments -> route logits, with the norm folded into the first layer."""
        mean, var = self.norm.aux_bn[0].running_mean, self.norm.aux_bn[0].running_var
        hidden, head = copy.deepcopy(self.hidden), copy.deepcopy(self.head)
        scale = torch.rsqrt(var + BN_EPS)  # pyright: ignore[reportOperatorIssue, reportArgumentType]
        hidden.bias.data -= hidden.weight.data @ (mean * scale)  # pyright: ignore[reportOperatorIssue]
        hidden.weight.data *= scale
        return nn.Sequential(hidden, nn.ReLU(), head)

    def forward(self, pooled: Float[Tensor, "batch pooled"]) -> Float[Tensor, "batch outputs"]:
        """Route logits."""
        return self.head(F.relu(self.hidden(pooled)))


class DSConvNet(DynamicNet):
    """Fixed front of 3x3 convolutions, a gate, then slimmable residual stages.

    Mode "largest" is the widest route: the front has one width only.
    """

    def __init__(
        self,
        num_classes: int = 10,
        front_widths: Sequence[int] = (8, 8),
        stage_widths: Sequence[Sequence[int]] = ((6, 12, 18, 24), (12, 24, 36, 48)),
        depths: Sequence[int] = (2, 2),
        gate_outputs: int = 4,
        gate_hidden: int = 32,
        dropout: float = 0.0,
        in_channels: int = 1,
        image_size: int = 32,
    ) -> None:
        """Builds the network; the defaults are the embedded `ds_cnn_tiny`.

        Args:
            num_classes: outputs of the classifier.
            front_widths: channels of the front's convolutions, the first of stride 2.
            stage_widths: ascending widths of every gated stage, equally many in each.
            depths: convolutions of every stage, the first of stride 2, the others residual.
            gate_outputs: routes among which the gate chooses.
            gate_hidden: hidden units of the gate.
            dropout: before the classifier, in training and mode "largest" only.
            in_channels: colours of the images.
            image_size: side of the images for which `routes` states costs.

        Raises:
            UserError: a bad width list, or stages with unequal numbers of widths.
        """
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = plain_arguments(config)
        self.name = "ds_cnn_tiny"
        self.stage_widths = tuple(
            check_widths(widths, f"widths of stage {s}") for s, widths in enumerate(stage_widths)
        )
        if len({len(widths) for widths in self.stage_widths}) != 1 or not front_widths:
            raise UserError("stages must have equally many widths, and the front a convolution")
        if len(depths) != len(self.stage_widths) or min(depths) < 1:
            raise UserError(f"depths {list(depths)} must give every stage a convolution")
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.num_routes, self.gate_outputs = len(self.stage_widths[0]), gate_outputs
        self.dropout = dropout

        inputs = (in_channels, *front_widths)
        self.stem = nn.ModuleList(
            ConvBlock((inputs[i],), (width,), 2 if i == 0 else 1, residual=False)
            for i, width in enumerate(front_widths)
        )
        self.gate = PooledGate(front_widths[-1], gate_hidden, gate_outputs)
        lists = ((front_widths[-1],), *self.stage_widths)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                ConvBlock(lists[s] if j == 0 else widths, widths, 2 if j == 0 else 1, j > 0)
                for j in range(depth)
            )
            for s, (widths, depth) in enumerate(zip(self.stage_widths, depths, strict=True))
        )
        self.classifier = make_classifier(self.stage_widths[-1][-1], num_classes)
        self.routing_space = default_space(self.num_routes, gate_outputs)
        init_official(self)
        nn.init.zeros_(self.gate.head.weight)

    def _blocks(self, route: RouteLike) -> list[tuple[ConvBlock, int]]:
        """(block, active width) of every gated convolution."""
        index = -1 if route == LARGEST else self.path(route)[0]
        return [
            (block, self.stage_widths[s][index])  # pyright: ignore[reportReturnType]
            for s, stage in enumerate(self.stages)
            for block in stage  # pyright: ignore[reportGeneralTypeIssues]
        ]

    def front(
        self,
        x: Float[Tensor, "batch colours height width"],
        largest: bool = False,
        maps: Maps | None = None,
    ) -> Front:
        """The front's convolutions and the moments of their output."""
        for block in self.stem:
            x = block(x, block.conv.out_channels)  # pyright: ignore[reportAttributeAccessIssue]
        if maps is not None:
            maps[2] = x
        return Front(x, self.gate.pool(x))

    def rest(
        self,
        features: Float[Tensor, "batch channels height width"],
        route: RouteLike,
        maps: Maps | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """The gated stages at one route's widths, pool and classifier."""
        x, stride = features, 2
        for block, width in self._blocks(route):
            x = block(x, width)
            stride *= block.stride
            if maps is not None:
                maps[stride] = x
        x = x.mean((2, 3))
        if self.training and route == LARGEST:
            x = F.dropout(x, self.dropout)
        return self.classifier(x)

    def masked_rest(
        self,
        features: Float[Tensor, "batch channels height width"],
        gate: Float[Tensor, "batch routes"],
        space: Sequence[int],
    ) -> Float[Tensor, "batch classes"]:
        """Dense run at the widest route of `space`, masked after every convolution and norm."""
        x = features
        for s, stage in enumerate(self.stages):
            for block in stage:  # pyright: ignore[reportGeneralTypeIssues]
                x = block.masked(x, gate, [self.stage_widths[s][k] for k in space])
        return self.classifier(x.mean((2, 3)))

    def gate_logits(
        self, gate_input: Float[Tensor, "batch pooled"], gate: int = 0
    ) -> Float[Tensor, "batch outputs"]:
        """The gate's multilayer perceptron."""
        return self.gate(gate_input)

    def gate_parameters(self) -> list[nn.Parameter]:
        """All parameters of the gate, the output weight last."""
        hidden, head = self.gate.hidden, self.gate.head
        return [hidden.weight, hidden.bias, head.bias, head.weight]  # pyright: ignore[reportReturnType]

    def route_widths(self, route: RouteLike) -> tuple[int, ...]:
        """Widths of the gated stages."""
        index = -1 if route == LARGEST else self.path(route)[0]
        return tuple(widths[index] for widths in self.stage_widths)

    def map_channels(self, route: RouteLike = LARGEST) -> dict[int, int]:
        """Widths by stride: the front's, then those of the stages."""
        widths = (self.stem[-1].conv.out_channels, *self.route_widths(route))  # pyright: ignore[reportAttributeAccessIssue]
        return {2 ** (s + 1): int(width) for s, width in enumerate(widths)}  # pyright: ignore[reportArgumentType]

    def madds(self, route: RouteLike, size: int | None = None) -> int:
        """Convolutions, the head's pool and the classifier; the gate is not counted."""
        side, channels, total = size or self.image_size, self.in_channels, 0
        stem = [(block, block.conv.out_channels) for block in self.stem]  # pyright: ignore[reportAttributeAccessIssue]
        for block, width in [*stem, *self._blocks(route)]:
            side = half(side, block.stride)  # pyright: ignore[reportArgumentType]
            total += 9 * channels * width * side**2
            channels = width
        return total + channels * side**2 + channels * self.num_classes

    def active_params(self, route: RouteLike) -> int:
        """Convolutions, affine pairs and classifier; the gate is not counted."""
        channels, total = self.in_channels, 0
        stem = [(block, block.conv.out_channels) for block in self.stem]  # pyright: ignore[reportAttributeAccessIssue]
        for _, width in [*stem, *self._blocks(route)]:
            total += 9 * channels * width + 2 * width
            channels = width
        return total + (channels + 1) * self.num_classes

    def materialize_front(self, largest: bool = False, fold_bn: bool = True) -> nn.Module:
        """Plain front and gate: image -> (features, gate logits)."""
        layers, channels = [], self.in_channels
        for block in self.stem:
            width = block.conv.out_channels  # pyright: ignore[reportAttributeAccessIssue]
            layers.append(block.materialize(channels, width, fold_bn))  # pyright: ignore[reportCallIssue]
            channels = width
        return PlainFront(nn.Sequential(*layers), self.gate.materialize()).eval()

    def materialize_rest(
        self, route: RouteLike, fold_bn: bool = True, share_storage: bool = False
    ) -> nn.Module:
        """Plain stages, pool and classifier: features -> class logits."""
        channels = self.stem[-1].conv.out_channels  # pyright: ignore[reportAttributeAccessIssue]
        layers: list[nn.Module] = []
        for block, width in self._blocks(self.check_route(route)):
            layers.append(block.materialize(channels, width, fold_bn))  # pyright: ignore[reportArgumentType]
            channels = width
        layers += [
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            self.classifier.materialize(channels, share_storage),  # pyright: ignore[reportArgumentType]
        ]
        return nn.Sequential(*layers).eval()


class PlainFront(nn.Module):
    """Convolutions and pooled gate: image -> (features, gate logits)."""

    def __init__(self, layers: nn.Module, gate: nn.Module) -> None:
        """Takes the plain front and its gate."""
        super().__init__()
        self.layers = layers
        self.gate = gate

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(features, gate logits)."""
        features = self.layers(x)
        return features, self.gate(moments(features))
