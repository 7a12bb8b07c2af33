"""This package's files: reading any kind, writing Lightning checkpoints and model folders.

A file speaks for itself: it names its network, the constructor's arguments and what is known of the
gate, so that `load_net(path)` is all that a user of it needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from ds_net_plus.convert import convert_official
from ds_net_plus.model import DynamicNet, create_model
from ds_net_plus.model.hub import build_net, net_metadata
from ds_net_plus.model.hub import save_net as save_net  # beside `load_net`
from tenfold.checkpoint import (
    CONFIG_FILE,
    atomic_file,
    compare_keys,
    load_model_files,
    load_state,
    strip_prefix,
)
from tenfold.errors import UserError
from tenfold.training import resume_path

META = "ds_net_plus"
DETECTOR = "ds_net_plus_detector"  # of a detector's checkpoint, in its place
DATA = "datamodule_hyper_parameters"  # where Lightning keeps the data module's arguments
STUDENT, TEACHER = "net", "teacher"
_LIGHTNING = "pytorch-lightning_version"
# what LightningCLI writes for a class that is not the application's default
_GATE_MODULE = {
    "_class_path": "ds_net_plus.module.GateModule",
    "_instantiator": "lightning.pytorch.cli.instantiate_module",
}
# arguments that two networks with the same weights may differ in
_FREE = {"dropout", "drop_path", "image_size", "strict"}


@dataclass
class Saved:
    """A checkpoint's networks, and the rest of the file they came from.

    Attributes:
        raw: the file as it was read; empty for a model folder.
        nets: "net", the student, and where there is one "teacher", its moving average.
        notes: lines for a person, such as which of two state dicts was read.
    """

    raw: dict[str, Any]
    nets: dict[str, DynamicNet]
    notes: list[str] = field(default_factory=list)

    @property
    def evaluated(self) -> DynamicNet:
        """The moving average where there is one, else the student."""
        return self.nets.get(TEACHER, self.nets[STUDENT])


def read_checkpoint(path: str | Path) -> Saved:
    """Reads a Lightning checkpoint of either stage, a model folder, or an official .pth.tar.

    Raises:
        UserError: no such file, damaged, of another program, or weights that do not fit.
    """
    path = Path(path)
    if path.is_dir() and not (path / CONFIG_FILE).exists():
        path = resume_path(path) or path  # the folder of a run
    if path.is_dir():
        state, config = load_model_files(path)
        return Saved({}, {STUDENT: build_net(config, state, str(path))})
    raw = load_state(path)
    if META in raw:
        return Saved(raw, _lightning_nets(raw, path))
    if DETECTOR in raw:
        raise UserError(
            "the checkpoint is of a detector, not of a classifier",
            where=str(path),
            fix="use detect, test or predict on it",
        )
    if _LIGHTNING in raw:
        raise UserError("a Lightning checkpoint of another program", where=str(path))
    return _read_official(raw, path)


def _lightning_nets(raw: Mapping[str, Any], path: Path) -> dict[str, DynamicNet]:
    state = raw.get("state_dict") or {}
    nets = {}
    for name in (STUDENT, TEACHER):
        part = {key: value for key, value in state.items() if key.startswith(f"{name}.")}
        if part or name == STUDENT:
            nets[name] = build_net(raw[META], strip_prefix(part, f"{name}."), str(path))
    return nets


def _read_official(raw: dict[str, Any], path: Path) -> Saved:
    """Both state dicts of an official file: the weights as student, their average as teacher."""
    try:
        teacher, report = convert_official(raw, "ema")
        notes = report.lines()
        if report.others:
            student, _ = convert_official(raw, "model")
            return Saved(raw, {STUDENT: student, TEACHER: teacher}, notes)
    except UserError as error:
        raise UserError(error.what, where=str(path), fix=error.fix) from error
    return Saved(raw, {STUDENT: teacher}, notes)


def load_net(path: str | Path, weights: str = "ema") -> DynamicNet:
    """A checkpoint's network, ready to run.

    Args:
        path: anything that `read_checkpoint` takes.
        weights: "ema" prefers the moving average, "student" takes the trained weights.

    Returns:
        The network in eval mode; dynamic inference refuses a gate that the file calls untrained.

    Raises:
        UserError: an unreadable file, or another choice of weights.
    """
    if weights not in ("ema", "student"):
        raise UserError(f"weights must be 'ema' or 'student', got {weights!r}")
    saved = read_checkpoint(path)
    return saved.evaluated if weights == "ema" else saved.nets[STUDENT]


def load_into(net: DynamicNet, path: str | Path, weights: str = "ema") -> DynamicNet:
    """Loads a checkpoint of the same network into `net`, gate metadata included.

    Raises:
        UserError: the file holds another network, or a gate trained for another routing space;
            the line lists what differs.
    """
    found = load_net(path, weights)
    metadata, state = net_metadata(found), found.state_dict()
    check_same_network(net, metadata, state, str(path))
    if found.gate_trained and found.routing_space != net.routing_space:
        raise UserError(
            f"the checkpoint's gate was trained for routing space {list(found.routing_space)}, "
            f"not {list(net.routing_space)}",
            where=str(path),
            fix="use the checkpoint's routing space, or run train-gate for the other one",
        )
    net.load_state_dict(state)
    net.load_gate_state(metadata["gate"])
    return net


def check_same_network(
    net: DynamicNet,
    metadata: Mapping[str, Any],
    state: Mapping[str, Tensor],
    where: str | None = None,
) -> None:
    """Makes sure that a file's weights belong to `net`.

    Args:
        net: the network to load into.
        metadata: what `net_metadata` wrote into the file.
        state: the file's weights under the network's own keys.
        where: the file, for the message.

    Raises:
        UserError: another architecture, other arguments, or keys that do not fit; the line lists
            the fields that differ and counts the keys.
    """
    here, there = dict(net.config), dict(metadata["config"])
    with torch.device("meta"):
        other = create_model(metadata["arch"])
    if type(other) is not type(net):
        here, there = {"arch": net.name}, {"arch": metadata["arch"]}
    fields = [
        f"{key} {there.get(key)} instead of {here.get(key)}"
        for key in dict.fromkeys([*here, *there])
        if key not in _FREE and there.get(key) != here.get(key)
    ]
    keys = compare_keys(state, net.state_dict())
    if not fields and keys.fits:
        return
    raise UserError(
        f"the checkpoint holds another network: {'; '.join([*fields, keys.summary()])}",
        where=where,
        fix="build the network with the checkpoint's arguments",
    )


def write_checkpoint(path: str | Path, saved: Saved) -> None:
    """Writes a file that our Lightning modules and the trainer's `ckpt_path` take, atomically.

    With a teacher it is one of `SupernetModule`, without one of `GateModule`. Gate metadata are
    those of `saved.evaluated`. Where `saved` came from a Lightning file, everything else in it
    (optimizer, loops, callbacks) stays as it was.

    Args:
        path: its folder is made if need be.
        saved: networks to write.
    """
    path = Path(path)
    raw = dict(saved.raw) if META in saved.raw else _fresh_file(saved.raw)
    metadata = net_metadata(saved.evaluated)
    others = {
        key: value
        for key, value in raw.get("state_dict", {}).items()
        if key.partition(".")[0] not in (STUDENT, TEACHER)
    }
    weights = {
        f"{name}.{key}": value.detach().cpu()
        for name, net in saved.nets.items()
        for key, value in net.state_dict().items()
    }
    arguments = (
        raw.get("hyper_parameters", {}) if _has_teacher(raw) == (TEACHER in saved.nets) else {}
    )
    if not arguments and TEACHER not in saved.nets:
        arguments = _GATE_MODULE
    raw["state_dict"] = {**weights, **others}
    raw["hyper_parameters"] = arguments | {"arch": metadata["arch"], "net": metadata["config"]}
    raw[META] = metadata
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(raw, file)


def _has_teacher(raw: Mapping[str, Any]) -> bool:
    return any(key.startswith(f"{TEACHER}.") for key in raw.get("state_dict", {}))


def _fresh_file(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A file without optimizer and loops, which keeps what `raw` says of the data."""
    file = {"epoch": 0, "global_step": 0, _LIGHTNING: lightning.__version__}
    return file | ({DATA: raw[DATA]} if DATA in raw else {})


def save_pretrained(net: DynamicNet, folder: str | Path) -> None:
    """Writes a model folder with a card, as `net.save_pretrained` does."""
    net.save_pretrained(folder)


def from_pretrained(folder: str | Path) -> DynamicNet:
    """Reads a model folder or a repository "user/name" on the Hub.

    Raises:
        UserError: there is none, or one of its files is missing or damaged.
    """
    return DynamicNet.from_pretrained(folder)
