"""The tables and pictures of the claims, for the README."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.results import Results, cell, markdown, plain
from ickd.scores import ALONE

README = Path("packages/ickd/README.md")
DOCS = README.parent / "docs"
TITLES = {
    "gratings": "bound-gratings, 24 types in 3 classes (800 images)",
    "fine": "bound-gratings, 16 classes (800 images)",
    "blobs": "textured-blobs, segmentation (100 images)",
    "cifar": "CIFAR-10 subset (20,000 images), resnet20 -> resnet8",
}


def write_tables(results: Results) -> None:
    """Writes the tables beside the results, and the blocks of the README."""
    parts = {name: scores(results.runs, name) for name in TITLES}
    texts = [table(name, found) for name, found in parts.items() if found]
    results.publish(README, "\n\n".join(texts))


def scores(runs: dict[str, Any], part: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Runs of a part by loss and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for key, run in runs.items():
        name, losses, seed = key.split("/")
        if name == part:
            found[losses][int(seed)] = run
    return dict(found)


def differences(
    found: dict[str, dict[int, dict[str, Any]]], losses: str, other: str
) -> list[float]:
    """Points by which a loss is better than another one, for the seeds that both have."""
    ours, theirs = found.get(losses, {}), found.get(other, {})
    return [ours[seed]["score"] - theirs[seed]["score"] for seed in sorted({*ours} & {*theirs})]


def table(part: str, found: dict[str, dict[int, dict[str, Any]]]) -> str:
    """One part: every loss with its differences, paired by seed."""
    metric = next(iter(next(iter(found.values())).values()))["metric"]
    teacher = found.get("teacher", {})
    names = [ALONE, *sorted(name for name in found if name not in (ALONE, "teacher"))]
    rows = []
    for name in (name for name in names if name in found):
        values = [run["score"] for _, run in sorted(found[name].items())]
        row = [name, plain(values, 2)]
        for other in (ALONE, "kd"):
            apart = differences(found, name, other) if name not in (ALONE, other) else []
            row.append(cell(apart) if apart else "")
        rows.append(row)
    seeds = max(len(runs) for name, runs in found.items() if name != "teacher")
    alone = plain([run["score"] for run in teacher.values()], 1) if teacher else "not measured"
    head = [
        "losses beside cross-entropy",
        f"test {metric}, %",
        "against none",
        "against kd",
    ]
    return f"{TITLES[part]}; {seeds} seeds, teacher {alone}:\n\n{markdown(head, rows)}"
