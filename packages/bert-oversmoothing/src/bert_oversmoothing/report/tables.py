"""What an analysis found, as plain tables: all that figures and the report are drawn from."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from tenfold.checkpoint import atomic_file
from tenfold.errors import UserError

Cell: TypeAlias = int | float | str | None
Row: TypeAlias = dict[str, Cell]

SPREAD_ENDS = ("", "_std", "_p5", "_p95")
"""What a measure of a text has a column for: value, standard deviation and quantiles over texts."""

_SPREADS = (
    "cosine",
    "relative_distance",
    "distance",
    "high_frequency",
    "mad",
    "cosine_without_mean",
    "effective_rank",
    "effective_rank_centred",
    "stable_rank",
    "stable_rank_centred",
    "identity_cosine",
    "identity_accuracy",
    # A text's own minimum, 5 % quantile (p5), median and mean; sigma1_p5_p95 is one over texts.
    *(f"sigma{place}_{name}" for place in (1, 2) for name in ("min", "p5", "median", "mean")),
    "sigma_product_min",
    "sigma_product_median",
    "contraction",
    "log_contraction",
    "log_attention",
    "log_norm1",
    "log_feed_forward",
    "log_norm2",
    "log_final_norm",
    "top_token_share",
    "v_tight",
    "v_paper",
)

LAYER_COLUMNS = (
    "layer",
    *(f"{name}{end}" for name in _SPREADS for end in SPREAD_ENDS),
    "cosine_between",
    "cosine_excess",
    "sigma1_lowest",
    "sigma2_lowest",
    "vacuous_share",
    "texts",
    "left_out",
    "high_frequency_left_out",
)
HEAD_COLUMNS = (
    "layer",
    "head",
    "lam",
    "lam_upper",
    "second_modulus",
    "row_entropy",
    "self_mass",
    "sink_mass",
    "sink_first",
    "sink_last",
    "mean_distance",
    "asymmetry",
    "vo_norm",
)
TOKEN_COLUMNS = (
    "text",
    "layer",
    "position",
    "token",
    "cosine_to_mean",
    "sigma1",
    "sigma2",
    "distance_share",
)
_WORDS = {"token"}
_COUNTS = {"layer", "head", "text", "position", "texts", "left_out", "high_frequency_left_out"}


@dataclass
class Tables:
    """What an analysis found.

    Attributes:
        layers: a row for each layer 0..L, with the keys `LAYER_COLUMNS`; None where a layer has no
            such value. What belongs to block l stands in row l. A measure of a text has its mean
            over texts under its name (v_tight and v_paper their median), and with `_std`, `_p5` and
            `_p95` the population standard deviation and the 5 % and 95 % quantiles over texts.
            `left_out` counts texts without a contraction or its logarithm, and
            `high_frequency_left_out` those whose ratio is infinite.
        heads: a row for each head of each layer 1..L, `HEAD_COLUMNS`; may be empty.
        tokens: a row for each token of each layer of the texts of the sample, `TOKEN_COLUMNS`; may
            be empty.
        run: what was analysed: model, texts, verdict, notes, as JSON holds it.
        sample: arrays by name, of the sample of texts.
    """

    layers: list[Row]
    heads: list[Row] = field(default_factory=list)
    tokens: list[Row] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    sample: dict[str, np.ndarray] = field(default_factory=dict)

    def column(self, name: str) -> list[float]:
        """A column of `layers` as numbers, NaN where it has no value."""
        return [_number(row.get(name)) for row in self.layers]

    def save(self, folder: str | Path) -> list[Path]:
        """Write layers.csv, heads.csv, run.json, sample.npz, and tokens.csv if there are tokens.

        Returns:
            The files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tables = {"layers": (LAYER_COLUMNS, self.layers), "heads": (HEAD_COLUMNS, self.heads)}
        if self.tokens:
            tables["tokens"] = (TOKEN_COLUMNS, self.tokens)
        else:
            (folder / "tokens.csv").unlink(missing_ok=True)
        files = {f"{name}.csv": _csv(*table) for name, table in tables.items()}
        # Python's JSON has NaN, no other program's has.
        files["run.json"] = json.dumps(_plain(self.run), indent=1, allow_nan=False).encode()
        arrays = io.BytesIO()
        np.savez_compressed(arrays, **self.sample)  # pyright: ignore[reportArgumentType]
        files["sample.npz"] = arrays.getvalue()
        for name, content in files.items():
            with atomic_file(folder / name) as file:
                file.write(content)
        return [folder / name for name in files]

    @classmethod
    def load(cls, folder: str | Path) -> Tables:
        """Read what `save` wrote; columns that an older version did not write have no values.

        Raises:
            UserError: the folder is not that of an analysis, or a file of it is missing or damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError("no such folder", where=str(folder), fix="give the --out of analyze")
        layers = _read_csv(folder / "layers.csv", LAYER_COLUMNS, some=True)
        if not layers or [row["layer"] for row in layers] != [*range(len(layers))]:
            raise UserError("the layers are not 0, 1, 2, ...", where=str(folder / "layers.csv"))
        tokens = folder / "tokens.csv"
        return cls(
            layers=layers,
            heads=_read_csv(folder / "heads.csv", HEAD_COLUMNS),
            tokens=_read_csv(tokens, TOKEN_COLUMNS) if tokens.exists() else [],
            run=_read_json(folder / "run.json"),
            sample=_read_arrays(folder / "sample.npz"),
        )


def _number(cell: Cell) -> float:
    return float(cell) if isinstance(cell, int | float) else math.nan


def _csv(names: Sequence[str], rows: Sequence[Mapping[str, Cell]]) -> bytes:
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    for row in rows:
        if unknown := set(row) - set(names):
            raise ValueError(f"no such columns: {', '.join(sorted(unknown))}")
        table.writerow([_cell(row.get(name)) for name in names])
    return text.getvalue().encode()


def _cell(cell: Cell) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return cell if isinstance(cell, str) else repr(cell)


def _plain(value: Any) -> Any:
    """Infinity and NaN as None, paths and numpy's numbers as JSON knows them."""
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case np.generic():
            return _plain(value.item())
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int() | str():
            return value
    return str(value)


