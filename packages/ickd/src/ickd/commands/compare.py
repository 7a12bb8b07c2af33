"""compare and sweep: which loss, and which weight, pays on a pair of networks."""

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ickd import report
from ickd.comparison import compare_losses, read_place
from ickd.module.objective import parse_losses
from ickd.scores import ALONE, Comparison, Difference
from tenfold.console import at_least, columns
from tenfold.errors import UserError

TOY_WEIGHTS = {"kd": 1.0, "ickd": 4.0, "mse": 2.0, "fitnet": 2.0}
"""On the embedded task; the defaults of the losses were chosen on CIFAR-100."""
TOY = ("demo", "gratings-fine", "blobs")
_REFERENCES = (ALONE, "kd")
"""What every row of losses is compared with."""
_IMAGES = {"test": "test", "val": "validation"}


def compare(
    *,
    recipe: str = "demo",
    losses: str = "none,kd,ickd,kd+ickd,fitnet",
    seeds: int = 3,
    teacher: str | None = None,
    student: str | None = None,
    teacher_ckpt: str | None = None,
    weights: dict[str, float] | None = None,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    epochs: int | None = None,
    accelerator: str = "auto",
    out: Path = Path("ickd-compare"),
) -> None:
    """Train one student with many losses and seeds, and tell which loss pays.

    An interrupted comparison goes on when it is started again; losses and seeds can be added.

    Args:
        recipe: packaged recipe of the student, see ickd recipes.
        losses: with commas between them; "none" is the student alone, "kd+ickd" two at once,
            "ickd@2" one with its weight, "ickd_grid:6x6" one with its grid.
        seeds: number of seeds, 0, 1, 2 and so on.
        teacher: a network by name, instead of the recipe's.
        student: likewise.
        teacher_ckpt: file with the teacher's weights.
        weights: of losses, such as {"ickd": 2.5, "kd": 1}; defaults if left out.
        model: other arguments of the Distiller that differ from the recipe. A ce_weight is that of
            every student; without it each has what usually goes with its losses.
        data: arguments of the data that differ from the recipe.
        epochs: of every run, instead of the recipe's.
        accelerator: cpu, gpu, or auto.
        out: folder for runs, results.json, compare.csv, compare.md and the pictures.
    """
    names = parse_names(losses)
    at_least(1, seeds=seeds, epochs=epochs)
    given = {"teacher": teacher, "student": student, "teacher_ckpt": teacher_ckpt}
    changes = {**(model or {}), **{k: v for k, v in given.items() if v is not None}}
    found = compare_losses(
        recipe,
        names,
        out,
        seeds=range(seeds),
        weights=(TOY_WEIGHTS if recipe in TOY else {}) | (weights or {}),
        model=changes,
        data=data,
        epochs=epochs,
        accelerator=accelerator,
    )
    tell(found, out, "compare")


def sweep(
    *,
    beta: str = "0.5,1,2,4,8",
    loss: str = "ickd",
    recipe: str = "demo",
    seeds: int = 3,
    teacher_ckpt: str | None = None,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    epochs: int | None = None,
    accelerator: str = "auto",
    out: Path = Path("ickd-sweep"),
) -> None:
    """Train the student with one loss at several weights, and score it on the validation images.

    A weight that is chosen by them has not seen the test images.

    Args:
        beta: the weights, with commas between them.
        loss: its name; or two with a plus, such as kd+ickd, of which the last has the weight.
        recipe: packaged recipe of the student, see ickd recipes.
        seeds: number of seeds, 0, 1, 2 and so on.
        teacher_ckpt: file with the teacher's weights.
        model: other arguments of the Distiller that differ from the recipe.
        data: arguments of the data that differ from the recipe.
        epochs: of every run, instead of the recipe's.
        accelerator: cpu, gpu, or auto.
        out: folder; every weight has a folder in it.
    """
    at_least(1, seeds=seeds, epochs=epochs)
    names = [f"{loss}@{_number(part):g}" for part in beta.split(",")]
    given = {**(model or {}), **({"teacher_ckpt": teacher_ckpt} if teacher_ckpt else {})}
    alone = [] if given.get("ce_weight") == 0 else [ALONE]  # which learns from labels
    found = compare_losses(
        recipe,
        parse_names(",".join([*alone, *names])),
        out,
        seeds=range(seeds),
        weights=TOY_WEIGHTS if recipe in TOY else {},
        model=given,
        data=data,
        epochs=epochs,
        accelerator=accelerator,
        split="val",
    )
    notes = []
    if found.split == "test":
        notes.append("the data have no validation images of their own: scores are of test images")
    tell(found, out, "sweep", notes)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        what = f"--beta must be numbers with commas between them, got {text!r}"
        raise UserError(what) from None


def parse_names(losses: str) -> list[str]:
    """Names with commas between them, each once, such as none,kd+ickd@2.

    Raises:
        UserError: no name, or one that is no loss.
    """
    names = [name.strip() for name in losses.strip("[]").split(",") if name.strip()]
    if not names:
        raise UserError("--losses names no loss", fix="such as none,kd,ickd")
    for name in names:
        parse_losses("+".join(read_place(place)[0] for place in name.split("+")))
    return list(dict.fromkeys(names))


