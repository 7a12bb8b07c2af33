"""What several commands need: a network by name or from a file, and tables."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ickd.convert import UNKNOWN, Converted, convert_checkpoint
from ickd.data import ImageData, SegmentationData
from ickd.hub import from_pretrained
from ickd.module import load_student
from ickd.networks import Network, open_network
from tenfold.checkpoint import CONFIG_FILE, load_state
from tenfold.errors import UserError
from tenfold.training import LAST


class Opened(NamedTuple):
    """A network with trained weights.

    Attributes:
        network: in eval mode, on the CPU.
        notes: what the file says, a line each.
        image_size: side of the images that it was trained on, None where the file does not tell.
    """

    network: Network
    notes: tuple[str, ...] = ()
    image_size: int | None = None


def open_model(name_or_path: str | Path, **options: Any) -> Network:
    """A network in eval mode: a new one by its name, or a trained one from a file.

    Args:
        name_or_path: "kind:name" (random weights), or what `open_saved` reads.
        **options: of `open_network`, for a name.

    Raises:
        UserError: it is neither, or the file is damaged or of no known network.
    """
    if Path(name_or_path).exists():
        return open_saved(name_or_path).network
    try:
        return open_network(str(name_or_path), **options).eval()
    except UserError as error:
        if ":" in str(name_or_path):
            raise
        fix = "write a name such as zoo:resnet20, or the path of a checkpoint or model folder"
        raise UserError(f"no network and no file is {str(name_or_path)!r}", fix=fix) from error


def open_saved(path: str | Path) -> Opened:
    """A trained network.

    Args:
        path: a checkpoint or the folder of a run of `ickd fit` (its student), a model folder of
            `ickd convert` or `ickd export`, or a published checkpoint.

    Raises:
        UserError: it is missing, damaged, or of no known network.
    """
    path = Path(path)
    if (path / CONFIG_FILE).is_file():
        network = from_pretrained(path)
        return Opened(network, image_size=network.expects.size)
    if path.is_dir() and not (path / LAST).is_file():
        fix = f"a model folder has a {CONFIG_FILE}, the folder of a run a {LAST}"
        raise UserError("a folder without a network", where=str(path), fix=fix)
    raw = load_state(path / LAST if path.is_dir() else path)
    if "pytorch-lightning_version" in raw:
        return _open_run(path, raw)
    try:
        return build_converted(convert_checkpoint(path))
    except UserError as error:
        raise UserError(error.what, where=error.where or str(path), fix=error.fix) from error


def build_converted(found: Converted) -> Opened:
    """The network of a published checkpoint.

    Raises:
        UserError: it is of no known network.
    """
    if found.network == UNKNOWN:
        fix = "in Python: load_weights(open_network(NAME), FILE)"
        raise UserError("weights of an unknown network", fix=fix)
    # every network that is published ends in the bias of its classifier
    classes = len(list(found.state.values())[-1])
    network = open_network(found.network, num_classes=classes)
    network.fill(found.state)
    return Opened(network.eval(), tuple(found.notes))


def _open_run(path: Path, raw: Mapping[str, Any]) -> Opened:
    size = _trained_size(raw.get("datamodule_hyper_parameters") or {})
    return Opened(load_student(path), image_size=size)


def _trained_size(given: Mapping[str, Any]) -> int | None:
    """Side of the images that a run had by the arguments of its data; None if they do not tell."""
    size, source = given.get("image_size", given.get("base_size")), str(given.get("source"))
    if size is None:
        with contextlib.suppress(UserError):  # data of one's own, whose sources are not known here
            if "image_size" in given:
                size = ImageData(source, ".").image_size
            if "base_size" in given:
                size = SegmentationData(source, ".").train_transform.base_size
    return size if isinstance(size, int) else None


def millions(number: float) -> str:
    """A count of multiply-adds or parameters, in millions: 40.82 M."""
    return f"{number / 1e6:.2f} M"
