"""NumPy files that grow: rows are appended, and cut back to those that were committed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy import ndarray
from numpy.lib import format as npy

from tenfold.errors import UserError

_HEADER = 128  # bytes; the shape is written in place, so that its length may not change


class GrowingArray:
    """An .npy file of rows, which `numpy.load` reads at any time.

    Args:
        path: of the file, made if need be.
        dtype: of the entries.
        shape: of a row.
        rows: how many of the rows in the file count; what is behind them is cut off.

    Raises:
        UserError: there are fewer rows, or of another kind.
    """

    def __init__(self, path: Path, dtype: str, shape: tuple[int, ...], rows: int) -> None:
        self.path, self.dtype, self.shape, self.rows = path, np.dtype(dtype), shape, rows
        if rows:
            check_array(path, self.dtype, (rows, *shape))
        path.touch()
        self._file: BinaryIO = path.open("r+b")
        self._write_header()
        self._file.truncate(_HEADER + rows * self._row_bytes)
        self._file.seek(0, os.SEEK_END)

    @property
    def _row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    def append(self, rows: ndarray) -> None:
        """Write rows behind those that are there.

        Raises:
            ValueError: they are of another kind.
        """
        if rows.shape[1:] != self.shape or rows.dtype != self.dtype:
            what = f"{rows.dtype} rows of shape {rows.shape[1:]}"
            raise ValueError(f"{what}, not {self.dtype} of shape {self.shape}")
        self._file.write(np.ascontiguousarray(rows).data)
        self.rows += len(rows)

    def flush(self) -> None:
        """Put all rows on the disk."""
        self._write_header()
        self._file.seek(0, os.SEEK_END)
        sync(self._file)

    def close(self) -> None:
        """Close the file; rows that were not flushed may be there or not."""
        self._file.close()

    def _write_header(self) -> None:
        fields = {
            "descr": npy.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.rows, *self.shape),
        }
        start = npy.magic(1, 0)
        length = _HEADER - len(start) - 2
        text = repr(fields).ljust(length - 1) + "\n"
        self._file.seek(0)
        self._file.write(start + length.to_bytes(2, "little") + text.encode("latin1"))


def sync(file: BinaryIO) -> None:
    """Put on the disk what was written."""
    file.flush()
    os.fsync(file.fileno())


def map_array(path: Path, dtype: str, shape: tuple[int, ...]) -> ndarray:
    """The first rows of a file of `GrowingArray`, read from the disk where they are looked at.

    Args:
        path: of the file.
        dtype: of the entries.
        shape: how many rows, and the shape of one.

    Raises:
        UserError: there are fewer rows, or of another kind.
    """
    check_array(path, np.dtype(dtype), shape)
    # copy on write: torch warns of arrays that cannot be written to, though nobody writes
    return np.memmap(path, dtype, mode="c", offset=_HEADER, shape=shape)


def check_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Make sure that a file holds at least some rows.

    Raises:
        UserError: it does not, or they are of another kind.
    """
    fix = "the index is damaged: build it anew"
    try:
        with path.open("rb") as file:
            npy.read_magic(file)
            there, _, kind = npy.read_array_header_1_0(file)
            start = file.tell()
            found = file.seek(0, os.SEEK_END) - start
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the array: {why}", where=str(path), fix=fix) from error
    if there[1:] != shape[1:] or kind != dtype or start != _HEADER:
        what = f"{kind} rows of shape {there[1:]}, not {dtype} of shape {shape[1:]}"
        raise UserError(what, where=str(path), fix=fix)
    wanted = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if found < wanted:
        what = f"{found} bytes of rows where there should be {wanted}"
        raise UserError(what, where=str(path), fix=fix)
