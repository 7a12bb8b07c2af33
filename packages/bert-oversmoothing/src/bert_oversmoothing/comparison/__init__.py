"""What fusion does for an encoder that smooths: a frozen probe, and training end to end.

Every way of reading an encoder (a "head") is a `LayerFusion` with a linear layer on it. Heads are
named as the kinds of fusion, with "_identity" behind those that start as the last layer.
"""

from bert_oversmoothing.comparison.end_to_end import (
    HEADS,
    SINGLE,
    STD,
    STEPS,
    layer_scores,
    odd_run,
)
from bert_oversmoothing.comparison.frozen import PROBE_HEADS, PROBE_STEPS, STDS, frozen_probe
from bert_oversmoothing.comparison.heads import BASELINE, PILOT_SEED, Head
from bert_oversmoothing.comparison.pace import begin, probe_steps, steps_within
from bert_oversmoothing.comparison.training import Models, train

__all__ = [
    "BASELINE",
    "HEADS",
    "PILOT_SEED",
    "PROBE_HEADS",
    "PROBE_STEPS",
    "SINGLE",
    "STD",
    "STDS",
    "STEPS",
    "Head",
    "Models",
    "begin",
    "frozen_probe",
    "layer_scores",
    "odd_run",
    "probe_steps",
    "steps_within",
    "train",
]
