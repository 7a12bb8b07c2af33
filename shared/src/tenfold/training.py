"""Runs that can be stopped at any moment and give the same weights when resumed.

Randomness is a function of where a run stands (`mix`, `item_rng`, `StepSeed`, and the loaders of
`tenfold.data`), so that no generator has to be restored. `Resumable` saves between two training
batches, when every hook of the last one has run. Lightning restores the rest.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from tenfold.checkpoint import AtomicCheckpointIO
from tenfold.errors import UserError


def _splitmix64(state: int) -> int:
    """The first output of SplitMix64 from `state` (Steele et al., OOPSLA 2014): a bijection."""
    z = (state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


def mix(seed: int, *keys: int) -> int:
    """Hashes a seed and whole-number keys to 64 bits; no two values of the last key collide."""
    state = _splitmix64(seed & 0xFFFFFFFFFFFFFFFF)
    for key in keys:
        state = _splitmix64(state ^ (key & 0xFFFFFFFFFFFFFFFF))
    return state


def seed_cpu(value: int) -> None:
    """Seeds Python's, NumPy's (legacy) and torch's CPU generator from a 64-bit value."""
    random.seed(value)
    # NumPy and torch seed the same Mersenne twister with 32 bits: each gets a half of its own
    np.random.seed(value >> 32)  # noqa: NPY002 (timm and torchvision draw from it)
    torch.default_generator.manual_seed(value)


