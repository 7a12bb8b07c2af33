"""Appends images to an index so that a process killed at any moment leaves no half of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Float, Int64
from numpy import ndarray

from filip_vl.index.arrays import GrowingArray, sync
from filip_vl.index.compress import quantise
from filip_vl.index.items import ITEMS_FILE, Item
from filip_vl.index.meta import Extent, IndexFormat, IndexMeta
from tenfold.errors import UserError

LOCK_FILE = ".lock"


class Rows(NamedTuple):
    """Images to append.

    Attributes:
        items: one each; those with an error have no token.
        counts: tokens of each.
        tokens: of all, normalised.
        positions: the place of each token among its image's.
        means: the direction of the mean of each image's tokens, kept or not; zeros where there is
            none.
    """

    items: Sequence[Item]
    counts: Int64[ndarray, " images"]
    tokens: Float[ndarray, "tokens dim"]
    positions: Int64[ndarray, " tokens"]
    means: Float[ndarray, "images dim"]


def layout(format: IndexFormat) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The arrays of an index by the names of their files: type and shape of a row."""
    stored = "int8" if format.dtype == "int8" else "float16"
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {
        "tokens": (stored, (format.width,)),
        "offsets": ("int64", ()),
        "means": ("float16", (format.width,)),
    }
    if format.dtype == "int8":
        arrays["scales"] = ("float16", ())
    if not format.whole:
        arrays["positions"] = (format.position_dtype, ())
    return arrays


def rows_of(name: str, extent: Extent) -> int:
    """How many rows an array has."""
    if name == "offsets":
        return extent.images + 1
    return extent.images if name == "means" else extent.tokens


def array_file(folder: Path, name: str) -> Path:
    """Where an array lies."""
    return folder / f"{name}.npy"


class IndexWriter:
    """An index to which images are appended.

    What was appended counts once `commit` has returned: the arrays and the items are on the disk
    then, and meta.json, which is replaced in one step, says how much of them counts. The next
    writer cuts off the rest.

    Args:
        folder: of an index that is there (its `format` must be the same), or one without.
        meta: of the index if it is new; of one that is there, only `ckpt` is taken.

    Raises:
        UserError: an index of another checkpoint or other options, or a damaged one.
    """

    def __init__(self, folder: Path, meta: IndexMeta) -> None:
        self.folder = folder
        before = IndexMeta.read(folder)
        if before is not None:
            before.format.require(meta.format, str(folder))
        extent = Extent() if before is None else before.extent
        self.meta = replace(meta, extent=extent)
        self._pending = extent
        if extent.images:
            check_items(folder / ITEMS_FILE, extent.item_bytes)
        self._arrays = {
            name: GrowingArray(
                array_file(folder, name), *kind, 0 if before is None else rows_of(name, extent)
            )
            for name, kind in layout(meta.format).items()
        }
        (folder / ITEMS_FILE).touch()
        self._items = (folder / ITEMS_FILE).open("r+b")
        self._items.truncate(extent.item_bytes)
        self._items.seek(extent.item_bytes)
        if before is None:
            self._arrays["offsets"].append(np.zeros(1, dtype=np.int64))
            self.commit()

    @classmethod
    @contextmanager
    def open(cls, folder: Path, meta: IndexMeta) -> Iterator[IndexWriter]:
        """A writer that is alone in its folder, which is made if need be.

        Raises:
            UserError: see the class, or another process writes there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            fix = "wait for it, or choose another folder"
            raise UserError(
                "another process builds this index", where=str(folder), fix=fix
            ) from error
        try:
            writer = cls(folder, meta)
            try:
                yield writer
            finally:
                writer.close()
        finally:
            lock.release()

    @property
    def extent(self) -> Extent:
        """How far the index is, with what was not committed yet."""
        return self._pending

    def append(self, rows: Rows) -> None:
        """Add images; they do not count before `commit`."""
        stored = {"offsets": self._pending.tokens + rows.counts.cumsum()}
        stored["means"] = rows.means.astype(np.float16)
        stored["tokens"] = rows.tokens.astype(np.float16)
        if self.meta.format.dtype == "int8":
            stored["tokens"], stored["scales"] = quantise(rows.tokens)
        if not self.meta.format.whole:
            stored["positions"] = rows.positions.astype(self.meta.format.position_dtype)
        for name, array in stored.items():
            self._arrays[name].append(array)
        lines = "".join(item.to_json() + "\n" for item in rows.items).encode()
        self._items.write(lines)
        old = self._pending
        self._pending = Extent(
            images=old.images + len(rows.items),
            skipped=old.skipped + sum(item.error is not None for item in rows.items),
            tokens=old.tokens + len(rows.tokens),
            item_bytes=old.item_bytes + len(lines),
        )

    def commit(self, complete: bool = False) -> None:
        """Make all that was appended count.

        Args:
            complete: whether these were all images.
        """
        for array in self._arrays.values():
            array.flush()
        sync(self._items)
        self._pending = replace(self._pending, complete=complete)
        self.meta = replace(self.meta, extent=self._pending)
        self.meta.write(self.folder)

    def close(self) -> None:
        """Close the files; what was not committed is lost."""
        self._items.close()
        for array in self._arrays.values():
            array.close()


def check_items(file: Path, size: int) -> None:
    """Make sure that an items.jsonl has at least some bytes.

    Raises:
        UserError: it has fewer.
    """
    found = file.stat().st_size if file.is_file() else 0
    if found < size:
        what = f"{found} bytes of items where there should be {size}"
        raise UserError(what, where=str(file), fix="the index is damaged: build it anew")
