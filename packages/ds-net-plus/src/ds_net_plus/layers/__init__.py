"""Sliceable layers, the double-headed gate, and the blocks made of them."""

from ds_net_plus.layers.blocks import DSDepthwiseSeparable, DSInvertedResidual, make_divisible
from ds_net_plus.layers.bottleneck import DSBottleneck
from ds_net_plus.layers.embedding import PatchEmbedding
from ds_net_plus.layers.gate import MultiHeadGate, PlainGate
from ds_net_plus.layers.norm import BN_EPS, DSGroupNorm, DSLayerNorm, SwitchableBN
from ds_net_plus.layers.slicing import (
    ConvAct,
    DSConv2d,
    DSDepthwiseConv2d,
    DSLinear,
    NoClassifier,
    activate,
    apply_channel_mask,
    channel_mask,
    check_widths,
    init_official,
    make_classifier,
)
from ds_net_plus.layers.transformer import DSBlock, TokenGate

__all__ = [
    "BN_EPS",
    "ConvAct",
    "DSBlock",
    "DSBottleneck",
    "DSConv2d",
    "DSDepthwiseConv2d",
    "DSDepthwiseSeparable",
    "DSGroupNorm",
    "DSInvertedResidual",
    "DSLayerNorm",
    "DSLinear",
    "MultiHeadGate",
    "NoClassifier",
    "PatchEmbedding",
    "PlainGate",
    "SwitchableBN",
    "TokenGate",
    "activate",
    "apply_channel_mask",
    "channel_mask",
    "check_widths",
    "init_official",
    "make_classifier",
    "make_divisible",
]
