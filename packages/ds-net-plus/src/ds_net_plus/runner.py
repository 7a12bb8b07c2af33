"""Grouped execution on materialised routes: the fast way to run a trained network."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ds_net_plus.fused import fuse
from ds_net_plus.model import (
    LARGEST,
    DynamicNet,
    DynamicOutput,
    PlainRoute,
    RouteLike,
    check_statistics,
)
from ds_net_plus.model.grouping import Decide
from tenfold.errors import UserError

CHUNK_PIXELS = 4 * 224 * 224
"""Pixels that the front takes at a time on a CPU; measured: 1.7 times faster than all of 32."""


class ChunkedFront(nn.Module):
    """A front that takes a few images at a time on a CPU, where memory is its bottleneck.

    Its activations at high resolution then stay in the cache, and the allocator reuses their
    blocks instead of asking the system for fresh pages.
    """

    def __init__(self, front: nn.Module) -> None:
        """Takes the plain front."""
        super().__init__()
        self.front = front

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(features, gate logits)."""
        count = max(1, CHUNK_PIXELS // (x.shape[-1] * x.shape[-2]))
        if x.device.type != "cpu" or len(x) <= count:
            return self.front(x)
        features, logits = zip(*map(self.front, x.split(count)), strict=True)
        return torch.cat(features), torch.cat(logits)


def fast_route(net: DynamicNet, route: RouteLike) -> nn.Module:
    """A static route prepared as `DynamicRunner` prepares its parts, to compare with it fairly."""
    plain = PlainRoute(
        ChunkedFront(net.materialize_front(largest=route == LARGEST)), net.materialize_rest(route)
    )
    return prepare(plain)


def prepare(module: nn.Module, memory_format: torch.memory_format = torch.channels_last) -> Any:
    """A plain network for inference: frozen, in that memory format, its layers fused on a CPU."""
    module = module.to(memory_format=memory_format).requires_grad_(False).eval()  # pyright: ignore[reportCallIssue]
    return fuse(module)


class DynamicRunner:
    """Runs each image on the route its gate chooses, as plain networks on groups of images.

    One shared front; for each gate one transfer from device to host and one call for each route in
    use. The plain networks have their batch norms folded and contiguous weights; they are built
    once and do not follow later changes of the model.

    Example:
        >>> runner = DynamicRunner(model.eval(), tau=0.1)
        >>> logits, routes, madds = runner(images)
    """

    def __init__(
        self,
        model: DynamicNet,
        routes: Sequence[int] | None = None,
        tau: float = 0.0,
        compile: bool = False,
        memory_format: torch.memory_format = torch.channels_last,
        share_storage: bool = False,
    ) -> None:
        """Materialises front and routes.

        Args:
            model: a network with a trained gate.
            routes: subset of the routing space that the gate may use; all of it where None.
            tau: price of compute in the gate's decision.
            compile: compile every part; slow to start, fixed batch sizes.
            memory_format: of images, features and weights.
            share_storage: linear layers stay views of the model's weights, which saves memory and
                costs nothing; convolutions are copied.

        Raises:
            UserError: the gate is untrained, a route outside the routing space, or routes whose
                batch-norm statistics were never measured.
        """
        model.check_gate()
        self.model, self.tau, self.memory_format = model, tau, memory_format
        self.routes = model.routing_space if routes is None else tuple(sorted(set(routes)))
        if not self.routes or not set(self.routes) <= set(model.routing_space):
            raise UserError(
                f"routes {list(self.routes)} are not of the routing space",
                fix=f"choose from {list(model.routing_space)}",
            )
        check_statistics(model, self.routes)
        self.compile, self.share_storage = compile, share_storage
        self.front = ChunkedFront(self._ready(model.materialize_front()))
        self.parts: dict[tuple[str, int, int | None, int], Any] = {}
        for gate in range(model.num_gates):
            for route in self.routes:
                self._part(("stage", gate, None, route))

    def _ready(self, module: nn.Module) -> Any:
        if not self.compile:
            return prepare(module, self.memory_format)
        module = module.to(memory_format=self.memory_format).requires_grad_(False).eval()  # pyright: ignore[reportCallIssue]
        return torch.compile(module, dynamic=False)  # fuses by itself

    @torch.inference_mode()
    def __call__(self, x: Float[Tensor, "batch colours height width"]) -> DynamicOutput:
        """Class logits, route and MAdds of every image, in the order of the batch.

        Raises:
            UserError: an image whose gate logits are not finite.
        """
        size = x.shape[-1]
        features, gate_logits = self.front(x.contiguous(memory_format=self.memory_format))

        def decide(logits: Tensor, gate: int) -> Tensor:
            return self.model.decide(logits, self.tau, size, self.routes)

        return self.run(features, gate_logits, decide, size)

    def run(
        self, features: Tensor, gate_logits: Tensor, decide: Decide, size: int
    ) -> DynamicOutput:
        """The part behind the front, with decisions of any origin.

        Args:
            features: the plain front's.
            gate_logits: the first gate's.
            decide: (gate logits, gate) -> positions in the routing space, on the host.
            size: image side that costs are stated for.
        """
        return self.model.dispatch(
            features, gate_logits, decide, enter=self._enter, stage=self._stage, size=size
        )

    def _enter(self, x: Tensor, gate: int, before: int | None, route: int) -> Tensor:
        return self._part(("enter", gate, before, route))(x)

    def _stage(
        self, x: Tensor, gate: int, route: int, index: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        outputs = self._part(("stage", gate, None, route))(x)
        return outputs if isinstance(outputs, tuple) else (outputs, None)

    def _part(self, key: tuple[str, int, int | None, int]) -> Any:
        """A plain part, built when it is first needed: few of all pairs of routes ever are."""
        if key not in self.parts:
            kind, gate, before, route = key
            module = (
                self.model.materialize_enter(gate, before, route)
                if kind == "enter"
                else self.model.materialize_stage(gate, route, share_storage=self.share_storage)
            )
            self.parts[key] = self._ready(module)
        return self.parts[key]
