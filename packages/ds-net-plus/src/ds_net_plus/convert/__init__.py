"""Networks of other programs as ours: the official DS-Net file, and timm's ViTs and ResNets."""

from ds_net_plus.convert.official import (
    DICTS,
    ConversionReport,
    check_finite_weights,
    convert_official,
    infer_config,
    parity_check,
    relative_deviation,
)
from ds_net_plus.convert.timm import IMPORTANCE, from_timm, load_timm, timm_deviation

__all__ = [
    "DICTS",
    "IMPORTANCE",
    "ConversionReport",
    "check_finite_weights",
    "convert_official",
    "from_timm",
    "infer_config",
    "load_timm",
    "parity_check",
    "relative_deviation",
    "timm_deviation",
]
