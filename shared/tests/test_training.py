"""Interrupted and resumed runs against uninterrupted ones: same draws, same bits."""

import contextlib
import copy
import logging
import math
import os
import random
import signal
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from tenfold.checkpoint import ema_update
from tenfold.data import DataModule, as_draw
from tenfold.errors import UserError
from tenfold.testing import can_fork
from tenfold.training import (
    Interrupted,
    Resumable,
    StepSeed,
    StopOnBadLoss,
    item_rng,
    mix,
    resume_path,
    seed_cpu,
)

EPOCHS, ITEMS, BATCH = 3, 44, 8  # five full batches an epoch, four items left out


class Noisy(torch.utils.data.Dataset):
    """Eight numbers an item, jittered by all three global generators."""

    def __len__(self):
        return ITEMS

    def __getitem__(self, key):
        index = as_draw(key).index
        clean = torch.sin(torch.arange(8.0) * (index + 1))
        noise = random.random() + np.random.rand() + torch.randn(8)  # noqa: NPY002
        return clean + 0.1 * noise, clean.sum(), index


class Data(DataModule):
    def train_dataset(self):
        return Noisy()

    def val_dataset(self):
        return Noisy()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1)
    )


class TwoPasses(LightningModule):
    """Manual optimization with two backward passes, EMA in a hook, a schedule per step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = network()
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("epochs_ended", torch.tensor(0))
        self.trained, self.validated = [], 0

    def loss(self, x, y):
        return nn.functional.mse_loss(self.net(x).squeeze(1), y)

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        first = self.loss(x, y)
        self.manual_backward(first)
        self.manual_backward(0.5 * self.loss(x + 0.1 * torch.randn_like(x), y))
        optimizer.step()
        self.lr_schedulers().step()
        self.trained.append((self.current_epoch, batch_idx, index.tolist()))
        return first

    def on_train_batch_end(self, *_):
        ema_update(self.ema.state_dict(), self.net.state_dict(), 0.9)

    def on_train_epoch_end(self):
        self.epochs_ended += 1

    def validation_step(self, batch, batch_idx):
        self.validated += batch_idx == 0
        self.log("val_loss", self.loss(*batch[:2]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        steps = EPOCHS * (ITEMS // BATCH)
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        return [optimizer], [cosine]


class Accumulated(TwoPasses):
    """Automatic optimization; the plateau schedule needs the validation of every epoch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        self.trained.append((self.current_epoch, batch_idx, index.tolist()))
        return self.loss(x, y)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"},
        }


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it, nothing is saved."""


class Cut(Callback):
    """Ends a run at the n-th call of a hook, by `Killed` or by a real signal."""

    def __init__(self, hook, count, by):
        self.left, self.by = count, by
        setattr(self, hook, self._tick)

    def _tick(self, *_, **__):
        self.left -= 1
        if self.left == 0:
            if self.by == "kill":
                raise Killed
            os.kill(os.getpid(), self.by)


logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def fit(folder, module, *extra, workers=0, resume=True, data=None, resumable=None, **options):
    """One process' life: resumes from last.ckpt if there is one."""
    callbacks = [resumable or Resumable(every_n_steps=2, dirpath=folder), StepSeed(7), *extra]
    trainer = Trainer(
        max_epochs=options.pop("max_epochs", EPOCHS),
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    data = data or Data(batch_size=BATCH, workers=workers, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data, ckpt_path=resume_path(folder) if resume else None)
    return trainer


def bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def run_with_cuts(folder, make, cuts, **options):
    """Lives through the cuts one after another; returns the last module and all trained batches."""
    trained = []
    for cut in [*cuts, None]:
        module = make()
        try:
            fit(folder, module, *([Cut(*cut)] if cut else []), **options)
        except (Killed, Interrupted, SystemExit):  # the last: SIGINT before training has begun
            assert cut
        else:
            assert cut is None, f"the run ended before {cut}"
        trained += module.trained
    return module, trained


@pytest.fixture(autouse=True)
def _hears_ctrl_c():
    """A shell starts what runs in its background deaf to SIGINT, and Lightning leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before or signal.SIG_DFL)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Uninterrupted runs by module class and options."""
    runs = {}

    def get(make, **options):
        key = make.__name__, *sorted(options.items())
        if key not in runs:
            module = make()
            fit(tmp_path_factory.mktemp("reference"), module, **options)
            runs[key] = module, bits(module)
        return runs[key]

    return get


HOOKS = [
    ("on_train_batch_start", 4),
    ("on_after_backward", 9),
    ("on_train_batch_end", 5),
    ("on_validation_start", 1),  # of the sanity check
    ("on_validation_start", 2),
    ("on_validation_batch_end", 5),
    ("on_validation_end", 3),
    ("on_train_epoch_end", 1),
    ("on_train_epoch_start", 2),
    ("on_save_checkpoint", 2),
]


@pytest.mark.parametrize(("hook", "count"), HOOKS)
def test_cut_anywhere_gives_the_same_bits(tmp_path, reference, hook, count):
    module, wanted = reference(TwoPasses)
    cuts = [(hook, count, "kill"), (hook, 1, signal.SIGINT)]
    cut, trained = run_with_cuts(tmp_path, TwoPasses, cuts)
    assert_same(bits(cut), wanted)
    # what was lost is done again, with the same images in the same order
    assert [step for n, step in enumerate(trained) if step not in trained[:n]] == module.trained


def test_many_cuts_in_one_run(tmp_path, reference):
    """Mid-epoch validations, workers, and no step without a cut somewhere near."""
    options = {"val_check_interval": 2, "max_epochs": 2}
    module, wanted = reference(TwoPasses, **options)
    hooks = ["on_train_batch_start", "on_train_batch_end", "on_validation_batch_end"]
    draw = random.Random(1)
    cuts = [(draw.choice(hooks), draw.randint(2, 3), signal.SIGINT) for _ in range(4)]
    cut, trained = run_with_cuts(tmp_path, TwoPasses, cuts, workers=2, **options)
    assert_same(bits(cut), wanted)
    assert trained == module.trained


def test_optimizer_steps_over_several_batches(tmp_path, reference):
    """Half-gathered gradients are never saved; the plateau schedule sees each validation once."""
    options = {"accumulate_grad_batches": 2}
    module, wanted = reference(Accumulated, **options)
    cuts = [
        ("on_train_batch_end", 1, signal.SIGINT),  # in the middle of a step
        ("on_train_batch_end", 2, "kill"),
        ("on_validation_start", 1, signal.SIGINT),
        ("on_train_epoch_end", 1, signal.SIGINT),
        ("on_validation_batch_end", 2, signal.SIGINT),
    ]
    cut, _ = run_with_cuts(tmp_path, Accumulated, cuts, **options)
    assert_same(bits(cut), wanted)
    lr = [m.trainer.optimizers[0].param_groups[0]["lr"] for m in (module, cut)]
    assert lr[0] == lr[1]


class Pairs(Data):
    """Two loaders side by side, as unpaired data come."""

    def train_dataloader(self):
        return {"a": super().train_dataloader(), "b": super().train_dataloader()}


class Paired(TwoPasses):
    """Trains on the first of two loaders, and remembers what both gave."""

    def training_step(self, batch, batch_idx):
        first = super().training_step(batch["a"], batch_idx)
        self.trained[-1] += (batch["b"][2].tolist(),)
        return first


def test_several_loaders_resume_where_they_were(tmp_path):
    lives = [Paired() for _ in range(3)]
    whole, cut, resumed = lives
    for module, folder, *extra in (
        (whole, "whole"),
        (cut, "cut", Cut("on_train_batch_start", 4, "kill")),
        (resumed, "cut"),
    ):
        with contextlib.suppress(Killed):
            fit(tmp_path / folder, module, *extra, data=Pairs(batch_size=BATCH, seed=3))
    assert len(resumed.trained) < len(whole.trained)
    assert resumed.trained == whole.trained[-len(resumed.trained) :]
    assert cut.trained == whole.trained[: len(cut.trained)]
    assert_same(bits(resumed), bits(whole))


def test_a_run_bounded_by_steps(tmp_path, reference):
    options = {"max_steps": 13, "max_epochs": -1, "num_sanity_val_steps": 0}
    module, wanted = reference(TwoPasses, **options)
    cuts = [("on_train_batch_end", n, signal.SIGINT) for n in (3, 2, 5)]
    cut, trained = run_with_cuts(tmp_path, TwoPasses, cuts, **options)
    assert_same(bits(cut), wanted)
    assert trained == module.trained
    loops = [m.trainer.fit_loop.epoch_loop for m in (module, cut)]
    assert loops[0]._batches_that_stepped == loops[1]._batches_that_stepped == 13


def test_a_validation_is_neither_lost_nor_repeated(tmp_path):
    """One validation an epoch, whether the signal comes before, in or after it."""
    seen = []

    class Counting(TwoPasses):
        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                seen.append((self.current_epoch, self.global_step))

    cuts = [(hook, n, signal.SIGINT) for hook, n in [
        ("on_train_batch_end", 5), ("on_validation_batch_start", 2), ("on_validation_end", 1),
        ("on_train_batch_end", 5)]]  # fmt: skip
    run_with_cuts(tmp_path, Counting, cuts, num_sanity_val_steps=0)
    assert seen == [(0, 5), (1, 10), (2, 15)]


def test_resuming_a_finished_run_does_nothing(tmp_path, reference):
    module, _ = run_with_cuts(tmp_path, TwoPasses, [])
    again = TwoPasses()
    fit(tmp_path, again)
    assert again.trained == []
    assert_same(bits(again), bits(module))


def test_interruption_tells_where_to_resume(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert resume_path(tmp_path) is None
    with pytest.raises(Interrupted, match="SIGTERM at step 4; resume from") as caught:
        fit(tmp_path, TwoPasses(), Cut("on_train_batch_end", 4, signal.SIGTERM))
    assert caught.value.checkpoint == resume_path(tmp_path)
    assert (caught.value.signum, caught.value.step) == (signal.SIGTERM, 4)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_in_the_last_step_ends_the_command_but_not_the_work(tmp_path, reference):
    module, cut = TwoPasses(), Cut("on_train_batch_end", 15, signal.SIGINT)
    with pytest.raises(Interrupted, match="at step 15"):
        fit(tmp_path, module, cut, limit_val_batches=0)
    assert_same(bits(module), reference(TwoPasses)[1])


def test_second_signal_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tenfold.training._SAME_PRESS", 0.0)
    module, resumable = TwoPasses(), Resumable(every_n_steps=3, dirpath=tmp_path)
    cuts = [Cut("on_after_backward", 9, signal.SIGINT), Cut("on_after_backward", 10, signal.SIGINT)]
    with pytest.raises(Interrupted) as caught:
        fit(tmp_path, module, *cuts, resumable=resumable)
    assert len(module.trained) == 4  # the fifth step was broken off between its backward passes
    saved = torch.load(caught.value.checkpoint, weights_only=True)
    assert saved["global_step"] == 3


def test_one_press_may_arrive_twice(tmp_path):
    """A launcher forwards the signal that the terminal has sent to the whole group."""
    cuts = [Cut("on_after_backward", 9, signal.SIGINT), Cut("on_after_backward", 9, signal.SIGINT)]
    with pytest.raises(Interrupted, match="at step 5; resume"):
        fit(tmp_path, TwoPasses(), *cuts)


def test_saves_follow_steps_and_clock(tmp_path):
    """Besides the save before a validation and the last one."""

    class Count(Callback):
        steps: list[int]

        def on_save_checkpoint(self, trainer, *_):
            self.steps = [*getattr(self, "steps", []), trainer.global_step]

    for rules, wanted in [
        ({"every_n_steps": 4, "every_n_seconds": None}, [4, 5, 9, 10, 14, 15, 15]),
        ({"every_n_steps": None, "every_n_seconds": None}, [5, 10, 15, 15]),
        (
            {"every_n_steps": None, "every_n_seconds": 0.0},
            [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13, 14, 15, 15],
        ),
    ]:
        count = Count()
        fit(tmp_path, TwoPasses(), count, resume=False, resumable=Resumable(**rules))
        assert count.steps == wanted
    assert resume_path(tmp_path)


class Poison(Callback):
    """Turns weights, a buffer or the loss itself to NaN from some step on."""

    def __init__(self, what, step):
        self.what, self.step = what, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and self.what == "weights":
            pl_module.net[0].weight.data[0, 0] = math.nan
        elif trainer.global_step == self.step and self.what == "buffers":
            pl_module.net[1].running_mean[0] = math.nan
        elif self.what == "one loss" and trainer.global_step == self.step:
            outputs["loss"] = torch.tensor(math.inf)


def test_bad_losses_stop_training_and_keep_the_good_state(tmp_path):
    resumable = Resumable(every_n_steps=1, dirpath=tmp_path)
    # the weights are poisoned after step 3, so that the loss of step 3 is still fine
    poison, stop = Poison("weights", 3), StopOnBadLoss(patience=4)
    with pytest.raises(UserError, match=r"weights .* NaN .* from step 3 .*last\.ckpt"):
        fit(tmp_path, TwoPasses(), poison, stop, resumable=resumable)
    assert torch.load(resumable.kept, weights_only=True)["global_step"] == 2

    resumable = Resumable(every_n_steps=100, dirpath=tmp_path / "b")
    with pytest.raises(UserError, match=r"loss .* from step 4 to 4; no good state was saved"):
        fit(tmp_path, TwoPasses(), poison, StopOnBadLoss(1), resume=False, resumable=resumable)


def test_nan_statistics_are_found_although_the_loss_is_fine(tmp_path):
    with pytest.raises(UserError, match=r"buffers are NaN .* from step 2"):
        fit(tmp_path, TwoPasses(), Poison("buffers", 2), StopOnBadLoss())


def test_one_bad_loss_is_forgiven(tmp_path):
    resumable = Resumable(every_n_steps=1, dirpath=tmp_path)
    module = TwoPasses()
    fit(tmp_path, module, Poison("one loss", 3), StopOnBadLoss(2), resumable=resumable)
    assert len(module.trained) == 15
    with pytest.raises(UserError, match=r"ended on a loss .* from step 15"):
        fit(tmp_path, TwoPasses(), Poison("one loss", 15), StopOnBadLoss(2), resume=False)


# ---- true processes


def live(folder, started, workers):
    """A child process: 0 for a finished run, 130 for one interrupted in good order."""

    class Slow(Callback):
        def on_train_start(self, *_):
            os.write(started, b"x")

        def on_before_optimizer_step(self, *_):
            time.sleep(0.01)

    module, resumable = TwoPasses(), Resumable(every_n_steps=1, dirpath=folder)
    try:
        fit(folder, module, Slow(), workers=workers, resumable=resumable)
    except Interrupted:
        return 130
    torch.save(bits(module), folder / "final.pt")
    return 0


def lives(folder):
    """Ends one forked child after another; the sixth may come through. Gives their exit codes."""
    draw = random.Random(0)
    for number in range(6):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                code = live(folder, write, workers=2 * (number % 2))
            finally:
                os._exit(code)
        os.close(write)
        os.read(read, 1)  # training begins, or the child has ended
        os.close(read)
        if number < 5:
            time.sleep(draw.uniform(0.05, 0.2))
            os.kill(child, signal.SIGKILL if number % 2 else signal.SIGINT)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(ProcessLookupError):  # workers that have not seen who began them
            os.killpg(child, signal.SIGKILL)
        yield code


@pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(),
    reason="autograd's device threads do not survive a fork",
)
def test_processes_killed_at_random_moments(tmp_path, reference):
    if not can_fork():
        pytest.skip("an earlier test has started autograd's threads")
    _, wanted = reference(TwoPasses)
    codes = list(lives(tmp_path))
    assert codes[-1] == 0
    assert {-signal.SIGKILL, 130} <= set(codes)
    assert_same(torch.load(tmp_path / "final.pt", weights_only=True), wanted)


# ---- randomness by position


def test_mix_is_splitmix64():
    """The published first outputs for seed 1234567, and chaining through the state."""
    golden = 0x9E3779B97F4A7C15
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix(1234567 + n * golden) for n in range(3)] == published
    assert mix(0, 5) == mix(mix(0) ^ 5)


def test_mix_separates_keys():
    values = {mix(s, a, b) for s in range(20) for a in range(20) for b in range(20)}
    assert len(values) == 20**3
    assert mix(1, 2) != mix(2, 1)
    assert 0 <= mix(-1, -5) < 2**64


def three():
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


def test_item_rng_is_local_and_repeatable():
    seed_cpu(11)
    untouched, untouched_third = (three(), three()), three()
    seed_cpu(11)
    first = three()
    with item_rng(1, 2, 3):
        inside = three()
    assert (first, three()) == untouched
    with contextlib.suppress(ValueError), item_rng(1, 2, 3):
        assert three() == inside
        raise ValueError
    assert three() == untouched_third
    with item_rng(1, 2, 4):
        assert not set(three()) & set(inside)


def test_numpy_and_torch_do_not_draw_the_same_stream():
    """Both are MT19937 seeded by 32 bits: from one value they would be one stream."""
    seed_cpu(mix(3))
    numpy = np.random.randint(0, 2**32, 100, dtype=np.uint64)  # noqa: NPY002
    torch_ = torch.randint(0, 2**32, (100,)).numpy()
    assert not set(numpy.tolist()) & set(torch_.tolist())
