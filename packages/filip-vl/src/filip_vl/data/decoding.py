"""Opening images wherever they lie."""

import bisect
import functools
import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tenfold.data import BROKEN
from tenfold.errors import UserError, first_line
from tenfold.images import ImageSource, read_image


class TarMember(NamedTuple):
    """A file inside a tar file: its first byte there, and how many it has."""

    shard: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            UserError: the tar file is missing.
        """
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise UserError(f"cannot read the shard: {error.strerror}", where=self.shard) from error


class ParquetCell(NamedTuple):
    """An image in a Parquet file: its row there, and its column."""

    file: str
    row: int
    column: str

    def read(self) -> bytes:
        """The bytes of the image's own file.

        Raises:
            UserError: the Parquet file is missing or damaged, or the cell holds no bytes.
        """
        values, first = _row_group(self.file, self.row, self.column)
        value = values[self.row - first].as_py()
        found = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(found, bytes):
            raise UserError("no bytes of an image", where=f"{self.file}, row {self.row}")
        return found


@functools.lru_cache(maxsize=1)
def _boundaries(file: str) -> list[int]:
    """The first row of every row group, and the number of rows."""
    import pyarrow.parquet  # here: only those who read Parquet wait for it

    meta = pyarrow.parquet.read_metadata(file)
    sizes = [meta.row_group(n).num_rows for n in range(meta.num_row_groups)]
    return [0, *itertools.accumulate(sizes)]


@functools.lru_cache(maxsize=1)
def _group(file: str, number: int, column: str) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as opened:
        return opened.read_row_group(number, columns=[column]).column(0)


def _row_group(file: str, row: int, column: str) -> tuple[Any, int]:
    """The values around a row, the last ones of which are kept, and the first one's row."""
    try:
        firsts = _boundaries(file)
        number = bisect.bisect_right(firsts, row) - 1
        return _group(file, number, column), firsts[number]
    except (OSError, ValueError, KeyError) as error:  # pyarrow's are of these
        raise UserError(f"cannot read the images: {first_line(error)}", where=file) from error


def as_bytes(source: ImageSource) -> ImageSource:
    """What `tenfold.images.read_image` takes: the bytes of a part of a file."""
    match source:
        case TarMember(shard, name):
            return {"bytes": source.read(), "path": f"{shard}/{name}"}
        case ParquetCell(file, row):
            return {"bytes": source.read(), "path": f"{file}, row {row}"}
    return source


def read_source(source: ImageSource, max_pixels: int | None = None) -> Image.Image:
    """Opens an image as 8-bit RGB PIL; of an animation the first picture.

    Args:
        source: a path, bytes, {"bytes", "path"}, an array, a PIL image, a `TarMember` or a
            `ParquetCell`.
        max_pixels: refuse larger files before they are decoded; PIL's own limit if left out.

    Raises:
        UserError: an image that is missing, damaged, foreign or too large, with its path.
    """
    return read_image(as_bytes(source), max_pixels)


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height, from the head of the file alone.

    Raises:
        UserError: an image that is missing or foreign.
    """
    source = as_bytes(source)
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    if isinstance(source, Image.Image):
        return source.size
    where = str(source) if isinstance(source, str | Path) else "image in memory"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as image:
            return image.size
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image: {error}", where=where) from error
