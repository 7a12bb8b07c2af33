"""How many steps a time has room for."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from bert_oversmoothing.comparison.end_to_end import (
    HEADS,
    STD,
    STEPS,
    odd_run_config,
    odd_run_settings,
)
from bert_oversmoothing.comparison.frozen import PROBE_HEADS, PROBE_STEPS, STDS, probe_encoder
from bert_oversmoothing.comparison.heads import PILOT_SEED
from bert_oversmoothing.comparison.results import Kept
from bert_oversmoothing.comparison.training import Models, train

_PACED, _UNTIMED = 10, 4  # steps that tell the pace, and how many of them do not count
_SHARE = 0.8  # of the time that steps take; reading, measuring and pictures have the rest


def steps_within(seconds: float, seeds: int, out: Path, most: int = STEPS) -> int:
    """Steps of part B, with as many of part A as `probe_steps` says, that fit into a time.

    A comparison that the folder holds keeps its own, so that it goes on; else the pace is measured.

    Args:
        seconds: for both parts and all seeds.
        seeds: how many.
        out: folder of the comparison.
        most: steps that are enough.
    """
    there = Kept(out, "odd_run", None).settings
    if there:
        return int(there["steps"])
    pace = _step_seconds() + PROBE_STEPS / STEPS * len(STDS) * _probe_step_seconds()
    return min(most, max(1, int(_SHARE * seconds / seeds / pace)))


def begin(out: Path, steps: int) -> None:
    """Note the steps of part B in the folder, before part A is done.

    Raises:
        UserError: it holds results of other ones.
    """
    Kept(out, "odd_run", odd_run_settings(steps)).write()


def probe_steps(steps: int) -> int:
    """Steps of part A beside so many of part B: in the proportion of the defaults."""
    return max(1, round(PROBE_STEPS * steps / STEPS))


def _step_seconds() -> float:
    """Of a step of all models of part B, the median of a few."""
    models = Models(HEADS, odd_run_config(STD), PILOT_SEED)
    times = []
    for _ in range(_PACED):
        start = time.perf_counter()
        train(models, PILOT_SEED, 1)
        times.append(time.perf_counter() - start)
    return statistics.median(times[_UNTIMED:])


def _probe_step_seconds() -> float:
    """Of a step of all heads of part A."""
    short, long = _UNTIMED, _PACED
    start = time.perf_counter()
    probe_encoder(PILOT_SEED, STD, PROBE_HEADS, short)
    middle = time.perf_counter()
    probe_encoder(PILOT_SEED, STD, PROBE_HEADS, long)
    return max(0.0, time.perf_counter() - 2 * middle + start) / (long - short)
