"""Reading what a run has logged, for its curves."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Log: TypeAlias = str | Path | Iterable[Mapping[str, Any]]
"""Lightning's metrics.csv, or its rows; empty where something was not logged."""

Series: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Steps, and the values logged at them."""


def read_log(log: Log) -> dict[str, Series]:
    """Every column of numbers, by its name, without the steps' own."""
    rows = _read(Path(log)) if isinstance(log, str | Path) else list(log)
    keys = dict.fromkeys(key for row in rows for key in row)
    series = {key: _series(rows, key) for key in keys if key not in (None, "step")}
    return {key: found for key, found in series.items() if len(found[0])}


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _series(rows: Iterable[Mapping[str, Any]], name: str) -> Series:
    found = [
        (row["step"], row[name])
        for row in rows
        if row.get("step") not in (None, "") and _is_number(row.get(name))
    ]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, float), np.array(values, float)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def smooth(values: np.ndarray, parts: int = 20) -> np.ndarray:
    """Centred running mean over one of so many parts of a run, over fewer values at both ends.

    Values that are not finite are left out.
    """
    half = len(values) // (2 * parts)
    centre, known = np.arange(len(values)), np.isfinite(values)
    first, stop = (centre - half).clip(0), (centre + half + 1).clip(max=len(values))
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(known, values, 0.0), known)
    )
    with np.errstate(invalid="ignore"):
        return (sums[stop] - sums[first]) / (counts[stop] - counts[first])
