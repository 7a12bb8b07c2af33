"""export: a trained student for use elsewhere."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from ickd.commands.common import open_saved
from ickd.export import Exported, check_deviation, deviation_between, export_graph
from ickd.hub import from_pretrained, save_pretrained
from ickd.networks import Network
from tenfold.console import at_least
from tenfold.errors import UserError

STUDENT = "student"


def export(
    ckpt: Path,
    *,
    format: Literal["onnx", "pt2", "safetensors"] = "onnx",
    out: Path | None = None,
    image_size: int | None = None,
    check: bool = True,
) -> None:
    """Write the student alone, without teacher and adaptors; pixels in 0..1 go in, logits come out.

    Args:
        ckpt: a checkpoint or the folder of a run, a published checkpoint, or a model folder.
        format: onnx; pt2 (torch.export); or safetensors, a model folder for ickd.
        out: file to write, or folder for safetensors; student.onnx, student.pt2 or student beside
            the checkpoint if left out.
        image_size: side of the images in pixels; what the student was trained on if left out.
        check: compare what was written with the network, on images of noise.
    """
    at_least(1, image_size=image_size)
    opened = open_saved(ckpt)
    network = opened.network
    for note in opened.notes:
        print(note)
    size = image_size or opened.image_size or network.example_size
    out = out or _beside(ckpt, format)
    if format == "safetensors":
        done = _export_folder(network, out, size, check)
    else:
        if out.suffix != f".{format}":
            raise UserError(f"--out must end in .{format}", where=str(out))
        done = export_graph(network, out, format, size, check=check)
    colours = len(network.expects.mean)
    print(f"{network.name}: pixels in 0..1 (batch, {colours}, {size}, {size}) -> logits")
    print(f"wrote {done}")


def _beside(ckpt: Path, format: str) -> Path:
    folder = ckpt if ckpt.is_dir() else ckpt.parent
    return folder / (STUDENT if format == "safetensors" else f"{STUDENT}.{format}")


def _export_folder(network: Network, out: Path, size: int, check: bool) -> Exported:
    deviation = None
    if check:
        with TemporaryDirectory() as folder:
            save_pretrained(network, folder)
            again = from_pretrained(folder)
        deviation = deviation_between(network, again, network, size)
        check_deviation(deviation, "safetensors", "the model folder")
    save_pretrained(network, out)
    return Exported("safetensors", out, size, deviation)
