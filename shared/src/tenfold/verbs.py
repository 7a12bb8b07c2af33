"""fit, validate, test and predict: LightningCLI, with recipes, run folders and checkpoints by name.

`plan_run` rewrites what a person types into what LightningCLI reads, `VerbCLI` adds the loggers
and callbacks that every run has. `tenfold.cli` imports this file when one of the four is run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import inspect
import json
import logging
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from tenfold.checkpoint import load_state
from tenfold.cli import VERBS, App, cause, load, parse_error, underscored
from tenfold.device import pick_device
from tenfold.errors import UserError
from tenfold.predictions import PredictionTable
from tenfold.progress import PlainProgress, on_terminal
from tenfold.training import (
    CLASSES,
    LAST,
    Resumable,
    StepSeed,
    StopOnBadLoss,
    kept_state,
    resume_path,
)

CONFIG = "config.yaml"
DEFAULT = "demo"  # the recipe where none is named

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run of a verb.

    Attributes:
        folder: Where logs, checkpoints and the full config go: trainer.default_root_dir.
        checkpoint: What to start from, if anything.
        argv: The arguments for LightningCLI.
    """

    folder: Path
    checkpoint: Path | None
    argv: list[str]


def run_verb(app: App, verb: str, argv: list[str]) -> int:
    """Run fit, validate, test or predict.

    Raises:
        UserError: if the arguments, the configuration or the checkpoint do not fit.
    """
    try:
        run = plan_run(app, verb, argv)
        check_folder(run.folder)
        cli = VerbCLI(app, verb, run)
        options = {"return_predictions": False} if verb == "predict" else {}
        if verb != "fit" and run.checkpoint is None:
            log.warning("no --ckpt: the model is measured as it was built, untrained")
        rank_zero_info(f"{verb}: files go to {run.folder}")
        work = getattr(cli.trainer, verb)
        work(cli.model, datamodule=cli.datamodule, ckpt_path=run.checkpoint, **options)
        if verb == "fit" and kept_state(cli.trainer):
            rank_zero_info(f"fit: trained; the checkpoint is {run.folder / LAST}")
        elif verb == "fit" and run.checkpoint is not None:
            rank_zero_info(f"fit: nothing is done, the run is already at {_stand(cli.trainer)}")
    except argparse.ArgumentError as error:
        raise parse_error(error, f"{app.name} {verb}") from error
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except (RuntimeError, ValueError) as error:
        if "is not in bounds" in str(error):  # Lightning's words on a seed
            raise UserError(f"--seed_everything: {error}") from error
        of_another = ("loading state_dict", "loaded state dict")  # torch's words: model, optimizer
        if not any(words in str(error) for words in of_another):
            raise
        what = textwrap.shorten(str(error), 300)
        raise UserError("the checkpoint is of another model or optimizer", fix=what) from error
    return 0


def _stand(trainer: Trainer) -> str:
    return f"step {trainer.global_step} (epoch {trainer.current_epoch})"


