"""What images are, in a short hash: of their bytes, or of where and when files were written."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from tenfold.errors import UserError
from tenfold.images import ImageSource


def content_hash(sources: Iterable[ImageSource], root: str | Path) -> str:
    """A hash of all images, in their order; the same in every process.

    Of images in memory every byte counts: 50,000 of CIFAR take half a second. Of files it is the
    path below the root, the size and the time of the last change, so that a large folder is not
    read for it.

    Args:
        sources: what `tenfold.images.read_image` takes.
        root: folder that may lie elsewhere another time.

    Raises:
        UserError: a file is missing.
    """
    digest = hashlib.sha256()
    for source in sources:
        inside = source
        if isinstance(source, Mapping):
            inside = source.get("bytes") or source.get("path")
        if isinstance(inside, str | Path):
            digest.update(_facts_of_file(inside, root))
        else:
            digest.update(inside if isinstance(inside, bytes) else np.asarray(inside).tobytes())
    return digest.hexdigest()[:16]


def _facts_of_file(path: str | Path, root: str | Path) -> bytes:
    try:
        facts = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read the image: {error.strerror}", where=str(path)) from error
    return f"{os.path.relpath(path, root)}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode()
