"""Model folders: weights, what they belong to, and a card; on the disk and on the Hub.

config.json holds `net_metadata`, and beside it what timm reads of such a file: with
`ds_net_plus.model` imported, `timm.create_model("local-dir:FOLDER", pretrained=True)` and
`"hf-hub:user/name"` build the network, its gate included.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from timm.models import filter_pretrained_cfg
from torch import Tensor

from ds_net_plus.model.base import DynamicNet
from ds_net_plus.model.registry import create_model
from tenfold.checkpoint import (
    compare_keys,
    load_model_files,
    save_model,
)
from tenfold.errors import UserError, first_line
from tenfold.hub import is_hub_id, model_folder

CARD_FILE = "README.md"
TIMM_NAMES = {"in_channels": "in_chans", "image_size": "img_size"}
_DESCRIPTION = """\
A {family} of ds-net-plus: one network with several speeds (dynamic weight slicing, DS-Net and
DS-Net++). Every route is a prefix of the same weights, and {gates} an image's route.
{classes}, images of {colours} x {size} x {size}.
"""
_CITATION = """\
@inproceedings{li2021dynamic,
  title={Dynamic Slimmable Network},
  author={Li, Changlin and Wang, Guangrun and Wang, Bing and Liang, Xiaodan and Li, Zhihui and
    Chang, Xiaojun},
  booktitle={CVPR}, year={2021}
}
@article{li2022dsnetpp,
  title={DS-Net++: Dynamic Weight Slicing for Efficient Inference in CNNs and Vision Transformers},
  author={Li, Changlin and Wang, Guangrun and Wang, Bing and Liang, Xiaodan and Li, Zhihui and
    Chang, Xiaojun},
  journal={IEEE TPAMI}, year={2022}, doi={10.1109/TPAMI.2022.3194044}
}
"""


def net_metadata(net: DynamicNet) -> dict[str, Any]:
    """What a checkpoint says of its network besides the weights."""
    return {"arch": net.name, "config": net.config, "gate": net.gate_state()}


def timm_metadata(net: DynamicNet) -> dict[str, Any]:
    """What `timm.create_model` reads of a model folder: the same, in timm's words."""
    arguments = {TIMM_NAMES.get(key, key): value for key, value in net.config.items()}
    described = filter_pretrained_cfg(net.pretrained_cfg, remove_source=True)
    described.pop("state_dict", None)
    return {
        "architecture": net.name,
        "num_classes": net.num_classes,
        "num_features": net.num_features,
        "model_args": {**arguments, "gate": net.gate_state()},
        "pretrained_cfg": {**described, "architecture": net.name},
    }


