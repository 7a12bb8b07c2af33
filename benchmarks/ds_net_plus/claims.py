"""Does the gate beat the static routes? glyph-mix in two sizes, CIFAR-10, and a small DS-ViT."""

import gc
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.ds_net_plus.tables import write_tables
from benchmarks.results import Results, work_folder
from ds_net_plus.cli import app
from ds_net_plus.commands.common import open_data, open_network
from ds_net_plus.commands.demo import (
    SPEEDS,
    evaluate_routes,
    measure_latency,
    summarise,
    train_both,
)
from ds_net_plus.data import ImageData
from ds_net_plus.evaluate import (
    RouteTable,
    calibrate_tau,
    collect,
    gain_at_equal_madds,
    oracle,
    point_at,
    with_gate,
)
from ds_net_plus.model import DynamicNet, choose_routes
from ds_net_plus.module import SupernetModule
from ds_net_plus.report import headline_point
from ds_net_plus.train import CachedRoutes, train_gate, train_supernet
from tenfold.recipes import recipe_parts

WORK = work_folder("ds-net-plus")
TARGETS = ("none", "ib", "inplace", "ramp", "switch")
GATED = ("none", "ib")
BUDGETS = (0.35, 0.43, 0.5, 0.55, 0.6, 0.75)

# Stage-II variants: (name, options of GateModule, steps, cached)
GATES: tuple[tuple[str, dict[str, Any], int, bool], ...] = (
    ("value", {"gate_loss": "value"}, 800, True),
    ("try_best", {"gate_loss": "sgs", "sgs": "try_best"}, 600, True),
    ("give_up", {"gate_loss": "sgs", "sgs": "give_up"}, 600, True),
    ("ladder", {"gate_loss": "sgs", "sgs": "ladder"}, 600, True),
    ("no_sgs", {"gate_loss": "sgs", "sgs": "none"}, 600, True),
    ("mask_try_best", {"gate_loss": "sgs", "estimator": "mask"}, 350, False),
    ("mask_no_sgs", {"gate_loss": "sgs", "estimator": "mask", "sgs": "none"}, 350, False),
)


def run(seeds: int = 5, only: str | None = None) -> None:
    """Runs what is not in the results yet, then writes tables and plots.

    Args:
        seeds: of the tiny task; the larger ones take three.
        only: "tiny", "wide", "vit" or "cifar".
    """
    results = Results("claims", "ds-net-plus")
    if only in (None, "wide"):
        for seed in range(min(seeds, 3)):
            results.once(f"wide/{seed}", partial(wide_run, seed))
    if only in (None, "tiny"):
        tiny_runs(results, seeds)
    if only in (None, "vit"):
        for seed in range(min(seeds, 3)):
            results.once(f"vit/{seed}", partial(vit_run, seed))
    if only in (None, "cifar") and "TENFOLD_DATA" in os.environ:
        for seed in range(min(seeds, 3)):
            results.once(f"cifar10/{seed}", partial(cifar_run, seed))
    elif only == "cifar":
        print("set TENFOLD_DATA to the folder of real data to run cifar")
    write_tables(results)


def tiny_runs(results: Results, seeds: int) -> None:
    """Every target and seed of the tiny task, on each core a process of one thread."""
    keys = {
        f"tiny/{distill}/{seed}": (distill, seed) for seed in range(seeds) for distill in TARGETS
    }
    pool = ProcessPoolExecutor(
        os.cpu_count(), get_context("spawn"), torch.set_num_threads, initargs=(1,)
    )
    try:
        todo = [key for key in keys if key not in results.runs]
        work = {pool.submit(tiny_run, *keys[key]): key for key in todo}
        for done in as_completed(work):
            results.once(work[done], done.result)
    finally:
        pool.shutdown(cancel_futures=True)


def tiny_run(distill: str, seed: int) -> dict[str, Any]:
    """One supernet of the tiny network, and every kind of gate on it."""
    start, parts = time.time(), recipe_parts("ds_net_plus", "glyph-mix")
    folder = WORK / f"tiny-{distill}-{seed}"
    data = ImageData(**parts["data"]["init_args"] | {"seed": seed})
    data.setup()
    torch.manual_seed(seed)
    arguments = parts["model"]["init_args"] | {"distill": distill, "seed": seed}
    epochs = parts["trainer"]["max_epochs"]
    module = train_supernet(
        SupernetModule(**arguments), data, folder / "stage1", epochs=epochs, progress=False
    )
    net = module.evaluated().cpu()
    test = collect(net, data.test_loader())
    student = collect(module.net.cpu(), data.test_loader())
    result: dict[str, Any] = {
        "static": test.static_top1(),
        "static_student": student.static_top1(),
        "static_hard": hard_part(test).static_top1(),
        "madds": test.madds,
        "seconds_stage1": time.time() - start,
        "oracle": point_values(test, oracle(test)),
    }
    if distill in GATED:
        train, held = collect(net, data.gate_loader()), collect(net, data.calibration_loader())
        for name, options, steps, cached in GATES:
            source = CachedRoutes(train, 256, seed) if cached else data
            start = time.time()
            gate = train_gate(
                net, source, folder / name, steps=steps, seed=seed, progress=False, **options
            ).net
            result[name] = gate_values(with_gate(test, gate), with_gate(held, gate))
            result[name]["seconds"] = time.time() - start
    print(f"tiny {distill} seed {seed}: static {result['static']}", flush=True)
    return result


