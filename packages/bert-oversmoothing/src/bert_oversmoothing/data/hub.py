"""The same tasks through Hugging Face datasets: saved on disk, as Parquet files, or by hub name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_oversmoothing.data import swag
from bert_oversmoothing.data.glue import TASKS
from bert_oversmoothing.data.records import Broken, Example, Question, Record, Records
from bert_oversmoothing.data.squad import question
from tenfold.errors import UserError, first_line

if TYPE_CHECKING:
    import datasets

Tables = Mapping[str, "datasets.Dataset"]

SPLITS = {"train": ("train",), "val": ("validation",), "test": ("test",)}
_SAVED = "dataset_dict.json"
_PART = re.compile(r"(?P<split>\w+?)(-\d+-of-\d+(-\w+)?)?\.parquet")
_SQUAD_COLUMNS = ("id", "question", "context", "answers")


def config_of(source: str) -> str | None:
    """The configuration that a source is on the hub; None for the only one."""
    if source in TASKS:
        return TASKS[source].hub
    return "regular" if source == "swag" else None


def find_saved(root: Path, source: str) -> Path | None:
    """The folder below a root that holds the source as datasets saves it, or as Parquet files."""
    if not root.is_dir():
        return None
    folders = [root, root / "data"]
    if config_of(source):
        folders += [root / str(config_of(source)), root / "data" / str(config_of(source))]
    for folder in folders:
        if (folder / _SAVED).is_file() or any(folder.glob("*.parquet")):
            return folder
    return None


def load_saved(folder: Path) -> Tables:
    """The splits of a folder of `find_saved`.

    Raises:
        UserError: they cannot be read.
    """
    import datasets

    try:
        if (folder / _SAVED).is_file():
            loaded = datasets.load_from_disk(str(folder))
            assert isinstance(loaded, datasets.DatasetDict)
            return {str(name): table for name, table in loaded.items()}
        parts: dict[str, list[str]] = {}
        for file in sorted(folder.glob("*.parquet")):
            match = _PART.fullmatch(file.name)
            parts.setdefault(match["split"] if match else file.stem, []).append(str(file))
        return {
            name: datasets.load_dataset("parquet", data_files=files, split="train")
            for name, files in parts.items()
        }
    except Exception as error:  # datasets wraps what a damaged file raises in many ways
        raise UserError(f"cannot be read, {first_line(error)}", where=str(folder)) from error


def load_named(name: str, source: str) -> Tables:
    """The splits of a data set on the hub, such as "nyu-mll/glue", from its cache if it is there.

    Raises:
        UserError: there is none, or no way to the hub.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(name, config_of(source))
    except Exception as error:  # of the hub, of the network, of the data
        fix = "look at the name and the network, or give a folder as --data.root"
        raise UserError(f"no such data: {first_line(error)}", where=name, fix=fix) from error
    assert isinstance(loaded, datasets.DatasetDict)
    return {str(key): table for key, table in loaded.items()}


def read_table(tables: Tables, source: str, split: str, where: str) -> Records | None:
    """The records of a split, None if there is none.

    Args:
        tables: by the names of their splits.
        source: such as "cola".
        split: "train", "val" or "test".
        where: for errors.

    Raises:
        UserError: a column is missing.
    """
    names = SPLITS[split]
    if source == "mnli" and split != "train":
        names = tuple(f"{names[0]}_{kind}" for kind in ("matched", "mismatched"))
    if any(name not in tables for name in names):
        return None
    parts = (_rows(tables[name], source, name, f"{where}, {name}") for name in names)
    return Records.of(*parts)


def _rows(
    table: datasets.Dataset, source: str, split: str, where: str
) -> Iterator[Record | Broken]:
    _check_columns(table, source, where)
    order = _class_order(table, source, where)
    for number, row in enumerate(table):
        assert isinstance(row, dict)
        name = f"{split}:{number}"
        if source in TASKS:
            yield _example(name, row, source, order, mismatched="mismatched" in split)
        elif source == "swag":
            yield swag.choice(name, row)
        else:
            yield _question(row, source == "squad1")


def _check_columns(table: datasets.Dataset, source: str, where: str) -> None:
    wanted: Sequence[str] = _SQUAD_COLUMNS
    if source in TASKS:
        wanted = TASKS[source].hub_texts
    elif source == "swag":
        wanted = swag.COLUMNS
    absent = [name for name in wanted if name not in table.column_names]
    if absent:
        what = f"column {', '.join(absent)} missing; there are {', '.join(table.column_names)}"
        raise UserError(what, where=where)


def _class_order(table: datasets.Dataset, source: str, where: str) -> Sequence[int]:
    """The class of each number in the table, whose classes may be ours in another order."""
    ours = TASKS[source].names if source in TASKS else ()
    feature = table.features.get("label")
    theirs = getattr(feature, "names", None) or ours
    if len(theirs) != len(ours):
        what = f"{len(theirs)} classes ({', '.join(theirs)}), not {len(ours)}"
        raise UserError(what, where=where)
    if set(theirs) == set(ours):
        return [ours.index(name) for name in theirs]
    return range(len(ours))


def _example(
    name: str, row: Mapping[str, Any], source: str, order: Sequence[int], mismatched: bool
) -> Example | Broken:
    task = TASKS[source]
    texts = [row[column] or "" for column in task.hub_texts]
    if not any(text.strip() for text in texts):
        return Broken(name, "no text")
    label = row.get("label")
    if label is not None and label < 0:
        label = None
    elif label is not None and task.names:
        if label not in range(len(order)):
            return Broken(name, f"no label of this task: {label!r}")
        label = order[label]
    return Example(name, texts[0], texts[1] if len(texts) > 1 else None, label, mismatched)


def _question(row: Mapping[str, Any], answered: bool) -> Question | Broken:
    answers = row["answers"]
    if answers is not None:
        answers = list(zip(answers["text"], answers["answer_start"], strict=True))
    return question(str(row["id"]), row["question"], row["context"], answers, answered)
