"""DS-ResNet: bottleneck ResNets whose stages are slimmed per image, a gate for each of them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ds_net_plus.layers import (
    DSBottleneck,
    DSConv2d,
    MultiHeadGate,
    check_widths,
    init_official,
    make_classifier,
)
from ds_net_plus.layers.bottleneck import (
    EXPANSION,
    PlainInBlockGate,
    PlainJoin,
    PlainPath,
    make_norm,
    plain_layer,
)
from ds_net_plus.model.arguments import plain_arguments
from ds_net_plus.model.base import DynamicNet
from ds_net_plus.model.features import Maps
from ds_net_plus.model.routes import LARGEST, Front, RouteLike, default_space, half
from tenfold.errors import UserError

POSITIONS = ("stage", "in_block")
STEMS = ("imagenet", "small")


class DSResNet(DynamicNet):
    """Bottleneck ResNet with a gate in front of every stage, of some, or one behind the first.

    Each gate sets the width of what follows up to the next one: middle width rho * base, four times
    as many outputs. With group norm of fixed group size (the default of several gates) weights
    serve every path; batch norm keeps statistics for each width of a layer, whatever came before.
    A gate reads the stage's input, rescales it and decides; at position "in_block" (as in DS-MBNet)
    it sits behind the second convolution of the stage's first block, which still has the width
    index of the stage before.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 4, 6, 3),
        base_widths: Sequence[int] = (64, 128, 256, 512),
        rhos: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        gates: int | Sequence[int] = 4,
        norm: str | None = None,
        group_size: int = 16,
        gate_position: str = "stage",
        front_rho: float = 1.0,
        stem: str = "imagenet",
        stem_width: int = 64,
        gate_outputs: int = 4,
        squeeze_ratio: float = 0.25,
        attention: str = "tanh1p",
        in_channels: int = 3,
        image_size: int = 224,
    ) -> None:
        """Builds the network; the defaults are DS-ResNet-50.

        Args:
            num_classes: outputs of the classifier.
            depths: blocks of every stage.
            base_widths: middle width of every stage at rho 1.
            rhos: ascending slimming ratios, the same for every stage.
            gates: one for each stage, or 1 (behind the first stage), or the stages that have a gate
                in front of them, such as (1, 3); stages before the first gate have one width.
            norm: "gn" or "bn"; "gn" with several gates and "bn" with one where None.
            group_size: channels of a group of "gn".
            gate_position: "stage" or "in_block".
            front_rho: of the stages in front of the first gate.
            stem: "imagenet" (7x7 of stride 2 and a pool of stride 2) or "small" (3x3, stride 1).
            stem_width: channels of the stem.
            gate_outputs: routes among which every gate chooses.
            squeeze_ratio: squeeze width of the gates over their channels.
            attention: "tanh1p" (starts as the identity) or "sigmoid".
            in_channels: colours of the images.
            image_size: side of the images for which `routes` states costs.

        Raises:
            UserError: an option that does not exist, lists of unequal length, another number of
                gates, or widths that the norm cannot take.
        """
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = plain_arguments(config)
        self.name = "ds_resnet50"
        _check_options(depths, base_widths, rhos, norm, gate_position, stem)
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        starts = _gated_stages(gates, len(depths))
        self.num_routes, self.num_gates, self.gate_outputs = len(rhos), len(starts), gate_outputs
        self.gate_position, self.stem_width, self.small = gate_position, stem_width, stem == "small"
        self.mid_widths = tuple(
            check_widths(
                _slimmed(base, (front_rho,) if s < starts[0] else rhos),
                f"middle widths of stage {s}",
            )
            for s, base in enumerate(base_widths)
        )
        # stages behind each gate; those in front of the first one have one width
        ends = (*starts[1:], len(depths))
        self.segments = [list(range(a, b)) for a, b in zip(starts, ends, strict=True)]

        kind = norm or ("gn" if len(starts) > 1 else "bn")
        self.conv1 = DSConv2d(in_channels, stem_width, *((3, 1) if self.small else (7, 2)))
        self.bn1 = make_norm((stem_width,), kind, group_size)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                DSBottleneck(
                    self._in_widths(s) if j == 0 else self._out_widths(s),
                    self.mid_widths[s],
                    2 if j == 0 and s > 0 else 1,
                    projected=j == 0,
                    norm=kind,
                    group_size=group_size,
                )
                for j in range(depth)
            )
            for s, depth in enumerate(depths)
        )
        self.gates = nn.ModuleList(
            MultiHeadGate(self._gate_widths(g)[-1], gate_outputs, squeeze_ratio, attention)
            for g in range(len(starts))
        )
        self.classifier = make_classifier(self._out_widths(len(depths) - 1)[-1], num_classes)
        self.routing_space = default_space(self.num_routes, gate_outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's initialisation, residual branches at zero; the slimming heads at zero."""
        init_official(self)
        for stage in self.stages:
            for block in stage:  # pyright: ignore[reportGeneralTypeIssues]
                last = block.bn3 if hasattr(block.bn3, "group_size") else block.bn3.aux_bn[-1]
                nn.init.zeros_(last.weight)
        for gate in self.gates:
            gate.reset_attention()  # pyright: ignore[reportCallIssue]
        for head in self.gate_heads():
            nn.init.zeros_(head)

    def _in_widths(self, s: int) -> tuple[int, ...]:
        return (self.stem_width,) if s == 0 else self._out_widths(s - 1)

    def _out_widths(self, s: int) -> tuple[int, ...]:
        return tuple(EXPANSION * width for width in self.mid_widths[s])

    def _mid(self, s: int, k: int) -> int:
        """Middle width of a stage at index k, the only one of a fixed stage."""
        widths = self.mid_widths[s]
        return widths[min(k, len(widths) - 1)]

    def _in(self, s: int, k: int) -> int:
        """Input width of a stage behind one of index k."""
        return self.stem_width if s == 0 else EXPANSION * self._mid(s - 1, k)

    def _gate_widths(self, gate: int) -> tuple[int, ...]:
        """Widths that a gate may read."""
        s = self.segments[gate][0]
        return self.mid_widths[s] if self.gate_position == "in_block" else self._in_widths(s)

    def _blocks(self, s: int) -> list[DSBottleneck]:
        return list(self.stages[s])  # pyright: ignore[reportArgumentType]

    def _first(self, gate: int) -> tuple[int, DSBottleneck]:
        s = self.segments[gate][0]
        return s, self._blocks(s)[0]

    def _stride(self, s: int) -> int:
        """Stride of a stage's output."""
        return (1 if self.small else 4) * 2**s

    def front(
        self,
        x: Float[Tensor, "batch colours height width"],
        largest: bool = False,
        maps: Maps | None = None,
    ) -> Front:
        """Stem, the stages in front of the first gate, and this gate's attention."""
        x = F.relu(self.bn1(self.conv1(x, self.stem_width)))
        if not self.small:
            x = F.max_pool2d(x, 3, 2, 1)
        for s in range(self.segments[0][0]):
            for block in self._blocks(s):
                x = block(x, self._mid(s, 0))
            if maps is not None:
                maps[self._stride(s)] = x
        return self._to_gate(0, x, self.num_routes - 1 if largest else 0)

    def _to_gate(self, gate: int, x: Tensor, before: int) -> Front:
        """What a gate reads and rescales, behind a stage of index `before`."""
        head: MultiHeadGate = self.gates[gate]  # pyright: ignore[reportAssignmentType]
        s, block = self._first(gate)
        y = block.inner(x, self._mid(s, before)) if self.gate_position == "in_block" else x
        hidden = head.squeeze(y)
        y = head.rescale(y, head.excite(hidden, y.shape[1]))
        if self.gate_position == "in_block":  # the sum needs the block's input, too
            y = torch.cat([y, x[:, :, :: block.stride, :: block.stride]], 1)
        return Front(y, hidden)

    def _split(self, gate: int, width: int) -> int:
        """Channels of the gate's own map, among `width` with those of the block's input."""
        s, _ = self._first(gate)
        for k, mid in enumerate(self.mid_widths[s]):
            if mid + self._in(s, k) == width:
                return mid
        raise ValueError(f"no index of stage {s} has {width} channels at its gate")

    def enter(
        self, features: Float[Tensor, "batch channels height width"], gate: int, route: int
    ) -> Float[Tensor, "batch out height2 width2"]:
        """The first block of the first stage behind a gate."""
        s, block = self._first(gate)
        mid = self._mid(s, route)
        if self.gate_position == "stage":
            return block(features, mid)
        at = self._split(gate, features.shape[1])
        return block.outer(features[:, :at], features[:, at:], mid, stride=1)

    def stage(
        self,
        features: Float[Tensor, "batch channels height width"],
        gate: int,
        route: int,
        maps: Maps | None = None,
    ) -> Front:
        """The later blocks up to the next gate's attention, or to the class logits."""
        x = features
        for j, s in enumerate(self.segments[gate]):
            for block in self._blocks(s)[1 if j == 0 else 0 :]:
                x = block(x, self._mid(s, route))
            if maps is not None:
                maps[self._stride(s)] = x
        return self._hand_on(x, gate, route)

    def _hand_on(self, x: Tensor, gate: int, route: int) -> Front:
        if gate + 1 < self.num_gates:
            return self._to_gate(gate + 1, x, route)
        return Front(self.classifier(x.mean((2, 3))), x.new_empty(len(x), 0))

    def rest(
        self,
        features: Float[Tensor, "batch channels height width"],
        route: RouteLike,
        maps: Maps | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """All stages behind the first gate along one path."""
        for gate, k in enumerate(self.path(route)):
            features, _ = self.stage(self.enter(features, gate, k), gate, k, maps)
        return features

    def masked_stage(
        self,
        features: Float[Tensor, "batch channels height width"],
        gate: int,
        choice: Float[Tensor, "batch routes"],
        space: Sequence[int],
    ) -> Front:
        """Blocks at the widest route of `space`, masked after every convolution and norm.

        Raises:
            UserError: a gate in the block, whose input has two widths.
        """
        if not self.maskable:
            raise UserError(
                "the mask estimator needs gates in front of the stages",
                fix="use the mixture estimator, or gate_position stage",
            )
        x = features
        for s in self.segments[gate]:
            for block in self._blocks(s):
                x = block.masked(x, choice, [self._mid(s, k) for k in space])
        return self._hand_on(x, gate, space[-1])

    def masked_rest(
        self,
        features: Float[Tensor, "batch channels height width"],
        gate: Float[Tensor, "batch routes"],
        space: Sequence[int],
    ) -> Float[Tensor, "batch classes"]:
        """The same choice at every gate."""
        for number in range(self.num_gates):
            features, _ = self.masked_stage(features, number, gate, space)
        return features

    @property
    def maskable(self) -> bool:
        """Not with a gate in the block."""
        return self.gate_position == "stage"

    def widen(self, features: Tensor, gate: int) -> Tensor:
        """Zero channels up to the widest features in front of a gate."""
        if gate == self.num_gates:
            return features
        s, _ = self._first(gate)
        if self.gate_position == "stage":
            return _pad(features, self._in_widths(s)[-1])
        at = self._split(gate, features.shape[1])
        parts = (
            (features[:, :at], self.mid_widths[s][-1]),
            (features[:, at:], self._in_widths(s)[-1]),
        )
        return torch.cat([_pad(part, width) for part, width in parts], 1)

    def gate_logits(
        self, gate_input: Float[Tensor, "batch hidden"], gate: int = 0
    ) -> Float[Tensor, "batch outputs"]:
        """W3 h of one gate."""
        return self.gates[gate].logits(gate_input)  # pyright: ignore[reportCallIssue]

    def gate_sizes(self) -> list[int]:
        """Squeeze width of every gate."""
        return [gate.conv_reduce.out_channels for gate in self.gates]  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]

    def gate_parameters(self) -> list[nn.Parameter]:
        """The slimming heads' weights."""
        return [p for gate in self.gates for p in gate.gate.parameters()]  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]

    def gate_heads(self) -> list[nn.Parameter]:
        """All of them are output layers."""
        return self.gate_parameters()

    def route_widths(self, route: RouteLike) -> tuple[int, ...]:
        """Middle widths of the gated stages."""
        path = self.path(route)
        return tuple(
            self._mid(s, k) for stages, k in zip(self.segments, path, strict=True) for s in stages
        )

    def map_channels(self, route: RouteLike = LARGEST) -> dict[int, int]:
        """Output widths of the stages by stride."""
        path = zip(self.segments, self.path(route), strict=True)
        index = {s: k for stages, k in path for s in stages}
        return {
            self._stride(s): EXPANSION * self._mid(s, index.get(s, 0))
            for s in range(len(self.stages))
        }

    def _walk(self, route: RouteLike) -> list[tuple[DSBottleneck, int, int, int]]:
        """(block, input width, width of its first two convolutions, middle width) of every block.

        The first two widths differ behind a gate in the block.
        """
        path, walk = self.path(route), []
        index = {s: k for stages, k in zip(self.segments, path, strict=True) for s in stages}
        before = self.num_routes - 1 if route == LARGEST else 0
        for s in range(len(self.stages)):
            k = index.get(s, 0)
            for j, block in enumerate(self._blocks(s)):
                gated = j == 0 and any(s == stages[0] for stages in self.segments)
                inner = before if gated and self.gate_position == "in_block" else k
                in_ = self._in(s, before) if j == 0 else EXPANSION * self._mid(s, k)
                walk.append((block, in_, self._mid(s, inner), self._mid(s, k)))
            before = k if s in index else before
        return walk

    def madds(self, route: RouteLike, size: int | None = None) -> int:
        """Convolutions and classifier; pools and gates are not counted (under 0.05 %)."""
        size = size or self.image_size
        side = size if self.small else half(size, 2)
        kernel = 9 if self.small else 49
        total = kernel * self.in_channels * self.stem_width * side**2
        side, out = side if self.small else half(side, 2), 0
        for block, in_, inner, mid in self._walk(route):
            total += block.madds(in_, inner, mid, side)
            side, out = half(side, block.stride), EXPANSION * mid
        return total + out * self.num_classes

    def active_params(self, route: RouteLike) -> int:
        """Convolutions, affine pairs and classifier; the gates are not counted."""
        total, out = ((9 if self.small else 49) * self.in_channels + 2) * self.stem_width, 0
        for block, in_, inner, mid in self._walk(route):
            total += block.params(in_, inner, mid)
            out = EXPANSION * mid
        return total + (out + 1) * self.num_classes

    def materialize_front(self, largest: bool = False, fold_bn: bool = True) -> nn.Module:
        """Plain stem, fixed stages and first gate: image -> (features, gate logits)."""
        layers: list[nn.Module] = [
            plain_layer(self.conv1, self.bn1, self.in_channels, self.stem_width, fold_bn, "relu")
        ]
        if not self.small:
            layers.append(nn.MaxPool2d(3, 2, 1))
        for s in range(self.segments[0][0]):
            mid = self._mid(s, 0)
            for j, block in enumerate(self._blocks(s)):
                in_ = self._in(s, 0) if j == 0 else EXPANSION * mid
                layers.append(block.materialize(in_, mid, fold_bn))
        layers.append(self._plain_gate(0, self.num_routes - 1 if largest else 0, fold_bn))
        return nn.Sequential(*layers).eval()

    def _plain_gate(self, gate: int, before: int, fold_bn: bool, own: bool = True) -> nn.Module:
        """The gate; `own`: its input is nobody else's, so that it may be overwritten."""
        s, block = self._first(gate)
        head: MultiHeadGate = self.gates[gate]  # pyright: ignore[reportAssignmentType]
        if self.gate_position == "stage":
            return head.materialize(self._in(s, before), slimming=True, inplace=own)
        mid = self._mid(s, before)
        inner = block.materialize_inner(self._in(s, before), mid, fold_bn)
        return PlainInBlockGate(inner, head.materialize(mid, slimming=True), block.stride)

    def materialize_enter(
        self, gate: int, before: int | None, route: int, fold_bn: bool = True
    ) -> nn.Module:
        """Plain first block behind a gate, for the index `before` of the last stage."""
        s, block = self._first(gate)
        from_, mid = before or 0, self._mid(s, route)
        in_ = self._in(s, from_)
        if self.gate_position == "stage":
            return block.materialize(in_, mid, fold_bn).eval()
        own = self._mid(s, from_)
        last, projection = block.materialize_outer(in_, own, mid, fold_bn, stride=1)
        return PlainJoin(own, last, projection).eval()

    def materialize_stage(
        self, gate: int, route: int, fold_bn: bool = True, share_storage: bool = False
    ) -> nn.Module:
        """Plain later blocks and the next gate: features -> (features, gate logits), or logits."""
        layers: list[nn.Module] = []
        for j, s in enumerate(self.segments[gate]):
            mid = self._mid(s, route)
            for n, block in enumerate(self._blocks(s)):
                if (j, n) != (0, 0):
                    in_ = self._in(s, route) if n == 0 else EXPANSION * mid
                    layers.append(block.materialize(in_, mid, fold_bn))
        if gate + 1 < self.num_gates:
            layers.append(self._plain_gate(gate + 1, route, fold_bn, own=bool(layers)))
        else:
            width = EXPANSION * self._mid(len(self.stages) - 1, route)
            head = self.classifier.materialize(width, share_storage)
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), head]
        return nn.Sequential(*layers).eval()

    def materialize_rest(
        self, route: RouteLike, fold_bn: bool = True, share_storage: bool = False
    ) -> nn.Module:
        """Plain path behind the first gate: features -> class logits."""
        before = self.num_routes - 1 if route == LARGEST else 0
        parts = []
        for gate, k in enumerate(self.path(self.check_route(route))):
            parts.append(self.materialize_enter(gate, before, k, fold_bn))
            parts.append(self.materialize_stage(gate, k, fold_bn, share_storage))
            before = k
        return PlainPath(parts).eval()


