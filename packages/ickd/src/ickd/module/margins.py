"""The margins of OFD: what a teacher's channels say on average where they do not fire."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ickd.folding import BatchNorm
from ickd.networks import Network
from tenfold.distillation import margin_from_bn
from tenfold.distillation.ofd import margin_from_map

_Norms = list[tuple[str, BatchNorm, Tensor]]
"""Name, norm and output, in the order in which they ran."""


@torch.no_grad()
def teacher_margins(teacher: Network, pixels: Tensor) -> list[Tensor]:
    """A vector for every stage that OFD compares, from the batch norm in front of its ReLU.

    That norm is the one whose output is the map, or, where the map is a sum, the last one of the
    residual path (the shortcut's is passed over, as in the published program). Where neither is
    found, the mean of the negative entries is measured on the images.

    Args:
        teacher: in eval mode, with its weights.
        pixels: a batch of training images.
    """
    norms: _Norms = []
    finished: dict[int, int] = {}
    kept: list[Tensor] = []
    hooks = []
    for name, module in teacher.net.named_modules():

        def note(made: Any, _: Any, output: Any, name: str = name) -> None:
            if isinstance(made, BatchNorm):
                norms.append((name, made, output))
            elif isinstance(output, Tensor):
                finished[id(output)] = len(norms)
                kept.append(output)  # so that no later tensor has its id

        hooks.append(module.register_forward_hook(note))
    taps = teacher.taps(pixels)
    for hook in hooks:
        hook.remove()
    after = dict(zip(map(id, taps.preacts), map(id, taps.maps), strict=False))
    margins = []
    for preact in taps.signal("preact_stages"):
        # some networks have a module that gives the map, some one that gives the sum before it
        count = finished.get(after.get(id(preact), 0), finished.get(id(preact), 0))
        margins.append(_margin(preact, norms[:count], norms))
    return margins


def _margin(preact: Tensor, before: _Norms, norms: _Norms) -> Tensor:
    """Of one stage: by its own norm, by the last of the residual path, or as measured."""
    for _, norm, output in norms:
        if output is preact:
            return margin_from_bn(norm.weight, norm.bias)
    for name, norm, _ in reversed(before):
        shortcut = any(word in name for word in ("downsample", "shortcut"))
        if norm.num_features == preact.shape[1] and not shortcut:
            return margin_from_bn(norm.weight, norm.bias)
    return margin_from_map(preact)
