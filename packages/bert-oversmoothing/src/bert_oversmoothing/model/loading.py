"""Reading models, and telling in one line what is wrong with those that cannot be read."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers as hf
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from bert_oversmoothing.families import read_encoder
from bert_oversmoothing.model.config import FusionConfig
from bert_oversmoothing.model.plain import plain_class, plain_from_config
from tenfold.errors import UserError, first_line

_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_AGAIN = "download or copy it again"
_PATIENCE = 10.0  # seconds for the Hub's first answer

_log = logging.getLogger(__name__)


@contextmanager
def silent() -> Iterator[None]:
    """Silence what transformers prints while it reads and writes: tables and progress bars.

    And what the Hub's client tells of every request that it tries again.
    """
    log, hub = hf.utils.logging, logging.getLogger("huggingface_hub")
    verbosity, bars, level = log.get_verbosity(), log.is_progress_bar_enabled(), hub.level
    log.set_verbosity_error()
    log.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Read in silence, and tell in one line what fails.

    Raises:
        UserError: weights are missing or damaged.
    """
    try:
        with silent():
            yield
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in any layer below, with any exception
        what = f"the weights cannot be read: {first_line(error)}"
        raise UserError(what, where=where, fix=_AGAIN) from error


def stored_config(where: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a folder or repository as a dict.

    Args:
        where: folder or id.
        options: of from_pretrained; those of the Hub are used.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(where)
    if path.is_file():
        raise UserError("a file, no model folder", where=where, fix="name the folder")
    if not path.is_dir() and (path.is_absolute() or where.startswith(".") or where.count("/") > 1):
        raise UserError("no such model folder", where=where)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError("no model folder, config.json is missing", where=where)
    if not path.is_dir():
        _ask_hub(where, _of_hub(options))
    try:
        with silent():
            found, _ = PreTrainedConfig.get_config_dict(where, **_of_hub(options))
    except Exception as error:  # the hub, the network and the disk raise many kinds
        raise UserError(f"no model there: {first_line(error)}", where=where) from error
    if not isinstance(found.get("model_type"), str):
        raise UserError("config.json names no model_type", where=where)
    return found


def _ask_hub(where: str, options: Mapping[str, Any]) -> None:
    """Refuse an id that neither the cache nor the Hub knows.

    Without a network transformers tries for half a minute before it says so.

    Raises:
        UserError: there is no such model, or no way to the Hub.
    """
    try:
        with silent():
            PreTrainedConfig.get_config_dict(where, **{**options, "local_files_only": True})
            return
    except Exception as error:  # whatever is wrong with the cache, the Hub may know it
        failure = error
    if not options.get("local_files_only"):
        asked = {key: options[key] for key in ("revision", "token") if key in options}
        try:
            with silent():
                HfApi().model_info(where, timeout=_PATIENCE, **asked)
                return
        except Exception as error:  # of the network, of the name, or the Hub's answer
            unknown = isinstance(error, RepositoryNotFoundError)
            if isinstance(error, HfHubHTTPError) and not unknown:
                return  # transformers tells what is wrong with the files
            failure = error
    what = "no such folder, nor a model on the Hugging Face hub or in its cache"
    fix = "check the name and the network; a private model needs a token"
    raise UserError(what, where=where, fix=fix) from failure


def _of_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in _HUB if key in options}


# -- fusion models -----------------------------------------------------------------------------


def fusion_config(
    where: str, task: str, name: str, kwargs: MutableMapping[str, Any]
) -> FusionConfig:
    """The configuration of a stored fusion model, with the changes among the arguments.

    Args:
        where: folder or id.
        task: of the class that opens it.
        name: of that class.
        kwargs: arguments of from_pretrained; those of the configuration are taken out.

    Raises:
        UserError: see `from_pretrained` of the models.
    """
    raw = stored_config(where, kwargs)
    if raw["model_type"] != FusionConfig.model_type:
        what = f"a plain {raw['model_type']}, no fusion model"
        raise UserError(what, where=where, fix=f"open it with {name}.from_encoder")
    stored = FusionConfig.from_dict(raw)
    assert isinstance(stored, FusionConfig)
    if stored.task != task:
        what = f"a fusion model for the task {stored.task}, not {task}"
        raise UserError(what, where=where)
    known = {field.name for field in fields(FusionConfig)} | {"num_labels"}
    changes = {key: kwargs.pop(key) for key in [*kwargs] if key in known - {"dtype"}}
    config = kwargs.pop("config", None) or stored
    if not isinstance(config, FusionConfig):
        raise UserError("config must be a FusionConfig", where=where)
    if changes:
        if {"num_labels", "id2label"} & changes.keys():
            raw = {key: raw[key] for key in raw if key not in ("id2label", "label2id")}
        config = FusionConfig.from_dict(raw | changes)
    if [*config.layers] != [*stored.layers]:
        here, there = _counted(stored.layers), _counted(config.layers)
        what = f"the stored fusion is of {here}, not of {there}"
        raise UserError(what, where=where, fix="leave out layers, or start with from_encoder")
    for name in ("fusion", "gate_kind", "gate_shared", "init"):
        here, there = getattr(stored, name), getattr(config, name)
        if here != there:
            what = f"the stored fusion has {name} {here}, not {there}"
            raise UserError(what, where=where, fix=f"leave out {name}")
    config.name_or_path = where
    return config


