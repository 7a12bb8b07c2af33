"""What the readers give: texts with labels, choices, questions, and what was broken among them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tenfold.errors import UserError


class Example(NamedTuple):
    """One text or a pair of texts.

    Attributes:
        id: where it was read, such as "dev.tsv:12".
        text: the first or only text.
        pair: the second.
        label: number of the class, or a score; None where it is unknown.
        mismatched: of MNLI, whether its genre is none of the training's.
    """

    id: str
    text: str
    pair: str | None = None
    label: int | float | None = None
    mismatched: bool = False


class Choice(NamedTuple):
    """Multiple choice: which ending follows.

    Attributes:
        id: where it was read.
        context: what goes before.
        endings: each to be read after the context, as the second text of a pair.
        label: number of the right one; None where it is unknown.
    """

    id: str
    context: str
    endings: tuple[str, ...]
    label: int | None = None


class Question(NamedTuple):
    """A question about a context.

    Attributes:
        id: the released one.
        question: in words.
        context: where the answer stands, if there is one.
        answers: accepted answers, each with its first character in the context; empty where the
            question has none, None where the answers are unknown.
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None = None


Record = Example | Choice | Question


class Broken(NamedTuple):
    """A record that cannot be used.

    Attributes:
        id: the place in the file, or the released id.
        reason: what is wrong with it.
    """

    id: str
    reason: str


@dataclass
class Records:
    """The records of one split.

    Attributes:
        usable: in the order of the file.
        broken: number of each in the file, and what is wrong with it.
        size: of both together.
    """

    usable: list[Any] = field(default_factory=list)
    broken: dict[int, Broken] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of records, whether usable or not."""
        return len(self.usable) + len(self.broken)

    def add(self, record: Record | Broken) -> None:
        """Appends one of either kind."""
        if isinstance(record, Broken):
            self.broken[self.size] = record
        else:
            self.usable.append(record)

    @classmethod
    def of(cls, *parts: Iterator[Record | Broken]) -> Records:
        """Everything that some readers give, one after the other."""
        records = cls()
        for part in parts:
            for record in part:
                records.add(record)
        return records


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text in UTF-8 that are not blank, and their numbers from 1.

    Only a line feed ends a line: sentences of released files hold other separators.

    Raises:
        UserError: no such file, or not UTF-8.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(file, error) from error


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: no such file, or no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> UserError:
    """The error of a file that cannot be read."""
    why = error.strerror if isinstance(error, OSError) else error
    return UserError(f"cannot read it: {why}", where=str(file))
