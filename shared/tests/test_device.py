"""Devices, precision, timers and the report, without needing an accelerator."""

import gc
import itertools
import json
import os
import platform
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from tenfold import device as device_module
from tenfold.device import (
    Timing,
    autocast,
    channels_last,
    doctor,
    is_overloaded,
    lightning_precision,
    pick_device,
    report,
    synchronize,
    time_call,
    time_interleaved,
)
from tenfold.errors import UserError
from tenfold.testing import needs_cuda


def pretend(monkeypatch: pytest.MonkeyPatch, *, cuda: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")]
)
def test_auto_takes_the_best_device(
    monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool, expected: str
) -> None:
    pretend(monkeypatch, cuda=cuda, mps=mps)
    assert pick_device() == torch.device(expected)


def test_named_device_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "cuda", "message"),
    [
        ("cuda", 0, "device 'cuda' is missing: none here"),
        ("cuda:2", 2, "device 'cuda:2' is missing: only 2 here"),
        ("mps", 0, "device 'mps' is missing: none here"),
        ("meta", 0, "device 'meta' is not supported"),
        ("toaster", 0, "'toaster' is no device"),
    ],
)
def test_missing_device_is_the_users_error(
    monkeypatch: pytest.MonkeyPatch, name: str, cuda: int, message: str
) -> None:
    pretend(monkeypatch, cuda=cuda)
    with pytest.raises(UserError) as caught:
        pick_device(name)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast_computes_in_the_asked_precision(precision: str, dtype: torch.dtype) -> None:
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with autocast("cpu", precision):
        assert layer(x).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_fp32_switches_an_outer_autocast_off() -> None:
    a = torch.ones(2, 2)
    with autocast("cpu", "bf16"), autocast("cpu", "fp32"):
        assert (a @ a).dtype == torch.float32


def test_unknown_precision_is_the_users_error() -> None:
    for call in (lambda: autocast("cpu", "fp8"), lambda: lightning_precision("16")):
        with pytest.raises(UserError, match="use fp32, bf16 or fp16"):
            call()


def test_lightning_spelling() -> None:
    # Weights stay float32 in all three: "bf16-true" and "16-true" would cast them as well.
    expected = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    assert {p: lightning_precision(p) for p in expected} == expected


def test_channels_last_changes_strides_only() -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    y = channels_last(x)
    assert y.stride() == (60, 1, 15, 3)  # H*W*C, 1, W*C, C
    assert torch.equal(x, y)
    flat = torch.ones(2, 3)
    assert channels_last(flat) is flat

    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(36, 2))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert channels_last(net) is net
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


