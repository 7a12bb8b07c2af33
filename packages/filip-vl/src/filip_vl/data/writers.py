"""Pairs to disk, in formats that the readers read back."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from filip_vl.data import jsonl, table
from filip_vl.data.decoding import as_bytes
from filip_vl.data.pairs import Record
from filip_vl.data.shapes import shape_pairs
from filip_vl.data.shards import IMAGE_MEMBERS, SIZES_FILE
from filip_vl.synthetic import TEST_PAIRS, TEST_SEED, TRAIN_PAIRS, TRAIN_SEED, scene
from tenfold.checkpoint import atomic_file
from tenfold.errors import UserError
from tenfold.images import ImageSource
from tenfold.progress import track

DISK_FORMATS = ("jsonl", "csv", "webdataset")
IMAGES_FOLDER, INSTANCES_FOLDER = "images", "instances"
PER_SHARD = 1000

_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


@contextmanager
def text_file(path: Path) -> Iterator[TextIO]:
    """A text file that appears complete, or not at all."""
    with atomic_file(path) as raw:
        text = io.TextIOWrapper(raw, "utf-8", newline="")
        yield text
        text.flush()
        text.detach()


def write_jsonl(
    records: Iterable[Record], file: Path, extra: Iterable[Mapping[str, Any]] | None = None
) -> int:
    """JSON lines with `filename` and `caption`, or `captions` where there are several.

    Images that are files are named from the folder of `file`; others are written to
    `images/` there, as they are where they are the bytes of a file, else as PNG.

    Args:
        records: images with captions.
        file: its folder is made if need be.
        extra: further keys of every line.

    Returns:
        Number of lines.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    more = iter(extra) if extra is not None else None
    number = -1
    with atomic_file(file) as stream:
        for number, record in enumerate(records):
            texts = list(record.captions)
            line: dict[str, Any] = {jsonl.IMAGE_KEY: _name_for(record.image, file, number)}
            line |= {jsonl.CAPTION_KEY: texts[0]} if len(texts) == 1 else {"captions": texts}
            line |= next(more) if more is not None else {}
            stream.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    return number + 1


def write_table(records: Iterable[Record], file: Path, separator: str = "\t") -> int:
    """A table of filepath and title with a row for every caption; images as in `write_jsonl`.

    Returns:
        Number of rows.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = 0
    with text_file(file) as text:
        writer = csv.writer(text, delimiter=separator, lineterminator="\n")
        writer.writerow((table.IMAGE_COLUMN, table.CAPTION_COLUMN))
        for number, record in enumerate(records):
            name = _name_for(record.image, file, number)
            writer.writerows((name, caption) for caption in record.captions)
            rows += len(record.captions)
    return rows


def write_shards(
    records: Iterable[Record], folder: Path, stem: str = "train", per_shard: int = PER_SHARD
) -> list[Path]:
    """WebDataset shards STEM-00000.tar, ..., and their sizes in `sizes.json`.

    A sample is an image file with KEY.txt, or KEY.json where it has several captions.

    Args:
        records: images with captions.
        folder: made if need be; shards of another stem may be there already.
        stem: begin of their names.
        per_shard: samples in each but the last.

    Returns:
        The shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes_file = folder / SIZES_FILE
    sizes = json.loads(sizes_file.read_text()) if sizes_file.is_file() else {}
    shards: list[Path] = []
    for number, samples in enumerate(_in_groups(map(_sample, records), per_shard)):
        shards.append(folder / f"{stem}-{number:05d}.tar")
        with atomic_file(shards[-1]) as stream:
            tar = TarWriter(cast("BinaryIO", stream), encoder=False, mtime=0)
            for n, sample in enumerate(samples):
                tar.write({"__key__": f"{stem}{number * per_shard + n:08d}", **sample})
            tar.close()
        sizes[shards[-1].name] = len(samples)
    sizes_file.write_text(json.dumps(sizes, indent=1))
    return shards


