"""Does reading all layers help where the last one is over-smoothed?

The paper's fusions against the last layer alone, all on the same encoder and batches; seeds are
paired. Of generated texts:

- probe: a random encoder that is not trained, the classes of its tokens;
- layers: which single block is best to read, chosen by seeds and items of its own;
- odd-run: encoder and head trained from scratch;
- shared: the same, with the attention of the first block in all blocks.

Of real sentences:

- sst2: a small BERT that is pre-trained and fine-tuned (see `sst2`);
- minilm: what an analysis says of a trained encoder (see `minilm`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.bert_oversmoothing import minilm, sst2
from benchmarks.results import Results, cell, markdown, plain, replace_block, work_folder
from bert_oversmoothing.commands.demo import FUSIONS, label, ranking
from bert_oversmoothing.comparison import (
    BASELINE,
    HEADS,
    PILOT_SEED,
    PROBE_HEADS,
    SINGLE,
    STD,
    STEPS,
    frozen_probe,
    layer_scores,
    odd_run,
)
from bert_oversmoothing.report import draw_frozen_probe, draw_odd_run
from tenfold.errors import UserError

README = Path("packages/bert-oversmoothing/README.md")
DOCS = README.parent / "docs"

PILOTS = (PILOT_SEED, PILOT_SEED + 1)
TRAINED = (*HEADS, "gate_identity")
SHARED = (BASELINE, *FUSIONS)


def run(seeds: int = 5, only: str | None = None) -> None:
    """Runs every part with every seed, unless that is done, and writes tables and pictures.

    Args:
        seeds: how many; of the real sentences three at most.
        only: one part.

    Raises:
        UserError: no such part, or no real sentences.
    """
    parts: dict[str, Callable[[Results, range], None]] = {
        "probe": _probe,
        "layers": _layers,
        "odd-run": _odd_run,
        "shared": _shared,
        "sst2": _sst2,
        "minilm": _minilm,
    }
    if only not in (None, *parts):
        raise UserError(f"no part is called {only!r}", fix=f"there is {', '.join(parts)}")
    results = Results("claims", "bert-oversmoothing")
    for name in [only] if only else parts:
        parts[name](results, range(seeds))
        results.write()
    results.publish(README, tables(results.content))
    if "minilm" in results.runs:
        replace_block(README, "minilm", minilm.text(results.runs["minilm"]))


def _folder(part: str) -> Path:
    return work_folder("bert-oversmoothing") / part


def _probe(results: Results, seeds: range) -> None:
    found = frozen_probe(seeds, out=_folder("probe"))
    stds = found["std"]
    draw_frozen_probe(found, DOCS / "frozen_probe.png")
    results.runs["probe"] = {
        "seeds": len(seeds),
        "std": stds,
        "cosine": [found["cosine"][std] for std in stds],
        "accuracy": {h: [rows[std] for std in stds] for h, rows in found["accuracy"].items()},
    }


def _layers(results: Results, seeds: range) -> None:
    """The seeds are the pilots', whatever those of the other parts."""
    for seed in PILOTS:
        results.once(f"layers/{seed}", lambda seed=seed: [*layer_scores(seed).values()])


def _odd_run(results: Results, seeds: range) -> None:
    found = odd_run(seeds, heads=TRAINED, out=_folder("odd-run"))
    draw_odd_run(odd_run(seeds, out=_folder("odd-run")), DOCS / "odd_run.png")
    results.runs["odd-run"] = _scores(found)


def _shared(results: Results, seeds: range) -> None:
    found = odd_run(seeds, heads=SHARED, share_attention="first", out=_folder("shared"))
    results.runs["shared"] = _scores(found)


def _sst2(results: Results, seeds: range) -> None:
    chosen = seeds[: sst2.SEEDS]
    found = sst2.compare_fusions(_folder("sst2"), chosen)
    results.runs["sst2"] = {"seeds": len(chosen), "runs": found}


def _minilm(results: Results, seeds: range) -> None:
    results.runs["minilm"] = minilm.analyse_minilm(_folder("minilm"), DOCS)