class Clock:
    """A clock that stands still except when a candidate spends time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(device_module.time, "perf_counter", clock)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return clock


def test_timing_is_median_and_ninth_decile_of_the_timed_calls(clock: Clock) -> None:
    durations = itertools.chain([9.0, 9.0], range(1, 12))  # two to warm up, then 1..11 s

    def work() -> None:
        clock.now += next(durations)

    timing = time_call(work, device="cpu", warmup=2, repeats=11)
    assert timing.median_ms == pytest.approx(6000)
    assert timing.p90_ms == pytest.approx(10_000)
    assert timing.spread == pytest.approx((10 - 2) / 6)
    assert (timing.repeats, timing.device) == (11, "cpu")
    assert timing.threads == torch.get_num_threads()
    assert timing.busy  # calls that scatter from 1 to 11 s are not quiet


def test_interleaving_gives_each_candidate_the_same_drift(clock: Clock) -> None:
    order: list[str] = []

    def candidate(name: str, cost: float):
        def work() -> None:
            # The machine slows down by one per mille with every call.
            clock.now += cost * (1 + 0.001 * len(order))
            order.append(name)

        return work

    costs = {"a": 1.0, "b": 2.0, "c": 1.0}
    calls = {name: candidate(name, cost) for name, cost in costs.items()}
    timings = time_interleaved(calls, warmup=2, repeats=40)
    assert list(timings) == ["a", "b", "c"]
    assert order[:12] == list("abccbaabccba")
    assert len(order) == 3 * 42
    assert timings["b"].median_ms / timings["a"].median_ms == pytest.approx(2.0, rel=1e-3)
    assert timings["c"].median_ms / timings["a"].median_ms == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(("load", "busy"), [(0.0, False), (4.0, False), (4.4, False), (5.1, True)])
def test_more_work_than_cores_is_busy(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, load: float, busy: bool
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))

    def work() -> None:
        clock.now += 1.0

    assert time_call(work, warmup=0, repeats=3).busy is busy
    assert is_overloaded() is busy


def test_a_real_sleep_is_timed() -> None:
    import time

    timing = time_call(lambda: time.sleep(0.004), warmup=1, repeats=5)
    assert 4.0 <= timing.median_ms <= timing.p90_ms
    assert timing.median_ms < 200


def test_garbage_collection_pauses_and_comes_back() -> None:
    seen: list[bool] = []
    time_call(lambda: seen.append(gc.isenabled()), warmup=0, repeats=2)
    assert seen == [False, False]
    assert gc.isenabled()

    def fail() -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        time_call(fail)
    assert gc.isenabled()


def test_timing_per_item_and_as_json() -> None:
    timing = Timing(64.0, 80.0, 0.1, 30, 2, "cpu", busy=False)
    assert timing.per_item(32) == Timing(2.0, 2.5, 0.1, 30, 2, "cpu", busy=False)
    assert Timing(**json.loads(json.dumps(timing.as_dict()))) == timing
    with pytest.raises(ValueError, match="at least one item"):
        timing.per_item(0)


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"warmup": -1}])
def test_timing_needs_something_to_time(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="timing needs"):
        time_call(lambda: None, **bad)
    with pytest.raises(ValueError, match="timing needs"):
        time_interleaved({})


def test_synchronize_reaches_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchronize("cpu")
    assert waited == []
    time_call(lambda: waited.append("call"), device="cuda:0", warmup=0, repeats=1)
    assert waited == ["cuda:0", "call", "cuda:0"]


def test_report_is_plain_and_says_what_runs() -> None:
    facts = json.loads(json.dumps(report()))
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] == os.cpu_count()
    assert 1 <= facts["usable_cores"] <= facts["cores"]
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"tenfold", "lightning"} <= set(facts["versions"])
    assert len(facts["cuda"]) == torch.cuda.device_count()
    assert isinstance(facts["bf16_native"]["cpu"], bool)
    assert facts["cpu"]
    assert {"platform", "python", "load_average", "mps", "cuda_build"} <= set(facts)


def test_report_does_not_say_whose_machine_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host")
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setenv("USER", "secret-user")
    text = json.dumps(report())
    assert "secret" not in text
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text


def test_bf16_is_native_where_the_processor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, native in [("fma avx512_bf16", True), ("fma avx2", False), ("asimd bf16", True)]:
        monkeypatch.setattr(device_module, "_cpu", lambda f=flags: ("x", frozenset(f.split())))
        assert report()["bf16_native"]["cpu"] is native


def test_doctor_prints_the_report_and_its_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_module, "_cpu", lambda: ("Model 5", frozenset()))
    monkeypatch.setattr(os, "getloadavg", lambda: (999.0, 1.0, 1.0))
    doctor()
    printed = capsys.readouterr().out
    assert "Model 5" in printed
    assert torch.__version__.split("+")[0] in printed
    assert "bf16 is emulated on cpu" in printed
    assert "timings will be marked busy" in printed


@needs_cuda
def test_a_gpu_is_waited_for() -> None:
    x = torch.randn(8192, 8192, device="cuda")
    timing = time_call(lambda: x @ x, device="cuda", warmup=2, repeats=3)
    assert timing.median_ms > 1  # 1.1 TFLOP; queueing it takes microseconds
