"""convert: a plain model as a model with fusion, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bert_oversmoothing.commands.opening import load_fused
from bert_oversmoothing.convert import check_new, save_folder, to_fusion, to_plain
from bert_oversmoothing.fusion.layers import check_kind
from bert_oversmoothing.module import is_run, load_tokenizer
from tenfold.console import at_least
from tenfold.errors import UserError

Task = Literal["classification", "choice", "qa", "tokens", "image", "mlm"]


def convert(
    src: str,
    out: Path,
    *,
    to: Literal["fusion", "plain"] = "fusion",
    task: Task | None = None,
    fusion: str = "gate",
    layers: str | list[int] = "all",
    init: Literal["identity", "random"] = "identity",
    include_embeddings: bool = True,
    gate_kind: Literal["softmax", "sigmoid", "channel"] = "softmax",
    gate_shared: bool = False,
    norm_each: Literal["auto", "none"] = "auto",
    num_labels: int | None = None,
    ignore_mismatched_sizes: bool = False,
    trust_remote_code: bool = False,
    force_last: bool = False,
) -> None:
    """Put a fusion between the encoder and the head of a plain model, or take it out again.

    A new fusion starts as the identity: the model answers as before, to the bit. The files of the
    tokenizer go along. The folder appears when all is written, or not at all.

    Args:
        src: folder or hub id of a plain model; with --to plain of one with fusion, or a run.
        out: model folder to write; it must be new or empty.
        to: fusion or plain. Plain is exact only while the fusion is the identity, or a concat that
            reads the last layer alone; anything else is refused.
        task: of the head; one that is not stored gets random weights.
        fusion: concat, max, gate, scalar_mix, mean, last or best_layer(i).
        layers: all, last:k, every:k, or numbers from 0 (the embeddings) up, as [0,6,12].
        init: identity, or random for an encoder that is to be trained from scratch.
        include_embeddings: whether layer 0 may be among the layers.
        gate_kind: softmax over the layers, independent sigmoid gates, or softmax by channel.
        gate_shared: one gate for all layers.
        norm_each: auto applies the final norm of a pre-norm encoder to every layer first.
        num_labels: of the head; that of the plain model if left out.
        ignore_mismatched_sizes: give a stored head of another size random weights.
        trust_remote_code: run code that comes with the encoder.
        force_last: with --to plain, drop a trained fusion; the answers change.
    """
    check_new(out)
    at_least(1, num_labels=num_labels)
    if to == "plain":
        plain = to_plain(load_fused(src), force_last=force_last)
        of_run = is_run(src)
        files = save_folder(
            plain, out, None if of_run else src, load_tokenizer(src) if of_run else None
        )
        kind = type(plain).__name__
    else:
        check_kind(fusion)
        if task is None:
            fix = "choose classification, choice, qa, tokens, image or mlm"
            raise UserError("the task of the head is not given", where="--task", fix=fix)
        options = {
            "layers": layers,
            "init": init,
            "include_embeddings": include_embeddings,
            "gate_kind": gate_kind,
            "gate_shared": gate_shared,
            "norm_each": norm_each,
            "num_labels": num_labels,
            "ignore_mismatched_sizes": ignore_mismatched_sizes,
            "trust_remote_code": trust_remote_code,
        }
        print(f"reading {src}", flush=True)
        model = to_fusion(src, task, fusion, **options)
        files = save_folder(model, out, src)
        kind = type(model).__name__
        added = sum(parameter.numel() for parameter in model.fusion_parameters())
        more = "1 parameter more" if added == 1 else f"{added:,} parameters more"
        print(f"{model.config.fusion} of layers {model.config.layers}: {more}")
    if not files:
        print("no tokenizer beside the weights: copy its files into the folder")
    print(f"wrote the model folder {out}, a {kind}")
