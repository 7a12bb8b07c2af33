"""export: both towers for use elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from filip_vl.commands.common import must_be_new, open_model, refused
from filip_vl.export import export_folder, export_tower
from filip_vl.hub import TOKENIZER_FILE
from tenfold.checkpoint import atomic_file
from tenfold.console import at_least


def export(
    ckpt: Path,
    *,
    format: Literal["onnx", "pt2", "safetensors"] = "onnx",
    out: Path,
    image_size: int | None = None,
    check: bool = True,
) -> None:
    """Write the image tower and the text tower, and compare what was written with the network.

    Pixels in 0..1 and ids of captions go in; tokens of length 1 and their masks come out. The
    score of an image is then the mean over its tokens of their largest product with a caption's.

    Args:
        ckpt: a checkpoint or the folder of a run, a model folder, or a published CLIP.
        format: onnx or pt2 (torch.export), a file for each tower; or safetensors, a model folder.
        out: folder to write; it must be new or empty.
        image_size: side of the images in pixels; that of the training if left out.
        check: compare on images of noise and random captions.
    """
    at_least(1, image_size=image_size)
    model = open_model(ckpt, device="cpu", texts=False)
    must_be_new(out)
    if image_size is not None:
        with refused("--image-size"):
            model.set_image_size(image_size)
    if format == "safetensors":
        print(f"wrote {export_folder(model, out, check=check)}")
        return
    size, context = model.config.image_size, model.config.context_length
    given = {
        "image": f"pixels in 0..1 (batch, 3, {size}, {size})",
        "text": f"ids (batch, {context})",
    }
    for tower in ("image", "text"):
        done = export_tower(model, tower, out / f"{tower}.{format}", format, check=check)
        print(f"{given[tower]} -> tokens, mask")
        print(f"wrote {done}")
    if model.tokenizer is not None:
        with atomic_file(out / TOKENIZER_FILE) as file:
            file.write(model.tokenizer.to_json().encode())
        print(f"wrote {out / TOKENIZER_FILE}")
