"""ImageNet checkpoints of torchdistill and of ICKD's fork of it: ResNets under torchvision's names.

They save {"model", "optimizer", "best_value", "lr_scheduler", "config", "args"}. Where the wrapper
that holds the student's embedding was saved whole, its keys begin with `student_model.` and
`embed_dict.embed1.`. timm's ResNets have the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ickd.convert.common import Converted
from ickd.convert.matching import Match, closest, network_part, number
from tenfold.checkpoint import rename_keys

NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101")

_EMBEDDING = [(r"^embed_dict\.embed1\.(module\.)?", "embed_s.")]


def match_imagenet(state: Mapping[str, Tensor]) -> Match:
    """The ResNet to which weights belong, or the nearest one."""
    return closest(state, NETWORKS, _build)


def _build(name: str, classes: int) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None, num_classes=classes)


def convert_imagenet(raw: Mapping[str, Any]) -> Converted:
    """Take the weights of a ResNet out of a published checkpoint.

    Args:
        raw: what `tenfold.checkpoint.load_state` read.

    Returns:
        The weights for torchvision's and timm's network of that name; the student's embedding
        beside them under the keys of `tenfold.distillation.ICCLoss`.

    Raises:
        UserError: no such ResNet; the closest one is told with what differs.
    """
    state, rest = network_part(raw)
    match = match_imagenet(state)
    weights = match.weights("ResNets")
    embedding = rename_keys(
        {k: v for k, v in rest.items() if k.startswith("embed_dict.embed1.")}, _EMBEDDING
    )
    notes = [f"{match.name}, {match.classes} classes"]
    best = number(raw.get("best_value"))
    if best is not None:
        notes.append(f"best validation value {best:.2f}, says the file")
    if match.counters:
        notes.append(f"{match.counters} counters of batch norms were missing and start from zero")
    if embedding:
        notes.append("the embedding served the training alone and is not part of the network")
    return Converted(f"torchvision:{match.name}", weights, notes, list(rest), embedding)
