"""The pictures and the table of a dynamic network.

Every picture is a plain function from an `evaluate.RouteTable`, `Point`s or rows to a matplotlib
figure; `save_all` writes a set of them. `comparison_table` tells the same story to a console.
"""

from ds_net_plus.report.boxes import detections
from ds_net_plus.report.common import Latency, headline_point, route_colors, save_all
from ds_net_plus.report.gallery import cheapest_against_widest, gallery
from ds_net_plus.report.profile import speedup_bars, speedups
from ds_net_plus.report.routing import (
    cheapest_correct,
    class_routes,
    gate_confusion,
    route_histogram,
)
from ds_net_plus.report.table import Row, comparison_rows, comparison_table
from ds_net_plus.report.tradeoff import tradeoff
from ds_net_plus.report.training import training_curves

__all__ = [
    "Latency",
    "Row",
    "cheapest_against_widest",
    "cheapest_correct",
    "class_routes",
    "comparison_rows",
    "comparison_table",
    "detections",
    "gallery",
    "gate_confusion",
    "headline_point",
    "route_colors",
    "route_histogram",
    "save_all",
    "speedup_bars",
    "speedups",
    "tradeoff",
    "training_curves",
]
