"""The paper's rules for pairs from the web (section on pre-training data), over any format."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from filip_vl.data.decoding import image_size
from filip_vl.data.pairs import Pairs
from tenfold.errors import UserError
from tenfold.progress import track

RULES = (
    "empty text",
    "frequent text",
    "meaningless text",
    "other language",
    "sensitive word",
    "unreadable image",
    "small image",
    "long image",
)
"""What a pair is dropped for: the first that holds, in this order."""

_AT_ONCE = 256  # images that threads look at before the next are listed
_FILE_NAME = re.compile(
    r".*\.(?:jpe?g|png|gif|bmp|tiff?|webp|heic|svg|raw|cr2|nef|dng|psd|pdf|mov|mp4|avi|mpe?g)"
)
_NUMBERED = re.compile(
    r"(?:img|imgp|image|dscn?|dscf|dcim|dcp|pict?|picture|photo|foto|sam|gopr|mvi|vid|scan|page"
    r"|screenshot|screen shot|untitled|file|p|s|wp|pano)?[\s_#.()-]*\d[\d\s_.,:;/()-]*(?:am|pm)?"
)
_HASH = re.compile(r"(?=(?:.*\d){4})[0-9a-f]{8,}(?:[_-][0-9a-z]+)*")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+")
_NAMELESS = {"untitled", "no title", "image", "img", "photo", "picture", "n/a", "null", "none"}


def mostly_ascii(text: str, share: float = 0.9) -> bool:
    """Whether a text may be English, by a heuristic: at least a share of its letters is ASCII.

    It keeps other scripts out, not German or French: for those give a language identifier of your
    own as `FilterRules.language`.
    """
    letters = [character for character in text if character.isalpha()]
    return bool(letters) and sum(letter.isascii() for letter in letters) >= share * len(letters)


def is_meaningless(text: str) -> bool:
    """Whether a text says nothing: a file name, what a camera writes, an address, no letter.

    >>> [is_meaningless(text) for text in ("img_0.jpg", "DSC 0123", "2 dogs")]
    [True, True, False]
    """
    text = " ".join(text.casefold().split())
    if sum(character.isalpha() for character in text) < 2 or text in _NAMELESS:
        return True
    patterns = (_FILE_NAME, _NUMBERED, _HASH, _ADDRESS)
    return any(pattern.fullmatch(text) for pattern in patterns)


@dataclass(frozen=True)
class FilterRules:
    """What a pair must be like to stay.

    Attributes:
        min_side: pixels of the shorter side of its image.
        max_aspect: longer side over shorter side.
        max_repeats: times that its text may occur among all pairs; all of a more frequent one go.
        language: whether a text is in the wanted language.
        meaningless: whether a text says nothing.
        sensitive: words, in any case, that no text may have.
        rewrite: makes a text that stays another, as in replacing names of persons by `<person>`.
    """

    min_side: int = 200
    max_aspect: float = 3.0
    max_repeats: int = 10
    language: Callable[[str], bool] = mostly_ascii
    meaningless: Callable[[str], bool] = is_meaningless
    sensitive: frozenset[str] = frozenset()
    rewrite: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            UserError: a rule that lets nothing through, or everything.
        """
        if self.min_side < 0 or self.max_aspect < 1 or self.max_repeats < 1:
            numbers = f"min_side {self.min_side}, max_aspect {self.max_aspect}"
            what = f"{numbers} and max_repeats {self.max_repeats} must be at least 0, 1 and 1"
            raise UserError(what)


@dataclass
class FilterReport:
    """How many pairs, of one image and one text, came and went; an image without is one.

    Attributes:
        pairs: all.
        images: all.
        dropped: by rule; of an image with several texts each text is a pair.
        images_kept: images of which a text is left.
    """

    pairs: int
    images: int
    dropped: dict[str, int] = field(default_factory=dict)
    images_kept: int = 0

    @property
    def kept(self) -> int:
        """Pairs that are left."""
        return self.pairs - sum(self.dropped.values())

    def lines(self) -> list[str]:
        """A table to print."""
        share = 100 / max(1, self.pairs)
        rows = [("pairs", self.pairs), *self.dropped.items(), ("kept", self.kept)]
        lines = [f"{name:<18}{count:>12,}{count * share:>8.2f} %" for name, count in rows]
        return [*lines, f"{'images kept':<18}{self.images_kept:>12,} of {self.images:,}"]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        counts = {"pairs": self.pairs, "kept": self.kept, "dropped": dict(self.dropped)}
        return counts | {"images": self.images, "images_kept": self.images_kept}


