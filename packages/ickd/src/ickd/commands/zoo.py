"""zoo: the networks that come with the package, and what is known of them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from ickd import zoo as cifar
from ickd.commands.common import millions
from ickd.commands.taps import example_images, list_points
from ickd.measure import NetworkCost, count_layers
from ickd.model.deeplab import BACKBONES
from ickd.model.embedded import EMBEDDED
from ickd.networks import open_network
from tenfold.console import columns
from tenfold.errors import UserError

_MIOU = {"resnet101": 77.89, "resnet18": 72.07, "mobilenet_v2": 68.46}
"""Of DeepLabV3+ without a teacher on VOC's validation images, as the overhaul's authors publish."""


class Entry(NamedTuple):
    """A network of the package.

    Attributes:
        cost: its name, parameters and multiply-adds.
        tap: channels, height and width of the map that ICKD compares.
        published: score of the network without a teacher, as its authors tell it.
    """

    cost: NetworkCost
    tap: tuple[int, ...]
    published: str = ""


def zoo(action: Literal["list", "show"] = "list", name: str | None = None) -> None:
    """List the networks of the package, or show the stages of one.

    Args:
        action: list, or show with a name.
        name: of a network, such as resnet20 or deeplab:resnet18.
    """
    if action == "list":
        if name is not None:
            raise UserError(f"list takes no name, got {name!r}", fix="ickd zoo show NAME")
        print(_list_text())
        return
    if name is None:
        raise UserError("show needs the name of a network", fix="ickd zoo list names them")
    print(_show_text(name))


def entries() -> list[Entry]:
    """All networks: those of CIFAR, the segmenters, those of the embedded tasks."""
    names = [f"zoo:{name}" for name in cifar.names()]
    names += [f"deeplab:{name}" for name in BACKBONES]
    return [entry(name) for name in [*names, *(f"embedded:{name}" for name in EMBEDDED)]]


def entry(name: str) -> Entry:
    """Counts of one network, which is built without weights.

    Args:
        name: "zoo:NAME", "deeplab:NAME" or "embedded:NAME".

    Raises:
        UserError: there is none.
    """
    with torch.device("meta"):
        network = open_network(name).eval()
    net: Any = network.net  # of ours: it has taps
    # a segmenter's example is smaller than its images, to be quick
    size = 513 if name.startswith("deeplab") else network.example_size
    shape = (len(network.expects.mean), size, size)
    with torch.no_grad(), count_layers(net) as macs:
        tap = net.taps(torch.empty((1, *shape), device="meta")).signal("last")
    parameters = sum(p.numel() for p in net.parameters())
    cost = NetworkCost(name, parameters, sum(macs), shape)
    kind, _, which = name.partition(":")
    published = ""
    if kind == "zoo" and cifar.info(which).top1 is not None:
        published = f"{cifar.info(which).top1:.2f} top-1"
    if kind == "deeplab":
        published = f"{_MIOU[which]:.2f} mIoU"
    return Entry(cost, tuple(tap.shape[1:]), published)


def _list_text() -> str:
    rows = [["network", "params", "MACs", "input", "ICKD tap", "published"]]
    for cost, tap, published in entries():
        params, input_ = f"{cost.parameters:,}", "x".join(map(str, cost.input))
        cells = [params, millions(cost.macs), input_, "x".join(map(str, tap)), published]
        rows.append([cost.name, *cells])
    notes = (
        "published: without a teacher; CIFAR-100 by RepDistiller's authors, Pascal VOC by those of "
        "the overhaul of feature distillation\n"
        "timm:NAME, torchvision:NAME and python:MODULE:FUNCTION are networks too; "
        "ickd taps NAME lists their modules"
    )
    return columns(rows) + "\n\n" + notes


def _show_text(name: str) -> str:
    name = _full_name(name)
    cost, _, published = entry(name)
    network = open_network(name).eval()
    points = list_points(network, example_images(network, cost.input))
    rows = [["tap", "output", ""]]
    for point in points:
        if point.suggested:
            assert point.shape is not None
            mark = "compared by ickd" if point.suggested == "ickd" else ""
            rows.append([point.name, "x".join(map(str, point.shape)), mark])
    side = cost.input[1]
    facts = f"{cost.parameters:,} parameters, {millions(cost.macs)} MACs at {side}x{side}"
    lines = [f"{name}: {facts}", *([f"published without a teacher: {published}"] * bool(published))]
    mean, std = (", ".join(f"{v:g}" for v in values) for values in network.expects[:2])
    lines.append(f"normalises pixels in 0..1 by mean {mean} and std {std}")
    return "\n".join([*lines, "", columns(rows, left=3)])


def _full_name(name: str) -> str:
    """The name with its kind; without one, a network of the CIFAR zoo is meant.

    Raises:
        UserError: it is no network of the package.
    """
    kind, _, which = name.rpartition(":")
    known = {"deeplab": list(BACKBONES), "embedded": list(EMBEDDED)}
    if kind in known and which not in known[kind]:
        fix = f"there are {', '.join(known[kind])}"
        raise UserError(f"no network is called {name!r}", fix=fix)
    if kind not in ("", "zoo", *known):
        fix = f"ickd taps {name} shows the modules of others"
        raise UserError(f"{name!r} is no network of this package", fix=fix)
    if kind in known:
        return name
    cifar.info(which)
    return f"zoo:{which}"
