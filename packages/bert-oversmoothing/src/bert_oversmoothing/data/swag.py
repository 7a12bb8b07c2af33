"""SWAG from its released tables: which of four endings follows."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bert_oversmoothing.data.records import Broken, Choice, Records, unreadable
from tenfold.errors import UserError

ENDINGS = tuple(f"ending{number}" for number in range(4))
COLUMNS = ("sent1", "sent2", *ENDINGS)
FILES = {"train": "train.csv", "val": "val.csv", "test": "test.csv"}


def read_swag(root: Path, split: str) -> Records | None:
    """The records of a split, None if its file is not there.

    Raises:
        UserError: a file that cannot be read.
    """
    file = root / FILES[split]
    return Records.of(read_table(file)) if file.is_file() else None


def read_table(file: Path) -> Iterator[Choice | Broken]:
    """The rows of a table with a header; test.csv has no labels.

    Raises:
        UserError: a file that cannot be read, or lacks columns.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream)
            absent = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if absent:
                raise UserError(f"column {', '.join(absent)} missing", where=str(file))
            for row in rows:
                yield choice(f"{file.name}:{rows.line_num}", row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(file, error) from error


def choice(name: str, row: Mapping[str, Any]) -> Choice | Broken:
    """A record: the context is sent1, each choice sent2 and an ending.

    Args:
        name: id of the record.
        row: columns by their names; a label is 0 to 3, or missing, empty or -1 where unknown.
    """
    texts = {column: _text(row.get(column)) for column in COLUMNS}
    # sent2 is empty where an ending is a whole sentence
    absent = [column for column in ("sent1", *ENDINGS) if not texts[column]]
    if absent:
        return Broken(name, f"no text in {', '.join(absent)}")
    endings = tuple(f"{texts['sent2']} {texts[ending]}".strip() for ending in ENDINGS)
    written = row.get("label")
    if written in (None, "", -1, "-1"):
        return Choice(name, texts["sent1"], endings)
    try:
        label = int(written)
    except ValueError:
        label = -1
    if not 0 <= label < len(ENDINGS):
        return Broken(name, f"label {written!r} is none of 0 to 3")
    return Choice(name, texts["sent1"], endings, label)


def _text(value: Any) -> str:
    """A cell without outer blanks; what other programs write for a missing one is missing."""
    text = "" if value is None else str(value).strip()
    return "" if text.lower() == "nan" else text
