"""Tokenizers: of a folder or the hub, of the words of a text, and of the generated task."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bert_oversmoothing.synthetic import OddRun
from tenfold.errors import UserError, first_line

WORD = "word"
"""Name of the tokenizer that is learned from the training texts."""

_FILES = ["*.json", "*.txt", "*.model"]
_PARALLEL = "TOKENIZERS_PARALLELISM"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def open_tokenizer(name: str) -> Any:
    """The tokenizer of a folder, or else of a model on the hub, from its cache if it is there.

    Args:
        name: path of a folder, or hub id.

    Raises:
        UserError: there is none, or it cannot pad.
    """
    from transformers import AutoTokenizer

    # threads of a tokenizer do not survive the fork of a worker
    os.environ.setdefault(_PARALLEL, "false")
    folder = name if Path(name).is_dir() else _from_hub(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the files of a folder make it raise
        fix = "give a folder with tokenizer.json, or a hub id, as --data.tokenizer"
        raise UserError(f"no tokenizer: {first_line(error)}", where=name, fix=fix) from error
    # Of a folder without files transformers makes a tokenizer that knows no word.
    if not {*tokenizer.get_vocab()} - {*tokenizer.all_special_tokens}:
        fix = "give the folder that it was trained with, as --data.tokenizer"
        raise UserError("no tokenizer there, its vocabulary is empty", where=name, fix=fix)
    if tokenizer.pad_token_id is None:
        raise UserError("this tokenizer has no padding token", where=name)
    return tokenizer


def _from_hub(name: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    fix = "give a folder that exists, or look at the name and the network"
    try:
        try:
            folder = snapshot_download(name, allow_patterns=_FILES, local_files_only=True)
            # a cache may hold the weights alone
            if any(Path(folder).glob("tokenizer*")) or any(Path(folder).glob("vocab*")):
                return folder
        except LocalEntryNotFoundError:
            pass
        return snapshot_download(name, allow_patterns=_FILES)
    except Exception as error:  # of the hub, of the network, of the name
        what = "no such folder, nor a tokenizer in the cache or on the hub"
        raise UserError(what, where=name, fix=fix) from error


@contextmanager
def many_threads() -> Iterator[None]:
    """Lets tokenizers use all cores inside, unless the person has chosen."""
    if os.environ.get(_PARALLEL) != "false":
        yield
        return
    os.environ[_PARALLEL] = "true"
    try:
        yield
    finally:
        os.environ[_PARALLEL] = "false"


def frequent_words(texts: Iterable[str], least: int = 2) -> list[str]:
    """Lower-case words, in falling order of how often they come, then of the alphabet.

    Args:
        texts: with blanks between the words.
        least: how often a word must come.
    """
    counts = Counter(word for text in texts for word in text.lower().split())
    kept = (word for word in counts if counts[word] >= least)
    return sorted(kept, key=lambda word: (-counts[word], word))


def word_tokenizer(words: Iterable[str]) -> Any:
    """A tokenizer of lower-case words between blanks, behind the special tokens in their order."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    ids = {word: number for number, word in enumerate(dict.fromkeys((*_SPECIAL, *words)))}
    backend: Any = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "mask_token": "[MASK]"}
    return _wrap(backend, ids, ("input_ids", "token_type_ids", "attention_mask"), special)


def odd_run_tokenizer(task: OddRun) -> Any:
    """The tokenizer of the generated task: "which c2" and "c0w1 c3w0" to the ids of `OddRun`.

    It refuses any other word.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: number for number, word in enumerate(task.vocabulary)}
    backend: Any = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    parts: list[Any] = [
        pre_tokenizers.Split("which ", "removed"),
        pre_tokenizers.WhitespaceSplit(),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return _wrap(backend, ids, ("input_ids", "attention_mask"), {})


def _wrap(backend: Any, ids: dict[str, int], inputs: Sequence[str], special: dict[str, str]) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    second = ":1" if "token_type_ids" in inputs else ""
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B{second} [SEP]{second}",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    os.environ.setdefault(_PARALLEL, "false")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=list(inputs),
        **special,
    )
