"""compare: the curves of several models, or of several fusion heads, on the same texts."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from bert_oversmoothing.analysis import OversmoothingReport
from bert_oversmoothing.commands.analyze import measure, one_file, read_items
from bert_oversmoothing.commands.opening import names_of, open_model
from bert_oversmoothing.convert import check_new
from bert_oversmoothing.report import draw_compare
from bert_oversmoothing.report.tables import LAYER_COLUMNS
from tenfold.console import at_least, columns
from tenfold.errors import UserError


def compare(
    models: list[str],
    *,
    texts: Path | None = None,
    file: Path | None = None,
    column: str | None = None,
    images: Path | None = None,
    out: Path = Path("comparison"),
    max_length: int = 128,
    batch_size: int = 16,
    exclude_special: bool = False,
    limit: int | None = None,
    sample: int = 64,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
) -> None:
    """Lay the curves of several models over each other, measured on the same texts.

    Args:
        models: two or more, each as in analyze, in front of all options.
        texts: file of them: .txt with a text a line, .tsv, .csv or .jsonl.
        file: the same as --texts, as analyze calls it.
        column: of a table, by name or number from 1; key of JSON lines.
        images: folder of images, for vision models.
        out: new folder for compare.csv, compare.png, and the analysis of each model.
        max_length: tokens above which a text is cut.
        batch_size: texts in a forward pass.
        exclude_special: leave [CLS], [SEP] and the like out.
        limit: use so many texts at most.
        sample: texts that ranks and identity are measured on.
        tokenizer: for models that come without one.
        trust_remote_code: run code that comes with a model.
        device: auto, cpu, cuda, cuda:N or mps.
    """
    at_least(1, batch_size=batch_size, sample=sample, limit=limit)
    if len(models) < 2:
        raise UserError("two or more models can be compared", fix="name another one")
    names = names_of(models)
    check_new(out)
    items: list[Any] = [*read_items(None, one_file(texts, file), column, images, limit)]
    found: dict[str, OversmoothingReport] = {}
    for name, model in zip(names, models, strict=True):
        found[name] = measure(
            model,
            open_model(model, trust_remote_code=trust_remote_code, device=device),
            items,
            images=images is not None,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            max_length=max_length,
            batch_size=batch_size,
            metrics=("cos", "dm", "rank", "sigma", "who"),
            exclude_special=exclude_special,
            sample=sample,
        )
        found[name].tables.save(out / name.replace("/", "--"))
    print(table(found))
    _write(found, out / "compare.csv")
    print("drawing the pictures", flush=True)
    draw_compare({name: report.tables for name, report in found.items()}, out / "compare.png")
    print(f"wrote {out / 'compare.csv'} and {out / 'compare.png'}")


def table(found: dict[str, OversmoothingReport]) -> str:
    """A line a model: layers, similarity at its least and last, between texts, and verdict."""
    heads = ["model", "layers", "least", "last", "between texts", "excess", "fused", "verdict"]
    rows = [heads]
    for name, report in found.items():
        run, last = report.tables.run, report.tables.layers[-1]
        verdict = run["verdict"]
        numbers = [
            verdict["smallest"],
            verdict["last"],
            last.get("cosine_between"),
            last.get("cosine_excess"),
            run.get("fused_cosine"),
        ]
        cells = ["-" if x is None or math.isnan(x) else f"{x:.3f}" for x in numbers]
        rows.append([name, str(run["blocks"]), *cells, str(verdict["word"])])
    return columns(rows)


def _write(found: dict[str, OversmoothingReport], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["model", *LAYER_COLUMNS])
        for name, report in found.items():
            for row in report.tables.layers:
                rows.writerow([name, *(row.get(column) for column in LAYER_COLUMNS)])