def write_shapes(
    folder: Path,
    format: str = "jsonl",
    seed: int = 0,
    train: int = TRAIN_PAIRS,
    test: int = TEST_PAIRS,
) -> Path:
    """The generated task on disk, as training with `--data.root` reads it.

    JSON lines also name, for every picture, its `objects` and a grey PNG, `instances`, whose value
    is n where object n is seen and 0 on the ground.

    Args:
        folder: made if need be.
        format: one of `DISK_FORMATS`.
        seed: of the training set.
        train: number of training pairs.
        test: number of test pairs.

    Returns:
        The folder.

    Raises:
        UserError: an unknown format, or no pairs.
    """
    if format not in DISK_FORMATS:
        raise UserError(f"format must be one of {', '.join(DISK_FORMATS)}, got {format!r}")
    if min(train, test) < 1:
        raise UserError(f"train {train} and test {test} must be at least 1")
    for split, set_seed, count in (("train", TRAIN_SEED + seed, train), ("test", TEST_SEED, test)):
        shown = track(shape_pairs(set_seed, count), count, f"writing {split}")
        if format == "webdataset":
            write_shards(shown, folder, split)
            continue
        named = _saved(shown, folder, split)
        if format == "csv":
            write_table(named, folder / f"{split}.tsv")
        else:
            facts = _instances(folder, split, set_seed, count)
            write_jsonl(named, folder / f"{split}.jsonl", facts)
    return folder


def _saved(records: Iterable[Record], folder: Path, split: str) -> Iterator[Record]:
    (folder / IMAGES_FOLDER).mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records):
        path = folder / IMAGES_FOLDER / f"{split}-{number:06d}.png"
        Image.fromarray(record.image).save(path)
        yield record._replace(image=path)


def _instances(folder: Path, split: str, seed: int, count: int) -> Iterator[dict[str, Any]]:
    (folder / INSTANCES_FOLDER).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        drawn = scene(seed, number)
        name = f"{INSTANCES_FOLDER}/{split}-{number:06d}.png"
        Image.fromarray(drawn.instances.astype(np.uint8)).save(folder / name)
        yield {"objects": [each.name for each in drawn.objects], "instances": name}


def image_file(source: ImageSource) -> tuple[bytes, str]:
    """The bytes of an image file, and its suffix without a point.

    Files and their bytes stay as they are, arrays and PIL images become PNG.

    Raises:
        UserError: a file that is missing, or bytes of no image.
    """
    source = as_bytes(source)
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str | Path):
        try:
            source = Path(source).read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the image: {error.strerror}", where=str(source)
            ) from error
    if isinstance(source, bytes):
        try:
            kind = Image.open(io.BytesIO(source)).format
        except OSError as error:
            raise UserError("no image, or an unknown format", where="image in memory") from error
        return source, _SUFFIXES.get(kind or "", (kind or "bin").lower())
    buffer = io.BytesIO()
    image = Image.fromarray(source) if isinstance(source, np.ndarray) else source
    image.save(buffer, "PNG")
    return buffer.getvalue(), "png"


def _name_for(source: ImageSource, file: Path, number: int) -> str:
    """What a list calls an image, which is written beside it unless it is a file."""
    if isinstance(source, str | Path):
        return os.path.relpath(source, file.parent)
    content, suffix = image_file(source)
    name = f"{IMAGES_FOLDER}/{file.stem}-{number:06d}.{suffix}"
    (file.parent / IMAGES_FOLDER).mkdir(exist_ok=True)
    (file.parent / name).write_bytes(content)
    return name


def _sample(record: Record) -> dict[str, bytes]:
    """The members of a sample by their suffixes; other formats than shards know become PNG."""
    content, suffix = image_file(record.image)
    if suffix not in IMAGE_MEMBERS:
        content, suffix = image_file(Image.open(io.BytesIO(content)))
    if len(record.captions) == 1:
        return {suffix: content, "txt": record.captions[0].encode()}
    captions = json.dumps({"captions": list(record.captions)}, ensure_ascii=False)
    return {suffix: content, "json": captions.encode()}


def _in_groups(
    samples: Iterable[dict[str, bytes]], size: int
) -> Iterator[Sequence[dict[str, bytes]]]:
    group: list[dict[str, bytes]] = []
    for sample in samples:
        group.append(sample)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
