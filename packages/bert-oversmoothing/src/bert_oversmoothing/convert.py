"""Plain models to fusion models and back, as folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from bert_oversmoothing.model import TASKS, FusionModel
from bert_oversmoothing.model.folding import folded_weights, linear_head
from bert_oversmoothing.model.loading import silent
from tenfold.errors import UserError, first_line

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spm.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "bpe_encoder.bin",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What makes inputs of texts and images; copied as it is."""


def to_fusion(plain: str | Path, task: str, fusion: str = "gate", **options: Any) -> FusionModel:
    """A fusion model that starts from a plain one.

    Every key of the plain model gets the prefix `model.`, and the fusion starts as the identity.

    Args:
        plain: folder or id on the Hub, with or without a head for the task.
        task: one of `TASKS`.
        fusion: see `FusionConfig`.
        **options: of `from_encoder`.

    Raises:
        UserError: see `from_encoder`.
    """
    if task not in TASKS:
        raise UserError(f"unknown task: {task!r}", where="task", fix=f"choose {', '.join(TASKS)}")
    return TASKS[task].from_encoder(plain, fusion, **options)


@torch.no_grad()
def to_plain(model: FusionModel, *, force_last: bool = False) -> PreTrainedModel:
    """The plain model inside, without the fusion.

    It answers as the fusion model where the fusion is the identity (to the bit), or a concat that
    reads the last layer alone in front of a linear head, which takes it up (up to rounding).

    Args:
        model: its plain model is handed out, not a copy.
        force_last: take the plain model in any case; its head was trained on fused states.

    Raises:
        UserError: the fusion has been trained, and force_last is off.
    """
    fusion, head = model.fusion, linear_head(model)
    if fusion.is_identity():
        return model.model
    if fusion.kind == "concat" and not fusion.weight[:, : -fusion.width].any() and head is not None:
        weight, bias = folded_weights(fusion, head)
        head.weight.copy_(weight[:, -fusion.width :])
        if head.bias is None:
            head.bias = nn.Parameter(bias)
        head.bias.copy_(bias)
        return model.model
    if not force_last:
        raise UserError(
            f"the {fusion.kind} fusion is no identity: a plain model would answer otherwise",
            fix="--force-last drops it all the same",
        )
    return model.model


def save_folder(
    model: PreTrainedModel, out: str | Path, source: str | Path | None = None, tokenizer: Any = None
) -> list[str]:
    """Write a model folder, with the files of the tokenizer.

    Args:
        model: fusion or plain.
        out: must be new or empty.
        source: folder or id that the model came from; the files of its tokenizer are copied.
        tokenizer: one of transformers, to be written in their place.

    Returns:
        Names of the files of the tokenizer.

    Raises:
        UserError: there are files already, or the encoder needs code that the folder would lack.
    """
    backbone = getattr(model.config, "backbone", model.config)
    if backbone.model_type not in hf.CONFIG_MAPPING:
        what = f"{backbone.model_type} needs code that the folder would not hold"
        raise UserError(what, fix="use from_encoder in Python")
    with new_folder(out) as part:
        with silent():
            model.save_pretrained(part)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
        if source is not None:
            for name in TOKENIZER_FILES:
                _copy(name, source, part)
        return [name for name in TOKENIZER_FILES if (part / name).is_file()]


def check_new(out: str | Path) -> None:
    """Refuse a folder that has something in it, or that cannot be written.

    Raises:
        UserError: there are files, or it is one; or see `check_writable`.
    """
    out = Path(out)
    check_writable(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fix = "choose another folder, or remove it"
        raise UserError("there are files already", where=str(out), fix=fix)


def check_writable(out: str | Path) -> None:
    """Refuse a place where no file or folder can be made; folders above it need not be there.

    Raises:
        UserError: a file is in the way, or there is no right to write.
    """
    out = Path(out)
    above = next(path for path in (*out.parents, out) if os.path.lexists(path))
    folder = out if out.is_dir() else above
    fix = "choose another place to write"
    if not folder.is_dir():
        raise UserError("a file is in the way", where=str(folder), fix=fix)
    try:  # rights alone do not tell: a disk may be read-only, and root has all rights
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"nothing can be written there, {error.strerror or first_line(error)}"
        raise UserError(what, where=str(folder), fix=fix) from error


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder that takes the name `out` when all is well, and is gone otherwise.

    Raises:
        UserError: as `check_new`.
    """
    out = Path(out)
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as holder:
        part = Path(holder) / out.name  # with the usual rights, which temporary folders lack
        part.mkdir()
        yield part
        part.replace(out)


def _copy(name: str, source: str | Path, folder: Path) -> None:
    """Copy a file of a folder or a repository, if it is there."""
    path: Any = Path(source) / name
    if not Path(source).is_dir():
        missing = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": False,
        }
        path = cached_file(str(source), name, **missing)
    if path is not None and Path(path).is_file():
        shutil.copyfile(path, folder / name)
