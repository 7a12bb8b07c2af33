"""The README's tables, from the results alone."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import Results, cell, markdown, plain, replace_block

README = Path(__file__).parents[2] / "packages" / "ds-net-plus" / "README.md"
GATE_NAMES = {
    "value": "value gate",
    "try_best": "paper loss, SGS try-best, mixture",
    "give_up": "paper loss, SGS give-up, mixture",
    "ladder": "paper loss, SGS ladder, mixture",
    "no_sgs": "paper loss without SGS, mixture",
    "mask_try_best": "paper loss, SGS try-best, mask",
    "mask_no_sgs": "paper loss without SGS, mask",
}


def write_tables(results: Results) -> None:
    """Writes tables.md beside the results, and the blocks of the package's README."""
    blocks = {
        "wide": wide_table(_runs(results, "wide/")),
        "targets": target_table(results),
        "gates": gate_table(results),
        "cifar": two_spaces_table(_runs(results, "cifar10/")),
        "vit": two_spaces_table(_runs(results, "vit/")),
    }
    text = ""
    for name, block in blocks.items():
        if block:
            text += f"## {name}\n\n{block}\n\n"
            replace_block(README, f"claims {name}", block)
    results.path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def _runs(results: Results, prefix: str) -> list[dict[str, Any]]:
    return [value for key, value in sorted(results.runs.items()) if key.startswith(prefix)]


def wide_table(runs: list[dict[str, Any]]) -> str:
    """Static routes and dynamic points with MAdds and milliseconds, over seeds."""
    if not runs:
        return ""
    rows = []
    widest = [run["static"][-1] for run in runs]
    for j, row in enumerate(runs[0]["static"]):
        mine = [run["static"][j] for run in runs]
        rows.append(
            [
                f"route {row['route']}",
                plain([100 * r["top1"] for r in mine], 2),
                f"{row['madds'] / widest[0]['madds']:.2f}",
                plain([r["ms"] / w["ms"] for r, w in zip(mine, widest, strict=True)], 2),
                "",
                "",
            ]
        )
    for j in range(min(len(run["dynamic"]) for run in runs)):
        mine = [run["dynamic"][j] for run in runs]
        against = [100 * (r["top1"] - w["top1"]) for r, w in zip(mine, widest, strict=True)]
        rows.append(
            [
                "dynamic",
                plain([100 * r["top1"] for r in mine], 2),
                plain([r["madds_ratio"] for r in mine], 2),
                plain([r["time_ratio"] for r in mine], 2),
                cell([100 * r["gain"] for r in mine]),
                cell(against),
            ]
        )
    head = ["", "top-1 %", "MAdds ratio", "time ratio", "gain at equal MAdds", "against widest"]
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}, {runs[0]['timing']}."
    return markdown(head, rows) + f"\n\n{seeds} Gains in points, with 95 % interval over seeds."


def two_spaces_table(runs: list[dict[str, Any]]) -> str:
    """A network's gate among two routes and among all, in large batches and in small ones."""
    if not runs:
        return ""
    among = {
        "two, batch 256": "Among routes 0 and 3",
        "all, batch 256": "Among all routes",
        "two, batch 32": "Among routes 0 and 3, in small batches",
    }
    blocks = [f"{text}:\n\n{wide_table([run[key] for run in runs])}" for key, text in among.items()]
    return "\n\n".join(blocks)


def target_table(results: Results) -> str:
    """Top-1 of the static routes by what they learned from."""
    rows = []
    for distill in ("none", "ib", "inplace", "ramp", "switch"):
        runs = _runs(results, f"tiny/{distill}/")
        if runs:
            curve = 100 * np.array([run["static"] for run in runs])
            rows.append([distill, str(len(runs)), *(plain(column) for column in curve.T)])
    if not rows:
        return ""
    return markdown(["distill", "seeds", "route 0", "route 1", "route 2", "route 3"], rows)


def gate_table(results: Results) -> str:
    """Gain of every kind of gate at its own choice and at two budgets, on two supernets."""
    rows = []
    for distill in ("none", "ib"):
        runs = _runs(results, f"tiny/{distill}/")
        for gate, name in GATE_NAMES.items():
            mine = [run[gate] for run in runs if gate in run]
            if not mine:
                continue
            own = plain([r["argmax"]["madds_ratio"] for r in mine], 2)
            cells = [distill, name, own, cell([100 * r["argmax"]["gain"] for r in mine])]
            cells += [cell([100 * r[b]["gain"] for r in mine]) for b in ("0.43", "0.55")]
            cells.append(cell([100 * r["0.55"]["against_widest"] for r in mine]))
            rows.append(cells)
    if not rows:
        return ""
    head = ["supernet", "gate", "own MAdds ratio", "own gain", "gain at 0.43", "gain at 0.55"]
    return markdown([*head, "at 0.55 against widest"], rows)
