"""SQuAD 1.1 and 2.0 from their released files, and what they share with any table of questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bert_oversmoothing.data.records import Broken, Question, Records, read_json
from tenfold.errors import UserError

FILES = {
    "squad1": {"train": "train-v1.1.json", "val": "dev-v1.1.json", "test": "test-v1.1.json"},
    "squad2": {"train": "train-v2.0.json", "val": "dev-v2.0.json", "test": "test-v2.0.json"},
}


def read_squad(root: Path, source: str, split: str) -> Records | None:
    """The questions of a split, None if its file is not there.

    Args:
        root: folder of the files.
        source: "squad1", whose questions all have an answer, or "squad2".
        split: "train", "val", or "test", a file that was never released.

    Raises:
        UserError: a file that cannot be read, or holds no SQuAD.
    """
    file = root / FILES[source][split]
    if not file.is_file():
        return None
    return Records.of(read_questions(file, source == "squad1"))


def read_questions(file: Path, answered: bool) -> Iterator[Question | Broken]:
    """The questions of one file.

    Args:
        file: JSON of either version.
        answered: whether a question must have an answer if it has a list of answers.

    Raises:
        UserError: a file that cannot be read, or holds no SQuAD.
    """
    content = read_json(file)
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    yield _from_json(asked, paragraph["context"], answered)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"no SQuAD: {type(error).__name__} {error}"
        fix = "it holds data[].paragraphs[].{context, qas[].{id, question, answers}}"
        raise UserError(what, where=str(file), fix=fix) from error


def _from_json(asked: dict[str, Any], context: str, answered: bool) -> Question | Broken:
    answers = asked.get("answers")
    if answers is not None:
        answers = [(answer["text"], answer["answer_start"]) for answer in answers]
    if asked.get("is_impossible"):
        answers = []
    return question(str(asked["id"]), asked["question"], context, answers, answered)


def question(
    name: str,
    asked: str,
    context: str,
    answers: Sequence[tuple[str, int]] | None,
    answered: bool,
) -> Question | Broken:
    """A record; broken where an answer lies beyond the context, or there is no context.

    Args:
        name: id of the question.
        asked: the question; outer blanks go.
        context: as it is, since answers are found by their characters.
        answers: texts and first characters; None where they are unknown.
        answered: whether there must be an answer if they are known.
    """
    if not context.strip():
        return Broken(name, "an empty context")
    for text, start in answers or ():
        if start < 0 or start + len(text) > len(context):
            what = f"an answer at {start} of {len(text)} characters"
            return Broken(name, f"{what} is beyond the {len(context)} of its context")
    if answered and answers is not None and not answers:
        return Broken(name, "no answer")
    known = None if answers is None else tuple(answers)
    return Question(name, asked.strip(), context, known)
