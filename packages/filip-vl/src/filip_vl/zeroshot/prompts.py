"""What stands around a label or a caption: the paper's prompts, and those of a person's file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tenfold.errors import UserError

SLOT = "{}"
"""Where the label goes in a template."""

Average = Literal["micro", "macro"]


class PromptTable(NamedTuple):
    """The prompts of one data set: all combinations of three lists (appendix of the paper).

    Attributes:
        prefixes: before the label.
        descriptions: behind it, what kind of thing it is.
        suffixes: a sentence of its own.
        average: "macro" where the set's accuracy is the mean over its classes.
    """

    prefixes: tuple[str, ...]
    descriptions: tuple[str, ...]
    suffixes: tuple[str, ...]
    average: Average

    def templates(self) -> list[str]:
        """All combinations, those of one prefix and description side by side."""
        return [
            compose(prefix, SLOT, description, suffix)
            for prefix in self.prefixes
            for description in self.descriptions
            for suffix in self.suffixes
        ]


class CaptionPrompt(NamedTuple):
    """What stands around a caption in retrieval."""

    prefix: str = ""
    suffix: str = ""

    def around(self, caption: str) -> str:
        """The caption with its prefix, and its suffix as a sentence behind it."""
        text = " ".join(part for part in (self.prefix, caption.strip()) if part)
        if not self.suffix:
            return text
        return f"{text}{'' if text.endswith(('.', '!', '?')) else '.'} {self.suffix}"


class RetrievalPrompts(NamedTuple):
    """Prompts of one data set.

    Attributes:
        i2t: where images look for captions.
        t2i: where captions look for images.
    """

    i2t: CaptionPrompt
    t2i: CaptionPrompt


def compose(prefix: str, label: str, description: str = "", suffix: str = "") -> str:
    """One prompt: "{prefix} {label}, {description}. {suffix}." (section 3.7 of the paper).

    Empty parts are left out, and so is the punctuation that would join them.

    >>> compose("itap of a", "cat", suffix="I like it")
    'itap of a cat. I like it.'
    """
    named = " ".join(part for part in (prefix, label) if part)
    described = ", ".join(part for part in (named, description) if part)
    return " ".join(f"{part}." for part in (described, suffix) if part)


def prompt_table(name: str) -> PromptTable:
    """The paper's prompts for a data set.

    Args:
        name: such as "imagenet" or "Oxford-Pets"; case and punctuation do not matter.

    Raises:
        UserError: the paper has none for this name.
    """
    row = _find(name, _tables()["classification"], "prompts")
    lists = (tuple(row[part]) for part in ("prefixes", "descriptions", "suffixes"))
    return PromptTable(*lists, average=row["average"])


def prompt_names() -> list[str]:
    """The data sets that have a `prompt_table`."""
    return list(_tables()["classification"])


def retrieval_prompts(name: str) -> RetrievalPrompts:
    """What the paper puts around the captions of a data set; "none" for nothing.

    Args:
        name: "flickr30k", "coco" or "none".

    Raises:
        UserError: another name.
    """
    if name == "none":
        return RetrievalPrompts(CaptionPrompt(), CaptionPrompt())
    row = _find(name, _tables()["retrieval"], "prompts for retrieval", extra=["none"])
    return RetrievalPrompts(CaptionPrompt(**row["i2t"]), CaptionPrompt(**row["t2i"]))


def read_templates(source: str | Path | Sequence[str]) -> list[str]:
    """Templates by the name of a data set, from a file, or as they are.

    Args:
        source: a name of `prompt_names`; a text file with a template a line, empty lines left out;
            or the templates.

    Raises:
        ValueError: no template, or some without `{}`, which are listed.
        UserError: neither a data set nor a file.
    """
    if isinstance(source, str | Path):
        lines = _lines(source, "templates", prompt_names())
        source = prompt_table(str(source)).templates() if lines is None else lines
    templates = list(source)
    check_templates(templates)
    return templates


def read_classes(source: str | Path | Sequence[str]) -> list[str]:
    """Class names by the name of a data set, from a file or a folder, or as they are.

    Args:
        source: a name of `class_sets`; a text file with a name a line, in the order of the labels;
            a folder with one folder a class, taken in alphabetical order, underscores read as
            blanks; or the names.

    Raises:
        ValueError: no name, or the same one twice, which are listed.
        UserError: neither a data set, nor a file, nor a folder.
    """
    if isinstance(source, str | Path):
        lines = _lines(source, "class names", class_sets())
        classes = list(_find(str(source), _classes(), "class names") if lines is None else lines)
    else:
        classes = list(source)
    check_classes(classes)
    return classes


def class_sets() -> list[str]:
    """The data sets whose class names are known."""
    return list(_classes())


def fill(template: str, label: str) -> str:
    """A template with a label in every `{}`; other braces stay as they are."""
    return template.replace(SLOT, label)


def check_templates(templates: Sequence[str]) -> None:
    """Refuse templates that cannot be filled.

    Raises:
        ValueError: none at all, or some without `{}`, which are listed.
    """
    if not templates:
        raise ValueError("there is no template")
    unfillable = [template for template in templates if SLOT not in template]
    if unfillable:
        raise ValueError(f"templates without {SLOT}, the label's place: {_shown(unfillable)}")


def check_classes(classes: Sequence[str]) -> None:
    """Refuse class names that do not name classes.

    Raises:
        ValueError: none at all, or duplicates, which are listed; case and white space do not
            make a difference, as they make none to a tokenizer.
    """
    if not classes:
        raise ValueError("there is no class name")
    counts = Counter(" ".join(name.lower().split()) for name in classes)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"class names that occur more than once: {_shown(twice)}")


def _shown(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _lines(source: str | Path, what: str, names: Sequence[str]) -> list[str] | None:
    """Lines of a file that are not empty, or a folder's folders; None for one of the names."""
    if _key(str(source)) in {_key(name) for name in names}:
        return None
    if Path(source).is_dir():
        folders = sorted(path.name for path in Path(source).iterdir() if path.is_dir())
        return [name.replace("_", " ") for name in folders]
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fix = f"give a text file with one a line, or choose {', '.join(names)}"
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"no {what} there: {why}", where=str(source), fix=fix) from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _find(name: str, known: dict[str, Any], what: str, extra: Sequence[str] = ()) -> Any:
    for key, value in known.items():
        if _key(key) == _key(name):
            return value
    fix = f"choose {', '.join([*known, *extra])}"
    raise UserError(f"there are no {what} of the name {name!r}", fix=fix)


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


@cache
def _tables() -> dict[str, dict[str, Any]]:
    return _packaged("prompts.yaml")


@cache
def _classes() -> dict[str, list[str]]:
    return _packaged("classes.yaml")


def _packaged(name: str) -> dict[str, Any]:
    import yaml  # here, so that --help does not pay for it

    return yaml.safe_load((resources.files("filip_vl.zeroshot") / name).read_text(encoding="utf-8"))
