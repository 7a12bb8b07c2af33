"""Which device, which precision, how fast, and an honest account of the machine.

Timers synchronise before and after every call, report the median and not the mean, and say so
when other work on the machine makes the figures doubtful. Candidates that are to be compared are
timed in one interleaved run (`time_interleaved`), so that warming up, throttling and noisy
neighbours hit all of them alike.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from tenfold.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
LightningPrecision = Literal["32-true", "bf16-mixed", "16-mixed"]

_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_LIGHTNING: dict[Precision, LightningPrecision] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}

# Above these the figures of a run are marked as taken on a busy machine.
_SPREAD_LIMIT = 0.3
_LOAD_SLACK = 0.5

_LIBRARIES = ("tenfold", "torch", "lightning", "timm", "torchvision", "numpy")

ModuleOrTensor = TypeVar("ModuleOrTensor", nn.Module, Tensor)


def pick_device(name: str = "auto") -> torch.device:
    """Choose a device: the named one, or the best present.

    Args:
        name: "auto" (CUDA, else Apple's MPS, else CPU) or a device as torch spells it, such as
            "cpu", "cuda", "cuda:1", "mps".

    Raises:
        UserError: if the named device does not exist here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"{name!r} is no device", fix="use auto, cpu, cuda, cuda:N or mps"
        ) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is not supported", fix="use auto, cpu, cuda or mps")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": _mps_count()}[device.type]
    if (device.index or 0) >= count:
        here = "none here" if count == 0 else f"only {count} here"
        raise UserError(f"device {name!r} is missing: {here}", fix="use auto or cpu")
    return device


def _mps_count() -> int:
    return int(torch.backends.mps.is_available())


def _check_precision(precision: str) -> Precision:
    """Return ``precision`` if it is one of fp32, bf16 and fp16.

    Raises:
        UserError: otherwise.
    """
    for known in get_args(Precision):
        if precision == known:
            return known
    raise UserError(f"unknown precision {precision!r}", fix="use fp32, bf16 or fp16")


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Context in which a forward pass runs in ``precision``; weights stay as they are.

    "fp32" switches an outer autocast off, so that it always means what it says.

    Raises:
        UserError: if ``precision`` is unknown.
    """
    dtype = _DTYPES[_check_precision(precision)]
    enabled = dtype is not torch.float32
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=dtype if enabled else torch.bfloat16, enabled=enabled)


def lightning_precision(precision: str) -> LightningPrecision:
    """Translate a precision into Lightning's spelling, ``Trainer(precision=...)``.

    Raises:
        UserError: if ``precision`` is unknown.
    """
    return _LIGHTNING[_check_precision(precision)]


def channels_last(x: ModuleOrTensor) -> ModuleOrTensor:
    """Store a 4-d tensor, or the 4-d weights of a module, with the channels innermost (NHWC).

    Shapes and values do not change. A module is changed in place and returned. Tensors with
    another number of dimensions, and weights without spatial axes, are left alone.
    """
    if isinstance(x, Tensor) and x.dim() != 4:
        return x
    return x.to(memory_format=torch.channels_last)


def synchronize(device: torch.device | str) -> None:
    """Wait until everything queued on ``device`` is done; nothing to do for the CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class Timing:
    """How long a call takes.

    Attributes:
        median_ms: median over the repeats, in milliseconds.
        p90_ms: 90th percentile, in milliseconds.
        spread: (90th - 10th percentile) / median, without unit; 0.05 is quiet, 0.3 is not.
        repeats: number of timed calls.
        threads: torch's intra-op threads during the run.
        device: where it ran, as torch spells it.
        busy: others seemed to use the machine; do not publish the milliseconds.
    """

    median_ms: float
    p90_ms: float
    spread: float
    repeats: int
    threads: int
    device: str
    busy: bool

    def per_item(self, n: int) -> Timing:
        """Divide the times by the ``n`` items that one call handles.

        Raises:
            ValueError: if ``n`` is not positive.
        """
        if n < 1:
            raise ValueError(f"a call handles at least one item, not {n}")
        return replace(self, median_ms=self.median_ms / n, p90_ms=self.p90_ms / n)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``Timing(**timing.as_dict())`` gives it back."""
        return asdict(self)

    def __str__(self) -> str:
        mark = ", busy machine" if self.busy else ""
        return f"{self.median_ms:.3g} ms (p90 {self.p90_ms:.3g}, {self.repeats} repeats{mark})"


def time_call(
    fn: Callable[[], Any],
    *,
    device: torch.device | str = "cpu",
    warmup: int = 10,
    repeats: int = 30,
) -> Timing:
    """Time one function. To compare several, use `time_interleaved`.

    Args:
        fn: called without arguments; its result is thrown away.
        device: synchronised before and after every call.
        warmup: untimed calls before the first timed one.
        repeats: timed calls, at least 1.
    """
    return time_interleaved({"call": fn}, device=device, warmup=warmup, repeats=repeats)["call"]


def time_interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    device: torch.device | str = "cpu",
    warmup: int = 10,
    repeats: int = 30,
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time several functions in one round-robin run.

    Every round calls each candidate once, and every second round goes through them backwards
    (A B C, C B A, ...), so that a steady drift of the machine cancels out of their ratios.

    Args:
        candidates: functions without arguments under their names.
        device: synchronised before and after every call.
        warmup: untimed rounds before the first timed one.
        repeats: timed rounds, at least 1.
        clock: seconds, `time.perf_counter` if left out; `time.process_time` counts those of the
            processor, which where others use its cores too tells more than the time of day.

    Returns:
        A `Timing` under each name, in the order given.

    Raises:
        ValueError: if there is nothing to call or no repeat.
    """
    if not candidates or repeats < 1 or warmup < 0:
        raise ValueError("timing needs a candidate, repeats >= 1 and warmup >= 0")
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    load = _load_average()
    with _no_garbage_collection():
        for round_ in range(-warmup, repeats):
            for name in names if round_ % 2 == 0 else reversed(names):
                elapsed = _time_once(candidates[name], device, clock)
                if round_ >= 0:
                    times[name].append(elapsed)
    load = max(load, _load_average())
    return {name: _summarise(times[name], device, load) for name in names}


