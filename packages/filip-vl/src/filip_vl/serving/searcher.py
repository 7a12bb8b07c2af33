"""What the page asks for: answers as plain values, and small pictures."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from filip_vl.index import (
    CANDIDATES,
    Hit,
    Query,
    QueryWord,
    TokenIndex,
    image_query,
    text_query,
)
from filip_vl.index.items import seen_part
from filip_vl.model import FilipModel
from tenfold.errors import UserError
from tenfold.images import read_image

MAX_PIXELS = 50_000_000
"""Of pictures that are sent: a small file can unpack to a large one."""

SIDES = (64, 128, 256, 512)
"""Sides of the small pictures."""


class Searcher:
    """An index and the model that built it.

    Args:
        index: to be searched.
        model: in eval mode.

    Raises:
        UserError: another model built the index.
    """

    def __init__(self, index: TokenIndex, model: FilipModel) -> None:
        index.check_model(model)
        self.index, self.model = index, model

    def about(self) -> dict[str, Any]:
        """What there is to be searched."""
        return {
            "images": self.index.extent.images - self.index.extent.skipped,
            "skipped": self.index.extent.skipped,
            "complete": self.index.extent.complete,
            "text": self.model.tokenizer is not None,
            "candidates": CANDIDATES,
        }

    def text(self, text: str, k: int, candidates: int) -> dict[str, Any]:
        """The best images for a text, see `_answer`.

        Raises:
            UserError: no word, or a number out of range.
        """
        start = time.perf_counter()
        query = text_query(self.model, text)
        return self._answer(query, query.words, k, candidates, start)

    def picture(self, content: bytes, k: int, candidates: int) -> dict[str, Any]:
        """The best images for a picture; its patches take the place of words.

        Raises:
            UserError: no picture, or a number out of range.
        """
        start = time.perf_counter()
        image = read_image({"bytes": content, "path": "the picture"}, MAX_PIXELS)
        query = image_query(self.model, image)
        words = [QueryWord("", (row,)) for row in range(len(query.tokens))]
        return self._answer(query, words, k, candidates, start)

    def thumbnail(self, number: int, side: int) -> bytes:
        """What the model saw of an image of the index, small, as a JPEG file.

        Args:
            number: of the image.
            side: one of `SIDES`.

        Raises:
            UserError: no such image, no such side, or an image that cannot be read any more.
        """
        if not 0 <= number < len(self.index):
            raise UserError(f"there is no image {number}, they are 0 to {len(self.index) - 1}")
        if side not in SIDES:
            raise UserError(f"side must be one of {', '.join(map(str, SIDES))}, got {side}")
        buffer = io.BytesIO()
        seen_part(self.index.items[number].open(), side).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    def _answer(
        self,
        query: Query,
        words: Sequence[QueryWord],
        k: int,
        candidates: int,
        start: float,
    ) -> dict[str, Any]:
        """The hits, each with the patches and the similarity of every word of the query."""
        hits = self.index.search(query.tokens, k, candidates)
        return {
            "words": [{"text": word.text, "spoken": word.spoken} for word in words],
            "grid": query.grid,
            "hits": [self._hit(hit, words) for hit in hits],
            "milliseconds": round(1000 * (time.perf_counter() - start), 2),
        }

    def _hit(self, hit: Hit, words: Sequence[QueryWord]) -> dict[str, Any]:
        patches = self.index.patches(hit)
        return {
            "number": hit.number,
            "key": hit.item.key,
            "score": round(hit.score, 4),
            "grid": hit.item.grid,
            "words": [
                {
                    "patches": sorted({int(patches[row]) for row in word.rows} - {-1}),
                    "similarity": round(float(np.mean(hit.similarities[[*word.rows]])), 4),
                }
                for word in words
            ],
        }
