"""How smooth the layers of an encoder are: measures of a text, and metrics over a corpus."""

from bert_oversmoothing.diagnostics.graph import (
    AttentionGraph,
    GraphStatistics,
    GraphSummary,
    graph_statistics,
    lambda_max,
)
from bert_oversmoothing.diagnostics.measures import (
    cosine,
    cosine_without_mean,
    effective_rank,
    high_frequency_ratio,
    mad,
    rank_one_distance,
    relative_distance,
    scale_statistics,
    stable_rank,
)
from bert_oversmoothing.diagnostics.metrics import (
    BetweenTextCosine,
    EffectiveRank,
    LayerNormScale,
    RankOneDistance,
    Spread,
    TokenCosine,
)
from bert_oversmoothing.diagnostics.similarity import (
    LayerCKA,
    identity_accuracy,
    identity_cosine,
    linear_cka,
)

__all__ = [
    "AttentionGraph",
    "BetweenTextCosine",
    "EffectiveRank",
    "GraphStatistics",
    "GraphSummary",
    "LayerCKA",
    "LayerNormScale",
    "RankOneDistance",
    "Spread",
    "TokenCosine",
    "cosine",
    "cosine_without_mean",
    "effective_rank",
    "graph_statistics",
    "high_frequency_ratio",
    "identity_accuracy",
    "identity_cosine",
    "lambda_max",
    "linear_cka",
    "mad",
    "rank_one_distance",
    "relative_distance",
    "scale_statistics",
    "stable_rank",
]
