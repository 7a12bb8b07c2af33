"""Texts, choices and questions: readers, features, and the datamodule."""

from bert_oversmoothing.data.generated import OddRunItems
from bert_oversmoothing.data.module import OversmoothingData
from bert_oversmoothing.data.records import Broken, Choice, Example, Question, Records
from bert_oversmoothing.data.sources import SOURCES
from bert_oversmoothing.data.tokenizing import odd_run_tokenizer, open_tokenizer, word_tokenizer
from bert_oversmoothing.data.windows import Windows, cut_windows

__all__ = [
    "SOURCES",
    "Broken",
    "Choice",
    "Example",
    "OddRunItems",
    "OversmoothingData",
    "Question",
    "Records",
    "Windows",
    "cut_windows",
    "odd_run_tokenizer",
    "open_tokenizer",
    "word_tokenizer",
]
