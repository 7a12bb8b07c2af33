"""How much of the theory does the clock show? All three families, ratios of medians in one run."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.ds_net_plus.tables import README
from benchmarks.results import Results, markdown
from ds_net_plus.commands.measuring import compare_execution
from ds_net_plus.evaluate import collect
from ds_net_plus.measure import (
    example_images,
    mix_to_choice,
    ordinary_activations,
    profile_routes,
    time_networks,
)
from ds_net_plus.model import DynamicNet, create_model
from ds_net_plus.runner import fast_route
from ds_net_plus.steps import gate_objective, stage2_step
from tenfold.device import time_interleaved

SPACES = {"ds_mbnet": (0, 4, 8, 13), "ds_resnet50": (0, 1, 2, 3), "ds_vit_small": (0, 1, 2, 3)}
TITLES = {"ds_mbnet": "DS-MBNet", "ds_resnet50": "DS-ResNet-50", "ds_vit_small": "DS-ViT-S"}
MIXES = {
    "90/0/0/10": (0.9, 0.0, 0.0, 0.1),
    "50/20/20/10": (0.5, 0.2, 0.2, 0.1),
    "25/25/25/25": (0.25, 0.25, 0.25, 0.25),
}
MAIN = "50/20/20/10"
MASKED = ("masked", "masked, plain front")
BATCH, SIZE = 32, 224
# (timed rounds, rounds before them)
ROUNDS = {"ds_mbnet": (15, 10), "ds_resnet50": (7, 2), "ds_vit_small": (7, 2)}


def run(seeds: int = 1, only: str | None = None) -> None:
    """Measures everything anew, or one family, and writes the tables.

    Args:
        seeds: not used; a time has no seed.
        only: "ds_mbnet", "ds_resnet50", "ds_vit_small" or "stage2".
    """
    results = Results("speed", "ds-net-plus", fresh=only is None)
    if only is None:  # writing keeps what it finds
        results.path.unlink(missing_ok=True)
    for name, space in SPACES.items():
        if only in (None, name):
            for dtype in _precisions():
                key = name if dtype == torch.float32 else f"{name}, bfloat16"
                results.runs[key] = family(name, space, dtype)
                results.write()
    if only in (None, "stage2"):
        results.runs["stage2"] = stage2()
        results.write()
    write_tables(results)


def write_tables(results: Results) -> None:
    """Writes the tables beside the results, and the block of the package's README."""
    results.publish(README, tables(results.runs))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _precisions() -> tuple[torch.dtype, ...]:
    """On a GPU half precision as well, which a CPU without its units would only emulate."""
    both = (torch.float32, torch.bfloat16)
    return both if _device() == "cuda" else both[:1]


def untrained(name: str, space: Sequence[int], dtype: torch.dtype = torch.float32) -> DynamicNet:
    """A network of ordinary activations: the clock does not ask what it has learned."""
    torch.manual_seed(0)
    net = ordinary_activations(create_model(name)).eval()
    net.routing_space = tuple(space)
    return net.to(_device(), dtype)


