"""Many losses on one pair of networks: the runs, and what they say when seeds are paired."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from scipy import stats

from ickd.module import Distiller, fit_recipe
from ickd.module.objective import parse_losses
from tenfold.checkpoint import atomic_file
from tenfold.data import DataModule
from tenfold.device import pick_device
from tenfold.distillation import loss_class
from tenfold.errors import UserError
from tenfold.recipes import recipe_parts
from tenfold.training import LAST

log = logging.getLogger(__name__)

PLAIN = "none"
_FIRST_STEPS = 5
"""Steps of a run that are not timed: memory is still being allocated."""


class Difference(NamedTuple):
    """A paired difference over seeds, in points.

    Attributes:
        mean: of the differences, seed by seed.
        low: of the 95 % confidence interval (Student); -inf for one seed.
        high: likewise.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        scores: accuracy or mIoU on the test images in per cent, by loss, one a seed.
        seconds: median time of a training step by loss.
        teacher: score of the teacher.
        metric: "top-1" or "mIoU".
        runs: every run, as it is in results.json.
    """

    scores: dict[str, list[float]]
    seconds: dict[str, float]
    teacher: float
    metric: str
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def difference(self, losses: str, to: str = PLAIN) -> Difference | None:
        """How much better a loss is than another one, paired by seed; None without the other."""
        if to not in self.scores or losses == to:
            return None
        pairs = zip(self.scores[losses], self.scores[to], strict=True)
        return paired([ours - theirs for ours, theirs in pairs])


def paired(differences: Sequence[float]) -> Difference:
    """Mean and Student's 95 % interval of differences that belong to seeds."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(mean, float("-inf"), float("inf"))
    error = statistics.stdev(differences) / len(differences) ** 0.5
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return Difference(mean, mean - half, mean + half)


class StepTimes(Callback):
    """Wall time of every training step, from batch start to batch end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Stops it."""
        self.seconds.append(time.perf_counter() - self._start)

    @property
    def median(self) -> float | None:
        """Of the steps after the first few; None if this run did no step, as a finished one."""
        later = self.seconds[_FIRST_STEPS:] or self.seconds
        return statistics.median(later) if later else None


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
) -> Comparison:
    """Train the recipe's student with every loss and seed; what is finished is not done again.

    Args:
        recipe: names student, teacher, optimiser and data.
        losses: such as "none", "kd", "kd+ickd@2" (with its weight); every student starts from the
            same weights and sees the same batches in each seed.
        out: folder of all runs, with results.json.
        seeds: of initialisation and order.
        weights: by loss, over those of the recipe and the losses' defaults.
        model: changes to the recipe's model arguments.
        data: changes to its data arguments.
        epochs: instead of the recipe's.
        teacher_per_seed: train another teacher for each seed, where the recipe trains one.
        accelerator: Lightning's choice of device.
        progress: show it.

    Raises:
        UserError: an unknown recipe or loss, or results of other settings in the folder.
    """
    parts = recipe_parts("ickd", recipe)
    arguments = {**parts["model"]["init_args"], **(model or {})}
    plans = {name: _plan(name, arguments, weights or {}) for name in losses}
    settings = {"recipe": recipe, "model": model, "data": data, "epochs": epochs, "plans": plans}
    results = _Results(out / "results.json", settings, plans)
    options = {"accelerator": accelerator, "progress": progress, "data": data}
    for seed in seeds:
        teacher = _teacher(arguments, out, seed if teacher_per_seed else 0, results, options)
        for name, plan in plans.items():
            key = f"{name}/{seed}"
            if key not in results.runs:
                changes = {**(model or {}), **plan, **teacher}
                if progress:
                    log.warning("%s, seed %d", name, seed)
                results.add(key, _run(recipe, out / key, changes, seed, epochs, options))
    runs = {name: [results.runs[f"{name}/{seed}"] for seed in seeds] for name in losses}
    return Comparison(
        {name: [run["score"] for run in found] for name, found in runs.items()},
        {name: statistics.median(r["seconds"] for r in found) for name, found in runs.items()},
        statistics.fmean(v["score"] for k, v in results.runs.items() if k.startswith("teacher/"))
        if any(k.startswith("teacher/") for k in results.runs)
        else float("nan"),
        next(iter(results.runs.values()))["metric"],
        dict(results.runs),
    )


def _plan(name: str, arguments: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, Any]:
    """Arguments of the model for "kd+ickd": losses with their weights, and the cross-entropy's."""
    configured = arguments.get("losses") or {}
    configured = configured if isinstance(configured, Mapping) else {}
    chosen: dict[str, Any] = {}
    for place in name.split("+"):
        part, _, weight = place.partition("@")
        if part == PLAIN:
            continue
        default = loss_class(part).default_weight
        value = configured.get(part, default)
        given = float(weight) if weight else weights.get(part)
        if given is not None:
            value = {**value, "weight": given} if isinstance(value, Mapping) else given
        chosen[part] = value
    parse_losses(chosen)  # tells of a wrong weight before anything is trained
    alone = len(chosen) == 1 and "@" not in name and not {*chosen} & {*weights, *configured}
    ce_weight = loss_class(next(iter(chosen))).default_ce_weight if alone else 1.0
    plan: dict[str, Any] = {"losses": chosen or None, "ce_weight": ce_weight}
    return plan if chosen else {**plan, "teacher": None, "teacher_cache": None}


def _teacher(
    arguments: Mapping[str, Any], out: Path, seed: int, results: _Results, options: dict[str, Any]
) -> dict[str, Any]:
    """Where the teacher's weights are; trained first by the recipe's own recipe if need be."""
    recipe = arguments.get("teacher_recipe")
    if arguments.get("teacher_ckpt") is not None or recipe is None:
        return {}
    folder, key = out / f"teacher-{seed}", f"teacher/{seed}"
    if key not in results.runs:
        classes = arguments.get("num_classes")
        model = {} if classes is None else {"num_classes": classes}
        results.add(key, _run(recipe, folder, model, seed, None, options))
    return {"teacher_ckpt": str(folder / LAST)}


def _run(
    recipe: str,
    folder: Path,
    model: dict[str, Any],
    seed: int,
    epochs: int | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    clock = StepTimes()
    module, data = fit_recipe(
        recipe, folder, model=model, seed=seed, epochs=epochs, callbacks=[clock], **options
    )
    metric, score = evaluate(module, data, options["accelerator"])
    return {"score": 100 * score, "metric": metric, "seconds": clock.median or float("nan")}


@torch.no_grad()
def evaluate(module: Distiller, data: DataModule, accelerator: str = "auto") -> tuple[str, float]:
    """The metric's name and the student's score on the test images, in 0..1."""
    place = pick_device({"gpu": "cuda"}.get(accelerator, accelerator))
    module = module.to(place).eval()
    module.score.reset()
    for batch in data.test_dataloader():
        module.score.update(module.student(batch.image.to(place)), batch.label.to(place))
    found = module.score.compute()
    module.score.reset()
    return ("mIoU", float(found["miou"])) if module.dense else ("top-1", float(found))


class _Results:
    """results.json: the settings and the finished runs."""

    def __init__(self, path: Path, settings: dict[str, Any], plans: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": {}, "runs": {}}
        if path.is_file():
            try:
                self.content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError("no JSON of results", where=str(path), fix="remove it") from error
        known = self.content["settings"]
        mine = json.loads(json.dumps(settings, default=str))
        for key in ("recipe", "model", "data", "epochs"):
            if known and known.get(key) != mine[key]:
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
