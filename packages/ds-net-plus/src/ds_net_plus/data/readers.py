"""Released layouts on disk -> splits: where each image is, and its class."""

import io
import itertools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.errors import UserError

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}


@dataclass(frozen=True)
class Split:
    """Images of one split.

    Attributes:
        sources: paths, {"bytes", "path"} entries or uint8 arrays (H, W, 3).
        labels: class of every image.
        names: class names.
    """

    sources: Sequence[Any]
    labels: Sequence[int]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Checks that labels are classes.

        Raises:
            UserError: naming the first image whose label is not.
        """
        for index, label in enumerate(self.labels):
            if not 0 <= label < len(self.names):
                raise UserError(
                    f"label {label} of image {index} lies outside 0..{len(self.names) - 1}",
                    fix="look at the labels, or at the number of classes",
                )


Splits = dict[str, Split]

_TREES = {
    "imagenet": """{root}/
  train/<wnid>/*.JPEG        1000 folders
  val/<wnid>/*.JPEG          (or validation/) the same 1000 folders""",
    "imagefolder": """{root}/
  train/<class>/*.jpg
  val/<class>/*.jpg          (or validation/; test/ if there is one)""",
    "cifar10": """{root}/
  cifar-10-batches-py/data_batch_1 .. data_batch_5, test_batch, batches.meta""",
    "cifar100": """{root}/
  cifar-100-python/train, test, meta""",
    "parquet": """{root}/
  train*.parquet, test*.parquet (or val*, validation*), columns image and label""",
}
_FROM = {
    "imagenet": "ask image-net.org for ILSVRC2012",
    "cifar10": "get cifar-10-python.tar.gz from its authors' page and unpack it",
    "cifar100": "get cifar-100-python.tar.gz from its authors' page and unpack it",
}


def missing(source: str, root: Path, what: str) -> UserError:
    """The error for a root that is missing or half unpacked: what is expected, and from where."""
    tree = _TREES[source].format(root=root)
    fix = f"expected {tree}" + (f"; {_FROM[source]}" if source in _FROM else "")
    return UserError(what, where=str(root), fix=fix)


def read_folders(root: Path, source: str = "imagefolder") -> Splits:
    """One folder per class under train and val (or validation), and test if there is one.

    Classes are the sorted folder names.

    Raises:
        UserError: a missing folder, or splits whose classes differ (the first are named).
    """
    found = {
        split: next((root / name for name in names if (root / name).is_dir()), None)
        for split, names in (
            ("train", ("train",)),
            ("val", ("val", "validation", "valid")),
            ("test", ("test",)),
        )
    }
    if found["train"] is None or (found["val"] is None and found["test"] is None):
        raise missing(source, root, "train and val folders are not there")
    train = found["train"]
    names = tuple(sorted(path.name for path in train.iterdir() if path.is_dir()))
    splits = {}
    for split, folder in found.items():
        if folder is None:
            continue
        theirs = {path.name for path in folder.iterdir() if path.is_dir()}
        differing = sorted(theirs ^ set(names))
        if differing:
            raise UserError(
                f"class folders of {train.name} and {folder.name} differ: "
                f"{', '.join(differing[:5])}",
                where=str(root),
                fix="give both splits the same class folders",
            )
        splits[split] = _split_of(folder, names)
        if not splits[split].sources:
            raise missing(source, root, f"no image in {folder.name}")
    return splits


def _split_of(folder: Path, names: tuple[str, ...]) -> Split:
    files, labels = [], []
    for label, name in enumerate(names):
        found = image_files(folder / name)
        files += found
        labels += [label] * len(found)
    return Split(files, labels, names)


def image_files(folder: Path) -> list[Path]:
    """Image files anywhere below a folder, sorted.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError("no such folder of images", where=str(folder))
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numbers, strings and NumPy arrays: a data file has no business to run code."""

    _MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
    _NAMES = ("_reconstruct", "ndarray", "dtype", "scalar")

    def find_class(self, module: str, name: str) -> Any:
        if module in self._MODULES and name in self._NAMES:
            module = "numpy" if name in ("ndarray", "dtype") else "numpy._core.multiarray"
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 2 wrote the bytes of arrays
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a data file")


def _unpickle(path: Path) -> dict[str, Any]:
    """A CIFAR pickle with its keys as strings."""
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        return {k.decode() if isinstance(k, bytes) else str(k): v for k, v in content.items()}
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"not a CIFAR pickle, {error}", where=str(path)) from error


def read_cifar10(root: Path) -> Splits:
    """cifar-10-batches-py: five training batches and one test batch.

    Raises:
        UserError: a missing or damaged file.
    """
    return _read_cifar(
        root,
        "cifar10",
        "cifar-10-batches-py",
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        ("batches.meta", "label_names", "labels"),
    )


def read_cifar100(root: Path) -> Splits:
    """cifar-100-python, fine labels.

    Raises:
        UserError: a missing or damaged file.
    """
    return _read_cifar(
        root,
        "cifar100",
        "cifar-100-python",
        {"train": ["train"], "test": ["test"]},
        ("meta", "fine_label_names", "fine_labels"),
    )


def _read_cifar(
    root: Path,
    source: str,
    folder: str,
    files: dict[str, list[str]],
    meta: tuple[str, str, str],
) -> Splits:
    folder_path = root if root.name == folder else root / folder
    needed = [*itertools.chain(*files.values()), meta[0]]
    absent = [name for name in needed if not (folder_path / name).is_file()]
    if absent:
        raise missing(source, root, f"{', '.join(absent)} missing")
    names = tuple(
        name.decode() if isinstance(name, bytes) else str(name)
        for name in _unpickle(folder_path / meta[0])[meta[1]]
    )
    splits = {}
    for split, parts in files.items():
        content = [_unpickle(folder_path / part) for part in parts]
        try:
            planes = np.concatenate([np.asarray(c["data"], dtype=np.uint8) for c in content])
            labels = [int(label) for c in content for label in c[meta[2]]]
            images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"not the pickles of {source}, {error}", where=str(folder_path)
            ) from error
        splits[split] = Split(list(images), labels, names)
    return splits


def read_parquet(root: Path, image: str = "image", label: str = "label") -> Splits:
    """Parquet files with an image and a label column, read through Hugging Face datasets.

    Raises:
        UserError: missing files or columns, or labels that are no class numbers.
    """
    import datasets

    patterns = {"train": ["train"], "val": ["val", "validation"], "test": ["test"]}
    splits = {}
    for split, stems in patterns.items():
        files = sorted(
            {str(p) for stem in stems for p in root.rglob(f"{stem}*.parquet")}
            if root.is_dir()
            else ()
        )
        if not files:
            continue
        try:
            table = datasets.load_dataset("parquet", data_files=files, split="train")
        except Exception as error:  # datasets wraps what a damaged file raises in many ways
            raise UserError(f"not a parquet file, {error}", where=files[0]) from error
        absent = [name for name in (image, label) if name not in table.column_names]
        if absent:
            raise UserError(
                f"column {', '.join(absent)} missing; there are {', '.join(table.column_names)}",
                where=files[0],
                fix="name yours with --data.image_column and --data.label_column",
            )
        table = table.cast_column(image, datasets.Image(decode=False))
        feature = table.features[label]
        labels = [int(value) for value in table[label]]
        names = getattr(feature, "names", None) or [str(k) for k in range(max(labels) + 1)]
        splits[split] = Split(table[image], labels, tuple(names))
    if "train" not in splits or len(splits) < 2:
        raise missing("parquet", root, "train and test files are not there")
    return splits


SOURCES: dict[str, Callable[..., Splits]] = {
    "imagenet": lambda root: read_folders(root, "imagenet"),
    "imagefolder": read_folders,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "parquet": read_parquet,
}
