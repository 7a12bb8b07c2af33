"""Model folders on the disk or on the Hugging Face Hub, by one name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenfold.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from tenfold.errors import UserError, first_line

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NEEDED = (CONFIG_FILE, WEIGHTS_FILE)


def is_hub_id(name: str) -> bool:
    """Whether a name reads "user/name"."""
    return _HUB_ID.fullmatch(name) is not None


def model_folder(
    name: str | Path, *, instead: str, further: Sequence[str] = (), **download: Any
) -> Path:
    """The folder of a model; of one on the Hub the copy in the cache.

    Args:
        name: a folder, or "user/name" on the Hub.
        instead: what to do with a file, for the message.
        further: files that are fetched besides weights and configuration, where they are there.
        **download: arguments of huggingface_hub's `snapshot_download`.

    Raises:
        UserError: there is no such folder or repository, or it holds no model.
    """
    folder = Path(name)
    if folder.is_file():
        raise UserError("a file, no model folder", where=str(name), fix=instead)
    if folder.is_dir():
        return folder
    if not is_hub_id(str(name)):
        raise UserError("no such model folder", where=str(name), fix="give a folder or user/name")
    from huggingface_hub import snapshot_download  # here: not all who import this fetch anything

    try:
        folder = Path(snapshot_download(str(name), allow_patterns=[*_NEEDED, *further], **download))
    except Exception as error:  # the hub, the network and the disk raise many kinds
        raise UserError(
            f"no such model folder, and the Hub gave none: {first_line(error)}",
            where=str(name),
            fix="check the name and the network; a private repository needs `hf auth login`",
        ) from error
    lacking = [file for file in _NEEDED if not (folder / file).is_file()]
    if lacking:
        raise UserError(f"{lacking[0]} is missing in the repository", where=str(name))
    return folder
