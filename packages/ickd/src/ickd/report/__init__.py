"""The pictures of distillation.

Every picture is a plain function from diagnostics, rows or a log to a matplotlib figure; `save_all`
writes a set of them.

>>> figure = icc_triptych(diversity(teacher), diversity(student, teacher, lift))
>>> save_all({"icc": figure}, "pictures")
"""

from ickd.report.cells import CellCorrelations, icc_cells
from ickd.report.common import save_all
from ickd.report.comparison import LossRow, accuracy_against_cost, dots
from ickd.report.correlation import icc_triptych
from ickd.report.grid import grid_bars
from ickd.report.order import ChannelOrder, cluster_channels
from ickd.report.segmentation import segmentation_overlays
from ickd.report.training import training_curves

__all__ = [
    "CellCorrelations",
    "ChannelOrder",
    "LossRow",
    "accuracy_against_cost",
    "cluster_channels",
    "dots",
    "grid_bars",
    "icc_cells",
    "icc_triptych",
    "save_all",
    "segmentation_overlays",
    "training_curves",
]
