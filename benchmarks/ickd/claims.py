"""Does a student that copies its teacher's channel correlations learn more?

Four parts, each of one teacher and many students, all compared with the same student alone:

- gratings: bound-gratings with three coarse classes, every seed with a teacher of its own;
- fine: the same images with all 16 classes;
- blobs: textured-blobs, segmentation by grid;
- cifar: a real subset of CIFAR-10 (in the folder TENFOLD_DATA), resnet20 -> resnet8.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.ickd.tables import write_tables
from benchmarks.results import Results, work_folder
from ickd.commands.compare import TOY_WEIGHTS
from ickd.comparison import compare_losses, evaluate
from ickd.module import fit_recipe
from ickd.scores import ALONE
from tenfold.errors import UserError

PROCESSES = 2


@dataclass(frozen=True)
class Part:
    """A pair of networks, its losses and how they are weighted.

    Attributes:
        recipe: of the students.
        teacher: recipe of the teacher.
        losses: as `compare_losses` takes them.
        weights: of losses, over the recipe's.
        seeds: most seeds that this part takes.
        one_teacher: for all seeds; else each seed has its own.
    """

    recipe: str
    teacher: str
    losses: tuple[str, ...]
    weights: dict[str, float] = field(default_factory=dict)
    seeds: int = 5
    one_teacher: bool = False


_FIVE = ("none", "kd", "ickd", "kd+ickd", "mse")


PARTS = {
    "gratings": Part("demo", "demo-teacher", _FIVE, TOY_WEIGHTS),
    "fine": Part("gratings-fine", "gratings-fine-teacher", _FIVE, TOY_WEIGHTS),
    "blobs": Part(
        "blobs",
        "blobs-teacher",
        (
            "none",
            *(f"ickd_grid:{n}x{n}" for n in (1, 2, 4, 6, 12)),
            "kd",
            "kd+ickd_grid:6x6",
            "mse",
        ),
        {"kd": 1.0, "ickd_grid": 2.0, "mse": 2.0},
    ),
    "cifar": Part(
        "cifar10-cpu",
        "cifar10-cpu-teacher",
        ("none", "kd", "ickd", "kd+ickd"),
        {"kd": 1.0, "ickd": 2.5},
        seeds=3,
        one_teacher=True,
    ),
}


def run(seeds: int = 5, only: str | None = None) -> None:
    """Runs every part, or one; what is finished is not done again.

    Raises:
        UserError: no such part, or `only` is cifar and there is no folder of real data.
    """
    if only not in (None, *PARTS):
        raise UserError(f"no part is called {only!r}", fix=f"there are {', '.join(PARTS)}")
    results = Results("claims", "ickd")
    for name, part in PARTS.items():
        if only in (None, name):
            data = real_data(only) if name == "cifar" else {}
            if data is not None:
                run_part(name, part, range(min(seeds, part.seeds)), data, results)
    write_tables(results)


def real_data(only: str | None) -> dict[str, Any] | None:
    """Where the CIFAR-10 subset lies; None where there is none and it need not be."""
    folder = Path(os.environ.get("TENFOLD_DATA", "nowhere")) / "cifar10"
    if folder.is_dir():
        return {"root": str(folder)}
    if only == "cifar":
        raise UserError("the part cifar reads real data", fix="set TENFOLD_DATA")
    print("cifar: left out, TENFOLD_DATA is not set", flush=True)
    return None


def run_part(
    name: str, part: Part, seeds: Sequence[int], data: dict[str, Any], results: Results
) -> None:
    """All runs of a part, two at a time with a thread each; those without a teacher come first."""
    folder = work_folder("ickd") / name
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(PROCESSES, spawn, initializer=_one_thread)
    try:
        teachers = {
            f"{name}/teacher/{seed}": (part.teacher, folder / f"teacher-{seed}", seed, data)
            for seed in (seeds[:1] if part.one_teacher else seeds)
        }
        students = {
            f"{name}/{losses}/{seed}": (
                part,
                losses,
                folder,
                seed,
                folder / f"teacher-{seeds[0] if part.one_teacher else seed}",
                data,
            )
            for seed in seeds
            for losses in part.losses
        }
        alone = {key: given for key, given in students.items() if given[1] == ALONE}
        first = start(pool, train_teacher, teachers, results)
        second = start(pool, train_student, alone, results)
        keep(results, first)
        taught = {key: given for key, given in students.items() if key not in alone}
        keep(results, second | start(pool, train_student, taught, results))
    finally:
        pool.shutdown(cancel_futures=True)


def start(
    pool: ProcessPoolExecutor,
    work: Callable[..., Any],
    arguments: dict[str, tuple[Any, ...]],
    results: Results,
) -> dict[str, Future[Any]]:
    """Hands out what is not finished yet."""
    todo = {key: given for key, given in arguments.items() if key not in results.runs}
    return {key: pool.submit(work, *given) for key, given in todo.items()}


def keep(results: Results, futures: dict[str, Future[Any]]) -> None:
    """Writes down what is finished, as it comes."""
    names = {future: key for key, future in futures.items()}
    for future in as_completed(names):
        results.once(names[future], future.result)
        print(names[future], results.runs[names[future]], flush=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


def train_teacher(recipe: str, folder: Path, seed: int, data: dict[str, Any]) -> dict[str, Any]:
    """A teacher by its recipe, and its score."""
    module, images = fit_recipe(recipe, folder, seed=seed, data=data, progress=False)
    metric, score = evaluate(module, module.student, images, "cpu")
    return {"score": 100 * score, "metric": metric}


def train_student(
    part: Part, losses: str, folder: Path, seed: int, teacher: Path, data: dict[str, Any]
) -> dict[str, Any]:
    """One student, and its score; `teacher` is the folder of its teacher's run."""
    found = compare_losses(
        part.recipe,
        [losses],
        folder / losses.replace(":", "-") / str(seed),
        seeds=[seed],
        weights=part.weights,
        model={} if losses == ALONE else {"teacher_ckpt": str(teacher)},
        data=data,
        accelerator="cpu",
        progress=False,
    )
    return found.runs[f"{losses}/{seed}"]
