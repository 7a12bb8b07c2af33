"""demo: a teacher, its student and a plain student on the embedded task, with the pictures."""

import json
from pathlib import Path
from typing import Any

import torch

from ickd import report
from ickd.commands.common import at_least
from ickd.commands.compare import TOY_WEIGHTS, parse_names, signed, tell
from ickd.comparison import PLAIN, Comparison, compare_losses
from ickd.diagnostics import Diversity, diversity, fit_channel_map
from ickd.module import load_student, make_data
from ickd.networks import Network

RECIPE = "demo"
TITLE = "How the channels of the last map relate, 2,000 test images of bound-gratings"


def demo(
    *,
    out: Path = Path("ickd-demo"),
    seeds: int = 3,
    losses: str = "none,kd,ickd,kd+ickd",
    epochs: int | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Train a teacher and its students on bound-gratings, with ICKD and beside it, and compare.

    An interrupted demo goes on when it is started again; a finished one only draws again.

    Args:
        out: folder for checkpoints, tables and pictures.
        seeds: number of seeds, 0, 1, 2 and so on; students of one seed start alike.
        losses: with commas between them; none and ickd are always there.
        epochs: of every student, those of the recipe if left out.
        data: arguments of the data that differ from the recipe, such as {"train_size": 400}.
    """
    at_least(1, seeds=seeds, epochs=epochs)
    names = list(dict.fromkeys([*parse_names(losses), PLAIN, "ickd"]))
    found = compare_losses(
        RECIPE,
        names,
        out,
        seeds=range(seeds),
        weights=TOY_WEIGHTS,
        data=data,
        epochs=epochs,
        accelerator="cpu",
        validate=True,
    )
    tell(found, out, "demo")
    print(headline(found))
    seen = channel_relations(out, data)
    figures = {
        "icc": report.icc_triptych(seen["teacher"], seen["ickd"], seen[PLAIN], heading=TITLE),
        "training": report.training_curves(
            out / "ickd/0/metrics.csv",
            {"plain student": out / PLAIN / "0/metrics.csv"},
        ),
    }
    pictures = report.save_all(figures, out)
    (out / "demo.json").write_text(json.dumps(summary(found, seen), indent=2) + "\n")
    print("pictures: " + ", ".join(str(path) for path in pictures))


def headline(found: Comparison) -> str:
    """The demo's result in a sentence."""
    gain = found.difference("ickd")
    wins = [a - b for a, b in zip(found.scores["ickd"], found.scores[PLAIN], strict=True)]
    better = sum(win > 0 for win in wins)
    beside = found.difference("ickd", "kd")
    more = f"; against kd {signed(beside)}" if beside else ""
    return (
        f"ickd against the plain student: {signed(gain)} points, better in {better} of "
        f"{len(wins)} seeds{more}"
    )


def channel_relations(out: Path, data: dict[str, Any] | None = None) -> dict[str, Diversity]:
    """Diagnostics of the teacher and two students of the first seed, on the test images.

    Students are brought to the teacher's channels by a map fitted on the validation images.
    """
    images = make_data(RECIPE, data)
    fit, held = images.val_dataloader(), images.test_dataloader()
    teacher = load_student(out / "teacher-0")
    found = {"teacher": diversity(tap_maps(teacher, held))}
    for name in ("ickd", PLAIN):
        student = load_student(out / name / "0")
        lift = fit_channel_map(tap_maps(student, fit), tap_maps(teacher, fit))
        found[name] = diversity(tap_maps(student, held), tap_maps(teacher, held), lift)
    return found


@torch.no_grad()
def tap_maps(network: Network, batches: Any) -> list[torch.Tensor]:
    """What ICKD compares, batch by batch."""
    return [network.taps(batch.image).signal("last") for batch in batches]


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
