"""Progress of long loops: a rich bar on a terminal, a plain line now and then in a log.

`track` wraps any iterable; `PlainProgress` is the Lightning callback for runs without a terminal.
Both write to stderr, so that what a command prints to stdout stays clean.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0

_STAGES = {"sanity_check": "sanity check", "validate": "validation", "predict": "prediction"}


def on_terminal() -> bool:
    """Whether a person is watching: stderr, where progress goes, is a terminal."""
    return sys.stderr.isatty()


def track(iterable: Iterable[T], total: int | None = None, label: str = "") -> Iterator[T]:
    """Yield from an iterable and show how far it is.

    Args:
        iterable: Anything to loop over.
        total: Number of items; its length by default, if it has one.
        label: What is being done, in a word or two.

    Yields:
        The items, unchanged.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # pyright: ignore[reportArgumentType]
    if on_terminal():
        from rich.console import Console
        from rich.progress import track as rich_track

        yield from rich_track(iterable, label, total, console=Console(stderr=True))
        return
    lines, of_total, done = Lines(), f"/{total}" if total else "", 0
    for done, item in enumerate(iterable, start=1):
        yield item
        left = lines.time_left(done / total) if total else ""
        lines.sometimes(f"{label} {done}{of_total}{left}")
    lines.now(f"{label} {done}{of_total} done in {span(lines.elapsed)}")


class Lines:
    """Prints lines to stderr, not more often than every `seconds`."""

    def __init__(self, seconds: float = SECONDS_BETWEEN_LINES, done: float = 0.0) -> None:
        """Start the clock; `done` is the fraction of the work that an earlier run did, 0 to 1."""
        self.seconds, self.done_before = seconds, done
        self.start = self.last = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    @property
    def due(self) -> bool:
        """Whether it is time for the next line."""
        return time.monotonic() - self.last >= self.seconds

    def sometimes(self, line: str) -> None:
        """Print the line if one is due."""
        if self.due:
            self.now(line)

    def now(self, line: str) -> None:
        """Print the line."""
        self.last = time.monotonic()
        print(line.strip(), file=sys.stderr, flush=True)

    def time_left(self, done: float) -> str:
        """', 1:05 left' from the fraction that is done, 0 to 1; '' while nothing is known."""
        if not self.done_before < done <= 1.0:
            return ""
        return f", {span(self.elapsed * (1.0 - done) / (done - self.done_before))} left"


def span(seconds: float) -> str:
    """A length of time as 0:42, 12:07 or 3:05:59."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def fraction_done(trainer: Any) -> float:
    """How much of a fit is done, 0 to 1, by the first limit that it will meet; 0 if endless."""
    per_epoch = trainer.num_training_batches
    epochs = (trainer.fit_loop.total_batch_idx + 1) / per_epoch if 0 < per_epoch < 1e18 else 0.0
    by_epochs = epochs / trainer.max_epochs if (trainer.max_epochs or 0) > 0 else 0.0
    by_steps = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    return min(1.0, max(by_epochs, by_steps))


def train_line(trainer: Any, outputs: Any) -> str:
    """'epoch 2, step 120, loss 0.51, lr 0.001' and what the module logs for the progress bar."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    numbers = {} if loss is None else {"loss": float(loss)}
    if trainer.optimizers:
        numbers["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
    numbers |= {key: float(value) for key, value in trainer.progress_bar_metrics.items()}
    start = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
    return ", ".join([start, *(f"{key} {value:.4g}" for key, value in numbers.items())])


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import and `track` does not need it: the callback's class is made
    # when it is first asked for, and is an ordinary member of this module from then on.
    if name != "PlainProgress":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _plain_progress_class()
    return globals()[name]


def _plain_progress_class() -> type:
    from lightning.pytorch import Callback, LightningModule, Trainer

    class PlainProgress(Callback):
        """A line with step, loss, learning rate and time left about every `seconds`."""

        def __init__(self, seconds: float = SECONDS_BETWEEN_LINES) -> None:
            self.seconds = seconds

        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            self.lines = Lines(self.seconds)

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.lines = Lines(self.seconds, fraction_done(trainer))

        def on_train_batch_end(
            self,
            trainer: Trainer,
            pl_module: LightningModule,
            outputs: Any,
            batch: Any,
            batch_idx: int,
        ) -> None:
            if trainer.is_global_zero and self.lines.due:
                left = self.lines.time_left(fraction_done(trainer))
                self.lines.now(train_line(trainer, outputs) + left)

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            metrics = {} if trainer.sanity_checking else trainer.callback_metrics
            if trainer.is_global_zero and metrics and trainer.state.fn == "fit":
                numbers = ", ".join(f"{k} {float(v):.4g}" for k, v in sorted(metrics.items()))
                self.lines.now(f"epoch {trainer.current_epoch}, validation: {numbers}")

        def on_test_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, *step: Any, **_: Any
        ) -> None:
            if trainer.is_global_zero:
                stage = getattr(trainer.state.stage, "value", "")
                self.lines.sometimes(f"{_STAGES.get(stage, stage)}, batch {step[2] + 1}")

        on_validation_batch_end = on_predict_batch_end = on_test_batch_end

    PlainProgress.__qualname__ = "PlainProgress"  # pickled by name, for strategies that spawn
    return PlainProgress
