"""The analysis of an encoder over a corpus, from a model and texts to a report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from bert_oversmoothing.analysis.corpus import (
    Corpus,
    Images,
    Ready,
    Texts,
    longest_text,
    prefix_tokens,
)
from bert_oversmoothing.analysis.result import OversmoothingReport
from bert_oversmoothing.analysis.sample import (
    Attention,
    Sample,
    add_columns,
    choose,
    draw,
    head_rows,
    picture_text,
    token_rows,
)
from bert_oversmoothing.analysis.streaming import Fusing, run_batch, stream
from bert_oversmoothing.analysis.verdict import verdict
from bert_oversmoothing.capture import capture
from bert_oversmoothing.families import Encoder, read_encoder
from bert_oversmoothing.report.tables import Tables
from tenfold.console import at_least
from tenfold.errors import UserError

Metric = Literal["cos", "dm", "rank", "graph", "sigma", "bound", "who"]
METRICS: tuple[Metric, ...] = get_args(Metric)

Source = Sequence[Any]
"""Texts, images (files or PIL), or batches (dicts of the tensors that a model takes)."""


def analyze(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Source,
    *,
    images: bool = False,
    max_length: int = 128,
    batch_size: int = 16,
    metrics: Sequence[str] = METRICS,
    exclude_special: bool = False,
    limit: int | None = None,
    attn: Attention = "eager",
    sample: int = 64,
    on_nan: Literal["raise", "skip"] = "raise",
    on_long: Literal["truncate", "error"] = "truncate",
    per_token: bool = False,
    progress: bool = False,
) -> OversmoothingReport:
    """Measure, layer by layer, how alike the tokens of a text become, and what makes them so.

    One pass over all texts keeps nothing but sums; ranks, CKA, identity, attention graph and bound
    come from a second pass over a sample, evenly chosen. The model is left as it was.

    Example:
        >>> curves = analyze(model, tokenizer, ["The quick brown fox.", "It rains."])
        >>> curves.layers["cosine"], curves.summary()

    Args:
        model: any encoder of transformers, with or without a head, or one with fusion.
        tokenizer: of the model; its image processor for images; None for ready batches.
        texts: texts; with `images` files or PIL images; or dicts of tensors that the model takes.
        images: whether they are images.
        max_length: tokens above which a text is cut; the model's own limit if that is less.
        batch_size: texts in a forward pass.
        metrics: what to measure, of `METRICS`: "cos" token similarity, also between texts; "dm"
            distances to equal rows; "rank" ranks, CKA and identity; "graph" the attention graph;
            "sigma" what norms divide by; "bound" the theorem's; "who" smooths.
        exclude_special: leave [CLS], [SEP] and the like out of the measures of states, and the
            tokens before an image's patches; the graph and the bound always see all tokens.
        limit: use so many texts at most; of ready batches so many batches.
        attn: how attention maps are had: "eager" switches the model for the sample, "recompute"
            takes queries and keys, "off" leaves graph and bound out.
        sample: texts of the sample, 1 or more.
        on_nan: what happens to a text with NaN or infinity: "raise", or "skip" and count.
        on_long: what happens to a text that is too long: "truncate" and count, or "error".
        per_token: keep a row for every token of the sample.
        progress: show it.

    Raises:
        UserError: no text is left, or one breaks a rule; the encoder changes the shape of its
            states, or no sequence of blocks was found.
    """
    at_least(1, batch_size=batch_size, sample=sample, limit=limit)
    at_least(2, max_length=max_length)
    _check_metrics(metrics)
    inner, fusing = _parts(model)
    encoder = read_encoder(inner)
    notes = [*encoder.notes]
    limits = max_length, exclude_special, on_long
    corpus = _corpus(encoder, tokenizer, texts[:limit], images, *limits)
    if not corpus.usable:
        what = f"none of the {corpus.counts.given} texts has two tokens or more"
        raise UserError(what, fix="give texts of some words")
    clock = [time.perf_counter()]
    sums = stream(
        encoder,
        corpus,
        metrics,
        batch_size=batch_size,
        on_nan=on_nan,
        fusing=fusing,
        progress=progress,
    )
    if not corpus.usable:
        raise UserError("every text gives NaN or infinity", where=type(model).__name__)
    clock.append(time.perf_counter())
    rows = sums.rows(len(encoder.blocks) + 1, metrics)
    drawn = _draw(encoder, corpus, metrics, sample, batch_size, attn, notes, progress)
    arrays = add_columns(rows, drawn, metrics)
    row, words, matrices = picture_text(corpus, drawn)
    arrays |= matrices if "cos" in metrics else {}
    text = {"text": corpus.name(row), "tokens": words, "layers": _shown_layers(encoder)}
    run: dict[str, Any] = {}
    if fusing is not None:
        text["layers"] = sorted(fusing.layers)
        arrays |= _gates(encoder, corpus, fusing, row)
        run["fused_cosine"] = fusing.cosine.compute().cosine.mean
    clock.append(time.perf_counter())
    _notes(notes, encoder, corpus, drawn, sums.zero_tokens, metrics)
    run = _about(model, encoder, corpus, tokens=sums.tokens) | run
    run |= {
        "verdict": verdict(rows, encoder),
        "notes": notes,
        "timings": {"texts": clock[1] - clock[0], "sample": clock[2] - clock[1]},
        "sample_text": text,
        "sample": {"texts": sorted(drawn.rows), "tokens": sum(drawn.lengths)},
        "options": {
            "max_length": max_length,
            "batch_size": batch_size,
            "metrics": [*metrics],
            "exclude_special": exclude_special,
            "limit": limit,
            "attn": attn,
            "sample": sample,
        },
    }
    heads = head_rows(encoder, drawn)
    tokens = token_rows(corpus, drawn) if per_token else []
    return OversmoothingReport(Tables(rows, heads, tokens, run, arrays))


def _check_metrics(metrics: Sequence[str]) -> None:
    if unknown := [name for name in metrics if name not in METRICS]:
        fix = f"choose from {', '.join(METRICS)}"
        raise UserError(f"no such metrics: {', '.join(unknown)}", where="--metrics", fix=fix)
    if not metrics:
        raise UserError("no metrics", where="--metrics", fix=f"choose from {', '.join(METRICS)}")


def _parts(model: PreTrainedModel) -> tuple[PreTrainedModel, Fusing | None]:
    """The plain model inside a fusion model, and its fusion."""
    if model.config.model_type != "fusion":
        return model, None
    inner, fusion = model.model, model.fusion
    assert isinstance(inner, PreTrainedModel)
    assert isinstance(fusion, nn.Module)
    return inner, Fusing(fusion, model.config.layers)  # pyright: ignore[reportArgumentType]


def _corpus(
    encoder: Encoder,
    tokenizer: Any,
    texts: Source,
    images: bool,
    max_length: int,
    exclude_special: bool,
    on_long: Literal["truncate", "error"],
) -> Corpus:
    if not len(texts):
        raise UserError("there are no texts")
    sees = encoder.model.main_input_name == "pixel_values"
    if sees != images and not isinstance(texts[0], Mapping):
        what = "a model of images is given texts" if sees else "a model of texts is given images"
        raise UserError(what, fix="give it images" if sees else "give it texts")
    if images:
        return Images(texts, tokenizer, prefix_tokens(encoder.model) if exclude_special else 0)
    if isinstance(texts[0], Mapping):
        if exclude_special:
            what = "batches do not tell which of their tokens are special"
            raise UserError(what, where="exclude_special", fix="give texts and a tokenizer")
        return Ready(texts)
    if tokenizer is None:
        raise UserError("texts need a tokenizer", fix="give that of the model")
    longest = longest_text(encoder.model, tokenizer, max_length)
    corpus = Texts(texts, tokenizer, longest, exclude_special=exclude_special, on_long=on_long)
    words = len(encoder.model.get_input_embeddings().get_parameter("weight"))
    if len(corpus.ids) and corpus.ids.max() >= words:
        what = f"the tokenizer has id {corpus.ids.max()}, the model knows {words} words"
        raise UserError(what, fix="give the model its own tokenizer")
    return corpus


def _draw(
    encoder: Encoder,
    corpus: Corpus,
    metrics: Sequence[str],
    count: int,
    batch_size: int,
    attn: Attention,
    notes: list[str],
    progress: bool,
) -> Sample:
    """The sample; without attention maps where they are not to be had, which is noted."""
    if not {"graph", "bound"} & {*metrics}:
        attn = "off"
    rows = choose(corpus.usable, count)
    options = {"batch_size": batch_size, "progress": progress}
    try:
        return draw(encoder, corpus, rows, metrics, attention=attn, **options)
    except UserError as error:
        if attn == "off" or not error.what.startswith("attention maps"):
            raise
        notes.append(f"graph and bound left out: {error}")
    return draw(encoder, corpus, rows, metrics, attention="off", **options)


@torch.no_grad()
def _gates(encoder: Encoder, corpus: Corpus, fusing: Fusing, row: int) -> dict[str, Any]:
    """The weights of a gate at the tokens of one text that count."""
    batch = next(iter(corpus.batches([row], 1)))
    fusing.start()
    with capture(encoder, fusing.state):
        run_batch(encoder.model, batch)
    weights = fusing.weights(batch.mask_bn)
    if weights is None:
        return {}
    shown = weights[0, corpus.prefix :]
    if batch.counted_bn is not None:
        shown = weights[0][batch.counted_bn[0].to(weights.device)]
    return {"gate_weights": shown.float().cpu().numpy()}


def _shown_layers(encoder: Encoder) -> list[int]:
    last = len(encoder.blocks)
    return [0, last // 2, last]


def _about(
    model: PreTrainedModel, encoder: Encoder, corpus: Corpus, *, tokens: int
) -> dict[str, Any]:
    """What was analysed, with what."""
    counts = corpus.counts
    left_out = {"empty": counts.empty, "single": counts.single, "nan": counts.nan}
    texts = {"given": counts.given, "used": len(corpus.usable), "truncated": counts.truncated}
    return {
        "model": model.name_or_path or type(model).__name__,
        "family": encoder.family or model.config.model_type,
        "revision": getattr(model.config, "_commit_hash", None),
        "versions": {
            name: metadata.version(name) for name in ("bert-oversmoothing", "torch", "transformers")
        },
        "device": str(next(encoder.model.parameters()).device),
        "texts": texts | left_out,
        "tokens": tokens,
        "blocks": len(encoder.blocks),
        "width": encoder.width,
        "heads": encoder.heads,
        "order": encoder.order,
    }


def _notes(
    notes: list[str],
    encoder: Encoder,
    corpus: Corpus,
    drawn: Sample,
    zeros: int,
    metrics: Sequence[str],
) -> None:
    """What a reader has to know besides."""
    if "bound" in metrics and encoder.order == "pre":
        notes.append("pre-norm blocks: the theorem's bound is 1 or more and promises nothing")
    reasons = {encoder.unbounded(index) for index in range(len(encoder.blocks))} - {None}
    if "bound" in metrics and reasons and encoder.family is not None:
        notes.append(f"no bound for some blocks: {', '.join(sorted(map(str, reasons)))}")
    if corpus.special and {"graph", "bound"} & {*metrics}:
        notes.append("special tokens are left out of the states' measures, not of graph and bound")
    approximate = sum(graph.summary().approximate for graph in drawn.graphs)
    if approximate:
        notes.append("lambda of texts above 256 tokens is approximate, its upper bound is sound")
    if zeros:
        notes.append(f"{zeros} token states are zero, and have similarity 0 by definition")