def _scores(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables read."""
    kept = ("em", "cosine_last", "cosine_fused", "cosine_before")
    return {"seeds": len(found["seeds"]), **{name: found[name] for name in kept}}


def tables(content: Mapping[str, Any]) -> str:
    """The tables of the parts that were run."""
    runs, texts = content["runs"], []
    if "probe" in runs:
        head = (
            "A random encoder that is not trained: accuracy in per cent of the class of every "
            f"token, {runs['probe']['seeds']} seeds, by the deviation of the weights:"
        )
        texts += [head, probe_table(runs["probe"])]
    if "odd-run" in runs:
        head = (
            f"Find the odd run: encoder and head from scratch, {STEPS} steps, std {STD:g}, "
            f"{runs['odd-run']['seeds']} seeds; exact match in per cent, intervals of 95 %, "
            "paired t-test against the last layer:"
        )
        texts += [head, odd_run_table(runs["odd-run"], BASELINE)]
        texts += ["Against the two sceptic's baselines:", sceptic_table(runs["odd-run"])]
    pilots = [scores for key, scores in sorted(runs.items()) if key.startswith("layers/")]
    if pilots:
        head = (
            f"Reading one block alone, {len(pilots)} pilot seeds that are in no other table, exact "
            f"match in per cent on items of their own; block {shallowest(pilots)} is the "
            "shallowest within a point of the best, and stands for a shallow net:"
        )
        texts += [head, layers_table(pilots)]
    if {"odd-run", "shared"} <= runs.keys():
        head = "The attention of the first block in all blocks, against attention of each its own:"
        texts += [head, shared_table(runs["odd-run"], runs["shared"])]
    if "sst2" in runs:
        texts += [
            sst2.heading(runs["sst2"]),
            sst2.table(runs["sst2"]),
            sst2.alike_text(runs["sst2"]),
        ]
    return "\n\n".join(texts)


def probe_table(run: Mapping[str, Any]) -> str:
    """Accuracy by head and deviation; the difference is that at the largest one."""
    rows = []
    for head in sorted(run["accuracy"], key=PROBE_HEADS.index):
        by_std = run["accuracy"][head]
        apart = points(by_std[-1], run["accuracy"][BASELINE][-1])
        last = "" if head == BASELINE else cell(apart, 1)
        rows.append([label(head), *(plain(percent(values)) for values in by_std), last])
    rows.append(["CosSim of the last layer", *(plain(row, 2) for row in run["cosine"]), ""])
    stds = [f"std {std:g}" for std in run["std"]]
    head = ["head", *stds, f"against the last layer, std {run['std'][-1]:g}"]
    return markdown(head, rows)


def odd_run_table(run: Mapping[str, Any], other: str) -> str:
    """Exact match by head, the best first, paired by seed with another head."""
    rows = []
    for name in ranking(dict(run)):
        similar = [plain(run[f"cosine_{kind}"][name], 2) for kind in ("last", "fused")]
        against = ["", "", ""] if name == other else paired(run["em"][name], run["em"][other])
        rows.append([label(name), plain(percent(run["em"][name])), *against, *similar])
    head = ["head", "exact match", f"against {label(other)}", "worst seed", "p"]
    return markdown([*head, "CosSim of layer 12", "CosSim of what is read"], rows)


def sceptic_table(run: Mapping[str, Any]) -> str:
    """The fusions against a scalar mix and against the best single block."""
    rows = [
        [label(name), label(other), *paired(run["em"][name], run["em"][other])]
        for other in ("scalar_mix", SINGLE)
        for name in FUSIONS
    ]
    return markdown(["fusion", "against", "difference", "worst seed", "p"], rows)


def layers_table(pilots: Sequence[Sequence[float]]) -> str:
    """Exact match of every block, the mean over the pilot seeds."""
    means = block_means(pilots)
    head = ["block", *map(str, range(1, len(means) + 1))]
    return markdown(head, [["exact match", *(f"{100 * mean:.1f}" for mean in means)]])


def block_means(pilots: Sequence[Sequence[float]]) -> list[float]:
    """Exact match of every block over the pilot seeds."""
    return [sum(scores) / len(pilots) for scores in zip(*pilots, strict=True)]


def shallowest(pilots: Sequence[Sequence[float]]) -> int:
    """The first block whose mean is within a point of the best: of equals the cheapest."""
    means = block_means(pilots)
    return next(n for n, mean in enumerate(means, 1) if mean >= max(means) - 0.01)


def shared_table(own: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
    """Exact match of both, paired by seed."""
    rows = []
    for name, ours in shared["em"].items():
        theirs = own["em"][name][: len(ours)]
        values = [plain(percent(theirs)), plain(percent(ours))]
        rows.append([label(name), *values, *paired(ours, theirs)])
    return markdown(["head", "own", "shared", "difference", "worst seed", "p"], rows)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> list[str]:
    """Difference in points with its interval, that of the worst seed, and p of a paired t-test."""
    apart = points(ours, theirs)
    p = f"{stats.ttest_rel(ours, theirs).pvalue:.2g}" if len(apart) > 1 else ""
    return [cell(apart, 1), f"{min(apart):+.1f}", p]


def points(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Differences of shares in points, by seed."""
    return [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]


def percent(shares: Sequence[float]) -> list[float]:
    """Shares in per cent."""
    return [100 * share for share in shares]