def check_folder(folder: Path) -> None:
    """Makes sure that a run can write where it wants to.

    Raises:
        UserError: the folder cannot be made, or not be written to.
    """
    there = next(place for place in [folder, *folder.absolute().parents] if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        fix = "choose another --trainer.default_root_dir"
        raise UserError("cannot write into the folder of the run", where=str(folder), fix=fix)


def plan_run(app: App, verb: str, argv: list[str]) -> Run:
    """Rewrite what a person types into what LightningCLI reads.

    An argument of the model comes from the command line, else from the checkpoint, else from the
    last `--config` that has it; one of the data from the command line, else the last `--config`,
    else the checkpoint. A command that names neither recipe, model nor checkpoint takes `DEFAULT`.
    A fit that goes on takes the config of the run that it goes on with, over its recipe.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("-c", "--config", action="append", default=[])
    options.add_argument("--model")
    options.add_argument("--trainer.default_root_dir", dest="folder")
    names = ["--ckpt", "--ckpt_path", *(["--resume"] if verb == "fit" else [])]
    options.add_argument(*names, dest="checkpoint")
    for short in app.shortcuts:
        options.add_argument(f"--{short.replace('-', '_')}")
    typed, flags = options.parse_known_args(underscored(argv))
    for part, target in {"--model.help": app.model, "--data.help": app.datamodule}.items():
        if target and flags[-1:] == [part]:  # alone it would explain LightningModule itself
            flags.append(target.replace(":", "."))

    recipes, default = [app.recipe(name) for name in typed.config], []
    if not (recipes or typed.model) and typed.checkpoint in (None, "auto"):
        default = [path for name, path in app.recipes().items() if name == DEFAULT]
    folder, checkpoint = _folder_and_checkpoint(app, verb, typed, recipes or default)
    if checkpoint:  # what it was made with is in it, and how it was trained beside it
        goes_on = verb == "fit" and (default or typed.checkpoint == "auto" or not recipes)
        recipes += [path for path in [folder / CONFIG] if goes_on and path.is_file()]
        default = []
    recipes = recipes or default
    saved = _saved_arguments(app, checkpoint) if checkpoint else {}
    configs = [saved.get("data"), *recipes, saved.get("model")]
    short = {long: getattr(typed, short.replace("-", "_")) for short, long in app.shortcuts.items()}
    argv = [f"--config={config}" for config in configs if config]
    argv += [f"--trainer.default_root_dir={folder}"]
    argv += [f"--model={typed.model}"] if typed.model else []
    argv += [f"--{long}={value}" for long, value in short.items() if value is not None]
    return Run(folder, checkpoint, argv + flags)


def _folder_and_checkpoint(
    app: App, verb: str, typed: argparse.Namespace, recipes: list[Path]
) -> tuple[Path, Path | None]:
    """Where a run writes, and the checkpoint that it starts from."""
    model = typed.model or app.model or ""
    label = recipes[-1].stem if recipes else re.split("[.:]", model)[-1]
    named = _folder_in(recipes)  # looked up in any case: it also finds what is no YAML
    chosen = typed.folder or named
    base = Path(chosen or f"runs/{app.name}/{label}")
    if typed.checkpoint not in (None, "auto"):
        path = Path(typed.checkpoint)
        path = path / LAST if path.is_dir() else path
        owners = [folder for folder in [*path.parents][:2] if (folder / CONFIG).is_file()]
        return (base if chosen or not owners else owners[0]), path
    used = _used(base)
    newest = base if chosen or not used else used[-1]
    if typed.checkpoint == "auto":
        checkpoint = resume_path(newest)
        if checkpoint is None and verb != "fit":
            raise UserError("no run has saved a checkpoint yet", where=str(newest), fix="fit first")
        return newest, checkpoint
    if verb != "fit" or not used:
        return newest, None
    if chosen:
        fix = "go on with --resume auto, or choose another --trainer.default_root_dir"
        raise UserError("the folder holds a run", where=str(base), fix=fix)
    return base.with_name(f"{base.name}-{len(used) + 1}"), None


def _used(base: Path) -> list[Path]:
    """The folders base, base-2, base-3, ... that hold a run: a new one never writes over it."""
    return list(takewhile(lambda f: (f / CONFIG).is_file() or resume_path(f), numbered(base)))


def numbered(base: Path) -> Iterator[Path]:
    """The folders base, base-2, base-3 and so on, which runs of one name take in turn."""
    return (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in count(1))


def _folder_in(recipes: Iterable[Path]) -> str | None:
    """The last run folder that a config sets, as the config of an earlier run does."""
    folder = None
    for path in recipes:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            folder = (content.get("trainer") or {}).get("default_root_dir") or folder
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
            raise UserError(f"not a YAML file of settings: {error}", where=str(path)) from error
    return folder


def _saved_arguments(app: App, checkpoint: Path) -> dict[str, str]:
    """What the model and the data of a checkpoint were made with, as configs for LightningCLI."""
    state = load_state(checkpoint)
    if "pytorch-lightning_version" not in state:
        raise UserError("weights, but not a checkpoint of fit", where=str(checkpoint))
    found = {}
    for part, key, default in (
        ("model", "hyper_parameters", app.model),
        ("data", "datamodule_hyper_parameters", app.datamodule),
    ):
        arguments = {k: v for k, v in state.get(key, {}).items() if k != "_instantiator"}
        # without _class_path it is of a module that was made in Python
        default = state.get(CLASSES, {}).get(part, (default or "").replace(":", "."))
        class_path = arguments.pop("_class_path", default)
        if key in state and class_path:
            spec = {"class_path": class_path, "init_args": _accepted(class_path, arguments)}
            found[part] = json.dumps({part: spec}, default=str)
    return found


def _accepted(class_path: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the saved arguments that the class takes; its parents may have saved more."""
    try:
        parameters = inspect.signature(load(":".join(class_path.rsplit(".", 1)))).parameters
    except (ImportError, AttributeError) as error:
        raise UserError(f"the checkpoint is of {class_path}, which is not installed") from error
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {key: value for key, value in arguments.items() if key in parameters}


class RunConfig(SaveConfigCallback):
    """Writes the full configuration into the run's folder, wherever the logger writes."""

    def __init__(self, *args: Any, folder: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.folder, self.written = folder, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early: a run that never trains leaves no folder that looks used."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes on the first rank alone."""
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / CONFIG
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)
            self.written = True

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Nor does a run that fails before it saves a state."""
        if self.written and kept_state(trainer) is None:
            (self.folder / CONFIG).unlink(missing_ok=True)


class VerbCLI(LightningCLI):
    """LightningCLI with the app's classes as defaults; any other can be named."""

    def __init__(self, app: App, verb: str, run: Run) -> None:
        """Parse, and make the model, the data module and the trainer."""
        self.app, self.verb, self.run = app, verb, run
        short = "".join(f"; --{short} for --{long}" for short, long in app.shortcuts.items())
        about = (
            f"{VERBS[verb]}. --model.help and --data.help tell the arguments of model and data. "
            f"Short options: --ckpt for --ckpt_path{short}."
        )
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule if app.datamodule else None,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunConfig if verb == "fit" else None,
            save_config_kwargs={"folder": run.folder},
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"{app.name} {verb}",
                "description": about,
                "exit_on_error": False,
            },
            args=run.argv,
            run=False,  # run_verb does it: LightningCLI would let the checkpoint beat the options
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the classes that a run has unless the command line names others."""
        for part, target in {"model": self.app.model, "data": self.app.datamodule}.items():
            if target:
                load(target)  # its relatives can then be named without their module
                # of the recipe, not of the app, where they differ: a class keeps what its
                # predecessor had under the same names, so that defaults would leak from one to
                # the other
                chosen = _class_of(part, self.run.argv) or target.replace(":", ".")
                parser.set_defaults({part: {"class_path": chosen}})

    def instantiate_classes(self) -> None:
        """Make everything, and tell in one line which optional package is missing."""
        try:
            super().instantiate_classes()
        except ValueError as error:  # around what the constructor of WandbLogger, say, raised
            if missing := cause(error, ModuleNotFoundError):
                raise UserError(str(missing)) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what every run has, unless the configuration says otherwise."""
        settings = self.config_init["trainer"]
        chosen = settings["callbacks"] or []
        chosen = chosen if isinstance(chosen, list) else [chosen]
        progress = settings["enable_progress_bar"] is not False
        seed = int(self.config["seed_everything"] or 0)
        kwargs["callbacks"] = run_callbacks(chosen, seed=seed, progress=progress)
        if self.verb == "predict":
            kwargs["callbacks"].append(PredictionTable(self.run.folder / "predict"))
        kwargs["enable_progress_bar"] = progress and on_terminal()
        if settings["logger"] is None:
            kwargs["logger"] = run_loggers(self.run.folder, self.verb, self.run.checkpoint)
        named = any(word.startswith("--trainer.precision") for word in self.run.argv)
        if settings["precision"] == "bf16-mixed" and not named and _on_cpu(settings["accelerator"]):
            rank_zero_info("bf16-mixed is for accelerators: on this CPU the precision is 32-true")
            kwargs["precision"] = "32-true"
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:  # no such accelerator, strategy or precision
            raise UserError(str(error)) from error


