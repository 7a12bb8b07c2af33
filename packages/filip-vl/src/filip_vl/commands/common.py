"""What several commands need: a model with its tokenizer, images in batches, tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from filip_vl.data import eval_transform
from filip_vl.data.tokenizing import open_tokenizer
from filip_vl.data.transforms import Transform
from filip_vl.index.items import open_source
from filip_vl.model import FilipModel, TokenBatch
from filip_vl.module import load_model
from filip_vl.tokenizers.bpe import Layout
from filip_vl.tokenizers.word import UNKNOWN
from tenfold.console import at_least
from tenfold.data import BROKEN
from tenfold.device import pick_device
from tenfold.errors import UserError
from tenfold.progress import track

MAX_BAD_FRACTION = 0.01
"""Share of unreadable images above which a measurement stops."""

_NAMED, _NAMED_WORDS = 3, 10  # of what is too much to name


# -- models ------------------------------------------------------------------------------------


def open_model(
    ckpt: Path,
    tokenizer: str | None = None,
    layout: Layout = "clip",
    device: str = "auto",
    *,
    texts: bool = True,
) -> FilipModel:
    """A trained model in eval mode, on its device.

    Args:
        ckpt: see `filip_vl.module.load_model`.
        tokenizer: of the captions, in the place of the model's own; see `open_tokenizer`.
        layout: of the ids behind CLIP's merges.
        device: see `tenfold.device.pick_device`.
        texts: whether a tokenizer is needed.

    Raises:
        UserError: no model there, no such device, no tokenizer, or one of another vocabulary.
    """
    where = pick_device(device)
    if not ckpt.exists():
        fix = "give a checkpoint, the folder of a run, a model folder or a published CLIP"
        raise UserError("no such model", where=str(ckpt), fix=fix)
    model = load_model(ckpt)
    if tokenizer is not None:
        model.tokenizer = open_tokenizer(tokenizer, list, layout)
    if texts and model.tokenizer is None:
        fix = "name CLIP's merges file, or a folder with them: --tokenizer PATH"
        raise UserError("the model has no tokenizer", where=str(ckpt), fix=fix)
    return model.to(where)


def tell_truncated(model: FilipModel, what: str) -> None:
    """Print how many texts were longer than the context so far, if any were."""
    if model.tokenizer is not None and model.tokenizer.truncated:
        context = model.config.context_length
        print(f"{model.tokenizer.truncated} {what} were cut at {context} tokens")


def tell_unknown(model: FilipModel, texts: Iterable[str]) -> None:
    """Print the words that the vocabulary lacks, if there are any, beside the results."""
    tokenizer, context = model.tokenizer, model.config.context_length
    assert tokenizer is not None
    words: dict[str, None] = {}
    for text in texts:
        cleaned, spans = tokenizer.clean(text), tokenizer.spans(text, context)
        for piece, span in zip(tokenizer.tokens(text, context), spans, strict=True):
            if piece == UNKNOWN and span is not None and cleaned[span[0]].isalnum():
                words[cleaned[slice(*span)]] = None
    if words:
        more = ", ..." if len(words) > _NAMED_WORDS else ""
        named = ", ".join([*words][:_NAMED_WORDS]) + more
        print(f"not in the model's vocabulary, and all read alike: {named}", file=sys.stderr)


@contextmanager
def refused(where: str) -> Iterator[None]:
    """Values of the command line that a function of the package refuses, told to the person.

    Args:
        where: the option that they came from.

    Raises:
        UserError: the ValueError of what runs inside.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(str(error), where=where) from error


def must_be_new(folder: Path) -> None:
    """Refuse a folder that has something in it.

    Raises:
        UserError: there are files, or it is one.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fix = "choose another --out, or remove it"
        raise UserError("there are files already", where=str(folder), fix=fix)


# -- images ------------------------------------------------------------------------------------


class EncodedImages(NamedTuple):
    """Some images of a list.

    Attributes:
        rows: places in the list of those that could be read.
        tokens: of these, None where there is none.
        errors: why the others could not be read, by their places.
    """

    rows: list[int]
    tokens: TokenBatch | None
    errors: dict[int, str]


class _Images(Dataset[tuple[int, Tensor | None, str]]):
    """Place, pixels and error of every image."""

    def __init__(
        self, sources: Sequence[Any], transform: Transform, max_pixels: int | None
    ) -> None:
        self.sources, self.transform, self.max_pixels = sources, transform, max_pixels

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            picture = open_source(self.sources[index], self.max_pixels)
            return index, self.transform(picture), ""
        except BROKEN as error:
            return index, None, str(error) if isinstance(error, UserError) else repr(error)


def encode_images(
    model: FilipModel,
    sources: Sequence[Any],
    *,
    batch_size: int = 64,
    workers: int = 0,
    max_pixels: int | None = None,
) -> Iterator[EncodedImages]:
    """Tokens of images, batch by batch in their order; what cannot be read is left out and told.

    Args:
        model: its image tower, in eval mode.
        sources: see `filip_vl.index.items.open_source`.
        batch_size: images that are encoded together.
        workers: processes that read images.
        max_pixels: larger images count as unreadable.
    """
    at_least(1, batch_size=batch_size)
    at_least(0, workers=workers)
    images = _Images(sources, eval_transform(model.config.image_size), max_pixels)
    loader: Any = DataLoader(images, batch_size, num_workers=workers, collate_fn=_as_list)
    like = model.logit_scale
    for batch in track(loader, label="images, batch"):
        rows = [row for row, found, _ in batch if found is not None]
        pixels = [found for _, found, _ in batch if found is not None]
        errors = {row: error for row, found, error in batch if found is None}
        tokens = None
        if pixels:
            with torch.inference_mode():
                tokens = model.encode_image(torch.stack(pixels).to(like.device, like.dtype))
        yield EncodedImages(rows, tokens, errors)


def check_errors(errors: Mapping[int, str], total: int, most: float = MAX_BAD_FRACTION) -> None:
    """Tell how many images could not be read, and stop where they are too many.

    Args:
        errors: why, by their places.
        total: images in all.
        most: the share that may be unreadable.

    Raises:
        UserError: more of them.
    """
    if not errors:
        return
    first = "; ".join(list(errors.values())[:_NAMED])
    what = f"{len(errors)} of {total} images cannot be read"
    if len(errors) > most * total:
        fix = "mend them, or raise --max-bad-fraction to leave them out"
        raise UserError(f"{what}, more than {most:.1%}: {first}", fix=fix)
    print(f"{what} and are left out: {first}")


def _as_list(loaded: list[Any]) -> list[Any]:
    return loaded
