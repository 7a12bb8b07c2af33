"""Files and folders of published checkpoints, and which program wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from filip_vl.convert.common import Converted
from filip_vl.convert.declip import convert_declip
from filip_vl.convert.hf import convert_hf
from filip_vl.convert.openai import convert_openai
from filip_vl.convert.torchscript import is_torchscript, read_torchscript
from tenfold.checkpoint import CONFIG_FILE, extract_state_dict, load_state, strip_prefix
from tenfold.errors import UserError

Source = Literal["auto", "openai", "open_clip", "hf-clip", "declip-filip"]
"""Which program wrote a checkpoint."""

SOURCES: tuple[str, ...] = get_args(Source)

OPEN_CLIP_CONFIG = "open_clip_config.json"

_HF_FILES = ("model.safetensors", "pytorch_model.bin")
_OPEN_CLIP_FILES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    "open_clip_pytorch_model.bin",
)
_INDEX = ".index.json"
_CHANGES = (
    *("no_causal_mask", "use_pad_mask", "hf_model_name", "timm_model_name"),
    *("act_kwargs", "norm_kwargs", "scaled_cosine_attn"),
)
"""Settings of open_clip after which the same weights compute something else."""


def read_checkpoint(path: str | Path, source: str = "auto", **fields: Any) -> Converted:
    """Read a published checkpoint without running any code in it.

    >>> found = read_checkpoint("ViT-B-32.pt")
    >>> found.fields["patch_size"], found.fields["embed_dim"]
    (32, 512)

    Args:
        path: a file (what torch.save wrote, safetensors, or a TorchScript archive), or a folder of
            Hugging Face or open_clip.
        source: the program that wrote it; "auto" tells it by the content.
        fields: of the configuration, that go before what the file says: `act`, `vision_heads` and
            `text_heads` are in no state dict.

    Raises:
        UserError: the file is missing, damaged, would need to run code, holds no weights, or is no
            CLIP with a vision transformer.
    """
    if source not in SOURCES:
        raise UserError(f"no program is called {source!r}", fix=f"choose {', '.join(SOURCES)}")
    path = Path(path)
    file = _weights_file(path, source) if path.is_dir() else path
    try:
        state = _load(file)
        return _convert(state, _program(state, file) if source == "auto" else source, file, fields)
    except UserError as error:
        where = str(path) if error.where is None else error.where
        where = where if str(path) in where else f"{path}, {where}"
        raise UserError(error.what, where=where, fix=error.fix) from error


def _weights_file(folder: Path, source: str) -> Path:
    """The file of a folder that holds its weights, or the list of several such files.

    Raises:
        UserError: there is none.
    """
    names = {"open_clip": _OPEN_CLIP_FILES, "hf-clip": _HF_FILES}
    for name in names.get(source, (*_HF_FILES, *_OPEN_CLIP_FILES)):
        for file in (folder / name, folder / (name + _INDEX)):
            if file.is_file():
                return file
    raise UserError(
        "no weights in this folder",
        where=str(folder),
        fix=f"it needs {', '.join(_HF_FILES)} or {_OPEN_CLIP_FILES[-1]}",
    )


def _load(file: Path) -> dict[str, Tensor]:
    if is_torchscript(file):
        return read_torchscript(file)
    if not file.name.endswith(_INDEX):
        return extract_state_dict(load_state(file), ("state_dict", "model"))[0]
    parts = set(_read_json(file).get("weight_map", {}).values())
    # a name in a file from elsewhere must not lead out of the folder
    files = [file.parent / Path(str(part)).name for part in sorted(parts)]
    return {key: tensor for part in files for key, tensor in load_state(part).items()}


def _program(state: Mapping[str, Tensor], file: Path) -> str:
    """Which program wrote the weights."""
    keys = strip_prefix(state).keys()
    if any(key.startswith(("vision_model.", "text_model.")) for key in keys):
        return "hf-clip"
    if "image_mapping.weight" in keys:
        return "declip-filip"
    config = file.parent / OPEN_CLIP_CONFIG
    return "open_clip" if config.is_file() or "open_clip" in file.name else "openai"


def _convert(
    state: Mapping[str, Tensor], source: str, file: Path, fields: Mapping[str, Any]
) -> Converted:
    if source == "hf-clip":
        config = file.parent / CONFIG_FILE
        return convert_hf(state, _read_json(config) if config.is_file() else None, fields)
    if source == "declip-filip":
        return convert_declip(state, fields)
    config = file.parent / OPEN_CLIP_CONFIG
    if source == "open_clip" and config.is_file():
        return convert_openai(state, source, _open_clip_fields(_read_json(config)) | dict(fields))
    act = "gelu" if source == "open_clip" else "quick_gelu"
    found = convert_openai(state, source, {"act": act, **fields})
    if "act" in fields:
        return found
    note = f"no weight tells the activation: {act} is assumed, as for most models of {source}"
    return Converted(found.source, found.fields, found.state, found.ignored, (note,))


def _open_clip_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that no shape tells, out of a configuration of open_clip.

    Raises:
        UserError: a model that differs from CLIP in more than sizes.
    """
    model = config.get("model_cfg", config)
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    changed = [key for key in _CHANGES if text.get(key)]
    changed += [key for key in _CHANGES if vision.get(key)]
    if changed:
        raise UserError(f"{OPEN_CLIP_CONFIG} asks for towers other than CLIP's: {changed[0]}")
    fields: dict[str, Any] = {"act": "quick_gelu" if model.get("quick_gelu") else "gelu"}
    if "width" in vision:
        fields["vision_heads"] = vision["width"] // vision.get("head_width", 64)
    if "heads" in text:
        fields["text_heads"] = text["heads"]
    return fields


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read it: {error}", where=str(file)) from error
    if not isinstance(content, dict):
        raise UserError("not a JSON object", where=str(file))
    return content