def _on_cpu(accelerator: Any) -> bool:
    """Whether what Trainer is told ends on the CPU."""
    automatic = accelerator in ("auto", None)
    return accelerator == "cpu" or (automatic and pick_device().type == "cpu")


def _class_of(part: str, argv: Sequence[str]) -> str | None:
    """The class path of "model" or "data" that the last of the configs names, None without one."""
    found = None
    for config in (word.removeprefix("--config=") for word in argv if word.startswith("--config=")):
        with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError, AttributeError):
            text = config if config.startswith("{") else Path(config).read_text(encoding="utf-8")
            found = ((yaml.safe_load(text) or {}).get(part) or {}).get("class_path") or found
    return found


def run_callbacks(
    chosen: Sequence[Callback] = (), *, seed: int = 0, progress: bool = True
) -> list[Callback]:
    """The callbacks that every run has, and those that were chosen for this one.

    Args:
        chosen: They take the place of ours of the same class.
        seed: Of the run.
        progress: Whether to show it; the trainer's enable_progress_bar must be
            `progress and on_terminal()`.
    """
    ours = [Resumable(), StepSeed(seed), StopOnBadLoss()]
    if progress:
        bar = RichProgressBar(console_kwargs={"stderr": True}) if on_terminal() else PlainProgress()
        ours.append(bar)
    kinds = {type(callback) for callback in chosen}
    callbacks = [callback for callback in ours if type(callback) not in kinds] + list(chosen)
    # Resumable first: what others do at the start of a batch is done again after a resume
    return sorted(callbacks, key=lambda callback: not isinstance(callback, Resumable))


