"""FILIP: image-text pre-training with token-wise late interaction.

The public names are imported when they are first used, so that the command line can print its help
without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filip_vl.convert import read_checkpoint
    from filip_vl.model import CONFIGS, FilipConfig, FilipModel, FilipOutput, TokenBatch
    from filip_vl.tokenizers import BPETokenizer, Tokenizer, WordTokenizer

_HOMES = {
    "filip_vl.convert": ("read_checkpoint",),
    "filip_vl.model": ("CONFIGS", "FilipConfig", "FilipModel", "FilipOutput", "TokenBatch"),
    "filip_vl.tokenizers": ("BPETokenizer", "Tokenizer", "WordTokenizer"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CONFIGS",
    "BPETokenizer",
    "FilipConfig",
    "FilipModel",
    "FilipOutput",
    "TokenBatch",
    "Tokenizer",
    "WordTokenizer",
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
