"""Tables of an analysis, and what is drawn of them.

Every picture is a plain function from tables, trials or results to a matplotlib figure; the
functions `draw_*` write them.

>>> tables = Tables.load("runs/analysis")
>>> draw_all(tables, "runs/analysis/figures")
>>> write_html(tables, "runs/analysis/report.html")
"""

from bert_oversmoothing.report.checks import draw_probe, draw_theorem
from bert_oversmoothing.report.compare import draw_compare
from bert_oversmoothing.report.demo import draw_frozen_probe, draw_odd_run
from bert_oversmoothing.report.drawing import PICTURES, Picture, draw_all
from bert_oversmoothing.report.page import write_html
from bert_oversmoothing.report.tables import Tables

__all__ = [
    "PICTURES",
    "Picture",
    "Tables",
    "draw_all",
    "draw_compare",
    "draw_frozen_probe",
    "draw_odd_run",
    "draw_probe",
    "draw_theorem",
    "write_html",
]
