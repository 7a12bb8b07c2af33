"""Dynamic weight slicing (DS-Net, DS-Net++): one network, several speeds, chosen per image.

The public names are imported when they are first used, so that the command line can print its help
without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_net_plus.checkpoint import from_pretrained, load_net, save_pretrained
    from ds_net_plus.convert import from_timm
    from ds_net_plus.data import ImageData, VOCData
    from ds_net_plus.losses import sgs_targets
    from ds_net_plus.model import (
        Detector,
        DSConvNet,
        DSMobileNet,
        DSResNet,
        DSViT,
        DynamicNet,
        DynamicOutput,
        Route,
        count_madds,
        create_model,
    )
    from ds_net_plus.module import DetectionModule, GateModule, SupernetModule
    from ds_net_plus.recalibration import recalibrate
    from ds_net_plus.runner import DynamicRunner
    from ds_net_plus.steps import ema_update, sample_routes, stage1_step, stage2_step

_HOMES = {
    "checkpoint": ("from_pretrained", "load_net", "save_pretrained"),
    "convert": ("from_timm",),
    "data": ("ImageData", "VOCData"),
    "losses": ("sgs_targets",),
    "model": (
        "DSConvNet",
        "DSMobileNet",
        "DSResNet",
        "DSViT",
        "Detector",
        "DynamicNet",
        "DynamicOutput",
        "Route",
        "count_madds",
        "create_model",
    ),
    "module": ("DetectionModule", "GateModule", "SupernetModule"),
    "recalibration": ("recalibrate",),
    "runner": ("DynamicRunner",),
    "steps": ("ema_update", "sample_routes", "stage1_step", "stage2_step"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "DSConvNet",
    "DSMobileNet",
    "DSResNet",
    "DSViT",
    "DetectionModule",
    "Detector",
    "DynamicNet",
    "DynamicOutput",
    "DynamicRunner",
    "GateModule",
    "ImageData",
    "Route",
    "SupernetModule",
    "VOCData",
    "count_madds",
    "create_model",
    "ema_update",
    "from_pretrained",
    "from_timm",
    "load_net",
    "recalibrate",
    "sample_routes",
    "save_pretrained",
    "sgs_targets",
    "stage1_step",
    "stage2_step",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
