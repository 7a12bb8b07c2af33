"""Does late interaction learn which word belongs to which patch, and retrieve better for it?

FILIP against CLIP's loss: the same towers, pairs and steps, CLIP's joint vector four times as wide;
seeds are paired. On generated scenes of coloured shapes, and on real pictures (see `emoji`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.filip_vl import emoji
from benchmarks.results import Results, cell, markdown, plain, work_folder
from filip_vl.comparison import CHANCE, METRICS, RECIPES, compare_shapes
from tenfold.errors import UserError

README = Path("packages/filip-vl/README.md")

Scores = dict[str, dict[str, list[float]]]


def run(seeds: int = 5, only: str | None = None) -> None:
    """Trains both sides with every seed, unless that is done, and writes the tables.

    Args:
        seeds: how many; of the real pictures three at most.
        only: "shapes" or "emoji".

    Raises:
        UserError: no such part, or no real pictures.
    """
    parts: dict[str, Callable[[Path, range], Scores]] = {
        "shapes": compare_shapes,
        "emoji": emoji.compare_emoji,
    }
    most = {"shapes": seeds, "emoji": min(seeds, emoji.SEEDS)}
    if only not in (None, *parts):
        raise UserError(f"no part is called {only!r}", fix=f"there is {', '.join(parts)}")
    results = Results("claims", "filip-vl")
    for name in [only] if only else parts:
        scores = parts[name](work_folder("filip-vl") / name, range(most[name]))
        results.runs[name] = {"seeds": most[name], "scores": scores}
        results.write()
        if name == "emoji":
            emoji.draw_searches(work_folder("filip-vl") / name)
    results.publish(README, tables(results.content))


def tables(content: Mapping[str, Any]) -> str:
    """The tables of the parts that were run."""
    runs, texts = content["runs"], []
    if "shapes" in runs:
        count, scores = runs["shapes"]["seeds"], runs["shapes"]["scores"]
        head = f"Coloured shapes, {count} seeds, equal steps:"
        texts += [head, table(scores, METRICS, CHANCE)]
    if "emoji" in runs:
        count, scores = runs["emoji"]["seeds"], runs["emoji"]["scores"]
        head = (
            f"Real pictures: 2,834 emoji and their names to train, 709 to test, {count} seeds, "
            f"{emoji.EPOCHS} epochs, equal steps. Recalls are among the 709; an attribute is right "
            "where the true name outscores those with its value exchanged:"
        )
        texts += [head, table(scores, emoji.METRICS, emoji.CHANCE)]
    return "\n\n".join(texts)


def table(scores: Scores, metrics: Mapping[str, str], chances: Mapping[str, float]) -> str:
    """Both sides by metric, in per cent, with the paired difference."""
    rows = []
    for metric, name in metrics.items():
        sides = [[100 * x for x in scores[side][metric]] for side in RECIPES]
        apart = [ours - theirs for ours, theirs in zip(*sides, strict=True)]
        chance = f"{100 * chances[metric]:.1f}" if metric in chances else ""
        rows.append([name, *map(plain, sides), cell(apart, 1), f"{min(apart):+.1f}", chance])
    head = ["per cent", *RECIPES, "difference, 95 % interval", "worst seed", "chance"]
    return markdown(head, rows)
