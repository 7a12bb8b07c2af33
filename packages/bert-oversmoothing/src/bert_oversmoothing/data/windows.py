"""Questions and their contexts as windows of tokens, question first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray
from torch.utils.data import Dataset

from bert_oversmoothing.data.features import Item
from bert_oversmoothing.data.records import Broken, Question
from bert_oversmoothing.data.tokenizing import many_threads
from bert_oversmoothing.metrics.spans import NO_PLACE, Passages
from tenfold.data import Draw, as_draw
from tenfold.errors import UserError, first_line

_AT_ONCE = 1000  # questions that are tokenised together


@dataclass
class Windows:
    """The windows of some questions, in their order.

    Attributes:
        inputs: under the names that the model takes, a row of ids for each window.
        start: token at which the answer starts, 0 where it is not in the window.
        end: token at which it ends.
        question: number of each window's question among the usable ones.
        offsets: see `bert_oversmoothing.metrics.Passages`; empty if they are not kept.
        questions: the usable ones.
        broken: number and fault of those that leave no room for their context.
    """

    inputs: dict[str, list[ndarray]]
    start: list[int]
    end: list[int]
    question: list[int]
    offsets: list[ndarray]
    questions: list[Question]
    broken: dict[int, Broken]

    @property
    def answered(self) -> bool:
        """Whether answers are known."""
        return any(question.answers is not None for question in self.questions)

    def passages(self) -> Passages:
        """What answers are read from."""
        return Passages(
            ids=[question.id for question in self.questions],
            contexts=[question.context for question in self.questions],
            golds=[
                None if question.answers is None else tuple(text for text, _ in question.answers)
                for question in self.questions
            ],
            question=self.question,
            offsets=self.offsets,
        )


def cut_windows(
    questions: Sequence[Question],
    tokenizer: Any,
    max_length: int = 384,
    stride: int = 128,
    keep_offsets: bool = True,
) -> Windows:
    """Tokenises questions with their contexts; a long context gives several windows.

    The first answer is the one to be found. Where it is not wholly inside a window, or the
    question has none, start and end are token 0.

    Args:
        questions: in the order of their file.
        tokenizer: a fast one of transformers.
        max_length: tokens of a window, the question and special tokens included.
        stride: tokens of the context that two windows share.
        keep_offsets: whether the characters of tokens are wanted, as for evaluation.

    Raises:
        UserError: a tokenizer that does not tell where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise UserError("windows need a fast tokenizer, which tells where its tokens stand")
    windows = Windows({}, [], [], [], [], [], {})
    with many_threads():
        for first in range(0, len(questions), _AT_ONCE):
            part = questions[first : first + _AT_ONCE]
            _cut(part, first, tokenizer, (max_length, stride), windows, keep_offsets)
    return windows


def _cut(
    part: Sequence[Question],
    first: int,
    tokenizer: Any,
    lengths: tuple[int, int],
    windows: Windows,
    keep_offsets: bool,
) -> None:
    broken = _without_room(part, tokenizer, *lengths)
    windows.broken |= {first + number: fault for number, fault in broken.items()}
    usable = [question for number, question in enumerate(part) if number not in broken]
    if not usable:
        return
    try:
        encoded = tokenizer(
            [question.question for question in usable],
            [question.context for question in usable],
            truncation="only_second",
            max_length=lengths[0],
            stride=lengths[1],
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
    except Exception as error:  # tokenizers raises bare exceptions
        raise UserError(f"the tokenizer refuses a question: {first_line(error)}") from error
    before = len(windows.questions)
    windows.questions.extend(usable)
    other = ("overflow_to_sample_mapping", "offset_mapping")
    names = [name for name in encoded.data if name not in other]
    for row, number in enumerate(encoded["overflow_to_sample_mapping"]):
        part_of = np.array([each == 1 for each in encoded.sequence_ids(row)])
        offsets = np.array(encoded["offset_mapping"][row], np.int32)
        offsets[~part_of] = NO_PLACE
        start, end = find_answer(offsets, usable[number])
        windows.start.append(start)
        windows.end.append(end)
        windows.question.append(before + number)
        if keep_offsets:
            windows.offsets.append(offsets)
        for name in names:
            row_ids = np.array(encoded[name][row], np.int32)
            windows.inputs.setdefault(name, []).append(row_ids)


def _without_room(
    part: Sequence[Question], tokenizer: Any, max_length: int, stride: int
) -> dict[int, Broken]:
    """Questions so long that windows could not move on, if their context needs more than one."""
    plain: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False}
    questions = tokenizer([each.question for each in part], **plain)["input_ids"]
    special = tokenizer.num_special_tokens_to_add(pair=True)
    broken = {}
    for number, ids in enumerate(questions):
        room = max_length - special - len(ids)
        if room > stride:
            continue
        context = len(tokenizer(part[number].context, **plain)["input_ids"])
        if room < 1 or context > room:
            what = f"its {len(ids)} tokens leave {max(room, 0)} of {max_length} for the context"
            broken[number] = Broken(part[number].id, f"{what}, and windows share {stride}")
    return broken


def find_answer(offsets: ndarray, question: Question) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) if it is not wholly in the window.

    Args:
        offsets: characters of each token, (n, 2); `NO_PLACE` outside the context.
        question: whose answer it is.
    """
    context = np.flatnonzero(offsets[:, 0] != NO_PLACE)
    if not question.answers or not len(context):
        return 0, 0
    text, start = question.answers[0]
    firsts, lasts = offsets[context].T
    if firsts[0] > start or lasts[-1] < start + len(text):
        return 0, 0
    from_token = np.searchsorted(firsts, start, side="right") - 1
    to_token = np.searchsorted(lasts, start + len(text), side="left")
    return int(context[from_token]), int(context[max(from_token, to_token)])


class WindowItems(Dataset[Any]):
    """The windows of one split.

    Args:
        windows: already tokenised.
    """

    def __init__(self, windows: Windows) -> None:
        self.windows, self.labelled = windows, windows.answered

    def __len__(self) -> int:
        return len(self.windows.question)

    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(ids) for ids in self.windows.inputs["input_ids"]]

    def __getitem__(self, key: Draw | int) -> Item:
        index = as_draw(key).index
        item: Item = {name: rows[index].tolist() for name, rows in self.windows.inputs.items()}
        if self.labelled:
            item["start_positions"] = self.windows.start[index]
            item["end_positions"] = self.windows.end[index]
        return item | {"index": index}