def tell(found: Comparison, out: Path, name: str, notes: Sequence[str] = ()) -> None:
    """Print the table, and write it with its pictures and numbers into the folder.

    Args:
        found: what was measured.
        out: the folder.
        name: of the files in it.
        notes: lines to be said under the table.
    """
    score = f"{_IMAGES[found.split]} {found.metric}, %"
    rows = [["losses", score, "against none", "against kd", "step", "memory/image"]]
    for losses, scores in found.scores.items():
        apart = [found.difference(losses, other) for other in _REFERENCES]
        rows.append(
            [
                losses,
                mean_and_spread(scores),
                *(signed(difference) for difference in apart),
                _with_unit(1e3 * found.seconds[losses], "ms"),
                _with_unit(found.memory.get(losses, math.nan) / 1024, "KiB"),
            ]
        )
    print(columns(rows))
    below = [*_notes(found), *notes]
    print("\n".join(below))
    head, *body = (" | ".join(row) for row in rows)
    lines = [f"| {head} |", "|" + " --- |" * len(rows[0]), *(f"| {line} |" for line in body)]
    text = "\n".join(lines) + "\n\n" + "\n\n".join(below) + "\n"
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    _write_csv(found, out / f"{name}.csv")
    pictures = draw(found, out, name)
    print(f"tables: {out / name}.md, {out / name}.csv; pictures: " + ", ".join(map(str, pictures)))


def _notes(found: Comparison) -> list[str]:
    """What belongs to every number of a table."""
    start = f"students start from {found.start}"
    if math.isfinite(found.teacher):
        start += f"; teacher: {found.teacher:.2f} %"
    notes = [start]
    if found.cached:
        notes.append(
            "steps read cached features: the teacher's pass is not in their time (ickd cost)"
        )
    if found.busy:
        notes.append("the machine was busy with other work: times of steps are not to be relied on")
    return notes


def _write_csv(found: Comparison, path: Path) -> None:
    """One row for each run that was asked for, with its seed's differences and the losses' own."""
    told = ("", "_mean", "_low", "_high")
    head = [f"diff_to_{other}{what}" for other in _REFERENCES for what in told]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["losses", "seed", "score", "seconds", "bytes", *head])
        for losses, scores in found.scores.items():
            for seed, score in enumerate(scores):
                run = found.runs.get(f"{losses}/{seed}", {})
                costs = [_rounded(run.get(key)) for key in ("seconds", "bytes")]
                apart = [cell for to in _REFERENCES for cell in _apart(found, losses, to, seed)]
                table.writerow([losses, seed, f"{score:.4f}", *costs, *apart])


def _rounded(value: float | None) -> str:
    """A measurement to 6 digits, or to a whole number where it has more; empty if unknown."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1e5 else f"{value:.6g}"


def _apart(found: Comparison, losses: str, to: str, seed: int) -> list[str]:
    """The difference of one seed, and mean, low and high over all; empty where unknown."""
    apart, whole = found.differences(losses, to), found.difference(losses, to)
    if apart is None or whole is None:
        return [""] * 4
    return [f"{value:.4f}" if math.isfinite(value) else "" for value in (apart[seed], *whole)]


def draw(found: Comparison, out: Path, name: str) -> list[Path]:
    """The pictures of a comparison: every seed and gain, and accuracy against time and memory.

    Returns:
        Their paths: <name>.png, and where it was measured <name>-time.png and <name>-memory.png.
    """
    plain = found.memory.get(ALONE, math.nan)
    rows = []
    for losses, scores in found.scores.items():
        extra = found.memory.get(losses, math.nan) - plain
        gain = found.difference(losses)
        rows.append(
            report.LossRow(losses, scores, gain, _known(found.seconds[losses]), _known(extra))
        )
    score = "top-1 accuracy" if found.metric == "top-1" else found.metric
    score = score if found.split == "test" else f"validation {score}"
    figures = {name: report.dots(rows, teacher=_known(found.teacher), score=score)}
    if len(rows) > 1 and any(row.seconds is not None for row in rows):
        figures[f"{name}-time"] = report.accuracy_against_cost(rows, "seconds", score=score)
    if len(rows) > 1 and any(row.extra_bytes is not None for row in rows):
        figures[f"{name}-memory"] = report.accuracy_against_cost(rows, "memory", score=score)
    return report.save_all(figures, out)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _with_unit(value: float, unit: str) -> str:
    return f"{value:.1f} {unit}" if math.isfinite(value) else ""


def mean_and_spread(scores: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = statistics.fmean(scores)
    return f"{mean:.2f}" + (f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else "")


def signed(difference: Difference | None) -> str:
    """A difference with its interval, nothing where there is none to tell."""
    if difference is None:
        return ""
    mean, low, high = difference
    return f"{mean:+.2f}" + ("" if math.isinf(low) else f" [{low:+.2f}, {high:+.2f}]")
