"""Loaders whose every item is a pure function of (seed, epoch, index).

No generator state is ever saved: an item is drawn by its key alone, so that worker count, batch
order and interruptions cannot change it, and a run resumes in the middle of an epoch by leaving
out the keys that it has used.
"""

import logging
import signal
import struct
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, cast
from weakref import WeakSet

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tenfold.errors import UserError
from tenfold.training import item_rng, mix, seed_cpu

log = logging.getLogger(__name__)

BROKEN = (UserError, OSError, EOFError, ValueError, SyntaxError, struct.error, zlib.error)
"""What a broken file raises."""

_TRIES = 16
"""Neighbours tried in place of an unreadable training item before giving up."""


class Draw(NamedTuple):
    """The key of one item: which item, and in which epoch (so, with which augmentation)."""

    epoch: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


def as_draw(key: Draw | int) -> Draw:
    """A plain index means epoch 0, as in evaluation."""
    return key if isinstance(key, Draw) else Draw(0, int(key))


class EpochSampler(DistributedSampler[Draw]):
    """Yields the `Draw`s of one rank: a permutation of `size` items by (seed, epoch).

    Every rank gets the same number of items; up to `replicas - 1` of an epoch are left out.
    It is a DistributedSampler so that Lightning does not wrap it in a second one.

    Args:
        size: number of items in the data set.
        seed: the permutation of epoch e is a function of (seed, e).
        replicas: number of ranks.
        rank: this one.
        shuffle: False keeps the order of the data set.
    """

    def __init__(
        self, size: int, *, seed: int = 0, replicas: int = 1, rank: int = 0, shuffle: bool = True
    ) -> None:
        items = cast("Dataset[Draw]", range(size))
        super().__init__(items, replicas, rank, shuffle=shuffle, seed=seed, drop_last=True)
        self.skip = 0
        """Keys already used: left out of the next pass, and of that one only."""

    def __iter__(self) -> Iterator[Draw]:
        size = len(cast("range", self.dataset))
        order = torch.arange(size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
            order = torch.randperm(size, generator=generator)
        kept = order[: self.num_samples * self.num_replicas]
        mine = kept[self.rank :: self.num_replicas].tolist()
        epoch, skip, self.skip = self.epoch, self.skip, 0
        return (Draw(epoch, index) for index in mine[skip:])


class BadItem(NamedTuple):
    """An item that could not be used, as it travels from a worker to the main process."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    reason: str
    trace: str


class BadItems:
    """The unusable items of one split: raises at the first, or counts and reports them."""

    def __init__(self, split: str, size: int, skip: bool) -> None:
        self.split, self.size, self.skip = split, size, skip
        self.reasons: dict[int, str] = {}
        self._news: dict[int, str] = {}

    def add(self, bad: Sequence[BadItem]) -> None:
        """Counts `bad`, or raises UserError for its first if they are not to be skipped."""
        for item in bad:
            if not self.skip:
                what = f"item {item.index} of {self.split} cannot be used: {item.reason}"
                fix = "mend it, or leave such items out with --data.on_bad_item skip"
                raise UserError(what, fix=fix) from RuntimeError(item.trace)
            self._news[item.index] = self.reasons[item.index] = item.reason

    def report(self) -> None:
        """Logs what was skipped since the last report: how many, and the first offenders."""
        if self._news:
            first = "; ".join(f"{i}: {why}" for i, why in list(self._news.items())[:3])
            what = f"{len(self._news)} of {self.size} items of {self.split} were skipped"
            log.warning("%s as unusable, first %s", what, first)
            self._news = {}


_Fetched = tuple[Any, list[BadItem]]
"""Items (later their batch, None if there are none) and what was unusable among them."""


class _Items(Dataset[Any]):
    """A data set inside a worker: seeds every item by its key and catches unusable ones."""

    def __init__(
        self,
        dataset: Any,
        seed: int,
        replace: bool,
        bad: BadItems,
        errors: tuple[type[Exception], ...],
    ) -> None:
        self.dataset, self.seed, self.replace, self.bad = dataset, seed, replace, bad
        self.errors = errors

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[Draw | int]) -> _Fetched:
        draws = [as_draw(key) for key in keys]
        bad: list[BadItem] = []
        with item_rng(self.seed, *draws[0]):  # of a batch; _read seeds each item again
            if hasattr(self.dataset, "fetch"):
                return self.dataset.fetch(draws)
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(draws), bad
            return [item for draw in draws for item in self._read(draw, bad)], bad

    def _read(self, draw: Draw, bad: list[BadItem]) -> list[Any]:
        """The item in a list; the next usable one in its place if so wished; or nothing."""
        for offset in range(_TRIES if self.replace else 1):
            at = Draw(draw.epoch, (draw.index + offset) % len(self))
            seed_cpu(mix(self.seed, *at))
            try:
                return [self.dataset[at]]
            except self.errors as error:
                reason = str(error) if isinstance(error, UserError) else repr(error)
                bad.append(BadItem(at.index, reason, traceback.format_exc()))
        return []


class _Collate:
    """The data module's collate on the items that were read; a finished batch stays as it is."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, fetched: Any) -> _Fetched:
        items, bad = fetched
        if isinstance(items, list):
            items = self.collate(items) if items else None
        return items, bad


class Loader(DataLoader[Any]):
    """A DataLoader that starts where training stands and settles what its workers found bad."""

    start: Callable[[], int] | None = None
    """Tells, when the first pass begins, how many batches of it are already done."""

    grid: Mapping[str, int] = MappingProxyType({})
    """Further numbers that must be the same where an epoch is resumed."""

    @property
    def items(self) -> _Items:
        """The data set, wrapped."""
        return cast("_Items", self.dataset)

    def close(self) -> None:
        """Ends persistent workers now, not seconds later when the garbage collector meets them."""
        iterator, self._iterator = self._iterator, None
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()

    def __iter__(self) -> Any:
        # A generator: nothing runs before the first batch is wanted. Lightning opens the
        # iterator before it has restored its counters and told the sampler the epoch.
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        start, self.start = self.start, None
        done = start() if start else 0
        if isinstance(self.sampler, EpochSampler):
            self.sampler.skip = done * cast("int", self.batch_size)
        bad_items = self.items.bad
        bad_items.report()
        try:
            for batch, bad in super().__iter__():
                bad_items.add(bad)
                done += 1
                if done == len(self):  # Lightning never asks for more: the report is due now
                    bad_items.report()
                if batch is not None:
                    yield batch
                elif self.items.replace:
                    raise UserError("no item of a training batch is usable", where=bad[0].reason)
            bad_items.report()
        except Exception:
            self.close()
            raise

    def state_dict(self) -> dict[str, int]:
        """What the position within an epoch depends on; the position is Lightning's to keep."""
        sampler = self.sampler
        ranks = sampler.num_replicas if isinstance(sampler, EpochSampler) else 1
        size, seed = len(self.items), self.items.seed
        grid = {"batch_size": self.batch_size or 0, "items": size, "ranks": ranks, "seed": seed}
        return grid | dict(self.grid)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises UserError unless an epoch is resumed on the same grid of batches."""
        mine = self.state_dict()
        changed = [f"{k} {was} -> {mine.get(k)}" for k, was in state.items() if was != mine.get(k)]
        if changed:
            what = f"an epoch begun with other settings cannot be resumed ({', '.join(changed)})"
            raise UserError(what, fix="use those of the interrupted run, or start a new one")


def _map_fields(fields: Any, fn: Callable[[Tensor], Any]) -> Any:
    """Applies `fn` to the tensors of a dict or NamedTuple; None fields stay."""
    if isinstance(fields, Mapping):
        return {key: None if value is None else fn(value) for key, value in fields.items()}
    return type(fields)(*(None if value is None else fn(value) for value in fields))


class TensorItems(Dataset[Any]):
    """Items held in memory; a whole batch is gathered at once, without collation.

    Args:
        fields: NamedTuple or dict of tensors with the items along the first dimension, or None.
            Batches come in the same type.
        augment: makes (batch, generator) a batch; the generator is seeded by (seed, epoch, first
            index), so that it too depends on keys alone.
        seed: see `augment`.
    """

    def __init__(
        self,
        fields: Any,
        augment: Callable[[Any, torch.Generator], Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.fields, self.augment, self.seed = fields, augment, seed
        sizes: set[int] = set()
        _map_fields(fields, lambda tensor: sizes.add(len(tensor)))
        if len(sizes) != 1:
            raise ValueError(f"tensors of one data set have different lengths: {sorted(sizes)}")
        self._size = sizes.pop()

    def __len__(self) -> int:
        return self._size

    def __getitems__(self, keys: Sequence[Draw | int]) -> Any:
        draws = [as_draw(key) for key in keys]
        index = torch.tensor([draw.index for draw in draws])
        batch = _map_fields(self.fields, lambda tensor: tensor.index_select(0, index))
        if self.augment is None:
            return batch
        generator = torch.Generator().manual_seed(mix(self.seed, *draws[0]))
        return self.augment(batch, generator)

    def __getitem__(self, key: Draw | int) -> Any:
        return _map_fields(self.__getitems__([key]), lambda tensor: tensor[0])


class Subset(Dataset[Any]):
    """Some items of a data set, by their positions."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, list(indices)

    def _key(self, key: Draw | int) -> Draw | int:
        if isinstance(key, Draw):
            return Draw(key.epoch, self.indices[key.index])
        return self.indices[key]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Draw | int) -> Any:
        return self.dataset[self._key(key)]


