"""A packaged recipe run from Python: what demo, compare and a teacher's own training share."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from tenfold.cli import load, silence_noise
from tenfold.data import DataModule
from tenfold.recipes import recipe_parts
from tenfold.runs import begun, make_trainer

if TYPE_CHECKING:
    from ickd.module.distiller import Distiller

log = logging.getLogger(__name__)

_OF_THE_IMAGES = {
    *("source", "root", "eval_source", "eval_root", "image_column", "label_column"),
    *("classes", "class_names", "image_size", "base_size", "mean", "std", "sbd"),
    *("teacher_size", "val_size", "test_size"),
}
"""Arguments of the data that a teacher's recipe takes over from the student's run."""


def fit_recipe(
    recipe: str,
    folder: Path,
    *,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    epochs: int | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    progress: bool = True,
    validate: bool = False,
    callbacks: Sequence[Callback] = (),
) -> tuple[Distiller, DataModule]:
    """Train by a recipe; an interrupted run goes on, a finished one is only read.

    Args:
        recipe: its name.
        folder: of the run.
        model: changes to the recipe's model arguments.
        data: changes to its data arguments.
        epochs: instead of the recipe's.
        seed: of initialisation and order.
        accelerator: Lightning's choice of device.
        progress: show it.
        validate: measure on the validation images as often as the recipe does; else not at all.
        callbacks: further ones of the trainer.

    Returns:
        The trained module in eval mode, and its data.

    Raises:
        UserError: no such recipe, or the folder holds a run with other settings.
    """
    parts = recipe_parts("ickd", recipe)
    images = make_data(recipe, {**(data or {}), "seed": seed})
    torch.manual_seed(seed)
    module = load(parts["model"]["class_path"].replace(".module.", ".module:"))(
        **{**parts["model"]["init_args"], **(model or {})}
    )
    length: int = epochs or parts["trainer"]["max_epochs"]
    checkpoint = begun(folder, module, length)  # before a trainer takes up the folder's log
    trainer = make_trainer(
        folder,
        epochs=length,
        seed=seed,
        accelerator=accelerator,
        progress=progress,
        callbacks=callbacks,
        limit_val_batches=None if validate else 0,
        check_val_every_n_epoch=parts["trainer"].get("check_val_every_n_epoch", 1),
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        silence_noise()
        trainer.fit(module, datamodule=images, ckpt_path=checkpoint)
    return module.eval(), images


def teacher_recipe(arguments: Mapping[str, Any]) -> str | None:
    """The recipe that trains the teacher of a Distiller with these arguments.

    None where it has weights, or where the recipe trains another network.
    """
    recipe: str | None = arguments.get("teacher_recipe")
    pretrained = arguments.get("teacher_init") == "pretrained"
    if recipe is None or pretrained or arguments.get("teacher_ckpt") is not None:
        return None
    trained = recipe_parts("ickd", recipe)["model"]["init_args"]["student"]
    if trained == arguments.get("teacher"):
        return recipe
    log.info("the recipe %s is left out: it trains %s, which is not the teacher", recipe, trained)
    return None


def fit_teacher(
    recipe: str,
    folder: Path,
    arguments: Mapping[str, Any],
    data: Mapping[str, Any],
    **options: Any,
) -> tuple[Distiller, DataModule]:
    """Train a teacher by its recipe, on images of the same kind as its student's.

    Args:
        recipe: its name, see `teacher_recipe`.
        folder: of the run.
        arguments: of the student's Distiller.
        data: arguments of the student's data; those of the images are taken over.
        **options: further arguments of `fit_recipe`.
    """
    model = {key: arguments[key] for key in ("num_classes",) if arguments.get(key) is not None}
    images = {k: v for k, v in data.items() if k in _OF_THE_IMAGES and v is not None}
    return fit_recipe(recipe, folder, model=model, data=images, **options)


def make_data(recipe: str, changes: Mapping[str, Any] | None = None) -> DataModule:
    """The data of a recipe, with some arguments changed, set up for everything."""
    parts = recipe_parts("ickd", recipe)["data"]
    made = load(parts["class_path"].replace(".data.", ".data:"))
    images = made(**{**parts["init_args"], **(changes or {})})
    images.setup()
    return images
