"""What a run starts from: the networks of a Distiller, and their weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ickd.module.fitting import fit_teacher, teacher_recipe
from ickd.networks import Network, load_pretrained, load_weights, open_network
from ickd.taps import still
from tenfold.distillation import Taps
from tenfold.errors import UserError
from tenfold.progress import PlainProgress
from tenfold.training import LAST

if TYPE_CHECKING:
    from ickd.module.distiller import Distiller

log = logging.getLogger(__name__)


def make_network(
    given: str | nn.Module,
    num_classes: int | None,
    taps: Sequence[str],
    options: Mapping[str, Any] | None,
) -> Network:
    """A network by its name, or around a module."""
    if isinstance(given, Network) and taps:
        same = given.name, given.expects, taps, given.example_size
        return Network(given.net, *same, options=given.options)
    if isinstance(given, Network):
        return given
    if isinstance(given, nn.Module):
        return Network(given, tap_names=taps)
    chosen = {"num_classes": num_classes, "taps": taps, **(options or {})}
    return open_network(given, **chosen)


def freeze(teacher: Network, *, new: bool) -> None:
    """Keep a teacher as it is, whatever mode it comes in; that a given one changed is told."""
    learns = any(part.training for part in teacher.net.modules())
    learns = learns or any(p.requires_grad for p in teacher.net.parameters())
    if learns and not new:
        log.info("the teacher %s is frozen and in eval mode from here on", teacher.name)
    teacher.requires_grad_(False).eval()


def example_taps(network: Network, pixels: Tensor) -> Taps:
    """Taps of empty images, for shapes alone.

    Args:
        network: any; what it cannot take is replaced by images of its own size.
        pixels: two images.
    """
    try:
        return _still_taps(network, pixels)
    except RuntimeError:  # too small, say; `check_size` tells, once the data are known
        return _still_taps(network, network.example(2))


def check_size(which: str, network: Network, size: int, *, named: bool) -> Taps:
    """Make sure that a network takes images of the data's size.

    Args:
        which: "student" or "teacher".
        network: that one.
        size: side of the data's images.
        named: whether it was given by its name.

    Returns:
        What it says about two images of that size.

    Raises:
        UserError: it does not; says how to have them resized for it.
    """
    pixels = network.example(2)[..., :1, :1].expand(-1, -1, size, size)
    try:
        return _still_taps(network, pixels)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        what = f"the {which} {network.name} does not take images of {size}x{size}: {reason}"
        side = network.example_size
        fix = f"--model.{which}_options '{json.dumps({'image_size': side})}' resizes them for it"
        if not named:
            fix = f"hand it over as Network(module, expects=Input(size={side}))"
        raise UserError(what, fix=fix) from error


def _still_taps(network: Network, pixels: Tensor) -> Taps:
    """Taps in eval mode; modes and statistics stay as they are."""
    with still(network):
        return network.taps(pixels)


def check_files(given: Mapping[str, Any]) -> None:
    """Make sure that the files of weights are there, before anything is downloaded.

    Args:
        given: arguments of a Distiller.

    Raises:
        UserError: one is not.
    """
    for name in ("student_ckpt", "teacher_ckpt"):
        if given[name] is not None and not Path(given[name]).exists():
            raise UserError(f"no such checkpoint: {given[name]}", where=f"--model.{name}")


def load_start(module: Distiller, which: str, network: Network) -> bool:
    """Fill in the weights that a run starts from.

    Args:
        module: inside a trainer, which has restored what a run that goes on left.
        which: "student" or "teacher".
        network: that one.

    Returns:
        Whether its weights are others than random ones.

    Raises:
        UserError: a file is missing or of another network.
    """
    given = module.hparams
    if module.trainer.ckpt_path:  # a run that goes on has its weights in its checkpoint
        return True
    path = given[f"{which}_ckpt"]
    pretrained = path is None and given[f"{which}_init"] == "pretrained"
    if pretrained:
        _load_published(which, network)
    if which == "teacher" and (recipe := teacher_recipe(given)):
        path = _train_teacher(module, recipe)
    if path is not None:
        for note in load_weights(network, path):
            log.info("%s: %s", path, note)
    return pretrained or path is not None or which not in given


def _load_published(which: str, network: Network) -> None:
    try:
        load_pretrained(network)
    except UserError as error:
        fix = "check the connection, or give "
        fix += f"--model.{which}_ckpt FILE or --model.{which}_init scratch"
        raise UserError(error.what, where=error.where, fix=fix) from error


def _train_teacher(module: Distiller, recipe: str) -> Path:
    """The checkpoint of the teacher's own recipe, on data of the same kind as this run's."""
    trainer: Any = module.trainer
    folder = Path(trainer.default_root_dir) / "teacher"
    if trainer.is_global_zero:
        data = getattr(getattr(trainer, "datamodule", None), "hparams", {})
        place = trainer.strategy.root_device.type
        rank_zero_info(f"fit: the teacher is trained first, by the recipe {recipe}")
        fit_teacher(
            recipe,
            folder,
            module.hparams,
            data,
            accelerator={"cuda": "gpu"}.get(place, place),
            progress=any(isinstance(c, ProgressBar | PlainProgress) for c in trainer.callbacks),
        )
    trainer.strategy.barrier()
    return folder / LAST
