"""JSON lines: an object with a file name and its captions on every line."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filip_vl.data.pairs import Pairs, gather
from tenfold.errors import UserError

IMAGE_KEY, CAPTION_KEY, CAPTIONS_KEY = "filename", "caption", "captions"


class Line(NamedTuple):
    """One object, and its place."""

    content: dict[str, Any]
    number: int


def read_jsonl(
    file: Path,
    root: Path | None = None,
    image_key: str = IMAGE_KEY,
    caption_key: str = CAPTION_KEY,
) -> Pairs:
    """The lines of a file: {"filename": ..., "caption": text or texts}.

    Several texts may also stand under `captions`, which goes first. Other keys are not read.

    Args:
        file: JSON lines in UTF-8; empty lines do not count.
        root: folder that file names start from; that of `file` if left out.
        image_key: of file names.
        caption_key: of captions.

    Raises:
        UserError: no such file, a line that is no such object, or no line at all.
    """
    base = str(file.parent if root is None else root)

    def records() -> Iterator[tuple[str, Sequence[str], str]]:
        for content, number in read_lines(file):
            where = f"{file}:{number}"
            name = content.get(image_key)
            if not isinstance(name, str) or not name:
                there = ", ".join(content) or "none"
                raise UserError(f"no file name under {image_key!r}; keys: {there}", where=where)
            texts = captions_of(content, caption_key, where)
            yield os.path.join(base, name), texts, f"{file.name}:{number}"

    pairs = gather(records())
    if not len(pairs):
        raise UserError("the file has no line", where=str(file))
    return pairs


def read_lines(file: Path) -> Iterator[Line]:
    """The objects of a file, whatever they hold.

    Raises:
        UserError: no such file, or a line that is no JSON object.
    """
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for number, text in enumerate(stream, 1):
                if not text.strip():
                    continue
                content = json.loads(text)
                if not isinstance(content, dict):
                    raise UserError("no JSON object", where=f"{file}:{number}")
                yield Line(content, number)
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=str(file)) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"no JSON: {error}", where=f"{file}:{number}") from error


def captions_of(content: dict[str, Any], caption_key: str, where: str) -> list[str]:
    """Captions of an object: those of `captions`, else what stands under `caption_key`, else none.

    Raises:
        UserError: neither a text nor texts.
    """
    texts = content.get(CAPTIONS_KEY, content.get(caption_key))
    texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"neither a caption nor a list of them: {texts!r:.80}", where=where)
    return texts
