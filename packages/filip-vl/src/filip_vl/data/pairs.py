"""Images and their captions, whatever they were read from."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from tenfold.errors import UserError
from tenfold.images import ImageSource

log = logging.getLogger(__name__)


class Record(NamedTuple):
    """One image.

    Attributes:
        image: what `filip_vl.data.read_source` opens.
        captions: texts that describe it, any of which is right; none where only images are there.
        key: where it stands, such as "train.tsv:17".
    """

    image: ImageSource
    captions: Sequence[str]
    key: str


class Strings(Sequence[str]):
    """Strings in two arrays.

    A list of ten million strings would be copied, page by page, into every loading process, since
    reading an object changes its reference count.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        content, ends = bytearray(), [0]
        for string in strings:
            content += string.encode("utf-8", errors="surrogatepass")
            ends.append(len(content))
        self._content, self._ends = bytes(content), np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        n = range(len(self))[index]
        text = self._content[self._ends[n] : self._ends[n + 1]]
        return text.decode("utf-8", errors="surrogatepass")


class Captions(Sequence[Sequence[str]]):
    """Some captions for every image, in arrays as in `Strings`."""

    def __init__(self, captions: Iterable[Sequence[str]]) -> None:
        counts: list[int] = []

        def flat() -> Iterator[str]:
            for texts in captions:
                counts.append(len(texts))
                yield from texts

        self.texts = Strings(flat())
        """All of them, one after the other."""
        self._ends = np.array([0, *accumulate(counts)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> list[str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[str]]: ...
    def __getitem__(self, index: int | slice) -> list[str] | list[list[str]]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        n = range(len(self))[index]
        return self.texts[int(self._ends[n]) : int(self._ends[n + 1])]


class Picked(Sequence[Any]):
    """Some entries of a sequence, by their positions, any number of times."""

    def __init__(self, sequence: Sequence[Any], positions: Int64[ndarray, " items"]) -> None:
        self._sequence, self._positions = sequence, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        return self._sequence[int(self._positions[index])]


class Computed(Sequence[Any]):
    """A sequence whose entries are made when they are looked at, and not kept."""

    def __init__(self, count: int, entry: Callable[[int], Any]) -> None:
        self._numbers, self._entry = range(count), entry

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        numbers = self._numbers[index]
        if isinstance(numbers, range):
            return [self._entry(number) for number in numbers]
        return self._entry(numbers)


@dataclass(frozen=True)
class Pairs:
    """The images of one split with their captions; indexing gives a `Record`.

    Attributes:
        images: see `Record`.
        captions: likewise.
        keys: likewise.
        image_ids: which rows show the same image; each row another if left out.
    """

    images: Sequence[ImageSource]
    captions: Sequence[Sequence[str]]
    keys: Sequence[str]
    image_ids: Int64[ndarray, " items"] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return Record(self.images[index], self.captions[index], self.keys[index])

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def image_id(self, index: int) -> int:
        """The same number for rows that show the same image."""
        return index if self.image_ids is None else int(self.image_ids[index])

    def texts(self) -> Iterator[str]:
        """All captions."""
        return (text for captions in self.captions for text in captions)

    def pick(self, positions: Sequence[int] | Int64[ndarray, " picked"]) -> "Pairs":
        """Some rows, by their positions; they keep their image ids."""
        rows = np.asarray(positions, dtype=np.int64)
        ids = rows if self.image_ids is None else self.image_ids[rows]
        columns = (Picked(column, rows) for column in (self.images, self.captions, self.keys))
        return Pairs(*columns, image_ids=ids)


def gather(records: Iterable[Record | tuple[ImageSource, Sequence[str], str]]) -> Pairs:
    """Pairs of records that come one after the other; images that are paths are kept in arrays."""
    images: list[ImageSource] = []
    keys: list[str] = []

    def captions() -> Iterator[Sequence[str]]:
        for image, texts, key in records:
            images.append(str(image) if isinstance(image, Path) else image)
            keys.append(key)
            yield texts

    texts = Captions(captions())
    paths = all(isinstance(image, str) for image in images)
    return Pairs(Strings(images) if paths else images, texts, Strings(keys))


def drop_blank(pairs: Pairs, split: str, strict: bool = False) -> Pairs:
    """Leave out captions without a word, and images that have no other; their number is logged.

    Args:
        pairs: images with captions.
        split: what they are, for the log.
        strict: refuse a blank caption instead.

    Raises:
        UserError: `strict`, and a caption is blank; names its file and row. Or nothing is left.
    """
    kept, captions, blank = [], [], 0
    for index, texts in enumerate(pairs.captions):
        worded = [text for text in texts if text.strip()]
        if strict and (len(worded) < len(texts) or not texts):
            fix = "mend it, or leave out --data.strict to drop such pairs"
            raise UserError(f"empty caption in {split}", where=pairs.keys[index], fix=fix)
        blank += max(len(texts), 1) - len(worded)
        if worded:
            kept.append(index)
            captions.append(worded)
    if not blank:
        return pairs
    log.warning("%d of the captions of %s were dropped as empty", blank, split)
    check_worded(pairs, split)
    return replace(pairs.pick(kept), captions=Captions(captions))


def check_worded(pairs: Pairs, split: str) -> None:
    """Looks whether any caption has a word.

    Args:
        pairs: at least one.
        split: what they are, for the error.

    Raises:
        UserError: none has; names the place of the first.
    """
    if not any(text.strip() for text in pairs.texts()):
        raise UserError(f"every caption of {split} is empty", where=f"from {pairs.keys[0]} on")


def merge_images(pairs: Pairs) -> Pairs:
    """One row for every image, with the captions of all rows that name its file.

    Images that are not files stay as they are: nothing tells that two of them are the same.
    """
    first: dict[str, int] = {}
    homes = np.arange(len(pairs))
    for index, image in enumerate(pairs.images):
        if isinstance(image, str | Path):
            homes[index] = first.setdefault(str(image), index)
    if len(np.unique(homes)) == len(pairs):
        return replace(pairs, image_ids=None)
    rows: dict[int, list[str]] = {}
    for index, home in enumerate(homes.tolist()):
        rows.setdefault(home, []).extend(pairs.captions[index])
    merged = pairs.pick(sorted(rows))
    return replace(merged, captions=Captions(rows[n] for n in sorted(rows)), image_ids=None)


def unroll(pairs: Pairs) -> Pairs:
    """One row for every caption, so that an epoch meets them all; rows know their image."""
    counts = [len(captions) for captions in pairs.captions]
    rows = np.repeat(np.arange(len(pairs), dtype=np.int64), counts)
    return replace(pairs.pick(rows), captions=Captions([text] for text in pairs.texts()))


def duplicates(texts: Iterable[str]) -> int:
    """How many texts are there again: 2 for a, b, a, b."""
    return sum(count - 1 for count in Counter(texts).values())