@contextmanager
def item_rng(seed: int, *keys: int) -> Iterator[None]:
    """Seeds the three global CPU generators from (seed, *keys) inside, restores them after."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed_cpu(mix(seed, *keys))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


class StepSeed(Callback):
    """Makes dropout, noise and mixing a function of (seed, epoch, batch, rank), not of history.

    Not of the optimizer step: the batches that gather gradients for one would share their masks.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def _seed(self, trainer: Trainer, *keys: int) -> None:
        value = mix(self.seed, *keys, trainer.global_rank)
        seed_cpu(value)
        if trainer.strategy.root_device.type != "cpu":
            torch.manual_seed(value)  # every accelerator too

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seeds the hooks before the first batch of an epoch."""
        self._seed(trainer, 0, trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seeds one training step and everything up to the next."""
        self._seed(trainer, 1, trainer.current_epoch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seeds a validation, which may be repeated after an interruption."""
        self._seed(trainer, 2, trainer.global_step)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] (set by a connector)


def kept_state(trainer: Trainer) -> Path | None:
    """The state that a fit can be resumed from; None if it kept none, or has not begun."""
    return next((c.kept for c in _callbacks(trainer) if isinstance(c, Resumable)), None)


class StopOnBadLoss(Callback):
    """Ends training when the loss stays NaN or infinite; `Resumable` keeps the last good state.

    It reads the loss that `training_step` returns (itself or under "loss"). From the first bad one
    on `Resumable` saves nothing until the loss is finite again; `patience` in a row end training.
    """

    def __init__(self, patience: int = 10) -> None:
        if patience < 1:
            raise UserError(f"patience {patience} must be at least 1")
        self.patience = patience
        self.bad_losses = self._since = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts bad losses in a row, and ends training at the `patience`-th."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        self._since = self._since if self.bad_losses else trainer.global_step
        self.bad_losses = 0 if torch.isfinite(loss).all() else self.bad_losses + 1
        if self.bad_losses >= self.patience:
            self._stop(trainer, "the loss is NaN or infinite")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does not let a run pass that ends on bad losses."""
        if self.bad_losses:
            self._stop(trainer, "training ended on a loss that is NaN or infinite")

    def healthy(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether the present state is worth keeping, the same answer on every rank.

        Raises UserError if losses are finite but weights or buffers are not: NaN statistics of a
        norm never recover, and do not show in the training loss.
        """
        finite = [p.isfinite().all() for p in pl_module.parameters() if p.is_floating_point()]
        finite += [~b.isnan().any() for b in pl_module.buffers() if b.is_floating_point()]
        sound = not finite or bool(torch.stack(finite).all())
        good = trainer.strategy.reduce_boolean_decision(sound and not self.bad_losses)
        if not sound and not self.bad_losses:
            self._since = trainer.global_step
            self._stop(trainer, "weights or buffers are NaN or infinite")
        return good

    def _stop(self, trainer: Trainer, what: str) -> None:
        kept = kept_state(trainer)
        saved = f"the last good state is {kept}" if kept else "no good state was saved"
        raise UserError(
            f"{what} from step {self._since} to {trainer.global_step}; {saved}",
            fix="lower the learning rate, clip gradients, or look for NaN in the data",
        )


class Interrupted(BaseException):
    """A signal ended the run; the command line turns it into exit status 130.

    Not a KeyboardInterrupt, which Lightning makes `sys.exit(1)`. `checkpoint` is None if unsaved.
    """

    def __init__(self, signum: int, step: int, checkpoint: Path | None) -> None:
        self.signum, self.step, self.checkpoint = signum, step, checkpoint
        resume = f"resume from {checkpoint}" if checkpoint else "nothing was saved"
        super().__init__(f"interrupted by {signal.Signals(signum).name} at step {step}; {resume}")


LAST = "last.ckpt"
CLASSES = "tenfold_classes"
"""Key of a checkpoint: the class paths of "model" and "data", for the command line."""


def resume_path(directory: str | Path) -> Path | None:
    """The checkpoint to hand to `trainer.fit(ckpt_path=...)`, None if there is none yet."""
    path = Path(directory) / LAST
    return path if path.exists() else None  # sharded strategies make it a folder


_Form = Literal["between batches", "before validation"] | None
_SAME_PRESS = 1.0
"""Seconds in which a signal counts once: launchers pass on what the terminal also sends."""


class Resumable(Callback):
    """Keeps `last.ckpt`, from which a run resumes bit for bit, also in the middle of an epoch.

    States are saved between training batches (never between the batches of one optimizer step),
    before a validation, and at the end. SIGINT or SIGTERM lets the current step finish, saves and
    raises `Interrupted`; a second one raises it at once. Put it first in the list of callbacks:
    what others do at the start of a batch then belongs to the part that is done again.

    Lightning does not repeat `on_train_epoch_start` when an epoch is resumed: what it sets must be
    in the state dict. Nor does it keep the means that `log(on_epoch=True)` has begun.

    Args:
        every_n_steps: optimizer steps between saves, None for no such rule.
        every_n_seconds: seconds between saves, None for no such rule.
        dirpath: folder of `last.ckpt`, the trainer's default_root_dir if left out.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_seconds: float | None = 120.0,
        dirpath: str | Path | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"every_n_steps {every_n_steps} must be at least 1")
        self.every_n_steps, self.every_n_seconds = every_n_steps, every_n_seconds
        self.dirpath = dirpath
        self.kept: Path | None = None
        """The state to resume from: the one given to fit, then the last one saved."""
        self._signum: int | None = None
        self._running = False
        self._handlers: dict[int, Any] = {}
        self._form: _Form = None
        self._saved: tuple[int, _Form] = (0, None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the run's checkpoints atomic, unless it has its own way to write them."""
        if stage == "fit" and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to listen to signals (no sooner: Lightning would put its own handlers on top)."""
        self.kept = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        self._signum, self._running = None, True
        self._seen, self._at_start = -1, True
        self._saved, self._saved_time = (trainer.global_step, None), time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.getsignal(number)
                signal.signal(number, lambda signum, _: self._on_signal(trainer, signum))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """All hooks of the last batch, its validation and epoch end have run: the time to save."""
        if trainer.global_step != self._seen:  # else gradients of one step are still gathering
            self._seen = trainer.global_step
            self._save_or_stop(trainer, pl_module, "between batches", due=self._due(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves before each validation, so that it can be broken off and done again."""
        if self._running and trainer.global_step != self._seen:
            self._save_or_stop(trainer, pl_module, "before validation", due=True)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Breaks off a validation that has been saved before (ranks finish it together)."""
        saved = self._running and self._saved == (trainer.global_step, "before validation")
        if saved and self._signum is not None and trainer.world_size == 1:
            raise self._interrupted(trainer, self._signum)
        self.on_test_batch_end(trainer)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Ends an evaluation after SIGTERM, which Lightning only takes note of."""
        if not self._running and trainer.received_sigterm:
            raise Interrupted(signal.SIGTERM, trainer.global_step, None)

    on_predict_batch_end = on_test_batch_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the final state; to resume from it does nothing."""
        self._save(trainer, pl_module, None)
        self._stop_listening()

    def on_exception(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stops listening to signals."""
        self._stop_listening()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises Interrupted for a signal that came during the very last step."""
        if stage == "fit" and self._signum is not None:
            raise self._interrupted(trainer, self._signum)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Names the classes; writes the counters as Lightning's restart wants to find them.

        The counters in own saves only.
        """
        data = getattr(trainer, "datamodule", None)
        checkpoint[CLASSES] = {
            key: f"{type(part).__module__}.{type(part).__qualname__}"
            for key, part in (("model", pl_module), ("data", data))
            if part is not None
        }
        if self._form == "between batches":
            _end_of_last_batch(checkpoint["loops"]["fit_loop"])
        elif self._form == "before validation":
            _start_of_validation(checkpoint["loops"]["fit_loop"])

    def _due(self, trainer: Trainer) -> bool:
        steps, seconds = self.every_n_steps, self.every_n_seconds
        by_steps = steps is not None and trainer.global_step - self._saved[0] >= steps
        return by_steps or (seconds is not None and time.monotonic() - self._saved_time >= seconds)

    def _save_or_stop(
        self, trainer: Trainer, module: LightningModule, form: _Form, due: bool
    ) -> None:
        wish = 2 if self._signum is not None else int(due)
        if trainer.world_size > 1:  # signals and clocks differ between ranks: the greatest wins
            wishes = torch.tensor(wish, device=trainer.strategy.root_device)
            wish = int(trainer.strategy.reduce(wishes, reduce_op="max"))
        here = trainer.global_step, form
        if self._at_start:  # nothing has happened since the state that fit was given
            self._at_start, self._saved = False, here
        if wish and self._saved != here:
            self._save(trainer, module, form)
        if wish == 2:
            raise self._interrupted(trainer, self._signum or signal.SIGINT)

    def _save(self, trainer: Trainer, module: LightningModule, form: _Form) -> None:
        guards = [c for c in _callbacks(trainer) if isinstance(c, StopOnBadLoss)]
        if not all(guard.healthy(trainer, module) for guard in guards):
            return
        path = Path(self.dirpath or trainer.default_root_dir) / LAST
        self._form = form
        try:
            trainer.save_checkpoint(path)
        finally:
            self._form = None
        self.kept, self._saved = path, (trainer.global_step, form)
        self._saved_time = time.monotonic()

    def _stop_listening(self) -> None:
        self._running = False
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _on_signal(self, trainer: Trainer, signum: int) -> None:
        now = time.monotonic()
        if self._signum is None:
            self._signum, self._pressed = signum, now
            note = "Interrupted: saving after this step. Once more stops at once, without saving."
            os.write(2, f"\n{note}\n".encode())  # print is not safe in a handler
        elif now - self._pressed >= _SAME_PRESS:
            raise self._interrupted(trainer, signum)

    def _interrupted(self, trainer: Trainer, signum: int) -> Interrupted:
        return Interrupted(signum, trainer.global_step, self.kept)


def _end_of_last_batch(loop: dict[str, Any]) -> None:
    """Turns "next batch fetched" into "at the end of the last one", a restart Lightning knows.

    It goes on with the next batch and repeats no hook and no validation: see
    `_TrainingEpochLoop.reset` and `update_restart_stage` of Lightning 2.6.
    """
    progress = loop["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        done = counts["completed"]
        counts.update(ready=done, started=done, processed=done, completed=done - 1)
    progress["is_last_batch"] = False
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # the restart adds it again
    for counts in _validation_counts(loop):
        counts.update({key: counts["completed"] for key in counts})


def _start_of_validation(loop: dict[str, Any]) -> None:
    """Marks a validation as begun and none of its batches as done, so that it is run again."""
    total, current = _validation_counts(loop)
    done = total["completed"]
    total.update(ready=done + 1, started=done + 1, processed=done)
    current.update(dict.fromkeys(current, 0))


def _validation_counts(loop: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    progress = loop["epoch_loop.val_loop.batch_progress"]
    return progress["total"], progress["current"]
