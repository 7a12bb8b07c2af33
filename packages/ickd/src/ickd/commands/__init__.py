"""The jobs besides fit, validate, test and predict, as plain functions."""

from ickd.commands.cost import cost
from ickd.commands.taps import taps
from ickd.commands.zoo import zoo

__all__ = ["cost", "taps", "zoo"]
