"""demo: both stages on the embedded task, the comparison, the clock and the pictures."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from ds_net_plus import report
from ds_net_plus.checkpoint import DATA, STUDENT, Saved, write_checkpoint
from ds_net_plus.commands.stages import budget_table
from ds_net_plus.data import ImageData
from ds_net_plus.evaluate import (
    Point,
    RouteTable,
    collect,
    gain_at_equal_madds,
    operating_points,
    restrict,
    saving_at_equal_accuracy,
)
from ds_net_plus.measure import profile_routes
from ds_net_plus.model import DynamicNet, choose_routes
from ds_net_plus.module import SupernetModule
from ds_net_plus.runner import DynamicRunner, fast_route
from ds_net_plus.train import CachedRoutes, cache_routes, train_gate, train_supernet
from tenfold.console import at_least
from tenfold.device import time_interleaved
from tenfold.errors import UserError
from tenfold.recipes import recipe_parts

BATCH = 32
SPEEDS = (0, 3)  # two groups a batch are faster than four, and as accurate


class Trained(NamedTuple):
    """A network with its gate, and its answers on the test images.

    The gate's dynamic points choose among `routes`. Where these are fewer than the routing space,
    groups of a batch are fewer and larger, and run faster; the static curve has all routes.
    """

    net: DynamicNet
    data: ImageData
    table: RouteTable
    points: list[Point]
    routes: tuple[int, ...]


def demo(
    *,
    out: Path = Path("ds-net-plus-demo"),
    recipe: str = "demo",
    seed: int = 0,
    epochs: int | None = None,
    gate_steps: int = 800,
) -> None:
    """Train a dynamic network on the embedded task and compare it with its own static routes.

    An interrupted demo goes on when it is started again; a finished one only draws again.

    Args:
        out: folder for checkpoints, tables and pictures.
        recipe: packaged recipe of Stage I, see ds-net-plus recipes.
        seed: of training; the data are the same for every seed.
        epochs: of Stage I, those of the recipe if left out.
        gate_steps: steps of Stage II.
    """
    at_least(1, epochs=epochs, gate_steps=gate_steps)
    trained = train_both(
        recipe, out, seed=seed, epochs=epochs, gate_steps=gate_steps, routes=SPEEDS
    )
    latency = measure_latency(trained)
    rows = report.comparison_rows(trained.table, trained.points, latency)
    print(report.comparison_table(rows))
    best = report.headline_point(trained.table, trained.points)
    print(headline(trained, latency, best))
    pictures = report.save_all(draw(trained, latency, best, out), out)
    summary = summarise(trained, latency, best)
    (out / "demo.json").write_text(json.dumps(summary, indent=2) + "\n")
    print("pictures: " + ", ".join(str(path) for path in pictures))


def train_both(
    recipe: str,
    out: Path,
    *,
    seed: int = 0,
    epochs: int | None = None,
    gate_steps: int = 800,
    routes: Sequence[int] | None = None,
    progress: bool = True,
    **model: Any,
) -> Trained:
    """Stage I, recalibration, Stage II with the value gate, and the test images' answers.

    Args:
        recipe: packaged recipe of Stage I.
        out: folder of the run; what is finished there is not done again.
        seed: of training.
        epochs: of Stage I, those of the recipe where None.
        gate_steps: steps of Stage II.
        routes: what the dynamic points choose among, the routing space where None.
        progress: show it.
        **model: changes to the recipe's model arguments.
    """
    parts = recipe_parts("ds_net_plus", recipe)
    stage1 = f"{SupernetModule.__module__.rpartition('.')[0]}.{SupernetModule.__name__}"
    if parts["model"].get("class_path", stage1) != stage1:
        raise UserError(f"recipe {recipe!r} is not of Stage I", fix="choose another, see recipes")
    arguments = parts["model"]["init_args"] | model | {"seed": seed}
    data = ImageData(**parts["data"]["init_args"] | {"seed": seed})
    data.setup()
    torch.manual_seed(seed)
    module = train_supernet(
        SupernetModule(**arguments),
        data,
        out / "stage1",
        epochs=epochs or parts["trainer"]["max_epochs"],
        progress=progress,
    )
    supernet = module.evaluated().cpu()
    seen = cache_routes(supernet, data.gate_loader(), "running every route", progress, seed)
    gated = train_gate(
        supernet,
        CachedRoutes(seen, 256, seed),
        out / "stage2",
        steps=gate_steps,
        seed=seed,
        progress=progress,
    )
    net = gated.net.cpu().eval()
    net.gate_trained = True
    held = collect(net, data.calibration_loader())
    net.budgets = budget_table(net, held, data.calibration_loader)
    write_checkpoint(out / "gate.ckpt", Saved({DATA: dict(data.hparams)}, {STUDENT: net}))
    return evaluate_routes(net, data, held, routes or net.routing_space)


def evaluate_routes(
    net: DynamicNet, data: ImageData, held: RouteTable, routes: Sequence[int]
) -> Trained:
    """Test answers and dynamic points of a gate that may use `routes`; tau is set on `held`."""
    table = collect(net, data.test_loader())
    if net.num_gates == 1:
        positions = [net.routing_space.index(route) for route in routes]
        held, table = restrict(held, positions), restrict(table, positions)
    budgets = budget_table(net, held, data.calibration_loader)
    taus = [tau for tau, _ in sorted(budgets, reverse=True)]
    points = operating_points(net, table, data.test_loader, taus)
    return Trained(net, data, table, points, tuple(routes))


def measure_latency(
    trained: Trained, batch: int = BATCH, batches: int = 8, repeats: int = 15
) -> report.Latency:
    """Milliseconds per image of every static route and dynamic point on real test images.

    Static routes are timed in turn in one run; each dynamic point in turn with the widest route,
    whose time in the first run sets the unit. (All in one run would need more convolution
    primitives than oneDNN keeps, and charge the dynamic points for making them anew.)
    """
    net = trained.net
    loader = (images.image for images in trained.data.test_loader())
    images = torch.cat(list(itertools.islice(loader, max(1, batches * batch // 256))))
    images = images[: batches * batch]
    groups = images.contiguous(memory_format=torch.channels_last).split(batch)
    static = {k: fast_route(net, k) for k in net.routing_space}
    widest = net.routing_space[-1]

    def time_all(runs: dict[Any, Any]) -> dict[Any, float]:
        loops = {
            str(k): (lambda run=run: [run(group) for group in groups]) for k, run in runs.items()
        }
        with torch.inference_mode():
            timings = time_interleaved(loops, warmup=4, repeats=repeats)
        return {k: timings[str(k)].median_ms / len(images) for k in runs}

    ms = time_all(static)
    points = []
    for point in trained.points:
        pair = time_all(
            {widest: static[widest], "point": DynamicRunner(net, trained.routes, point.tau)}
        )
        points.append(ms[widest] * pair["point"] / pair[widest])
    setting = f"batch {batch}, {torch.get_num_threads()} threads"
    return report.Latency([ms[k] for k in net.routing_space], points, setting)


def headline(trained: Trained, latency: report.Latency, best: int) -> str:
    """The result in a sentence."""
    point, table = trained.points[best], trained.table
    loss = 100 * (point.top1 - table.static_top1()[-1])
    ratio = latency.points[best] / latency.static[-1]
    return (
        f"The gate spends {point.madds / table.madds[-1]:.2f} of the widest route's MAdds and "
        f"{ratio:.2f} of its time, at {loss:+.2f} points of accuracy: "
        f"{100 * gain_at_equal_madds(point, table):+.2f} points over the static routes at equal "
        f"MAdds."
    )


def draw(trained: Trained, latency: report.Latency, best: int, out: Path) -> dict[str, Figure]:
    """All pictures of a run."""
    net, data, table, points, routes = trained
    choice = choose_routes(table.scores, table.madds, points[best].tau)
    images = next(iter(data.test_loader())).image
    used = [net.routing_space.index(route) for route in routes]
    first = [used.index(j) for j in choice[: len(images)].tolist()]
    costs = [table.madds[j] for j in used]
    every = report.route_colors(len(table.madds))  # a route looks the same in all pictures
    look: dict[str, Any] = {"mean": data.mean, "std": data.std, "colors": [every[j] for j in used]}
    rows = [
        {"route": row.route, "madds": row.madds} | {f"ms_{b}": ms for b, ms in row.ms.items()}
        for row in profile_routes(net, batches=(1, BATCH), repeats=15)
    ]
    bars = {f"ms_{batch}": f"realised, batch {batch}" for batch in (1, BATCH)}
    return {
        "tradeoff": report.tradeoff(table, points, latency, chosen=best),
        "gallery": report.gallery(images, first, costs, routes=routes, **look),
        "easy-and-hard": report.cheapest_against_widest(
            images, first, costs, routes=routes, **look
        ),
        "routes": report.route_histogram(points[best], madds=table.madds),
        "classes": report.class_routes(table, choice, data.class_names),
        "confusion": report.gate_confusion(table, choice, report.cheapest_correct(table)),
        "training": report.training_curves(out / "stage1" / "metrics.csv"),
        "speedup": report.speedup_bars(rows, bars),
    }


def summarise(trained: Trained, latency: report.Latency, best: int) -> dict[str, Any]:
    """The figures of a run as plain values."""
    table, points = trained.table, trained.points
    curve = table.static_top1()
    return {
        "static": [
            {"route": k, "top1": curve[j], "madds": table.madds[j], "ms": latency.static[j]}
            for j, k in enumerate(trained.net.routing_space)
        ],
        "dynamic": [
            {
                "tau": p.tau,
                "top1": p.top1,
                "madds": p.madds,
                "madds_ratio": p.madds / table.madds[-1],
                "ms": ms,
                "time_ratio": ms / latency.static[-1],
                "gain": gain_at_equal_madds(p, table),
                "saving": saving_at_equal_accuracy(p, table),
                "shares": p.shares,
            }
            for p, ms in zip(points, latency.points, strict=True)
        ],
        "headline": best,
        "timing": latency.setting,
    }