def _counted(layers: Any) -> str:
    return f"K = {len(layers)} layers ({', '.join(map(str, layers))})"


def check_loaded(info: Mapping[str, Any], where: str, ignore_mismatched_sizes: bool) -> None:
    """Refuse a fusion model with weights missing, left over or of other sizes.

    Raises:
        UserError: names the first of them.
    """
    missing, left = (sorted(info.get(key) or ()) for key in ("missing_keys", "unexpected_keys"))
    wrong = {key: (there, here) for key, there, here in info.get("mismatched_keys") or ()}
    missing = [key for key in missing if key not in wrong]
    for key, (there, here) in wrong.items():
        if key.startswith("fusion."):
            what = f"the stored {key} is {[*there]}, config.json asks for {[*here]}"
            fix = "the fusion, its layers and gate_kind must be those of the stored one"
            raise UserError(what, where=where, fix=fix)
    if missing or [key for key in left if key.startswith("fusion.")]:
        lacking = ", ".join(missing[:3]) or "none"
        what = f"weights do not fit config.json: {len(missing)} missing ({lacking})"
        raise UserError(f"{what}, {len(left)} left over", where=where, fix=_AGAIN)
    _check_sizes(wrong, where, ignore_mismatched_sizes)


def _check_sizes(wrong: Mapping[str, tuple], where: str, ignore: bool) -> None:
    if wrong and not ignore:
        key, (there, here) = next(iter(wrong.items()))
        what = f"the stored {key} is {[*there]}, asked for is {[*here]}"
        fix = "give its num_labels, or ignore_mismatched_sizes for a new head"
        raise UserError(what, where=where, fix=fix)


# -- plain models ------------------------------------------------------------------------------


def open_plain(
    path_or_model: str | Path | PreTrainedModel,
    task: str,
    check: Callable[[PreTrainedConfig], FusionConfig],
    changes: Mapping[str, Any],
    *,
    ignore_mismatched_sizes: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A plain model for a task, from a folder, the Hub, or another model on the same encoder.

    Args:
        path_or_model: where the encoder is.
        task: of the head.
        check: makes the configuration of the fusion before weights are read, and raises what is
            wrong with it.
        changes: of the configuration.
        ignore_mismatched_sizes: give a stored head of another size random weights.
        trust_remote_code: run code that comes with the encoder.
        **options: of transformers' from_pretrained.

    Raises:
        UserError: see `from_encoder` of the models.
    """
    if isinstance(path_or_model, PreTrainedModel):
        return _around(path_or_model, task, check, changes)
    where = str(path_or_model)
    raw = stored_config(where, options)
    if raw["model_type"] == FusionConfig.model_type:
        raise UserError("a fusion model already", where=where, fix="open it with from_pretrained")
    known = raw["model_type"] in hf.CONFIG_MAPPING
    if not known and "auto_map" in raw and not trust_remote_code:
        what = f"{raw['model_type']} needs code that comes with it"
        raise UserError(what, where=where, fix="read that code, then --trust-remote-code")
    try:
        # Code that comes with a family known to transformers is never run.
        trust = {"trust_remote_code": trust_remote_code and not known}
        config = hf.AutoConfig.from_pretrained(where, **_of_hub(options), **trust)
    except Exception as error:  # code from elsewhere may raise anything
        raise UserError(f"no encoder there: {first_line(error)}", where=where) from error
    for name, value in changes.items():
        setattr(config, name, value)
    config.num_labels = check(config).num_labels or 2
    kind = plain_class(task, config, where if trust["trust_remote_code"] else None)
    with reading(where):
        loaded: Any = kind.from_pretrained(
            where,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    wrong = {key: (there, here) for key, there, here in info["mismatched_keys"]}
    _check_sizes(wrong, where, ignore_mismatched_sizes)
    new = sorted({*info["missing_keys"], *wrong})
    inside = {
        id(parameter)
        for block in read_encoder(model).blocks
        for parameter in block.module.parameters()
    }
    names = {name for name, parameter in model.named_parameters() if id(parameter) in inside}
    if lost := [key for key in new if key in names]:
        what = f"{len(lost)} weights of the blocks are missing ({lost[0]}, ...)"
        raise UserError(what, where=where, fix=_AGAIN)
    if new:
        _log.warning("%s: not stored, random: %s", where, ", ".join(new))
    return model


def _around(
    model: PreTrainedModel,
    task: str,
    check: Callable[[PreTrainedConfig], FusionConfig],
    changes: Mapping[str, Any],
) -> PreTrainedModel:
    """The model itself if it is of the task, else a new one with its encoder's weights."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    config.num_labels = check(config).num_labels or 2
    kind = plain_class(task, config)
    same = config.num_labels == model.config.num_labels or task in ("choice", "qa", "mlm")
    if isinstance(model, kind) and same:
        for name, value in changes.items():
            setattr(model.config, name, value)
        return model
    new = plain_from_config(task, config)
    nn.Module.to(new, device=model.device, dtype=model.dtype)
    weights = read_encoder(model).model.state_dict()
    # A pooler may be in one of the two alone.
    read_encoder(new).model.load_state_dict(weights, strict=False)
    new.name_or_path = model.name_or_path
    return new
