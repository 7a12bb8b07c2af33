"""What several commands need: a checkpoint's network and its data."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ds_net_plus.checkpoint import DATA, Saved, read_checkpoint
from ds_net_plus.convert import check_finite_weights
from ds_net_plus.data import ImageData
from ds_net_plus.model import LARGEST, DynamicNet, RouteLike
from ds_net_plus.module.base import check_data
from tenfold.cli import short_parse_error
from tenfold.device import pick_device
from tenfold.errors import UserError


def open_network(ckpt: Path, weights: str, device: str = "cpu") -> tuple[Saved, DynamicNet]:
    """A checkpoint and the copy of its network that `weights` names, on the device.

    Raises:
        UserError: no such file, copy or device, or weights that are not finite.
    """
    if weights not in ("ema", "student"):
        raise UserError(f"weights must be 'ema' or 'student', got {weights!r}")
    saved = read_checkpoint(ckpt)
    for note in saved.notes:
        print(f"{ckpt}: {note}")
    net = saved.evaluated if weights == "ema" else saved.nets["net"]
    check_finite_weights(net.state_dict(), str(ckpt))
    return saved, net.to(pick_device(device)).eval()


def open_data(saved: Saved, changes: dict[str, Any] | None, stage: str | None = None) -> ImageData:
    """The data that the checkpoint was trained on, with some arguments changed.

    Args:
        saved: the checkpoint.
        changes: arguments of `ImageData`.
        stage: of Lightning, such as "predict"; all splits where None.

    Raises:
        UserError: an argument that `ImageData` does not have, unusable data, or data that the
            checkpoint's network was not made for.
    """
    arguments = dict(saved.raw.get(DATA, {})) | (changes or {})
    arguments = {k: v for k, v in arguments.items() if not k.startswith("_")}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageData, as_group=False)
    try:
        values = parser.parse_object(arguments)
    except argparse.ArgumentError as error:
        line = short_parse_error(str(error))
        line = re.sub("^--", "--data.", line)
        raise UserError(line, where="--data", fix="see --data.help of fit") from error
    data = ImageData(**values.as_dict())
    data.setup(stage)
    check_data(saved.evaluated, data)
    return data


@contextmanager
def told_to_skip() -> Iterator[None]:
    """Inside, an unreadable image is told with the option of a command that leaves it out."""
    try:
        yield
    except UserError as error:
        if "on_bad_item" not in (error.fix or ""):
            raise
        raise UserError(
            error.what, where=error.where, fix="mend it, or add --on-error skip"
        ) from error


def parse_routes(net: DynamicNet, text: str, option: str) -> list[RouteLike]:
    """Routes with commas between them: indices, "largest", and paths of several gates as 0-2-1-3.

    Raises:
        UserError: anything else, or a route that does not exist.
    """
    routes: list[RouteLike] = []
    for part in text.strip("[]").split(","):
        name = part.strip()
        if name == LARGEST:
            routes.append(LARGEST)
            continue
        path = parse_numbers(name.replace("-", ","), int, option)
        routes.append(net.check_route(tuple(path) if len(path) > 1 else path[0]))
    return routes


def parse_numbers(text: str, kind: type[int] | type[float], option: str) -> list[Any]:
    """Comma-separated numbers, "0,4,8,13".

    Raises:
        UserError: anything else.
    """
    try:
        return [kind(part) for part in text.strip("[]").split(",")]
    except ValueError:
        raise UserError(
            f"{option} must be numbers with commas between them, got {text!r}"
        ) from None


def refuse_folder(out: Path | None) -> None:
    """Makes sure that a checkpoint can be written to `out`, before anything is computed.

    Raises:
        UserError: there is a folder.
    """
    if out is not None and out.is_dir():
        raise UserError("a folder, not a file to write", where=str(out), fix="name a file in it")


def beside(ckpt: Path, suffix: str) -> Path:
    """A new checkpoint's default place: last.ckpt -> last-gate.ckpt in the same folder."""
    folder = ckpt if ckpt.is_dir() else ckpt.parent
    stem = ckpt.name.removesuffix(".tar").removesuffix(".pth").removesuffix(".ckpt")
    return folder / f"{stem}-{suffix}.ckpt"
