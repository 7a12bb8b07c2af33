"""Hand every hidden state of a model to a consumer as it comes out of its block, and keep none.

Shapes: B texts, n tokens, d width, h heads, k width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bert_oversmoothing.families import Encoder
from tenfold.errors import UserError

StateConsumer = Callable[[int, Tensor], None]
NormConsumer = Callable[[int, int, Tensor, Tensor], None]
MapConsumer = Callable[[int, Tensor], None]


@contextmanager
def capture(
    encoder: Encoder,
    states: StateConsumer,
    *,
    norms: NormConsumer | None = None,
    maps: MapConsumer | None = None,
    attention: Literal["eager", "recompute"] = "eager",
) -> Iterator[None]:
    """Inside the context, every forward pass of the model calls the consumers, layer by layer.

    Dropout is off inside; modes, hooks and the attention implementation are put back on leaving.
    Tensors come detached and in the model's own precision. Rows of padding tokens are whatever the
    model makes of them: the consumer masks them.

    Args:
        encoder: What `read_encoder` found.
        states: Called as `states(layer, hidden_bnd)`: layer 0 is the input of the first block,
            after the embedding's norm and projection; layer l the output of block l, before a
            final norm.
        norms: Called as `norms(layer, place, input_bnd, output_bnd)` for the norms of block
            `layer` (from 1), place 0, 1, ... in `Block.norms`; the final norm counts as one more
            place of the last block.
        maps: Called as `maps(layer, attention_bhnn)`, layer from 1, rows summing to 1.
        attention: `eager` switches the model to the attention that returns its maps; `recompute`
            leaves it as it is and computes the maps from the queries and keys.

    Raises:
        UserError: States change shape between layers, a different number of blocks ran than the
            encoder has, or the maps are not to be had.

    Example:
        >>> with torch.no_grad(), capture(encoder, similarity.update):  # doctest: +SKIP
        ...     model(**batch)
    """
    run = _Run(encoder, states, norms, maps, recompute=attention == "recompute")
    with ExitStack() as stack:
        stack.enter_context(_evaluating(encoder.model))
        if maps is not None and attention == "eager":
            stack.enter_context(_eager(encoder.model))
        run.hook(stack)
        yield


class _Run:
    """The hooks of one capture and the number of blocks that have run in this forward pass.

    ALBERT calls one module many times, so the place in the network is counted, not looked up.
    """

    def __init__(
        self,
        encoder: Encoder,
        states: StateConsumer,
        norms: NormConsumer | None,
        maps: MapConsumer | None,
        *,
        recompute: bool,
    ) -> None:
        self.encoder, self.states, self.norms, self.maps = encoder, states, norms, maps
        self.recompute = recompute
        self.layer = 0
        self.shape: torch.Size | None = None
        self.query_key: dict[str, Tensor] = {}

    def hook(self, stack: ExitStack) -> None:
        """Hook every module once, however often it is called."""

        def add(handle: Any) -> None:
            stack.callback(handle.remove)

        blocks, model = self.encoder.blocks, self.encoder.model
        add(model.register_forward_pre_hook(self._start))
        add(model.register_forward_hook(self._end))
        add(blocks[0].module.register_forward_pre_hook(self._first, with_kwargs=True))
        for state in dict.fromkeys(block.state for block in blocks):
            add(state.register_forward_hook(self._state))
        if self.norms is not None:
            for module, place in self._norm_places().items():
                add(module.register_forward_hook(self._norm(place)))
        if self.maps is not None:
            for module in dict.fromkeys(block.module for block in blocks):
                self._hook_maps(module, add)

    def _norm_places(self) -> dict[nn.Module, int]:
        blocks, final = self.encoder.blocks, self.encoder.final_norm
        places = {
            norm.module: place
            for block in blocks
            for place, norm in enumerate(block.norms)
            if norm is not None
        }
        return places | ({final.module: len(blocks[-1].norms)} if final else {})

    def _hook_maps(self, block: nn.Module, add: Callable[[Any], None]) -> None:
        module = next(part.attention for part in self.encoder.blocks if part.module is block)
        layout = self.encoder.layout
        if module is None or (self.recompute and layout is None):
            raise UserError(
                "attention maps unavailable", where=self.encoder.model.config.model_type
            )
        if layout is not None and layout.query is None:
            add(module.register_forward_pre_hook(_ask_for_map, with_kwargs=True))
        elif self.recompute and layout is not None and layout.query and layout.key:
            for name, path in {"query": layout.query, "key": layout.key}.items():
                add(block.get_submodule(path).register_forward_hook(self._projection(name)))
            add(module.register_forward_hook(self._recomputed_map, with_kwargs=True))
            return
        add(module.register_forward_hook(self._map))

    def _start(self, module: nn.Module, args: Any) -> None:
        self.layer, self.shape = 0, None
        self.query_key.clear()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.layer != len(self.encoder.blocks):
            raise UserError(
                f"{self.layer} blocks ran of {len(self.encoder.blocks)} found",
                where=type(module).__name__,
            )

    def _first(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.layer == 0:
            self._consume(args[0] if args else kwargs["hidden_states"])

    def _state(self, module: nn.Module, args: Any, output: Any) -> None:
        self.layer += 1
        self._consume(output[0] if isinstance(output, tuple) else output)

    def _consume(self, hidden: Tensor) -> None:
        self.shape = self.shape or hidden.shape
        if hidden.shape != self.shape or hidden.ndim != 3:
            raise UserError(
                f"states change shape at layer {self.layer}: "
                f"{tuple(self.shape)} became {tuple(hidden.shape)}"
                if hidden.ndim == 3
                else f"the states of layer {self.layer} are not texts x tokens x width",
                where=self.encoder.model.config.model_type,
                fix="such encoders cannot be compared layer by layer",
            )
        self.states(self.layer, hidden.detach())

    def _norm(self, place: int) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            assert self.norms is not None
            # A final norm comes after the last block, which has been counted by then.
            layer = min(self.layer + 1, len(self.encoder.blocks))
            self.norms(layer, place, args[0].detach(), output.detach())

        return hook

    def _map(self, module: nn.Module, args: Any, output: Any) -> None:
        index = self.encoder.map_index
        attention = output[index] if isinstance(output, tuple) and len(output) > 1 else None
        if attention is None or attention.ndim != 4:
            raise UserError(
                "attention maps unavailable", where=self.encoder.model.config.model_type
            )
        assert self.maps is not None
        self.maps(self.layer + 1, attention.detach())

    def _projection(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.query_key[name] = output.detach()

        return hook

    def _recomputed_map(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        layout, heads = self.encoder.layout, self.encoder.heads
        assert self.maps is not None
        assert layout is not None
        assert heads is not None
        query, key = self.query_key.pop("query"), self.query_key.pop("key")
        if layout.packing == "qkv":
            query, key = (query.unflatten(-1, (3, -1))[..., i, :] for i in (0, 1))
        q_bhnk, k_bhnk = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
        if (angles := kwargs.get("position_embeddings")) is not None:
            q_bhnk, k_bhnk = (_rotated(x, *angles) for x in (q_bhnk, k_bhnk))
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        # Without a mask, torch's own attention reads the module's flag.
        causal = mask is None and getattr(module, "is_causal", False)
        self.maps(self.layer + 1, attention_map(q_bhnk, k_bhnk, mask, causal=causal))


def attention_map(
    q_bhnk: Float[Tensor, "B h n k"],
    k_bhnk: Float[Tensor, "B h n k"],
    mask: Tensor | None,
    *,
    causal: bool = False,
) -> Float[Tensor, "B h n n"]:
    """softmax(q k^T / sqrt(k) + mask), in float32 or better.

    Args:
        q_bhnk: Queries, rotated where the model rotates them.
        k_bhnk: Keys, likewise.
        mask: None, or broadcastable to (B, h, n, n): True where a key is seen, or a number to add.
        causal: Hide the keys after each query.

    Raises:
        UserError: The mask has another form, as under flash attention.
    """
    dtype = torch.promote_types(q_bhnk.dtype, torch.float32)
    scores = (q_bhnk.to(dtype) @ k_bhnk.to(dtype).mT) * q_bhnk.shape[-1] ** -0.5
    if mask is not None and mask.ndim != 4:
        raise UserError("attention maps cannot be recomputed here", fix="switch to eager attention")
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        # The lowest number and not -inf: a row that sees nothing is uniform, as in transformers.
        return scores.masked_fill(~mask, torch.finfo(dtype).min).softmax(-1)
    return (scores + mask).softmax(-1)


def _rotated(x_bhnk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: the two halves of a head are the two coordinates of its planes."""
    first, second = x_bhnk.chunk(2, -1)
    return x_bhnk * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)


def _ask_for_map(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    # DeBERTa hands the flag on by place, MPNet by name; both compute the map in any case.
    if len(args) > 2 and isinstance(args[2], bool):
        return (*args[:2], True, *args[3:]), kwargs
    return args, {**kwargs, "output_attentions": True}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    if before is None or before == "eager":
        yield
        return
    try:
        model.set_attn_implementation("eager")
    except ValueError as error:
        raise UserError(
            "attention maps unavailable", where=model.config.model_type, fix=str(error)
        ) from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)
