"""The images of an index: what they are called, where they lie, and what could not be read."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Int64
from numpy import ndarray
from PIL import Image, ImageOps

from filip_vl.data import Pairs, ParquetCell, TarMember, read_source
from filip_vl.data.pairs import Computed
from filip_vl.synthetic import scene
from tenfold.errors import UserError

ITEMS_FILE = "items.jsonl"

_BLOCK = 1 << 22  # bytes that are searched for the ends of lines at a time


class SceneImage(NamedTuple):
    """The picture of a generated scene, drawn when it is looked at."""

    seed: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclass(frozen=True)
class Item:
    """One image of an index.

    Attributes:
        key: what the image is called.
        source: where it lies: the path of a file, a place in a tar or Parquet file, a generated
            scene; None where it was in memory.
        size: width and height in pixels, None where the image could not be read.
        grid: rows and columns of its patches, None where tokens are no patches.
        error: why it could not be read.
    """

    key: str
    source: str | TarMember | ParquetCell | SceneImage | None = None
    size: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None
    error: str | None = None

    @classmethod
    def of(cls, key: str, source: Any) -> Item:
        """The item of an image that is not read yet; paths are made absolute."""
        if isinstance(source, str | Path):
            source = str(Path(source).absolute())
        known = isinstance(source, str | TarMember | ParquetCell | SceneImage)
        return cls(key, source if known else None)

    def same_image(self, other: Item) -> bool:
        """Whether two items tell of one image; the folder that its file lies in may have moved."""
        return self.key == other.key and self._name == other._name

    @property
    def _name(self) -> object:
        match self.source:
            case str(path):
                return Path(path).name
            case TarMember(shard, name, _, _):
                return Path(shard).name, name
            case ParquetCell(file, row, _):
                return Path(file).name, row
        return self.source

    def to_json(self) -> str:
        """One line."""
        content: dict[str, Any] = {"key": self.key}
        match self.source:
            case str(path):
                content["path"] = path
            case TarMember() as member:
                content["member"] = [str(Path(member.shard).absolute()), *member[1:]]
            case ParquetCell() as cell:
                content["cell"] = list(cell)
            case SceneImage() as made:
                content["scene"] = list(made)
        optional = {"size": self.size, "grid": self.grid, "error": self.error}
        return json.dumps(content | {name: x for name, x in optional.items() if x is not None})

    @classmethod
    def from_json(cls, line: bytes | str) -> Item:
        """What `to_json` wrote.

        Raises:
            ValueError: it was something else.
        """
        match content := json.loads(line):
            case {"path": str(source)}:
                pass
            case {"member": [str(shard), str(name), int(offset), int(size)]}:
                source = TarMember(shard, name, offset, size)
            case {"cell": [str(file), int(row), str(column)]}:
                source = ParquetCell(file, row, column)
            case {"scene": [int(seed), int(index)]}:
                source = SceneImage(seed, index)
            case {"key": str(_)}:
                source = None
            case _:
                raise ValueError(f"not an item of an index: {line!r:.80}")
        size, grid = (tuple(content[x]) if x in content else None for x in ("size", "grid"))
        return cls(content["key"], source, size, grid, content.get("error"))

    def open(self, max_pixels: int | None = None) -> Image.Image:
        """The image, as 8-bit RGB.

        Raises:
            UserError: it was never kept, is gone or damaged.
        """
        if self.source is None:
            raise UserError("the image was in memory and is not kept", where=self.key)
        return open_source(self.source, max_pixels)


def open_source(source: Any, max_pixels: int | None = None) -> Image.Image:
    """What `read_source` opens, or the picture of a generated scene.

    Raises:
        UserError: an image that is missing, damaged, foreign or too large, with its path.
    """
    if isinstance(source, SceneImage):
        return Image.fromarray(scene(*source).image)
    return read_source(source, max_pixels)


def seen_part(image: Image.Image, side: int) -> Image.Image:
    """The square in the middle of an image, which is all that the model sees of it.

    Args:
        image: any.
        side: of the result in pixels.
    """
    return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


class ItemList(Sequence[Item]):
    """The lines of an items.jsonl, read from the disk where they are looked at.

    Args:
        file: its path.
        size: how many of its bytes count.
        count: how many lines they are.

    Raises:
        UserError: there are fewer bytes, or another number of lines.
    """

    def __init__(self, file: Path, size: int, count: int) -> None:
        self.file = file
        self._text: mmap.mmap | bytes = b""
        try:
            with file.open("rb") as stream:
                if size:
                    self._text = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise self._damaged(str(error)) from error
        self._ends = _line_ends(self._text, size)
        if len(self._ends) != count:
            raise self._damaged(f"{len(self._ends)} lines where there should be {count}")

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        n = range(len(self))[index]
        start = int(self._ends[n - 1]) if n else 0
        try:
            return Item.from_json(self._text[start : int(self._ends[n])])
        except ValueError as error:
            raise self._damaged(f"line {n + 1}: {error}") from error

    def __iter__(self) -> Iterator[Item]:
        return (self[n] for n in range(len(self)))

    def _damaged(self, why: str) -> UserError:
        fix = "the index is damaged: build it anew"
        return UserError(f"cannot read the items: {why}", where=str(self.file), fix=fix)


def _line_ends(text: mmap.mmap | bytes, size: int) -> Int64[ndarray, " lines"]:
    ends = [
        np.flatnonzero(np.frombuffer(text[start : start + _BLOCK], dtype=np.uint8) == ord("\n"))
        + start
        + 1
        for start in range(0, size, _BLOCK)
    ]
    return np.concatenate(ends, dtype=np.int64) if ends else np.zeros(0, dtype=np.int64)


def scene_images(count: int, seed: int = 0) -> Pairs:
    """Generated pictures to be indexed, drawn one at a time and not kept.

    Args:
        count: how many.
        seed: of the set.
    """
    return Pairs(
        Computed(count, lambda index: SceneImage(seed, index)),
        Computed(count, lambda index: []),
        Computed(count, lambda index: f"scene {index} of set {seed}"),
    )
