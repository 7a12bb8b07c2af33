"""Runs that a command starts itself: the trainer, and whether the folder holds the same run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from tenfold.checkpoint import load_state
from tenfold.errors import UserError
from tenfold.progress import on_terminal
from tenfold.training import Resumable, resume_path
from tenfold.verbs import run_callbacks, run_loggers


def make_trainer(
    folder: Path,
    *,
    epochs: int,
    seed: int = 0,
    accelerator: str = "auto",
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Trainer:
    """A trainer whose run can be killed and resumed bit for bit; it keeps `folder`/last.ckpt.

    Args:
        folder: of the run.
        epochs: of the whole run, those before an interruption included.
        seed: of the draws in training steps.
        accelerator: Lightning's choice of device.
        progress: show it.
        callbacks: further ones.
        **options: further arguments of Trainer.
    """
    chosen = [Resumable(dirpath=folder), *callbacks]
    ours: dict[str, Any] = {
        "accelerator": accelerator,
        "devices": 1,
        "max_epochs": epochs,
        "callbacks": run_callbacks(chosen, seed=seed, progress=progress),
        "logger": run_loggers(folder, checkpoint=resume_path(folder)),
        "enable_checkpointing": False,
        "enable_progress_bar": progress and on_terminal(),
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 10,
    }
    return Trainer(**(ours | options))


def begun(folder: Path, module: LightningModule, epochs: int) -> Path | None:
    """The checkpoint that `folder` holds of the same run, None if there is none.

    To be asked before `make_trainer`, which cuts the folder's log to where the run goes on.

    Raises:
        UserError: it is of a run with other settings, or of more epochs.
    """
    path = resume_path(folder)
    if path is None:
        return None
    raw = load_state(path)
    there = raw.get("hyper_parameters", {})
    changed = [
        f"{key} {there.get(key)} -> {value}"
        for key, value in module.hparams.items()
        if there.get(key) != value
    ]
    if raw["epoch"] > epochs:
        changed.append(f"epochs {raw['epoch']} -> {epochs}")
    if changed:
        raise UserError(
            f"the folder holds a run with other settings ({', '.join(changed)})",
            where=str(folder),
            fix="use those, remove the folder, or choose another --out",
        )
    return path
