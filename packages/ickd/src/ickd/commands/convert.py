"""convert: a published checkpoint as a network of this package, or of timm."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import safetensors.torch

from ickd.commands.common import build_converted, open_saved
from ickd.convert import Source, convert_checkpoint
from ickd.export import check_deviation, deviation_between
from ickd.hub import save_pretrained
from ickd.networks import Network, open_network
from tenfold.checkpoint import atomic_file
from tenfold.errors import UserError

_SIZE = 64  # of the images on which two networks are compared


def convert(
    ckpt: Path,
    *,
    from_: Source = "auto",
    to: Literal["native", "timm"] = "native",
    out: Path | None = None,
) -> None:
    """Read a published checkpoint without running code in it, and write its network.

    Args:
        ckpt: the file; with auto also a run of ickd, whose student is taken.
        from_: the program that wrote it; auto tells it by the content.
        to: native, a model folder that taps, cost, icc and export open; or timm, a file of weights
            of a ResNet that timm and torchvision load.
        out: folder, or file for timm; beside the checkpoint if left out.
    """
    opened = (
        open_saved(ckpt) if from_ == "auto" else build_converted(convert_checkpoint(ckpt, from_))
    )
    print("\n".join([f"{ckpt}: {opened.network.name}", *(f"  {note}" for note in opened.notes)]))
    stem = ckpt.name.removesuffix(".tar").partition(".")[0]
    if to == "native":
        out = out or ckpt.with_name(f"{stem}-native")
        save_pretrained(opened.network, out)
        print(f"wrote the model folder {out}")
        return
    out = out or ckpt.with_name(f"{stem}-timm.safetensors")
    if out.suffix != ".safetensors":
        raise UserError("--out must end in .safetensors", where=str(out))
    theirs = as_timm(opened.network)
    state = {key: value.contiguous() for key, value in theirs.net.state_dict().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as file:
        file.write(safetensors.torch.save(state, metadata={"format": "pt"}))
    arguments = f"{theirs.name.partition(':')[2]!r}, num_classes={theirs.net.num_classes}"
    print(f"wrote {out}; read it with")
    print(f"  timm.create_model({arguments}, checkpoint_path={str(out)!r})")


def as_timm(network: Network) -> Network:
    """The same network as timm builds it.

    Raises:
        UserError: timm has none, or one with other layers under this name.
        RuntimeError: timm's network gives other outputs.
    """
    kind, _, which = network.name.partition(":")
    if kind not in ("timm", "torchvision"):
        raise UserError(f"timm has no network such as {network.name}", fix="use --to native")
    name = f"timm:{which.partition('.')[0]}"  # without which of several published weights
    theirs = open_network(name, num_classes=network.options.get("num_classes"))
    theirs.eval().fill(network.net.state_dict())
    deviation = deviation_between(network.net, theirs.net, theirs, _SIZE)
    check_deviation(deviation, "safetensors", "timm's network")
    return theirs
