"""The networks, and `create_model` to build one by name."""

from ds_net_plus.model.base import (
    FORBIDDEN,
    LARGEST,
    DynamicNet,
    DynamicOutput,
    Front,
    PlainRoute,
    Route,
    RouteLike,
    check_statistics,
    choose_routes,
    count_madds,
    run_grouped,
    tau_for_budget,
)
from ds_net_plus.model.cnn import DSConvNet
from ds_net_plus.model.mobilenet import DSMobileNet
from ds_net_plus.model.registry import MODELS, create_model

__all__ = [
    "FORBIDDEN",
    "LARGEST",
    "MODELS",
    "DSConvNet",
    "DSMobileNet",
    "DynamicNet",
    "DynamicOutput",
    "Front",
    "PlainRoute",
    "Route",
    "RouteLike",
    "check_statistics",
    "choose_routes",
    "count_madds",
    "create_model",
    "run_grouped",
    "tau_for_budget",
]
