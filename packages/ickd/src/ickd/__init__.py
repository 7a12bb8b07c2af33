"""Inter-channel correlation distillation (ICKD), and the other distillation losses beside it.

The public names are imported when they are first used, so that the command line can print its help
without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ickd import zoo
    from ickd.cache import TeacherCache
    from ickd.convert import convert_checkpoint
    from ickd.data import ImageData, SegmentationData
    from ickd.folding import fold
    from ickd.hub import from_pretrained, save_pretrained
    from ickd.metrics import SegmentationMetrics
    from ickd.module import Distiller, load_student
    from ickd.networks import Network, open_network
    from ickd.taps import tap, tap_points
    from tenfold.distillation import ICCLoss, Taps, get_loss, icc_matrix

_HOMES = {
    "ickd.cache": ("TeacherCache",),
    "ickd.convert": ("convert_checkpoint",),
    "ickd.data": ("ImageData", "SegmentationData"),
    "ickd.folding": ("fold",),
    "ickd.hub": ("from_pretrained", "save_pretrained"),
    "ickd.metrics": ("SegmentationMetrics",),
    "ickd.module": ("Distiller", "load_student"),
    "ickd.networks": ("Network", "open_network"),
    "ickd.taps": ("tap", "tap_points"),
    "tenfold.distillation": ("ICCLoss", "Taps", "get_loss", "icc_matrix"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Distiller",
    "ICCLoss",
    "ImageData",
    "Network",
    "SegmentationData",
    "SegmentationMetrics",
    "Taps",
    "TeacherCache",
    "convert_checkpoint",
    "fold",
    "from_pretrained",
    "get_loss",
    "icc_matrix",
    "load_student",
    "open_network",
    "save_pretrained",
    "tap",
    "tap_points",
    "zoo",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name == "zoo":
        return import_module("ickd.zoo")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
