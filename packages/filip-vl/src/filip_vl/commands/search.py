"""search: the images of an index that fit a text or a picture, as a table, a sheet or a page."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from numpy import ndarray

from filip_vl.commands.common import open_model, tell_unknown
from filip_vl.data import read_source
from filip_vl.index import (
    CANDIDATES,
    MOST_CANDIDATES,
    Hit,
    Query,
    QueryWord,
    TokenIndex,
    image_query,
    recall_of,
    text_query,
)
from filip_vl.index.items import seen_part
from filip_vl.model import FilipModel
from filip_vl.report import Hit as Shown
from filip_vl.report import contact_sheet
from filip_vl.tokenizers.bpe import Layout
from tenfold.console import at_least, columns
from tenfold.errors import UserError
from tenfold.plotting import check_picture, save

T = TypeVar("T")

_LAPS = 5  # of a search that is timed
_SIDE = 224  # of the pictures of the sheet
_MOST_WORDS = 10  # that have a column of the table


def search(
    *,
    index: Path,
    text: str | None = None,
    image: Path | None = None,
    k: int = 10,
    candidates: int | None = None,
    recall: bool = True,
    out: Path = Path("search.png"),
    serve: bool = False,
    host: str = "127.0.0.1",
    port: int = 8080,
    ckpt: Path | None = None,
    tokenizer: str | None = None,
    tokenizer_layout: Layout = "clip",
    max_pixels: int | None = None,
    device: str = "auto",
) -> None:
    """Find the images of an index that fit a text or a picture, and draw which patches matched.

    Args:
        index: folder of filip-vl index.
        text: what the images should show.
        image: or a picture that they should be like.
        k: how many images.
        candidates: images whose tokens are all compared, the best by their mean token; up to 1000,
            300 or -k if left out.
        recall: also compare all tokens of all images, and tell how many of the best were found.
        out: picture of the hits, each word's best patch outlined.
        serve: show a page in place of all this, to type words and to drop pictures.
        host: address of the page; any but the loopback address opens the images to others.
        port: of the page.
        ckpt: the model that built the index, if it is no longer where it was.
        tokenizer: CLIP's merges file or a folder with them, for a model that has none.
        tokenizer_layout: declip for the ids of DeCLIP's checkpoints.
        max_pixels: refuse a larger picture.
        device: auto, cpu, cuda, cuda:N or mps.
    """
    if (text is not None) + (image is not None) + serve != 1:
        raise UserError("what to look for?", fix="give one of --text WORDS, --image FILE, --serve")
    at_least(0, port=port)
    check_picture(out)
    candidates = min(max(k, CANDIDATES), MOST_CANDIDATES) if candidates is None else candidates
    tokens = TokenIndex.open(index)
    model = _model_of(tokens, ckpt, tokenizer, tokenizer_layout, device, text is not None)
    if serve:
        from filip_vl.serving import serve as show_page  # aiohttp takes a while to import

        show_page(tokens, model, host, port)
        return
    if text is not None:
        tell_unknown(model, [text])
    query, encoding = _timed(lambda: _query(model, text, image, max_pixels))
    hits, searching = _timed(lambda: tokens.search(query.tokens, k, candidates))
    print(_table(query, hits))
    found = f"{len(tokens):,} images in {1000 * (encoding + searching):.1f} ms"
    met = min(candidates, len(tokens))
    print(f"{found}: {met} by their mean token, then by all tokens")
    if recall:
        start = time.perf_counter()
        best = tokens.exact(query.tokens, k)
        taken = time.perf_counter() - start
        share = recall_of(hits, best)
        print(f"recall@{k} {share:.2f} against exact scoring, which takes {taken:.2f} s")
    heading = f"Search: {text}" if text is not None else f"Like {image and image.name}"
    picture = None
    if image is not None:
        picture = np.asarray(seen_part(read_source(image, max_pixels), _SIDE))
    save(_sheet(tokens, query, hits, heading, picture), out)
    print(f"wrote {out}")


def _model_of(
    index: TokenIndex,
    ckpt: Path | None,
    tokenizer: str | None,
    layout: Layout,
    device: str,
    texts: bool,
) -> FilipModel:
    """The model that built an index.

    Raises:
        UserError: it is not where it was, or is another.
    """
    where = Path(index.ckpt) if ckpt is None else ckpt
    if ckpt is None and not (index.ckpt and where.exists()):
        what = "the model that built the index is no longer there"
        raise UserError(what, where=index.ckpt or str(index.folder), fix="give --ckpt")
    model = open_model(where, tokenizer, layout, device, texts=texts)
    index.check_model(model)
    return model


def _query(
    model: FilipModel, text: str | None, image: Path | None, max_pixels: int | None
) -> Query:
    if text is not None:
        return text_query(model, text)
    return image_query(model, read_source(image, max_pixels))


def _timed(job: Callable[[], T]) -> tuple[T, float]:
    """What a job gives, and the seconds that it takes once all is loaded."""
    found, laps = job(), []
    for _ in range(_LAPS):
        start = time.perf_counter()
        found = job()
        laps.append(time.perf_counter() - start)
    return found, statistics.median(laps)


def _spoken(query: Query) -> list[QueryWord]:
    return [word for word in query.words if word.spoken]


def _table(query: Query, hits: Sequence[Hit]) -> str:
    """A row for each hit: score, and the similarity of each word's best patch."""
    words = _spoken(query)
    words = words if len(words) <= _MOST_WORDS else []
    rows = [["image", "score", *(word.text for word in words)]]
    for hit in hits:
        shares = [f"{hit.similarities[[*word.rows]].mean():.2f}" for word in words]
        rows.append([hit.item.key, f"{hit.score:.4f}", *shares])
    return columns(rows)


def _sheet(
    index: TokenIndex,
    query: Query,
    hits: Sequence[Hit],
    heading: str,
    picture: UInt8[ndarray, "height width 3"] | None,
) -> Figure:
    words = _spoken(query)
    shown = []
    for hit in hits:
        grid = hit.item.grid or (1, 1)
        patches = [_best_patch(index, hit, word, grid) for word in words]
        shown.append(Shown(_picture(hit), hit.score, grid, patches, hit.item.key))
    return contact_sheet([w.text for w in words], shown, heading=heading, picture=picture)


def _best_patch(
    index: TokenIndex, hit: Hit, word: QueryWord, grid: tuple[int, int]
) -> tuple[int, int] | None:
    """Row and column of the patch that is most similar to a token of a word."""
    row = max(word.rows, key=lambda n: hit.similarities[n])
    patch = int(index.patches(hit)[row])
    return None if patch < 0 or hit.item.grid is None else divmod(patch, grid[1])


def _picture(hit: Hit) -> UInt8[ndarray, "height width 3"]:
    """What the model saw of a hit; grey where the image is gone."""
    try:
        return np.asarray(seen_part(hit.item.open(), _SIDE))
    except UserError:
        return np.full((_SIDE, _SIDE, 3), 225, dtype=np.uint8)
