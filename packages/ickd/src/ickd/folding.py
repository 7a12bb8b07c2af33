"""A frozen teacher made faster: batch norms folded into the convolutions in front of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ickd.networks import Network
from tenfold.device import channels_last

AGREES_TO = 1e-3
"""Share of a feature's largest entry by which folding may change it."""


@torch.no_grad()
def fold(network: Network) -> Network:
    """A copy in eval mode that computes the same with fewer layers, in channels-last order.

    Which batch norm follows which convolution is found by running an example: the norm's input is
    the very tensor that the convolution gave. What is folded is compared with what was there on
    random images; where it differs, as when something else reads the tensor between the two, the
    copy is left unfolded.

    Args:
        network: on any device; not changed.
    """
    plain = copy.deepcopy(network).eval().requires_grad_(False)
    folded = copy.deepcopy(plain)
    pairs = _followers(folded.net, folded.prepare(folded.example(1)))
    for conv_name, norm_name in pairs:
        conv, norm = folded.net.get_submodule(conv_name), folded.net.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        folded.net.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        folded.net.set_submodule(norm_name, nn.Identity())
    pixels = torch.rand_like(network.example(2))
    chosen = folded if _agree(plain, folded, pixels) else plain
    chosen.net = channels_last(chosen.net)
    return chosen


def _followers(net: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Names of (convolution, batch norm) where the second reads the first's output, once each."""
    made: dict[int, tuple[str, Tensor]] = {}
    pairs: list[tuple[str, str]] = []
    runs: dict[str, int] = {}
    hooks = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):

            def note(_: Any, __: Any, output: Tensor, name: str = name) -> None:
                made[id(output)] = (name, output)  # kept alive, so that no other has its id
                runs[name] = runs.get(name, 0) + 1

            hooks.append(module.register_forward_hook(note))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:

            def pair(_: Any, inputs: Any, name: str = name) -> None:
                source = made.get(id(inputs[0]))
                runs[name] = runs.get(name, 0) + 1
                if source is not None:
                    pairs.append((source[0], name))

            hooks.append(module.register_forward_pre_hook(pair))
    net(x)
    for hook in hooks:
        hook.remove()
    return [pair for pair in pairs if runs[pair[0]] == runs[pair[1]] == 1]


def _agree(plain: Network, folded: Network, pixels: Tensor) -> bool:
    ours, theirs = plain.taps(pixels), folded.taps(pixels)
    pairs = [*zip(ours.maps, theirs.maps, strict=True), (ours.logits, theirs.logits)]
    pairs += [*zip(ours.preacts, theirs.preacts, strict=True), (ours.last, theirs.last)]
    return all(
        float((a - b).abs().max()) <= AGREES_TO * float(a.abs().max())
        for a, b in pairs
        if a is not None and b is not None
    )
