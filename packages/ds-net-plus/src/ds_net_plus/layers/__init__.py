"""Sliceable layers, the double-headed gate, and the blocks made of them."""

from ds_net_plus.layers.blocks import DSDepthwiseSeparable, DSInvertedResidual, make_divisible
from ds_net_plus.layers.gate import MultiHeadGate, PlainGate
from ds_net_plus.layers.norm import BN_EPS, DSGroupNorm, DSLayerNorm, SwitchableBN
from ds_net_plus.layers.slicing import (
    ConvAct,
    DSConv2d,
    DSDepthwiseConv2d,
    DSLinear,
    apply_channel_mask,
    channel_mask,
    check_widths,
    init_official,
)

__all__ = [
    "BN_EPS",
    "ConvAct",
    "DSConv2d",
    "DSDepthwiseConv2d",
    "DSDepthwiseSeparable",
    "DSGroupNorm",
    "DSInvertedResidual",
    "DSLayerNorm",
    "DSLinear",
    "MultiHeadGate",
    "PlainGate",
    "SwitchableBN",
    "apply_channel_mask",
    "channel_mask",
    "check_widths",
    "init_official",
    "make_divisible",
]
