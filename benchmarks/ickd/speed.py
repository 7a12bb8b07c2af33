"""The low-memory forms against the published formulations, and what a distillation step costs."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.results import Results, markdown
from ickd import zoo
from ickd.compiling import CompiledNetwork
from ickd.folding import fold
from ickd.measure import icc_cost
from ickd.networks import open_network
from tenfold.device import autocast, channels_last, report, time_call, time_interleaved
from tenfold.distillation import ICCLoss, create_loss

README = Path("packages/ickd/README.md")
SHAPES = ((16, 512, 16), (4, 2048, 16), (8, 512, 49), (16, 256, 64))
NST_SHAPES = ((4, 128, 8), (64, 128, 8))
BATCH, ZOO_BATCH = 64, 16


def run(seeds: int = 1, only: str | None = None) -> None:
    """Measures everything anew, or one part, and writes the tables.

    Args:
        seeds: not used; a time has no seed.
        only: "icc", "zoo", "nst", "step" or "teacher".
    """
    results = Results("speed", "ickd", fresh=only is None)
    if only is None:  # writing keeps what it finds
        results.path.unlink(missing_ok=True)
    parts = {"icc": icc, "zoo": taps_of_the_zoo, "nst": nst, "step": step, "teacher": teacher}
    for name, part in parts.items():
        if only in (None, name):
            results.runs[name] = part()
            results.write()
            print(name, "done", flush=True)
    results.publish(README, tables(results.runs))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def both_ways(loss: Callable[[], Tensor], leaf: Tensor) -> Callable[[], None]:
    """Forward and backward, the gradient thrown away."""

    def call() -> None:
        leaf.grad = None
        loss().backward()

    return call


def icc_as_published(student: Tensor, teacher: Tensor) -> Tensor:
    """The public programs' way: both matrices, their rows normalised, the squared distance."""
    hats = []
    for f in (student, teacher):
        flat = f.flatten(2)
        hats.append(F.normalize(torch.bmm(flat, flat.transpose(1, 2)), dim=2))
    return (hats[0] - hats[1]).pow(2).sum() / (student.shape[1] * len(student))


def nst_as_published(student: Tensor, teacher: Tensor) -> Tensor:
    """RepDistiller's way: pairs of channels expanded to (batch, channels, channels, pixels)."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(2) * b.unsqueeze(1)).sum(-1).pow(2)

    s, t = (F.normalize(f.flatten(2), dim=2) for f in (student, teacher))
    return kernel(t, t).mean().detach() + kernel(s, s).mean() - 2 * kernel(s, t).mean()


def icc() -> dict[str, Any]:
    """Direct, low-memory and published form of ICC at some taps' shapes, forward and backward."""
    found = {}
    for batch, channels, pixels in SHAPES:
        s, t = _maps(batch, channels, pixels)
        calls = {"published": both_ways(lambda s=s, t=t: icc_as_published(s, t), s)}
        for form in ("direct", "low_memory"):
            loss = ICCLoss(channels, embed=False, form=form)
            calls[form] = both_ways(lambda loss=loss, s=s, t=t: loss(s, t), s)
        found[f"{batch}, {channels}, {pixels}"] = _apart(calls)
    return found


def taps_of_the_zoo() -> dict[str, Any]:
    """Both forms at every shape of map that ICKD compares in the zoo: peak bytes and time."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name in zoo.names():
        network = open_network(f"zoo:{name}").eval()
        with torch.no_grad():
            last = network.taps(network.example(1)).signal("last")
        shapes.setdefault(tuple(last.shape[1:]), []).append(name)
    found = {}
    for shape, names in sorted(shapes.items()):
        s, t = (torch.rand(ZOO_BATCH, *shape, device=_device()) for _ in range(2))
        cost = icc_cost("ickd", ICCLoss(shape[0], embed=False).to(_device()), s, t)
        forms = {f: {"peak": c.peak, **c.timing.as_dict()} for f, c in cost.forms.items()}
        key = f"{shape[0]} x {shape[1]}x{shape[2]}"
        found[key] = {"networks": names, "auto": cost.auto, "batch": cost.batch, **forms}
    return found


def nst() -> dict[str, Any]:
    """Our NST and the expanded one, forward and backward."""
    found = {}
    for batch, channels, side in NST_SHAPES:
        s, t = _maps(batch, channels, side * side)
        loss = create_loss("nst")
        calls = {"ours": both_ways(lambda loss=loss, s=s, t=t: loss([s], [t]), s)}
        if batch < BATCH:  # the other takes gigabytes
            calls["published"] = both_ways(lambda s=s, t=t: nst_as_published(s, t), s)
        found[f"{batch}, {channels}, {side}x{side}"] = _apart(calls)
    return found


def _maps(batch: int, channels: int, pixels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = int(pixels**0.5)
    shape = (batch, channels, side, pixels // side)
    s, t = (torch.randn(shape, generator=generator).relu().to(_device()) for _ in range(2))
    return s.requires_grad_(), t


def _apart(calls: dict[str, Callable[[], Any]]) -> Any:
    """Times of candidates, each in rounds of its own and on one thread.

    Not in turns: the published forms allocate so much that what runs after them pays for fresh
    pages.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timings = {
            name: time_call(call, device=_device(), warmup=3, repeats=15)
            for name, call in calls.items()
        }
    finally:
        torch.set_num_threads(threads)
    return {name: timing.as_dict() for name, timing in timings.items()}


def _timed(calls: dict[str, Callable[[], Any]], warmup: int = 2, repeats: int = 11) -> Any:
    timings = time_interleaved(calls, device=_device(), warmup=warmup, repeats=repeats)
    return {name: timing.as_dict() for name, timing in timings.items()}


