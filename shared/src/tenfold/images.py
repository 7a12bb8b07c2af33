"""Images from files, bytes and arrays, and released layouts: where each image is, and its class."""

import io
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from tenfold.data import BROKEN, Draw, as_draw
from tenfold.errors import UserError
from tenfold.training import item_rng

if TYPE_CHECKING:
    import datasets  # half a second to import: only a parquet source pays for it

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}

ImageSource = Any
"""A path, the bytes of a file, datasets' {"bytes", "path"}, a uint8 array or a PIL image."""


def read_image(source: ImageSource, max_pixels: int | None = None) -> Image.Image:
    """Opens an image as 8-bit RGB PIL: grey, palette, alpha, CMYK and 16 bit are converted.

    Args:
        source: where it is.
        max_pixels: refuse larger files before they are decoded, in the place of PIL's own limit of
            179 million.

    Raises:
        UserError: for a missing, empty, truncated, foreign or too large file, with its path.
    """
    where = "image in memory"
    if isinstance(source, Mapping):
        where = source.get("path") or where
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str | Path):
        where = str(source)
    try:
        image = _opened(source, max_pixels)
        if image.mode.startswith("I"):  # 16-bit grey: PIL would clip at 255
            image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError("no image, or an unknown format", where=where) from error
    except (*BROKEN, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or error
        bomb = isinstance(error, Image.DecompressionBombError)
        fix = "give a max_pixels above it, if you trust it" if bomb else None
        raise UserError(f"cannot read the image: {why}", where=where, fix=fix) from error


def _opened(source: ImageSource, max_pixels: int | None) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    with nullcontext() if max_pixels is None else _no_pixel_limit():
        image = Image.open(file)
        if max_pixels is not None and image.width * image.height > max_pixels:
            size = f"{image.width}x{image.height}"
            raise ValueError(f"its {size} pixels are above the limit max_pixels {max_pixels}")
        image.load()
    return image


@contextmanager
def _no_pixel_limit() -> Iterator[None]:
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


class ImageItem(NamedTuple):
    """One item of `ImageItems`; torch's default collation makes it a batch of the same type."""

    image: Any
    label: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


class ImageItems(Dataset[ImageItem]):
    """Images from files or memory; the transform's randomness is drawn by (seed, epoch, index).

    Args:
        sources: what `read_image` takes.
        transform: applied to the RGB PIL image; may draw from Python, NumPy or torch.
        labels: one class for each source, -1 if left out.
        seed: of the transform.
    """

    def __init__(
        self,
        sources: Sequence[ImageSource],
        transform: Callable[[Any], Any],
        labels: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        self.sources, self.transform, self.labels, self.seed = sources, transform, labels, seed

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, key: Draw | int) -> ImageItem:
        draw = as_draw(key)
        image = read_image(self.sources[draw.index])
        label = -1 if self.labels is None else int(self.labels[draw.index])
        with item_rng(self.seed, *draw):
            return ImageItem(self.transform(image), label, draw.index)


@dataclass(frozen=True)
class Split:
    """Images of one split.

    Attributes:
        sources: what `read_image` takes.
        labels: class of every image, None where they have none.
        names: class names.
    """

    sources: Sequence[ImageSource]
    labels: Sequence[int] | None
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Checks that labels are classes.

        Raises:
            UserError: naming the first image whose label is not.
        """
        for index, label in enumerate(self.labels or ()):
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
    names = _class_folders(train)
    splits = {}
    for split, folder in found.items():
        if folder is None:
            continue
        differing = sorted(set(_class_folders(folder)) ^ set(names))
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


def _class_folders(folder: Path) -> tuple[str, ...]:
    """Sorted names; hidden folders are an editor's or a file manager's, not classes."""
    found = (path.name for path in folder.iterdir() if path.is_dir())
    return tuple(sorted(name for name in found if not name.startswith(".")))


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


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _unpickle(path: Path, *wanted: str) -> list[Any]:
    """The wanted entries of a CIFAR pickle, whose keys may be bytes or strings."""
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        entries = {_text(key): value for key, value in content.items()}
    except Exception as error:  # the opcodes of a damaged pickle can raise anything
        raise UserError(f"not a CIFAR pickle, {error}", where=str(path)) from error
    absent = [key for key in wanted if key not in entries]
    if absent:
        raise UserError(f"no entry {', '.join(absent)} in the pickle", where=str(path))
    return [entries[key] for key in wanted]


def _read_batch(path: Path, labels_key: str) -> tuple[np.ndarray, list[int]]:
    """Pixels (N, 32, 32, 3) uint8 and labels of one file of R, G and B planes."""
    data, labels = _unpickle(path, "data", labels_key)
    try:
        planes = np.asarray(data, dtype=np.uint8).reshape(-1, 3, 32, 32)
        labels = [int(label) for label in labels]
    except (TypeError, ValueError) as error:
        raise UserError(f"not the pixels and labels of CIFAR, {error}", where=str(path)) from error
    if len(planes) != len(labels):
        what = f"{len(planes)} images but {len(labels)} labels"
        raise UserError(what, where=str(path), fix="the file is damaged, unpack it again")
    return planes.transpose(0, 2, 3, 1), labels


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
    meta_file, names_key, labels_key = meta
    [raw_names] = _unpickle(folder_path / meta_file, names_key)
    names = tuple(map(_text, raw_names))
    splits = {}
    for split, parts in files.items():
        batches = [_read_batch(folder_path / part, labels_key) for part in parts]
        images = [image for pixels, _ in batches for image in pixels]
        splits[split] = Split(images, [label for _, part in batches for label in part], names)
    return splits


class Column(Sequence[Any]):
    """A column of a data set, entry by entry from its memory-mapped file.

    Several times faster than a data set's own row access, which formats the row first.
    """

    def __init__(self, table: "datasets.Dataset", name: str) -> None:
        self.table, self.name = table, name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return self.table.data.column(self.name)[index].as_py()


def read_parquet(root: Path, image: str = "image", label: str = "label") -> Splits:
    """Parquet files with an image and a label column, read through Hugging Face datasets.

    Class names are those of a ClassLabel column, else the numbers up to the largest in training.

    Raises:
        UserError: missing files or columns, splits whose classes differ, or labels that are no
            class numbers.
    """
    patterns = {"train": ["train"], "val": ["val", "validation"], "test": ["test"]}
    splits: Splits = {}
    for split, stems in patterns.items():
        files = sorted({str(p) for stem in stems for p in root.rglob(f"{stem}*.parquet")})
        if not files:
            continue
        table = load_parquet(files, image=image, label=label)
        labels = _int_labels(table[label], files[0])
        named = getattr(table.features[label], "names", None)
        names = tuple(named or (str(k) for k in range(max(labels, default=-1) + 1)))
        known = splits["train"].names if "train" in splits else names
        if named and set(names) != set(known):
            what = f"classes of train and {split} differ: "
            first = ", ".join(sorted(set(names) ^ set(known))[:5])
            raise UserError(what + first, where=files[0], fix="write both with the same classes")
        if named and names != known:  # the same classes under other numbers
            labels = [known.index(names[k]) if 0 <= k < len(names) else k for k in labels]
        splits[split] = Split(Column(table, image), labels, known)
    if "train" not in splits or len(splits) < 2:
        raise missing("parquet", root, "train and test files are not there")
    return splits


def load_parquet(files: list[str], *, image: str, **columns: str) -> "datasets.Dataset":
    """Parquet files as one table, whose images are left as the bytes of their files.

    Args:
        files: paths.
        image: name of the image column.
        **columns: names of others that must be there, by what the option for it is called.

    Raises:
        UserError: a damaged file, a column that is not there, or no images in theirs.
    """
    import datasets

    try:
        table = datasets.load_dataset("parquet", data_files=files, split="train")
    except Exception as error:  # datasets wraps what a damaged file raises in many ways
        raise UserError(f"not a parquet file, {error}", where=files[0]) from error
    wanted = {"image": image, **columns}
    absent = [name for name in wanted.values() if name not in table.column_names]
    if absent:
        raise UserError(
            f"column {', '.join(absent)} missing; there are {', '.join(table.column_names)}",
            where=files[0],
            fix="name yours with " + " and ".join(f"{option}_column" for option in wanted),
        )
    try:
        return table.cast_column(image, datasets.Image(decode=False))
    except Exception as error:  # datasets and Arrow raise whatever their conversion meets
        raise UserError(f"column {image} holds no images, {error}", where=files[0]) from error


def _int_labels(values: Sequence[Any], where: str) -> list[int]:
    for index, value in enumerate(values):
        if not isinstance(value, int):
            what = f"label {value!r} of image {index} is no class number"
            raise UserError(what, where=where, fix="store classes as 0, 1, 2 and so on")
    return list(values)


SOURCES: dict[str, Callable[..., Splits]] = {
    "imagenet": lambda root: read_folders(root, "imagenet"),
    "imagefolder": read_folders,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "parquet": read_parquet,
}


def write_parquet(
    file: Path,
    images: Iterable[np.ndarray],
    labels: Sequence[int],
    names: Sequence[str],
    **columns: Sequence[Any],
) -> None:
    """A parquet file that `read_parquet` reads: images as PNG, labels that know their names.

    Args:
        file: its name says the split, as in train.parquet; its folder is made if need be.
        images: uint8, (H, W, 3) or grey (H, W).
        labels: class of every image.
        names: class names.
        **columns: further ones, plain values.
    """
    import datasets

    file.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {"bytes": _png(pixels), "path": f"{file.stem}-{index:05d}.png"}
        for index, pixels in enumerate(images)
    ]
    table = datasets.Dataset.from_dict({"image": entries, "label": list(labels), **columns})
    table = table.cast_column("image", datasets.Image())
    table.cast_column("label", datasets.ClassLabel(names=list(names))).to_parquet(str(file))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
