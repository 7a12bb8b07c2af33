"""demo: a teacher, its students and plain students on an embedded task, with the pictures."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from ickd import report
from ickd.commands.compare import TOY_WEIGHTS, parse_names, signed, tell
from ickd.comparison import compare_losses
from ickd.diagnostics import Diversity, diversity, fit_channel_map
from ickd.module import load_student, make_data
from ickd.networks import Network
from ickd.scores import ALONE, Comparison
from tenfold.console import at_least
from tenfold.errors import UserError


class Task(NamedTuple):
    """An embedded task.

    Attributes:
        folder: for the results if none is named; of each task its own.
        recipe: of its students.
        losses: that are compared if none are named.
        ours: the loss that stands for the paper.
        title: of the picture of channel correlations.
    """

    folder: str
    recipe: str
    losses: str
    ours: str
    title: str


TASKS = {
    "bound-gratings": Task(
        "ickd-demo",
        "demo",
        "none,kd,ickd,kd+ickd",
        "ickd",
        "How the channels of the last map relate, test images of bound-gratings",
    ),
    "textured-blobs": Task(
        "ickd-demo-blobs",
        "blobs",
        "none,kd,ickd_grid:1x1,ickd_grid:6x6",
        "ickd_grid:6x6",
        "How the channels of the last map relate, test images of textured-blobs",
    ),
}
SHOWN = 6  # images of the picture of segmentations


def demo(
    *,
    task: str = "bound-gratings",
    out: Path | None = None,
    seeds: int = 3,
    losses: str | None = None,
    epochs: int | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Train a teacher and its students on an embedded task, with ICKD and beside it, and compare.

    An interrupted demo goes on when it is started again; a finished one only draws again.

    Args:
        task: bound-gratings (classification), or textured-blobs (segmentation, by grid).
        out: folder for checkpoints, tables and pictures; ickd-demo, or ickd-demo-blobs of
            textured-blobs, if left out.
        seeds: number of seeds, 0, 1, 2 and so on; students of one seed start alike.
        losses: with commas between them; the plain student and ICKD are always there.
        epochs: of every student, those of the recipe if left out.
        data: arguments of the data that differ from the recipe, such as {"train_size": 400}.
    """
    at_least(1, seeds=seeds, epochs=epochs)
    if task not in TASKS:
        raise UserError(f"--task must be one of {', '.join(TASKS)}, got {task!r}")
    plan = TASKS[task]
    out = out or Path(plan.folder)
    names = parse_names(losses or plan.losses)
    found = compare_losses(
        plan.recipe,
        list(dict.fromkeys([*names, ALONE, plan.ours])),
        out,
        seeds=range(seeds),
        weights=TOY_WEIGHTS,
        data=data,
        epochs=epochs,
        accelerator="cpu",
        validate=True,
    )
    tell(found, out, "demo")
    print(headline(found, plan.ours))
    networks = {
        "teacher": load_student(out / "teacher-0"),
        plan.ours: load_student(out / plan.ours / "0"),
        ALONE: load_student(out / ALONE / "0"),
    }
    images = make_data(plan.recipe, data)
    seen = channel_relations(networks, images)
    pictures = report.save_all(draw(plan, found, networks, images, seen, out), out)
    (out / "demo.json").write_text(json.dumps(summary(found, seen), indent=2) + "\n")
    print("pictures: " + ", ".join(str(path) for path in pictures))


def headline(found: Comparison, ours: str) -> str:
    """The demo's result in a sentence."""
    wins = found.differences(ours) or []
    better = sum(win > 0 for win in wins)
    beside = found.difference(ours, "kd")
    more = f"; against kd {signed(beside)}" if beside else ""
    return (
        f"{ours} against the plain student: {signed(found.difference(ours))} points, better in "
        f"{better} of {len(wins)} seeds{more}"
    )


def channel_relations(networks: dict[str, Network], images: Any) -> dict[str, Diversity]:
    """Diagnostics of the teacher and of two students, on the test images.

    Students are brought to the teacher's channels by a map fitted on the validation images.
    """
    fit, held = images.val_dataloader(), images.test_dataloader()
    teacher, *students = networks
    found = {teacher: diversity(tap_maps(networks[teacher], held))}
    for name in students:
        lift = fit_channel_map(tap_maps(networks[name], fit), tap_maps(networks[teacher], fit))
        maps = tap_maps(networks[name], held), tap_maps(networks[teacher], held)
        found[name] = diversity(*maps, lift)
    return found


@torch.no_grad()
def tap_maps(network: Network, batches: Any) -> list[torch.Tensor]:
    """What ICKD compares, batch by batch."""
    return [network.taps(batch.image).signal("last") for batch in batches]


def draw(
    plan: Task,
    found: Comparison,
    networks: dict[str, Network],
    images: Any,
    seen: dict[str, Diversity],
    out: Path,
) -> dict[str, Figure]:
    """The pictures beside those of a comparison."""
    logs = [out / name / "0/metrics.csv" for name in (plan.ours, ALONE)]
    triptych = report.icc_triptych(*(seen[name] for name in networks), heading=plan.title)
    figures = {"icc": triptych}
    if all(log.is_file() for log in logs):  # runs of a few steps log nothing
        heading = f"Students of seed 0: with {plan.ours}, and the plain one"
        others = {"plain student": logs[1]}
        figures["training"] = report.training_curves(logs[0], others, heading=heading)
    if found.metric == "mIoU":
        grids = {n: s for n, s in found.scores.items() if n == ALONE or n.startswith("ickd_grid:")}
        named = {name.removeprefix("ickd_grid:").replace("x", "×"): s for name, s in grids.items()}
        figures["grids"] = report.grid_bars(named, teacher=found.teacher)
        figures["masks"] = overlays(networks, images)
    return figures


@torch.no_grad()
def overlays(networks: dict[str, Network], images: Any) -> Figure:
    """What teacher and students make of a few test images."""
    batch = next(iter(images.test_dataloader()))
    pixels, truth = batch.image[:SHOWN], batch.label[:SHOWN]
    teacher, student, plain = (net(pixels).argmax(1) for net in networks.values())
    return report.segmentation_overlays(
        pixels, truth, student, plain, teacher, class_names=images.class_names
    )


def summary(found: Comparison, seen: dict[str, Diversity]) -> dict[str, Any]:
    """The demo's figures in plain values."""
    gains = {name: found.difference(name) for name in found.scores}
    return {
        "metric": found.metric,
        "scores": found.scores,
        "teacher": found.teacher,
        "against_none": {name: gain._asdict() for name, gain in gains.items() if gain},
        "channels": {
            name: {
                "effective_rank": one.effective_rank,
                "homology_ratio": one.homology_ratio,
                "icc_distance": one.icc_distance,
            }
            for name, one in seen.items()
        },
    }