def hard_part(table: RouteTable) -> RouteTable:
    """The hard images of a table."""
    assert table.hard is not None
    keep = table.hard
    return RouteTable(
        table.gate_input[keep],
        table.scores[keep],
        table.logits[keep],
        table.labels[keep],
        table.madds,
        keep[keep],
    )


def gate_values(test: RouteTable, held: RouteTable) -> dict[str, Any]:
    """The gate's own decisions (tau 0), and those at every budget; tau is set on held images."""
    assert test.hard is not None
    values: dict[str, Any] = {"argmax": point_values(test, point_at(test, 0.0))}
    for budget in BUDGETS:
        tau = calibrate_tau(held.scores, held.madds, budget * held.madds[-1])
        choice = choose_routes(test.scores, test.madds, tau).double()
        values[f"{budget}"] = point_values(test, point_at(test, tau)) | {
            "route_hard": float(choice[test.hard].mean()),
            "route_easy": float(choice[~test.hard].mean()),
        }
    return values


def point_values(table: RouteTable, point: Any) -> dict[str, Any]:
    """A point with its gain over the static curve and over the widest route."""
    return {
        "tau": point.tau,
        "top1": point.top1,
        "madds_ratio": point.madds / table.madds[-1],
        "gain": gain_at_equal_madds(point, table),
        "against_widest": point.top1 - table.static_top1()[-1],
        "shares": point.shares,
    }


def wide_run(seed: int) -> dict[str, Any]:
    """The headline: a network large enough for the clock, MAdds and milliseconds together."""
    gc.collect()
    start = time.time()
    folder = WORK / f"wide-{seed}"
    trained = train_both("glyph-mix-48", folder, seed=seed, routes=SPEEDS)
    seconds = time.time() - start
    latency = measure_latency(trained)
    best = headline_point(trained.table, trained.points)
    print(f"wide seed {seed}: {trained.points[best]} in {seconds:.0f} s", flush=True)
    return summarise(trained, latency, best) | {"seconds": seconds}


def vit_run(seed: int) -> dict[str, Any]:
    """A small vision transformer on glyph-mix, its gate among two routes and among all."""
    start = time.time()
    folder = WORK / f"vit-{seed}"
    trained = train_both("glyph-mix-vit", folder, seed=seed)
    seconds = time.time() - start
    print(f"vit seed {seed}: {trained.table.static_top1()} in {seconds:.0f} s", flush=True)
    values = both_spaces(trained.net, trained.data)
    return values | {"seconds": seconds}


def cifar_run(seed: int) -> dict[str, Any]:
    """CIFAR-10 images from parquet through the commands that a person types."""
    root = Path(os.environ["TENFOLD_DATA"]) / "cifar10"
    folder = WORK / f"cifar10-{seed}"
    seeded = ["--data.seed", str(seed), "--model.seed", str(seed), "--seed_everything", str(seed)]
    start = time.time()
    there = ["--trainer.default_root_dir", str(folder), "--resume", "auto"]
    commands = [
        ["fit", "--config", "cifar10-cpu", "--data.root", str(root), *seeded, *there],
        ["recalibrate", "--ckpt", str(folder / "last.ckpt"), "--batches", "100"],
        ["train-gate", "--ckpt", str(folder / "last-recalibrated.ckpt"), "--seed", str(seed)],
    ]
    seconds = []
    for command in commands:
        status = app.main(command)
        if status:
            raise SystemExit(status)
        seconds.append(time.time() - start)
    saved, net = open_network(folder / "last-recalibrated-gate.ckpt", "ema")
    return both_spaces(net, open_data(saved, None)) | {"seconds": seconds}


def both_spaces(net: DynamicNet, data: ImageData) -> dict[str, Any]:
    """Static curve, dynamic points and times, by the routes that the gate may use.

    Timed at two batch sizes: in small batches small networks pay for their groups.
    """
    held = collect(net, data.calibration_loader())
    values = {}
    for name, routes in {"two": SPEEDS, "all": net.routing_space}.items():
        trained = evaluate_routes(net, data, held, routes)
        best = headline_point(trained.table, trained.points)
        for batch in (32, 256):
            latency = measure_latency(trained, batch, batches=8 if batch == 32 else 4)
            values[f"{name}, batch {batch}"] = summarise(trained, latency, best)
    return values
