"""export: a trained model for use elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bert_oversmoothing.commands.opening import load_fused
from bert_oversmoothing.convert import check_new, check_writable, save_folder
from bert_oversmoothing.export import export_model
from bert_oversmoothing.module import is_run, load_tokenizer
from tenfold.errors import UserError


def export(
    ckpt: str,
    *,
    format: Literal["onnx", "pt2", "safetensors"] = "onnx",
    out: Path,
    fold: Literal["auto", "never", "always"] = "auto",
    check: bool = True,
) -> None:
    """Write a model with fusion, and compare what was written with it.

    Ids of tokens and their mask go in, or normalised pixels; logits come out. The number of texts
    and of tokens is free.

    Args:
        ckpt: a checkpoint or the folder of a run, or a folder of convert.
        format: onnx or pt2 (torch.export), a file; or safetensors, a folder for from_pretrained.
        out: file to write, or folder.
        fold: whether a concat and a linear head for questions become one map: auto where they can,
            never, or always (an error where they cannot).
        check: compare on random inputs of several sizes.
    """
    _check(out, format)
    model = load_fused(ckpt)
    if format == "safetensors":
        of_run = is_run(ckpt)
        tokenizer = load_tokenizer(ckpt) if of_run else None
        save_folder(model, out, None if of_run else ckpt, tokenizer)
        print(f"wrote the model folder {out}")
        return
    done = export_model(model, out, format, folding=fold, check=check)
    if done.folded:
        print(done.folded)
    print(f"{', '.join(done.inputs)} -> {', '.join(done.outputs)}")
    print(f"wrote {done}")


def _check(out: Path, format: str) -> None:
    """Refuse a place that cannot be written, before a model is read."""
    if format == "safetensors":
        check_new(out)
    elif out.is_dir():
        raise UserError("a folder, not a file", where=str(out), fix=f"name a file, model.{format}")
    else:
        check_writable(out)
