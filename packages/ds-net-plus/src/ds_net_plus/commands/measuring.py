"""profile, benchmark and search-routes: what routes cost and what they are worth."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_net_plus.commands.common import open_data, open_network, parse_numbers, parse_routes
from ds_net_plus.evaluate import collect
from ds_net_plus.measure import (
    RouteProfile,
    example_images,
    execution_rivals,
    mix_to_choice,
    ordinary_activations,
    profile_routes,
    time_networks,
)
from ds_net_plus.model import DynamicNet, create_model, with_space
from ds_net_plus.runner import DynamicRunner
from tenfold.console import at_least
from tenfold.device import pick_device, report
from tenfold.errors import UserError


def profile(
    *,
    model: str = "ds_mbnet",
    ckpt: Path | None = None,
    image_size: int | None = None,
    routes: str = "all",
    latency: bool = False,
    threads: int | None = None,
    batch: int = 32,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Tell the widths, parameters, MAdds and, on request, the time of every route.

    Args:
        model: a named configuration; see ckpt for a trained network.
        ckpt: a checkpoint instead of a name.
        image_size: side of the images in pixels, the network's own if left out.
        routes: such as 0,4,8,13, or all.
        latency: time every route as a plain network, at batch 1 and at `batch`.
        threads: threads of torch, all cores if left out.
        batch: the larger batch size.
        device: cpu, cuda, mps or auto.
        out: folder for profile.csv and profile.json.
    """
    at_least(1, image_size=image_size, batch=batch)
    net = measured_net(model, ckpt, device)
    place = next(net.parameters())
    setting = {"device": str(place.device), "dtype": str(place.dtype).removeprefix("torch.")}
    wanted = range(net.num_routes) if routes == "all" else parse_routes(net, routes, "--routes")
    with set_threads(threads):
        setting["threads"] = str(torch.get_num_threads())
        rows = profile_routes(
            net,
            routes=list(wanted),
            image_size=image_size,
            batches=sorted({1, batch}) if latency else (),
        )
    print(profile_table(rows))
    if latency:
        print("medians on " + ", ".join(f"{key} {value}" for key, value in setting.items()))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        result = {"machine": report(), "setting": setting}
        result["routes"] = [row.as_dict() for row in rows]
        (out / "profile.json").write_text(json.dumps(result, indent=2) + "\n")
        write_csv(out / "profile.csv", rows)
        print(f"wrote {out / 'profile.json'} and {out / 'profile.csv'}")


def measured_net(model: str, ckpt: Path | None, device: str) -> DynamicNet:
    """A checkpoint's network, or an untrained one with activations of ordinary size."""
    if ckpt is not None:
        return open_network(ckpt, "ema", device)[1]
    torch.manual_seed(0)
    return ordinary_activations(create_model(model)).to(pick_device(device)).eval()


class set_threads:
    """Runs a block on some number of torch threads, None for no change."""

    def __init__(self, threads: int | None) -> None:
        """Checks the number."""
        if threads is not None and threads < 1:
            raise UserError(f"threads must be 1 or more, got {threads}")
        self.threads = threads

    def __enter__(self) -> None:
        """Sets the number."""
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads or self.before)

    def __exit__(self, *error: object) -> None:
        """Puts back the former number."""
        torch.set_num_threads(self.before)


def profile_table(rows: list[RouteProfile]) -> str:
    """The rows in columns."""
    batches = list(rows[0].ms)
    head = ["route", "widths", "params", "MAdds", "speed-up in theory"]
    for batch in batches:
        head += [f"ms/image at {batch}", "p90", f"speed-up at {batch}"]
    lines = [head]
    for row in rows:
        cells = [
            str(row.route),
            "/".join(map(str, row.widths)),
            f"{row.params / 1e6:.3f} M",
            f"{row.madds / 1e6:.2f} M",
            f"{row.theoretical:.2f}",
        ]
        for batch in batches:
            cells += [f"{row.ms[batch]:.3f}", f"{row.p90[batch]:.3f}", f"{row.realised[batch]:.2f}"]
        lines.append(cells)
    return columns(lines)


