"""Where two trees of values differ: checkpoints, gradients, predictions."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NOISE = 1e-12
"""Share of a tree's largest number below which a difference is rounding: the gradient of a bias in
front of a softmax is zero in theory, and a few last bits of the others in practice."""


def differences(left: Any, right: Any, tolerance: float = 0.0) -> str:
    """Where two trees differ, the first places; numbers may by a share of a tensor's largest.

    Args:
        left: mappings, sequences and dataclasses of anything.
        right: likewise.
        tolerance: the share; 0 means the same bits.
    """
    mine, theirs = dict(leaves(left)), dict(leaves(right))
    wrong = [f"{path} (in one of them)" for path in mine.keys() ^ theirs.keys()]
    tensors = [x for x in theirs.values() if isinstance(x, Tensor) and x.is_floating_point()]
    largest = max((float(x.abs().max()) for x in tensors if x.numel()), default=0.0)
    floor = _NOISE * largest if tolerance else 0.0
    wrong += [
        f"{path} ({difference})"
        for path in mine.keys() & theirs.keys()
        if (difference := _difference(mine[path], theirs[path], tolerance, floor))
    ]
    return ", ".join(sorted(wrong)[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values inside mappings, sequences and dataclasses, each with its dotted path."""
    if dataclasses.is_dataclass(tree):
        tree = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    elif isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def _difference(left: Any, right: Any, tolerance: float, floor: float) -> str:
    numbers = float, Tensor, np.ndarray
    if not (isinstance(left, numbers) and isinstance(right, numbers)):
        return "" if left == right else f"{left!r:.40}, {right!r:.40}"
    one, other = torch.as_tensor(left), torch.as_tensor(right)
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype} {tuple(one.shape)}, {other.dtype} {tuple(other.shape)}"
    if torch.allclose(one, other, rtol=0, atol=0, equal_nan=True):
        return ""
    floating, one, other = one.is_floating_point(), one.double(), other.double()
    apart, largest = (x.abs().max().item() for x in (one - other, other))
    close = floating and apart <= max(tolerance * largest, floor)
    return "" if close else f"by {apart:.2g} of {largest:.2g}"
