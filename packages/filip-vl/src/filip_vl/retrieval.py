"""Retrieval both ways: ranks, recalls and their sum, without the matrix of all scores.

Section 3.8: images look for captions by s^I, captions for images by s^T. The rank of a query is 1
plus the number of its negatives that score strictly above its best positive, so that a tie counts
for the query.

Legend of the shape names: `images` and `texts` are those of the whole set; an image and a text of
one group belong together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from filip_vl.model import TokenBatch
from tenfold.contrastive import late_interaction

RECALLS = (1, 5, 10)


class Ranks(NamedTuple):
    """Rank of every query, 1 for the best.

    Attributes:
        i2t: of images among texts.
        t2i: of texts among images.
    """

    i2t: Int64[Tensor, " images"]
    t2i: Int64[Tensor, " texts"]


class TokenSet:
    """The normalised tokens of many images or texts, without padding.

    Args:
        batches: as the towers give them, on any device.
        dtype: in which tokens are kept; float16 halves the memory.
        device: where they are kept.
    """

    def __init__(
        self,
        batches: Iterable[TokenBatch],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows: list[Tensor] = []
        for batch in batches:
            flat = batch.normalized()[batch.mask].to(device, dtype)
            # a view would bring along the whole batch where it is kept, or sent to other ranks
            self.rows += [row.clone() for row in flat.split(batch.mask.sum(1).tolist())]

    def __len__(self) -> int:
        return len(self.rows)

    def padded(
        self, which: Int64[Tensor, " rows"]
    ) -> tuple[Float[Tensor, "rows length dim"], Bool[Tensor, "rows length"]]:
        """Some of them, padded to the longest, and which tokens are none of the padding."""
        rows = [self.rows[index] for index in which.tolist()]
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        tokens = pad_sequence(rows, batch_first=True)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return tokens, places < lengths[:, None]


def retrieval_ranks(
    images: TokenSet,
    texts: TokenSet,
    text_groups: Int64[Tensor, " texts"],
    image_groups: Int64[Tensor, " images"] | None = None,
    *,
    image_chunk: int = 64,
    text_chunk: int = 1024,
    device: torch.device | str = "cpu",
) -> Ranks:
    """Ranks of all queries, chunk by chunk.

    Args:
        images: to be found, and to look for.
        texts: likewise; an image may have several.
        text_groups: the group of each text; where `image_groups` is left out, its image.
        image_groups: the group of each image; by default each is a group of its own.
        image_chunk: images that are scored at a time.
        text_chunk: texts that are scored at a time.
        device: on which they are; their tokens may be kept on another.

    Raises:
        ValueError: groups that do not fit, or queries that have nothing to find.
    """
    if image_groups is None:
        image_groups = torch.arange(len(images))
    _check(images, texts, text_groups, image_groups)
    # neighbours belong together, so that few tiles hold positives; those are kept
    rows, columns = (groups.argsort(stable=True) for groups in (image_groups, text_groups))
    tiles = [
        _Tile(i, j, image_groups[i, None] == text_groups[j])
        for j in columns.split(text_chunk)
        for i in rows.split(image_chunk)
    ]
    kept = {n: _score(images, texts, t, device) for n, t in enumerate(tiles) if t.positive.any()}
    best = _Scores(*(torch.full((len(side),), -torch.inf) for side in (images, texts)))
    for n, found in kept.items():
        i2t, t2i = (s.masked_fill(~tiles[n].positive, -torch.inf) for s in found)
        best.i2t[tiles[n].images] = best.i2t[tiles[n].images].maximum(i2t.amax(1))
        best.t2i[tiles[n].texts] = best.t2i[tiles[n].texts].maximum(t2i.amax(0))
    ranks = Ranks(*(torch.ones(len(side), dtype=torch.int64) for side in (images, texts)))
    for n, tile in enumerate(tiles):
        i2t, t2i = kept[n] if n in kept else _score(images, texts, tile, device)
        above = (i2t > best.i2t[tile.images, None]) & ~tile.positive
        ranks.i2t[tile.images] += above.sum(1)
        ranks.t2i[tile.texts] += ((t2i > best.t2i[tile.texts]) & ~tile.positive).sum(0)
    return ranks


def ranks_of(
    scores: Float[Tensor, "queries answers"], positive: Bool[Tensor, "queries answers"]
) -> Int64[Tensor, " queries"]:
    """Rank of every query in a matrix of scores that is at hand.

    Args:
        scores: the higher, the better.
        positive: True where an answer is right.

    Raises:
        ValueError: queries without a right answer, which are listed.
    """
    _check_findable(positive.any(1), "queries")
    best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    return 1 + ((scores > best) & ~positive).sum(1)


def recall_at(ranks: Int64[Tensor, " queries"], k: int) -> float:
    """R@k: share of the queries that find an answer among the `k` best, 0..1."""
    return float((ranks <= k).double().mean())


def retrieval_metrics(ranks: Ranks) -> dict[str, float]:
    """R@1, R@5 and R@10 of both directions in 0..1, and their sum, 0..6.

    Returns:
        "i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10" and "rsum"; papers write them
        in per cent, all seven.
    """
    found = {
        f"{direction}_r{k}": recall_at(side, k)
        for direction, side in ranks._asdict().items()
        for k in RECALLS
    }
    return found | {"rsum": sum(found.values())}


def fine_recall(image: TokenBatch, text: TokenBatch, group: int) -> dict[str, float]:
    """R@1 inside groups of near duplicates.

    Args:
        image: tokens of the images, group by group.
        text: tokens of their captions in the same order.
        group: pairs in a group, so that chance is its inverse.

    Returns:
        "i2t_r1" and "t2i_r1", 0..1.

    Raises:
        ValueError: pairs that do not divide into groups.
    """
    if len(image.tokens) != len(text.tokens) or len(image.tokens) % group:
        sizes = f"{len(image.tokens)} images and {len(text.tokens)} captions"
        raise ValueError(f"{sizes} are no groups of {group} pairs")
    v, t, own = image.normalized(), text.normalized(), torch.eye(group, dtype=torch.bool)
    found: list[Ranks] = []
    for first in range(0, len(v), group):
        part = slice(first, first + group)
        i2t, t2i = late_interaction(v[part], t[part], image.mask[part], text.mask[part])
        found.append(Ranks(ranks_of(i2t.cpu(), own), ranks_of(t2i.cpu().mT, own)))
    sides = zip(*found, strict=True)
    return {
        f"{direction}_r1": recall_at(torch.cat(side), 1)
        for direction, side in zip(Ranks._fields, sides, strict=True)
    }


class _Scores(NamedTuple):
    """s^I and s^T."""

    i2t: Float[Tensor, "..."]
    t2i: Float[Tensor, "..."]


class _Tile(NamedTuple):
    """A part of the matrix of all scores."""

    images: Int64[Tensor, " rows"]
    texts: Int64[Tensor, " columns"]
    positive: Bool[Tensor, "rows columns"]


@torch.no_grad()
def _score(images: TokenSet, texts: TokenSet, tile: _Tile, device: torch.device | str) -> _Scores:
    v, v_mask = (x.to(device) for x in images.padded(tile.images))
    t, t_mask = (x.to(device) for x in texts.padded(tile.texts))
    return _Scores(*(s.cpu() for s in late_interaction(v, t, v_mask, t_mask)))


def _check(images: TokenSet, texts: TokenSet, text_groups: Tensor, image_groups: Tensor) -> None:
    for name, side, groups in (("image", images, image_groups), ("text", texts, text_groups)):
        if len(groups) != len(side):
            raise ValueError(f"{len(groups)} {name} groups for {len(side)} {name}s")
    _check_findable(torch.isin(image_groups, text_groups), "images")
    _check_findable(torch.isin(text_groups, image_groups), "texts")


def _check_findable(findable: Bool[Tensor, " queries"], name: str) -> None:
    lost = (~findable).nonzero().flatten().tolist()
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise ValueError(f"{name} that have nothing to find: {', '.join(map(str, lost[:5]))}{more}")
