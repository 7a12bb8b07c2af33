"""The jobs besides fit, validate, test and predict, as plain functions."""

from bert_oversmoothing.commands.analyze import analyze
from bert_oversmoothing.commands.compare import compare
from bert_oversmoothing.commands.convert import convert
from bert_oversmoothing.commands.data import data
from bert_oversmoothing.commands.demo import demo
from bert_oversmoothing.commands.export import export
from bert_oversmoothing.commands.probe import probe
from bert_oversmoothing.commands.report import report
from bert_oversmoothing.commands.theorem import theorem

__all__ = ["analyze", "compare", "convert", "data", "demo", "export", "probe", "report", "theorem"]
