"""Tables of image files and titles: CSV and TSV, as open_clip reads them."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filip_vl.data.pairs import Pairs, gather
from tenfold.errors import UserError

IMAGE_COLUMN, CAPTION_COLUMN = "filepath", "title"

_LONGEST_FIELD = 2**31 - 1


class Row(NamedTuple):
    """One row by its columns, and the last line of it."""

    content: dict[str, Any]
    line: int


def read_table(
    file: Path,
    root: Path | None = None,
    image_column: str = IMAGE_COLUMN,
    caption_column: str | None = CAPTION_COLUMN,
    separator: str | None = None,
) -> Pairs:
    """The rows of a table with a header line.

    Args:
        file: a table in UTF-8.
        root: folder that the paths of images start from; that of the table if left out.
        image_column: paths of images.
        caption_column: their captions; None for images alone.
        separator: between columns; if left out a tab, or a comma where the header has no tab.

    Raises:
        UserError: no such file, a column that is not there, a damaged row, or no row at all.
    """
    base = str(file.parent if root is None else root)
    captions = [] if caption_column is None else [caption_column]

    def records() -> Iterator[tuple[str, list[str], str]]:
        for row, line in read_rows(file, separator, image_column, *captions):
            path = os.path.join(base, row[image_column] or "")
            yield path, [row[column] or "" for column in captions], f"{file.name}:{line}"

    pairs = gather(records())
    if not len(pairs):
        raise UserError("the table has no row", where=str(file))
    return pairs


def read_rows(file: Path, separator: str | None, *columns: str) -> Iterator[Row]:
    """The rows of a table, whatever they hold.

    Args:
        file: a table in UTF-8 with a header line.
        separator: see `read_table`.
        *columns: names that must be there.

    Raises:
        UserError: no such file, a column that is not there, or a damaged row.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    rows = None
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            header = stream.readline()
            if not header:
                raise UserError("the file is empty", where=str(file))
            stream.seek(0)
            rows = csv.DictReader(stream, delimiter=separator or separator_of(header))
            _check_header(file, rows.fieldnames or (), columns)
            for row in rows:
                row.pop(None, None)  # fields behind the last column
                yield Row(row, rows.line_num)
    except csv.Error as error:
        line = 1 if rows is None else rows.line_num
        raise UserError(f"no row: {error}", where=f"{file}:{line}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"not a table in UTF-8: {error}", where=str(file)) from error
    except OSError as error:
        raise UserError(f"cannot read the table: {error.strerror}", where=str(file)) from error


def separator_of(header: str) -> str:
    """What stands between the columns of a header line: a tab, or a comma if there is none."""
    return "," if "," in header and "\t" not in header else "\t"


def _check_header(file: Path, names: Sequence[str], columns: Sequence[str]) -> None:
    absent = [column for column in columns if column not in names]
    if not absent:
        return
    what = f"column {', '.join(absent)} missing; there are {', '.join(names) or 'none'}"
    fix = "name yours with image_column and caption_column"
    raise UserError(what, where=str(file), fix=fix)