def columns(lines: list[list[str]]) -> str:
    """Right-aligned columns, two spaces apart."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def write_csv(path: Path, rows: list[RouteProfile]) -> None:
    """One line for each route."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        batches = list(rows[0].ms)
        writer.writerow(
            ["route", "widths", "params", "madds", "theoretical_speedup"]
            + [f"ms_batch{b}" for b in batches]
            + [f"p90_ms_batch{b}" for b in batches]
            + [f"speedup_batch{b}" for b in batches]
        )
        for row in rows:
            writer.writerow(
                [row.route, "/".join(map(str, row.widths)), row.params, row.madds, row.theoretical]
                + [row.ms[b] for b in batches]
                + [row.p90[b] for b in batches]
                + [row.realised[b] for b in batches]
            )


def benchmark(
    *,
    ckpt: Path | None = None,
    model: str = "ds_mbnet",
    mix: str = "observed",
    routing_space: str | None = None,
    batch: int = 32,
    image_size: int | None = None,
    tau: float = 0.0,
    repeats: int = 20,
    threads: int | None = None,
    data: dict[str, Any] | None = None,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Time grouped execution against masked, per-image and static execution, in one run.

    Args:
        ckpt: a checkpoint; without it, an untrained network of `model`.
        model: a named configuration.
        mix: shares of the routes, such as 0.5,0.2,0.2,0.1, or observed: the gate's own choices
            on test images (needs ckpt).
        routing_space: routes that the shares belong to, the network's own if left out.
        batch: images in a batch.
        image_size: side in pixels, the network's own if left out.
        tau: price of compute in observed choices.
        repeats: timed rounds.
        threads: threads of torch, all cores if left out.
        data: changes to the data of the checkpoint, for observed choices.
        device: cpu, cuda, mps or auto.
        out: JSON file for the result.
    """
    at_least(1, batch=batch, image_size=image_size, repeats=repeats)
    if routing_space is not None and ckpt is not None:
        raise UserError(
            "--routing-space is for untrained networks: a checkpoint's gate has its own",
            where=str(ckpt),
        )
    net = measured_net(model, ckpt, device)
    if routing_space is not None:
        net = with_space(net, parse_numbers(routing_space, int, "--routing-space"))
        net = ordinary_activations(net.cpu()).to(pick_device(device))
    if mix == "observed":
        choice = observed_choice(net, ckpt, batch, tau, data)
    else:
        shares = parse_numbers(mix, float, "--mix")
        if len(shares) != len(net.routing_space):
            raise UserError(
                f"--mix has {len(shares)} shares for {len(net.routing_space)} routes",
                where=f"routing space {list(net.routing_space)}",
            )
        choice = mix_to_choice(shares, batch)
    size = image_size or net.image_size
    with set_threads(threads):
        result = compare_execution(net, choice, size, repeats)
    lines = [["", "ms", "time ratio", "spread"]]
    for name, row in result["ms"].items():
        cells = [name, f"{row['median_ms']:.1f}", f"{result['time_ratio'][name]:.2f}"]
        lines.append([*cells, f"{row['spread']:.2f}"])
    print(columns(lines))
    print(f"MAdds ratio {result['madds_ratio']:.3f}" + (", machine busy" if result["busy"] else ""))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": report()} | result, indent=2) + "\n")


def observed_choice(
    net: DynamicNet, ckpt: Path | None, batch: int, tau: float, data: dict[str, Any] | None
) -> torch.Tensor:
    """The gates' choices on the first test images: (batch, gates) positions in the space."""
    if ckpt is None:
        raise UserError("observed choices need a trained network", fix="give --ckpt, or --mix")
    saved, _ = open_network(ckpt, "ema")
    runner = DynamicRunner(net, tau=tau)
    device = next(net.parameters()).device
    chosen: list[list[int]] = []
    for images in open_data(saved, data).test_loader():
        chosen += runner(images.image.to(device)).routes.tolist()
        if len(chosen) >= batch:
            break
    if len(chosen) < batch:
        raise UserError(f"only {len(chosen)} test images for a batch of {batch}")
    position = {route: j for j, route in enumerate(net.routing_space)}
    return torch.tensor([[position[route] for route in path] for path in chosen[:batch]])


def compare_execution(
    net: DynamicNet,
    choice: torch.Tensor,
    size: int,
    repeats: int,
    warmup: int = 10,
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Times of all rivals, their ratios to the widest route, and the MAdds ratio.

    Args:
        net: on the device to measure.
        choice: positions in the routing space, (batch,), or (batch, gates).
        size: image side.
        repeats: timed rounds.
        warmup: rounds before them.
        only: names of `execution_rivals` besides the widest route; all where None.

    The masked rivals take turns with the widest route in a round of their own: their activations
    are so large that whatever ran after them would pay for fresh pages.
    """
    x = example_images(net, len(choice), size)
    every = execution_rivals(net, choice, size)
    rivals = {n: run for n, run in every.items() if only is None or n in ("widest", *only)}
    large = {name: run for name, run in rivals.items() if name.startswith("masked")}
    lean = {name: run for name, run in rivals.items() if name not in large}
    timings, ratios = {}, {}
    for group in [lean, large | {"widest": rivals["widest"]}][: 1 + bool(large)]:
        round_ = time_networks(group, x, repeats, warmup)
        ratios |= {n: t.median_ms / round_["widest"].median_ms for n, t in round_.items()}
        timings |= round_
    costs = net.path_madds(size)
    paths = choice.view(len(choice), -1).expand(-1, net.num_gates)
    return {
        "routing_space": list(net.routing_space),
        "counts": choice.flatten().bincount(minlength=len(costs)).tolist(),
        "image_size": size,
        "ms": {name: timings[name].as_dict() for name in rivals},
        "time_ratio": {name: ratios[name] for name in rivals},
        "madds_ratio": float(costs[paths.unbind(1)].double().mean() / costs.max()),
        "busy": any(timing.busy for timing in timings.values()),
    }


def search_routes(
    *,
    ckpt: Path,
    budget: str | None = None,
    count: int = 4,
    weights: str = "ema",
    data: dict[str, Any] | None = None,
    device: str = "auto",
) -> None:
    """Measure every route on the validation data and suggest a routing space.

    Args:
        ckpt: a Stage-I checkpoint.
        budget: mean MAdds in millions, such as 150,320,560; for each, the window of `count`
            neighbouring Pareto routes whose MAdds bracket it.
        count: routes in a suggested space.
        weights: the copy of the network, ema or student.
        data: changes to the data of the checkpoint, such as --data.root DIR.
        device: auto, cpu, cuda or mps.
    """
    at_least(2, count=count)
    saved, net = open_network(ckpt, weights, device)
    everything = with_space(net, range(net.num_routes)).to(next(net.parameters()).device)
    table = collect(everything, open_data(saved, data).calibration_loader())
    top1 = table.static_top1()
    pareto = [k for k in range(len(top1)) if k == 0 or top1[k] > max(top1[:k])]
    lines = [["route", "widths", "MAdds", "top-1", "Pareto"]]
    for k, accuracy in enumerate(top1):
        widths = "/".join(map(str, net.route_widths(k)))
        mark = "yes" if k in pareto else ""
        lines.append([str(k), widths, f"{table.madds[k] / 1e6:.2f} M", f"{accuracy:.4f}", mark])
    print(columns(lines))
    count = min(count, len(pareto))
    if count < 2:
        raise UserError("only one route is worth choosing: wider ones are no more accurate")
    even = [pareto[j * (len(pareto) - 1) // (count - 1)] for j in range(count)]
    print(f"suggested for every budget: --routing-space {','.join(map(str, even))}")
    for target in parse_numbers(budget, float, "--budget") if budget else []:
        check_budget(target * 1e6, table.madds)
        costs = [table.madds[k] for k in pareto]
        start = int(np.searchsorted(costs, target * 1e6)) - count // 2
        window = pareto[max(0, min(start, len(pareto) - count)) :][:count]
        print(f"for {target:g} M MAdds: --routing-space {','.join(map(str, window))}")


def check_budget(target: float, madds: Sequence[int]) -> None:
    """Makes sure that some mix of routes has these mean MAdds.

    Args:
        target: mean MAdds of an image.
        madds: cost of the routes, ascending.

    Raises:
        UserError: it lies outside; tells the range.
    """
    if not madds[0] <= target <= madds[-1]:
        raise UserError(
            f"--budget {target / 1e6:g} lies outside what the routes can do",
            fix=f"choose from {madds[0] / 1e6:g} to {madds[-1] / 1e6:g} million MAdds",
        )
