"""Where the pairs of a split come from: formats by name, and the files they are looked for in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from filip_vl.data import jsonl, parquet, table
from filip_vl.data.folder import read_class_captions, read_images
from filip_vl.data.karpathy import read_karpathy
from filip_vl.data.pairs import Pairs
from filip_vl.data.shards import expand_shards, places_of, read_shards
from tenfold.errors import UserError

SplitName = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Location:
    """Where pairs lie.

    Attributes:
        source: one of `FILE_SOURCES`, or `IMAGES`.
        root: folder that names of files and images start from; for names of images that of their
            table if left out.
        image_column: of tables, JSON lines and Parquet files; each format's own if left out.
        caption_column: likewise.
        separator: of tables; a tab, or a comma where the header has no tab, if left out.
        captions: whether tables and Parquet files must have captions; if not, none are read.

    Raises:
        UserError: no such source.
    """

    source: str
    root: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    separator: str | None = None
    captions: bool = True

    def __post_init__(self) -> None:
        known = *FILE_SOURCES, IMAGES
        if self.source not in known:
            fix = f"choose one of {', '.join(known)}"
            raise UserError(f"there is no source {self.source!r}", fix=fix)


class _Format(NamedTuple):
    """One format.

    Attributes:
        read: pairs of (place, split, what was found).
        names: of the files of a split, tried in this order; wild cards, {split} and {root} count.
        tree: what a root is expected to hold.
        ask: where to get such data.
    """

    read: Callable[[Location, SplitName, Sequence[str]], Pairs]
    names: Sequence[str]
    tree: str
    ask: str


def _csv(at: Location, split: SplitName, files: Sequence[str]) -> Pairs:
    image = at.image_column or table.IMAGE_COLUMN
    caption = (at.caption_column or table.CAPTION_COLUMN) if at.captions else None
    return table.read_table(Path(files[0]), at.root, image, caption, at.separator)


def _jsonl(at: Location, split: SplitName, files: Sequence[str]) -> Pairs:
    image, caption = at.image_column or jsonl.IMAGE_KEY, at.caption_column or jsonl.CAPTION_KEY
    return jsonl.read_jsonl(Path(files[0]), at.root, image, caption)


def _parquet(at: Location, split: SplitName, files: Sequence[str]) -> Pairs:
    image = at.image_column or parquet.IMAGE_COLUMN
    caption = (at.caption_column or parquet.CAPTION_COLUMN) if at.captions else None
    return parquet.read_parquet([Path(file) for file in files], image, caption)


_LISTS = (
    "the lists of CC3M and CC12M are at ai.google.com/research/ConceptualCaptions, that of YFCC at "
    "multimediacommons.org; img2dataset downloads what they name"
)
_FORMATS = {
    "csv": _Format(
        _csv,
        ("{split}.tsv", "{split}.csv"),
        """{root}/
  train.tsv                  header filepath and title, separated by tabs; val.tsv, test.tsv
  images/...                 where filepath says""",
        _LISTS,
    ),
    "jsonl": _Format(
        _jsonl,
        ("{split}.jsonl", "{split}.json"),
        """{root}/
  train.jsonl                {{"filename": "images/1.jpg", "caption": "..."}} a line; val, test
  images/...                 where filename says""",
        _LISTS,
    ),
    "karpathy": _Format(
        lambda at, split, files: read_karpathy(Path(files[0]), split, at.root),
        ("dataset_*.json", "dataset.json"),
        """{root}/
  dataset_coco.json          and train2014/*.jpg, val2014/*.jpg; or
  dataset_flickr30k.json     and flickr30k-images/*.jpg""",
        "COCO's images are at cocodataset.org, Flickr30K's are given on request by the University "
        "of Illinois (DenotationGraph); the JSON files are Karpathy's caption_datasets.zip",
    ),
    "webdataset": _Format(
        lambda at, split, files: read_shards(files),
        ("{split}*.tar", "{split}/*.tar"),
        """{root}/
  train-00000.tar ...        each KEY.jpg beside KEY.txt; val-*.tar, test-*.tar""",
        _LISTS + " and writes such shards",
    ),
    "parquet": _Format(
        _parquet,
        ("{split}*.parquet", "data/{split}*.parquet", "{split}/*.parquet"),
        """{root}/
  train*.parquet             columns image (bytes of a file) and caption; val*, test*""",
        "many sets of the Hugging Face Hub come so",
    ),
    "imagefolder": _Format(
        lambda at, split, files: read_class_captions(Path(files[0])),
        ("{split}",),
        """{root}/
  train/<class>/*.jpg        val/, test/ likewise""",
        "the name of a class is the caption of its images",
    ),
}

FILE_SOURCES = tuple(_FORMATS)
"""Formats that are read from disk."""

_OTHER_NAMES = {"val": ("val", "validation", "valid", "dev")}


def read_split(at: Location, split: SplitName, name: str | None = None) -> Pairs | None:
    """The pairs of a split; None if there is no such split and no file was named.

    Args:
        at: where they lie.
        split: which of them.
        name: of its file or files, or folder, from the root or else the current folder; the
            format's usual ones in the root if left out.

    Raises:
        UserError: a named file that is not there, no training data, or unusable files.
    """
    files = find_files(at, split, name)
    pairs = _FORMATS[at.source].read(at, split, files) if files else None
    return pairs or None


def find_files(at: Location, split: SplitName, name: str | None = None) -> list[str]:
    """The files, or the folder, of a split; see `read_split`.

    Raises:
        UserError: no such root, a named file that is not there, or nothing to train on.
    """
    if at.root is not None and not at.root.is_dir():
        raise missing(at, "no such folder")
    if name is not None:
        if at.source == "webdataset":
            return expand_shards(name, at.root)
        files = _matching(at.root or Path(), name) or _matching(Path(), name)
        if not files:
            raise UserError("no such file", where=" or ".join(places_of(name, at.root)))
        return files
    if at.root is None:
        if split == "train":
            raise UserError(f"source {at.source} needs a folder", fix="give --data.root DIR")
        return []
    for pattern in _FORMATS[at.source].names:
        for each in _OTHER_NAMES.get(split, (split,)):
            if files := _matching(at.root, pattern.format(split=each)):
                return files
    if split == "train":
        raise missing(at, f"no {' or '.join(_FORMATS[at.source].names)}".format(split="train"))
    return []


def _matching(root: Path, pattern: str) -> list[str]:
    if Path(pattern).is_absolute() or (root / pattern).exists():
        return [str(root / pattern)] if (root / pattern).exists() else []
    return [str(path) for path in sorted(root.glob(pattern))]


def missing(at: Location, what: str) -> UserError:
    """The error for a root that is missing or half unpacked: what is expected, and from where."""
    known = _FORMATS[at.source]
    tree = known.tree.format(root=at.root or ".")
    return UserError(what, where=str(at.root or "."), fix=f"expected {tree}; {known.ask}")


IMAGES = "images"
"""What `source_of` calls a folder of nothing but images."""

_BY_SUFFIX = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "karpathy",
    ".tar": "webdataset",
    ".parquet": "parquet",
}


def source_of(path: str | Path) -> str:
    """The format of a file by its name, of a folder by what lies in it (`IMAGES` for any).

    Raises:
        UserError: neither a folder nor a known name.
    """
    if Path(path).is_dir():
        kinds = {_BY_SUFFIX.get(file.suffix) for file in Path(path).iterdir()}
        return next((kind for kind in ("webdataset", "parquet") if kind in kinds), IMAGES)
    source = _BY_SUFFIX.get(Path(path).suffix.lower())
    if source is None:
        known = ", ".join(_BY_SUFFIX)
        raise UserError("no format for this name", where=str(path), fix=f"known are {known}")
    return source


def read_any(path: str | Path, at: Location | None = None, split: SplitName = "test") -> Pairs:
    """Pairs of a file or folder in any format; images alone where it is a folder of those.

    Args:
        path: a table, JSON lines, Karpathy's JSON, shards (brace ranges count), Parquet files, or a
            folder of images, shards or Parquet files.
        at: how to read it; its format is told by the name where left out.
        split: of Karpathy's JSON.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    at = at or Location(source_of(path))
    if at.source == IMAGES:
        return read_images(Path(path))
    files = files_of(path, at.source)
    pairs = _FORMATS[at.source].read(at, split, files) if files else None
    if not pairs:
        raise UserError(f"nothing of the split {split}", where=str(path))
    return pairs


def files_of(path: str | Path, source: str) -> list[str]:
    """The files that a path means: shards of a pattern or a folder, Parquet files of a folder.

    Raises:
        UserError: nothing there.
    """
    if Path(path).is_dir() and source in ("webdataset", "parquet"):
        return _matching(Path(path), "*.tar" if source == "webdataset" else "*.parquet")
    return find_files(Location(source), "test", str(Path(path).absolute()))
