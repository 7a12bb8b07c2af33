"""convert: published weights of CLIP, or of DeCLIP's FILIP, as a model folder of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from filip_vl.commands.common import must_be_new, refused
from filip_vl.convert import read_checkpoint
from filip_vl.convert.reading import Source
from filip_vl.data.tokenizing import open_tokenizer
from filip_vl.hub import is_model_folder
from filip_vl.model import FilipModel
from filip_vl.tokenizers import Tokenizer
from filip_vl.tokenizers.bpe import Layout
from tenfold.console import at_least

_TOKENIZER_FILES = ("merges.txt", "tokenizer.json")


def convert(
    src: Path,
    *,
    from_: Source = "auto",
    out: Path | None = None,
    embed_dim: int | Literal["keep"] = "keep",
    tokenizer: str | None = None,
    image_size: int | None = None,
    act: Literal["quick_gelu", "gelu"] | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> None:
    """Read a published checkpoint without running code in it, and write a model folder.

    Nothing is written if a key of a tower is missing.

    Args:
        src: a file, or a folder of Hugging Face or open_clip.
        from_: the program that wrote it; auto tells it by the content.
        out: model folder to write; beside the checkpoint if left out.
        embed_dim: joint width, such as FILIP's 256: where it is not that of the file, the
            projections start from random values; keep for that of the file.
        tokenizer: CLIP's merges file or a folder with them, to be kept in the model folder; what
            lies in the folder of the checkpoint if left out.
        image_size: side of the images in pixels; positions are interpolated.
        act: activation of the MLPs, which no weight tells: quick_gelu for OpenAI's models.
        vision_heads: of the image tower's attention; its width / 64 if left out.
        text_heads: of the text tower's attention; its width / 64 if left out.
    """
    width = None if embed_dim == "keep" else embed_dim
    at_least(1, embed_dim=width, vision_heads=vision_heads, text_heads=text_heads)
    out = out or src.with_name(f"{src.stem if src.is_file() else src.name}-filip")
    if not is_model_folder(out):
        must_be_new(out)
    given: dict[str, Any] = {"act": act, "vision_heads": vision_heads, "text_heads": text_heads}
    fields = {name: value for name, value in given.items() if value is not None}
    with refused(str(src)):
        found = read_checkpoint(src, from_, **fields)
        model, report = FilipModel.from_converted(found, embed_dim=embed_dim)
    if image_size is not None:
        with refused("--image-size"):
            model.set_image_size(image_size)
    layout: Layout = "declip" if found.source == "declip-filip" else "clip"
    model.tokenizer = _tokenizer(src, tokenizer, layout)
    print(report.summary())
    if model.tokenizer is None:
        print("no tokenizer in it: name CLIP's merges where captions are read, --tokenizer PATH")
    model.save_pretrained(out)
    print(f"wrote the model folder {out}")


def _tokenizer(src: Path, name: str | None, layout: Layout) -> Tokenizer | None:
    """The tokenizer that is named, or that lies beside the weights."""
    if name is None and src.is_dir() and any((src / f).is_file() for f in _TOKENIZER_FILES):
        name = str(src)
    return None if name is None else open_tokenizer(name, list, layout)
