"""Training on WebDataset shards, read from their beginning to their end in a shuffled order.

Rank and loading process r, w of R, W read the shards at places r + R (w + W n) of an epoch's order,
and mix their samples in a buffer. Batch j of a rank comes from stream j mod W, as the loading
processes take turns; so it is a function of (seed, epoch, rank, j), whether read in one go or
taken up again in the middle of an epoch.
"""

import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, count, islice
from typing import Any, NamedTuple, TypeVar

from webdataset.filters import shuffle

from filip_vl.data.batches import PairItem
from filip_vl.data.pairs import Record
from filip_vl.data.shards import ShardSample, read_samples
from tenfold.data import BROKEN, BadItem, Draw
from tenfold.errors import UserError
from tenfold.training import mix

SHARD_BUFFER = (2000, 500)
SAMPLE_BUFFER = (5000, 1000)
"""Size of a shuffling buffer, and how many entries it holds before it gives away the first
(open_clip's sizes)."""

_UNCOUNTED = 1_000_000  # samples of a shard, where nobody knows

T = TypeVar("T")


class BlankCaption(BadItem):
    """A sample without a word, which is counted apart from those that are broken."""


class _Place(NamedTuple):
    """Where a stream stands: the next sample is number `position` of it."""

    epoch: int
    rank: int
    stream: int
    position: int


class _Found(NamedTuple):
    """A sample, and its number among all of the shards."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    sample: ShardSample
    shard: str


class ShardStream:
    """The training samples of shards; a loader asks for them by the place in an epoch.

    A stream that ends before the epoch does begins again in another order. A sample that cannot be
    used is replaced by the next of its batch that can.

    Args:
        shards: tar files or addresses.
        sizes: samples of each; None where they are not known.
        size: samples in an epoch, on all ranks together.
        make_item: makes (record, draw, image id) an item, `PairItems.item`.
        seed: of the order.
        batch_size: samples in a batch, on each rank.
        streams: loading processes of each rank.
        ranks: number of ranks.
        buffer: samples that are mixed in memory, and how many of them before the first batch.

    Raises:
        UserError: fewer shards than streams.
    """

    def __init__(
        self,
        shards: Sequence[str],
        sizes: Sequence[int] | None,
        size: int,
        make_item: Callable[[Record, Draw, int], PairItem],
        *,
        seed: int = 0,
        batch_size: int = 64,
        streams: int = 1,
        ranks: int = 1,
        buffer: tuple[int, int] = SAMPLE_BUFFER,
    ) -> None:
        if len(shards) < streams * ranks:
            what = f"{len(shards)} shards cannot feed {streams} loading processes on {ranks} ranks"
            fix = f"use at most {len(shards) // ranks} workers, or write the data to more shards"
            raise UserError(what, fix=fix if len(shards) >= ranks else "use fewer ranks")
        self.shards, self.size, self.make_item = list(shards), size, make_item
        self.first = (
            [0, *accumulate(sizes)] if sizes else [n * _UNCOUNTED for n in range(len(shards))]
        )
        self.counted = sizes is not None
        self.seed, self.batch_size, self.streams, self.ranks = seed, batch_size, streams, ranks
        self.buffer = buffer
        self._place: _Place | None = None
        self._samples: Iterator[_Found] = iter(())
        self._bad: list[BadItem] = []

    def __len__(self) -> int:
        return self.size

    def fetch(self, draws: Sequence[Draw]) -> tuple[list[PairItem], list[BadItem]]:
        """The items of a batch, and what was found unusable on the way.

        Args:
            draws: their places in the epoch, rank + ranks * (0, 1, 2, ...): all of one batch.
        """
        place, rest = divmod(draws[0].index, self.ranks)
        batch = place // self.batch_size
        turn, stream = divmod(batch, self.streams)
        self._go_to(_Place(draws[0].epoch, rest, stream, turn * self.batch_size))
        found = [next(self._samples) for _ in draws]
        assert self._place is not None
        self._place = self._place._replace(position=self._place.position + len(found))
        items = [self._item(each, draws[0].epoch) for each in found]
        bad, self._bad = self._bad, []
        return _filled(items), bad

    def _go_to(self, place: _Place) -> None:
        if place == self._place:
            return
        self._place, self._bad = place, []
        self._samples = self._stream(place)
        for _ in range(place.position):
            next(self._samples)

    def _item(self, found: _Found, epoch: int) -> PairItem | None:
        key = f"{found.shard}/{found.sample.key}"
        image = {"bytes": found.sample.image, "path": key}
        record = Record(image, found.sample.captions, key)
        try:
            return self.make_item(record, Draw(epoch, found.index), found.index)
        except BROKEN as error:
            reason = str(error) if isinstance(error, UserError) else repr(error)
            self._bad.append(BadItem(found.index, reason, traceback.format_exc()))
            return None

    def _stream(self, place: _Place) -> Iterator[_Found]:
        """All samples of a stream, lap after lap."""
        for lap in count():
            keys = (self.seed, place.epoch, lap)
            numbers = _shuffled(iter(range(len(self.shards))), SHARD_BUFFER, *keys)
            of_rank = islice(numbers, place.rank, None, self.ranks)
            of_stream = islice(of_rank, place.stream, None, self.streams)
            samples = self._read(of_stream)
            mixed = _shuffled(samples, self.buffer, *keys, place.rank, place.stream)
            empty = True
            for each in mixed:
                empty = False
                yield each
            if empty:
                what = "none of the samples that one loading process reads can be used"
                raise UserError(what, where=self._bad[0].reason if self._bad else self.shards[0])

    def _read(self, numbers: Iterator[int]) -> Iterator[_Found]:
        for number in numbers:
            shard, index = self.shards[number], self.first[number]
            damaged = False

            def broken(key: str, reason: str) -> None:
                nonlocal damaged
                damaged = damaged or not key
                where = f"{shard}/{key}" if key else shard  # noqa: B023 (told while it is read)
                self._bad.append(BadItem(index, f"{where}: {reason}", ""))  # noqa: B023

            for sample in read_samples(shard, broken):
                worded = [] if sample is None else [t for t in sample.captions if t.strip()]
                if sample is not None and worded:
                    yield _Found(index, sample._replace(captions=worded), shard)
                elif sample is not None:
                    what = f"empty caption ({shard}/{sample.key})"
                    self._bad.append(BlankCaption(index, what, ""))
                index += 1
            if not damaged and self.counted and index < self.first[number + 1]:
                broken("", f"it ends before the {self.first[number + 1] - index} last samples")


def _filled(items: Sequence[PairItem | None]) -> list[PairItem]:
    """Items in whose gaps the next one stands that can be used; nothing if none can."""
    usable = [n for n, item in enumerate(items) if item is not None]
    if not usable:
        return []
    nearest = (next((n for n in usable if n >= gap), usable[0]) for gap in range(len(items)))
    return [item for n in nearest if (item := items[n]) is not None]


def _shuffled(entries: Iterator[T], buffer: tuple[int, int], *keys: int) -> Iterator[T]:
    generator: Any = random.Random(mix(*keys))
    size, initial = buffer
    return iter(shuffle(size, initial=initial, rng=generator)(entries))
