"""The jobs besides fit, validate, test and predict, as plain functions."""

from ickd.commands.cost import cost
from ickd.commands.taps import taps

__all__ = ["cost", "taps"]