class TensorSubset(Subset):
    """A subset of `TensorItems`, or of any other that hands out whole batches."""

    def __getitems__(self, keys: Sequence[Draw | int]) -> Any:
        return self.dataset.__getitems__([self._key(key) for key in keys])


def _has(loaders: Any, loader: Loader) -> bool:
    """Whether a loader is among those of a trainer: one, or several in a mapping or sequence."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    several = isinstance(loaders, list | tuple)
    return any(_has(each, loader) for each in loaders) if several else loaders is loader


def _quiet_worker(_: int) -> None:
    """Ctrl-C reaches the whole process group: the main process decides when workers stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class DataModule(LightningDataModule):
    """Base of all data modules: subclasses give map data sets, this gives exact loaders.

    A data set is indexed with a `Draw` (of epoch 0 in evaluation), the three global generators
    seeded by (seed, epoch, index). One with `__getitems__` (TensorItems) returns whole batches
    instead, and its exceptions pass as they are; one with `fetch` returns the items of a list of
    draws itself, and a list of the `BadItem`s among them. Training batches are full (the rest of an
    epoch's permutation is left out, another rest in every epoch) unless the data set is smaller
    than one.

    Subclasses call `save_hyperparameters(logger=False)`: Lightning logs the arguments of module and
    data together, and refuses a name, such as seed, that has two values.

    Args:
        batch_size: items in a training batch, on each rank.
        eval_batch_size: items in any other batch; as in training if left out.
        workers: loading processes; data in memory is fastest with 0.
        seed: of order and augmentation.
        on_bad_item: "raise" stops with the item's index and path. "skip" counts unusable items
            and names them at the end of the epoch; in training the next usable item takes the
            place, so that batches keep their size on all ranks, in evaluation the batch shrinks.
        pin_memory: page-locked batches; if left out, when training runs on CUDA.
    """

    unusable: ClassVar[tuple[type[Exception], ...]] = BROKEN
    """What an item raises that cannot be used; anything else is a bug and keeps its traceback. A
    package whose decoder raises other exceptions adds them."""

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        workers: int = 0,
        seed: int = 0,
        on_bad_item: Literal["raise", "skip"] = "raise",
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__()
        if min(batch_size, eval_batch_size or 1) < 1 or workers < 0:
            given = f"batch_size {batch_size}, eval_batch_size {eval_batch_size}, workers {workers}"
            raise UserError(f"batches need at least one item, and workers be 0 or more: {given}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.workers, self.seed, self.on_bad_item = workers, seed, on_bad_item
        self.pin_memory = pin_memory
        self.bad_items: dict[str, BadItems] = {}
        """What was found unusable so far, by split."""
        self._loaders: WeakSet[Loader] = WeakSet()

    @staticmethod
    def collate(items: list[Any]) -> Any:
        """Items to a batch; static, since it is sent to the workers."""
        return default_collate(items)

    def train_dataset(self) -> Any:
        """The map data set to learn from."""
        raise NotImplementedError

    def val_dataset(self) -> Any:
        """The map data set to validate on, or None."""
        return None

    def test_dataset(self) -> Any:
        """The map data set to test on, or None."""
        return None

    def predict_dataset(self) -> Any:
        """The map data set to predict, or None."""
        return None

    def train_dataloader(self) -> Loader:
        """Shuffled by (seed, epoch), sharded by rank, resumed behind the last finished batch."""
        dataset, trainer = self.train_dataset(), self.trainer
        ranks, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        sampler = EpochSampler(len(dataset), seed=self.seed, replicas=ranks, rank=rank)
        if not len(sampler):
            raise UserError(f"{len(dataset)} training items cannot feed {ranks} process(es)")
        loader = self._loader("train", dataset, self.batch_size, sampler)

        def start() -> int:
            # the position is the trainer's only for a loader that it trains from
            if (
                trainer is None
                or not trainer.training
                or not _has(trainer.train_dataloader, loader)
            ):
                return 0
            return trainer.fit_loop.epoch_loop.batch_progress.current.ready

        loader.start = start
        return loader

    def val_dataloader(self) -> Any:
        """In order; no loader if there is no data set and training can do without."""
        return self._eval_loader("val", self.val_dataset())

    def test_dataloader(self) -> Any:
        """In order."""
        return self._eval_loader("test", self.test_dataset())

    def predict_dataloader(self) -> Any:
        """In order."""
        return self._eval_loader("predict", self.predict_dataset())

    def teardown(self, stage: str) -> None:
        """Reports what was skipped in an epoch that did not end."""
        for bad in self.bad_items.values():
            bad.report()

    def on_exception(self, exception: BaseException) -> None:
        """Ends the workers; Lightning forgets those of training if a validation is broken off."""
        for loader in self._loaders:
            loader.close()

    def _eval_loader(self, split: str, dataset: Any) -> Any:
        if dataset is not None:
            return self._loader(split, dataset, self.eval_batch_size)
        if split == "val" and self.trainer is not None and self.trainer.state.fn == "fit":
            return []
        raise UserError(f"this data has no {split} split")

    def _loader(
        self, split: str, dataset: Any, batch_size: int, sampler: EpochSampler | None = None
    ) -> Loader:
        pin = self.pin_memory
        if pin is None:
            pin = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        bad = self.bad_items[split] = BadItems(split, len(dataset), self.on_bad_item == "skip")
        loader = Loader(
            _Items(dataset, self.seed, bad.skip and sampler is not None, bad, self.unusable),
            batch_size=batch_size,
            sampler=sampler,
            drop_last=sampler is not None and len(sampler) >= batch_size,
            num_workers=self.workers,
            collate_fn=_Collate(self.collate),
            worker_init_fn=_quiet_worker,
            pin_memory=pin,
            persistent_workers=self.workers > 0 and split in ("train", "val"),
            generator=torch.Generator(),  # or opening the loader draws from the global one
        )
        self._loaders.add(loader)
        return loader
