"""Karpathy's caption splits of COCO and Flickr30K, one JSON file each."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from filip_vl.data.pairs import Pairs, gather
from tenfold.errors import UserError

CAPTIONS_PER_IMAGE = 5
"""Of the standard protocol; some images have more."""

_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
# where people unpack the images of Flickr30K, whose entries name no folder
_FOLDERS = ("", "images", "flickr30k-images", "flickr30k_images")


def read_karpathy(
    file: Path,
    split: Literal["train", "val", "test"],
    root: Path | None = None,
    captions: int | None = CAPTIONS_PER_IMAGE,
) -> Pairs:
    """The images of one split, none if there are none (Karpathy and Fei-Fei, CVPR 2015).

    Images of `restval` belong to training: 113,287 of COCO, 29,000 of Flickr30K.

    Args:
        file: `dataset_coco.json`, `dataset_flickr30k.json`, or another of their kind.
        split: which images.
        root: folder with COCO's `train2014` and `val2014`, or the images of Flickr30K; that of
            `file` if left out.
        captions: the first so many of an image are read; None for all.

    Raises:
        UserError: no such file, or something else in it.
    """
    base = file.parent if root is None else root
    prefix: str | None = None

    def records() -> Iterator[tuple[str, list[str], str]]:
        nonlocal prefix
        for number, entry in enumerate(_images(file)):
            try:
                if entry["split"] not in _SPLITS[split]:
                    continue
                name = os.path.join(entry.get("filepath") or "", entry["filename"])
                texts = [str(sentence["raw"]) for sentence in entry["sentences"][:captions]]
            except (KeyError, TypeError, AttributeError) as error:
                what = f"image {number} is not of Karpathy's format: {error!r}"
                raise UserError(what, where=str(file)) from error
            prefix = _prefix(base, name) if prefix is None else prefix
            yield os.path.join(prefix, name), texts, name

    return gather(records())


def _images(file: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=str(file)) from error
    except ValueError as error:
        raise UserError(f"no JSON: {error}", where=str(file)) from error
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise UserError("no list `images`, so not of Karpathy's format", where=str(file))
    return images


def _prefix(base: Path, name: str) -> str:
    """The folder of the images, found by the first of them."""
    there = (folder for folder in _FOLDERS if (base / folder / name).is_file())
    return str(base / next(there, ""))
