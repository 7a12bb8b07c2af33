"""The files that hold the merges of a byte-pair encoding."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from tenfold.errors import UserError

RELEASED_MERGES = 49152 - 256 - 2
"""Lines of CLIP's released file that are used, behind its header."""

_WANTED = "give the released merges file, or a folder with tokenizer.json or merges.txt"


class MergesFile(NamedTuple):
    """Merges in their order, and the ids of all symbols where the file tells them."""

    merges: list[str]
    vocabulary: dict[str, int] | None = None


def read_merges(path: Path) -> MergesFile:
    """Read merges from disk.

    Args:
        path: the released file, plain or gzipped, whose first line is a header and of which
            `RELEASED_MERGES` more are read; the `merges.txt` or `tokenizer.json` of Hugging Face; a
            `tokenizer.json` of this package; or a folder with one of them.

    Raises:
        UserError: no such file, or none of these.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".json":
        return _read_json(path)
    lines = _read_text(path).split("\n")
    # the header is not always there, and is no merge of two letters
    first = lines[0].split()
    header = len(first) != 2 or any(len(symbol) > 1 for symbol in first)
    merges = lines[header : RELEASED_MERGES + header]
    return MergesFile([line.strip() for line in merges if line.strip()])


def _read_folder(folder: Path) -> MergesFile:
    whole, merges, vocabulary = (
        folder / name for name in ("tokenizer.json", "merges.txt", "vocab.json")
    )
    if merges.is_file():
        found = read_merges(merges)
        return found._replace(vocabulary=_load(vocabulary)) if vocabulary.is_file() else found
    if whole.is_file():
        return _read_json(whole)
    raise UserError("no merges in this folder", where=str(folder), fix=_WANTED)


def _read_json(path: Path) -> MergesFile:
    content = _load(path)
    model = content.get("model", content)
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        raise UserError("no merges in this file", where=str(path), fix=_WANTED)
    merges = [
        " ".join(merge) if isinstance(merge, list) else str(merge) for merge in model["merges"]
    ]
    return MergesFile(merges, model.get("vocab"))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=str(path), fix=_WANTED) from None
    if not isinstance(content, dict):
        raise UserError("not a JSON object", where=str(path), fix=_WANTED)
    return content


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return content.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read it: {error}", where=str(path), fix=_WANTED) from None
