"""demo: FILIP and CLIP on generated scenes, compared and drawn."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from filip_vl.alignment import Alignment, alignment_map, scene_grounding
from filip_vl.comparison import (
    CHANCE,
    METRICS,
    RECIPES,
    compare_shapes,
    pixels_of,
    steps_of,
    steps_within,
    test_scenes,
)
from filip_vl.model import FilipModel
from filip_vl.module import load_model
from filip_vl.report import (
    Query,
    comparison_bars,
    contribution_bars,
    plot_alignment,
    retrieval_sheet,
    save_all,
    similarity_matrices,
    training_curves,
)
from filip_vl.retrieval import ranks_of
from filip_vl.synthetic import TEST_SEED, Scene, near_duplicates
from tenfold.checkpoint import atomic_file
from tenfold.console import at_least
from tenfold.contrastive import late_interaction
from tenfold.errors import UserError

_SHOWN, _BATCH = 4, 8  # captions and images of the pictures, pairs of the matrices


def demo(
    out: Path = Path("filip-vl-demo"),
    seed: int = 0,
    seeds: int = 1,
    steps: int | None = None,
    minutes: float | None = None,
) -> None:
    """Train FILIP and CLIP on scenes of coloured shapes, compare them, and draw what they learned.

    Nothing is downloaded; two minutes a seed on two cores. Both sides take the same steps. A demo
    that was interrupted goes on.

    Args:
        out: folder of runs, metrics.json and pictures.
        seed: the first one.
        seeds: how many.
        steps: of the optimiser; 600 if left out.
        minutes: about how long it may take: then fewer steps, as many as fit by the pace that is
            measured first.
    """
    at_least(1, seeds=seeds, steps=steps)
    if minutes is not None:
        if not 0 < minutes < float("inf"):
            raise UserError(f"--minutes must be above 0, got {minutes}")
        steps = steps_within(60 * minutes / seeds, out, steps)
        print(f"{steps} steps of each side")
    chosen = range(seed, seed + seeds)
    scores = compare_shapes(out, chosen, steps=steps)
    with atomic_file(out / "metrics.json") as file:
        file.write(json.dumps(scores, indent=1).encode())
    print(table(scores))
    if (steps or steps_of(RECIPES["FILIP"])) < steps_of(RECIPES["FILIP"]):
        print("fewer steps than the recipe's: neither side has learned what it can")
    for path in draw(out, seed, scores):
        print(f"wrote {path}")
    models = " and ".join(str(out / f"{side.lower()}-{seed}") for side in RECIPES)
    print(f"the models are {models}: try filip-vl search, align or zeroshot with --ckpt")


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


@torch.no_grad()
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
        found = content_alignment(filip, made)
        heading = f"Among colours and shapes: {made.caption}"
        figures[f"alignment_{number}"] = plot_alignment(made.image, found, heading)
    figures |= {"similarity": _matrices(filip, scenes[:_BATCH]), "contributions": _words(filip)}
    return save_all(figures, out)


def content_alignment(model: FilipModel, made: Scene) -> Alignment:
    """The colour or shape that every patch is most like, with the first object as the label.

    Among all tokens many patches of objects prefer "and" or the end, which the loss leaves free.
    """
    assert model.tokenizer is not None
    phrase = made.phrases[0]
    label = made.caption[phrase.colour[0] : phrase.shape[1]]
    found = alignment_map(model, pixels_of([made])[0], made.caption, label)
    content = scene_grounding(made, model.tokenizer, model.config.context_length).content
    others = [n for n in range(len(found.strings)) if n not in content]
    kept = found.similarities.clone()
    kept[others] = -torch.inf
    return replace(found, similarities=kept)


def _matrices(model: FilipModel, scenes: list[Scene]) -> Figure:
    """Both scores of some pairs."""
    captions = [made.caption for made in scenes]
    image, text = model.encode_image(pixels_of(scenes)), model.encode_text(captions)
    scores = late_interaction(image.normalized(), text.normalized(), image.mask, text.mask)
    return similarity_matrices(*scores, [made.image for made in scenes], captions)


def _words(model: FilipModel) -> Figure:
    """What each word of a caption adds for its scene, and for those that differ in one object."""
    group = near_duplicates(TEST_SEED, 0)
    caption = group[0].caption
    found = [alignment_map(model, pixels_of([made])[0], caption) for made in group]
    names = ["its own", *["changed"] * (len(group) - 1)]
    return contribution_bars([made.image for made in group], found, names, caption)


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
