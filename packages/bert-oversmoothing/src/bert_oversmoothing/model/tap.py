"""Where a fusion meets an encoder: layers are taken as they come, the fused states go on.

The fused states take the place of the last layer behind the blocks and before whatever the model
does with it: its pooler, its head and its loss stay as they are.
"""

from __future__ import annotations

import threading
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from bert_oversmoothing.families import Encoder
from bert_oversmoothing.fusion import Fused

Fusion: TypeAlias = Any  # a LayerFusion, or what stands for one, as a folded concat


class Pass:
    """One forward pass: the layers so far, or what the fusion keeps of them.

    Without gradients no layer is kept; with them autograd keeps what it needs.

    Attributes:
        fused: what the fusion gave, once the blocks have run.
    """

    def __init__(self, fusion: Fusion, mask: Tensor | None, need_weights: bool) -> None:
        self._fusion, self._mask, self._need_weights = fusion, mask, need_weights
        self._stream = None if torch.is_grad_enabled() else fusion.stream(need_weights=need_weights)
        self._states: list[Tensor] = []
        self.layer = 0
        self.fused: Fused | None = None

    def take(self, hidden: Tensor) -> None:
        """The next layer, from 0."""
        if self.layer in self._fusion.layers:
            if self._stream is None:
                self._states.append(hidden)
            else:
                self._stream.add(hidden)
        self.layer += 1

    def finish(self) -> Tensor:
        """The fused states."""
        if self._stream is None:
            need = self._need_weights
            fused = self._fusion(self._states, self._mask, need_weights=need)
        else:
            fused = self._stream.result(self._mask)
        self._states, self._stream, self.fused = [], None, fused
        return fused.hidden


class Tap:
    """Hooks on an encoder, which do nothing but between `start` and `stop`.

    A pass belongs to its thread: a served model may answer several requests at once. Backward
    passes that compute blocks again run outside of a pass, and hand over nothing.

    Args:
        encoder: of the plain model.
        norm_each: whether the final norm of the encoder is applied to each layer, and the fused
            states take the place of its output; else they take that of the last block.
    """

    # Methods and not closures: a deep copy of the model then has hooks of its own.

    def __init__(self, encoder: Encoder, norm_each: bool) -> None:
        blocks = encoder.blocks
        self._depth = len(blocks)
        self._passes: dict[int, Pass] = {}
        blocks[0].module.register_forward_pre_hook(self._first, with_kwargs=True)
        for state in dict.fromkeys(block.state for block in blocks):
            state.register_forward_hook(self._block)
        layout = encoder.layout
        if layout is None:
            blocks[-1].state.register_forward_hook(self._last)
        elif layout.final_norm:
            norm = encoder.model.get_submodule(layout.final_norm)
            if norm_each:
                norm.register_forward_hook(self._behind)
            else:
                norm.register_forward_pre_hook(self._before)
        else:
            stack = encoder.model.get_submodule(layout.blocks.rpartition(".")[0])
            stack.register_forward_hook(self._behind)

    def start(self, fusion: Fusion, mask: Tensor | None, need_weights: bool) -> Pass:
        """Fuse the layers of the forward pass that follows, until `stop`."""
        self._passes[_thread()] = current = Pass(fusion, mask, need_weights)
        return current

    def stop(self) -> None:
        """The pass is over, or broke off."""
        del self._passes[_thread()]

    def _current(self) -> Pass | None:
        return self._passes.get(_thread()) if self._passes else None

    def _first(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        current = self._current()
        if current is not None and current.layer == 0:
            current.take(args[0] if args else kwargs["hidden_states"])

    def _block(self, module: nn.Module, args: Any, output: Any) -> None:
        current = self._current()
        if current is not None:
            current.take(output[0] if isinstance(output, tuple) else output)

    def _last(self, module: nn.Module, args: Any, output: Any) -> Any:
        current = self._current()
        # An unknown encoder may call one module for all of its blocks.
        if current is None or current.layer <= self._depth:
            return None
        return _with_state(output, current.finish())

    def _before(self, module: nn.Module, args: tuple) -> tuple | None:
        current = self._current()
        return None if current is None else (current.finish(), *args[1:])

    def _behind(self, module: nn.Module, args: Any, output: Any) -> Any:
        current = self._current()
        return None if current is None else _with_state(output, current.finish())


def _thread() -> int:
    # torch.compile cannot trace the question, and a compiled model serves one thread.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _with_state(output: Any, state: Tensor) -> Any:
    """The output of a module with other states as its last."""
    if isinstance(output, ModelOutput):
        fields = dict(output) | {"last_hidden_state": state}
        # DeBERTa reads the last of these.
        if states := fields.get("hidden_states"):
            fields["hidden_states"] = type(states)([*states[:-1], state])
        return type(output)(**fields)
    return (state, *output[1:]) if isinstance(output, tuple) else state
