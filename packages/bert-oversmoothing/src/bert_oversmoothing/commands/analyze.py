"""analyze: measure over-smoothing in a model, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from transformers import PreTrainedModel

from bert_oversmoothing.analysis import METRICS, OversmoothingReport, list_images, read_texts
from bert_oversmoothing.analysis import analyze as analyse
from bert_oversmoothing.commands.opening import open_model, open_reader
from bert_oversmoothing.convert import check_new
from tenfold.console import at_least
from tenfold.errors import UserError


def analyze(
    model: str,
    texts: list[str] | None = None,
    *,
    file: Path | None = None,
    column: str | None = None,
    images: Path | None = None,
    out: Path = Path("analysis"),
    max_length: int = 128,
    batch_size: int = 16,
    metrics: str = ",".join(METRICS),
    exclude_special: bool = False,
    limit: int | None = None,
    attn: Literal["eager", "recompute", "off"] = "eager",
    sample: int = 64,
    on_nan: Literal["raise", "skip"] = "raise",
    on_long: Literal["truncate", "error"] = "truncate",
    per_token: bool = False,
    tokenizer: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
) -> None:
    """Measure how alike the tokens of a text become, layer by layer, and what makes them so.

    Args:
        model: hub id or folder of any encoder, or a model, checkpoint or run with fusion.
        texts: a few texts, as bare words behind MODEL and in front of all options: analyze MODEL
            "one text" "another".
        file: more of them: .txt with a text a line, .tsv, .csv or .jsonl.
        column: of a table, by name or number from 1; key of JSON lines.
        images: folder of images, for a vision model.
        out: new folder for layers.csv, heads.csv, tokens.csv, run.json, figures and report.html.
        max_length: tokens above which a text is cut; the model's own limit if that is less.
        batch_size: texts in a forward pass.
        metrics: cos, dm, rank, graph, sigma, bound, who, with commas between them.
        exclude_special: leave [CLS], [SEP] and the like out of the measures of states.
        limit: use so many texts at most.
        attn: how attention maps are had: eager switches the model for the sample, recompute takes
            queries and keys, off leaves graph and bound out.
        sample: texts of the sample that ranks, graph and bound are measured on.
        on_nan: a text with NaN or infinity is an error, or skipped and counted.
        on_long: a text that is too long is cut and counted, or an error.
        per_token: write tokens.csv, a row for every token of the sample.
        tokenizer: folder or hub id, if there is none with the model.
        revision: of a hub id.
        trust_remote_code: run code that comes with the model.
        device: auto, cpu, cuda, cuda:N or mps.
    """
    at_least(1, batch_size=batch_size, sample=sample, limit=limit)
    at_least(2, max_length=max_length)
    check_new(out)
    items: list[Any] = [*read_items(texts, file, column, images, limit)]
    opened = open_model(
        model, revision=revision, trust_remote_code=trust_remote_code, device=device
    )
    found = measure(
        model,
        opened,
        items,
        images=images is not None,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        max_length=max_length,
        batch_size=batch_size,
        metrics=[name.strip() for name in metrics.split(",") if name.strip()],
        exclude_special=exclude_special,
        attn=attn,
        sample=sample,
        on_nan=on_nan,
        on_long=on_long,
        per_token=per_token,
    )
    found.tables.run["options"]["limit"] = limit
    print(found.summary())
    print("drawing the pictures", flush=True)
    files = found.save(out)
    tables = [path.name for path in files if path.parent == out and path.suffix != ".html"]
    figures = sum(path.suffix == ".png" for path in files)
    print(f"wrote {', '.join(tables)} and {figures} figures to {out}")
    print(f"see {out / 'report.html'}")


def read_items(
    texts: list[str] | None,
    file: Path | None,
    column: str | None,
    images: Path | None,
    limit: int | None,
) -> list[str] | list[Path]:
    """The texts or the images that a command is given.

    Raises:
        UserError: both, or none of them.
    """
    if images is None:
        return read_texts(texts or (), file, column, limit)
    if texts or file is not None:
        raise UserError("texts and images at once", where="--images", fix="give one of them")
    return list_images(images, limit)


def one_file(texts: Path | None, file: Path | None) -> Path | None:
    """The file of texts of a command that knows it under two names.

    Raises:
        UserError: both are given.
    """
    if texts is not None and file is not None:
        raise UserError("--texts and --file are the same", where=str(file), fix="give one of them")
    return file if texts is None else texts


def measure(
    name: str,
    model: PreTrainedModel,
    items: list[Any],
    *,
    images: bool = False,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> OversmoothingReport:
    """`analysis.analyze` with the tokenizer that belongs to the model, and progress.

    Raises:
        UserError: texts for a model of images or the other way round.
    """
    reader = open_reader(name, model, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    found = analyse(model, reader, items, images=images, progress=True, **cast(Any, options))
    found.tables.run["model"] = name
    return found
