"""Many losses on one pair of networks: what is run, and run no second time."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn

from ickd.measure import PeakBytes
from ickd.module import Distiller, fit_recipe, make_data
from ickd.module.fitting import fit_teacher, teacher_recipe
from ickd.module.objective import parse_losses, prepares_first, usual_ce_weight, usual_weight
from ickd.scores import ALONE, Comparison, ScoredSplit
from tenfold.checkpoint import atomic_file
from tenfold.data import DataModule
from tenfold.device import is_overloaded, pick_device, synchronize
from tenfold.distillation import loss_class
from tenfold.errors import UserError
from tenfold.recipes import recipe_parts
from tenfold.training import LAST

_FIRST_STEPS = 5
"""Steps of a run that are not timed: memory is still being allocated."""
_MEASURED = 1
"""The step of an epoch, from 0, whose memory is measured: the optimiser has its state by then."""
_TASK_TO_PREPARATION = 8
"""240 epochs have 30 of preparation in front of them, where a loss needs some (section 4.2)."""


class StepTimes(Callback):
    """Wall time of every training step, from batch start to batch end.

    A GPU works on behind the program: both ends wait until it is done.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        synchronize(trainer.strategy.root_device)
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Stops it."""
        synchronize(trainer.strategy.root_device)
        self.seconds.append(time.perf_counter() - self._start)

    @property
    def median(self) -> float | None:
        """Of the steps after the first few; None if this run did no step, as a finished one."""
        later = self.seconds[_FIRST_STEPS:] or self.seconds
        return statistics.median(later) if later else None


class StepMemory(Callback):
    """Memory of a training step, on every device alike, see `ickd.measure.PeakBytes`.

    It looks at a step of the first epoch, and at one of the first that trains the task.

    Attributes:
        bytes: for an image, the larger one; None before.
    """

    def __init__(self) -> None:
        self.bytes: float | None = None
        self._meter: PeakBytes | None = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begins to count."""
        first = trainer.current_epoch in (0, pl_module.objective.init_epochs)
        if not first or batch_idx != min(_MEASURED, trainer.num_training_batches - 1):
            return
        states = [v for one in trainer.optimizers for s in one.state.values() for v in s.values()]
        there = [*pl_module.parameters(), *pl_module.buffers(), *states, *batch]
        self._meter = PeakBytes(value for value in there if isinstance(value, torch.Tensor))
        self._meter.__enter__()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends it."""
        if self._meter is not None:
            self.bytes = max(self.bytes or 0, self._meter.peak / len(batch.image))
            self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Does not count on after a step that was broken off."""
        self._stop()

    def _stop(self) -> None:
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self._meter = None


