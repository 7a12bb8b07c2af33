"""Parquet files with an image and a caption column."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filip_vl.data.pairs import Captions, Pairs, Strings
from tenfold.errors import UserError
from tenfold.images import Column, load_parquet

IMAGE_COLUMN, CAPTION_COLUMN = "image", "caption"


def read_parquet(
    files: Sequence[Path], image_column: str = IMAGE_COLUMN, caption_column: str = CAPTION_COLUMN
) -> Pairs:
    """The rows of files, through Hugging Face datasets; images stay on disk until they are wanted.

    Args:
        files: with the same columns.
        image_column: bytes of image files, or structs with a field `bytes`.
        caption_column: a text or a list of texts.

    Raises:
        UserError: a damaged file, a column that is not there or holds something else, or no row.
    """
    names = [str(file) for file in files]
    table = load_parquet(names, image=image_column, caption=caption_column)
    if not len(table):
        raise UserError("no row in the file", where=names[0])
    captions = Captions(
        _texts(value, f"{names[0]}, row {row}") for row, value in enumerate(table[caption_column])
    )
    keys = Strings(f"{files[0].name}:{row}" for row in range(len(table)))
    return Pairs(Column(table, image_column), captions, keys)


def _texts(value: Any, where: str) -> list[str]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"neither a caption nor a list of them: {value!r:.80}", where=where)
    return texts
