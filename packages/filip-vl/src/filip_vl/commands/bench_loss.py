"""bench-loss: time and memory of the loss written as its equations, and as this package has it."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from filip_vl.losses import FilipLoss
from filip_vl.report import Cost as Point
from filip_vl.report import cost_curves
from tenfold.console import at_least, columns
from tenfold.device import is_overloaded, pick_device, synchronize
from tenfold.errors import UserError
from tenfold.plotting import check_picture, save

Impl = Literal["naive", "tiled", "triton"]

_LOG_SCALE = 2.659  # of the initial temperature, 0.07
_TENSORS = 3.4  # of all products that the naive form holds at its peak
_WARMUP = 8  # pairs
_WARNED = 2**30  # bytes of the naive form from which on they are told
_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Pairs(NamedTuple):
    """Tokens of a batch; captions are as long as those of the web."""

    image: Float[Tensor, "batch patches dim"]
    text: Float[Tensor, "batch words dim"]
    mask: Bool[Tensor, "batch words"]


class Cost(NamedTuple):
    """Of a forward and backward pass.

    Attributes:
        seconds: median of the repeats; on the CPU of all its threads together.
        mib: most memory beyond what was held before, None where it cannot be told.
        loss: the value.
        gradients: of the tokens of images and captions.
    """

    seconds: float
    mib: float | None
    loss: float
    gradients: tuple[Tensor, Tensor]


def bench_loss(
    *,
    batch: int = 256,
    patches: int = 49,
    words: int = 77,
    mean_words: int = 14,
    dim: int = 256,
    repeats: int = 1,
    seed: int = 0,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """Time and peak memory of the naive loss and of this package's, forward and backward.

    The naive one keeps all products of patches and words. It is left out where memory is short.

    Args:
        batch: pairs.
        patches: tokens of an image.
        words: tokens that captions are padded to.
        mean_words: mean number of tokens of a caption, of which 3 are always there.
        dim: width of a token.
        repeats: passes of each form, of which the median is told.
        seed: of the tokens.
        out: picture of throughput and memory against the batch: a quarter, a half and all of it.
        device: auto, cpu, cuda or cuda:N; on CUDA the fused kernels are measured too.
    """
    at_least(1, batch=batch, patches=patches, words=words, dim=dim, repeats=repeats)
    at_least(3, mean_words=mean_words)
    if mean_words > words:
        raise UserError(f"--mean-words {mean_words} do not fit --words {words}")
    if out is not None:
        check_picture(out)
    where = pick_device(device)
    if where.type == "mps":
        raise UserError("mps does not tell its peak of memory", fix="use --device cpu")
    given = make_pairs(batch, patches, words, mean_words, dim, seed)
    given = Pairs(*(x.to(where) for x in given))
    impls: list[Impl] = ["naive", "tiled", "triton"] if where.type == "cuda" else ["naive", "tiled"]
    need, there = _TENSORS * 4 * batch**2 * patches * words, _available(where)
    if there is not None and need > there:
        impls.remove("naive")
        print(f"left out the naive form: it needs {_size(need)}, there are {_size(there)}")
    elif need > _WARNED:
        print(f"the naive form needs about {_size(need)}", file=sys.stderr)
    # what a first call loads is not its cost; kernels are compiled for each length of caption
    few = batch if where.type == "cuda" else _WARMUP
    for impl in impls:
        measure(Pairs(*(x[:few] for x in given)), impl)
    found = {impl: measure(given, impl, repeats) for impl in impls}
    valid = int(given.mask.sum()) / batch
    sizes = f"{patches} patches and {words} words, {valid:.1f} of them valid, width {dim}"
    print(f"{batch} pairs of {sizes}, {where}")
    print(_table(found))
    if out is not None:
        parts = [Pairs(*(x[: batch // n] for x in given)) for n in (4, 2) if n <= batch]
        costs = {
            impl: [
                *(_point(part, measure(part, impl, repeats)) for part in parts),
                _point(given, found[impl]),
            ]
            for impl in impls
        }
        print(f"wrote {save(cost_curves(costs, str(where).upper()), out)}")
    if is_overloaded():
        print("other work is running here: do not publish the times")


def make_pairs(
    batch: int, patches: int, words: int, mean_words: int, dim: int, seed: int = 0
) -> Pairs:
    """Random tokens, and captions of 3 + Poisson words."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, patches, dim, generator=generator)
    text = torch.randn(batch, words, dim, generator=generator)
    rates = torch.full((batch,), float(mean_words - 3))
    lengths = (3 + torch.poisson(rates, generator)).clamp(max=words)
    return Pairs(image, text, torch.arange(words) < lengths[:, None])


def measure(given: Pairs, impl: Impl, repeats: int = 1) -> Cost:
    """Run the loss forward and backward, and look at clock and memory."""
    criterion = FilipLoss(impl=impl)
    device = given.image.device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds, peaks, value, gradients = [], [], 0.0, None
    for _ in range(repeats):
        leaves = [x.detach().clone().requires_grad_() for x in given[:2]]
        peak = _watch(device)
        start = clock()
        loss = criterion(*leaves, _LOG_SCALE, text_mask=given.mask)
        loss.backward()
        synchronize(device)
        seconds.append(clock() - start)
        peaks.append(peak())
        value, gradients = float(loss.detach()), tuple(x.grad for x in leaves)
    assert gradients is not None
    image, text = gradients
    assert image is not None
    assert text is not None
    known = [p for p in peaks if p is not None]
    return Cost(median(seconds), median(known) if known else None, value, (image, text))


def _point(given: Pairs, cost: Cost) -> Point:
    """A point of the picture; what cannot be told, or is nothing, lies at its lower edge."""
    return Point(len(given.image), max(cost.seconds, 1e-9), 2**20 * max(cost.mib or 0.0, 0.1))


def _watch(device: torch.device) -> Callable[[], float | None]:
    """Sets the high-water mark to what is held now; what it returns tells the MiB above that."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not _CLEAR.exists():
        return lambda: None
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    held = _resident("VmRSS")
    return lambda: _resident("VmHWM") - held


def _resident(name: str) -> float:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def _available(device: torch.device) -> float | None:
    """Bytes that are free, None where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _table(found: Mapping[str, Cost]) -> str:
    """A row for each form, with what it is to the first one."""
    rows = [["form", "seconds", "MiB", "times faster", "times leaner", "loss", "gradient apart"]]
    first = next(iter(found.values()))
    for impl, cost in found.items():
        lean = first.mib is not None and cost.mib is not None
        apart = max(
            float((a - b).abs().max()) for a, b in zip(cost.gradients, first.gradients, strict=True)
        )
        rows.append(
            [
                impl,
                f"{cost.seconds:.3g}",
                "?" if cost.mib is None else f"{cost.mib:.1f}",
                f"{first.seconds / max(cost.seconds, 1e-9):.2f}",
                f"{(first.mib or 0) / max(cost.mib or 0, 1e-3):.1f}" if lean else "?",
                f"{cost.loss:.6f}",
                f"{apart:.1e}",
            ]
        )
    return columns(rows)
