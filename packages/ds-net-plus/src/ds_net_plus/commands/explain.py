"""explain: which route each image takes, and how sure the gate is."""

import csv
from pathlib import Path

import torch

from ds_net_plus.commands.common import open_data, open_network
from ds_net_plus.model import choose_routes, tau_for_budget
from ds_net_plus.report import gallery
from tenfold.errors import UserError
from tenfold.plotting import save
from tenfold.progress import track


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
    saved, net = open_network(ckpt, weights, device)
    net.check_gate()
    tau = tau if budget is None else tau_for_budget(net, budget)
    bad = {"fail": "raise", "skip": "skip"}[on_error]
    source = open_data(saved, {"predict_root": str(images), "on_bad_item": bad})
    place = next(net.parameters()).device
    rows, kept = [], []
    for batch in track(source.predict_dataloader(), label="explaining"):
        with torch.no_grad():
            front = net.front(batch.image.to(place))
            logits = net.gate_logits(front.gate_input)
            size = batch.image.shape[-1]
            choice = choose_routes(net.scores(logits), net.space_madds(size), tau).cpu()
            output = net.dispatch(front.features, choice, net.rest, net.space_madds(size))
        share = net.scores(logits) if net.gate_score == "probability" else logits.softmax(1)
        for n, index in enumerate(batch.index.tolist()):
            rows.append(
                {
                    "image": str(source.predict_files[index]),
                    "label": int(output.logits[n].argmax()),
                    "score": round(float(output.logits[n].softmax(0).max()), 4),
                    "route": int(output.routes[n, 0]),
                    "madds": int(output.madds[n]),
                    **{
                        f"p_route{k}": round(float(share[n, j]), 4)
                        for j, k in enumerate(net.routing_space)
                    },
                }
            )
            kept.append(batch.image[n].cpu())
    if not rows:
        raise UserError("there is no readable image", where=str(images))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "routes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    space = net.routing_space
    chosen = torch.tensor([space.index(row["route"]) for row in rows])
    figure = gallery(
        torch.stack(kept),
        chosen,
        net.space_madds(kept[0].shape[-1]),
        routes=space,
        mean=source.mean,
        std=source.std,
        columns=per_route,
    )
    print(f"wrote {out / 'routes.csv'} and {save(figure, out / 'gallery.png')}")
    for j, route in enumerate(space):
        print(f"route {route}: {int((chosen == j).sum())} of {len(rows)} images")