def _time_once(
    fn: Callable[[], Any],
    device: torch.device | str,
    clock: Callable[[], float] | None = None,
) -> float:
    clock = clock or time.perf_counter
    synchronize(device)
    start = clock()
    fn()
    synchronize(device)
    return clock() - start


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _summarise(seconds: list[float], device: torch.device | str, load: float) -> Timing:
    p10, median, p90 = (float(v) for v in np.percentile(np.asarray(seconds) * 1e3, [10, 50, 90]))
    spread = (p90 - p10) / median if median > 0 else 0.0
    return Timing(
        median_ms=median,
        p90_ms=p90,
        spread=spread,
        repeats=len(seconds),
        threads=torch.get_num_threads(),
        device=str(device),
        busy=_is_busy(spread, load, os.cpu_count() or 1),
    )


def _is_busy(spread: float, load: float, cores: int) -> bool:
    """Say whether threads had to queue (more runnable than cores) or the times scatter widely.

    The load average covers the whole machine and includes this process, which on a machine of
    its own never needs more than the cores there are.
    """
    return load > cores + _LOAD_SLACK or spread > _SPREAD_LIMIT


def is_overloaded() -> bool:
    """Say whether for the last minute more work was running here than there are cores."""
    return _is_busy(0.0, _load_average(), os.cpu_count() or 1)


def _load_average() -> float:
    # Windows has no load average; there the spread alone decides.
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def report() -> dict[str, Any]:
    """Describe the machine and the libraries in plain values, ready for JSON.

    It goes into benchmark results and bug reports, so it holds nothing that tells one person's
    machine from another's of the same make: no host name, no user, no path.

    Returns:
        platform, python, cpu (model), simd, cores, usable_cores, memory_gib, threads (of torch),
        load_average (1, 5 and 15 minutes), versions (by library, those installed), cuda (a list
        of devices), cuda_build (the version torch was built for, or None), mps, and bf16_native
        (by device: whether the hardware computes in bfloat16 or only emulates it).
    """
    cpu, flags = _cpu()
    cuda = [_cuda_device(index) for index in range(torch.cuda.device_count())]
    native = {"cpu": bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})}
    native |= {f"cuda:{index}": device["bf16_native"] for index, device in enumerate(cuda)}
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu,
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "usable_cores": _usable_cores(),
        "memory_gib": _memory_gib(),
        "threads": torch.get_num_threads(),
        "load_average": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else [],
        "versions": {name: v for name in _LIBRARIES if (v := _version(name)) is not None},
        "cuda": cuda,
        "cuda_build": torch.version.cuda,
        "mps": torch.backends.mps.is_available(),
        "bf16_native": native,
    }


def doctor() -> None:
    """Print what `report` finds, and what about it will make training or timing slow."""
    facts = report()
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {_readable(value)}")
    print()
    for line in _advice(facts) or ["Nothing to complain about."]:
        print(line)


def _advice(facts: Mapping[str, Any]) -> list[str]:
    advice = []
    if facts["cuda_build"] and not facts["cuda"]:
        advice.append(
            f"torch is built for CUDA {facts['cuda_build']} but sees no GPU: using the CPU."
        )
    if facts["threads"] < facts["usable_cores"]:
        advice.append(
            f"torch uses {facts['threads']} of {facts['usable_cores']} cores: "
            "see OMP_NUM_THREADS and torch.set_num_threads."
        )
    emulated = [device for device, native in facts["bf16_native"].items() if not native]
    if emulated:
        advice.append(f"bf16 is emulated on {', '.join(emulated)}: expect fp32 to be faster there.")
    if facts["load_average"] and facts["load_average"][0] > facts["cores"] + _LOAD_SLACK:
        advice.append("More work is running than there are cores: timings will be marked busy.")
    return advice


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(v)}" for key, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_readable, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _cuda_device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "bf16_native": native,
    }


def _cpu() -> tuple[str, frozenset[str]]:
    """Model name and instruction-set flags, as far as the operating system tells."""
    if platform.system() == "Darwin":
        model = _sysctl("machdep.cpu.brand_string")
        has_bf16 = _sysctl("hw.optional.arm.FEAT_BF16") == "1"
        return model or platform.processor(), frozenset({"bf16"} if has_bf16 else ())
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    model = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags") or fields.get("Features") or ""
    return model, frozenset(flags.split())


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _usable_cores() -> int:
    # Containers and batch systems often lend fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
