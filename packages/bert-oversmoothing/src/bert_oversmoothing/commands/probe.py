"""probe: a head on every layer of a frozen encoder, its error against the similarity of tokens."""

from __future__ import annotations

import csv
import io
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bert_oversmoothing.commands.layer_heads import (
    error_of_most_frequent,
    fit_heads,
    keep_states,
    score_heads,
)
from bert_oversmoothing.commands.opening import open_model
from bert_oversmoothing.convert import check_new
from bert_oversmoothing.data import OversmoothingData
from bert_oversmoothing.families import read_encoder
from bert_oversmoothing.module import is_run, load_run, load_tokenizer
from bert_oversmoothing.report.checks import draw_probe
from tenfold.checkpoint import atomic_file
from tenfold.console import at_least, columns
from tenfold.errors import UserError, first_line


def probe(
    model: str,
    *,
    data: dict[str, Any] | None = None,
    epochs: int = 10,
    lr: float = 1e-3,
    batch_size: int = 32,
    seeds: int = 1,
    cache_limit: float = 16.0,
    cache: Path | None = None,
    device: str = "auto",
    out: Path = Path("probe"),
) -> None:
    """Train the head of a task on every layer of a frozen encoder, and compare the layers.

    Layer by layer, the error on the validation data stands against the mean cosine of the tokens
    there (Figure 1b of the paper). The error is 1 less the mean of the task's figures, and of
    questions 1 less F1. The states are computed once and kept on the disk; the heads of all layers
    are trained side by side on the same batches.

    Args:
        model: folder or hub id of an encoder, fine-tuned or not, or a run of fit.
        data: arguments of the data, as --data.source sst2 --data.root FOLDER; those of the run
            where the model is one, and its tokenizer that of the model. Without any, and without
            a run, the heads are trained on the generated task of the demo.
        epochs: of the heads.
        lr: their highest learning rate, which warms up and decays as in fine-tuning.
        batch_size: items in a step.
        seeds: of the start and order of the heads; 0, 1, 2 and so on.
        cache_limit: gigabytes that the states may take on the disk.
        cache: folder for the states, which go at the end; that of temporary files if left out.
        device: auto, cpu, cuda, cuda:N or mps.
        out: new folder for probe.csv and probe.png.
    """
    at_least(1, epochs=epochs, batch_size=batch_size, seeds=seeds)
    at_least(0, lr=lr)
    if not 0 < cache_limit < float("inf"):
        raise UserError(f"--cache-limit must be above 0, got {cache_limit}")
    check_new(out)
    encoder = read_encoder(open_model(model, device=device))
    source = _data(model, data or {})
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as folder:
        sizes = {"room": int(cache_limit * 1e9)}
        known = keep_states(encoder, source, "train", Path(folder, "train"), **sizes)
        sizes["room"] -= known.values.nbytes
        asked = keep_states(encoder, source, "val", Path(folder, "val"), **sizes)
        start = _pooler(encoder.model)
        options = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "start": start}
        found = []
        for seed in range(seeds):
            heads = fit_heads(known, source, seed=seed, **options)
            found.append(score_heads(heads, asked, source))
        rows = layer_rows(asked.cosine, found, error_of_most_frequent(known, asked, source))
        del known, asked  # before their files
    write(rows, out)
    print(told(rows, len(found)))


# -- report ------------------------------------------------------------------------------------


def layer_rows(
    cosine: Sequence[float],
    found: Sequence[Sequence[Mapping[str, float]]],
    most_frequent: float | None = None,
) -> list[dict[str, Any]]:
    """A row for each layer: its similarity, and over seeds the error, 1 - score, and all figures.

    Args:
        cosine: of every layer.
        found: of every seed and layer the figures of the task.
        most_frequent: error of always naming the most frequent label, if that is an answer.
    """
    rows = []
    for layer, similarity in enumerate(cosine):
        here = [figures[layer] for figures in found]
        errors = [1 - figures["score"] for figures in here]
        row = {"layer": layer, "cosine": similarity, "error": statistics.fmean(errors)}
        row["error_std"] = statistics.stdev(errors) if len(errors) > 1 else None
        if most_frequent is not None:
            row["error_most_frequent"] = most_frequent
        others = [name for name in here[0] if name != "score"]
        row |= {name: statistics.fmean(figures[name] for figures in here) for name in others}
        rows.append(row)
    return rows


def write(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """probe.csv and probe.png in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with atomic_file(out / "probe.csv") as file:
        file.write(text.getvalue().encode())
    print("drawing the picture", flush=True)
    draw_probe(rows, out / "probe.png")
    print(f"wrote {out / 'probe.csv'} and {out / 'probe.png'}")


def told(rows: Sequence[Mapping[str, Any]], seeds: int) -> str:
    """The table for a terminal, and in a sentence where the least of both is."""
    cells = [["layer", "similarity", "error %", *(["std"] if seeds > 1 else [])]]
    for row in rows:
        spread = [f"{100 * row['error_std']:.2f}"] if seeds > 1 else []
        error = f"{100 * row['error']:.2f}"
        cells.append([str(row["layer"]), f"{row['cosine']:.3f}", error, *spread])
    best, alike = (min(rows, key=lambda row: row[name]) for name in ("error", "cosine"))
    last = rows[-1]
    beside = ""
    if (constant := last.get("error_most_frequent")) is not None:
        beside = f"\nalways naming the most frequent label: error {100 * constant:.2f} %"
        if best["error"] >= constant:
            beside += ", which no layer beats"
    return (
        f"{columns(cells)}\n\nleast error {100 * best['error']:.2f} % at layer {best['layer']}, "
        f"{100 * last['error']:.2f} % at the last, {last['layer']}; least similarity "
        f"{alike['cosine']:.3f} at layer {alike['layer']}, {last['cosine']:.3f} at the last{beside}"
    )


# -- what is opened ----------------------------------------------------------------------------


def _pooler(model: nn.Module) -> nn.Linear | None:
    """The dense layer of an encoder's pooler, if it is one."""
    pooler = getattr(model, "pooler", None)
    dense = getattr(pooler, "dense", pooler)
    return (
        dense if isinstance(dense, nn.Linear) and dense.in_features == dense.out_features else None
    )


def _data(model: str, given: Mapping[str, Any]) -> OversmoothingData:
    """The data of a run with what differs, or those that are named; ready to be read."""
    saved: Mapping[str, Any] = {}
    if is_run(model):
        saved = load_run(model).get("datamodule_hyper_parameters", {})
    options = {name: x for name, x in saved.items() if not name.startswith("_")} | dict(given)
    try:
        data = OversmoothingData(**options)
    except TypeError as error:
        raise UserError(f"--data: {first_line(error)}") from error
    if data.task == "mlm":
        raise UserError("a head for every word on every layer is too large to be probed")
    if is_run(model) or data.tokenizer is None:
        data.tokenizer = load_tokenizer(model)
    data.setup("fit")
    return data