Kept = dict[int, list[str]]
"""Texts that are left, by the rows of their images."""


def filter_pairs(
    pairs: Pairs, rules: FilterRules | None = None, threads: int = 8
) -> tuple[Kept, FilterReport]:
    """Apply the rules; images are opened, not decoded, and only where a text is left.

    Args:
        pairs: images with captions, of any reader.
        rules: the paper's if left out.
        threads: that look at images.

    Returns:
        What is left, and the numbers.
    """
    rules = rules or FilterRules()
    frequent = _frequent(pairs, rules.max_repeats)
    worded, dropped = _filter_texts(pairs, frequent, rules)
    kept: Kept = {}
    for row, rule in _image_rules(pairs, list(worded), rules, threads):
        if rule is None:
            kept[row] = [rules.rewrite(text) if rules.rewrite else text for text in worded[row]]
        else:
            dropped[rule] += len(worded[row])
    report = FilterReport(len(frequent), len(pairs), images_kept=len(kept))
    report.dropped = {rule: dropped[rule] for rule in RULES}
    return kept, report


def _filter_texts(
    pairs: Pairs, frequent: Bool[ndarray, " texts"], rules: FilterRules
) -> tuple[Kept, Counter[str]]:
    """Texts that break no rule, and how many broke each."""
    often = iter(frequent.tolist())
    dropped: Counter[str] = Counter()
    worded: Kept = {}
    for row, captions in enumerate(track(pairs.captions, label="filtering texts")):
        for text in captions or [""]:
            rule = _text_rule(text, next(often), rules)
            if rule is None:
                worded.setdefault(row, []).append(text)
            else:
                dropped[rule] += 1
    return worded, dropped


def _frequent(pairs: Pairs, most: int) -> Bool[ndarray, " texts"]:
    """Whether each text, one after the other, occurs too often; case and blanks do not count."""
    texts = (text for captions in pairs.captions for text in captions or [""])
    numbers = np.fromiter(map(_hash, texts), dtype=np.uint64)
    _, which, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return counts[which] > most


def _hash(text: str) -> int:
    folded = " ".join(text.casefold().split()).encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(folded, digest_size=8).digest())


def _text_rule(text: str, frequent: bool, rules: FilterRules) -> str | None:
    """The rule that a text breaks."""
    if not text.strip():
        return "empty text"
    if frequent:
        return "frequent text"
    if rules.meaningless(text):
        return "meaningless text"
    if not rules.language(text):
        return "other language"
    if rules.sensitive:
        words = re.findall(r"\w+", text.casefold())
        if not {word.casefold() for word in rules.sensitive}.isdisjoint(words):
            return "sensitive word"
    return None


def _image_rules(
    pairs: Pairs, rows: Sequence[int], rules: FilterRules, threads: int
) -> Iterator[tuple[int, str | None]]:
    """Every row with the rule that its image breaks."""

    def look(row: int) -> tuple[int, str | None]:
        return row, _image_rule(pairs.images[row], rules)

    def looked() -> Iterator[tuple[int, str | None]]:
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(rows), _AT_ONCE):
                yield from pool.map(look, rows[start : start + _AT_ONCE])

    yield from track(looked(), len(rows), "filtering images")


def _image_rule(image: Any, rules: FilterRules) -> str | None:
    try:
        width, height = image_size(image)
    except UserError:
        return "unreadable image"
    short, long = min(width, height), max(width, height)
    if short < rules.min_side:
        return "small image"
    return "long image" if long > rules.max_aspect * short else None