def _missing(path: Path) -> UserError:
    fix = "give a folder that analyze wrote"
    return UserError(f"there is no {path.name}", where=str(path.parent), fix=fix)


def _damaged(path: Path, why: object) -> UserError:
    fix = "run analyze again, with another --out"
    return UserError(f"the file is damaged, {why}", where=str(path), fix=fix)


def _read_csv(path: Path, known: Sequence[str], *, some: bool = False) -> list[Row]:
    """The rows of a table with all the columns, or with some of them if those may be missing."""
    if not path.is_file():
        raise _missing(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = [*csv.reader(file, strict=True)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    names = lines[0] if lines else []
    fits = {*names} <= {*known} and len({*names}) == len(names) if some else names == [*known]
    if not fits:
        raise _damaged(path, "its columns are not those of an analysis")
    nothing: Row = dict.fromkeys(known)
    rows = []
    for line, cells in enumerate(lines[1:], 2):
        if len(cells) != len(names):
            raise _damaged(path, f"line {line} has {len(cells)} cells and not {len(names)}")
        try:
            pairs = zip(names, cells, strict=True)
            rows.append(nothing | {name: _value(name, cell) for name, cell in pairs})
        except ValueError as error:
            raise _damaged(path, f"line {line}: {error}") from error
    return rows


def _value(name: str, cell: str) -> Cell:
    if name in _WORDS:
        return cell
    if not cell:
        return None
    return int(cell) if name in _COUNTS else float(cell)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _missing(path)
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON or of the UTF-8
        raise _damaged(path, error) from error
    if not isinstance(run, dict):
        raise _damaged(path, "it holds no JSON object")
    return run


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise _missing(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    # zip, zlib and numpy each have errors of their own
    except Exception as error:
        raise _damaged(path, error) from error
