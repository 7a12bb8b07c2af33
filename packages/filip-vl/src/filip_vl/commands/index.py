"""index: the tokens of many images on the disk, to be searched."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from filip_vl.commands.common import MAX_BAD_FRACTION, open_model
from filip_vl.data import Location, Pairs, merge_images, parquet_cells, read_any
from filip_vl.data.sources import files_of, source_of
from filip_vl.index import Dtype, build_index, scene_images
from tenfold.errors import UserError
from tenfold.progress import span

SHAPES = "shapes:"


def index(
    *,
    ckpt: Path,
    images: str,
    out: Path,
    dtype: Dtype = "fp16",
    token_fraction: float = 1.0,
    source: str | None = None,
    root: Path | None = None,
    image_column: str | None = None,
    batch_size: int = 64,
    chunk: int = 1024,
    workers: int = 0,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    max_pixels: int | None = None,
    device: str = "auto",
) -> None:
    """Put the tokens of images into an index; given again, it goes on where it was interrupted.

    Args:
        ckpt: a checkpoint or the folder of a run, a model folder, or a published CLIP.
        images: a folder, shards (brace ranges count), a table, JSON lines or Parquet files;
            shapes:N for N generated pictures.
        out: folder of the index.
        dtype: of the stored tokens; int8 takes half the room.
        token_fraction: share of each image's tokens that is kept, such as 0.25: a cover of all of
            them, since the texts by which the paper chooses are not known yet.
        source: format of --images; told by its name if left out.
        root: folder that the names of images start from; that of their table if left out.
        image_column: of a table, JSON lines or Parquet files; each format's own if left out.
        batch_size: images that are encoded together.
        chunk: images between two points at which an interrupted run goes on.
        workers: processes that read images.
        max_bad_fraction: share of the images that may be unreadable; these are left out.
        max_pixels: larger images are not read.
        device: auto, cpu, cuda, cuda:N or mps.
    """
    pairs = images_of(images, source, root, image_column)
    model = open_model(ckpt, device=device, texts=False)
    start = time.perf_counter()
    extent = build_index(
        model,
        pairs,
        out,
        dtype=dtype,
        token_fraction=token_fraction,
        batch_size=batch_size,
        chunk=chunk,
        workers=workers,
        max_bad_fraction=max_bad_fraction,
        max_pixels=max_pixels,
        ckpt=str(ckpt.absolute()),
        progress=True,
    )
    taken = span(time.perf_counter() - start)
    size = sum(file.stat().st_size for file in out.iterdir()) / 2**20
    print(f"{extent.images:,} images, {extent.tokens:,} tokens, {size:,.1f} MiB in {taken}: {out}")
    if extent.skipped:
        print(f"{extent.skipped:,} images could not be read; items.jsonl says why")


def images_of(
    images: str, source: str | None, root: Path | None, image_column: str | None
) -> Pairs:
    """The images that the command line names, each once.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    if images.startswith(SHAPES):
        count = images.removeprefix(SHAPES)
        if not (count.isascii() and count.isdigit() and 0 < int(count) < 10**9):
            fix = "write shapes:1000 for a thousand of them"
            raise UserError(
                f"no number of generated pictures: {count!r}", where="--images", fix=fix
            )
        return scene_images(int(count))
    if "{" not in images and not Path(images).exists():
        raise UserError("no such file or folder", where=images)
    at = Location(source or source_of(images), root, image_column, captions=False)
    pairs = read_any(images, at)
    if at.source == "parquet":  # so that a search can show them
        files = [Path(file) for file in files_of(images, at.source)]
        cells = parquet_cells(files, image_column) if image_column else parquet_cells(files)
        pairs = replace(pairs, images=cells)
    return merge_images(pairs)
