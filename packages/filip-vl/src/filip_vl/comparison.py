"""FILIP against CLIP on the shapes task: the same towers, data and steps."""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
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
    TRAIN_PAIRS,
    TRAIN_SEED,
    Scene,
    exchanged_caption,
    near_duplicates,
    scene,
    single_object,
)
from filip_vl.zeroshot import ZeroShotClassifier
from tenfold.checkpoint import atomic_file
from tenfold.cli import silence_noise
from tenfold.device import synchronize
from tenfold.errors import UserError
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
_PACED, _WARMUP = 12, 4  # steps that tell the pace, and how many of them do not count
_TIMED = 50  # scenes that tell how long drawing takes
_SHARE = 0.65  # of the time behind the drawing that steps take; validation and pictures have it too
_FEWEST = 10  # steps of a comparison whose time is short


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
    found = _results(out)
    for seed in seeds:
        for side, recipe in recipes.items():
            key = f"{side.lower()}-{seed}"
            wanted = steps or steps_of(recipe)
            there = int(found.get(key, {}).get("steps", wanted))
            if there != wanted:
                what = f"the folder holds a run of {there} steps, and {wanted} are asked for"
                fix = f"use --steps {there}, remove the folder, or choose another --out"
                raise UserError(what, where=str(out / key), fix=fix)
            if found.get(key, {}).keys() >= METRICS.keys():
                continue
            _keep(out, found | {key: {"steps": wanted}})
            if progress:
                print(f"{side}, seed {seed}: {wanted} steps")
            options = {"accelerator": accelerator, "progress": progress}
            model = fit_recipe(recipe, out / key, seed, steps=wanted, **options)
            found[key] = {"steps": wanted, **score_shapes(model)}
            _keep(out, found)
    return {
        side: {m: [found[f"{side.lower()}-{seed}"][m] for seed in seeds] for m in METRICS}
        for side in recipes
    }


def _results(out: Path) -> dict[str, dict[str, float]]:
    """Steps of every run that was begun, and what was measured of those that are finished."""
    kept = out / "results.json"
    return json.loads(kept.read_text()) if kept.is_file() else {}


def _keep(out: Path, found: Mapping[str, Mapping[str, float]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "results.json") as file:
        file.write(json.dumps(found, indent=1).encode())


def steps_of(recipe: str) -> int:
    """Steps of the optimiser in a recipe."""
    return int(recipe_parts("filip_vl", recipe)["trainer"]["max_steps"])


def steps_within(
    seconds: float, out: Path, most: int | None = None, *, accelerator: str = "auto"
) -> int:
    """Steps that both sides of `compare_shapes` take in about a time, the same for each.

    A comparison that the folder holds keeps its own, so that it goes on; else the pace of both
    sides is measured first.

    Args:
        seconds: for both sides of one seed.
        out: folder of the comparison.
        most: steps that are enough, those of the recipe if left out.
        accelerator: Lightning's choice of device.

    Returns:
        A multiple of ten, unless `most` is none.
    """
    there = [int(run["steps"]) for run in _results(out).values()]
    if there:
        return there[0]
    most = most or min(map(steps_of, RECIPES.values()))
    pace = sum(step_seconds(recipe, accelerator) for recipe in RECIPES.values())
    left = seconds - _drawing_seconds()
    return min(most, max(_FEWEST, int(_SHARE * left / pace) // 10 * 10))


def _drawing_seconds() -> float:
    """Of the training scenes, which both sides see."""
    start = time.perf_counter()
    for index in range(_TIMED):
        scene(TRAIN_SEED, index)
    return (time.perf_counter() - start) * TRAIN_PAIRS / _TIMED


class _StepTimes(Callback):
    """Seconds of every training step, from batch start to batch end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        synchronize(trainer.strategy.root_device)
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Stops it."""
        synchronize(trainer.strategy.root_device)
        self.seconds.append(time.perf_counter() - self._start)


def step_seconds(recipe: str, accelerator: str = "auto") -> float:
    """Seconds of a training step on this machine, the median of a few; nothing stays on disk."""
    times = _StepTimes()
    batch = recipe_parts("filip_vl", recipe)["data"]["init_args"]["batch_size"]
    options: dict[str, Any] = {"accelerator": accelerator, "progress": False}
    options["data"] = {"train_size": _PACED * batch, "val_size": batch}
    with TemporaryDirectory() as folder:
        fit_recipe(recipe, Path(folder), steps=_PACED, callbacks=[times], **options)
    return statistics.median(times.seconds[_WARMUP:])


def fit_recipe(
    recipe: str,
    folder: Path,
    seed: int = 0,
    *,
    steps: int,
    accelerator: str = "auto",
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    data: Mapping[str, Any] | None = None,
) -> FilipModel:
    """Train by a recipe of the shapes task; an interrupted run goes on.

    Args:
        recipe: its name.
        folder: of the run.
        seed: of initialisation, order and training scenes.
        steps: of the optimiser.
        accelerator: Lightning's choice of device.
        progress: show it.
        callbacks: further ones of the trainer.
        data: options of `FilipDataModule` that differ from the recipe's.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    parts = recipe_parts("filip_vl", recipe)
    pairs = FilipDataModule(**{**parts["data"]["init_args"], **(data or {})}, seed=seed)
    seed_everything(seed, verbose=False)
    module = FilipModule(**parts["model"]["init_args"])
    per_epoch = len(pairs.train_dataloader())
    epochs = -(-steps // per_epoch)
    checkpoint = begun(folder, module, epochs)
    trainer = make_trainer(
        folder,
        epochs=epochs,
        seed=seed,
        accelerator=accelerator,
        progress=progress,
        callbacks=callbacks,
        max_steps=steps,
        log_every_n_steps=min(10, -(-steps // 10)),  # a short run has curves too
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        silence_noise()
        trainer.fit(module, datamodule=pairs, ckpt_path=checkpoint)
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
