"""From records to batches: pixels, ids of captions, and which belong together."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from filip_vl.data.decoding import read_source
from filip_vl.data.pairs import Pairs, Record, duplicates
from filip_vl.data.transforms import Transform
from filip_vl.tokenizers import Tokenizer
from tenfold.data import BROKEN, Draw, as_draw
from tenfold.errors import UserError
from tenfold.training import item_rng, mix

MultiPositive = Literal["none", "text", "image", "both"]
"""Which pairs besides an image's own count as right: those with the same caption, of the same
image, or either."""

WIDTH_STEP = 8
"""Batches of ids are as wide as a multiple of this."""

_CAPTION_DRAW = 0x63617074  # keeps the draw apart from all others of the same seed


class PairItem(NamedTuple):
    """One item of a batch.

    Attributes:
        image: normalised pixels.
        captions: texts of the image: one in training, all in evaluation.
        index: position in the split.
        image_id: the same for items that show the same image.
        error: why the image cannot be used; its pixels are 0 then.
    """

    image: Float[Tensor, "3 height width"]
    captions: list[str]
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    image_id: int
    error: str = ""


@dataclass
class PairBatch:
    """Images with their captions: one each in training, any number in evaluation.

    Attributes:
        image: pixels, normalised by CLIP's mean and deviation.
        ids: captions as ids, as wide as the longest of them rounded up to a multiple of 8 (exact:
            behind the end no id matters).
        captions: the same as text.
        rows: which row of `image` each caption belongs to, rising; 0, 1, 2, ... in training.
        index: position of each image in its split.
        image_id: the same for rows that show the same image, also across batches.
        text_id: of each caption, the same for captions that are the same text, also across batches
            (but for one chance in 2^63).
        targets: True where a row's image and another's caption belong together; None where only its
            own caption is right. With several ranks their ids are gathered, see `positives`.
        truncated: captions of the batch that were too long.
        duplicates: captions that are in the batch before: false negatives without `targets`.
        errors: of each image, see `PairItem`; empty but in prediction.
    """

    image: Float[Tensor, "batch 3 height width"]
    ids: Int64[Tensor, "captions length"]
    captions: list[str]
    rows: Int64[Tensor, " captions"]
    index: Int64[Tensor, " batch"]
    image_id: Int64[Tensor, " batch"]
    text_id: Int64[Tensor, " captions"]
    targets: Bool[Tensor, "batch batch"] | None = None
    truncated: int = 0
    duplicates: int = 0
    errors: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.image)

    @property
    def caption_image_id(self) -> Int64[Tensor, " captions"]:
        """The `image_id` of each caption's image, for retrieval."""
        return self.image_id[self.rows]

    @property
    def first(self) -> Int64[Tensor, " batch"]:
        """Position of each image's first caption in `captions` and `ids`."""
        numbers = torch.arange(len(self), device=self.rows.device)
        return torch.searchsorted(self.rows, numbers)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PairBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: each for name, each in values.items() if isinstance(each, Tensor)}
        return replace(self, **{name: change(each) for name, each in tensors.items()})

    def to(self, device: torch.device | str) -> "PairBatch":
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> "PairBatch":
        """The batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())


def positives(
    multi_positive: str,
    text_id: Int64[Tensor, " mine"],
    image_id: Int64[Tensor, " mine"],
    all_text_id: Int64[Tensor, " all"],
    all_image_id: Int64[Tensor, " all"],
) -> Bool[Tensor, "mine all"] | None:
    """Which captions of a batch describe which images.

    Args:
        multi_positive: see `MultiPositive`.
        text_id: of the captions of this process's images, one each.
        image_id: of its images.
        all_text_id: of the whole batch, this process's among them.
        all_image_id: likewise.

    Returns:
        Images of this process against captions of the whole batch; None for "none".
    """
    same = [text_id[:, None] == all_text_id] if multi_positive in ("text", "both") else []
    if multi_positive in ("image", "both"):
        same.append(image_id[:, None] == all_image_id)
    return torch.stack(same).any(0) if same else None


class DrawCaption:
    """One of an image's captions, each as likely as the others, by (seed, epoch, index) alone.

    Args:
        seed: of the draw.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, captions: Sequence[str], draw: Draw) -> list[str]:
        """The caption that is drawn, in a list; nothing where there is none."""
        if not captions:
            return []
        number = mix(self.seed, _CAPTION_DRAW, draw.epoch, draw.index)
        return [captions[number % len(captions)]]


