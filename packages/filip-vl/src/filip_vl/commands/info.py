"""info: what a checkpoint is."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from filip_vl.commands.common import open_model, refused
from filip_vl.convert import read_checkpoint
from filip_vl.hub import is_model_folder
from filip_vl.model import CONFIGS, FilipConfig, FilipModel
from filip_vl.tokenizers import BPETokenizer, Tokenizer
from tenfold.checkpoint import load_state
from tenfold.training import LAST


def info(ckpt: Path, json: bool = False) -> None:
    """Tell what a checkpoint is: configuration, parameters, cost, temperature, tokenizer.

    Args:
        ckpt: a checkpoint or the folder of a run, a model folder, a published checkpoint, or the
            name of a configuration, such as filip_base_patch32_224.
        json: print it as JSON.
    """
    facts = describe(ckpt)
    if json:
        print(json_format.dumps(facts, indent=1))
        return
    print(f"{ckpt}: {facts['kind']}")
    sections = {name: facts[name] for name in ("config", "parameters", "gmacs")}
    rest = {name: value for name, value in facts.items() if name not in (*sections, "kind")}
    sections["model"] = {name: value for name, value in rest.items() if value is not None}
    width = max(len(key) for section in sections.values() for key in section)
    for name, section in sections.items():
        print(f"\n{name}")
        for key, value in section.items():
            lines = _readable(value).splitlines() or [""]
            print(f"  {key:<{width}}  " + f"\n  {'':<{width}}  ".join(lines))


def describe(ckpt: Path) -> dict[str, Any]:
    """The facts of `info` as plain values.

    Returns:
        kind; config (fields); parameters (image, text, all); gmacs (image, text), see
        `giga_macs`; image_tokens of an image; temperature (None of random weights); tokenizer; run
        (epoch and step) of a checkpoint, report (the keys) of a published one, else None.

    Raises:
        UserError: nothing of the kind there.
    """
    if str(ckpt) in CONFIGS and not ckpt.exists():
        with torch.device("meta"):
            model = FilipModel(CONFIGS[str(ckpt)])
        return _facts(model, "a configuration, without weights") | {"temperature": None}
    file = ckpt / LAST if (ckpt / LAST).is_file() else ckpt
    if not ckpt.exists() or is_model_folder(ckpt) or file.suffix == ".ckpt":
        model = open_model(ckpt, device="cpu", texts=False)
        if file.suffix != ".ckpt":
            return _facts(model, "a model folder")
        raw = load_state(file)
        run = {name: int(raw[key]) for name, key in _RUN.items() if key in raw}
        return _facts(model, "a checkpoint of filip-vl fit") | {"run": run}
    with refused(str(ckpt)):
        found = read_checkpoint(ckpt)
        # without projections any width will do
        width = "keep" if "embed_dim" in found.fields else 256
        model, report = FilipModel.from_converted(found, embed_dim=width)
    return _facts(model, f"a published checkpoint, {found.source}") | {"report": report.summary()}


_RUN = {"epoch": "epoch", "step": "global_step"}


def _facts(model: FilipModel, kind: str) -> dict[str, Any]:
    image = sum(p.numel() for p in model.visual.parameters())
    everything = sum(p.numel() for p in model.parameters())
    config = model.config
    parameters = {"image": image, "text": everything - image - 1, "all": everything}
    meta = model.logit_scale.is_meta
    return {
        "kind": kind,
        "config": config.to_dict(),
        "parameters": parameters,
        "gmacs": giga_macs(config),
        "image_tokens": config.image_tokens,
        "temperature": None if meta else 1 / float(model.scale().detach()),
        "tokenizer": _tokenizer(model.tokenizer),
        "run": None,
        "report": None,
    }


def giga_macs(config: FilipConfig) -> dict[str, float]:
    """Billions of multiply-adds of each tower, as the papers count: without the joint projection.

    Args:
        config: an image of its size, a caption of all its positions.

    Returns:
        image and text.
    """
    with torch.device("meta"):
        model = FilipModel(config)
        pixels = torch.zeros(1, 3, config.image_size, config.image_size)
        ids = torch.zeros(1, config.context_length, dtype=torch.int64)
    rows = {
        "image": (config.grid**2 + 1) * config.vision_width,
        "text": config.context_length * config.text_width,
    }
    found = {}
    for name, encode, given in (
        ("image", model.encode_image, pixels),
        ("text", model.encode_text, ids),
    ):
        with FlopCounterMode(display=False) as counter:
            encode(given)
        macs = counter.get_total_flops() / 2 - rows[name] * config.embed_dim
        found[name] = round(macs / 1e9, 4)
    return found


def _tokenizer(tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return "none: give --tokenizer PATH where captions are read"
    if isinstance(tokenizer, BPETokenizer):
        return f"byte pairs of CLIP, {tokenizer.vocab_size:,} ids, layout {tokenizer.layout}"
    return f"words learned from captions, {tokenizer.vocab_size:,} ids"


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(part)}" for key, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