def family(name: str, space: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Mixes, static routes and what slicing costs, of one network."""
    net, (repeats, warmup) = untrained(name, space, dtype), ROUNDS[name]
    result: dict[str, Any] = {"mixes": {}}
    for mix, shares in MIXES.items():
        start = time.time()
        rivals = None if name == "ds_mbnet" or mix == MAIN else ("grouped", "per image")
        one = compare_execution(net, mix_to_choice(shares, BATCH), SIZE, repeats, warmup, rivals)
        result["mixes"][mix] = one
        print(f"{name} {mix}: {one['time_ratio']} ({time.time() - start:.0f} s)", flush=True)
    if net.num_gates > 1:  # every gate sends other images to other routes
        choice = torch.stack(
            [mix_to_choice(MIXES[MAIN], BATCH).roll(7 * g) for g in range(net.num_gates)], 1
        )
        one = compare_execution(net, choice, SIZE, repeats, warmup, ("grouped",))
        result["mixes"][f"{MAIN}, at each gate anew"] = one
    result["slicing"] = slicing(net, (space[0], space[-1]), repeats, warmup)
    rows = profile_routes(net, batches=(1, BATCH), repeats=repeats, warmup=warmup)
    result["routes"] = [row.as_dict() for row in rows]
    return result


def slicing(net: DynamicNet, routes: Sequence[int], repeats: int, warmup: int) -> dict[str, Any]:
    """Naive slicing (views, norms apart, NCHW) against the plain network."""
    x = example_images(net, BATCH, SIZE)
    nchw = x.contiguous()
    runs = {}
    for route in routes:
        runs[f"naive {route}"] = lambda _, route=route: net(nchw, route=route)
        runs[f"plain {route}"] = fast_route(net, route)
    timings = time_networks(runs, x, repeats, warmup)
    return {
        "ms": {name: timing.as_dict() for name, timing in timings.items()},
        "ratio": {
            str(route): timings[f"naive {route}"].median_ms / timings[f"plain {route}"].median_ms
            for route in routes
        },
        "busy": any(timing.busy for timing in timings.values()),
    }


def stage2(batch: int = 16, repeats: int = 5) -> dict[str, Any]:
    """Seconds of a gate step on DS-MBNet: the paper's masks, real routes, and from the cache."""
    net = untrained("ds_mbnet", SPACES["ds_mbnet"])
    images, labels = example_images(net, batch, SIZE), torch.arange(batch, device=_device())
    seen = collect(net, [_Images(images, labels)])
    rows, logits = seen.gate_input.to(_device()), seen.logits.to(_device())

    def cached() -> object:
        output = gate_objective(net, rows, labels, route_logits=logits)
        output.loss.backward()
        return output

    steps = {
        "mask": lambda: stage2_step(net, images, labels, estimator="mask"),
        "mixture": lambda: stage2_step(net, images, labels, estimator="mixture"),
        "mixture, cached": cached,
        "filling the cache": lambda: collect(net, [_Images(images, labels)]),
    }
    timings = time_interleaved(steps, device=_device(), warmup=1, repeats=repeats)
    return {
        "batch": batch,
        "ms": {name: timing.as_dict() for name, timing in timings.items()},
        "busy": any(timing.busy for timing in timings.values()),
    }


class _Images:
    """A batch as `collect` wants it."""

    def __init__(self, image: torch.Tensor, label: torch.Tensor) -> None:
        self.image, self.label, self.hard = image, label, None


def tables(runs: dict[str, Any]) -> str:
    """The README's tables of speed."""
    names = [key for key in runs if key != "stage2"]
    parts = [family_tables(TITLES[key.split(",")[0]], key, runs[key]) for key in names]
    if "stage2" in runs:
        parts.append(stage2_text(runs["stage2"]))
    parts.append(
        "For comparison, not measured here: DynamicViT, which drops tokens instead, reports for "
        "DeiT-S 79.3 % at 2.9 G multiply-adds against 79.8 % at 4.6 G."
    )
    busy = [key for key, run in runs.items() if _busy(run)]
    if busy:
        parts.append(f"The machine was busy with other work during {', '.join(busy)}.")
    return "\n\n".join(parts)


def _busy(run: Any) -> bool:
    if isinstance(run, dict):
        return bool(run.get("busy")) or any(_busy(value) for value in run.values())
    return False


def family_tables(title: str, key: str, run: dict[str, Any]) -> str:
    """Mixes and static routes of one network."""
    extra = key.partition(",")[2]
    first = []
    for mix, result in run["mixes"].items():
        times = [result["time_ratio"].get(k) for k in ("grouped", "per image")]
        masked = [ratio(result, rival, "grouped") for rival in MASKED]
        first.append(
            [
                mix,
                f"{result['madds_ratio']:.2f}",
                *("" if value is None else f"{value:.2f}" for value in times),
                *("" if value is None else f"{value:.1f}x" for value in masked),
            ]
        )
    head = ["route mix", "MAdds ratio", "grouped", "one by one", "masked / grouped"]
    head.append("masked with our front / grouped")
    second = [
        [
            str(row["route"]),
            f"{row['madds'] / 1e6:.0f} M",
            f"{row['theoretical']:.2f}",
            *(f"{row['realised'][b]:.2f}" for b in map(str_or_int(row["realised"]), (1, BATCH))),
            *(f"{row['ms'][b]:.1f}" for b in map(str_or_int(row["ms"]), (1, BATCH))),
        ]
        for row in run["routes"]
    ]
    naive = ", ".join(f"{r:.2f}x (route {k})" for k, r in run["slicing"]["ratio"].items())
    columns = ["route", "MAdds", "speed-up in theory", "at batch 1", f"at batch {BATCH}"]
    columns += ["ms per image at batch 1", f"at batch {BATCH}"]
    return (
        f"{title}{extra}, {SIZE} pixels, batch {BATCH}; times over that of the widest route:\n\n"
        f"{markdown(head, first)}\n\n{markdown(columns, second)}\n\n"
        f"Naive slicing takes {naive} the time of the plain network."
    )


def str_or_int(mapping: dict[Any, Any]) -> Any:
    """Keys of a mapping that may have been through JSON."""
    return lambda key: key if key in mapping else str(key)


def stage2_text(run: dict[str, Any]) -> str:
    """What a gate step costs."""
    ms = {name: timing["median_ms"] for name, timing in run["ms"].items()}
    return (
        f"A gate step (Stage II) of DS-MBNet on {run['batch']} images takes {ms['mask']:.0f} ms "
        f"with the paper's masks, {ms['mixture']:.0f} ms with the real routes "
        f"({ms['mask'] / ms['mixture']:.1f}x less), and {ms['mixture, cached']:.1f} ms once the "
        f"routes' answers are cached ({ms['mask'] / ms['mixture, cached']:.0f}x less), which costs "
        f"{ms['filling the cache']:.0f} ms once."
    )


def ratio(result: dict[str, Any], one: str, other: str) -> float | None:
    """Median time of one execution over that of another, if both were timed."""
    if one not in result["ms"] or other not in result["ms"]:
        return None
    return result["ms"][one]["median_ms"] / result["ms"][other]["median_ms"]
