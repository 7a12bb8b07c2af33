"""Hierarchical fusion: what the task head reads is made of all layers, not of the last alone."""

from bert_oversmoothing.fusion.groups import fusion_parameter_groups
from bert_oversmoothing.fusion.heads import Fused, FusionStream, LayerFusion
from bert_oversmoothing.fusion.layers import parse_layers

__all__ = ["Fused", "FusionStream", "LayerFusion", "fusion_parameter_groups", "parse_layers"]
