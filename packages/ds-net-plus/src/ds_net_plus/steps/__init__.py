"""One training step of each stage: forward and backward, no optimizer."""

from ds_net_plus.steps.stage1 import (
    DISTILL_MODES,
    Stage1Output,
    drop_zero_gradients,
    sample_routes,
    stage1_step,
)
from ds_net_plus.steps.stage2 import (
    ESTIMATORS,
    Stage2Output,
    gate_objective,
    sample_upstream,
    stage2_step,
    upstream_inputs,
)
from tenfold.checkpoint import ema_update

__all__ = [
    "DISTILL_MODES",
    "ESTIMATORS",
    "Stage1Output",
    "Stage2Output",
    "drop_zero_gradients",
    "ema_update",
    "gate_objective",
    "sample_routes",
    "sample_upstream",
    "stage1_step",
    "stage2_step",
    "upstream_inputs",
]
