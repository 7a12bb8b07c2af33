"""Model folders: the weights of a network and what builds it, on the disk and on the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ickd.networks import KINDS, Network, open_network
from tenfold.checkpoint import CONFIG_FILE, load_model_files, save_model
from tenfold.errors import UserError
from tenfold.hub import model_folder


def save_pretrained(network: Network, folder: str | Path) -> None:
    """Write a model folder: model.safetensors, and config.json {network, options, expects}.

    >>> save_pretrained(load_student("runs/best"), "my-student")

    Args:
        network: one of `open_network`, whose name and options build it again.
        folder: made if need be.

    Raises:
        UserError: the network was made around a module, or has options that JSON cannot hold.
    """
    if network.name.partition(":")[0] not in KINDS:
        what = f"{network.name} was made around a module, which no name builds again"
        fix = "open it by a name, python:package.module:function for one's own"
        raise UserError(what, fix=fix)
    config = {
        "network": network.name,
        "options": network.options,
        "expects": network.expects._asdict(),
    }
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the options of {network.name} are no plain values: {error}") from error
    save_model(folder, network.net.state_dict(), config)


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Network:
    """The network of a model folder, in eval mode on the CPU.

    >>> student = from_pretrained("my-student")
    >>> student = from_pretrained("user/my-student")

    Args:
        name: a folder of `save_pretrained`, `ickd export` or `ickd convert`, or "user/name" on the
            Hub.
        revision: branch, tag or commit on the Hub.
        token: for a private repository.
        cache_dir: where downloads are kept, huggingface_hub's place if left out.

    Raises:
        UserError: there is no such folder or repository, or it holds no network of ickd.
    """
    download = {"revision": revision, "token": token, "cache_dir": cache_dir}
    folder = model_folder(name, instead="read it with load_weights", **download)
    state, config = load_model_files(folder)
    return _build(state, config, str(name))


def _build(state: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> Network:
    name, options, expects = (config.get(key) for key in ("network", "options", "expects"))
    if not (isinstance(name, str) and isinstance(options, dict) and isinstance(expects, dict)):
        what = f"{CONFIG_FILE} is not of ickd: it needs network, options and expects"
        raise UserError(what, where=where)
    mean, std, size = (expects.get(key) for key in ("mean", "std", "size"))
    network = open_network(name, mean=mean, std=std, image_size=size, **options)
    network.fill(state, where=where)
    return network.eval()
