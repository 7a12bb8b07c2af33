"""FILIP against CLIP on the shapes task: the same towers, data and steps."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from PIL import Image
from torch import Tensor

from filip_vl.alignment import (
    GroundingMetrics,
    candidate_scores,
    scene_grounding,
    share_of_first,
)
from filip_vl.data import FilipDataModule, eval_transform
from filip_vl.model import FilipModel, TokenBatch
from filip_vl.module import FilipModule
from filip_vl.retrieval import TokenSet, fine_recall, retrieval_metrics, retrieval_ranks
from filip_vl.synthetic import (
    CLASS_NAMES,
    CLASS_TEMPLATE,
    GROUPS,
    SIZE,
    TEST_PAIRS,
    TEST_SEED,
    Scene,
    exchanged_caption,
    near_duplicates,
    scene,
    single_object,
)
from filip_vl.zeroshot import ZeroShotClassifier
from tenfold.checkpoint import atomic_file
from tenfold.cli import silence_noise
from tenfold.recipes import recipe_parts
from tenfold.runs import begun, make_trainer

RECIPES = {"FILIP": "demo", "CLIP": "demo-clip"}
"""Recipe of each side."""

METRICS = {
    "pointing": "pointing game",
    "alignment_content": "alignment, content words",
    "alignment_all": "alignment, all tokens",
    "binding": "binding",
    "i2t_r1": "R@1 image to text",
    "t2i_r1": "R@1 text to image",
    "fine_i2t_r1": "fine R@1 image to text",
    "fine_t2i_r1": "fine R@1 text to image",
    "zero_shot": "zero-shot, 48 classes",
}
"""What is measured, and how it is called; all shares in 0..1."""

CHANCE = {"binding": 0.5, "fine_i2t_r1": 0.25, "fine_t2i_r1": 0.25, "zero_shot": 1 / 48}
"""What guessing gives."""

_SINGLES = 8  # images of each of the 48 classes


def compare_shapes(
    out: Path,
    seeds: Sequence[int] = (0,),
    *,
    steps: int | None = None,
    recipes: dict[str, str] | None = None,
    accelerator: str = "auto",
    progress: bool = True,
) -> dict[str, dict[str, list[float]]]:
    """Train both sides with every seed and measure them; what is finished is not done again.

    Args:
        out: folder of the runs and of results.json.
        seeds: of initialisation, order and training scenes; the test scenes are the same.
        steps: of the optimiser, the recipe's if left out.
        recipes: by the name of a side, `RECIPES` if left out.
        accelerator: Lightning's choice of device.
        progress: show it.

    Returns:
        By side and metric of `METRICS` a value for each seed.

    Raises:
        UserError: the folder holds runs with other settings.
    """
    recipes = recipes or RECIPES
    kept = out / "results.json"
    found: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    for seed in seeds:
        for side, recipe in recipes.items():
            key = f"{side.lower()}-{seed}"
            steps_here = steps or recipe_parts("filip_vl", recipe)["trainer"]["max_steps"]
            if found.get(key, {}).get("steps") == steps_here:
                continue
            options = {"accelerator": accelerator, "progress": progress}
            model = fit_recipe(recipe, out / key, seed, steps=steps_here, **options)
            found[key] = {"steps": steps_here, **score_shapes(model)}
            out.mkdir(parents=True, exist_ok=True)
            with atomic_file(kept) as file:
                file.write(json.dumps(found, indent=1).encode())
    return {
        side: {m: [found[f"{side.lower()}-{seed}"][m] for seed in seeds] for m in METRICS}
        for side in recipes
    }


def fit_recipe(
    recipe: str,
    folder: Path,
    seed: int = 0,
    *,
    steps: int,
    accelerator: str = "auto",
    progress: bool = True,
) -> FilipModel:
    """Train by a recipe of the shapes task; an interrupted run goes on.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    parts = recipe_parts("filip_vl", recipe)
    data = FilipDataModule(**parts["data"]["init_args"], seed=seed)
    seed_everything(seed, verbose=False)
    module = FilipModule(**parts["model"]["init_args"])
    per_epoch = len(data.train_dataloader())
    epochs = -(-steps // per_epoch)
    checkpoint = begun(folder, module, epochs)
    trainer = make_trainer(
        folder,
        epochs=epochs,
        seed=seed,
        accelerator=accelerator,
        progress=progress,
        max_steps=steps,
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        silence_noise()
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module.model.eval()


def pixels_of(scenes: Sequence[Scene]) -> Tensor:
    """Scenes as the towers take them, (scenes, 3, height, width)."""
    transform = eval_transform(SIZE)
    return torch.stack([transform(Image.fromarray(made.image)) for made in scenes])


def test_scenes() -> list[Scene]:
    """The pairs that everything is measured on."""
    return [scene(TEST_SEED, index) for index in range(TEST_PAIRS)]


def scene_groups(scenes: Sequence[Scene]) -> Tensor:
    """The same number for scenes of the same set of objects: each is right for the other."""
    numbers: dict[Any, int] = {}
    keys = (frozenset(shape.name for shape in made.objects) for made in scenes)
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


@torch.no_grad()
def score_shapes(model: FilipModel) -> dict[str, float]:
    """Everything of `METRICS`, of a model in eval mode.

    A pooled model is scored by its vectors; what asks for words and patches takes its tokens, which
    it was not trained to have.
    """
    scenes = test_scenes()
    pixels, captions = pixels_of(scenes), [made.caption for made in scenes]
    image, text = model.encode_image(pixels), model.encode_text(captions)
    groups = scene_groups(scenes)
    recalls = retrieval_metrics(
        retrieval_ranks(TokenSet([image]), TokenSet([text]), groups, groups)
    )
    return {
        **_grounding(model, scenes, pixels, captions),
        "binding": _binding(model, image, scenes),
        **{name: recalls[name] for name in ("i2t_r1", "t2i_r1")},
        **{f"fine_{name}": value for name, value in _fine(model).items()},
        "zero_shot": _zero_shot(model),
    }


def _grounding(
    model: FilipModel, scenes: Sequence[Scene], pixels: Tensor, captions: list[str]
) -> dict[str, float]:
    assert model.tokenizer is not None
    context = model.config.context_length
    metrics = GroundingMetrics()
    truth = [scene_grounding(made, model.tokenizer, context) for made in scenes]
    metrics.update(model.image_tokens(pixels), model.text_tokens(captions), truth)
    return metrics.compute()


def _binding(model: FilipModel, image: TokenBatch, scenes: Sequence[Scene]) -> float:
    others = [exchanged_caption(made) for made in scenes]
    captions = [
        [made.caption, *([other] if other else [])]
        for made, other in zip(scenes, others, strict=True)
    ]
    return share_of_first(candidate_scores(model, image, captions))


def _fine(model: FilipModel) -> dict[str, float]:
    groups = [near_duplicates(TEST_SEED, group) for group in range(GROUPS)]
    scenes = [made for group in groups for made in group]
    image = model.encode_image(pixels_of(scenes))
    text = model.encode_text([made.caption for made in scenes])
    return fine_recall(image, text, len(groups[0]))


def _zero_shot(model: FilipModel) -> float:
    scenes = [single_object(TEST_SEED, index) for index in range(_SINGLES * len(CLASS_NAMES))]
    classifier = ZeroShotClassifier(model, list(CLASS_NAMES), [CLASS_TEMPLATE])
    chosen = classifier.scores(pixels_of(scenes)).argmax(1).cpu()
    return float((chosen == torch.arange(len(scenes)) % len(CLASS_NAMES)).double().mean())
