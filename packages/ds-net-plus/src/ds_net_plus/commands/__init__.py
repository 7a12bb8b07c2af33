"""The jobs besides fit, validate, test and predict, as plain functions."""

from ds_net_plus.commands.demo import demo
from ds_net_plus.commands.detect import detect
from ds_net_plus.commands.explain import explain
from ds_net_plus.commands.files import convert_checkpoint, data, export
from ds_net_plus.commands.measuring import benchmark, profile, search_routes
from ds_net_plus.commands.stages import calibrate_budget, recalibrate, train_gate

__all__ = [
    "benchmark",
    "calibrate_budget",
    "convert_checkpoint",
    "data",
    "demo",
    "detect",
    "explain",
    "export",
    "profile",
    "recalibrate",
    "search_routes",
    "train_gate",
]
