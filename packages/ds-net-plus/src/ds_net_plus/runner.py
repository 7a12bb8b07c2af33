"""Grouped execution on materialised routes: the fast way to run a trained network."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ds_net_plus.fused import fuse
from ds_net_plus.graphs import GraphedNetwork
from ds_net_plus.model import (
    LARGEST,
    DynamicNet,
    DynamicOutput,
    PlainRoute,
    RouteLike,
    check_statistics,
    tau_for_budget,
)
from ds_net_plus.model.grouping import Decide
from ds_net_plus.model.routes import check_choice
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


def fast_route(net: DynamicNet, route: RouteLike) -> Any:
    """A static route prepared as `DynamicRunner` prepares its parts, to compare with it fairly."""
    plain = PlainRoute(
        ChunkedFront(net.materialize_front(largest=route == LARGEST)), net.materialize_rest(route)
    )
    ready = prepare(plain)
    return GraphedNetwork(ready) if next(net.parameters()).device.type == "cuda" else ready


def prepare(module: nn.Module, memory_format: torch.memory_format = torch.channels_last) -> Any:
    """A plain network for inference: frozen, in that memory format, its layers fused on a CPU."""
    module = module.to(memory_format=memory_format).requires_grad_(False).eval()  # pyright: ignore[reportCallIssue]
    return fuse(module)


class _Launched(NamedTuple):
    """A batch whose front has been launched."""

    features: Tensor
    gate_logits: Tensor
    choice: Tensor  # on the host, complete once `arrived` is over
    arrived: Any
    size: int


class DynamicRunner:
    """Runs each image on the route its gate chooses, as plain networks on groups of images.

    One shared front; for each gate one transfer from device to host and one call for each route in
    use. The plain networks have their batch norms folded and contiguous weights; they are built
    once and do not follow later changes of the model. On a GPU they run as CUDA graphs.

    Example:
        >>> runner = DynamicRunner(model.eval(), tau=0.1)
        >>> logits, routes, madds = runner(images)
        >>> for logits, routes, madds in runner.map(loader):  # the next front runs ahead
        ...     ...
    """

    def __init__(
        self,
        model: DynamicNet,
        routes: Sequence[int] | None = None,
        tau: float = 0.0,
        budget: float | None = None,
        compile: bool = False,
        memory_format: torch.memory_format = torch.channels_last,
        share_storage: bool = False,
        dtype: torch.dtype | None = None,
        graphs: bool | None = None,
    ) -> None:
        """Materialises front and routes.

        Args:
            model: a network with a trained gate.
            routes: subset of the routing space that the gate may use; all of it where None.
            tau: price of compute in the gate's decision.
            budget: target share of the widest route's MAdds instead of `tau`, looked up in the
                model's table of budgets.
            compile: compile every part; slow to start, fixed batch sizes.
            memory_format: of images, features and weights.
            share_storage: linear layers stay views of the model's weights, which saves memory and
                costs nothing; convolutions are copied.
            dtype: of weights and activations, such as torch.bfloat16; the model's where None. The
                decisions' arithmetic and the class logits are float32 all the same.
            graphs: run as CUDA graphs; where None, on a GPU unless `compile` does so itself.

        Raises:
            UserError: the gate is untrained, a route outside the routing space, or routes whose
                batch-norm statistics were never measured.
        """
        model.check_gate()
        self.tau = tau if budget is None else tau_for_budget(model, budget)
        self.model, self.memory_format = model, memory_format
        self.routes = model.routing_space if routes is None else tuple(sorted(set(routes)))
        if not self.routes or not set(self.routes) <= set(model.routing_space):
            raise UserError(
                f"routes {list(self.routes)} are not of the routing space",
                fix=f"choose from {list(model.routing_space)}",
            )
        check_statistics(model, self.routes)
        parameter = next(model.parameters())
        self.dtype, on_gpu = dtype or parameter.dtype, parameter.device.type == "cuda"
        self.compile, self.share_storage = compile, share_storage
        self.pool = None
        if (on_gpu and not compile) if graphs is None else graphs:
            with torch.cuda.device(parameter.device):
                self.pool = torch.cuda.graph_pool_handle()
        self.front = ChunkedFront(self._ready(model.materialize_front()))
        self.parts: dict[tuple[str, int, int | None, int], Any] = {}
        for gate in range(model.num_gates):
            for route in self.routes:
                self._part(("stage", gate, None, route))

    def _ready(self, module: nn.Module) -> Any:
        module = module.to(self.dtype)
        if not self.compile:
            ready = prepare(module, self.memory_format)
            return ready if self.pool is None else GraphedNetwork(ready, self.pool)
        module = module.to(memory_format=self.memory_format).requires_grad_(False).eval()  # pyright: ignore[reportCallIssue]
        return torch.compile(module, dynamic=False)  # fuses by itself

    @torch.inference_mode()
    def __call__(self, x: Float[Tensor, "batch colours height width"]) -> DynamicOutput:
        """Class logits, route and MAdds of every image, in the order of the batch.

        Raises:
            UserError: an image whose gate logits are not finite.
        """
        return self._finish(self._launch(x))

    def map(self, batches: Iterable[Tensor]) -> Iterator[DynamicOutput]:
        """Answers for each batch, in order.

        A batch's front is launched before the last one's gate is read, so that a GPU does not wait
        for the host.

        Args:
            batches: images on any device.

        Raises:
            UserError: an image whose gate logits are not finite.
        """
        device, ahead = next(self.model.parameters()).device, None
        for x in batches:
            with torch.inference_mode():
                launched = self._launch(x.to(device, non_blocking=True))
                answer = None if ahead is None else self._finish(ahead)
            ahead = launched
            if answer is not None:
                yield answer
        if ahead is not None:
            with torch.inference_mode():
                answer = self._finish(ahead)
            yield answer

    def _launch(self, x: Tensor) -> "_Launched":
        """Front and first gate, whose choice is on its way to the host."""
        x = x.to(self.dtype).contiguous(memory_format=self.memory_format)
        features, gate_logits = self.front(x)
        choice = self.model.choose(gate_logits.float(), self.tau, x.shape[-1], self.routes)
        # a fused ReLU turns NaN into 0, so the logits alone do not tell
        choice = torch.where(x.flatten(1).sum(1, dtype=torch.float32).isfinite(), choice, -1)
        if choice.device.type != "cuda":
            return _Launched(features, gate_logits, choice, None, x.shape[-1])
        host = torch.empty(choice.shape, dtype=choice.dtype, pin_memory=True)
        host.copy_(choice, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(choice.device))
        return _Launched(features, gate_logits, host, arrived, x.shape[-1])

    def _finish(self, launched: "_Launched") -> DynamicOutput:
        """Everything behind the first decision."""
        features, gate_logits, choice, arrived, size = launched

        def decide(logits: Tensor, gate: int) -> Tensor:
            if gate:
                return self.model.decide(logits.float(), self.tau, size, self.routes)
            if arrived is not None:
                arrived.synchronize()
            return check_choice(choice)

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
        logits, routes, madds = self.model.dispatch(
            features, gate_logits, decide, enter=self._enter, stage=self._stage, size=size
        )
        return DynamicOutput(logits.float(), routes, madds)

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