def compare_losses(
    recipe: str,
    losses: Sequence[str],
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    weights: Mapping[str, float] | None = None,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    epochs: int | None = None,
    teacher_per_seed: bool = False,
    accelerator: str = "auto",
    progress: bool = True,
    validate: bool = False,
    split: ScoredSplit = "test",
) -> Comparison:
    """Train the recipe's student with every loss and seed; what is finished is not done again.

    Losses that prepare the student or an adaptor have an eighth more epochs, or the recipe's
    `init_epochs`, in front. The cross-entropy has the factor that usually goes with the losses: 1,
    0.1 beside kd alone at its usual weight, 0 beside kd_mixed, and the recipe's own where all
    losses are the recipe's; unless `model` has a ce_weight, which is then that of every student.

    Args:
        recipe: names student, teacher, optimiser and data.
        losses: such as "none", "kd", "kd+ickd@2" (with its weight) or "ickd_grid:6x6" (with its
            grid); every student starts from the same weights and sees the same batches in each
            seed.
        out: folder of all runs, with results.json.
        seeds: of initialisation and order.
        weights: by loss, over those of the recipe and the losses' defaults.
        model: changes to the recipe's model arguments.
        data: changes to its data arguments.
        epochs: of the task, instead of the recipe's.
        teacher_per_seed: train another teacher for each seed, where the recipe trains one.
        accelerator: Lightning's choice of device.
        progress: show it.
        validate: measure on the validation images, as often as the recipe does.
        split: images that the finished students are scored on; "val" to choose by, which are the
            test images where the data have no others (the `split` of what is returned says so).

    Raises:
        UserError: an unknown recipe or loss, or results of other settings in the folder.
    """
    plans = _plans(recipe, losses, weights or {}, model or {}, data, epochs)
    settings = {"recipe": recipe, "model": model or {}, "data": data or {}, "epochs": epochs}
    split = "val" if split == "val" and _validates(recipe, data) else "test"
    settings |= {"teacher_per_seed": teacher_per_seed, "plans": plans, "split": split}
    given = {**recipe_parts("ickd", recipe)["model"]["init_args"], **(model or {})}
    settings["student_init"] = given.get("student_ckpt") or given.get("student_init", "scratch")
    results = _Results(out / "results.json", settings)
    options = {"accelerator": accelerator, "progress": progress, "split": split}
    for seed in seeds:
        own = seed if teacher_per_seed else 0
        teacher = {}
        if any(plan["model"]["losses"] for plan in plans.values()):
            teacher = _teacher(recipe, model or {}, out, own, results, {**options, "data": data})
        for name, plan in plans.items():
            key = f"{name}/{seed}"
            if key in results.runs:
                continue
            if progress:
                print(f"{name}, seed {seed}", file=sys.stderr)
            changes = {**(model or {}), **plan["model"], **teacher}
            chosen = {**options, "data": data, "epochs": plan["epochs"], "validate": validate}
            judge = not teacher and not any("teacher" in run for run in results.runs.values())
            results.add(key, _run(recipe, out / key, changes, seed, judge, chosen))
    return _summary(results, losses, seeds)


def _summary(results: _Results, losses: Sequence[str], seeds: Sequence[int]) -> Comparison:
    runs = {name: [results.runs[f"{name}/{seed}"] for seed in seeds] for name in losses}
    trained = [run["score"] for key, run in results.runs.items() if key.startswith("teacher/")]
    given = [run["teacher"] for run in results.runs.values() if "teacher" in run]
    settings = results.content["settings"]
    return Comparison(
        {name: [run["score"] for run in found] for name, found in runs.items()},
        {name: _median(run["seconds"] for run in found) for name, found in runs.items()},
        statistics.fmean(trained or given or [math.nan]),
        next(iter(results.runs.values()))["metric"],
        dict(results.runs),
        {name: _median(run.get("bytes") for run in found) for name, found in runs.items()},
        settings.get("student_init", "scratch"),
        settings["split"],
        any(run.get("cached") for found in runs.values() for run in found),
        any(run.get("busy") for found in runs.values() for run in found),
    )


def _median(values: Iterable[float | None]) -> float:
    """Of what was measured; NaN if nothing was."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(known) if known else math.nan


# -- what is to be run -------------------------------------------------------------------------


def _plans(
    recipe: str,
    losses: Sequence[str],
    weights: Mapping[str, float],
    model: Mapping[str, Any],
    data: Mapping[str, Any] | None,
    epochs: int | None,
) -> dict[str, dict[str, Any]]:
    """For every loss its epochs and its arguments of the model."""
    parts = recipe_parts("ickd", recipe)
    own: dict[str, Any] = parts["model"]["init_args"]
    arguments = {**own, **model}
    task = epochs or parts["trainer"]["max_epochs"] - own.get("init_epochs", 0)
    usual = arguments.get("init_epochs") or max(1, round(task / _TASK_TO_PREPARATION))
    plans = {}
    for name in losses:
        asked = _asked(name, weights)
        chosen = _weighted(name, asked, arguments)
        ce_weight = _ce_weight(asked, own, model)
        _count_items(chosen, recipe, data)
        first = usual if any(map(prepares_first, chosen)) else 0
        plan = {"losses": chosen or None, "ce_weight": ce_weight, "init_epochs": first}
        if first and "ft" in chosen and "lr" in arguments:  # 0.01 beside 0.05 (section 4.2)
            plan["init_lr"] = arguments["lr"] / 5
        plan |= {} if chosen else {"teacher": None, "teacher_cache": None}
        plans[name] = {"model": plan, "epochs": task + first}
    return plans


def _asked(name: str, weights: Mapping[str, float]) -> dict[str, float | None]:
    """The losses of "kd+ickd@2" with the weights that a person gave them."""
    places = [read_place(place) for place in name.split("+")]
    return {
        part: weights.get(part) if weight is None else weight
        for part, _, weight in places
        if part != ALONE
    }


def _weighted(
    name: str, asked: Mapping[str, float | None], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The losses of "kd+ickd" with their weights, and with the options they have in the recipe."""
    configured = _mapping(arguments.get("losses"))
    grids = {part: grid for part, grid, _ in map(read_place, name.split("+"))}
    chosen: dict[str, Any] = {}
    for part, given in asked.items():
        usual = usual_weight(part, alone=len(asked) == 1)
        value = configured.get(part, usual)
        options = dict(value) if isinstance(value, Mapping) else {"weight": value}
        if loss_class(part).default_ce_weight < 1 and not asked.keys() <= configured.keys():
            options["weight"] = usual  # the recipe's belongs to the recipe's cross-entropy
        options |= {} if given is None else {"weight": given}
        options |= {} if grids[part] is None else {"grid": grids[part]}
        chosen[part] = options if {*options} != {"weight"} else options["weight"]
    parse_losses(chosen)  # tells of a wrong weight before anything is trained
    return chosen


