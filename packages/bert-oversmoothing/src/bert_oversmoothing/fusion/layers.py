"""Which layers are fused: groups by name, a list of numbers, or one alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from tenfold.errors import UserError

KINDS = ("last", "concat", "max", "mean", "gate", "scalar_mix")


def parse_layers(
    layers: str | Sequence[int],
    num_blocks: int,
    include_embeddings: bool = True,
    *,
    init: str = "random",
) -> tuple[int, ...]:
    """The numbers of the layers to fuse, in rising order.

    Layer 0 is the output of the embeddings, layer l that of block l, layer L of the last block.

    >>> parse_layers("last:4", 12)
    (9, 10, 11, 12)
    >>> parse_layers("every:5", 12)
    (2, 7, 12)

    Args:
        layers: "all"; "last:k", the k last ones; "every:k", each k-th one counted back from L, so
            that L is among them; or numbers from 0 to L, in any order.
        num_blocks: L, 1 or more.
        include_embeddings: whether layer 0 may be among them.
        init: "identity" starts as layer L, which must then be among them.

    Returns:
        K numbers from 0 to L, each once.

    Raises:
        UserError: no such group, a number out of range or given twice, no number at all, layer 0
            where embeddings are left out, or no layer L for an initialisation as the identity.
    """
    if num_blocks < 1:
        raise UserError(f"an encoder of {num_blocks} blocks has no layers to fuse", where="layers")
    known = range(0 if include_embeddings else 1, num_blocks + 1)
    found = _group(layers, known) if isinstance(layers, str) else _numbers(layers, known)
    if init == "identity" and num_blocks not in found:
        what = f"init identity starts as layer {num_blocks}, which is not among layers {[*found]}"
        raise UserError(what, where="layers", fix=f"add {num_blocks}, or choose init random")
    return found


def check_kind(kind: str) -> None:
    """Refuse a fusion that there is not.

    Raises:
        UserError: names those that there are.
    """
    if kind not in KINDS and not _best(kind):
        fix = f"choose {', '.join(KINDS)} or best_layer(i)"
        raise UserError(f"unknown fusion: {kind!r}", where="fusion", fix=fix)


def _best(kind: str) -> re.Match[str] | None:
    return re.fullmatch(r"best_layer\((\d+)\)", kind)


def layer_read(kind: str, layers: tuple[int, ...]) -> int | None:
    """The position among the layers of the one that a kind of fusion reads; None: it reads all.

    >>> layer_read("best_layer(9)", (6, 9, 12))
    1

    Raises:
        UserError: no such kind, or no such layer.
    """
    check_kind(kind)
    best = _best(kind)
    if not best:
        return len(layers) - 1 if kind == "last" else None
    if int(best[1]) not in layers:
        fix = f"choose from {', '.join(map(str, layers))}"
        raise UserError(f"{kind} is not among the layers", where="fusion", fix=fix)
    return layers.index(int(best[1]))


def _group(name: str, known: range) -> tuple[int, ...]:
    """The layers of "all", "last:k" or "every:k"."""
    if name == "all":
        return tuple(known)
    kind, _, count = name.partition(":")
    if kind not in ("last", "every") or not (count.isascii() and count.isdigit()):
        fix = "choose all, last:k, every:k or numbers in brackets, as [0,6,12]"
        raise UserError(f"no such group of layers: {name!r}", where="layers", fix=fix)
    largest = len(known) if kind == "last" else known[-1]
    k = int(count)
    if not 1 <= k <= largest:
        raise UserError(f"{name!r} is out of range", where="layers", fix=f"k is 1 to {largest}")
    return tuple(known[-k:]) if kind == "last" else tuple(known[::-1][::k][::-1])


def _numbers(layers: Sequence[int], known: range) -> tuple[int, ...]:
    """A list of layers, checked and sorted."""
    if not layers:
        raise UserError("no layers to fuse", where="layers", fix="name one or more")
    if outside := [layer for layer in layers if layer not in known]:
        what = f"no such layers: {', '.join(map(str, outside))}"
        hint = " (layer 0, the embeddings, is left out)" if known[0] else ""
        raise UserError(what, where="layers", fix=f"choose {known[0]} to {known[-1]}{hint}")
    if twice := sorted(layer for layer, count in Counter(layers).items() if count > 1):
        raise UserError(f"layers given twice: {', '.join(map(str, twice))}", where="layers")
    return tuple(sorted(layers))
