"""How fast and how lean: the loss, zero-shot scores, an index of 100,000 images."""

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.results import Results, markdown, work_folder
from filip_vl.commands.bench_loss import Cost, Pairs, make_pairs, measure
from filip_vl.comparison import RECIPES, fit_recipe
from filip_vl.index import (
    TokenIndex,
    build_index,
    image_query,
    recall_of,
    scene_images,
    text_query,
)
from filip_vl.index.build import index_format
from filip_vl.index.items import Item
from filip_vl.index.meta import IndexMeta
from filip_vl.index.writer import IndexWriter, Rows
from filip_vl.model import FilipModel, TokenBatch
from filip_vl.synthetic import TEST_SEED, scene
from filip_vl.tokenizers import WordTokenizer
from filip_vl.zeroshot import ZeroShotClassifier
from filip_vl.zeroshot.classifier import Sharing
from filip_vl.zeroshot.prompts import fill, prompt_table
from tenfold.device import time_interleaved
from tenfold.errors import UserError

README = Path("packages/filip-vl/README.md")
PATCHES, WORDS, DIM = 49, 77, 256
SIZES = (64, 256)
LARGE = 1024
"""A batch that the written equations cannot hold (50 GiB)."""
IMAGES = 100_000
SHARING: tuple[Sharing, ...] = ("none", "prefix", "tree")
CANDIDATES = (300, 1000)
QUERIES = 20


def run(seeds: int = 1, only: str | None = None) -> None:
    """Measures everything anew, or one part, and writes the tables.

    Args:
        seeds: not used; a time has no seed.
        only: "loss", "zeroshot" or "index".

    Raises:
        UserError: no such part.
    """
    parts = {"loss": loss, "zeroshot": zeroshot, "index": index}
    if only not in (None, *parts):
        raise UserError(f"no part is called {only!r}", fix=f"there is {', '.join(parts)}")
    results = Results("speed", "filip-vl")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in [only] if only else parts:
            results.runs[name] = parts[name]()
            results.write()
            print(name, "done", flush=True)
    finally:
        torch.set_num_threads(threads)
    results.publish(README, tables(results.content))


# -- loss --------------------------------------------------------------------------------------


def loss() -> dict[str, Any]:
    """Forward and backward of the loss on one thread, CPU seconds and extra memory."""
    measure(pairs(16), "tiled")  # what a first call loads is not its cost
    found: dict[str, Any] = {str(batch): _both(batch) for batch in SIZES}
    found[str(LARGE)] = {"tiled": _plain(measure(pairs(LARGE), "tiled"))}
    return found


def pairs(batch: int) -> Pairs:
    """Tokens of a batch with captions as the web has them: 3 + Poisson(11) words."""
    return make_pairs(batch, PATCHES, WORDS, 14, DIM)


def _both(batch: int) -> dict[str, Any]:
    naive, tiled = (measure(pairs(batch), impl, 3) for impl in ("naive", "tiled"))
    apart = [(a - b).abs().max() for a, b in zip(naive.gradients, tiled.gradients, strict=True)]
    return {
        "naive": _plain(naive),
        "tiled": _plain(tiled),
        "loss apart": abs(naive.loss - tiled.loss),
        "gradient apart": float(max(apart)),
    }


def _plain(cost: Cost) -> dict[str, float | None]:
    return {"seconds": cost.seconds, "peak_mib": cost.mib}


# -- zero-shot ---------------------------------------------------------------------------------