def build_net(metadata: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> DynamicNet:
    """The network that `net_metadata` described, with its weights, in eval mode.

    Args:
        metadata: of a checkpoint or model folder.
        state: the weights.
        where: the file, for messages.

    Raises:
        UserError: not of this program, weights that do not fit, or damaged gate metadata.
    """
    lacking = [key for key in ("arch", "config", "gate") if key not in metadata]
    if lacking:
        raise UserError(
            f"the file does not describe a network of ds-net-plus, {', '.join(lacking)} missing",
            where=where,
        )
    net = create_model(metadata["arch"], **metadata["config"])
    keys = compare_keys(state, net.state_dict())
    if not keys.fits:
        raise UserError(
            f"the weights do not fit the network {net.name!r} that the file describes: "
            f"{keys.summary()}",
            where=where,
        )
    net.load_state_dict(state)
    try:
        net.load_gate_state(metadata["gate"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the file's gate metadata are damaged, {error}", where=where) from error
    if "pretrained_cfg" in metadata:
        net.pretrained_cfg = metadata["pretrained_cfg"]
    return net.eval()


def save_net(folder: str | Path, net: DynamicNet) -> None:
    """Writes model.safetensors, and config.json with `net_metadata` and `timm_metadata`."""
    save_model(folder, net.state_dict(), {**net_metadata(net), **timm_metadata(net)})


def save_folder(net: DynamicNet, folder: str | Path, card: Mapping[str, Any] | None = None) -> None:
    """Writes a model folder, with a card unless there is one."""
    save_net(folder, net)
    path = Path(folder) / CARD_FILE
    if not path.exists():
        text = model_card(net, Path(folder).resolve().name, card)
        path.write_text(text, encoding="utf-8")


def load_folder(
    name: str | Path, download: Mapping[str, Any], overrides: Mapping[str, object]
) -> DynamicNet:
    """A model folder's network, see `DynamicNet.from_pretrained`.

    Args:
        name: a folder, or "user/name".
        download: arguments of huggingface_hub's `snapshot_download`.
        overrides: constructor arguments.
    """
    folder = model_folder(name, instead="read it with load_net", **download)
    state, metadata = load_model_files(folder)
    if overrides and isinstance(metadata.get("config"), dict):
        metadata = {**metadata, "config": {**metadata["config"], **overrides}}
    return build_net(metadata, state, str(name))


def push(
    net: DynamicNet,
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    card: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> str:
    """Uploads a model folder, see `DynamicNet.push_to_hub`."""
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        carded = api.file_exists(repo_id, CARD_FILE, revision=options.get("revision"))
        with tempfile.TemporaryDirectory() as folder:
            save_net(folder, net)
            if not carded:
                text = model_card(net, repo_id, card)
                (Path(folder) / CARD_FILE).write_text(text, encoding="utf-8")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
    except Exception as error:  # as in `_download`
        raise UserError(
            f"the Hub did not take the network: {first_line(error)}",
            where=repo_id,
            fix="check the name and the network, and log in with `hf auth login`",
        ) from error


def model_card(net: DynamicNet, name: str, metadata: Mapping[str, Any] | None = None) -> str:
    """A card in Markdown: what the network is, its routes, how to load it, whom to cite.

    Args:
        net: the network.
        name: the folder's, or "user/name".
        metadata: entries of the card's header, such as `license`, `datasets` or `tags`.
    """
    header = {
        "library_name": "ds-net-plus",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "dynamic-inference", "slimmable-network"],
    }
    description = _DESCRIPTION.format(
        family=type(net).__name__,
        gates="a gate chooses" if net.num_gates == 1 else f"{net.num_gates} gates choose",
        classes=f"{net.num_classes} classes" if net.num_classes else "No classifier",
        colours=net.in_channels,
        size=net.image_size,
    )
    sections = {
        f"# {net.name}": description,
        "## Routes": "\n".join([*_route_table(net), "", _gate_note(net), *_budgets(net)]),
        "## Use": _usage(net, name),
        "## Citation": f"```bibtex\n{_CITATION}```",
    }
    body = "\n\n".join(f"{title}\n\n{text.strip()}" for title, text in sections.items())
    data = ModelCardData(**{**header, **(metadata or {})})
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _route_table(net: DynamicNet) -> list[str]:
    rows = [
        f"| {route.index} | {' / '.join(map(str, route.widths))} | {_millions(route.madds)} "
        f"| {_millions(route.params)} |"
        for route in net.routes
    ]
    return ["| route | widths | MAdds | parameters |", "| --- | --- | --- | --- |", *rows]


def _millions(count: float) -> str:
    return f"{count / 1e6:.{1 if count >= 1e8 else 3}f} M"


def _gate_note(net: DynamicNet) -> str:
    space = ", ".join(map(str, net.routing_space))
    if net.gate_trained:
        return f"The gate is trained and chooses among routes {space}."
    return f"The gate is not known to be trained; it would choose among routes {space}."


def _budgets(net: DynamicNet) -> list[str]:
    if not net.budgets:
        return []
    rows = [f"| {tau:g} | {_millions(cost)} |" for tau, cost in net.budgets]
    return ["", "| tau | mean MAdds |", "| --- | --- |", *rows]


def _usage(net: DynamicNet, name: str) -> str:
    source = "hf-hub" if is_hub_id(name) else "local-dir"
    dynamic = "output = net(images)  # logits, and the route that the gate chose for each image\n"
    return f"""\
```python
from ds_net_plus import DynamicNet

net = DynamicNet.from_pretrained("{name}")
logits = net(images, route=0)  # one route for all
{dynamic if net.gate_trained else ""}```

With timm, on the widest route unless `route=` says otherwise:

```python
import ds_net_plus.model
import timm

model = timm.create_model("{source}:{name}", pretrained=True)
```"""
