"""The nine tasks of GLUE from their released files.

Columns are found by their names in the header, which CoLA's training files lack. Quotes are plain
characters, and only a line feed ends a line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bert_oversmoothing.data.records import Broken, Example, Records, read_lines
from tenfold.errors import UserError


class Task(NamedTuple):
    """The form of a task.

    Attributes:
        folder: its name among the released ones.
        texts: columns of the released files.
        hub_texts: columns on the Hugging Face hub, and keys of JSON lines.
        label: column of the label in the released files.
        names: of the classes, by their numbers; empty for a score.
        hub: name of the configuration on the hub.
        written: what stands in the released files for each class, if not its number.
    """

    folder: str
    texts: tuple[str, ...]
    hub_texts: tuple[str, ...]
    label: str
    names: tuple[str, ...]
    hub: str
    written: tuple[str, ...] = ()


_ENTAILMENT = ("entailment", "not_entailment")
_INFERENCE = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")

TASKS: dict[str, Task] = {
    "cola": Task(
        *("CoLA", ("sentence",), ("sentence",), "label", ("unacceptable", "acceptable"), "cola")
    ),
    "sst2": Task("SST-2", ("sentence",), ("sentence",), "label", ("negative", "positive"), "sst2"),
    "mrpc": Task(
        *("MRPC", ("#1 String", "#2 String"), _PAIR, "Quality"),
        *(("not_equivalent", "equivalent"), "mrpc"),
    ),
    "stsb": Task("STS-B", _PAIR, _PAIR, "score", (), "stsb"),
    "qqp": Task(
        *("QQP", ("question1", "question2"), ("question1", "question2"), "is_duplicate"),
        *(("not_duplicate", "duplicate"), "qqp"),
    ),
    "mnli": Task(
        "MNLI", _PAIR, ("premise", "hypothesis"), "gold_label", _INFERENCE, "mnli", _INFERENCE
    ),
    "qnli": Task(
        *("QNLI", ("question", "sentence"), ("question", "sentence"), "label"),
        *(_ENTAILMENT, "qnli", _ENTAILMENT),
    ),
    "rte": Task("RTE", _PAIR, _PAIR, "label", _ENTAILMENT, "rte", _ENTAILMENT),
    "wnli": Task("WNLI", _PAIR, _PAIR, "label", ("not_entailment", "entailment"), "wnli"),
}

_COLA_HEADER = ("source", "label", "mark", "sentence")
_MRPC_FILES = {"train": "msr_paraphrase_train.txt", "test": "msr_paraphrase_test.txt"}
_HELD_OUT = 10  # every tenth pair: 408 of 4,076, as many as in GLUE


def files(task: str, split: str) -> tuple[str, ...]:
    """Names of the released files of a split."""
    if task == "mnli" and split != "train":
        name = "dev" if split == "val" else "test"
        return f"{name}_matched.tsv", f"{name}_mismatched.tsv"
    return ({"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"}[split],)


def tree(task: str) -> str:
    """What a root is expected to hold, in words."""
    names = [name for split in ("train", "val", "test") for name in files(task, split)]
    other = f" or {' and '.join(_MRPC_FILES.values())}" if task == "mrpc" else ""
    return f"{', '.join(names)}{other}"


def read_glue(root: Path, task: str, split: str) -> Records | None:
    """The records of a split, None if its files are not there.

    MRPC is read in either form. Its original one has no validation split: there it is made of the
    pairs named in dev_ids.tsv, or else of every tenth training pair.

    Args:
        root: folder of the task.
        task: such as "cola".
        split: "train", "val" or "test".

    Raises:
        UserError: only one of MNLI's two files, or one that cannot be read.
    """
    names = files(task, split)
    there = [name for name in names if (root / name).is_file()]
    if not there and task == "mrpc":
        return _read_original_mrpc(root, split)
    if not there:
        return None
    if len(there) < len(names):
        what = f"{', '.join(set(names) - set(there))} missing beside {', '.join(there)}"
        raise UserError(what, where=str(root))
    header = _COLA_HEADER if task == "cola" and split != "test" else None
    parts = (
        read_table(root / name, TASKS[task], header, mismatched="mismatched" in name)
        for name in names
    )
    return Records.of(*parts)


def read_table(
    file: Path, task: Task, header: Sequence[str] | None = None, mismatched: bool = False
) -> Iterator[Example | Broken]:
    """The lines of one file.

    Those with another number of columns than the header, no text, or a label that the task does
    not know are broken.

    Args:
        file: a table with tabs and without quoting.
        task: whose columns they are.
        header: names of the columns, if the file does not begin with them.
        mismatched: see `Example`.

    Raises:
        UserError: a file that cannot be read, or lacks the columns of the texts.
    """
    lines = read_lines(file)
    if header is None:
        header = next(lines, (0, ""))[1].split("\t")
    absent = [name for name in task.texts if name not in header]
    if absent:
        what = f"column {', '.join(absent)} missing; the first line is {', '.join(header)[:80]!r}"
        plain = "lines of `sentence TAB label` are --data.source tsv" if len(header) == 2 else None
        raise UserError(what, where=str(file), fix=plain)
    for number, line in lines:
        name, fields = f"{file.name}:{number}", line.split("\t")
        if len(fields) != len(header):
            yield Broken(name, f"{len(fields)} columns instead of {len(header)}")
        else:
            row = dict(zip(header, fields, strict=True))
            yield _example(name, row, task, mismatched)


def _example(name: str, row: Mapping[str, str], task: Task, mismatched: bool) -> Example | Broken:
    texts = [row[column] for column in task.texts]
    if not any(text.strip() for text in texts):  # QQP has pairs of which one is empty
        return Broken(name, "no text")
    label = None
    if task.label in row:
        label = parse_label(row[task.label], task)
        if label is None:
            return Broken(name, f"no label of this task: {row[task.label]!r}")
    return Example(name, texts[0], texts[1] if len(texts) > 1 else None, label, mismatched)


def parse_label(text: str, task: Task) -> int | float | None:
    """The class or score that is written as `text`; None if it is none."""
    if not task.names:
        try:
            score = float(text)
        except ValueError:
            return None
        return score if math.isfinite(score) else None
    written = task.written or tuple(str(number) for number in range(len(task.names)))
    return written.index(text) if text in written else None


def _read_original_mrpc(root: Path, split: str) -> Records | None:
    file = root / _MRPC_FILES["test" if split == "test" else "train"]
    if not file.is_file():
        return None
    rows = read_table(file, TASKS["mrpc"])
    if split == "test":
        return Records.of(rows)
    chosen = root / "dev_ids.tsv"
    wanted = {tuple(line.split("\t")) for _, line in read_lines(chosen)} if chosen.is_file() else ()
    ids = _mrpc_ids(file)
    kept = Records()
    for number, row in enumerate(rows):
        line = int(row.id.rpartition(":")[2])
        held_out = ids[line] in wanted if wanted else number % _HELD_OUT == 0
        if held_out == (split == "val"):
            kept.add(row)
    return kept


def _mrpc_ids(file: Path) -> dict[int, tuple[str, ...]]:
    """The two ids of every line."""
    return {number: tuple(line.split("\t")[1:3]) for number, line in read_lines(file)}
