"""Lightning modules: `SupernetModule` trains Stage I, `GateModule` Stage II."""

from ds_net_plus.module.base import NetModule
from ds_net_plus.module.gate import GateBatch, GateModule
from ds_net_plus.module.supernet import SupernetModule

__all__ = ["GateBatch", "GateModule", "NetModule", "SupernetModule"]
