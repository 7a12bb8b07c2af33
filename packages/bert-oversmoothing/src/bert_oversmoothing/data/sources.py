"""Where each source lies, what a root is expected to hold, and where to get it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bert_oversmoothing.data import glue, hub, squad, swag, tsv
from bert_oversmoothing.data.records import Records
from tenfold.errors import UserError

GENERATED, TSV, TEXT, SWAG = "generated", "tsv", "text", "swag"
SOURCES = (GENERATED, *glue.TASKS, SWAG, *squad.FILES, TSV, TEXT)

SPLITS = ("train", "val", "test")


class _Known(NamedTuple):
    """A source on disk.

    Attributes:
        tree: what a root is expected to hold.
        val: its file of validation.
        ask: where to get it.
        hub: its name on the Hugging Face hub.
    """

    tree: str
    val: str
    ask: str
    hub: str | None = None


_GLUE = "GLUE's files are at gluebenchmark.com/tasks"
_SQUAD = "they are at rajpurkar.github.io/SQuAD-explorer"
_KNOWN: dict[str, _Known] = {
    **{
        name: _Known(
            f"{task.folder}/{{{glue.tree(name)}}}",
            " and ".join(glue.files(name, "val")),
            _GLUE,
            "nyu-mll/glue",
        )
        for name, task in glue.TASKS.items()
    },
    SWAG: _Known(
        *("train.csv, val.csv, test.csv", "val.csv"),
        *("they are at github.com/rowanz/swagaf", "allenai/swag"),
    ),
    "squad1": _Known("train-v1.1.json, dev-v1.1.json", "dev-v1.1.json", _SQUAD, "rajpurkar/squad"),
    "squad2": _Known(
        *("train-v2.0.json, dev-v2.0.json", "dev-v2.0.json", _SQUAD), "rajpurkar/squad_v2"
    ),
    TSV: _Known("train.tsv, dev.tsv, test.tsv", "dev.tsv", "their lines are `sentence TAB label`"),
    TEXT: _Known(
        *("train.txt and dev.txt, or .tsv", "dev.txt"),
        "a sentence a line; of .tsv the first column",
    ),
}


def task_of(source: str, form: str) -> str:
    """What a source asks for: "classification", "choice", "qa" or "mlm"."""
    if source == GENERATED:
        return form if form in ("qa", "choice") else "classification"
    if source in squad.FILES:
        return "qa"
    return {SWAG: "choice", TEXT: "mlm"}.get(source, "classification")


def missing(source: str, root: Path | None, what: str) -> UserError:
    """The error for a root that is missing or half unpacked: what is expected, and from where."""
    known = _KNOWN[source]
    fix = f"expected {root or 'DIR'}/: {known.tree}; {known.ask}"
    if known.hub:
        fix += f", or give --data.hub {known.hub}"
    return UserError(what, where=None if root is None else str(root), fix=fix)


class Place:
    """The files, or the tables of Hugging Face datasets, of one source.

    Args:
        source: one of `SOURCES` but "generated".
        root: folder of the released files, of their parent (for GLUE), or of what `datasets` saved;
            for plain texts also a file.
        name: of a data set on the hub, in the place of a root.

    Raises:
        UserError: neither root nor name, or a root that is not there.
    """

    def __init__(self, source: str, root: Path | None, name: str | None) -> None:
        self.source, self.root, self.name = source, root, name
        self._tables: hub.Tables | None = None
        if (root is None) == (name is None):
            what = f"source {source} needs a folder" if root is None else "both root and hub given"
            raise missing(source, root, what)
        if name is not None and not _KNOWN[source].hub:
            raise UserError(f"source {source} is not on the hub", fix="give --data.root DIR")
        if root is not None and not root.exists():
            raise missing(source, root, f"source {source}: no such folder")
        if root is not None and source in glue.TASKS:
            below = root / glue.TASKS[source].folder
            self.root = below if below.is_dir() else root

    def read(self, split: str, names: Sequence[str] | None = None) -> Records | None:
        """The records of a split, None if there is none.

        Args:
            split: one of `SPLITS`.
            names: of the classes of a plain table; None if labels do not matter.

        Raises:
            UserError: files that cannot be read, or are not what they should be.
        """
        tables = self._saved()
        if tables is not None:
            where = str(self.name or self.root)
            return hub.read_table(tables, self.source, split, where)
        root, source = self.root, self.source
        assert root is not None
        if source in glue.TASKS:
            return glue.read_glue(root, source, split)
        if source == SWAG:
            return swag.read_swag(root, split)
        if source in squad.FILES:
            return squad.read_squad(root, source, split)
        if source == TSV:
            return tsv.read_split(root, split, names)
        file = tsv.find(root, split, ("txt", "tsv"))
        return None if file is None else Records.of(tsv.read_texts(file))

    def wanted(self, split: str, names: Sequence[str] | None = None) -> Records:
        """Likewise, but the split must be there."""
        records = self.read(split, names)
        if records is None:
            raise missing(self.source, self.root, f"source {self.source}: no {split} files")
        return records

    def without_validation(self) -> str:
        """What is missing where there is no validation split, in words."""
        if self._saved() is not None:
            return f"no validation split in {self.name or self.root}"
        assert self.root is not None
        beside = "is read beside" if self.root.is_file() else "in"
        return f"no {_KNOWN[self.source].val} {beside} {self.root}"

    def labels(self) -> list[str]:
        """Names of the classes of a plain table, from its first split.

        Raises:
            UserError: there is no file.
        """
        assert self.root is not None
        for split in SPLITS:
            file = tsv.find(self.root, split)
            if file is not None:
                return tsv.read_labels(file)
        raise missing(self.source, self.root, f"source {self.source}: no files")

    def _saved(self) -> hub.Tables | None:
        if self._tables is None and _KNOWN[self.source].hub:
            if self.name is not None:
                self._tables = hub.load_named(self.name, self.source)
            else:
                folder = hub.find_saved(self.root or Path(), self.source)
                self._tables = None if folder is None else hub.load_saved(folder)
        return self._tables
