"""Open a trained model: a checkpoint, the folder of a run, or a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bert_oversmoothing.data import open_tokenizer
from bert_oversmoothing.model import TASKS, FusionConfig, FusionModel, open_fusion
from bert_oversmoothing.module.tokenizers import tokenizer_from
from tenfold.checkpoint import load_state, strip_prefix
from tenfold.errors import UserError
from tenfold.training import LAST

KEPT = "bert_oversmoothing"
"""Key of a checkpoint: the configuration of the network and the files of its tokenizer."""

_NET = "net."


def load_model(path: str | Path) -> FusionModel:
    """The model of a run, a checkpoint or a folder of save_pretrained, in eval mode on the CPU.

    Args:
        path: folder, file, or hub id of a model with fusion.

    Raises:
        UserError: there is nothing of the kind.
    """
    if not is_run(path):
        return open_fusion(path).eval()
    raw = load_run(path)
    config = FusionConfig.from_dict(raw[KEPT]["config"])
    net = TASKS[config.task](config)
    state = {key: x for key, x in raw["state_dict"].items() if key.startswith(_NET)}
    net.load_state_dict(strip_prefix(state, _NET))
    return net.eval()


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a run, a checkpoint, a model folder or a hub id.

    Raises:
        UserError: there is none.
    """
    if not is_run(path):
        return open_tokenizer(str(path))
    files = load_run(path)[KEPT].get("tokenizer")
    if files is None:
        raise UserError("the checkpoint has no tokenizer", where=str(path))
    return tokenizer_from(files)


def load_run(path: str | Path) -> dict[str, Any]:
    """What the checkpoint of a run holds: see `is_run`.

    Raises:
        UserError: there is none, or it is of another program.
    """
    checkpoint = _checkpoint(path)
    if checkpoint is None:
        raise UserError("neither a checkpoint nor the folder of a run", where=str(path))
    raw = load_state(checkpoint)
    if KEPT not in raw:
        raise UserError("not a checkpoint of bert-oversmoothing", where=str(checkpoint))
    return raw


def is_run(path: str | Path) -> bool:
    """Whether a path is a checkpoint or the folder of a run, no model folder."""
    return _checkpoint(path) is not None


def _checkpoint(path: str | Path) -> Path | None:
    path = Path(path)
    if path.is_dir() and (path / LAST).is_file():
        return path / LAST
    return path if path.suffix == ".ckpt" else None
