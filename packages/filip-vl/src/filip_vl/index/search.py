"""Searching an index: the means of all images, then all tokens of the best of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from filip_vl.index.arrays import map_array
from filip_vl.index.items import ITEMS_FILE, Item, ItemList
from filip_vl.index.meta import IndexMeta, checkpoint_hash, refuse_checkpoint
from filip_vl.index.writer import array_file, check_items, layout, rows_of
from filip_vl.model import FilipModel
from tenfold.contrastive import kept_count
from tenfold.errors import UserError

log = logging.getLogger(__name__)

CANDIDATES, MOST_CANDIDATES = 300, 1000

_BLOCK = 1 << 20  # numbers that are looked at together: they stay in the cache
_ROUNDING = 1e-6


class Hit(NamedTuple):
    """An image that was found.

    Attributes:
        number: of the image in the index.
        item: what the image is.
        score: mean over the query's tokens of `similarities`, -1..1.
        places: which of the image's tokens is the best for each of the query's.
        similarities: of both.
    """

    number: int
    item: Item
    score: float
    places: Int64[ndarray, " words"]
    similarities: Float[ndarray, " words"]


class Found(NamedTuple):
    """Images and their scores, the best first."""

    numbers: Int64[Tensor, " found"]
    scores: Float[Tensor, " found"]


class TokenIndex:
    """The tokens of many images, on the disk.

    A text, or another picture, is compared with the mean token of every image, and the best of them
    with all of their tokens: text to image (s^T, section 3.4), the mean over the query's tokens of
    the most similar token of the image. The first step may miss an image that is good only in a few
    patches; `recall` says how often it does.

    Example:
        >>> index = TokenIndex.open("photos.index")
        >>> index.check_model(model)
        >>> for hit in index.search(text_query(model, "a red circle").tokens, k=5):
        ...     print(hit.score, hit.item.key)

    Attributes:
        folder: where it lies.
        format: what it is made of.
        extent: how many images and tokens it has.
        ckpt: where the model was that built it.
        items: the images.
    """

    def __init__(self, folder: Path, meta: IndexMeta) -> None:
        self.folder, self.ckpt = folder, meta.ckpt
        self.format, self.extent = meta.format, meta.extent
        check_items(folder / ITEMS_FILE, self.extent.item_bytes)
        self.items = ItemList(folder / ITEMS_FILE, self.extent.item_bytes, self.extent.images)
        arrays = {
            name: map_array(array_file(folder, name), dtype, (rows_of(name, self.extent), *shape))
            for name, (dtype, shape) in layout(self.format).items()
        }
        self._tokens, self._means = arrays["tokens"], arrays["means"]
        self._scales, self._positions = arrays.get("scales"), arrays.get("positions")
        self._offsets = np.array(arrays["offsets"])
        counts = np.diff(self._offsets)
        self._empty = torch.from_numpy(counts == 0)
        each = kept_count(self.format.token_fraction, self.format.tokens_per_image)
        if self._offsets[-1] != self.extent.tokens or not np.isin(counts, (0, each)).all():
            fix = "the index is damaged: build it anew"
            raise UserError("the tokens of the images do not add up", where=str(folder), fix=fix)

    @classmethod
    def open(cls, folder: str | Path) -> TokenIndex:
        """An index of `build_index`; one that is not complete is searched as far as it is.

        Raises:
            UserError: there is none, it is damaged, or no image in it could be read.
        """
        folder = Path(folder)
        meta = IndexMeta.read(folder)
        if meta is None:
            raise UserError("no index", where=str(folder), fix="build one with filip-vl index")
        if not meta.extent.tokens:
            raise UserError("the index has no image yet", where=str(folder))
        if not meta.extent.complete:
            log.warning("%s is not complete: %d images so far", folder, meta.extent.images)
        return cls(folder, meta)

    def __len__(self) -> int:
        return self.extent.images

    def check_model(self, model: FilipModel) -> None:
        """Make sure that a model is the one that built the index.

        Raises:
            UserError: it is another; names both hashes.
        """
        mine, other = self.format.checkpoint, checkpoint_hash(model)
        if mine != other:
            refuse_checkpoint(mine, other, str(self.folder))

    def search(
        self, tokens: Float[Tensor, "words dim"], k: int = 10, candidates: int = CANDIDATES
    ) -> list[Hit]:
        """The best images, as far as the prefilter lets them through.

        Args:
            tokens: of a query, normalised, on the CPU: `text_query`, `image_query`.
            k: how many.
            candidates: images whose tokens are all compared, `k` to 1,000.

        Raises:
            UserError: `k` or `candidates` out of range.
            ValueError: tokens of another width.
        """
        self._check_query(tokens, k)
        if not k <= candidates <= MOST_CANDIDATES:
            what = f"candidates must be from k = {k} to {MOST_CANDIDATES}, got {candidates}"
            raise UserError(what)
        return self._hits(tokens, self._rank(tokens, k, self._prefilter(tokens, candidates)))

    def exact(self, tokens: Float[Tensor, "words dim"], k: int = 10) -> list[Hit]:
        """The best images, all tokens of all images compared; see `search`.

        Raises:
            UserError: `k` out of range.
            ValueError: tokens of another width.
        """
        self._check_query(tokens, k)
        return self._hits(tokens, self._rank_all(tokens, k))

    def recall(
        self, tokens: Float[Tensor, "words dim"], k: int = 10, candidates: int = CANDIDATES
    ) -> float:
        """The share of the `k` best images of `exact` that `search` finds, 0..1.

        An image that scores as much as the last of them is as good.
        """
        found, best = self.search(tokens, k, candidates), self.exact(tokens, k)
        return recall_of(found, best)

    def patches(self, hit: Hit) -> Int64[ndarray, " words"]:
        """The patch behind each of a hit's places, row by row; -1 where it is no patch."""
        return np.maximum(hit.places - self.format.leading, -1)

    # ------------------------------------------------------------------------------------ steps

    def _check_query(self, tokens: Tensor, k: int) -> None:
        if tokens.shape[1] != self.format.width or not len(tokens):
            what = f"tokens of shape {tuple(tokens.shape)} for an index of width"
            raise ValueError(f"{what} {self.format.width}")
        if not 1 <= k <= MOST_CANDIDATES:
            raise UserError(f"k must be from 1 to {MOST_CANDIDATES}, got {k}")

    def _prefilter(
        self, tokens: Float[Tensor, "words dim"], count: int
    ) -> Int64[Tensor, " candidates"]:
        """The images whose mean token points most as the mean of the query's does, rising."""
        query, scores = tokens.float().mean(0), torch.empty(len(self))
        step = max(1, _BLOCK // self.format.width)
        for start in range(0, len(self), step):
            means = torch.from_numpy(self._means[start : start + step]).float()
            torch.mv(means, query, out=scores[start : start + step])
        scores[self._empty] = -torch.inf
        readable = len(self) - self.extent.skipped
        return scores.topk(min(count, readable), sorted=False).indices.sort().values

    def _rank(
        self, tokens: Float[Tensor, "words dim"], k: int, numbers: Int64[Tensor, " candidates"]
    ) -> Found:
        scores = [
            text_to_image(self._rows(part.numpy()), tokens.float())
            for part in numbers.split(self._images_at_once)
        ]
        return _best(Found(numbers, torch.cat(scores)), k)

    def _rank_all(self, tokens: Float[Tensor, "words dim"], k: int) -> Found:
        best = Found(torch.zeros(0, dtype=torch.long), torch.zeros(0))
        for part in self._blocks():
            found = self._rank(tokens, k, part)
            best = _best(Found(*(torch.cat(pair) for pair in zip(best, found, strict=True))), k)
        return best

    def _blocks(self) -> Iterator[Int64[Tensor, " images"]]:
        """All images that have tokens, in their order."""
        for start in range(0, len(self), self._images_at_once):
            numbers = torch.arange(start, min(start + self._images_at_once, len(self)))
            if len(readable := numbers[~self._empty[numbers]]):
                yield readable

    @property
    def _images_at_once(self) -> int:
        return max(1, _BLOCK // (self.format.tokens_per_image * self.format.width))

    def _rows(self, numbers: Int64[ndarray, " images"]) -> Float[Tensor, "images tokens dim"]:
        """Tokens of some images, in rising order, as float32."""
        starts, stops = self._offsets[numbers], self._offsets[numbers + 1]
        # neighbours are read in one go
        breaks = np.flatnonzero(starts[1:] != stops[:-1]) + 1
        first, last = np.append(0, breaks), np.append(breaks, len(numbers)) - 1
        runs = [slice(*run) for run in zip(starts[first], stops[last], strict=True)]
        tokens = np.concatenate([self._tokens[run] for run in runs])
        rows = torch.from_numpy(tokens).float()  # faster than NumPy's conversion
        if self._scales is not None:
            scales = np.concatenate([self._scales[run] for run in runs])
            rows *= torch.from_numpy(scales).float()[:, None]
        return rows.view(len(numbers), -1, self.format.width)

    def _hits(self, tokens: Float[Tensor, "words dim"], found: Found) -> list[Hit]:
        hits = []
        for number, score in zip(found.numbers.tolist(), found.scores.tolist(), strict=True):
            of_image = self._rows(np.array([number]))[0]
            best, rows = (of_image @ tokens.float().T).max(0)
            places = rows.numpy()
            if self._positions is not None:
                places = self._positions[self._offsets[number] + places].astype(np.int64)
            hits.append(Hit(number, self.items[number], score, places, best.numpy()))
        return hits


def recall_of(found: list[Hit], best: list[Hit]) -> float:
    """The share of the best images that were found; one that scores as much is as good."""
    bar = best[-1].score - _ROUNDING
    return sum(hit.score >= bar for hit in found) / len(best)


def text_to_image(
    images: Float[Tensor, "images tokens dim"], query: Float[Tensor, "words dim"]
) -> Float[Tensor, " images"]:
    """s^T of one query: each word's best token of the image, averaged (section 3.4).

    One direction and one text: fewer and larger steps than `late_interaction` takes for many.
    """
    similarities = query @ images.flatten(0, 1).T
    return similarities.unflatten(1, images.shape[:2]).amax(2).mean(0)


def _best(found: Found, k: int) -> Found:
    """The k best; of equal ones the first."""
    order = found.scores.sort(descending=True, stable=True).indices[:k]
    return Found(found.numbers[order], found.scores[order])
