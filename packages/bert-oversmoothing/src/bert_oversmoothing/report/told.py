"""The layers in words: a table of them as HTML, and what a picture shows in a sentence."""

from __future__ import annotations

import math
from html import escape

from bert_oversmoothing.report.common import known
from bert_oversmoothing.report.tables import Tables
from bert_oversmoothing.report.words import number

_COLUMNS = {
    "layer": "layer",
    "cosine": "similarity",
    "cosine_between": "between texts",
    "cosine_excess": "excess",
    "relative_distance": "d_M / norm",
    "effective_rank": "effective rank",
    "log_contraction": "ln factor",
    "log_attention": "attention",
    "log_norm1": "norm 1",
    "log_feed_forward": "feed-forward",
    "log_norm2": "norm 2",
    "log_final_norm": "final norm",
    "sigma_product_min": "\N{GREEK SMALL LETTER SIGMA}1\N{MIDDLE DOT}"
    "\N{GREEK SMALL LETTER SIGMA}2, smallest",
    "v_tight": "v, tight",
    "v_paper": "v, paper",
}


def summary(tables: Tables, name: str) -> str:
    """What a picture shows, in a sentence, for those who cannot see it."""
    column = {
        "similarity": "cosine",
        "distance": "relative_distance",
        "contributions": "log_contraction",
        "sigma": "sigma_product_min",
        "rank": "effective_rank",
        "identity": "identity_accuracy",
    }.get(name, "")
    values = [(n, v) for n, v in enumerate(tables.column(column)) if math.isfinite(v)]
    if not values:
        return "Its values are in the files beside this report."
    (first, begin), (last, end) = values[0], values[-1]
    unit = _COLUMNS.get(column, column.replace("_", " "))
    return f"{unit}: {number(begin)} at {first}, {number(end)} at {last}."


def layer_table(tables: Tables) -> str:
    """A table of the layers with the columns that have values."""
    names = [name for name in _COLUMNS if known(tables.column(name))]
    columns = {name: tables.column(name) for name in names}
    head = "".join(f'<th scope="col">{escape(_COLUMNS[name])}</th>' for name in names)
    rows = [
        "<tr>" + "".join(f"<td>{_cell(name, columns[name][n])}</td>" for name in names) + "</tr>"
        for n in range(len(tables.layers))
    ]
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _cell(name: str, value: float) -> str:
    if not math.isfinite(value):
        return ""
    if name == "layer":
        return f"{value:.0f}"
    return number(value, 3) if abs(value) < 100 else f"{value:.3g}"
