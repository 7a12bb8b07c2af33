"""Opening images wherever they lie."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tenfold.data import BROKEN
from tenfold.errors import UserError
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


def as_bytes(source: ImageSource) -> ImageSource:
    """What `tenfold.images.read_image` takes: a `TarMember` becomes the bytes of its file."""
    if isinstance(source, TarMember):
        return {"bytes": source.read(), "path": f"{source.shard}/{source.name}"}
    return source


def read_source(source: ImageSource, max_pixels: int | None = None) -> Image.Image:
    """Opens an image as 8-bit RGB PIL; of an animation the first picture.

    Args:
        source: a path, bytes, {"bytes", "path"}, an array, a PIL image, or a `TarMember`.
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