def _ce_weight(
    asked: Mapping[str, float | None], own: Mapping[str, Any], model: Mapping[str, Any]
) -> float:
    """The factor of the cross-entropy, see `compare_losses`; `own` is what the recipe says."""
    given, of_recipe = model.get("ce_weight"), own.get("ce_weight")
    if given is not None:
        if not (isinstance(given, int | float) and math.isfinite(given) and given >= 0):
            raise UserError(f"ce_weight must be 0 or more, got {given!r}")
        if not given and not asked:
            what = f"ce_weight is 0: the student alone ({ALONE}) has nothing to learn from"
            raise UserError(what, fix=f"leave {ALONE} out of the losses")
        return float(given)
    if asked and of_recipe is not None and asked.keys() <= _mapping(own.get("losses")).keys():
        return float(of_recipe)
    return usual_ce_weight(asked)


def _mapping(losses: Any) -> Mapping[str, Any]:
    """Losses of a recipe that are more than names."""
    return losses if isinstance(losses, Mapping) else {}


def read_place(place: str) -> tuple[str, list[int] | None, float | None]:
    """A loss as it is written in a comparison, such as ickd_grid:6x6@2: name, grid and weight.

    Raises:
        UserError: a grid or a weight that is none.
    """
    head, _, weight = place.partition("@")
    name, _, grid = head.partition(":")
    try:
        cells = [int(side) for side in grid.split("x")] if grid else None
        if cells is not None and len(cells) != 2:
            raise ValueError
        return name, cells, float(weight) if weight else None
    except ValueError:
        what = f"a loss is a name, a grid behind : and a weight behind @, got {place!r}"
        raise UserError(what, fix="write such as ickd_grid:6x6@2") from None


def _count_items(chosen: dict[str, Any], recipe: str, data: Mapping[str, Any] | None) -> None:
    """Tells a loss that remembers the training images how many there are."""
    for name, value in chosen.items():
        given = dict(value) if isinstance(value, Mapping) else {"weight": value}
        if hasattr(loss_class(name), "set_labels") and "n_data" not in given:
            images: Any = make_data(recipe, data)
            chosen[name] = given | {"n_data": len(images.train_labels())}


# -- runs --------------------------------------------------------------------------------------


