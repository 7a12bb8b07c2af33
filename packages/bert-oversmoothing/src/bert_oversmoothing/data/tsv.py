"""Plain texts: `sentence TAB label` per line without a header, or a sentence per line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bert_oversmoothing.data.records import Broken, Example, Records, read_lines

NAMES = {"train": ("train",), "val": ("dev", "val", "valid"), "test": ("test",)}


def find(root: Path, split: str, endings: Sequence[str] = ("tsv",)) -> Path | None:
    """The file of a split: train, dev (or val, valid), test, with one of the endings."""
    if root.is_file():
        return root if split == "train" else None
    names = (root / f"{name}.{ending}" for name in NAMES[split] for ending in endings)
    return next((file for file in names if file.is_file()), None)


def read_labels(file: Path) -> list[str]:
    """The labels of a file: numbers in their order, else words in theirs.

    Raises:
        UserError: a file that cannot be read.
    """
    written = {line.rpartition("\t")[2].strip() for _, line in read_lines(file) if "\t" in line}
    whole = all(label.removeprefix("-").isdecimal() for label in written)
    return sorted(written, key=int) if whole else sorted(written)


def read_labelled(file: Path, names: Sequence[str] | None) -> Iterator[Example | Broken]:
    """The lines of a file; the label stands behind the last tab.

    Args:
        file: in UTF-8; the last line may lack its end.
        names: of the classes, in their order; None if labels do not matter.

    Raises:
        UserError: a file that cannot be read.
    """
    for number, line in read_lines(file):
        place = f"{file.name}:{number}"
        text, tab, label = line.rpartition("\t")
        if not tab or not text.strip():
            yield Broken(place, "no `sentence TAB label`")
        elif names is None:
            yield Example(place, text)
        elif label.strip() not in names:
            yield Broken(place, f"label {label.strip()!r} is none of {', '.join(names)}")
        else:
            yield Example(place, text, label=names.index(label.strip()))


def read_texts(file: Path) -> Iterator[Example | Broken]:
    """The texts of a file, without labels; of a .tsv the first column.

    Raises:
        UserError: a file that cannot be read.
    """
    for number, line in read_lines(file):
        text = line.partition("\t")[0] if file.suffix == ".tsv" else line
        place = f"{file.name}:{number}"
        yield Example(place, text) if text.strip() else Broken(place, "an empty text")


def read_split(root: Path, split: str, names: Sequence[str] | None) -> Records | None:
    """The labelled texts of a split, None if its file is not there."""
    file = find(root, split)
    return None if file is None else Records.of(read_labelled(file, names))
