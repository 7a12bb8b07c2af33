"""Models as commands are given them: a hub id, a folder, or a run of this package."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel

from bert_oversmoothing.families import read_encoder
from bert_oversmoothing.model import FusionConfig, FusionModel
from bert_oversmoothing.model.loading import reading, silent, stored_config
from bert_oversmoothing.module.opening import is_run, load_model, load_tokenizer
from tenfold.device import pick_device
from tenfold.errors import UserError, first_line


def open_model(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, device: str = "auto"
) -> PreTrainedModel:
    """An encoder, or a model with fusion, in eval mode on its device.

    Args:
        name: hub id, model folder, checkpoint or folder of a run.
        revision: of a hub id.
        trust_remote_code: run code that comes with a model of an unknown family.
        device: see `tenfold.device.pick_device`.

    Raises:
        UserError: no model there, one that needs code of its own, or no such device.
    """
    where = pick_device(device)
    print(f"reading {name}", flush=True)
    if is_run(name):
        return _moved(load_model(name), where)
    hub: dict[str, Any] = {"revision": revision} if revision else {}
    stored = stored_config(name, hub)
    if stored["model_type"] == FusionConfig.model_type:
        return _moved(load_model(name), where)
    known = stored["model_type"] in hf.CONFIG_MAPPING
    if not known and "auto_map" in stored and not trust_remote_code:
        what = f"{stored['model_type']} needs code that comes with it"
        raise UserError(what, where=name, fix="read that code, then --trust-remote-code")
    if not known and "auto_map" not in stored:
        raise UserError(f"transformers knows no {stored['model_type']}", where=name)
    with reading(name):
        # Code that comes with a family known to transformers is never run.
        loaded: Any = hf.AutoModel.from_pretrained(
            name, trust_remote_code=not known, output_loading_info=True, **hub
        )
    model, info = loaded
    _check_blocks(model, info["missing_keys"], name)
    return _moved(model, where)


def load_fused(name: str) -> FusionModel:
    """The model of `load_model`; for a plain one, how a fusion is put into it.

    Raises:
        UserError: see `load_model`.
    """
    print(f"reading {name}", flush=True)
    if not is_run(name) and (kind := stored_config(name, {})["model_type"]) != "fusion":
        put = ["convert", name, "--fusion", "gate", "--task", "TASK", "OUT"]
        fix = f"bert-oversmoothing {shlex.join(put)}"
        raise UserError(f"a plain {kind}, no fusion model", where=name, fix=fix)
    return load_model(name)


def _check_blocks(model: PreTrainedModel, missing: Collection[str], name: str) -> None:
    """A pooler may be missing, but nothing that is measured."""
    blocks = {*(block.module for block in read_encoder(model).blocks)}
    places = [place for place, module in model.named_modules() if module in blocks]
    lost = [key for key in missing if any(key.startswith(f"{place}.") for place in places)]
    if lost:
        what = f"{len(lost)} weights of the blocks are missing ({lost[0]}, ...)"
        raise UserError(what, where=name, fix="download or copy it again")


def _moved(model: nn.Module, where: torch.device) -> Any:
    # transformers wraps `to` in a way that type checkers cannot read
    return model.to(where).eval()


def open_reader(
    name: str, model: PreTrainedModel, *, tokenizer: str | None = None, trust_remote_code: bool
) -> Any:
    """The tokenizer of a model of texts, the image processor of one of images.

    Args:
        name: where the model came from.
        model: of which the kind of input is asked.
        tokenizer: folder or hub id, if it is not with the model.
        trust_remote_code: run code that comes with it.

    Raises:
        UserError: there is none.
    """
    place = tokenizer or name
    if is_run(place):
        return load_tokenizer(place)
    images = model.main_input_name == "pixel_values"
    kind, what = (
        (hf.AutoImageProcessor, "image processor") if images else (hf.AutoTokenizer, "tokenizer")
    )
    fix = "name a folder that has one: --tokenizer DIR"
    try:
        with silent():
            reader = kind.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub, the network and the disk raise many kinds
        raise UserError(f"no {what} there: {first_line(error)}", where=place, fix=fix) from error
    # Of a folder without files transformers makes a tokenizer that knows no word.
    if not images and not {*reader.get_vocab()} - {*reader.all_special_tokens}:
        raise UserError("no tokenizer there, its vocabulary is empty", where=place, fix=fix)
    return reader


def names_of(models: list[str]) -> list[str]:
    """What models are called in tables: the last part of where they are, if that tells them apart.

    Raises:
        UserError: one is named twice.
    """
    if len({*models}) < len(models):
        raise UserError("a model is named twice", where="compare")
    short = [Path(model).name or model for model in models]
    return short if len({*short}) == len(short) else models