def _slimmed(base: int, rhos: Sequence[float]) -> list[int]:
    """Middle widths, rho * base to a multiple of 8, at least 8."""
    return [max(8, round(rho * base / 8) * 8) for rho in rhos]


def _pad(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, width - x.shape[1]))


def _gated_stages(gates: int | Sequence[int], stages: int) -> tuple[int, ...]:
    """The stages in front of which gates sit."""
    known: dict[int, tuple[int, ...]] = {stages: tuple(range(stages)), 1: (1,)}
    starts = known.get(gates, ()) if isinstance(gates, int) else tuple(gates)
    whole = all(isinstance(s, int) and 0 <= s < stages for s in starts)
    if not starts or not whole or any(low >= high for low, high in pairwise(starts)):
        raise UserError(
            f"gates must be 1, {stages} (one for each stage), or ascending stages of "
            f"0..{stages - 1}, got {gates}"
        )
    return starts


def _check_options(
    depths: Sequence[int],
    base_widths: Sequence[int],
    rhos: Sequence[float],
    norm: str | None,
    gate_position: str,
    stem: str,
) -> None:
    if len(depths) != len(base_widths) or len(depths) < 2 or min(depths) < 1:
        raise UserError(
            f"depths {list(depths)} and base_widths {list(base_widths)} must give two or more "
            "stages a block"
        )
    if len(rhos) < 2:
        raise UserError("there must be two rhos or more, or there is nothing to choose")
    for name, value, allowed in (
        ("norm", norm, ("gn", "bn", None)),
        ("gate_position", gate_position, POSITIONS),
        ("stem", stem, STEMS),
    ):
        if value not in allowed:
            known = ", ".join(str(a) for a in allowed if a)
            raise UserError(f"{name} must be one of {known}, got {value!r}")
