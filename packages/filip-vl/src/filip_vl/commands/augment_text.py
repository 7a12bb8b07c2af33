"""augment-text: more captions for every image, by a function of one's own."""

from __future__ import annotations

from pathlib import Path

from filip_vl.data import Location, augment_captions, load_callable, read_any
from filip_vl.data.sources import SplitName, source_of
from tenfold.errors import UserError


def augment_text(
    src: str,
    *,
    function: str,
    out: Path,
    at_once: int = 64,
    source: str | None = None,
    split: SplitName = "train",
    root: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> None:
    """Add variants to the captions of every image, of which training then draws one each time.

    The paper's variants are translations to German and Russian and back. This package has no
    translator: the function is yours.

    Args:
        src: a table, JSON lines, Karpathy's JSON, shards (brace ranges count) or Parquet files.
        function: module:function that takes a list of captions and gives for each of them a text
            or a list of texts.
        out: JSON lines to write.
        at_once: captions in a call of the function.
        source: format of src; told by its name if left out.
        split: of Karpathy's JSON.
        root: folder that the names of images start from; that of the file if left out.
        image_column: of a table, JSON lines or Parquet files; each format's own if left out.
        caption_column: likewise.
    """
    if out.suffix != ".jsonl":
        raise UserError("--out must end in .jsonl", where=str(out))
    if "{" not in src and not Path(src).exists():
        raise UserError("no such file or folder", where=src)
    if Path(src).absolute() == out.absolute():
        raise UserError("--out is what is read", where=str(out), fix="choose another")
    at = Location(source or source_of(src), root, image_column, caption_column)
    pairs = read_any(src, at, split)
    if not any(pairs.captions):
        raise UserError("the images have no captions", where=src)
    done = augment_captions(pairs, load_callable(function), out, at_once)
    print(f"{done.images} images, {done.captions} captions and {done.added} variants of them")
    print(f"wrote {out}")
