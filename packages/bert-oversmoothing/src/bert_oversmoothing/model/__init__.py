"""Fusion models for the tasks of transformers, and the configurations behind them."""

from bert_oversmoothing.model.base import FusionModel, FusionOutput
from bert_oversmoothing.model.config import BACKBONES, FusionConfig, backbone_config
from bert_oversmoothing.model.tasks import (
    TASKS,
    FusionForImageClassification,
    FusionForMaskedLM,
    FusionForMultipleChoice,
    FusionForQuestionAnswering,
    FusionForSequenceClassification,
    FusionForTokenClassification,
    build,
    open_fusion,
)

__all__ = [
    "BACKBONES",
    "TASKS",
    "FusionConfig",
    "FusionForImageClassification",
    "FusionForMaskedLM",
    "FusionForMultipleChoice",
    "FusionForQuestionAnswering",
    "FusionForSequenceClassification",
    "FusionForTokenClassification",
    "FusionModel",
    "FusionOutput",
    "backbone_config",
    "build",
    "open_fusion",
]
