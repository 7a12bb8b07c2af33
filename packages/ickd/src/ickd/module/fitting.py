"""A packaged recipe run from Python: what demo, compare and a teacher's own training share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from tenfold.cli import load
from tenfold.data import DataModule
from tenfold.recipes import recipe_parts
from tenfold.runs import begun, make_trainer

if TYPE_CHECKING:
    from ickd.module.distiller import Distiller


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
        validate: measure on the validation images after every epoch; else not at all.
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
    trainer = make_trainer(
        folder,
        epochs=length,
        seed=seed,
        accelerator=accelerator,
        progress=progress,
        callbacks=callbacks,
        limit_val_batches=None if validate else 0,
    )
    trainer.fit(module, datamodule=images, ckpt_path=begun(folder, module, length))
    return module.eval(), images


def make_data(recipe: str, changes: Mapping[str, Any] | None = None) -> DataModule:
    """The data of a recipe, with some arguments changed, set up for everything."""
    parts = recipe_parts("ickd", recipe)["data"]
    made = load(parts["class_path"].replace(".data.", ".data:"))
    images = made(**{**parts["init_args"], **(changes or {})})
    images.setup()
    return images
