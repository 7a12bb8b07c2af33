"""Does late interaction learn which word belongs to which patch, and retrieve better for it?

FILIP against CLIP's loss on generated scenes of coloured shapes: the same towers, pairs and steps,
CLIP's joint vector four times as wide; seeds are paired, all are measured on the same 400 scenes.
"""

from pathlib import Path

from benchmarks.results import Results, cell, markdown, plain, replace_block, work_folder
from filip_vl.comparison import CHANCE, METRICS, RECIPES, compare_shapes
from tenfold.errors import UserError

README = Path("packages/filip-vl/README.md")
PARTS = ("shapes",)


def run(seeds: int = 5, only: str | None = None) -> None:
    """Trains both sides with every seed, unless that is done, and writes the table.

    Args:
        seeds: how many.
        only: "shapes".

    Raises:
        UserError: no such part.
    """
    if only not in (None, *PARTS):
        raise UserError(f"no part is called {only!r}", fix=f"there is {', '.join(PARTS)}")
    results = Results("claims", "filip-vl")
    scores = compare_shapes(work_folder("filip-vl") / "shapes", range(seeds))
    results.runs["shapes"] = {"seeds": seeds, "scores": scores}
    results.write()
    text = table(scores)
    results.path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    replace_block(README, "claims", text)
    print(text)


def table(scores: dict[str, dict[str, list[float]]]) -> str:
    """Both sides by metric, in per cent, with the paired difference."""
    rows = []
    for metric, name in METRICS.items():
        sides = [[100 * x for x in scores[side][metric]] for side in RECIPES]
        apart = [ours - theirs for ours, theirs in zip(*sides, strict=True)]
        chance = f"{100 * CHANCE[metric]:.1f}" if metric in CHANCE else ""
        rows.append([name, *map(plain, sides), cell(apart, 1), f"{min(apart):+.1f}", chance])
    count = len(next(iter(scores.values()))["pointing"])
    head = ["per cent", *RECIPES, "difference, 95 % interval", "worst seed", "chance"]
    return f"Coloured shapes, {count} seeds, equal steps:\n\n" + markdown(head, rows)