def _teacher(
    recipe: str,
    model: Mapping[str, Any],
    out: Path,
    seed: int,
    results: _Results,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Where the teacher's weights are; trained first by the recipe's own recipe if need be."""
    arguments = {**recipe_parts("ickd", recipe)["model"]["init_args"], **model}
    chosen = teacher_recipe(arguments)
    if chosen is None:
        return {}
    folder, key = out / f"teacher-{seed}", f"teacher/{seed}"
    if key not in results.runs:
        given = {**options, "data": options["data"] or {}}
        split = given.pop("split")
        module, data = fit_teacher(chosen, folder, arguments, seed=seed, **given)
        metric, score = evaluate(module, module.student, data, options["accelerator"], split)
        results.add(key, {"score": 100 * score, "metric": metric})
    return {"teacher_ckpt": str(folder / LAST)}


def _run(
    recipe: str,
    folder: Path,
    model: Mapping[str, Any],
    seed: int,
    judge: bool,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Train and measure a student; with `judge` also its teacher, where it tells the same classes.

    Returns:
        score and teacher in per cent, metric, seconds of a step, bytes of a step for an image,
        whether the teacher's features were cached, and whether the machine was busy.
    """
    clock, memory = StepTimes(), StepMemory()
    given = dict(options)
    split = given.pop("split")
    module, data = fit_recipe(
        recipe, folder, model=model, seed=seed, callbacks=[clock, memory], **given
    )
    busy, place = is_overloaded(), given["accelerator"]
    metric, score = evaluate(module, module.student, data, place, split)
    run = {"score": 100 * score, "metric": metric, "seconds": clock.median, "bytes": memory.bytes}
    run |= {"cached": module.cache is not None, "busy": busy}
    if judge and module.teacher is not None and module.comparable:
        run["teacher"] = 100 * evaluate(module, module.teacher, data, place, split)[1]
    return run


def _validates(recipe: str, data: Mapping[str, Any] | None) -> bool:
    """Whether the data have validation images that are not the test images."""
    images = make_data(recipe, data)
    loaders = images.val_dataloader(), images.test_dataloader()
    if len({len(loader.dataset) for loader in loaders}) > 1:
        return True
    ours, theirs = (next(iter(loader)).image for loader in loaders)
    return not torch.equal(ours, theirs)


@torch.no_grad()
def evaluate(
    module: Distiller,
    network: nn.Module,
    data: DataModule,
    accelerator: str = "auto",
    split: ScoredSplit = "test",
) -> tuple[str, float]:
    """The metric's name and a network's score on the test or validation images, in 0..1.

    Args:
        module: whose metric is taken.
        network: its student or its teacher.
        data: with these images.
        accelerator: Lightning's choice of device.
        split: which images.
    """
    place = pick_device({"gpu": "cuda"}.get(accelerator, accelerator))
    module = module.to(place).eval()
    module.score.reset()
    for batch in data.test_dataloader() if split == "test" else data.val_dataloader():
        module.score.update(network(batch.image.to(place)), batch.label.to(place))
    found = module.score.compute()
    module.score.reset()
    return ("mIoU", float(found["miou"])) if module.dense else ("top-1", float(found))


class _Results:
    """results.json: the settings and the finished runs."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": {}, "runs": {}}
        if path.is_file():
            self.content = _read(path)
        known = self.content["settings"]
        mine = json.loads(json.dumps(settings, default=str))
        for key in ("recipe", "model", "data", "epochs", "teacher_per_seed", "split"):
            usual = "test" if key == "split" else None  # older files do not name it
            if known and known.get(key, usual) != mine[key]:
                raise UserError(
                    f"the folder holds results of another {key}: {known.get(key)}, not {mine[key]}",
                    where=str(path),
                    fix="choose another --out, or remove the folder",
                )
        changed = [n for n, p in mine["plans"].items() if known.get("plans", {}).get(n, p) != p]
        if changed:
            raise UserError(
                f"the folder holds results of {', '.join(changed)} with other weights",
                where=str(path),
                fix="choose another --out, or remove the folder",
            )
        mine["plans"] = {**known.get("plans", {}), **mine["plans"]}
        self.content["settings"] = mine

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """Finished runs by loss and seed."""
        return self.content["runs"]

    def add(self, key: str, run: dict[str, Any]) -> None:
        """Keep a finished run."""
        self.runs[key] = run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as file:
            file.write((json.dumps(self.content, indent=1, sort_keys=True) + "\n").encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.keys() >= {"settings", "runs"}:
            return content
    except (ValueError, AttributeError):
        pass
    raise UserError("no JSON of results", where=str(path), fix="remove it")
