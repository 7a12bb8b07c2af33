"""Published checkpoints of CLIP and FILIP as state dicts of this package."""

from filip_vl.convert.common import ConversionReport, Converted, fit_state
from filip_vl.convert.reading import SOURCES, read_checkpoint

__all__ = ["SOURCES", "ConversionReport", "Converted", "fit_state", "read_checkpoint"]
