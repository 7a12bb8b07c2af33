"""retrieve: images look for their captions, and captions for their images."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from filip_vl.commands.common import (
    MAX_BAD_FRACTION,
    check_errors,
    encode_images,
    open_model,
    tell_truncated,
    tell_unknown,
)
from filip_vl.data import Location, Pairs, merge_images, read_any, read_karpathy, shape_pairs
from filip_vl.data.pairs import drop_blank
from filip_vl.data.sources import SplitName, source_of
from filip_vl.data.writers import text_file
from filip_vl.index.items import open_source, seen_part
from filip_vl.model import FilipModel
from filip_vl.report import Query, retrieval_sheet, save_all
from filip_vl.retrieval import Ranks, TokenSet, retrieval_metrics, retrieval_ranks
from filip_vl.synthetic import TEST_PAIRS, TEST_SEED
from filip_vl.tokenizers.bpe import Layout
from filip_vl.zeroshot import CaptionPrompt, retrieval_prompts
from tenfold.checkpoint import atomic_file
from tenfold.console import at_least, columns
from tenfold.contrastive import late_interaction
from tenfold.errors import UserError

SHAPES = "shapes"

_SHOWN, _HITS = 6, 5  # captions of the gallery, and images of each
_CHUNK = 256  # images that the captions of the gallery are compared with at a time


def retrieve(
    *,
    ckpt: Path,
    karpathy: Path | None = None,
    data: str | None = None,
    root: Path | None = None,
    split: SplitName = "test",
    prompts: Literal["flickr30k", "coco", "none"] = "none",
    out: Path = Path("retrieval"),
    source: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    tokenizer: str | None = None,
    tokenizer_layout: Layout = "clip",
    batch_size: int = 64,
    workers: int = 0,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    max_pixels: int | None = None,
    device: str = "auto",
) -> None:
    """Recall at 1, 5 and 10 in both directions, their sum, and the captions that found least.

    Args:
        ckpt: a checkpoint or the folder of a run, a model folder, or a published CLIP.
        karpathy: dataset_coco.json, dataset_flickr30k.json or another of their kind.
        data: or pairs in any other format: a table, JSON lines, shards, Parquet files; shapes for
            the generated test pairs.
        root: folder that the names of images start from; that of the file if left out.
        split: of Karpathy's JSON.
        prompts: what the paper puts around captions.
        out: folder of metrics.json, ranks.csv (of every image and caption) and failures.png.
        source: format of --data; told by its name if left out.
        image_column: of a table, JSON lines or Parquet files; each format's own if left out.
        caption_column: likewise.
        tokenizer: CLIP's merges file or a folder with them, for a model that has none.
        tokenizer_layout: declip for the ids of DeCLIP's checkpoints.
        batch_size: images that are encoded together.
        workers: processes that read images.
        max_bad_fraction: share of the images that may be unreadable; these are left out.
        max_pixels: larger images are not read.
        device: auto, cpu, cuda, cuda:N or mps.
    """
    at_least(1, batch_size=batch_size)
    at = None
    if data not in (None, SHAPES):
        at = _location(data, source, root, image_column, caption_column)
    pairs = _pairs(karpathy, data, at, root, split)
    pairs = _with_captions(merge_images(pairs))
    model = open_model(ckpt, tokenizer, tokenizer_layout, device)
    options = {"batch_size": batch_size, "workers": workers, "max_pixels": max_pixels}
    images, rows = _image_tokens(model, pairs, max_bad_fraction, options)
    pairs = pairs.pick(rows)
    around = retrieval_prompts(prompts)
    i2t_texts = _text_tokens(model, pairs, around.i2t)
    t2i_texts = i2t_texts if around.t2i == around.i2t else _text_tokens(model, pairs, around.t2i)
    groups = torch.tensor([n for n, texts in enumerate(pairs.captions) for _ in texts])
    where = model.logit_scale.device
    ranks = retrieval_ranks(images, i2t_texts, groups, device=where)
    if t2i_texts is not i2t_texts:
        others = retrieval_ranks(images, t2i_texts, groups, device=where)
        ranks = Ranks(ranks.i2t, others.t2i)
    metrics = retrieval_metrics(ranks)
    print(_table(metrics, len(images), len(groups)))
    tell_truncated(model, "captions")
    _tell_alike(model, pairs)
    out.mkdir(parents=True, exist_ok=True)
    counts = {"images": len(images), "captions": len(groups), "prompts": prompts}
    with atomic_file(out / "metrics.json") as file:
        file.write(json.dumps({**metrics, **counts}, indent=1).encode())
    _write_ranks(out / "ranks.csv", pairs, groups, ranks)
    print(f"wrote {out / 'metrics.json'} and {out / 'ranks.csv'}")
    failures = _failures(model, pairs, images, t2i_texts, groups, ranks.t2i)
    if failures:
        figure = retrieval_sheet(failures, "The captions that found their image last")
        print(f"wrote {save_all({'failures': figure}, out)[0]}")


def _pairs(
    karpathy: Path | None,
    data: str | None,
    at: Location | None,
    root: Path | None,
    split: SplitName,
) -> Pairs:
    """The pairs that the person names.

    Raises:
        UserError: none are named, or two sets, or there are none.
    """
    if (karpathy is None) == (data is None):
        raise UserError("pairs of images and captions are needed", fix="give --karpathy or --data")
    if karpathy is not None:
        pairs = read_karpathy(karpathy, split, root)
        if not pairs:
            raise UserError(f"nothing of the split {split}", where=str(karpathy))
        return pairs
    if data is None or at is None:
        return shape_pairs(TEST_SEED, TEST_PAIRS)
    return read_any(data, at, split)


def _location(
    data: str, source: str | None, root: Path | None, image: str | None, caption: str | None
) -> Location:
    if "{" not in data and not Path(data).exists():
        raise UserError("no such file or folder", where=data)
    if root is not None and not root.is_dir():
        raise UserError("no such folder", where=str(root))
    return Location(source or source_of(data), root, image, caption)


def _with_captions(pairs: Pairs) -> Pairs:
    """Pairs without blank captions.

    Raises:
        UserError: no image has a caption.
    """
    if not any(pairs.captions):
        raise UserError("the images have no captions", where=pairs.keys[0])
    return drop_blank(pairs, "the pairs")


def _image_tokens(
    model: FilipModel, pairs: Pairs, most: float, options: dict[str, Any]
) -> tuple[TokenSet, list[int]]:
    """Tokens of the images that can be read, and their rows."""
    tokens, rows, errors = TokenSet([]), [], {}
    for part in encode_images(model, pairs.images, **options):
        errors |= part.errors
        rows += part.rows
        if part.tokens is not None:
            tokens.rows += TokenSet([part.tokens]).rows
    check_errors(errors, len(pairs), most)
    if not rows:
        raise UserError("no image can be read", where=next(iter(errors.values())))
    return tokens, rows


@torch.inference_mode()
def _text_tokens(
    model: FilipModel, pairs: Pairs, prompt: CaptionPrompt, batch_size: int = 256
) -> TokenSet:
    texts = [prompt.around(text) for captions in pairs.captions for text in captions]
    parts = (texts[n : n + batch_size] for n in range(0, len(texts), batch_size))
    return TokenSet(model.encode_text(part) for part in parts)


def _tell_alike(model: FilipModel, pairs: Pairs) -> None:
    """Print what makes captions of different images the same to the model, if any are."""
    assert model.tokenizer is not None
    homes: dict[bytes, set[int]] = {}
    for row, captions in enumerate(pairs.captions):
        for ids in model.tokenizer.encode(captions, model.config.context_length).ids.numpy():
            homes.setdefault(ids.tobytes(), set()).add(row)
    alike = sum(len(rows) - 1 for rows in homes.values())
    if alike:
        what = "captions read like one of another image: a tie counts as found"
        print(f"{alike} {what}", file=sys.stderr)
    tell_unknown(model, itertools.chain.from_iterable(pairs.captions))


def _table(metrics: dict[str, float], images: int, captions: int) -> str:
    rows = [["per cent", "R@1", "R@5", "R@10"]]
    for direction, name in (("i2t", "image to text"), ("t2i", "text to image")):
        rows.append([name, *(f"{100 * metrics[f'{direction}_r{k}']:.2f}" for k in (1, 5, 10))])
    rsum = f"rsum {100 * metrics['rsum']:.2f}; {images} images, {captions} captions"
    return f"{columns(rows)}\n{rsum}"


def _write_ranks(file: Path, pairs: Pairs, groups: Int64[Tensor, " texts"], ranks: Ranks) -> None:
    """A row for each image that looked for captions, then one for each caption with its image."""
    with text_file(file) as text:
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["direction", "image", "caption", "rank"])
        for key, rank in zip(pairs.keys, ranks.i2t.tolist(), strict=True):
            table.writerow(["i2t", key, "", rank])
        rows = zip(groups.tolist(), pairs.texts(), ranks.t2i.tolist(), strict=True)
        table.writerows(["t2i", pairs.keys[home], caption, rank] for home, caption, rank in rows)


def _failures(
    model: FilipModel,
    pairs: Pairs,
    images: TokenSet,
    texts: TokenSet,
    groups: Int64[Tensor, " texts"],
    ranks: Int64[Tensor, " texts"],
) -> list[Query]:
    """The captions whose image came last, with what they found in its place."""
    worst = [n for n in ranks.argsort(descending=True, stable=True).tolist() if ranks[n] > 1]
    worst = worst[:_SHOWN]
    if not worst:
        return []
    captions = list(pairs.texts())
    scores = _scores(images, texts, torch.tensor(worst))
    queries = []
    for n, row in zip(worst, scores, strict=True):
        values, order = (x[:_HITS].tolist() for x in row.sort(descending=True, stable=True))
        home = int(groups[n])
        hits = [_picture(model, pairs, k) for k in order]
        right = [k == home for k in order]
        wanted = _picture(model, pairs, home)
        queries.append(Query(captions[n], hits, values, right, int(ranks[n]), wanted))
    return queries


@torch.no_grad()
def _scores(
    images: TokenSet, texts: TokenSet, which: Int64[Tensor, " queries"]
) -> Float[Tensor, "queries images"]:
    """s^T of some captions with all images."""
    t, t_mask = texts.padded(which)
    found = []
    for part in torch.arange(len(images)).split(_CHUNK):
        v, v_mask = images.padded(part)
        found.append(late_interaction(v, t, v_mask, t_mask)[1].T)
    return torch.cat(found, 1)


def _picture(model: FilipModel, pairs: Pairs, row: int) -> ndarray:
    return np.asarray(seen_part(open_source(pairs.images[row]), model.config.image_size))
