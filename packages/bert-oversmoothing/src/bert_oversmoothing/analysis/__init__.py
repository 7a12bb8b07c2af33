"""Analyse an encoder over a corpus of texts or images."""

from bert_oversmoothing.analysis.analyze import METRICS, analyze
from bert_oversmoothing.analysis.bound import ContractionBound, block_weights, model_norms
from bert_oversmoothing.analysis.inputs import list_images, read_texts
from bert_oversmoothing.analysis.result import OversmoothingReport, draw
from bert_oversmoothing.analysis.trials import model_trials

__all__ = [
    "METRICS",
    "ContractionBound",
    "OversmoothingReport",
    "analyze",
    "block_weights",
    "draw",
    "list_images",
    "model_norms",
    "model_trials",
    "read_texts",
]
