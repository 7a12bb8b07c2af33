"""One line of judgement, by fixed thresholds that are printed with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bert_oversmoothing.families import Encoder
from bert_oversmoothing.report.tables import Row

MILD, STRONG = 0.1, 0.3
"""Cosine of the last layer minus the least of any layer, from which on smoothing is called so."""

_NORMS = ("log_norm1", "log_norm2")


def verdict(rows: Sequence[Row], encoder: Encoder) -> dict[str, Any]:
    """The verdict of run.json: word, sentence, smallest, at_layer, last, thresholds.

    Args:
        rows: of layers.csv.
        encoder: that was analysed.
    """
    cosines = [row.get("cosine") for row in rows]
    found: dict[str, Any] = {"word": None, "smallest": None, "at_layer": None, "last": None}
    parts = []
    if all(isinstance(value, float) and math.isfinite(value) for value in cosines):
        values = [float(value) for value in cosines if value is not None]
        layer = values.index(min(values))
        rise = values[-1] - values[layer]
        found |= {"smallest": values[layer], "at_layer": layer, "last": values[-1]}
        found["word"] = "none" if rise < MILD else "mild" if rise < STRONG else "strong"
        least, last = f"{values[layer]:.2f}", len(values) - 1
        parts.append(
            f"least alike in the last layer, {least}"
            if layer == last
            else f"similarity {least} at layer {layer} -> {values[-1]:.2f} at layer {last}"
        )
    parts += _who(rows)
    if bound := _bound(rows, encoder):
        parts.append(bound)
    found["sentence"] = "; ".join(parts)
    found["thresholds"] = {"mild": MILD, "strong": STRONG}
    return found


def thresholds() -> str:
    """What the words mean."""
    return (
        "over-smoothing by the rise of the cosine from its least layer to the last: "
        f"none < {MILD:g}, mild < {STRONG:g}, else strong"
    )


def _who(rows: Sequence[Row]) -> list[str]:
    """What the parts add to ln d_M over all blocks, and what the norm behind them adds."""
    groups = {
        "norms": _NORMS,
        "attention": ("log_attention",),
        "feed-forward": ("log_feed_forward",),
    }
    told = []
    for name, columns in groups.items():
        values = [row[c] for row in rows for c in columns if isinstance(row.get(c), float)]
        if values:
            told.append((name, sum(float(v) for v in values if v is not None)))
    if not told:
        return []
    name, value = told[0]
    others = "".join(f", {name} {value:+.1f}" for name, value in told[1:])
    verb = "contribute" if name == "norms" else "contributes"
    sentences = [f"{name} {verb} {value:+.1f} of ln d_M{others}"]
    final = rows[-1].get("log_final_norm")
    if isinstance(final, float):  # no layer is measured behind it
        sentences.append(f"final norm, behind the last layer, {final:+.1f}")
    return sentences


def _bound(rows: Sequence[Row], encoder: Encoder) -> str:
    bounds = [row.get("v_tight") for row in rows[1:]]
    values = [float(v) for v in bounds if isinstance(v, float) and math.isfinite(v)]
    if not values:
        reasons = {encoder.unbounded(index) for index in range(len(encoder.blocks))} - {None}
        return f"no theorem bound: {', '.join(sorted(map(str, reasons)))}" if reasons else ""
    vacuous = sum(value >= 1 for value in values)
    told = f"theorem bound vacuous in {vacuous} of {len(values)} blocks"
    if encoder.order == "pre":
        told += " (as in every pre-norm block: it can never promise contraction)"
    return told
