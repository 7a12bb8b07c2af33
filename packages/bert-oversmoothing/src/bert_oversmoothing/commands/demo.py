"""demo: the last layer and the fusions, on a frozen encoder and trained from scratch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bert_oversmoothing.comparison import (
    BASELINE,
    HEADS,
    SINGLE,
    STEPS,
    begin,
    frozen_probe,
    odd_run,
    probe_steps,
    steps_within,
)
from bert_oversmoothing.report import draw_frozen_probe, draw_odd_run
from bert_oversmoothing.report.common import head_label
from tenfold.checkpoint import atomic_file
from tenfold.console import at_least, columns
from tenfold.errors import UserError

FUSIONS = ("concat", "max", "gate")
"""The paper's."""

_LABELS = {
    BASELINE: "last layer (baseline)",
    "scalar_mix": "scalar mix (ELMo)",
}


def demo(
    out: Path = Path("bert-oversmoothing-demo"),
    seeds: int = 3,
    seed: int = 0,
    steps: int | None = None,
    minutes: float | None = None,
    identity: bool = False,
) -> None:
    """Show what over-smoothing costs and what fusion gives back, on generated texts, from scratch.

    Nothing is downloaded; three minutes on two cores. A demo that was interrupted goes on.

    Args:
        out: folder of results.json, metrics.json and pictures.
        seeds: how many.
        seed: the first one.
        steps: of the optimiser in part B, 150 if left out; part A takes 0.8 times as many.
        minutes: about how long it may take: then fewer steps, as many as fit by the pace that is
            measured first.
        identity: train a gate that starts as the last layer, too.
    """
    at_least(1, seeds=seeds, steps=steps)
    if minutes is not None:
        if not 0 < minutes < float("inf"):
            raise UserError(f"--minutes must be above 0, got {minutes}")
        steps = steps_within(60 * minutes, seeds, out, steps or STEPS)
        print(f"{steps} steps")
    steps = steps or STEPS
    begin(out, steps)
    chosen = range(seed, seed + seeds)
    heads = (*HEADS, "gate_identity") if identity else HEADS
    probe = frozen_probe(chosen, steps=probe_steps(steps), out=out)
    print(f"{probe_table(probe)}\n\n{probe_finding(probe)}\n", flush=True)
    trained = odd_run(chosen, steps, heads=heads, out=out)
    print(f"{odd_run_table(trained)}\n\n{odd_run_finding(trained)}\n")
    if steps < STEPS:
        print(f"fewer steps than {STEPS}: no head has learned what it can")
    with atomic_file(out / "metrics.json") as file:
        file.write(json.dumps({"frozen_probe": probe, "odd_run": trained}, indent=1).encode())
    draw_frozen_probe(probe, out / "frozen_probe.png")
    draw_odd_run(trained, out / "odd_run.png")
    for name in ("frozen_probe.png", "odd_run.png", "metrics.json"):
        print(f"wrote {out / name}")


def label(head: str) -> str:
    """A head's name for people."""
    return _LABELS.get(head) or head_label(head)


def probe_table(results: dict[str, Any]) -> str:
    """Part A as text: accuracy of every head at every deviation, in per cent."""
    stds, scores = results["std"], results["accuracy"]
    similar = [f"{statistics.fmean(results['cosine'][std]):.2f}" for std in stds]
    title = "A. Name the class of every token, from a random encoder that is not trained"
    rows = [[f"accuracy, {percent_of(results)}", *(f"std {std:g}" for std in stds), "difference"]]
    for head, by_std in scores.items():
        apart = _points(by_std[stds[-1]], scores[BASELINE][stds[-1]])
        difference = "" if head == BASELINE else f"{statistics.fmean(apart):+.1f}"
        rows.append([label(head), *(spread(by_std[std]) for std in stds), difference])
    rows.append(["CosSim of the last layer", *similar, ""])
    rows.append(["chance", *(f"{100 * results['chance']:.1f}" for _ in stds), ""])
    note = f"(difference from the last layer at std {stds[-1]:g})"
    return "\n".join([title, columns(rows), note])


