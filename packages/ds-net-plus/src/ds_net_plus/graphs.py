"""CUDA graphs of a plain network, one for each size of batch that groups are rounded up to.

A route's group has another size in every batch. Launching its many small kernels one by one leaves
a GPU idle; a graph is launched at once, but has a fixed batch size. So groups are padded to the
next of a few sizes, and every (route, size) is captured when it first occurs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes that are captured; larger batches run in pieces of the largest."""


class Captured(NamedTuple):
    """A captured run: `replay` computes `outputs` from `inputs`, all at fixed addresses."""

    replay: Callable[[], object]
    inputs: Tensor
    outputs: Any


def rounded_up(count: int) -> int:
    """The smallest of `SIZES` that holds `count` images."""
    return next(size for size in SIZES if size >= count)


class GraphedNetwork:
    """A plain network on a GPU that runs as CUDA graphs.

    Answers are copies: a later call does not change them. All networks of a runner share a memory
    pool, which is sound because they run one after the other on one stream.
    """

    def __init__(self, network: nn.Module, pool: Any = None) -> None:
        """Captures nothing yet.

        Args:
            network: frozen, in eval mode, on its device.
            pool: of `torch.cuda.graph_pool_handle`; its own where None.
        """
        self.network, self.pool = network, pool
        self.captured: dict[tuple, Captured] = {}

    def __call__(self, x: Tensor) -> Any:
        """The network's answer for any number of images."""
        if len(x) == 0:
            return self.network(x)
        pieces = [self._replay(piece) for piece in x.split(SIZES[-1])]
        if len(pieces) == 1:
            return pieces[0]
        if isinstance(pieces[0], tuple):
            return tuple(map(torch.cat, zip(*pieces, strict=True)))
        return torch.cat(pieces)

    def _replay(self, x: Tensor) -> Any:
        size, count = rounded_up(len(x)), len(x)
        key = (size, x.shape[1:], x.dtype)
        if key not in self.captured:
            self.captured[key] = self.capture(self._buffer(x, size))
        run = self.captured[key]
        run.inputs[:count].copy_(x)  # the rows behind keep what they had: no row reads another
        run.replay()
        return tree_map(lambda output: output[:count].clone(), run.outputs)

    @staticmethod
    def _buffer(x: Tensor, size: int) -> Tensor:
        layout = torch.contiguous_format
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        with torch.inference_mode(False):  # so that any mode may write to it later
            zeros = torch.zeros((size, *x.shape[1:]), dtype=x.dtype, device=x.device)
            return zeros.contiguous(memory_format=layout)

    def capture(self, inputs: Tensor) -> Captured:
        """Records a run on `inputs`, after a few that let libraries choose their algorithms."""
        with torch.cuda.device(inputs.device), torch.inference_mode(False), torch.no_grad():
            aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    self.network(inputs)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = self.network(inputs)
        return Captured(graph.replay, inputs, outputs)
