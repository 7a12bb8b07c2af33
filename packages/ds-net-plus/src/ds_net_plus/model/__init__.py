"""The networks, and `create_model` to build one by name."""

from ds_net_plus.model import timm_models as timm_models  # fills timm's registry
from ds_net_plus.model.base import DynamicNet
from ds_net_plus.model.checks import (
    check_finite,
    check_statistics,
    count_madds,
    tau_for_budget,
)
from ds_net_plus.model.cnn import DSConvNet
from ds_net_plus.model.detector import Detections, Detector, ImageLosses
from ds_net_plus.model.features import Features
from ds_net_plus.model.grouping import choose_routes, run_grouped
from ds_net_plus.model.mobilenet import DSMobileNet
from ds_net_plus.model.registry import MODELS, create_model, reset_gate, with_space
from ds_net_plus.model.resnet import DSResNet
from ds_net_plus.model.routes import (
    LARGEST,
    DynamicOutput,
    Front,
    NotFiniteError,
    PlainRoute,
    Route,
    RouteLike,
    naming_images,
)
from ds_net_plus.model.vit import DSViT

__all__ = [
    "LARGEST",
    "MODELS",
    "DSConvNet",
    "DSMobileNet",
    "DSResNet",
    "DSViT",
    "Detections",
    "Detector",
    "DynamicNet",
    "DynamicOutput",
    "Features",
    "Front",
    "ImageLosses",
    "NotFiniteError",
    "PlainRoute",
    "Route",
    "RouteLike",
    "check_finite",
    "check_statistics",
    "choose_routes",
    "count_madds",
    "create_model",
    "naming_images",
    "reset_gate",
    "run_grouped",
    "tau_for_budget",
    "with_space",
]
