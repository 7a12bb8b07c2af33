"""A frozen teacher made faster: batch norms folded into the convolutions in front of them."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ickd.networks import Network
from tenfold.device import channels_last

log = logging.getLogger(__name__)

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm
"""Of maps, on one device or over several."""

_Pairs = list[tuple[str, str]]

AGREES_TO = 1e-3
"""Share of a feature's largest entry by which folding may change it."""


@torch.no_grad()
def fold(network: Network) -> Network:
    """A copy in eval mode that computes the same with fewer layers, in channels-last order.

    Which batch norm follows which convolution is found by running an example: the norm's input is
    the very tensor that the convolution gave. A norm of timm that ends in an activation leaves the
    activation behind. What is folded is compared with what was there on random images; where it
    differs, as when something else reads the tensor between the two, norm and convolution stay,
    and a warning says so.

    Args:
        network: on any device; not changed.
    """
    plain = copy.deepcopy(network).eval().requires_grad_(False)
    read = {name.partition(":")[0] for name in plain.tap_names}
    pairs = _followers(plain.net, plain.prepare(plain.example(1)))
    example = plain.example(2)
    noise = torch.rand(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    pairs = [pair for pair in pairs if pair[0] not in read]
    with _without_tf32():
        harmless = _harmless(plain, pairs, noise)
        folded = _folded(plain, harmless)
        if not _agree(plain, folded, noise):
            folded, harmless = plain, []
    if len(harmless) < len(pairs):
        what = "%s: %d of %d batch norms are not folded, which would change what it says"
        log.warning(what, network.name, len(pairs) - len(harmless), len(pairs))
    folded.net = channels_last(folded.net)
    return folded


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Inside, convolutions on CUDA keep all digits; TF32's ten bits hide whether two are the same.

    This is the newer of torch's two switches: unlike `allow_tf32`, it can be read whichever of
    them was set before.
    """
    module: Any = cudnn  # torch's types do not know all of it
    before, module.conv.fp32_precision = module.conv.fp32_precision, "ieee"
    try:
        yield
    finally:
        module.conv.fp32_precision = before


def _harmless(plain: Network, pairs: _Pairs, pixels: Tensor) -> _Pairs:
    """The pairs whose folding changes nothing; those that do are found by halving."""
    if not pairs or _agree(plain, _folded(plain, pairs), pixels):
        return pairs
    half = len(pairs) // 2
    parts = (pairs[:half], pairs[half:]) if half else ()
    return [pair for part in parts for pair in _harmless(plain, part, pixels)]


def _folded(plain: Network, pairs: _Pairs) -> Network:
    folded = copy.deepcopy(plain)
    for conv_name, norm_name in pairs:
        conv, norm = folded.net.get_submodule(conv_name), folded.net.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, BatchNorm)
        folded.net.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        folded.net.set_submodule(norm_name, _left_behind(norm))
    return folded.eval()


def _followers(net: nn.Module, x: Tensor) -> _Pairs:
    """Names of (convolution, batch norm) where the second reads the first's output, once each."""
    seen = _Seen()
    with ExitStack() as stack:
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d):
                hook = module.register_forward_hook(partial(seen.made, name))
                stack.callback(hook.remove)
            elif isinstance(module, BatchNorm) and module.track_running_stats:
                hook = module.register_forward_pre_hook(partial(seen.read, name))
                stack.callback(hook.remove)
        net(x)
    return [pair for pair in seen.pairs if seen.runs[pair[0]] == seen.runs[pair[1]] == 1]


class _Seen:
    """What convolutions gave and batch norms read, and how often each ran."""

    def __init__(self) -> None:
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # kept alive: no other has their id
        self.pairs: _Pairs = []
        self.runs: Counter[str] = Counter()

    def made(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.outputs[id(output)] = name, output
        self.runs[name] += 1

    def read(self, name: str, module: nn.Module, inputs: Any) -> None:
        self.runs[name] += 1
        source = self.outputs.get(id(inputs[0]))
        if source is not None:
            self.pairs.append((source[0], name))


def _left_behind(norm: nn.Module) -> nn.Module:
    """What a norm does besides normalising: nothing, but for timm's norms with an activation."""
    activation = getattr(norm, "act", None)
    return activation if isinstance(activation, nn.Module) else nn.Identity()


def _agree(plain: Network, folded: Network, pixels: Tensor) -> bool:
    ours, theirs = plain.taps(pixels), folded.taps(pixels)
    pairs = [*zip(ours.maps, theirs.maps, strict=True), (ours.logits, theirs.logits)]
    pairs += [*zip(ours.preacts, theirs.preacts, strict=True), (ours.last, theirs.last)]
    pairs.append((ours.pooled, theirs.pooled))
    return all(
        float((a - b).abs().max()) <= AGREES_TO * float(a.abs().max())
        for a, b in pairs
        if a is not None and b is not None
    )
