"""Over-smoothing in Transformer encoders: measured layer by layer, and cured by fusing all layers.

The public names are imported when they are first used, so that the command line can print its help
without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bert_oversmoothing.analysis import ContractionBound, OversmoothingReport, analyze
    from bert_oversmoothing.data import OversmoothingData
    from bert_oversmoothing.diagnostics import (
        AttentionGraph,
        BetweenTextCosine,
        EffectiveRank,
        LayerCKA,
        LayerNormScale,
        RankOneDistance,
        TokenCosine,
    )
    from bert_oversmoothing.families import read_encoder
    from bert_oversmoothing.fusion import Fused, LayerFusion
    from bert_oversmoothing.model import (
        FusionConfig,
        FusionForImageClassification,
        FusionForMaskedLM,
        FusionForMultipleChoice,
        FusionForQuestionAnswering,
        FusionForSequenceClassification,
        FusionForTokenClassification,
    )
    from bert_oversmoothing.module import FusionModule, load_model

_HOMES = {
    "bert_oversmoothing.analysis": (
        "ContractionBound",
        "OversmoothingReport",
        "analyze",
    ),
    "bert_oversmoothing.data": ("OversmoothingData",),
    "bert_oversmoothing.diagnostics": (
        "AttentionGraph",
        "BetweenTextCosine",
        "EffectiveRank",
        "LayerCKA",
        "LayerNormScale",
        "RankOneDistance",
        "TokenCosine",
    ),
    "bert_oversmoothing.families": ("read_encoder",),
    "bert_oversmoothing.fusion": (
        "Fused",
        "LayerFusion",
    ),
    "bert_oversmoothing.model": (
        "FusionConfig",
        "FusionForImageClassification",
        "FusionForMaskedLM",
        "FusionForMultipleChoice",
        "FusionForQuestionAnswering",
        "FusionForSequenceClassification",
        "FusionForTokenClassification",
    ),
    "bert_oversmoothing.module": (
        "FusionModule",
        "load_model",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AttentionGraph",
    "BetweenTextCosine",
    "ContractionBound",
    "EffectiveRank",
    "Fused",
    "FusionConfig",
    "FusionForImageClassification",
    "FusionForMaskedLM",
    "FusionForMultipleChoice",
    "FusionForQuestionAnswering",
    "FusionForSequenceClassification",
    "FusionForTokenClassification",
    "FusionModule",
    "LayerCKA",
    "LayerFusion",
    "LayerNormScale",
    "OversmoothingData",
    "OversmoothingReport",
    "RankOneDistance",
    "TokenCosine",
    "analyze",
    "load_model",
    "read_encoder",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
