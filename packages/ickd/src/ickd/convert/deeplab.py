"""Published segmentation checkpoints: {epoch, state_dict, best_pred} of a DeepLabV3+."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ickd.convert.common import Converted
from ickd.model.deeplab import create_deeplab, drop_duplicates
from ickd.model.deeplab.weights import fit_state
from tenfold.checkpoint import extract_state_dict, strip_prefix
from tenfold.errors import UserError

_CLASSIFIER = "decoder.last_conv.8.weight"
_EMBEDDINGS = ("embed_s.", "embed_t.")


def convert_deeplab(raw: Mapping[str, Any]) -> Converted:
    """Take the weights of one of the three DeepLabs out of a published checkpoint.

    The backbone is told by the keys, the number of classes by the classifier's shape. MobileNetV2's
    blocks, which the published program lists twice, are kept once, after a look that both are the
    same; layers of an embedding are set aside.

    Args:
        raw: what `tenfold.checkpoint.load_state` read: {epoch, state_dict, best_pred}, or a bare
            state dict; keys may begin with `module.`.

    Raises:
        UserError: no DeepLab, another backbone, duplicates that differ, or keys and shapes that do
            not fit.
    """
    found, _ = extract_state_dict(raw, ("state_dict", "model"))
    state = strip_prefix(found)
    embedding = {k: v for k, v in state.items() if k.startswith(_EMBEDDINGS)}
    state, dropped = drop_duplicates({k: v for k, v in state.items() if k not in embedding})
    backbone = _backbone_of(state)
    with torch.device("meta"):
        wanted = create_deeplab(backbone, len(state[_CLASSIFIER])).state_dict()
    fitting = fit_state(state, wanted, f"not a DeepLab with {backbone}")
    ordered = {key: fitting[key] for key in wanted}
    notes = _facts(raw, backbone, len(state[_CLASSIFIER]))
    if dropped:
        notes.append(f"{len(dropped)} tensors were listed twice and are kept once")
    if embedding:
        layers = " and ".join(sorted({key.partition(".")[0] for key in embedding}))
        notes.append(f"{layers} served the training alone and are not part of the network")
    return Converted(f"deeplab:{backbone}", ordered, notes, [*dropped, *embedding], embedding)


def _backbone_of(state: Mapping[str, Tensor]) -> str:
    """The backbone that a state's keys speak of.

    Raises:
        UserError: no DeepLab, or with another backbone.
    """
    if _CLASSIFIER not in state:
        first = ", ".join(list(state)[:3]) or "none"
        raise UserError(f"not a DeepLab: no {_CLASSIFIER}", where=f"keys: {first}, ...")
    if "backbone.features.17.conv.6.weight" in state:
        return "mobilenet_v2"
    if "backbone.layer3.22.conv3.weight" in state:
        return "resnet101"
    if "backbone.layer4.1.conv2.weight" in state and "backbone.layer4.1.conv3.weight" not in state:
        return "resnet18"
    fix = "DeepLabs with resnet18, resnet101 and mobilenet_v2 can be read"
    raise UserError("a DeepLab with another backbone", fix=fix)


def _facts(raw: Mapping[str, Any], backbone: str, classes: int) -> list[str]:
    """What the file says about its training; figures may be saved as tensors."""
    facts = [f"DeepLabV3+ with {backbone}, {classes} classes"]
    if isinstance(raw.get("epoch"), Real | Tensor):
        facts.append(f"saved after epoch {int(raw['epoch'])}")
    if isinstance(raw.get("best_pred"), Real | Tensor):
        facts.append(f"best validation mIoU {float(raw['best_pred']):.4f}, says the file")
    return facts