@torch.no_grad()
def zeroshot() -> dict[str, Any]:
    """32 images against 1,200 prompts: 40 classes with the 30 templates of ImageNet.

    The rival multiplies all tokens with all, padding included, and hides it before the maximum.
    """
    names = [f"name{n} kind{n}" for n in range(40)]
    templates = prompt_table("imagenet").templates()
    tokenizer = WordTokenizer.train([fill(t, name) for t in templates for name in names])
    sizes = {"embed_dim": DIM, "context_length": WORDS}
    model = FilipModel.from_config("filip_tiny", tokenizer=tokenizer, **sizes).eval()
    ways = {way: ZeroShotClassifier(model, names, templates, sharing=way) for way in SHARING}
    ids, lengths = tokenizer.encode(ways["none"].prompts, WORDS)
    text = model.encode_text(ids)
    t, hidden = text.normalized(), ~text.mask[None, :, None]
    torch.manual_seed(0)
    image = TokenBatch(torch.randn(32, PATCHES, DIM), torch.ones(32, PATCHES, dtype=torch.bool))
    v = image.normalized()

    def padded() -> Tensor:
        products = torch.einsum("ind,jmd->ijnm", v, t)
        return products.masked_fill(hidden, -torch.inf).amax(3).mean(2)

    steps: dict[str, Callable[[], Tensor]] = {"padded": padded}
    steps |= {way: partial(ways[way].prompt_scores, image) for way in ways}
    apart = max(float((padded() - steps[way]()).abs().max()) for way in ways)
    times = time_interleaved(steps, warmup=1, repeats=7)
    return {
        "ms": {name: timing.median_ms for name, timing in times.items()},
        "apart": apart,
        "prompts": len(ids),
        "words": float(lengths.double().mean()),
    }


# -- index -------------------------------------------------------------------------------------


