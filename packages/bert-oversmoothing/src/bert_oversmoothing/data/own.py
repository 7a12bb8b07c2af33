"""A person's own file to predict: texts, choices or questions without labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bert_oversmoothing.data import squad, swag
from bert_oversmoothing.data.records import Broken, Choice, Example, Record, Records, read_lines
from tenfold.errors import UserError

_TEXT, _PAIR = ("text", "sentence"), ("text_pair", "pair")


def read_own(file: Path, task: str, columns: Sequence[str] = ()) -> Records:
    """The records of a file.

    Args:
        file: for texts .txt (one a line; of a pair, with a tab between them), .tsv (text, or text
            TAB text; what follows is not read) or .jsonl; for choices .csv as SWAG has it or
            .jsonl; for questions .json as SQuAD has it or .jsonl. Lines of JSON have the keys
            `text` and, of a pair, `text_pair`; or sent1, sent2, ending0 to ending3, or `context`
            and a list of `endings`; or `question`, `context` and maybe `id`.
        task: "classification", "mlm", "choice" or "qa".
        columns: other keys of the texts; two where the task has pairs.

    Raises:
        UserError: no such file, or one of another kind, or nothing in it.
    """
    if not file.is_file():
        raise UserError("no such file to predict", where=str(file))
    readers = {
        "choice": {".csv": swag.read_table, ".jsonl": _choices},
        "qa": {".json": lambda path: squad.read_questions(path, False), ".jsonl": _questions},
    }
    texts = lambda path: _texts(path, len(columns) == 2)  # noqa: E731
    other = {".txt": texts, ".tsv": texts, ".jsonl": lambda path: _examples(path, columns)}
    known = readers.get(task, other)
    if file.suffix not in known:
        what = f"a file to predict ends in {' or '.join(known)}"
        raise UserError(what, where=str(file))
    records = Records.of(known[file.suffix](file))
    if not records.size:
        raise UserError("nothing to predict in this file", where=str(file))
    return records


def _texts(file: Path, pairs: bool) -> Iterator[Example | Broken]:
    for number, line in read_lines(file):
        name = f"{file.name}:{number}"
        fields = line.split("\t") if pairs or file.suffix == ".tsv" else [line]
        yield _example(name, fields[: 1 + pairs], pairs)


def _example(name: str, texts: Sequence[Any], pairs: bool) -> Example | Broken:
    if len(texts) < 1 + pairs:
        return Broken(name, "no `text TAB text`")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return Broken(name, "an empty text")
    return Example(name, texts[0], texts[1] if pairs else None)


def _examples(file: Path, columns: Sequence[str]) -> Iterator[Example | Broken]:
    keys = [(*columns[:1], *_TEXT), (*columns[1:], *_PAIR)][: max(1, len(columns))]
    for name, row in _objects(file):
        texts = [next((row[key] for key in names if key in row), None) for names in keys]
        if None in texts:
            missing = keys[texts.index(None)]
            yield Broken(name, f"none of the keys {', '.join(missing)}")
        else:
            yield _example(name, texts, len(keys) == 2)


def _choices(file: Path) -> Iterator[Choice | Broken]:
    for name, row in _objects(file):
        if "endings" not in row:
            yield swag.choice(name, row)
        elif not row.get("context") or len(row["endings"]) < 2 or not all(row["endings"]):
            yield Broken(name, "no context, or less than two endings")
        else:
            yield Choice(name, str(row["context"]), tuple(str(each) for each in row["endings"]))


def _questions(file: Path) -> Iterator[Record | Broken]:
    for name, row in _objects(file):
        asked, context = (str(row.get(key) or "") for key in ("question", "context"))
        name = str(row.get("id", name))
        if asked.strip():
            yield squad.question(name, asked, context, None, False)
        else:
            yield Broken(name, "no question")


def _objects(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in read_lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"not JSON: {error}", where=f"{file}:{number}") from error
        if not isinstance(row, dict):
            raise UserError("not a JSON object", where=f"{file}:{number}")
        yield f"{file.name}:{number}", row
