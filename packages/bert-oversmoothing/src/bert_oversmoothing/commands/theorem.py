"""theorem: the bound held against what blocks do."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bert_oversmoothing.analysis import model_trials, read_texts
from bert_oversmoothing.commands.analyze import one_file
from bert_oversmoothing.commands.opening import open_model, open_reader
from bert_oversmoothing.convert import check_new
from bert_oversmoothing.report import draw_theorem
from bert_oversmoothing.theorem import Summary, Trial, check_theorem, summarise
from tenfold.console import at_least, columns

_SHOWN = 20  # violations that are listed
_LARGEST = "largest ratio / bound"


def theorem(
    *,
    trials: int = 200,
    model: str | None = None,
    texts: Path | None = None,
    file: Path | None = None,
    column: str | None = None,
    limit: int = 16,
    seed: int = 0,
    out: Path = Path("theorem"),
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
) -> int:
    """Hold the theorem's bound against blocks: random ones, or those of a model.

    The exit status is 1 if any block breaks the theorem.

    Args:
        trials: random blocks, of post-norm and pre-norm, from weights that do nothing to chaos.
        model: a model instead, as in analyze, in float64.
        texts: file of texts for it; random words if left out.
        file: the same as --texts, as analyze calls it.
        column: of a table, by name or number from 1; key of JSON lines.
        limit: texts of the model.
        seed: of random blocks, and of random words.
        out: new folder for trials.csv and theorem.png.
        tokenizer: folder or hub id, if there is none with the model.
        trust_remote_code: run code that comes with the model.
        device: auto, cpu or cuda.
    """
    at_least(1, trials=trials, limit=limit)
    check_new(out)
    texts, blocks = one_file(texts, file), None
    if model is None:
        found = check_theorem(trials, seed=seed)
        print(_table(summarise(found)))
    else:
        opened = open_model(model, trust_remote_code=trust_remote_code, device=device)
        given: dict[str, Any] = {"count": limit, "seed": seed}
        if texts is not None:
            given["texts"] = read_texts((), texts, column, limit)
            options = {"tokenizer": tokenizer, "trust_remote_code": trust_remote_code}
            given["tokenizer"] = open_reader(model, opened, **options)
        by_block = model_trials(opened, **given)
        print(_blocks(by_block))
        found = [trial for block in by_block for trial in block]
        blocks = [number for number, block in enumerate(by_block, 1) for _ in block]
    broken = [trial for trial in found if trial.violation]
    told = sum(not trial.vacuous for trial in found)
    print(f"{len(found)} trials, {len(broken)} violations; the bound is below 1 in {told}")
    if broken:
        print(_violations(broken))
    out.mkdir(parents=True, exist_ok=True)
    _write(found, out / "trials.csv")
    print("drawing the picture", flush=True)
    picture = draw_theorem(found, out / "theorem.png", blocks)
    print(f"wrote {out / 'trials.csv'} and {picture}")
    return int(bool(broken))


def _table(summaries: Sequence[Summary]) -> str:
    """Medians by order and standard deviation of the weights."""
    rows = [
        ["order", "std", "trials", "measured", "v tight", "v paper", "v < 1", "violations"],
        *(
            [
                s.order,
                f"{s.std:g}",
                str(s.trials),
                f"{s.ratio:.3f}",
                f"{s.v_tight:.3g}",
                f"{s.v_paper:.3g}",
                f"{s.contracting:.0%}",
                str(s.violations),
            ]
            for s in summaries
        ),
    ]
    return columns(rows)


def _blocks(by_block: Sequence[Sequence[Trial]]) -> str:
    """A line a block of a model."""
    heads = ["block", "texts", "measured", "v tight", "v paper", _LARGEST, "violations"]
    rows = [heads]
    for number, block in enumerate(by_block, 1):
        if not block:
            rows.append([str(number), "0", *["-"] * 5])
            continue
        medians = summarise(block)[0]
        largest = max(trial.ratio / trial.v_tight for trial in block)
        figures = (f"{medians.ratio:.3f}", f"{medians.v_tight:.3g}", f"{medians.v_paper:.3g}")
        cells = [str(number), str(len(block)), *figures, f"{largest:.3f}", str(medians.violations)]
        rows.append(cells)
    why = "of the text where they are nearest; above 1 the theorem is broken"
    return f"{columns(rows)}\nmedians over texts; {_LARGEST}: {why}"


def _violations(broken: Sequence[Trial]) -> str:
    rows = [["order", "std", "tokens", "width", "heads", "measured", "v tight"]]
    for trial in broken[:_SHOWN]:
        d = trial.design
        sizes = [d.order, f"{d.std:.3g}", str(d.tokens), str(d.width), str(d.heads)]
        rows.append([*sizes, f"{trial.ratio:.9g}", f"{trial.v_tight:.9g}"])
    return columns(rows)


def _write(trials: Sequence[Trial], path: Path) -> None:
    names = [field.name for field in fields(Trial) if field.name != "design"]
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([*asdict(trials[0].design), *names, "violation", "vacuous"])
        for trial in trials:
            values = [getattr(trial, name) for name in names]
            design = asdict(trial.design).values()
            rows.writerow([*design, *values, trial.violation, trial.vacuous])
