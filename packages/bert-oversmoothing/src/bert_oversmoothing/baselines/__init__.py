"""Remedies inside the network, to compare fusion with: blocks, and a loss on the tokens."""

from bert_oversmoothing.baselines.attention import (
    BLOCKS,
    AttnScale,
    Block,
    BlockOutput,
    FeatScale,
    NeuTRENO,
    Remedy,
    VisionTransformer,
    attn_scale,
    feat_scale,
    neutreno,
)
from bert_oversmoothing.baselines.regulariser import TokenSimilarityLoss

__all__ = [
    "BLOCKS",
    "AttnScale",
    "Block",
    "BlockOutput",
    "FeatScale",
    "NeuTRENO",
    "Remedy",
    "TokenSimilarityLoss",
    "VisionTransformer",
    "attn_scale",
    "feat_scale",
    "neutreno",
]
