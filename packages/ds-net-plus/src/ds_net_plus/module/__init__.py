"""Lightning modules: `SupernetModule` trains Stage I, `GateModule` Stage II.

`DetectionModule` trains a detector on the same networks.
"""

from ds_net_plus.module.base import NetModule
from ds_net_plus.module.detection import DetectionModule, load_detector
from ds_net_plus.module.gate import GateBatch, GateModule
from ds_net_plus.module.supernet import SupernetModule

__all__ = [
    "DetectionModule",
    "GateBatch",
    "GateModule",
    "NetModule",
    "SupernetModule",
    "load_detector",
]
