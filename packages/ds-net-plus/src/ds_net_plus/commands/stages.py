"""recalibrate, train-gate and calibrate-budget: from a supernet to a network with a dial."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ds_net_plus.checkpoint import DATA, STUDENT, Saved, write_checkpoint
from ds_net_plus.commands.common import (
    beside,
    open_data,
    open_network,
    parse_numbers,
    refuse_folder,
)
from ds_net_plus.evaluate import (
    RouteTable,
    calibrate_tau,
    collect,
    cost_curve,
    gain_at_equal_madds,
    operating_points,
    price_list,
    tau_at,
)
from ds_net_plus.losses import sgs_targets
from ds_net_plus.measure import profile_routes
from ds_net_plus.model import DynamicNet, check_statistics, choose_routes, with_space
from ds_net_plus.recalibration import recalibrate as measure_statistics
from ds_net_plus.report import comparison_rows, comparison_table, gate_confusion
from ds_net_plus.train import CachedRoutes, cache_routes, training_images
from ds_net_plus.train import train_gate as run_stage2
from tenfold.console import at_least
from tenfold.errors import UserError
from tenfold.plotting import save

SHARES = (0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8)


def recalibrate(
    *,
    ckpt: Path,
    out: Path | None = None,
    batches: int = 200,
    routes: str | None = None,
    data: dict[str, Any] | None = None,
    device: str = "auto",
) -> None:
    """Measure the batch-norm statistics of every route anew.

    Args:
        ckpt: a Stage-I checkpoint, or a converted one.
        out: where to write the checkpoint; beside the old one if left out.
        batches: training batches to average over.
        routes: routes to measure, such as 0,4,8,13; all if left out.
        data: changes to the data of the checkpoint, such as --data.root DIR.
        device: auto, cpu, cuda or mps.
    """
    at_least(1, batches=batches)
    refuse_folder(out)
    saved, _ = open_network(ckpt, "ema", device)
    source = open_data(saved, data)
    chosen = None if routes is None else parse_numbers(routes, int, "--routes")
    for name, net in saved.nets.items():
        for route in chosen or []:
            net.check_route(route)
        place = next(net.parameters()).device
        images = (x.to(place) for x in training_images(source, batches))
        used = measure_statistics(net, images, chosen)
        count = net.num_routes if chosen is None else len(chosen)
        print(f"{name}: {count} routes, {used} batches" if used else f"{name}: no batch norms")
    print(f"wrote {write(out or beside(ckpt, 'recalibrated'), saved)}")


def train_gate(
    *,
    ckpt: Path,
    out: Path | None = None,
    routing_space: str | None = None,
    gate_loss: str = "value",
    sgs: str = "try_best",
    sgs_on: str = "logits",
    estimator: str = "mixture",
    lambda_ce: float = 1.0,
    lambda_cplx: float = 0.5,
    lambda_sgs: float = 1.0,
    scale: float | None = None,
    optimizer: str = "adam",
    lr: float = 1e-2,
    weight_decay: float = 0.0,
    smoothing: float = 0.1,
    steps: int = 800,
    epochs: int | None = None,
    batch_size: int = 256,
    cache: bool = True,
    gate_split: float | None = None,
    weights: str = "ema",
    seed: int = 0,
    data: dict[str, Any] | None = None,
    device: str = "auto",
) -> None:
    """Train the gate of a supernet (Stage II), then measure what it is worth.

    An interrupted run goes on when the same command is given again.

    Args:
        ckpt: a Stage-I checkpoint, or a converted one.
        out: where to write the checkpoint; beside the supernet's if left out.
        routing_space: routes to choose from, such as 0,4,8,13; the network's own if left out.
        gate_loss: "value" (one gate serves every budget) or "sgs" (the paper's loss).
        sgs: difficulty labels of the paper's loss: try_best, give_up, ladder or none.
        sgs_on: logits, or probs as in the official program.
        estimator: gradient of the paper's loss: mixture, or mask (official, not cached).
        lambda_ce: weight of the classification loss.
        lambda_cplx: weight of the complexity term.
        lambda_sgs: weight of the difficulty labels.
        scale: MAdds that count as 1 in the complexity term (official: 1e9).
        optimizer: adam, or sgd as in the official program.
        lr: peak learning rate.
        weight_decay: on the gate (official: 0.01).
        smoothing: label smoothing of the paper's loss.
        steps: training steps.
        epochs: passes over the gate's images instead of steps.
        batch_size: images in a step.
        cache: run every route once on unaugmented images and train from memory.
        gate_split: share of the training images kept for the gate; as in Stage I if left out.
        weights: the copy of the supernet to route, ema or student.
        seed: of initialisation, order and noise.
        data: changes to the data of the checkpoint, such as --data.root DIR.
        device: auto, cpu, cuda or mps.
    """
    at_least(1, steps=steps, epochs=epochs, batch_size=batch_size)
    refuse_folder(out)
    at_least(0, lr=lr, weight_decay=weight_decay, smoothing=smoothing)
    saved, net = open_network(ckpt, weights, device)
    changes = dict(data or {}) | ({} if gate_split is None else {"gate_split": gate_split})
    source = open_data(saved, changes | {"train_on": "gate", "batch_size": batch_size})
    if routing_space is not None:
        net = with_space(net, parse_numbers(routing_space, int, "--routing-space")).to(
            next(net.parameters()).device
        )
    check_statistics(net, net.routing_space)
    out = out or beside(ckpt, "gate")
    table = None
    if cache and estimator == "mask" and gate_loss == "sgs":
        raise UserError(
            "the mask estimator runs the network in every step", fix="add --cache false"
        )
    if cache and gate_loss == "sgs" and net.num_gates > 1:
        raise UserError(
            "the paper's loss with several gates runs the network in every step",
            fix="add --cache false, or take --gate-loss value",
        )
    if cache:
        table = cache_routes(net, source.gate_loader(), "running every route once", True, seed)
    images = source if table is None else CachedRoutes(table, batch_size, seed)
    module = run_stage2(
        net,
        images,
        out.with_suffix(""),
        steps=steps if epochs is None else epochs * len(images.train_dataloader()),
        seed=seed,
        accelerator=net_accelerator(net),
        gate_loss=gate_loss,
        sgs=sgs,
        sgs_on=sgs_on,
        estimator=estimator,
        lambda_ce=lambda_ce,
        lambda_cplx=lambda_cplx,
        lambda_sgs=lambda_sgs,
        scale=scale,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        smoothing=smoothing,
    )
    finish_gate(saved, module.net.to(next(net.parameters()).device), source, table, out, sgs)


def finish_gate(
    saved: Saved,
    net: DynamicNet,
    source: Any,
    table: RouteTable | None,
    out: Path,
    sgs: str,
) -> None:
    """Writes the gate's checkpoint with its budget table, prints and draws the gate report."""
    held = collect(net, source.calibration_loader())
    net.budgets = budget_table(net, held, source.calibration_loader)
    test = collect(net, source.test_loader())
    taus = [0.0] + [tau for tau, _ in net.budgets]
    points = operating_points(net, test, source.test_loader, taus)
    space = net.routing_space
    print(comparison_table(comparison_rows(test, points, routes=space), routes=space))
    gated = Saved({DATA: saved.raw.get(DATA, {})}, {STUDENT: net})
    print(f"wrote {write(out, gated)}")
    if net.num_gates == 1:
        print(confusion(test, space, "ladder" if sgs == "none" else sgs, out))


def confusion(test: RouteTable, space: tuple[int, ...], sgs: str, out: Path) -> str:
    """Draws what the gate chooses against what SGS calls right, and says how often they agree."""
    choice = choose_routes(test.scores, test.madds, 0.0)
    targets = sgs_targets(test.correct, sgs)
    figure = gate_confusion(test, choice, targets, routes=space, target=f"label of {sgs}")
    picture = save(figure, out.with_suffix(".confusion.png"))
    share = float((choice == targets).double().mean())
    return (
        f"gate accuracy: {share:.4f} of the images take the route that {sgs} calls right, "
        f"see {picture}"
    )


def budget_table(
    net: DynamicNet,
    table: RouteTable,
    batches: Callable[[], Iterable],
    shares: tuple[float, ...] = SHARES,
) -> list[tuple[float, float]]:
    """(tau, mean MAdds) for shares of the widest route's cost, as far as they are feasible."""
    targets = [share * table.madds[-1] for share in shares]
    taus = price_list(net, table, batches, targets)
    return [(p.tau, p.madds) for p in operating_points(net, table, batches, taus)]


def calibrate_budget(
    *,
    ckpt: Path,
    target_madds: float | None = None,
    target_ms: float | None = None,
    target_saving: float | None = None,
    batch: int = 32,
    out: Path | None = None,
    weights: str = "ema",
    data: dict[str, Any] | None = None,
    device: str = "auto",
) -> None:
    """Find the tau that meets a budget, and store it in the checkpoint for --budget.

    Args:
        ckpt: a checkpoint with a trained gate.
        target_madds: mean multiply-adds of an image.
        target_ms: mean milliseconds of an image, of routes timed now at the given batch size.
        target_saving: how many times fewer multiply-adds than the widest route, such as 2.
        batch: batch size for target_ms.
        out: where to write the checkpoint; over the old one if left out.
        weights: the copy of the network, ema or student.
        data: changes to the data of the checkpoint, such as --data.root DIR.
        device: auto, cpu, cuda or mps.
    """
    at_least(1, batch=batch)
    given = [v for v in (target_madds, target_ms, target_saving) if v is not None]
    if len(given) != 1 or given[0] <= 0:
        raise UserError("give one of --target-madds, --target-ms and --target-saving, above 0")
    refuse_folder(out)
    saved, net = open_network(ckpt, weights, device)
    net.check_gate()
    source = open_data(saved, data)
    table = collect(net, source.calibration_loader())
    target = target_madds if target_saving is None else table.madds[-1] / target_saving
    if target_ms is not None:
        rows = profile_routes(net, batches=[batch])
        tau = tau_for_time(
            net, table, source.calibration_loader, [r.ms[batch] for r in rows], target_ms
        )
    else:
        assert target is not None
        tau = tau_for_madds(net, table, source.calibration_loader, target)
    (point,) = operating_points(net, table, source.calibration_loader, [tau])
    found = budget_table(net, table, source.calibration_loader)
    budgets = sorted({*net.budgets, *found, (tau, point.madds)})
    for copy in saved.nets.values():
        copy.budgets = budgets
    print(
        json.dumps(
            {
                "tau": tau,
                "mean_madds": point.madds,
                "top1": point.top1,
                "static_top1": table.static_top1(),
                "gain_at_equal_madds": gain_at_equal_madds(point, table),
                "budgets": net.budgets,
            }
        )
    )
    print(f"wrote {write(out or ckpt, saved)}")


def tau_for_madds(
    net: DynamicNet, table: RouteTable, batches: Callable[[], Iterable], target: float
) -> float:
    """The price at which an image costs `target` MAdds in the mean.

    Raises:
        UserError: the target is not feasible.
    """
    if net.num_gates == 1:
        return calibrate_tau(table.scores, table.madds, target)
    return tau_at(cost_curve(net, batches, table.madds), target)


def tau_for_time(
    net: DynamicNet,
    table: RouteTable,
    batches: Callable[[], Iterable],
    ms: list[float],
    target: float,
) -> float:
    """The price at which an image takes `target` milliseconds in the mean.

    A mixed path of several gates counts as long as its MAdds suggest between two routes.

    Raises:
        UserError: the target is not feasible.
    """
    if net.num_gates == 1:
        return calibrate_tau(table.scores, table.madds, target, ms)
    if not min(ms) <= target <= max(ms):
        raise UserError(
            f"target {target:g} ms lies outside what the routes can do",
            fix=f"choose a target from {min(ms):g} to {max(ms):g}",
        )
    return tau_for_madds(
        net, table, batches, float(np.interp(target, np.maximum.accumulate(ms), table.madds))
    )


def net_accelerator(net: DynamicNet) -> str:
    """Lightning's name for the device of a network."""
    return {"cuda": "gpu"}.get(
        next(net.parameters()).device.type, next(net.parameters()).device.type
    )


def write(out: Path, saved: Saved) -> Path:
    """Writes the checkpoint with its networks on the CPU."""
    for net in saved.nets.values():
        net.cpu()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(out, saved)
    return out