def probe_finding(results: dict[str, Any]) -> str:
    """What part A shows, and what it does not."""
    std = results["std"][-1]
    means = {h: statistics.fmean(by_std[std]) for h, by_std in results["accuracy"].items()}
    similar = statistics.fmean(results["cosine"][std])
    kept = ", ".join(f"{label(h)} {100 * means[h]:.0f} %" for h in FUSIONS if h in means)
    return (
        f"Where the tokens of the last layer have a similarity of {similar:.2f}, it tells "
        f"{100 * means[BASELINE]:.0f} % of the classes (chance {100 * results['chance']:.1f} %); "
        f"{kept}.\nThe class stands in layer 0. This shows what over-smoothing destroys and that "
        "fusion keeps access\nto it, not that fusion makes a trained encoder better."
    )


def odd_run_table(results: dict[str, Any]) -> str:
    """Part B as text: exact match of every head, best first, in per cent."""
    scores = results["em"]
    title = "B. Find the odd run: encoder and head trained from scratch"
    head = [f"exact match, {percent_of(results)}", "EM", "difference", "seeds won"]
    rows = [[*head, "CosSim, last layer", "CosSim, read"]]
    for name in ranking(results):
        apart = _points(scores[name], scores[BASELINE])
        won = f"{sum(x > 0 for x in apart)} of {len(apart)}"
        cells = ["", ""] if name == BASELINE else [f"{statistics.fmean(apart):+.1f}", won]
        similar = [statistics.fmean(results[f"cosine_{k}"][name]) for k in ("last", "fused")]
        rows.append([label(name), spread(scores[name]), *cells, *(f"{x:.2f}" for x in similar)])
    note = (
        f"(chance {100 * results['chance']:.1f}; similarity of tokens after training, that of the "
        f"last layer before it was {results['cosine_before'][-1]:.2f})"
    )
    return "\n".join([title, columns(rows), note])


def odd_run_finding(results: dict[str, Any]) -> str:
    """What part B shows: who beats whom, and where it is not what the paper says."""
    scores = results["em"]
    order = ranking(results)
    lines = ["Order: " + " > ".join(label(name) for name in order) + "."]
    fusions = [name for name in order if name in FUSIONS]
    above = [name for name in fusions if _wins(scores[name], scores[BASELINE])]
    lines.append(f"Better than the last layer in every seed: {listed(above)}.")
    if above and fusions[0] == "gate":
        lines.append("The gate is the best of the three fusions, as in the paper.")
    elif "gate" in fusions:
        lines.append(f"In the paper the gate is the best of the three; here it is {fusions[0]}.")
    if {"gate", "scalar_mix"} <= scores.keys():
        apart = _points(scores["gate"], scores["scalar_mix"])
        won = f"{sum(x > 0 for x in apart)} of {len(apart)}"
        mean = f"{statistics.fmean(apart):+.1f} points"
        lines.append(f"Against a plain scalar mix the gate wins {won} seeds ({mean} in the mean).")
    if SINGLE in scores:
        above = [name for name in fusions if _wins(scores[name], scores[SINGLE])]
        lines.append(f"Better than {label(SINGLE)}, a shallow net, in every seed: {listed(above)}.")
    return "\n".join(lines)


def ranking(results: dict[str, Any]) -> list[str]:
    """Heads of part B, the best first."""
    return sorted(results["em"], key=lambda head: -statistics.fmean(results["em"][head]))


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of shares, in per cent."""
    more = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{more}"


def percent_of(results: dict[str, Any]) -> str:
    """The unit and the number of seeds."""
    count = len(results["seeds"])
    return f"per cent, {count} seed{'s' if count > 1 else ''}"


def listed(names: Sequence[str]) -> str:
    """Heads with commas between them."""
    return ", ".join(map(label, names)) or "none"


def _points(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Differences in points, paired by seed."""
    return [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]


def _wins(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether every seed is better."""
    return all(x > 0 for x in _points(ours, theirs))
