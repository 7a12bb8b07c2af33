"""Parquet files with an image and a caption column."""

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filip_vl.data.decoding import ParquetCell
from filip_vl.data.pairs import Captions, Computed, Pairs, Strings
from tenfold.errors import UserError
from tenfold.images import Column, load_parquet

IMAGE_COLUMN, CAPTION_COLUMN = "image", "caption"


def read_parquet(
    files: Sequence[Path],
    image_column: str = IMAGE_COLUMN,
    caption_column: str | None = CAPTION_COLUMN,
) -> Pairs:
    """The rows of files, through Hugging Face datasets; images stay on disk until they are wanted.

    Args:
        files: with the same columns.
        image_column: bytes of image files, or structs with a field `bytes`.
        caption_column: a text or a list of texts; None for images alone.

    Raises:
        UserError: a damaged file, a column that is not there or holds something else, or no row.
    """
    names = [str(file) for file in files]
    wanted = {} if caption_column is None else {"caption": caption_column}
    table = load_parquet(names, image=image_column, **wanted)
    if not len(table):
        raise UserError("no row in the file", where=names[0])
    none = itertools.repeat(None, len(table))
    texts = none if caption_column is None else table[caption_column]
    captions = Captions(_texts(value, f"{names[0]}, row {row}") for row, value in enumerate(texts))
    keys = Strings(f"{files[0].name}:{row}" for row in range(len(table)))
    return Pairs(Column(table, image_column), captions, keys)


def parquet_cells(files: Sequence[Path], image_column: str = IMAGE_COLUMN) -> Sequence[ParquetCell]:
    """Where the images of files lie, row by row: they can be opened later, too.

    Reading them in order is fast, reading them in another one is not: a whole row group is read for
    an image.

    Args:
        files: of `read_parquet`.
        image_column: see there.
    """
    import pyarrow.parquet

    counts = [pyarrow.parquet.read_metadata(file).num_rows for file in files]
    firsts = [0, *itertools.accumulate(counts)]

    def cell(row: int) -> ParquetCell:
        number = bisect.bisect_right(firsts, row) - 1
        return ParquetCell(str(files[number].absolute()), row - firsts[number], image_column)

    return Computed(firsts[-1], cell)


def _texts(value: Any, where: str) -> list[str]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"neither a caption nor a list of them: {value!r:.80}", where=where)
    return texts
