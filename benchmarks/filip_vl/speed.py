"""Late interaction in tiles against the equations written down: time and memory."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import Results, markdown, replace_block
from filip_vl.losses import FilipLoss
from tenfold.device import report

README = Path("packages/filip-vl/README.md")
PATCHES, WORDS, DIM = 49, 77, 256
SIZES = (64, 256)
LARGE = 1024
"""A batch that the written equations cannot hold (50 GiB)."""


def run(seeds: int = 1, only: str | None = None) -> None:
    """Measures everything anew, or one part, and writes the tables.

    Args:
        seeds: not used; a time has no seed.
        only: "loss".
    """
    results = Results("speed", "filip-vl", fresh=only is None)
    if only is None:  # writing keeps what it finds
        results.path.unlink(missing_ok=True)
    for name, part in {"loss": loss}.items():
        if only in (None, name):
            results.runs[name] = part()
            results.write()
            print(name, "done", flush=True)
    text = tables(results.runs)
    results.path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    replace_block(README, "speed", text)
    print(text)


def pairs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a batch, and masks of captions as the web has them: 3 + Poisson(11) words."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, PATCHES, DIM, generator=generator)
    text = torch.randn(batch, WORDS, DIM, generator=generator)
    lengths = 3 + torch.poisson(torch.full((batch,), 11.0), generator)
    return image, text, torch.arange(WORDS) < lengths.clamp(max=WORDS)[:, None]


def loss() -> dict[str, Any]:
    """Forward and backward of the loss on one thread, CPU seconds and extra memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {str(batch): _both(batch) for batch in SIZES}
        found[str(LARGE)] = {"tiled": _measure(_step("tiled", *pairs(LARGE)), 1)}
    finally:
        torch.set_num_threads(threads)
    return found


def _both(batch: int) -> dict[str, Any]:
    given = pairs(batch)
    runs = {impl: _measure(_step(impl, *given), 3) for impl in ("naive", "tiled")}
    ends = [_step(impl, *given)() for impl in ("naive", "tiled")]
    apart = [float((a - b).abs().max()) for a, b in zip(*ends, strict=True)]
    return {**runs, "loss apart": apart[0], "gradient apart": max(apart[1:])}


def _step(impl: Any, image: Tensor, text: Tensor, mask: Tensor) -> Callable[[], list[Tensor]]:
    criterion = FilipLoss(impl=impl)

    def step() -> list[Tensor]:
        leaves = image.clone().requires_grad_(), text.clone().requires_grad_()
        value = criterion(*leaves, 2.659, text_mask=mask)
        value.backward()
        return [value.detach(), *(x.grad for x in leaves if x.grad is not None)]

    return step


def _measure(step: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median CPU seconds, and the largest memory over what was held before."""
    seconds, peaks = [], []
    for _ in range(repeats):
        before = _settle()
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
        peaks.append(_status("VmHWM") - before)
    return {"seconds": median(seconds), "peak_mib": median(peaks)}


def _settle() -> float:
    """Gives memory back, sets the high-water mark to what is held, and returns it in MiB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def tables(runs: dict[str, Any]) -> str:
    """The README's table of speed."""
    rows = []
    for batch, run in runs.get("loss", {}).items():
        slow, fast = run.get("naive"), run["tiled"]
        rows.append(
            [
                batch,
                f"{slow['seconds']:.3g} s" if slow else "",
                f"{fast['seconds']:.3g} s",
                f"{slow['seconds'] / fast['seconds']:.1f}x" if slow else "",
                f"{slow['peak_mib']:.0f} MiB" if slow else "(50 GiB)",
                f"{fast['peak_mib']:.0f} MiB",
                f"{slow['peak_mib'] / fast['peak_mib']:.0f}x" if slow else "",
            ]
        )
    head = ["batch", "written down", "tiled", "faster", "extra memory", "tiled", "less"]
    largest = max(run.get("gradient apart", 0.0) for run in runs.get("loss", {}).values())
    return (
        f"The loss, forward and backward on one thread: {PATCHES} patches, captions of 14 words on "
        f"average padded to {WORDS}, width {DIM}. Gradients differ by at most {largest:.1g}.\n\n"
        + markdown(head, rows)
        + f"\n\nCPU seconds on {report()['cpu']}."
    )
