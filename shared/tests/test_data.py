"""Order, randomness and unusable items of the loaders, without and with workers."""

import logging
import os
import random
import signal
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import Dataset, DistributedSampler

from tenfold.data import (
    BadItem,
    DataModule,
    Draw,
    EpochSampler,
    Subset,
    TensorItems,
    TensorSubset,
    as_draw,
)
from tenfold.errors import UserError

seeds = st.integers(0, 2**63)


def draws(size, epoch=0, skip=0, **options):
    sampler = EpochSampler(size, **options)
    sampler.set_epoch(epoch)
    sampler.skip = skip
    return list(sampler)


# ---- sampler


@given(size=st.integers(1, 60), seed=seeds, epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation(size, seed, epoch):
    keys = draws(size, epoch, seed=seed)
    assert sorted(key.index for key in keys) == list(range(size))
    assert {key.epoch for key in keys} == {epoch}
    assert keys == draws(size, epoch, seed=seed)


@given(size=st.integers(1, 60), ranks=st.integers(1, 7), seed=seeds, epoch=st.integers(0, 9))
def test_shards_are_equal_and_disjoint(size, ranks, seed, epoch):
    shards = [draws(size, epoch, seed=seed, replicas=ranks, rank=r) for r in range(ranks)]
    assert {len(shard) for shard in shards} == {size // ranks}
    indices = [key.index for shard in shards for key in shard]
    assert len(set(indices)) == len(indices) == size // ranks * ranks
    assert set(indices) <= set(range(size))


@given(seed=seeds, ranks=st.integers(1, 4), batch=st.integers(1, 5))
def test_ranks_share_the_batches_of_one_process(seed, ranks, batch):
    """Batch k of all ranks together is batch k of one process with the batch size of all."""
    alone = draws(40, seed=seed)
    shards = [draws(40, seed=seed, replicas=ranks, rank=r) for r in range(ranks)]
    for first in range(0, 40 // ranks - batch, batch):
        together = [key for shard in shards for key in shard[first : first + batch]]
        assert sorted(together) == sorted(alone[first * ranks : (first + batch) * ranks])


@given(size=st.integers(1, 40), ranks=st.integers(1, 3), seed=seeds, data=st.data())
def test_skipping_leaves_the_suffix_once(size, ranks, seed, data):
    skip = data.draw(st.integers(0, size // ranks))
    sampler = EpochSampler(size, seed=seed, replicas=ranks)
    whole = list(sampler)
    sampler.skip = skip
    assert list(sampler) == whole[skip:]
    assert list(sampler) == whole
    assert len(sampler) == len(whole)


def test_orders_differ_by_epoch_and_seed():
    orders = {tuple(key.index for key in draws(50, e, seed=s)) for e in range(5) for s in range(5)}
    assert len(orders) == 25
    assert [key.index for key in draws(5, shuffle=False)] == [0, 1, 2, 3, 4]
    assert isinstance(EpochSampler(5), DistributedSampler)  # Lightning leaves it alone


# ---- loaders


class Noise(Dataset):
    """Draws from all three generators, and from nothing else."""

    def __len__(self):
        return 22

    def __getitem__(self, key):
        index = as_draw(key).index
        noise = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
        return index, torch.tensor(noise)


class Some(DataModule):
    """Any data set in all splits."""

    def __init__(self, dataset, **options):
        super().__init__(**options)
        self.dataset = dataset

    def train_dataset(self):
        return self.dataset

    val_dataset = test_dataset = predict_dataset = train_dataset


def by_index(loader):
    return {int(i): noise for batch in loader for i, noise in zip(*batch, strict=True)}


def test_items_depend_on_seed_epoch_and_index_alone():
    loader = Some(Noise(), batch_size=4, seed=1).train_dataloader()
    loader.sampler.set_epoch(3)
    before = torch.get_rng_state()
    items = by_index(loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(items) == 20  # full batches only
    for options in ({"batch_size": 5}, {"batch_size": 4, "workers": 2}):
        other = Some(Noise(), seed=1, **options).train_dataloader()
        other.sampler.set_epoch(3)
        again = by_index(other)
        common = items.keys() & again.keys()
        assert len(common) >= 18
        assert all(torch.equal(items[i], again[i]) for i in common)
    loader.sampler.set_epoch(4)
    assert not torch.equal(by_index(loader)[5], items[5])
    assert len({tuple(noise.tolist()) for noise in items.values()}) == 20


def test_evaluation_is_in_order_and_repeatable():
    data = Some(Noise(), batch_size=4, eval_batch_size=6, seed=1)
    first, second = list(data.val_dataloader()), list(data.test_dataloader())
    assert [len(batch[0]) for batch in first] == [6, 6, 6, 4]
    assert torch.cat([batch[0] for batch in first]).tolist() == list(range(22))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))


def test_a_set_smaller_than_a_batch_is_one_batch():
    (batch,) = Some(Noise(), batch_size=64).train_dataloader()
    assert sorted(batch[0].tolist()) == list(range(22))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_pass_starts_behind_finished_batches(workers):
    data = Some(Noise(), batch_size=4, seed=1, workers=workers)
    whole = [batch[0].tolist() for batch in data.train_dataloader()]
    loader = data.train_dataloader()
    loader.start = lambda: 3
    assert [batch[0].tolist() for batch in loader] == whole[3:]
    assert [batch[0].tolist() for batch in loader] == whole
    assert len(loader) == 5
    data.on_exception(KeyboardInterrupt())
    assert loader._iterator is None


def test_an_epoch_is_resumed_on_its_own_grid():
    state = Some(Noise(), batch_size=4).train_dataloader().state_dict()
    Some(Noise(), batch_size=4, workers=1).train_dataloader().load_state_dict(state)
    loader = Some(Noise(), batch_size=8, seed=2).train_dataloader()
    with pytest.raises(UserError, match="batch_size 4 -> 8, seed 0 -> 2"):
        loader.load_state_dict(state)
    loader = Some(Noise(), batch_size=4).train_dataloader()
    loader.grid = {"streams": 3}
    loader.load_state_dict(loader.state_dict())
    loader.grid = {"streams": 2}
    with pytest.raises(UserError, match="streams 3 -> 2"):
        loader.load_state_dict(state | {"streams": 3})


class Stream:
    """Hands out what stands at some places by itself; the third place is broken."""

    def __len__(self):
        return 8

    def fetch(self, draws):
        items = [(draw.index, torch.rand(())) for draw in draws if draw.index != 2]
        return items, [BadItem(2, "broken", "")] * any(draw.index == 2 for draw in draws)


def test_a_stream_fetches_by_itself():
    data = Some(Stream(), eval_batch_size=4, on_bad_item="skip")
    first, second = list(data.val_dataloader())
    assert (first[0].tolist(), second[0].tolist()) == ([0, 1, 3], [4, 5, 6, 7])
    assert data.bad_items["val"].reasons == {2: "broken"}
    assert torch.equal(next(iter(data.val_dataloader()))[1], first[1])  # seeded by its first place
    with pytest.raises(UserError, match="item 2 of val cannot be used: broken"):
        list(Some(Stream(), eval_batch_size=4).val_dataloader())


def test_workers_ignore_the_keyboard():
    """The terminal sends SIGINT to all; the step in flight still needs its data."""
    data = Some(Noise(), batch_size=2, workers=2)
    loader = data.train_dataloader()
    batches = iter(loader)
    seen = [next(batches), next(batches)]  # one from each worker: both are up
    for worker in loader._iterator._workers:
        os.kill(worker.pid, signal.SIGINT)
    seen += list(batches)
    assert len(seen) == 11
    loader.close()


def test_bad_arguments_and_missing_splits():
    with pytest.raises(UserError, match="batch_size 0"):
        Some(Noise(), batch_size=0)
    with pytest.raises(UserError, match="0 training items"):
        Some([]).train_dataloader()
    with pytest.raises(UserError, match="no test split"):
        DataModule().test_dataloader()


class Module(LightningModule):
    """Counts what it is shown."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.seen = []

    def training_step(self, batch, _):
        self.seen += batch[0].tolist()
        return self.layer(batch[1]).sum()

    def validation_step(self, batch, _):
        self.seen += batch[0].tolist()

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.WARNING)
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_runs_every_stage(trainer):
    module, data = Module(), Some(Noise(), batch_size=4)
    for stage in (trainer.validate, trainer.test, trainer.predict):
        module.seen = []
        stage(module, data)
        assert module.seen == list(range(22))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_training_can_do_without_validation_data(trainer):
    class Only(DataModule):
        def train_dataset(self):
            return Noise()

    module = Module()
    trainer.fit(module, Only(batch_size=5))
    assert len(module.seen) == len(set(module.seen)) == 20
    with pytest.raises(UserError, match="no val split"):
        trainer.validate(module, Only())


# ---- unusable items


class Broken(Dataset):
    """Some items cannot be read."""

    def __init__(self, bad, error=None, size=12):
        self.bad, self.error, self.size = bad, error or OSError("disk on fire"), size

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        if as_draw(key).index in self.bad:
            raise self.error
        return as_draw(key).index


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unusable_item_ends_the_run_in_one_line(workers):
    dataset = Broken({7}, UserError("cannot read the image", where="a/b.png"))
    with pytest.raises(UserError) as caught:
        list(Some(dataset, batch_size=4, workers=workers).val_dataloader())
    assert str(caught.value) == (
        "item 7 of val cannot be used: cannot read the image (a/b.png): "
        "mend it, or leave such items out with --data.on_bad_item skip"
    )
    assert "in __getitem__" in str(caught.value.__cause__)  # for whoever looks for a bug


@pytest.mark.parametrize("workers", [0, 2])
def test_training_takes_the_next_usable_item(workers, caplog):
    data = Some(Broken({2, 3, 8}), batch_size=4, workers=workers, on_bad_item="skip")
    loader = data.train_dataloader()
    batches = iter(loader)
    shown = sorted(i for _ in range(3) for i in next(batches).tolist())
    # Lightning does not ask for more than three batches: the report is there already
    assert shown == sorted([0, 1, 4, 4, 4, 5, 6, 7, 9, 9, 10, 11])
    assert "3 of 12 items of train were skipped as unusable" in caplog.text
    assert "OSError('disk on fire')" in caplog.text
    assert set(data.bad_items["train"].reasons) == {2, 3, 8}
    data.teardown("fit")
    assert len(caplog.records) == 1
    loader.close()


def test_evaluation_leaves_unusable_items_out(caplog):
    data = Some(Broken({1, 4, 5, 6, 7}), batch_size=4, on_bad_item="skip")
    batches = [batch.tolist() for batch in data.val_dataloader()]
    assert batches == [[0, 2, 3], [8, 9, 10, 11]]
    assert "5 of 12 items of val" in caplog.text


def test_a_hopeless_training_set_is_an_error():
    data = Some(Broken(range(40), size=40), batch_size=4, on_bad_item="skip")
    with pytest.raises(UserError, match="no item of a training batch is usable"):
        list(data.train_dataloader())


def test_a_bug_is_not_a_bad_item():
    data = Some(Broken({3}, TypeError("bug")), batch_size=4, on_bad_item="skip")
    with pytest.raises(TypeError, match="bug"):
        list(data.val_dataloader())


# ---- in memory


class Batch(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor
    hard: torch.Tensor | None


def tensors(size=50):
    return Batch(torch.randn(size, 3, 8, 8), torch.arange(size), None)


def test_tensors_come_as_whole_batches():
    fields = tensors()
    items = TensorItems(fields)
    (batch, *_) = Some(items, batch_size=7).train_dataloader()
    assert type(batch) is Batch
    assert batch.hard is None
    assert torch.equal(batch.image, fields.image[batch.label])
    assert torch.equal(items[Draw(0, 9)].image, fields.image[9])
    (batch, *_) = Some(TensorItems(fields._asdict()), batch_size=7).val_dataloader()
    assert torch.equal(batch["image"], fields.image[:7])
    assert batch["hard"] is None


def test_tensors_must_belong_together():
    with pytest.raises(ValueError, match=r"different lengths: \[3, 4\]"):
        TensorItems({"a": torch.zeros(3), "b": torch.zeros(4)})


def test_a_subset_keeps_the_keys_of_the_whole():
    fields = tensors()
    part = TensorSubset(TensorItems(fields), [40, 3, 17])
    (batch,) = Some(part, batch_size=7).val_dataloader()
    assert batch.label.tolist() == [40, 3, 17]
    assert torch.equal(part[Draw(5, 2)].image, fields.image[17])
    noise = Subset(Noise(), range(21, 1, -2))
    loader = Some(noise, batch_size=4, seed=1).train_dataloader()
    assert len(noise) == len(loader.dataset) == 10
    assert {int(i) for batch in loader for i in batch[0]} <= set(range(3, 22, 2))


def test_augmentation_of_batches_follows_the_keys():
    def jitter(batch, generator):
        return batch._replace(
            image=batch.image + torch.rand(batch.image.shape, generator=generator)
        )

    def epoch(number, seed=0):
        items = TensorItems(tensors_, jitter, seed=seed)
        loader = Some(items, batch_size=10).train_dataloader()
        loader.sampler.set_epoch(number)
        return torch.cat([batch.image for batch in loader])

    tensors_ = tensors()
    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1).sum(), epoch(2).sum())
    assert not torch.equal(epoch(1).sum(), epoch(1, seed=1).sum())
