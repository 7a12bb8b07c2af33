"""FILIP's towers: configurations, the model, and the tokens that it gives."""

from filip_vl.model.config import CONFIGS, FilipConfig, get_config
from filip_vl.model.filip import FilipModel
from filip_vl.model.token_learner import TokenLearner
from filip_vl.model.tokens import (
    FilipOutput,
    NotFiniteError,
    TokenBatch,
    check_finite,
    crop_to_longest,
    first_end,
)
from filip_vl.model.vision import VisionTower, interpolate_positions

__all__ = [
    "CONFIGS",
    "FilipConfig",
    "FilipModel",
    "FilipOutput",
    "NotFiniteError",
    "TokenBatch",
    "TokenLearner",
    "VisionTower",
    "check_finite",
    "crop_to_longest",
    "first_end",
    "get_config",
    "interpolate_positions",
]
