"""Building an index: images are read, encoded and appended, in chunks that memory does not keep."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from filip_vl.data import Pairs, eval_transform
from filip_vl.data.transforms import CLIP_MEAN, CLIP_STD, Transform
from filip_vl.index.compress import keep_tokens
from filip_vl.index.items import ITEMS_FILE, Item, ItemList, open_source
from filip_vl.index.meta import Dtype, Extent, IndexFormat, IndexMeta, checkpoint_hash
from filip_vl.index.writer import IndexWriter, Rows
from filip_vl.model import FilipModel
from tenfold.data import BROKEN
from tenfold.errors import UserError
from tenfold.progress import track

log = logging.getLogger(__name__)

MAX_BAD_FRACTION = 0.01


class _Loaded(NamedTuple):
    """An image that was read, or what was wrong with it."""

    item: Item
    pixels: Tensor | None


class _Images(Dataset[_Loaded]):
    """The images from some place on, as they go into the model."""

    def __init__(
        self, images: Pairs, first: int, transform: Transform, max_pixels: int | None
    ) -> None:
        self.images, self.first = images, first
        self.transform, self.max_pixels = transform, max_pixels

    def __len__(self) -> int:
        return len(self.images) - self.first

    def __getitem__(self, index: int) -> _Loaded:
        number = self.first + index
        item = Item(self.images.keys[number])
        try:
            source = self.images.images[number]
            item = Item.of(item.key, source)
            picture = open_source(source, self.max_pixels)
            return _Loaded(replace(item, size=picture.size), self.transform(picture))
        except BROKEN as error:
            reason = str(error) if isinstance(error, UserError) else repr(error)
            return _Loaded(replace(item, error=reason), None)


def build_index(
    model: FilipModel,
    images: Pairs,
    out: str | Path,
    *,
    dtype: Dtype = "fp16",
    token_fraction: float = 1.0,
    batch_size: int = 64,
    chunk: int = 1024,
    workers: int = 0,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    max_pixels: int | None = None,
    ckpt: str = "",
    progress: bool = False,
) -> Extent:
    """Put the tokens of images into an index, or go on with one that was interrupted.

    A process killed at any moment loses no more than the last chunk, which the next one makes
    again: no image is there twice and none is missing. An index that is complete takes further
    images behind those that it has. An image that cannot be read keeps its place, with the reason
    and without tokens, and is not tried again.

    Example:
        >>> build_index(model, read_images(Path("photos")), "photos.index", dtype="int8")

    Args:
        model: in eval mode, on the device where it is to run.
        images: captions are not looked at; the same images in the same order to go on.
        out: folder of the index.
        dtype: how tokens are stored; "int8" takes half the space of "fp16".
        token_fraction: the share of each image's tokens that is kept, see `keep_tokens`.
        batch_size: images that are encoded together.
        chunk: images between two points at which an interrupted run goes on.
        workers: processes that read images.
        max_bad_fraction: the share of images that may be unreadable.
        max_pixels: refuse larger images before they are decoded.
        ckpt: where the model lies, for a search to find it.
        progress: show it.

    Returns:
        How many images and tokens the index has.

    Raises:
        UserError: an index of another checkpoint, of other options or of other images is there, it
            is damaged, too many images cannot be read, or an option is out of range.
    """
    _check_options(batch_size, chunk, workers, max_bad_fraction)
    size = model.config.image_size
    format = index_format(model, dtype, token_fraction)
    with IndexWriter.open(Path(out), IndexMeta(format, ckpt=ckpt)) as writer:
        done = writer.extent
        _check_same_images(writer.folder, done, images)
        if done.complete and done.images == len(images):
            return done
        rest = _Images(images, done.images, eval_transform(size), max_pixels)
        loader: Any = DataLoader(
            rest, batch_size, num_workers=workers, collate_fn=_as_list, shuffle=False
        )
        committed = done.images
        for batch in track(loader, label="index") if progress else loader:
            writer.append(_encoded(model, batch, token_fraction))
            _check_bad(batch, writer.extent, len(images), max_bad_fraction)
            if writer.extent.images - committed >= chunk:
                writer.commit()
                committed = writer.extent.images
        writer.commit(complete=True)
        return writer.extent


def index_format(model: FilipModel, dtype: Dtype, token_fraction: float) -> IndexFormat:
    """What an index of a model's tokens is made of.

    Raises:
        UserError: no such type, or a share that is none.
    """
    config = model.config
    return IndexFormat(
        checkpoint=checkpoint_hash(model),
        width=config.embed_dim,
        dtype=dtype,
        token_fraction=float(token_fraction),
        tokens_per_image=config.image_tokens,
        leading=int(config.include_cls and not config.pooled),
        preprocessing={
            "image_size": config.image_size,
            "resize": "shorter side, bicubic, antialiased",
            "crop": "centre",
            "mean": list(CLIP_MEAN),
            "std": list(CLIP_STD),
        },
    )


def _check_options(batch_size: int, chunk: int, workers: int, max_bad_fraction: float) -> None:
    if min(batch_size, chunk) < 1 or workers < 0:
        given = f"batch_size {batch_size}, chunk {chunk}, workers {workers}"
        raise UserError(
            f"batches and chunks need at least one image, workers be 0 or more: {given}"
        )
    if not 0 <= max_bad_fraction <= 1:
        raise UserError(f"max_bad_fraction must be in 0..1, got {max_bad_fraction}")


def _check_same_images(folder: Path, done: Extent, images: Pairs) -> None:
    """Make sure that an index begins with these images.

    Raises:
        UserError: it does not; the first that differs is named.
    """
    fix = "give the images that it was begun with, or another folder"
    if done.images > len(images):
        what = f"the index has {done.images} images already, of which only {len(images)} are given"
        raise UserError(what, where=str(folder), fix=fix)
    items = ItemList(folder / ITEMS_FILE, done.item_bytes, done.images)
    for number, item in enumerate(items):
        given = Item(images.keys[number])
        if number == done.images - 1:  # of one it is worth to look at the source as well
            given = Item.of(given.key, images.images[number])
            given = given if given.same_image(item) else replace(given, key=str(given.source))
        if given.key != item.key:
            what = f"the index was begun with other images: number {number} was {item.key}"
            raise UserError(f"{what}, is {given.key}", where=str(folder), fix=fix)


def _check_bad(batch: Sequence[_Loaded], extent: Extent, total: int, limit: float) -> None:
    if extent.skipped <= limit * total:
        return
    # an index that goes on may have had too many before this batch
    broken = [f"; the last is {item.key}: {item.error}" for item, _ in batch if item.error]
    raise UserError(
        f"{extent.skipped} of the first {extent.images} images cannot be read, more than "
        f"{limit:.2%} of {total}{broken[-1] if broken else ''}",
        fix="raise max_bad_fraction to leave them out, or mend them and build another index",
    )


def _as_list(loaded: list[_Loaded]) -> list[_Loaded]:
    return loaded


@torch.inference_mode()
def _encoded(model: FilipModel, batch: Sequence[_Loaded], fraction: float) -> Rows:
    """The tokens of a batch; images without pixels have none."""
    readable = np.array([loaded.pixels is not None for loaded in batch])
    width = model.config.embed_dim
    means = np.zeros((len(batch), width), dtype=np.float32)
    counts = np.zeros(len(batch), dtype=np.int64)
    pixels = [loaded.pixels for loaded in batch if loaded.pixels is not None]
    if not pixels:
        items = [loaded.item for loaded in batch]
        nothing = np.zeros((0, width), dtype=np.float32)
        return Rows(items, counts, nothing, np.zeros(0, dtype=np.int64), means)
    like = model.logit_scale
    encoded = model.encode_image(torch.stack(pixels).to(like.device, like.dtype))
    tokens = encoded.normalized()
    means[readable] = F.normalize(tokens.mean(1), dim=-1).cpu().numpy()
    kept, places = keep_tokens(tokens, fraction)
    counts[readable] = kept.shape[1]
    items = [
        loaded.item if loaded.pixels is None else replace(loaded.item, grid=encoded.grid)
        for loaded in batch
    ]
    return Rows(
        items, counts, kept.flatten(0, 1).cpu().numpy(), places.flatten().cpu().numpy(), means
    )
