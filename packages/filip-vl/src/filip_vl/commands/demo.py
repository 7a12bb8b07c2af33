"""demo: FILIP and CLIP on generated scenes, compared and drawn."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch

from filip_vl.alignment import alignment_map
from filip_vl.comparison import (
    CHANCE,
    METRICS,
    RECIPES,
    compare_shapes,
    pixels_of,
    test_scenes,
)
from filip_vl.model import FilipModel
from filip_vl.module import load_model
from filip_vl.report import (
    Query,
    comparison_bars,
    plot_alignment,
    retrieval_sheet,
    save_all,
    training_curves,
)
from filip_vl.retrieval import ranks_of
from filip_vl.synthetic import Scene
from tenfold.checkpoint import atomic_file
from tenfold.contrastive import late_interaction
from tenfold.errors import UserError

_SHOWN = 4  # captions and images of the pictures


def demo(
    out: Path = Path("filip-vl-demo"),
    seed: int = 0,
    seeds: int = 1,
    steps: int | None = None,
) -> None:
    """Train FILIP and CLIP on scenes of coloured shapes, compare them, and draw what they learned.

    Nothing is downloaded; two minutes a seed on two cores. A demo that was interrupted goes on.

    Args:
        out: folder of runs, metrics.json and pictures.
        seed: the first one.
        seeds: how many.
        steps: of the optimiser; 600 if left out.
    """
    if seeds < 1 or (steps is not None and steps < 1):
        raise UserError(f"--seeds and --steps must be 1 or more, got {seeds} and {steps}")
    chosen = range(seed, seed + seeds)
    scores = compare_shapes(out, chosen, steps=steps)
    with atomic_file(out / "metrics.json") as file:
        file.write(json.dumps(scores, indent=1).encode())
    print(table(scores))
    for path in draw(out, seed, scores):
        print(f"wrote {path}")


def table(scores: dict[str, dict[str, list[float]]]) -> str:
    """The comparison as text: a row for each metric, in per cent."""
    sides = list(scores)
    count = len(scores[sides[0]]["pointing"])
    head = f"{'per cent':28}" + "".join(f"{side:>16}" for side in sides)
    lines = [head + f"{'difference':>14}{'chance':>9}"]
    for metric, name in METRICS.items():
        values = [[100 * x for x in scores[side][metric]] for side in sides]
        means = [statistics.fmean(row) for row in values]
        spreads = [f" ± {statistics.stdev(row):.1f}" if count > 1 else "" for row in values]
        cells = "".join(
            f"{m:>16.1f}" if not s else f"{m:>9.1f}{s:>7}"
            for m, s in zip(means, spreads, strict=True)
        )
        chance = f"{100 * CHANCE[metric]:.1f}" if metric in CHANCE else ""
        lines.append(f"{name:28}{cells}{means[0] - means[1]:>+14.1f}{chance:>9}")
    lines.append(f"{count} seed{'s' if count > 1 else ''}, the same test scenes, equal steps")
    return "\n".join(lines)


def draw(out: Path, seed: int, scores: dict[str, dict[str, list[float]]]) -> list[Path]:
    """The pictures of a demo, from its first seed."""
    runs = {side: out / f"{side.lower()}-{seed}" for side in RECIPES}
    filip = load_model(runs["FILIP"])
    scenes = test_scenes()
    named = {METRICS[m]: {side: rows[m] for side, rows in scores.items()} for m in METRICS}
    bars = {side: {name: rows[side] for name, rows in named.items()} for side in scores}
    chance = {METRICS[m]: value for m, value in CHANCE.items()}
    figures = {
        "comparison": comparison_bars(bars, chance, "FILIP and CLIP on coloured shapes"),
        "curves": training_curves({side: run / "metrics.csv" for side, run in runs.items()}),
        "retrieval": retrieval_sheet(queries(filip, scenes), "What FILIP finds for a caption"),
    }
    for number, made in enumerate(scenes[:_SHOWN]):
        pixels = pixels_of([made])[0]
        label = made.caption[slice(made.phrases[0].colour[0], made.phrases[0].shape[1])]
        found = alignment_map(filip, pixels, made.caption, label)
        figures[f"alignment_{number}"] = plot_alignment(made.image, found)
    return save_all(figures, out)


@torch.no_grad()
def queries(model: FilipModel, scenes: list[Scene]) -> list[Query]:
    """Some captions with the scenes that they find among all."""
    image = model.encode_image(pixels_of(scenes))
    text = model.encode_text([made.caption for made in scenes[:_SHOWN]])
    _, t2i = late_interaction(image.normalized(), text.normalized(), image.mask, text.mask)
    kinds = [frozenset(shape.name for shape in made.objects) for made in scenes]
    right = torch.tensor([[a == b for b in kinds] for a in kinds[:_SHOWN]])
    ranks = ranks_of(t2i.T, right)
    found = []
    for n, order in enumerate(t2i.T.argsort(1, descending=True)[:, :5].tolist()):
        found.append(
            Query(
                scenes[n].caption,
                [scenes[k].image for k in order],
                [float(t2i[k, n]) for k in order],
                [bool(right[n, k]) for k in order],
                int(ranks[n]),
                scenes[n].image,
            )
        )
    return found