def step() -> dict[str, Any]:
    """A training step of resnet32x4 -> resnet8x4, and the ICKD term alone, timed apart."""
    torch.manual_seed(0)
    teacher = open_network("zoo:resnet32x4").eval().requires_grad_(False).to(_device())
    student = open_network("zoo:resnet8x4").train().to(_device())
    example = [network.taps(network.example(1)) for network in (student.eval(), teacher)]
    loss = ICCLoss.for_taps(*example).to(_device())
    student.train()
    pixels = torch.rand(BATCH, 3, 32, 32, device=_device())
    labels = torch.arange(BATCH, device=_device())
    parameters = [*student.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(parameters, 1e-4, momentum=0.9)

    def train(distil: bool) -> Tensor:
        with torch.no_grad():
            theirs = teacher.taps(pixels)
        ours = student.taps(pixels)
        assert ours.logits is not None
        total = F.cross_entropy(ours.logits, labels)
        if distil:
            total = total + 2.5 * loss(ours.maps[-1], theirs.maps[-1])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total

    with torch.no_grad():
        s, t = student.taps(pixels).maps[-1], teacher.taps(pixels).maps[-1]
    s.requires_grad_()
    calls = {
        "with ICKD": lambda: train(True),
        "without": lambda: train(False),
        "the term": both_ways(lambda: loss(s, t), s),
    }
    return {"batch": BATCH, **_timed(calls, warmup=1, repeats=7)}


def teacher() -> dict[str, Any]:
    """The teacher's forward pass: plain, channels last, folded, compiled, in bfloat16."""
    plain = open_network("zoo:resnet32x4").eval().requires_grad_(False).to(_device())
    ordered = copy.deepcopy(plain)
    ordered.net = channels_last(ordered.net)
    folded = fold(plain)
    pixels = torch.rand(BATCH, 3, 32, 32, device=_device())
    compiled = CompiledNetwork(folded)

    def forward(net: Any, precision: str = "fp32") -> None:
        with torch.no_grad(), autocast(pixels.device, precision):
            net.taps(pixels)

    calls = {
        "plain": lambda: forward(plain),
        "channels last": lambda: forward(ordered),
        "folded": lambda: forward(folded),
        "folded, compiled": lambda: forward(compiled),
        "folded, bf16": lambda: forward(folded, "bf16"),
        "folded, compiled, bf16": lambda: forward(compiled, "bf16"),
    }
    return {"batch": BATCH, **_timed(calls, warmup=1, repeats=9)}


def tables(runs: dict[str, Any]) -> str:
    """The README's tables of speed."""
    parts = []
    if "icc" in runs:
        rows = [
            [f"({key})", *(_ms(run, n) for n in ("published", "direct", "low_memory")),
             _times(run, "published", "low_memory")]
            for key, run in runs["icc"].items()
        ]  # fmt: skip
        head = ["(B, C, p)", "published form", "direct", "low-memory", "published / low-memory"]
        parts.append(
            "The ICC term, forward and backward on one thread, p pixels a map:\n\n"
            + markdown(head, rows)
        )
    if "zoo" in runs:
        rows = [
            [key, _some(run["networks"]), run["auto"].replace("_", "-"),
             f"{run['direct']['peak'] / run['low_memory']['peak']:.3g}x",
             _times(run, "direct", "low_memory")]
            for key, run in runs["zoo"].items()
        ]  # fmt: skip
        head = ["map", "networks", "form taken", "direct / low-memory, peak bytes", "time"]
        parts.append("At the taps of the zoo:\n\n" + markdown(head, rows))
    if "nst" in runs:
        rows = [
            [f"({key})", _ms(run, "published"), _ms(run, "ours"), _times(run, "published", "ours")]
            for key, run in runs["nst"].items()
        ]
        head = ["(B, C, map)", "published form", "ours", "ratio"]
        parts.append("NST, likewise:\n\n" + markdown(head, rows))
    if "step" in runs:
        run = runs["step"]
        share = 100 * run["the term"]["median_ms"] / run["with ICKD"]["median_ms"]
        parts.append(
            f"A step of resnet32x4 -> resnet8x4 on {run['batch']} images takes "
            f"{_ms(run, 'with ICKD')} with ICKD and {_ms(run, 'without')} without; the term with "
            f"its embedding, timed apart, {_ms(run, 'the term')}: {share:.1f} % of the step."
        )
    if "teacher" in runs:
        run = runs["teacher"]
        others = ", ".join(
            f"{_ms(run, name)} {name} ({_times(run, 'plain', name)})"
            for name in run
            if name not in ("batch", "plain")
        )
        parts.append(
            f"The teacher's forward pass takes {_ms(run, 'plain')}; {others}. Folded means in "
            "channels-last order too."
        )
    parts.append(_where(runs))
    return "\n\n".join(parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _where(runs: dict[str, Any]) -> str:
    timings = [t for run in runs.values() for t in _timings(run)]
    busy = any(t["busy"] for t in timings)
    threads, device = max(t["threads"] for t in timings), timings[0]["device"]
    note = "; the machine was busy with other work" if busy else ""
    cpu = report()["cpu"]
    return f"Medians of one run on {cpu}, {device}; whole networks on {threads} threads{note}."


def _timings(run: Any) -> list[dict[str, Any]]:
    if not isinstance(run, dict):
        return []
    if "median_ms" in run:
        return [run]
    return [t for value in run.values() for t in _timings(value)]


def _ms(run: dict[str, Any], name: str) -> str:
    return f"{run[name]['median_ms']:.3g} ms" if name in run else ""


def _times(run: dict[str, Any], slow: str, fast: str) -> str:
    if slow not in run:
        return ""
    return f"{run[slow]['median_ms'] / run[fast]['median_ms']:.3g}x"
