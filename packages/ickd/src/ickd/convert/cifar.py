"""CIFAR checkpoints of RepDistiller, of its ICKD fork and of mdistiller.

They save {"epoch", "model", "accuracy" or "best_acc", "optimizer"}, the first two also {"opt",
"model"} after the last epoch, and the third {"model"}; the keys of the weights are the zoo's.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ickd import zoo
from ickd.convert.common import Converted
from ickd.convert.matching import Match, closest, network_part, number


def match_cifar(state: Mapping[str, Tensor]) -> Match:
    """The network of the zoo to which weights belong, or the nearest one."""
    return closest(state, zoo.names(), zoo.create)


def convert_cifar(raw: Mapping[str, Any]) -> Converted:
    """Take the weights of a network of the zoo out of a published checkpoint.

    Args:
        raw: what `tenfold.checkpoint.load_state` read.

    Raises:
        UserError: no network of the zoo; the closest one is told with what differs.
    """
    state, rest = network_part(raw)
    match = match_cifar(state)
    weights = match.weights("the CIFAR zoo")
    notes = [f"{match.name}, {match.classes} classes", *_facts(raw, match.name)]
    if match.counters:
        notes.append(f"{match.counters} counters of batch norms were missing and start from zero")
    if rest:
        notes.append(f"{len(rest)} tensors beside the student's are left out")
    return Converted(f"zoo:{match.name}", weights, notes, list(rest), {})


def _facts(raw: Mapping[str, Any], name: str) -> list[str]:
    """What the file says about itself."""
    facts = []
    epoch = number(raw.get("epoch"))
    if epoch is not None:
        facts.append(f"saved after epoch {epoch:.0f}")
    for key, what in (("accuracy", "top-1"), ("best_acc", "best top-1")):
        value = number(raw.get(key))
        if value is not None:
            facts.append(f"{what} {value:.2f}, says the file")
    options = raw.get("opt")
    if isinstance(options, Namespace):
        said = getattr(options, "model_s", getattr(options, "model", None))
        if said in zoo.names() and said != name:
            facts.append(f"the file's options speak of {said}, but the weights are of {name}")
    return facts