def index() -> dict[str, Any]:
    """An index of generated scenes, and one of random tokens as many and wide as FILIP-base's."""
    work = work_folder("filip-vl")
    model = fit_recipe(RECIPES["FILIP"], work / "shapes" / "filip-0", steps=600)
    folder = work / "index"
    shutil.rmtree(folder, ignore_errors=True)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of what went before is forgotten
    peaks, start = {}, time.perf_counter()
    for count in (IMAGES // 10, IMAGES):
        build_index(model, scene_images(count, seed=3), folder / "scenes")
        lines = Path("/proc/self/status").read_text().splitlines()
        peaks[str(count)] = next(int(x.split()[1]) / 1024 for x in lines if "VmHWM" in x)
    seconds = time.perf_counter() - start
    scenes, wide = TokenIndex.open(folder / "scenes"), _wide_index(model, folder / "wide")
    drawn = [scene(TEST_SEED, n) for n in range(QUERIES)]
    texts = [text_query(model, made.caption).tokens for made in drawn]
    pictures = [image_query(model, Image.fromarray(made.image)).tokens for made in drawn]
    noise = [unit_rows(14, seed) for seed in range(QUERIES)]
    asked = {"caption": (scenes, texts), "picture": (scenes, pictures), "base width": (wide, noise)}
    found = {name: _search(*given) for name, given in asked.items()}
    shutil.rmtree(folder)
    return {"build_s": seconds, "peak_mib": peaks, "images": IMAGES, "search": found}


def unit_rows(count: int, seed: int) -> Tensor:
    """Random tokens of the base model's width."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, DIM, generator=generator), dim=1)


def _wide_index(model: FilipModel, folder: Path) -> TokenIndex:
    format = replace(index_format(model, "fp16", 1.0), width=DIM, tokens_per_image=PATCHES)
    with IndexWriter.open(folder, IndexMeta(format)) as writer:
        for first in range(0, IMAGES, 1000):
            tokens = unit_rows(1000 * PATCHES, first)
            means = F.normalize(tokens.view(1000, PATCHES, DIM).mean(1), dim=1)
            items = [Item(str(first + n)) for n in range(1000)]
            places = np.tile(np.arange(PATCHES), 1000)
            counts = np.full(1000, PATCHES)
            writer.append(Rows(items, counts, tokens.numpy(), places, means.numpy()))
        writer.commit(complete=True)
    return TokenIndex.open(folder)


def _search(opened: TokenIndex, queries: list[Tensor]) -> dict[str, Any]:
    """Milliseconds of a query and recall@10 against exact scores, by the number of candidates."""
    best = [opened.exact(tokens, 10) for tokens in queries]
    found = {}
    for candidates in CANDIDATES:
        times, recalls = [], []
        for tokens, right in zip(queries, best, strict=True):
            start = time.perf_counter()
            hits = opened.search(tokens, 10, candidates)
            times.append(1000 * (time.perf_counter() - start))
            recalls.append(recall_of(hits, right))
        found[str(candidates)] = {
            "ms": median(times),
            "slowest_ms": max(times),
            "recall": mean(recalls),
        }
    return found


# -- tables ------------------------------------------------------------------------------------


def tables(content: dict[str, Any]) -> str:
    """The README's tables of speed, of the parts that were measured."""
    runs = content["runs"]
    parts = {"loss": loss_table, "zeroshot": zeroshot_table, "index": index_table}
    texts = [make(runs[name]) for name, make in parts.items() if name in runs]
    return "\n\n".join([*texts, f"One thread of {content['machine']['cpu']}."])


def loss_table(found: dict[str, Any]) -> str:
    """Time and memory of the loss by batch."""
    rows = []
    for batch, run in sorted(found.items(), key=_number):
        slow, fast = run.get("naive"), run["tiled"]
        rows.append(
            [
                batch,
                f"{slow['seconds']:.3g} s" if slow else "",
                f"{fast['seconds']:.3g} s",
                f"{slow['seconds'] / fast['seconds']:.1f}x" if slow else "",
                f"{slow['peak_mib']:.0f} MiB" if slow else "(50 GiB)",
                f"{fast['peak_mib']:.0f} MiB",
                f"{slow['peak_mib'] / fast['peak_mib']:.0f}x" if slow else "",
            ]
        )
    head = ["batch", "written down", "tiled", "faster", "extra memory", "tiled", "less"]
    largest = max(run.get("gradient apart", 0.0) for run in found.values())
    return (
        f"The loss, forward and backward, CPU seconds: {PATCHES} patches, captions of 14 words on "
        f"average padded to {WORDS}, width {DIM}. Gradients differ by at most {largest:.1g}.\n\n"
        + markdown(head, rows)
    )


def zeroshot_table(found: dict[str, Any]) -> str:
    """Times of zero-shot scores by what prompts share."""
    names = {
        "padded": "all padded tokens at once",
        "none": "packed",
        "prefix": "packed, prefixes shared",
        "tree": "packed, all beginnings shared (default)",
    }
    slow = found["ms"]["padded"]
    rows = [
        [name, f"{found['ms'][way]:,.0f} ms", f"{slow / found['ms'][way]:.1f}x"]
        for way, name in names.items()
    ]
    return (
        f"Zero-shot scores of 32 images and {found['prompts']:,} prompts of {found['words']:.1f} "
        f"tokens, which differ by at most {found['apart']:.1g}:\n\n"
        + markdown(["prompts", "time", "faster"], rows)
    )


def index_table(found: dict[str, Any]) -> str:
    """Time of a search and recall of its prefilter."""
    kinds = {
        "caption": "captions, scenes (36 x 32)",
        "picture": "pictures, scenes (36 x 32)",
        "base width": f"14 random tokens, random images ({PATCHES} x {DIM})",
    }
    rows = [
        [
            name,
            candidates,
            f"{run['ms']:.3g} ms",
            f"{run['slowest_ms']:.3g} ms",
            f"{run['recall']:.2f}",
        ]
        for kind, name in kinds.items()
        for candidates, run in sorted(found["search"][kind].items(), key=_number)
    ]
    few, many = (f"{peak:.0f}" for peak in found["peak_mib"].values())
    head = ["queries", "candidates", "median", "slowest", "recall@10"]
    return (
        f"An index of {found['images']:,} images. That of the generated scenes took "
        f"{found['build_s']:.0f} s to build; the process held at most {few} MiB for the first "
        f"tenth and {many} MiB for the whole. Searches, process loaded, and the prefilter's recall "
        "against exact scores of all images (random tokens have no neighbours to recall):\n\n"
        + markdown(head, rows)
    )


def _number(entry: tuple[str, Any]) -> int:
    """What entries are sorted by: JSON has no numbers as keys."""
    return int(entry[0])
