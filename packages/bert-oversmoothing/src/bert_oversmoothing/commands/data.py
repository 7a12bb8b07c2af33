"""data: the odd-run task on disk."""

from __future__ import annotations

import csv
import filecmp
import os
import shlex
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from bert_oversmoothing.data.generated import TOKENIZER, TRAIN_ITEMS
from bert_oversmoothing.data.tokenizing import odd_run_tokenizer
from bert_oversmoothing.synthetic import (
    CHOICES,
    VALIDATION_ITEMS,
    VALIDATION_SEED,
    Items,
    Label,
    OddRun,
    Split,
    write_squad,
)
from tenfold.console import at_least
from tenfold.errors import UserError

_SPLITS: dict[Split, dict[str, str]] = {
    "train": {"squad1": "train-v1.1.json", "tsv": "train.tsv", "swag": "train.csv"},
    "validation": {"squad1": "dev-v1.1.json", "tsv": "dev.tsv", "swag": "val.csv"},
}
_SOURCES = {"qa": "squad1", **dict.fromkeys(get_args(Label), "tsv"), "choice": "swag"}
"""Folder of every form, and the source that reads it."""

_HEADS = {
    "qa": {},
    "parity": {"task": "classification"},
    "after": {"task": "classification"},
    "choice": {"task": "choice", "num_labels": "1"},
}
"""What a model is told that the recipe of questions does not say."""


def data(
    *,
    out: Path = Path("odd-run"),
    seed: int = 0,
    train: int = TRAIN_ITEMS,
    validation: int = VALIDATION_ITEMS,
    categories: int = 4,
    words: int = 4,
    context: int = 12,
) -> None:
    """Write the odd-run task to disk, in every form, to look at or to read back as one's own.

    qa holds questions as SQuAD 1.1, parity and after lines of `sentence TAB label`, choice tables
    as SWAG; tokenizer knows their words. A folder that has the same files already is left as it is.

    Args:
        out: folder; it must be new, empty, or hold the same.
        seed: of the training items; the validation items are always the same.
        train: number of training items; the demo sees 4,800.
        validation: number of validation items.
        categories: of the words.
        words: of each category.
        context: number of words of an item.
    """
    at_least(1, train=train, validation=validation, words=words)
    at_least(2, categories=categories)
    at_least(4, context=context)
    task = OddRun(categories, words, context)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = Path(scratch) / "made"
        _write(made, task, "train", seed, train)
        _write(made, task, "validation", VALIDATION_SEED, validation)
        odd_run_tokenizer(task).save_pretrained(made / TOKENIZER)
        if _is_empty(out):
            os.replace(made, out)
            print(f"wrote {train} training and {validation} validation items to {out}")
        else:
            _must_be_same(out, made)
            print(f"{out} has these items already")
    print("learn from them:")
    for form in _SOURCES:
        print(f"  bert-oversmoothing fit {shlex.join(reading(out, form, categories))}")


def reading(folder: Path, form: str, categories: int = 4) -> list[str]:
    """The arguments of fit that read a form of what `data` wrote."""
    options = {
        "data.source": _SOURCES[form],
        "data.root": str(folder / form),
        "data.tokenizer": str(folder / TOKENIZER),
        **{f"model.{name}": value for name, value in _HEADS[form].items()},
    }
    if form == "after":
        options["model.num_labels"] = str(categories + 1)
    return ["--config", "demo", *(w for k, v in options.items() for w in (f"--{k}", v))]


def _write(folder: Path, task: OddRun, split: Split, seed: int, count: int) -> None:
    """All forms of a split."""
    items = task.items(seed, range(count), split)
    for form, source in _SOURCES.items():
        file = folder / form / _SPLITS[split][source]
        file.parent.mkdir(parents=True, exist_ok=True)
        if form == "qa":
            write_squad(file, task, items, (f"{split}-{n}" for n in range(count)))
        elif form == "choice":
            _write_choices(file, task, split, seed, items)
        else:
            assert form in get_args(Label)
            labels = task.labels(items, "parity" if form == "parity" else "after")
            texts = zip(_sentences(task, items), labels.tolist(), strict=True)
            lines = (f"{text}\t{label}\n" for text, label in texts)
            file.write_text("".join(lines), encoding="utf-8")


def _sentences(task: OddRun, items: Items) -> list[str]:
    """Question and context of every item, such as "which c2 c0w1 c2w3 ..."."""
    return [f"which {_words(task, [row[1], *row[3:-1]])}" for row in items.ids.tolist()]


def _words(task: OddRun, tokens: Iterable[int]) -> str:
    return " ".join(task.vocabulary[token] for token in tokens)


def _write_choices(file: Path, task: OddRun, split: Split, seed: int, items: Items) -> None:
    """The columns of SWAG that are read, and the number of the item; endings are the spans."""
    choices = task.choices(seed, range(len(items.ids)), split)
    head = ["", "sent1", "sent2", *(f"ending{n}" for n in range(CHOICES)), "label"]
    with file.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(head)
        for number, text in enumerate(_sentences(task, items)):
            pairs = zip(choices.ids[number].tolist(), choices.mask[number].tolist(), strict=True)
            endings = [
                _words(task, row[task.tokens : sum(real) - 1])  # behind the item, before SEP
                for row, real in pairs
            ]
            table.writerow([number, text, "", *endings, int(choices.label[number])])


def _is_empty(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _must_be_same(out: Path, made: Path) -> None:
    """Refuse a folder that does not hold the same files.

    Raises:
        UserError: names the first one that differs.
    """
    fix = "choose another --out, or remove it"
    if not out.is_dir():
        raise UserError("there is a file already", where=str(out), fix=fix)
    ours = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
    theirs = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    for name in sorted(ours | theirs):
        both = name in ours and name in theirs
        if not (both and filecmp.cmp(out / name, made / name, shallow=False)):
            raise UserError("there are other files already", where=str(out / name), fix=fix)
