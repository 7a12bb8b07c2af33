"""What `analyze` returns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from bert_oversmoothing.analysis.verdict import thresholds
from bert_oversmoothing.report import draw_all, write_html
from bert_oversmoothing.report.layers import similarity
from bert_oversmoothing.report.tables import Cell, Tables
from tenfold.console import columns

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_SHOWN = {
    "cosine": "cosine",
    "cosine_between": "between texts",
    "relative_distance": "d_M/|H|",
    "effective_rank": "rank",
    "sigma_product_min": "s1 s2 min",
    "contraction": "d_M ratio",
    "v_tight": "bound",
}


class OversmoothingReport:
    """The curves of an analysis: tables, pictures, a page and a verdict.

    Example:
        >>> curves = analyze(model, tokenizer, texts)
        >>> print(curves.summary())
        >>> curves.save("analysis")

    Args:
        tables: all that was found.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    @property
    def layers(self) -> pandas.DataFrame:
        """A row a layer; see `report.tables.LAYER_COLUMNS`."""
        import pandas

        return pandas.DataFrame(self.tables.layers).set_index("layer")

    @property
    def verdict(self) -> str:
        """The verdict in one line."""
        verdict = self.tables.run["verdict"]
        if verdict["word"] is None:
            return str(verdict["sentence"])
        return f"over-smoothing {verdict['word']}: {verdict['sentence']}"

    def summary(self) -> str:
        """The table of layers, the verdict, and what was left out."""
        names = [name for name in _SHOWN if any(map(math.isfinite, self.tables.column(name)))]
        rows = [["layer", *(_SHOWN[name] for name in names)]]
        rows += [
            [str(row["layer"]), *(_shown(row.get(name)) for name in names)]
            for row in self.tables.layers
        ]
        run = self.tables.run
        lines = [columns(rows), self.verdict, f"({thresholds()})", *_anisotropy(self.tables)]
        if (fused := run.get("fused_cosine")) is not None:
            lines.append(f"the fused state has similarity {fused:.2f}")
        return "\n".join([*lines, *_left_out(run["texts"]), *run["notes"]])

    def plot(self) -> Figure:
        """Similarity by layer.

        Raises:
            ValueError: it was not measured.
        """
        figure = similarity(self.tables)
        if figure is None:
            raise ValueError("the similarity was not measured: ask for the metric cos")
        return figure

    def save(self, folder: str | Path) -> list[Path]:
        """Write the tables, the pictures in figures/ and report.html.

        Returns:
            The files.
        """
        folder = Path(folder)
        files = self.tables.save(folder)
        return [*files, *draw(self.tables, folder)]


def draw(tables: Tables, folder: Path) -> list[Path]:
    """Write the pictures in figures/ and report.html; return the files, the page last."""
    pictures = draw_all(tables, folder / "figures")
    write_html(tables, folder / "report.html", pictures)
    return [*pictures, folder / "report.html"]


def _shown(value: Cell) -> str:
    if not isinstance(value, float) or not math.isfinite(value):
        return "-"
    return f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"


def _anisotropy(tables: Tables) -> list[str]:
    last = tables.layers[-1]
    between, excess = last.get("cosine_between"), last.get("cosine_excess")
    if not isinstance(between, float) or not isinstance(excess, float):
        return []
    told = f"tokens of different texts have similarity {between:.2f} in the last layer"
    told += f": {excess:+.2f} is inside texts alone"
    without = last.get("cosine_without_mean")
    if isinstance(without, float):
        told += f"; without the mean of the sample it is {without:.2f}"
    return [told]


def _left_out(texts: dict[str, list[int] | int]) -> list[str]:
    told = []
    for key, what in (
        ("empty", "empty"),
        ("single", "of a single token"),
        ("nan", "with NaN or infinity"),
        ("truncated", "cut, for they were too long"),
    ):
        found = texts[key]
        if isinstance(found, list) and found:
            told.append(f"{len(found)} of {texts['given']} texts {what}")
    return told
