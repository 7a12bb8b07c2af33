"""filter: the paper's rules for pairs from the web."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filip_vl.data import FilterRules, Location, filter_file, load_callable
from filip_vl.data.sources import SplitName, source_of
from tenfold.checkpoint import atomic_file
from tenfold.console import at_least
from tenfold.errors import UserError


def filter(
    src: str,
    *,
    out: Path,
    report: Path | None = None,
    min_side: int = 200,
    max_aspect: float = 3.0,
    max_repeats: int = 10,
    language: str | None = None,
    sensitive: Path | None = None,
    rewrite: str | None = None,
    source: str | None = None,
    split: SplitName = "train",
    root: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    threads: int = 8,
) -> None:
    """Keep the pairs that the paper would, in their own format, and count what each rule drops.

    Dropped are images with a side below 200 pixels or of an aspect above 3, texts that say nothing
    (such as img_0.jpg), that are not English, or that occur more than 10 times. Whether a text is
    English is a heuristic: most of its letters are ASCII.

    Args:
        src: a table, JSON lines, Karpathy's JSON, shards (brace ranges count), Parquet files, or a
            folder of images, shards or Parquet files.
        out: file to write; for shards a folder.
        report: JSON file of the counts.
        min_side: pixels of the shorter side of an image.
        max_aspect: longer side over shorter side.
        max_repeats: times that a text may occur; all of a more frequent one go.
        language: module:function that says of a text whether it is in the wanted language.
        sensitive: text file of words that no text may have, one a line.
        rewrite: module:function that makes a text another, such as with <person> for names.
        source: format of src; told by its name if left out.
        split: of Karpathy's JSON.
        root: folder that the names of images start from; that of the file if left out.
        image_column: of a table, JSON lines or Parquet files; each format's own if left out.
        caption_column: likewise.
        threads: that look at images.
    """
    at_least(1, threads=threads)
    options: dict[str, Any] = {} if language is None else {"language": load_callable(language)}
    rules = FilterRules(
        min_side=min_side,
        max_aspect=max_aspect,
        max_repeats=max_repeats,
        sensitive=_words(sensitive),
        rewrite=None if rewrite is None else load_callable(rewrite),
        **options,
    )
    at = Location(source or source_of(src), root, image_column, caption_column)
    counts = filter_file(src, out, rules, at, split=split, threads=threads)
    print("\n".join(counts.lines()))
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(report) as file:
            file.write(json.dumps(counts.to_dict(), indent=1).encode())
    print(f"wrote {out}")
    home = root or Path(src).parent
    if at.source in ("csv", "jsonl") and home.absolute() != out.parent.absolute():
        print(f"its images are still named from {home}: read it with --data.root {home}")


def _words(file: Path | None) -> frozenset[str]:
    if file is None:
        return frozenset()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the words: {error}", where=str(file)) from error
    return frozenset(line.strip() for line in lines if line.strip())