def run_loggers(folder: Path, verb: str = "fit", checkpoint: Path | None = None) -> list[Logger]:
    """metrics.csv and TensorBoard in the run's folder; of validate and test in a folder below.

    Args:
        folder: Of the run.
        verb: fit, validate, test or predict.
        checkpoint: What a fit is resumed from: its metrics.csv is continued.
    """
    where = {"save_dir": folder, "name": "" if verb == "fit" else verb, "version": ""}
    if verb == "predict":  # nothing is measured
        return []
    table = CSVLogger(**where, flush_logs_every_n_steps=1)
    if verb != "fit":
        return [table]
    if checkpoint:
        _keep_rows(table, folder / "metrics.csv", checkpoint)
    return [table, TensorBoardLogger(**where)]


@rank_zero_only
def _keep_rows(logger: CSVLogger, file: Path, checkpoint: Path) -> None:
    """Continues a table behind the step of the checkpoint: what came later is done again."""
    if not (file.is_file() and checkpoint.is_file()):
        return
    with file.open(newline="", encoding="utf-8") as old:
        rows = list(csv.DictReader(old))
    state = load_state(checkpoint)
    loop = state["loops"]["fit_loop"]["epoch_loop.state_dict"]
    # rows are numbered by batches that stepped, of which several optimizers make several steps
    done = min(int(state["global_step"]), int(loop["_batches_that_stepped"]) + 1)
    experiment = logger.experiment  # making it deletes the file
    experiment.metrics_keys = list(rows[0]) if rows else []
    with file.open("w", newline="", encoding="utf-8") as new:
        table = csv.DictWriter(new, experiment.metrics_keys)
        table.writeheader()
        table.writerows(row for row in rows if int(row["step"]) < done)
