"""Published checkpoints as networks of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from ickd.convert.cifar import convert_cifar, match_cifar
from ickd.convert.common import Converted
from ickd.convert.imagenet import convert_imagenet, match_imagenet
from ickd.convert.matching import network_part
from tenfold.checkpoint import extract_state_dict, load_state
from tenfold.errors import UserError

__all__ = ["UNKNOWN", "Converted", "Source", "convert_checkpoint"]

Source = Literal["auto", "repdistiller", "mdistiller", "torchdistill", "deeplab"]
"""Which program wrote a checkpoint."""

UNKNOWN = "an unknown network"
"""The network of weights that are no published ones: any others, taken as they are."""

_OWN_STUDENT = "student.net."


def convert_checkpoint(path: str | Path, source: str = "auto") -> Converted:
    """Read a checkpoint of a published program without running any code in it.

    >>> found = convert_checkpoint("resnet32x4_vanilla/ckpt_epoch_240.pth")
    >>> found.network
    'zoo:resnet32x4'

    Args:
        path: the file.
        source: the program that wrote it. "auto" tells it by the content; it also takes the student
            out of a run of `ickd fit`, and any other weights as they are, for `UNKNOWN`.

    Raises:
        UserError: the file is missing, damaged, holds no weights, would need to run code, or is not
            of a network that the program has; missing and unexpected keys are listed.
    """
    if source not in get_args(Source):
        fix = f"choose {', '.join(get_args(Source))}"
        raise UserError(f"no program is called {source!r}", fix=fix)
    raw = load_state(path)
    try:
        return _converter(raw)(raw) if source == "auto" else _CONVERTERS[source](raw)
    except UserError as error:
        where = f"{path}, {error.where}" if error.where else str(path)
        raise UserError(error.what, where=where, fix=error.fix) from error


def _deeplab(raw: Mapping[str, Any]) -> Converted:
    from ickd.convert.deeplab import convert_deeplab

    return convert_deeplab(raw)


_CONVERTERS: dict[str, Callable[[Mapping[str, Any]], Converted]] = {
    "repdistiller": convert_cifar,
    "mdistiller": convert_cifar,
    "torchdistill": convert_imagenet,
    "deeplab": _deeplab,
}


def _converter(raw: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Converted]:
    """Who reads this: told by what is beside the weights, else by the weights."""
    found, _ = extract_state_dict(raw)
    if "best_pred" in raw or any(k.removeprefix("module.").startswith("aspp.") for k in found):
        return _deeplab
    if "pytorch-lightning_version" in raw:
        return _own_run
    if "best_value" in raw:
        return convert_imagenet
    if raw.keys() & {"accuracy", "best_acc", "opt"}:
        return convert_cifar
    state, _ = network_part(raw)
    if match_cifar(state).report.fits:
        return convert_cifar
    return convert_imagenet if match_imagenet(state).report.fits else _as_it_is


def _own_run(raw: Mapping[str, Any]) -> Converted:
    """The student of a Lightning checkpoint of this package."""
    found, _ = extract_state_dict(raw)
    student = {k: v for k, v in found.items() if k.startswith(_OWN_STUDENT)}
    if not student:
        return _as_it_is(raw)
    options = raw.get("hyper_parameters")
    name = options.get("student") if isinstance(options, Mapping) else None
    return Converted(
        network=name if isinstance(name, str) else UNKNOWN,
        state={k.removeprefix(_OWN_STUDENT): v for k, v in student.items()},
        notes=["the student of a run of ickd"],
        dropped=[key for key in found if key not in student],
        embedding={},
    )


def _as_it_is(raw: Mapping[str, Any]) -> Converted:
    state, rest = network_part(raw)
    return Converted(UNKNOWN, state, [], list(rest), {})