def all_captions(captions: Sequence[str], draw: Draw) -> list[str]:
    """Every caption of an image, in evaluation."""
    return list(captions)


class PairItems(Dataset[PairItem]):
    """Pairs as items; what the transform draws is a function of (seed, epoch, index).

    Args:
        pairs: images and captions.
        transform: from an RGB PIL image to pixels.
        captions: chooses among the captions of an image.
        seed: of the transform.
        max_pixels: see `read_source`.
    """

    def __init__(
        self,
        pairs: Pairs,
        transform: Transform,
        captions: Callable[[Sequence[str], Draw], list[str]],
        seed: int = 0,
        max_pixels: int | None = None,
    ) -> None:
        self.pairs, self.transform, self.captions = pairs, transform, captions
        self.seed, self.max_pixels = seed, max_pixels

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Draw | int) -> PairItem:
        draw = as_draw(key)
        return self.item(self.pairs[draw.index], draw, self.pairs.image_id(draw.index))

    def item(self, record: Record, draw: Draw, image_id: int) -> PairItem:
        """The item of a record.

        Raises:
            UserError: its image cannot be used.
        """
        image = read_source(record.image, self.max_pixels)
        with item_rng(self.seed, *draw):
            pixels = self.transform(image)
        return PairItem(pixels, self.captions(record.captions, draw), draw.index, image_id)


class PredictItems(PairItems):
    """Every image has its item: one that cannot be used is black, and says why."""

    def item(self, record: Record, draw: Draw, image_id: int) -> PairItem:
        """The item of a record."""
        try:
            return super().item(record, draw, image_id)
        except BROKEN as error:
            why = str(error) if isinstance(error, UserError) else repr(error)
            black = self.transform(Image.new("RGB", (1, 1))) * 0
            return PairItem(black, list(record.captions), draw.index, image_id, why)


class PairCollate:
    """Makes a batch of items.

    Args:
        tokenizer: of the captions.
        context_length: number of ids of the longest caption; longer ones are cut.
        multi_positive: of training batches, see `MultiPositive`.

    Raises:
        UserError: an unknown `multi_positive`.
    """

    def __init__(
        self, tokenizer: Tokenizer, context_length: int, multi_positive: str = "none"
    ) -> None:
        if multi_positive not in get_args(MultiPositive):
            known = ", ".join(get_args(MultiPositive))
            raise UserError(f"multi_positive must be one of {known}, got {multi_positive!r}")
        self.tokenizer, self.context_length = tokenizer, context_length
        self.multi_positive = multi_positive

    def __call__(self, items: Sequence[PairItem]) -> PairBatch:
        """The batch."""
        captions = [text for item in items for text in item.captions]
        counts = torch.tensor([len(item.captions) for item in items])
        before = self.tokenizer.truncated
        ids, lengths = self.tokenizer.encode(captions, self.context_length)
        image_id = torch.tensor([item.image_id for item in items])
        clean = [self.tokenizer.clean(text) for text in captions]
        text_id = torch.tensor([_number(text) for text in clean], dtype=torch.int64)
        targets = None
        if self.multi_positive != "none":  # which has one caption for each image
            targets = positives(self.multi_positive, text_id, image_id, text_id, image_id)
        return PairBatch(
            image=torch.stack([item.image for item in items]),
            ids=ids[:, : _width(lengths, self.context_length)].contiguous(),
            captions=captions,
            rows=torch.repeat_interleave(torch.arange(len(items)), counts),
            index=torch.tensor([item.index for item in items]),
            image_id=image_id,
            text_id=text_id,
            targets=targets,
            truncated=self.tokenizer.truncated - before,
            duplicates=duplicates(clean),
            errors=[item.error for item in items],
        )


def _number(text: str) -> int:
    """63 bits that are the same in every process."""
    content = text.encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1


def _width(lengths: Int64[Tensor, " captions"], context_length: int) -> int:
    """The longest caption rounded up, as far as the context goes."""
    longest = int(lengths.max()) if len(lengths) else 1
    return min(context_length, -(-longest // WIDTH_STEP) * WIDTH_STEP)
