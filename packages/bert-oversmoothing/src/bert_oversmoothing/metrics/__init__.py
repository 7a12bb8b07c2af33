"""How good a fine-tuned encoder is at its task, in the figures of GLUE, SWAG and SQuAD."""

from bert_oversmoothing.metrics.glue import (
    GLUE_METRICS,
    ChoiceMetric,
    GlueMetric,
    MaskedWordsMetric,
    TaskMetric,
    glue_average,
    glue_score,
)
from bert_oversmoothing.metrics.spans import Candidates, Passages, Prediction, Span
from bert_oversmoothing.metrics.squad import (
    SquadMetric,
    best_threshold,
    evaluate_squad,
    normalize_answer,
)

__all__ = [
    "GLUE_METRICS",
    "Candidates",
    "ChoiceMetric",
    "GlueMetric",
    "MaskedWordsMetric",
    "Passages",
    "Prediction",
    "Span",
    "SquadMetric",
    "TaskMetric",
    "best_threshold",
    "evaluate_squad",
    "glue_average",
    "glue_score",
    "normalize_answer",
]
