"""explain: which route each image takes, and how sure the gate is."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_net_plus.commands.common import open_data, open_network, told_to_skip
from ds_net_plus.data import ImageData
from ds_net_plus.model import (
    DynamicNet,
    check_finite,
    check_statistics,
    naming_images,
    tau_for_budget,
)
from ds_net_plus.module.base import route_name
from ds_net_plus.report import gallery
from tenfold.console import at_least
from tenfold.errors import UserError
from tenfold.plotting import save
from tenfold.progress import track

MOST_PATHS = 8  # rows of the gallery, with several gates


def explain(
    *,
    ckpt: Path,
    images: Path,
    out: Path = Path("explained"),
    tau: float = 0.0,
    budget: float | None = None,
    on_error: str = "fail",
    per_route: int = 10,
    weights: str = "ema",
    device: str = "auto",
) -> None:
    """Show the route, the gate's probabilities and the cost of every image in a folder.

    With several gates the route is one index for each, and the probabilities are the first one's.

    Args:
        ckpt: a checkpoint with a trained gate.
        images: folder of image files.
        out: folder for routes.csv and gallery.png.
        tau: price of compute in the decision.
        budget: share of the widest route's MAdds instead of tau, see calibrate-budget.
        on_error: what to do with an unreadable file: fail, or skip it and count.
        per_route: images shown for each route.
        weights: the copy of the network, ema or student.
        device: auto, cpu, cuda or mps.
    """
    if on_error not in ("fail", "skip"):
        raise UserError(f"on_error must be 'fail' or 'skip', got {on_error!r}")
    at_least(1, per_route=per_route)
    saved, net = open_network(ckpt, weights, device)
    net.check_gate()
    tau = tau if budget is None else tau_for_budget(net, budget)
    bad = {"fail": "raise", "skip": "skip"}[on_error]
    source = open_data(saved, {"predict_root": str(images), "on_bad_item": bad}, "predict")
    check_statistics(net, net.routing_space)
    with told_to_skip():
        rows, shown = explain_images(net, source, tau, per_route)
    if not rows:
        raise UserError("there is no readable image", where=str(images))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "routes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    size = next(iter(shown.values())).shape[-1]
    counts, costs = shown_paths(net, rows, size)
    position = {path: j for j, path in enumerate(counts)}
    mine = [n for n in shown if rows[n]["route"] in position]
    figure = gallery(
        torch.stack([shown[n] for n in mine]),
        [position[rows[n]["route"]] for n in mine],
        costs,
        routes=list(counts),
        counts=list(counts.values()),
        mean=source.mean,
        std=source.std,
        columns=per_route,
    )
    print(f"wrote {out / 'routes.csv'} and {save(figure, out / 'gallery.png')}")
    for path, count in counts.items():
        print(f"route {path}: {count} of {len(rows)} images")


def shown_paths(
    net: DynamicNet, rows: list[dict[str, Any]], size: int
) -> tuple[dict[int | str, int], list[int]]:
    """How many images took each route, and its cost, cheapest first.

    All routes of a single gate; of several gates the paths that most images took.
    """
    counts = Counter(row["route"] for row in rows)
    if net.num_gates == 1:
        return {route: counts[route] for route in net.routing_space}, net.space_madds(size)
    costs = {row["route"]: row["madds"] for row in rows}
    often = sorted((path for path, _ in counts.most_common(MOST_PATHS)), key=costs.__getitem__)
    return {path: counts[path] for path in often}, [costs[path] for path in often]


@torch.no_grad()
def explain_images(
    net: DynamicNet, source: ImageData, tau: float, per_route: int
) -> tuple[list[dict[str, Any]], dict[int, Tensor]]:
    """A row for every readable image; by row number, the first images of each route."""
    place = next(net.parameters()).device
    rows, shown, seen = [], {}, Counter()
    for batch in track(source.predict_dataloader(), label="explaining"):
        front = net.front(batch.image.to(place))
        logits = net.gate_logits(front.gate_input)
        scores, size = net.scores(logits), batch.image.shape[-1]
        with naming_images([source.predict_files[n] for n in batch.index.tolist()]):
            output = net.dispatch(front.features, logits, net.decider(batch.image, tau), size=size)
            check_finite(output.logits)
        probability = scores if net.gate_score == "probability" else logits.softmax(1)
        names = [route_name(path) for path in output.routes.tolist()]
        score, label = output.logits.softmax(1).max(1)
        for n, index in enumerate(batch.index.tolist()):
            route = names[n]
            if seen[route] < per_route:
                shown[len(rows)] = batch.image[n]
            seen[route] += 1
            rows.append(
                {
                    "image": str(source.predict_files[index]),
                    "label": int(label[n]),
                    "score": round(float(score[n]), 4),
                    "route": route,
                    "madds": int(output.madds[n]),
                }
                | {
                    f"p_route{k}": round(p, 4)
                    for k, p in zip(net.routing_space, probability[n].tolist(), strict=True)
                }
            )
    return rows, shown
