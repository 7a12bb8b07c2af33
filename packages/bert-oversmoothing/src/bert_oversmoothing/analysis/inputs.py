"""Texts and images that a person names: words of the command line, files, folders."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tenfold.errors import UserError, first_line
from tenfold.images import IMAGE_SUFFIXES, image_files

_USUAL = ("text", "sentence")
_KINDS = "give a .txt, .tsv, .csv or .jsonl file"
_JSON_LINE = '{"text": "one text"}'
_SHOWN = 60  # letters of a line that is shown


def read_texts(
    texts: Sequence[str] = (),
    file: str | Path | None = None,
    column: str | None = None,
    limit: int | None = None,
) -> list[str]:
    """Texts as given, then those of a file; blank ones are kept, for they are counted later.

    Args:
        texts: as they are.
        file: .txt with a text a line, .tsv or .csv, or .jsonl with an object a line.
        column: of a table: a name in its first line, or a number from 1 if it has no such line; the
            key of JSON lines. "text" or "sentence" where there is one, if left out.
        limit: so many at most.

    Raises:
        UserError: no texts, no such file or column, or a line that cannot be read.
    """
    found = [*texts]
    if file is not None:
        found += _of_file(Path(file), column)
    elif column is not None:
        raise UserError("a column of what file?", where="--column", fix="add --file")
    if not found:
        where = None if file is None else str(file)
        raise UserError("there are no texts", where=where, fix="give some, or --file or --images")
    return found[:limit]


def list_images(folder: str | Path, limit: int | None = None) -> list[Path]:
    """The images below a folder, in the order of their paths.

    Raises:
        UserError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("no such folder", where=str(folder), fix="name a folder of images")
    found = image_files(folder)
    if not found:
        fix = f"put files there that end in {', '.join(sorted(IMAGE_SUFFIXES))}"
        raise UserError("no images in the folder", where=str(folder), fix=fix)
    return found[:limit]


def _of_file(path: Path, column: str | None) -> list[str]:
    if path.is_dir():
        raise UserError("is a folder", where=str(path), fix=_KINDS)
    if not path.is_file():
        raise UserError("no such file", where=str(path), fix=_KINDS)
    readers = {".tsv": _table, ".csv": _table, ".jsonl": _json_lines, ".txt": _lines}
    if path.suffix.lower() not in readers:
        raise UserError(f"unknown kind of file: {path.suffix!r}", where=str(path), fix=_KINDS)
    try:
        return [*readers[path.suffix.lower()](path, column)]
    except UnicodeDecodeError as error:
        fix = "save it as UTF-8, as iconv -f LATIN1 -t UTF-8 does"
        raise UserError("the file is not UTF-8", where=str(path), fix=fix) from error


def _lines(path: Path, column: str | None) -> Iterator[str]:
    if column is not None:
        raise UserError("a .txt file has no columns", where=str(path), fix="leave out --column")
    # str.splitlines would break at separators that are part of a text.
    with path.open(encoding="utf-8-sig") as file:
        yield from (line.rstrip("\n") for line in file)


def _table(path: Path, column: str | None) -> Iterator[str]:
    tabs = path.suffix.lower() == ".tsv"
    # The tables of GLUE hold quotes that close nothing.
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, **style)  # pyright: ignore[reportArgumentType]
        place = None
        for line, row in enumerate(_rows(rows, path), 1):
            if place is None:
                place, has_heads = _place(row, column, path)
                if has_heads:
                    continue
            if not row:  # a blank line
                continue
            if place >= len(row):
                what = f"line {line} has {len(row)} columns, and no {place + 1}."
                fix = "mend the line, or name another column"
                raise UserError(what, where=str(path), fix=fix)
            yield row[place]


def _rows(rows: Iterator[list[str]], path: Path) -> Iterator[list[str]]:
    try:
        yield from rows
    except csv.Error as error:
        fix = "mend the file, or give a .txt file with a text a line"
        raise UserError(f"no table, {first_line(error)}", where=str(path), fix=fix) from error


def _place(heads: Sequence[str], column: str | None, path: Path) -> tuple[int, bool]:
    """Where the column stands, and whether the first line is one of heads."""
    if column is None:
        column = next((name for name in _USUAL if name in heads), None)
        if column is None and len(heads) == 1:
            return 0, False
    # A first line without heads may hold a number that is somebody's label.
    if column is not None and column.isdecimal():
        if 1 <= int(column) <= len(heads):
            return int(column) - 1, False
    elif column is not None and column in heads:
        return heads.index(column), True
    line = " | ".join(heads)
    line = line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."
    what = "which column holds the texts?" if column is None else f"no column {column!r},"
    what += f" there are {len(heads)}, and the first line is {line!r}"
    fix = "--column NAME takes one of these names, "
    fix += "--column 1 takes the first of a file without a header line"
    raise UserError(what, where=str(path), fix=fix)


def _json_lines(path: Path, column: str | None) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                item = json.loads(line.rstrip())
            except ValueError as error:
                what = first_line(error)
                if isinstance(error, json.JSONDecodeError):  # its line is always the first
                    what = f"{error.msg} at column {error.colno}"
                fix = f"give a line such as {_JSON_LINE}"
                raise UserError(f"no JSON, {what}", where=where, fix=fix) from error
            if isinstance(item, str) and column is None:
                yield item
                continue
            if not isinstance(item, dict):
                fix = f"give one such as {_JSON_LINE}"
                raise UserError("the line is not a JSON object", where=where, fix=fix)
            key = column or next((name for name in _USUAL if name in item), None)
            if key is None or not isinstance(item.get(key), str):
                what = "which key holds the text?" if key is None else f"no text under {key!r}"
                fix = f"--column: choose from {', '.join(item)}"
                raise UserError(what, where=where, fix=fix)
            yield item[key]
