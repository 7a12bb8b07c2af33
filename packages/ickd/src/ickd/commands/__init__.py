"""The jobs besides fit, validate, test and predict, as plain functions."""

from ickd.commands.caching import cache_teacher
from ickd.commands.compare import compare, sweep
from ickd.commands.convert import convert
from ickd.commands.cost import cost
from ickd.commands.data import data
from ickd.commands.demo import demo
from ickd.commands.export import export
from ickd.commands.icc import icc
from ickd.commands.taps import taps
from ickd.commands.zoo import zoo

__all__ = [
    "cache_teacher",
    "compare",
    "convert",
    "cost",
    "data",
    "demo",
    "export",
    "icc",
    "sweep",
    "taps",
    "zoo",
]
