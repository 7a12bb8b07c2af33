"""align: which word of a text every patch of an image chose, as a picture or as JSON."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from filip_vl.alignment import Alignment, alignment_map, attention_map
from filip_vl.commands.common import open_model, refused, tell_unknown
from filip_vl.data import eval_transform, read_source
from filip_vl.index.items import seen_part
from filip_vl.model import FilipModel
from filip_vl.report import heat_maps, plot_alignment, word_strips
from filip_vl.tokenizers.bpe import Layout
from tenfold.errors import UserError
from tenfold.plotting import check_picture, save

Mode = Literal["index", "heat", "attention"]


def align(
    *,
    ckpt: Path,
    image: Path,
    text: str | None = None,
    label: str | None = None,
    mode: Mode = "index",
    out: Path = Path("alignment.png"),
    json: bool = False,
    tokenizer: str | None = None,
    tokenizer_layout: Layout = "clip",
    max_pixels: int | None = None,
    device: str = "auto",
) -> None:
    """Draw an image under its words: the word that every patch chose, or where words look.

    Args:
        ckpt: a checkpoint or the folder of a run, a model folder, or a published CLIP.
        image: any image file.
        text: such as "a photo of a balloon."; that with the label if left out.
        label: words of the text whose patches are wanted.
        mode: index draws the number of its word on every patch, as the paper does; heat the
            similarity to the label, or to every word; attention where the patches that chose the
            label look in the last block.
        out: picture to write.
        json: print the grid of patches too: index, token and similarity.
        tokenizer: CLIP's merges file or a folder with them, for a model that has none.
        tokenizer_layout: declip for the ids of DeCLIP's checkpoints.
        max_pixels: refuse larger images.
        device: auto, cpu, cuda, cuda:N or mps.
    """
    if text is None and label is None:
        raise UserError("nothing to align", fix='give --text "a photo of a balloon." or --label')
    if mode == "attention" and label is None:
        raise UserError("mode attention is that of a label's patches", fix="give --label WORDS")
    text = f"a photo of a {label}." if text is None else text
    if not text.strip():
        raise UserError("no words to align", where="--text")
    check_picture(out)
    picture = read_source(image, max_pixels)
    model = open_model(ckpt, tokenizer, tokenizer_layout, device)
    tell_unknown(model, [text])
    side = model.config.image_size
    pixels = eval_transform(side)(picture).to(model.logit_scale)
    with refused(str(ckpt)):
        found = alignment_map(model, pixels, text, label)
    fig = _draw(model, pixels, seen_part(picture, side), found, mode, text)
    save(fig, out)
    if json:
        print(json_format.dumps(found.to_json(), indent=1))
    else:
        print(_told(found))
    # what is printed must stay JSON
    print(f"wrote {out}", file=sys.stderr if json else sys.stdout)


def _draw(
    model: FilipModel, pixels: Any, picture: Any, found: Alignment, mode: Mode, text: str
) -> Figure:
    image = np.asarray(picture)
    if mode == "index":
        return plot_alignment(image, found, text)
    words = " ".join(found.strings[n] for n in found.label)
    if mode == "attention":
        maps = {f"attention of '{words}'": attention_map(model, pixels, found.on_label)}
        return heat_maps(image, maps, text)
    if found.label:
        return heat_maps(image, {f"similarity to '{words}'": found.word_map(found.label)}, text)
    with refused("--text"):
        return word_strips(image, found, text)


def _told(found: Alignment) -> str:
    lines = [f"image to text {found.s_i2t:.4f}, text to image {found.s_t2i:.4f}"]
    if found.label:
        chosen, all_of = int(found.on_label.sum()), found.on_label.numel()
        lines.append(f"{chosen} of {all_of} patches chose the label")
    return "\n".join(lines)
