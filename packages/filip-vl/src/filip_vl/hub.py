"""Model folders: weights, configuration and tokenizer, on the disk and on the Hub.

A folder holds model.safetensors, config.json and, where the model has a tokenizer, tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tenfold.checkpoint import (
    CONFIG_FILE,
    atomic_file,
    load_model_files,
    save_model,
)
from tenfold.errors import UserError
from tenfold.hub import model_folder

TOKENIZER_FILE = "tokenizer.json"
MODEL_TYPE = "filip-vl"


@dataclass(frozen=True)
class ModelFolder:
    """What a model folder holds.

    Attributes:
        state: the weights, on the CPU.
        config: fields of the configuration.
        tokenizer: the JSON of the tokenizer, None where there is none.
    """

    state: Mapping[str, Tensor]
    config: dict[str, Any]
    tokenizer: str | None = None


def is_model_folder(path: str | Path) -> bool:
    """Whether a folder was written by `write_folder`."""
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        return False
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE
    except (ValueError, AttributeError):
        return False


def write_folder(folder: str | Path, content: ModelFolder) -> None:
    """Write a model folder; a tokenizer that lay there is replaced or removed.

    Args:
        folder: made if need be.
        content: what goes into it.
    """
    folder = Path(folder)
    save_model(folder, content.state, {"model_type": MODEL_TYPE, **content.config})
    if content.tokenizer is None:
        (folder / TOKENIZER_FILE).unlink(missing_ok=True)
        return
    with atomic_file(folder / TOKENIZER_FILE) as file:
        file.write(content.tokenizer.encode())


def read_folder(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> ModelFolder:
    """Read a model folder of the disk or the Hub.

    Args:
        name: a folder, or "user/name" on the Hub.
        revision: branch, tag or commit on the Hub.
        token: for a private repository.
        cache_dir: where downloads are kept, huggingface_hub's place if left out.

    Raises:
        UserError: there is no such folder or repository, or it holds no model of filip-vl.
    """
    folder = model_folder(
        name,
        instead="give its folder, or convert a published checkpoint first: filip-vl convert",
        further=[TOKENIZER_FILE],
        revision=revision,
        token=token,
        cache_dir=cache_dir,
    )
    state, config = load_model_files(folder)
    if config.pop("model_type", None) != MODEL_TYPE:
        fix = "convert a published checkpoint first: filip-vl convert"
        raise UserError(f"{CONFIG_FILE} is not of filip-vl", where=str(name), fix=fix)
    return ModelFolder(state, config, _read_tokenizer(folder / TOKENIZER_FILE))


def _read_tokenizer(file: Path) -> str | None:
    try:
        return file.read_text("utf-8") if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read it: {error}", where=str(file)) from error
