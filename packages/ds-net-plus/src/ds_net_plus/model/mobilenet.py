"""DS-MBNet: MobileNetV1 whose last two stages are slimmed per image (DS-Net section 4)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ds_net_plus.layers import (
    ConvAct,
    DSConv2d,
    DSDepthwiseSeparable,
    DSLinear,
    MultiHeadGate,
    SwitchableBN,
    check_widths,
    init_official,
    make_classifier,
)
from ds_net_plus.model.arguments import plain_arguments
from ds_net_plus.model.base import DynamicNet
from ds_net_plus.model.features import Maps
from ds_net_plus.model.routes import LARGEST, Front, RouteLike, default_space, half
from tenfold.errors import UserError


class DSStage(nn.Module):
    """Blocks of one resolution: the first changes stride and width, the others keep both."""

    def __init__(self, blocks: Sequence[DSDepthwiseSeparable]) -> None:
        """Takes the blocks in order."""
        super().__init__()
        self.first_block = blocks[0]
        self.residual_blocks = nn.ModuleList(blocks[1:])

    def blocks(self) -> list[DSDepthwiseSeparable]:
        """All blocks in order."""
        return [self.first_block, *self.residual_blocks]  # pyright: ignore[reportReturnType]


class DSMobileNet(DynamicNet):
    """Depthwise-separable network with routes of 14 widths in its last two stages.

    State-dict keys are those of the official release. Route c runs the stem and the stages before
    `gate_stage` at their first width and the others at their c-th; mode "largest" runs everything
    at its last width: the sandwich rule's wide net, never a route.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        stem_widths: Sequence[int] = (16, 24),
        stage_widths: Sequence[Sequence[int]] = (
            (32, 88),
            (48, 168),
            (96, 264),
            tuple(range(224, 641, 32)),
            tuple(range(736, 1153, 32)),
        ),
        depths: Sequence[int] = (1, 2, 2, 6, 2),
        strides: Sequence[int] = (1, 2, 2, 2, 2),
        stem_stride: int = 2,
        kernel_size: int = 3,
        route_kernels: Sequence[int] | None = None,
        gate_stage: int = 3,
        gate_outputs: int = 4,
        squeeze_ratio: float = 0.25,
        attention: str = "sigmoid",
        dropout: float = 0.2,
        in_channels: int = 3,
        image_size: int = 224,
    ) -> None:
        """Builds the network; the defaults are the released DS-MBNet.

        Args:
            num_classes: outputs of the classifier.
            stem_widths: ascending widths of the stem.
            stage_widths: ascending widths of every stage; the gated ones have equally many.
            depths: blocks of every stage.
            strides: stride of the first block of every stage.
            stem_stride: stride of the stem.
            kernel_size: of the stem and of the depthwise convolutions.
            route_kernels: kernel slicing (DS-Net++): the inner taps that depthwise convolutions use
                on each route, ascending; stem and front use the first. All taps where None.
            gate_stage: stage whose first block holds the gate; it and all later ones are gated.
            gate_outputs: routes among which the gate chooses.
            squeeze_ratio: squeeze width of the gates over their channels.
            attention: "sigmoid" (official) or "tanh1p".
            dropout: before the classifier, in training and mode "largest" only.
            in_channels: colours of the images.
            image_size: side of the images for which `routes` states costs.

        Raises:
            UserError: lists of unequal length, a bad width list, a gate outside the network.
        """
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = plain_arguments(config)
        self.name = "ds_mbnet"
        self.stem_widths = check_widths(stem_widths, "stem widths")
        self.stage_widths = tuple(
            check_widths(widths, f"widths of stage {s}") for s, widths in enumerate(stage_widths)
        )
        _check_layout(self.stage_widths, depths, strides, gate_stage)
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.kernel_size, self.stem_stride, self.strides = kernel_size, stem_stride, tuple(strides)
        self.gate_stage, self.gate_outputs = gate_stage, gate_outputs
        self.num_routes = len(self.stage_widths[gate_stage])
        self.route_kernels = _check_kernels(route_kernels, self.num_routes, kernel_size)
        self.dropout = dropout

        self.conv_stem = DSConv2d(in_channels, self.stem_widths[-1], kernel_size, stem_stride)
        self.bn1 = SwitchableBN(self.stem_widths)
        inputs = (self.stem_widths, *self.stage_widths)
        self.blocks = nn.ModuleList()
        for s, (widths, depth) in enumerate(zip(self.stage_widths, depths, strict=True)):
            self.blocks.append(
                DSStage(
                    [
                        DSDepthwiseSeparable(
                            inputs[s] if j == 0 else widths,
                            widths,
                            kernel_size,
                            strides[s] if j == 0 else 1,
                            squeeze_ratio,
                            gate_outputs if (s, j) == (gate_stage, 0) else 0,
                            attention,
                        )
                        for j in range(depth)
                    ]
                )
            )
        self.classifier = make_classifier(self.stage_widths[-1][-1], num_classes)
        self.routing_space = default_space(self.num_routes, gate_outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Official initialisation; the slimming head starts at zero, as untrained."""
        init_official(self)
        for layer in self.modules():
            if isinstance(layer, MultiHeadGate):
                layer.reset_attention()
        if isinstance(self.classifier, DSLinear):
            bound = 1 / math.sqrt(self.num_classes)
            nn.init.uniform_(self.classifier.weight, -bound, bound)
            nn.init.zeros_(self.classifier.bias)
        nn.init.zeros_(self.gate_parameters()[-1])

    def _stage(self, s: int) -> list[DSDepthwiseSeparable]:
        return self.blocks[s].blocks()  # pyright: ignore[reportCallIssue]

    def _widths(self, route: RouteLike) -> list[int]:
        """Active width of the stem and of every stage."""
        lists = (self.stem_widths, *self.stage_widths)
        if route == LARGEST:
            return [widths[-1] for widths in lists]
        return [
            widths[self.path(route)[0]] if s > self.gate_stage else widths[0]
            for s, widths in enumerate(lists)
        ]

    def _kernels(self, route: RouteLike) -> tuple[int, int]:
        """Active kernel of the front and of what follows it."""
        if route == LARGEST:
            return self.kernel_size, self.kernel_size
        return self.route_kernels[0], self.route_kernels[self.path(route)[0]]

    @property
    def _gate_block(self) -> DSDepthwiseSeparable:
        return self._stage(self.gate_stage)[0]

    def _front_blocks(self) -> list[tuple[int, DSDepthwiseSeparable]]:
        return [(s, block) for s in range(self.gate_stage) for block in self._stage(s)]

    def _gated_blocks(self) -> list[tuple[int, DSDepthwiseSeparable]]:
        """(stage, block) after the gate block."""
        blocks = [
            (s, block)
            for s in range(self.gate_stage, len(self.stage_widths))
            for block in self._stage(s)
        ]
        return blocks[1:]

    def front(
        self,
        x: Float[Tensor, "batch colours height width"],
        largest: bool = False,
        maps: Maps | None = None,
    ) -> Front:
        """Stem, stages before the gate, and the gate block up to its attention."""
        widths, (kernel, _) = self._widths(route := LARGEST if largest else 0), self._kernels(route)
        x = F.silu(self.bn1(self.conv_stem(x, widths[0], kernel)))
        for s, block in self._front_blocks():
            x = block(x, widths[s + 1], kernel)
            if maps is not None:
                maps[self._stride(s)] = x
        x = self._gate_block.depthwise(x, kernel)
        gate = self._gate_block.gate
        hidden = gate.squeeze(x)
        return Front(gate.rescale(x, gate.excite(hidden, x.shape[1])), hidden)

    def rest(
        self,
        features: Float[Tensor, "batch channels height width"],
        route: RouteLike,
        maps: Maps | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """The gate block's pointwise half, the later blocks and the classifier."""
        widths, (_, kernel) = self._widths(route), self._kernels(route)
        x = self._gate_block.pointwise(features, widths[self.gate_stage + 1])
        if maps is not None:
            maps[self._stride(self.gate_stage)] = x
        for s, block in self._gated_blocks():
            x = block(x, widths[s + 1], kernel)
            if maps is not None:
                maps[self._stride(s)] = x
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
        """Dense run at the widest route of `space`, masked after every routed layer."""
        lists = [[self._widths(k)[s + 1] for k in space] for s in range(len(self.stage_widths))]
        x = self._gate_block.masked_pointwise(features, gate, lists[self.gate_stage])
        current, kernels = lists[self.gate_stage], [self._kernels(k)[1] for k in space]
        for s, block in self._gated_blocks():
            x = block.masked(x, gate, current, lists[s], kernels)
            current = lists[s]
        return self.classifier(x.mean((2, 3)))

    def gate_logits(
        self, gate_input: Float[Tensor, "batch hidden"], gate: int = 0
    ) -> Float[Tensor, "batch outputs"]:
        """W3 h."""
        return self._gate_block.gate.logits(gate_input)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The slimming head's one weight."""
        head = self._gate_block.gate.gate
        assert head is not None
        return list(head.parameters())

    def route_widths(self, route: RouteLike) -> tuple[int, ...]:
        """Widths of the gated stages."""
        return tuple(self._widths(route)[self.gate_stage + 1 :])

    def _stride(self, s: int) -> int:
        """Stride of a stage's output."""
        return self.stem_stride * math.prod(self.strides[: s + 1])

    def map_channels(self, route: RouteLike = LARGEST) -> dict[int, int]:
        """Widths by stride, of the last stage that has it."""
        widths = self._widths(route)[1:]
        return {self._stride(s): width for s, width in enumerate(widths)}

    def _walk(self, route: RouteLike) -> list[tuple[DSDepthwiseSeparable, int, int, int]]:
        """(block, its stride, output width, active taps of its depthwise convolution)."""
        widths, (first, second), walk = self._widths(route), self._kernels(route), []
        for s in range(len(self.stage_widths)):
            for j, block in enumerate(self._stage(s)):
                in_front = s < self.gate_stage or (s, j) == (self.gate_stage, 0)
                taps = (first if in_front else second) ** 2
                walk.append((block, self.strides[s] if j == 0 else 1, widths[s + 1], taps))
        return walk

    def madds(self, route: RouteLike, size: int | None = None) -> int:
        """Closed form: stem, and for each block dw, SE pool, SE, pw; head pool and classifier."""
        channels, side = self._widths(route)[0], half(size or self.image_size, self.stem_stride)
        total = self._kernels(route)[0] ** 2 * self.in_channels * channels * side**2
        for block, stride, out, taps in self._walk(route):
            side, hidden = half(side, stride), block.gate.conv_reduce.out_channels
            total += (taps + 1) * channels * side**2 + 2 * channels * hidden
            total += channels * out * side**2
            channels = out
        return total + channels * side**2 + channels * self.num_classes

    def active_params(self, route: RouteLike) -> int:
        """Weights, biases and affine pairs inside the route's prefixes."""
        channels = self._widths(route)[0]
        total = self._kernels(route)[0] ** 2 * self.in_channels * channels + 2 * channels
        for block, _, out, taps in self._walk(route):
            hidden = block.gate.conv_reduce.out_channels
            total += taps * channels + 2 * channels + channels * out + 2 * out
            total += 2 * channels * hidden + hidden + channels
            channels = out
        return total + (channels + 1) * self.num_classes

    def materialize_front(self, largest: bool = False, fold_bn: bool = True) -> nn.Module:
        """Plain stem, blocks and gate: image -> (features, gate logits)."""
        widths, (kernel, _) = self._widths(route := LARGEST if largest else 0), self._kernels(route)
        stem = ConvAct(
            self.conv_stem.materialize(self.in_channels, widths[0], kernel),
            self.bn1.materialize(widths[0]),
            fold_bn=fold_bn,
        )
        layers: list[nn.Module] = [stem]
        channels = widths[0]
        for s, block in self._front_blocks():
            layers.append(block.materialize(channels, widths[s + 1], fold_bn, kernel))
            channels = widths[s + 1]
        layers.append(self._gate_block.materialize_depthwise(channels, fold_bn, kernel))
        layers.append(self._gate_block.gate.materialize(channels, slimming=True))
        return nn.Sequential(*layers).eval()

    def materialize_rest(
        self, route: RouteLike, fold_bn: bool = True, share_storage: bool = False
    ) -> nn.Module:
        """Plain blocks after the gate, pool and classifier: features -> class logits."""
        route = self.check_route(route)
        widths, (_, kernel) = self._widths(route), self._kernels(route)
        channels = widths[self.gate_stage + 1]
        layers: list[nn.Module] = [
            self._gate_block.materialize_pointwise(widths[self.gate_stage], channels, fold_bn)
        ]
        for s, block in self._gated_blocks():
            layers.append(block.materialize(channels, widths[s + 1], fold_bn, kernel))
            channels = widths[s + 1]
        layers += [
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            self.classifier.materialize(channels, share_storage),
        ]
        return nn.Sequential(*layers).eval()


def _check_kernels(kernels: Sequence[int] | None, num_routes: int, largest: int) -> tuple[int, ...]:
    """Kernel of every route, each the centre of the next one's and of the largest."""
    kernels = (largest,) * num_routes if kernels is None else tuple(kernels)
    ascending = all(low <= high for low, high in pairwise(kernels))
    centred = all(0 < kernel <= largest and (largest - kernel) % 2 == 0 for kernel in kernels)
    if len(kernels) != num_routes or not ascending or not centred:
        raise UserError(
            f"route_kernels {list(kernels)} must be {num_routes} ascending kernels in the centre "
            f"of {largest} x {largest}"
        )
    return kernels


def _check_layout(
    stage_widths: Sequence[Sequence[int]],
    depths: Sequence[int],
    strides: Sequence[int],
    gate_stage: int,
) -> None:
    if not len(stage_widths) == len(depths) == len(strides):
        raise UserError(
            f"stage_widths, depths and strides must be equally long, got {len(stage_widths)}, "
            f"{len(depths)} and {len(strides)}"
        )
    if not 0 <= gate_stage < len(stage_widths):
        raise UserError(f"gate_stage {gate_stage} must be one of 0..{len(stage_widths) - 1}")
    if any(depth < 1 for depth in depths):
        raise UserError(f"every stage needs a block, got depths {list(depths)}")
    gated = stage_widths[gate_stage:]
    if any(len(low) != len(high) for low, high in pairwise(gated)):
        raise UserError(
            "stages from the gate on must have equally many widths, got "
            f"{[len(widths) for widths in gated]}"
        )
    if len(gated[0]) < 2:
        raise UserError("the gated stages need two widths or more, or there is nothing to choose")
