"""FILIP: image-text pre-training with token-wise late interaction.

The public names are imported when they are first used, so that the command line can print its help
without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filip_vl.alignment import Alignment, alignment_map
    from filip_vl.convert import read_checkpoint
    from filip_vl.data import FilipDataModule
    from filip_vl.index import TokenIndex, build_index
    from filip_vl.losses import FilipLoss
    from filip_vl.model import CONFIGS, FilipConfig, FilipModel, FilipOutput, TokenBatch
    from filip_vl.module import FilipModule
    from filip_vl.optim import Lamb
    from filip_vl.report import plot_alignment
    from filip_vl.tokenizers import BPETokenizer, Tokenizer, WordTokenizer
    from filip_vl.zeroshot import ZeroShotClassifier
    from tenfold.contrastive import late_interaction

_HOMES = {
    "filip_vl.alignment": ("Alignment", "alignment_map"),
    "filip_vl.convert": ("read_checkpoint",),
    "filip_vl.data": ("FilipDataModule",),
    "filip_vl.index": ("TokenIndex", "build_index"),
    "filip_vl.losses": ("FilipLoss",),
    "filip_vl.model": ("CONFIGS", "FilipConfig", "FilipModel", "FilipOutput", "TokenBatch"),
    "filip_vl.module": ("FilipModule",),
    "filip_vl.optim": ("Lamb",),
    "filip_vl.report": ("plot_alignment",),
    "filip_vl.tokenizers": ("BPETokenizer", "Tokenizer", "WordTokenizer"),
    "filip_vl.zeroshot": ("ZeroShotClassifier",),
    "tenfold.contrastive": ("late_interaction",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CONFIGS",
    "Alignment",
    "BPETokenizer",
    "FilipConfig",
    "FilipDataModule",
    "FilipLoss",
    "FilipModel",
    "FilipModule",
    "FilipOutput",
    "Lamb",
    "TokenBatch",
    "TokenIndex",
    "Tokenizer",
    "WordTokenizer",
    "ZeroShotClassifier",
    "alignment_map",
    "build_index",
    "late_interaction",
    "plot_alignment",
    "read_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
