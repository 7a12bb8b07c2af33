"""The jobs besides fit, validate, test and predict, as plain functions."""

from filip_vl.commands.align import align
from filip_vl.commands.augment_text import augment_text
from filip_vl.commands.bench_loss import bench_loss
from filip_vl.commands.convert import convert
from filip_vl.commands.data import data
from filip_vl.commands.demo import demo
from filip_vl.commands.export import export
from filip_vl.commands.filter import filter
from filip_vl.commands.index import index
from filip_vl.commands.info import info
from filip_vl.commands.probe import probe
from filip_vl.commands.retrieve import retrieve
from filip_vl.commands.search import search
from filip_vl.commands.zeroshot import zeroshot

__all__ = [
    "align",
    "augment_text",
    "bench_loss",
    "convert",
    "data",
    "demo",
    "export",
    "filter",
    "index",
    "info",
    "probe",
    "retrieve",
    "search",
    "zeroshot",
]
