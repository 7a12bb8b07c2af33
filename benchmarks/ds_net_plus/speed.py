"""How much of the theory does the clock show? DS-MBNet, one run, ratios of medians."""

import time
from typing import Any

import torch

from benchmarks.ds_net_plus.tables import README
from benchmarks.results import Results, markdown, replace_block
from ds_net_plus.commands.measuring import compare_execution
from ds_net_plus.measure import (
    example_images,
    mix_to_choice,
    ordinary_activations,
    profile_routes,
    time_networks,
)
from ds_net_plus.model import create_model
from ds_net_plus.runner import fast_route

SPACE = (0, 4, 8, 13)
MIXES = {
    "90/0/0/10": (0.9, 0.0, 0.0, 0.1),
    "50/20/20/10": (0.5, 0.2, 0.2, 0.1),
    "25/25/25/25": (0.25, 0.25, 0.25, 0.25),
}
BATCH, REPEATS = 32, 15


def run(seeds: int = 1, only: str | None = None) -> None:
    """Measures everything anew and writes the table.

    Args:
        seeds: not used; a time has no seed.
        only: not used.
    """
    results = Results("speed", "ds-net-plus", fresh=True)
    torch.manual_seed(0)
    net = ordinary_activations(create_model("ds_mbnet"))
    net.routing_space = SPACE
    for name, mix in MIXES.items():
        start = time.time()
        result = compare_execution(net, mix_to_choice(mix, BATCH), 224, REPEATS)
        results.runs[f"mix {name}"] = result
        print(f"{name}: {result['time_ratio']} ({time.time() - start:.0f} s)", flush=True)
    results.runs["slicing"] = slicing(net)
    results.runs["routes"] = [
        row.as_dict() for row in profile_routes(net, batches=(1, BATCH), repeats=REPEATS)
    ]
    results.write()
    text = table(results.runs)
    results.path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    replace_block(README, "speed", text)
    print(text)


def slicing(net: Any) -> dict[str, Any]:
    """Naive slicing (views, norms apart, NCHW) against the plain network, routes 0 and 13."""
    x = example_images(net, BATCH, 224)
    nchw = x.contiguous()
    runs = {}
    for route in (0, 13):
        runs[f"naive {route}"] = lambda _, route=route: net(nchw, route=route)
        runs[f"plain {route}"] = fast_route(net, route)
    timings = time_networks(runs, x, REPEATS)
    return {
        "ms": {name: timing.as_dict() for name, timing in timings.items()},
        "ratio": {
            str(route): timings[f"naive {route}"].median_ms / timings[f"plain {route}"].median_ms
            for route in (0, 13)
        },
        "busy": any(timing.busy for timing in timings.values()),
    }


def table(runs: dict[str, Any]) -> str:
    """The README's tables of speed."""
    first = [
        [
            name,
            f"{runs[f'mix {name}']['madds_ratio']:.2f}",
            *(f"{runs[f'mix {name}']['time_ratio'][k]:.2f}" for k in ("grouped", "per image")),
            *(
                f"{ratio(runs[f'mix {name}'], rival, 'grouped'):.1f}x"
                for rival in ("masked", "masked, plain front")
            ),
        ]
        for name in MIXES
    ]
    head = ["route mix 0/4/8/13", "MAdds ratio", "grouped", "one by one", "masked / grouped"]
    head.append("masked with our front / grouped")
    second = [
        [
            str(row["route"]),
            f"{row['madds'] / 1e6:.0f} M",
            f"{row['theoretical']:.2f}",
            *(f"{row['realised'][b]:.2f}" for b in (1, BATCH)),
        ]
        for row in runs["routes"]
    ]
    naive = runs["slicing"]["ratio"]
    busy = any(run.get("busy") for run in runs.values() if isinstance(run, dict))
    text = markdown(head, first)
    text += "\n\nTimes over that of the widest route, batch 32, 224 pixels. Naive slicing takes "
    text += f"{naive['0']:.2f}x (route 0) and {naive['13']:.2f}x (route 13) the time of the plain "
    text += "network.\n\n"
    columns = ["route", "MAdds", "speed-up in theory", "at batch 1", f"at batch {BATCH}"]
    text += markdown(columns, second)
    return text + ("\n\nThe machine was busy with other work." if busy else "")


def ratio(result: dict[str, Any], one: str, other: str) -> float:
    """Median time of one execution over that of another."""
    return result["ms"][one]["median_ms"] / result["ms"][other]["median_ms"]
