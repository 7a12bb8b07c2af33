"""More captions for every image, made offline by a function that a person brings along.

The paper's are translations to German and to Russian and back (section 3.10); this package has no
translator.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filip_vl.data.pairs import Pairs, Record
from filip_vl.data.writers import write_jsonl
from tenfold.errors import UserError
from tenfold.progress import track

Augment = Callable[[list[str]], Sequence[str | Sequence[str]]]
"""Gives one or several variants for each of some captions."""


@dataclass
class AugmentReport:
    """What was written.

    Attributes:
        images: lines of the file.
        captions: captions before.
        added: variants.
    """

    images: int = 0
    captions: int = 0
    added: int = 0


def augment_captions(pairs: Pairs, augment: Augment, out: Path, at_once: int = 64) -> AugmentReport:
    """Write the pairs as JSON lines whose `captions` hold the originals and their variants.

    Training draws one of them each time, each as likely as the others. A variant may equal its
    original, which then is as likely as two; blank ones are left out.

    >>> augment_captions(read_any("train.tsv"), back_translate, Path("augmented/train.jsonl"))

    Args:
        pairs: images with captions, of any reader.
        augment: see `Augment`; in a command `module:function`, see `load_callable`.
        out: a `.jsonl` file; images that are no files are written beside it.
        at_once: captions in a call of `augment`, so that a translator can use batches.

    Raises:
        UserError: `augment` gives another number of answers than captions, or something else than
            texts.
    """
    if at_once < 1:
        raise UserError(f"at_once must be at least 1, got {at_once}")
    report = AugmentReport()

    def records() -> Iterator[Record]:
        waiting: list[Record] = []
        texts = 0
        for record in track(pairs, len(pairs), "augmenting"):
            waiting.append(record)
            texts += len(record.captions)
            if texts >= at_once:
                yield from _augmented(waiting, augment, report)
                waiting, texts = [], 0
        yield from _augmented(waiting, augment, report)

    report.images = write_jsonl(records(), out)
    return report


def _augmented(
    records: Sequence[Record], augment: Augment, report: AugmentReport
) -> Iterator[Record]:
    captions = [text for record in records for text in record.captions]
    answers = list(augment(captions)) if captions else []
    if len(answers) != len(captions):
        what = f"{len(answers)} answers for {len(captions)} captions"
        raise UserError(what, where="augmenting function", fix="give one for every caption")
    report.captions += len(captions)
    rest = iter(answers)
    for record in records:
        texts = list(record.captions)
        for caption in record.captions:
            variants = _variants(next(rest), caption)
            report.added += len(variants)
            texts += variants
        yield record._replace(captions=texts)


def _variants(answer: Any, caption: str) -> list[str]:
    variants = [answer] if isinstance(answer, str) else answer
    if not isinstance(variants, list | tuple) or not all(isinstance(v, str) for v in variants):
        what = f"neither a text nor texts for {caption!r:.80}: {answer!r:.80}"
        raise UserError(what, where="augmenting function")
    return [variant for variant in variants if variant.strip()]
