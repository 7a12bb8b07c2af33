"""Segmentations in the released layouts of PASCAL VOC 2012 and SBD: lists, labels, a writer.

SBD (Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011) adds labels to images
of VOC that have none there.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from ickd.data.offenders import MOST_OFFENDERS, find_offenders
from ickd.metrics import IGNORE
from tenfold.errors import UserError
from tenfold.images import read_image
from tenfold.progress import track

VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_TREE = """{root}/
  VOCdevkit/VOC2012/{{JPEGImages,SegmentationClass,ImageSets/Segmentation}}   VOC 2012
  benchmark_RELEASE/dataset/{{img,cls,train.txt,val.txt}}   SBD, where it is used"""
_FROM = (
    "get VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC (and benchmark.tgz from "
    "the authors of SBD) and unpack it here"
)


class SegmentationEntry(NamedTuple):
    """The files of one image; the label is a palette PNG, or a MATLAB file of SBD."""

    image: Path
    label: Path


def voc_palette() -> list[int]:
    """VOC's 256 colours as red, green, blue, red, ...: a class's bits dealt out to the colours.

    Bit 3k + c of the class is bit 7 - k of the colour c.
    """
    return [
        sum((label >> (3 * k + colour) & 1) << (7 - k) for k in range(3))
        for label in range(256)
        for colour in range(3)
    ]


def read_voc(
    root: Path, split: Literal["train", "val"], sbd: bool | None = None
) -> list[SegmentationEntry]:
    """The images of one split. Only names are read here: a label is decoded with its image.

    With SBD the training split is VOC's own, then the images of SBD's train and val lists that are
    in neither of VOC's: 10,582 in the released data.

    Args:
        root: the folder that holds VOCdevkit (and benchmark_RELEASE), or VOCdevkit itself.
        split: "train" or "val".
        sbd: whether SBD is added to "train"; None adds it if it is there.

    Raises:
        UserError: files that are missing, told with the tree that is expected; it names up to ten.
    """
    root = root.parent if root.name == "VOCdevkit" else root
    voc = root / "VOCdevkit" / "VOC2012"
    names = _read_list(root, voc / "ImageSets" / "Segmentation" / f"{split}.txt")
    images, labels = _Folder(voc / "JPEGImages"), _Folder(voc / "SegmentationClass")
    suffixes: tuple[str, ...] = (".jpg", ".jpeg", ".png")
    wanted: list[_Wanted] = [(images, name, suffixes, labels, ".png") for name in names]
    extra = root / "benchmark_RELEASE" / "dataset"
    if split == "train" and (extra.is_dir() if sbd is None else sbd):
        others = _read_list(root, voc / "ImageSets" / "Segmentation" / "val.txt")
        more = [n for part in ("train", "val") for n in _read_list(root, extra / f"{part}.txt")]
        seen = {*names, *others}
        images, labels = _Folder(extra / "img"), _Folder(extra / "cls")
        added = dict.fromkeys(n for n in more if n not in seen)
        wanted += [(images, name, (".jpg",), labels, ".mat") for name in added]
    return _entries(root, wanted)


class _Folder:
    """A folder whose names are listed once: ten thousand questions to a file server take long."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = frozenset(os.listdir(path)) if path.is_dir() else frozenset()

    def find(self, stem: str, suffixes: Sequence[str]) -> Path | None:
        """The file with the first suffix that is there."""
        there = (f"{stem}{suffix}" for suffix in suffixes if f"{stem}{suffix}" in self.names)
        return next((self.path / name for name in there), None)


_Wanted = tuple[_Folder, str, tuple[str, ...], _Folder, str]
"""Folder, name and suffixes of an image, folder and suffix of its label."""


def _entries(root: Path, wanted: Sequence[_Wanted]) -> list[SegmentationEntry]:
    entries, absent = [], []
    for images, name, suffixes, labels, label_suffix in wanted:
        image, label = images.find(name, suffixes), labels.find(name, (label_suffix,))
        if image and label:
            entries.append(SegmentationEntry(image, label))
        if image is None:
            absent.append(images.path / f"{name}{suffixes[0]}")
        if label is None:
            absent.append(labels.path / f"{name}{label_suffix}")
    if absent:
        raise _missing(root, f"{_count(len(absent), 'listed file')} not there: {_first(absent)}")
    return entries


def _count(number: int, what: str) -> str:
    return f"1 {what} is" if number == 1 else f"{number} {what}s are"


def _first(paths: Sequence[Path]) -> str:
    more = ", ..." if len(paths) > MOST_OFFENDERS else ""
    return ", ".join(str(path) for path in paths[:MOST_OFFENDERS]) + more


def _missing(root: Path, what: str) -> UserError:
    return UserError(what, where=str(root), fix=f"expected {_TREE.format(root=root)}; {_FROM}")


def _read_list(root: Path, path: Path) -> list[str]:
    if not path.is_file():
        raise _missing(root, f"no {path.relative_to(root)}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"not a list of images, {error}", where=str(path)) from error
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise _missing(root, f"{path.relative_to(root)} names no image")
    return names


def read_label(
    path: Path, num_classes: int, ignore_index: int = IGNORE
) -> UInt8[np.ndarray, "h w"]:
    """The classes of an image's pixels.

    Args:
        path: a palette (or grey) PNG whose values are classes, or an SBD file.
        num_classes: K.
        ignore_index: the one value that may be K or more.

    Raises:
        UserError: a damaged file, colours instead of classes, or a value that is no class; names
            the file.
    """
    label = _read_sbd(path) if path.suffix == ".mat" else _read_png(path)
    wrong = np.unique(label[(label >= num_classes) & (label != ignore_index)])
    if len(wrong):
        raise UserError(
            f"labels {', '.join(map(str, wrong[:5]))} are none of the {num_classes} classes, nor "
            f"{ignore_index}",
            where=str(path),
            fix="look at the labels, or at the number of classes",
        )
    return label


def _read_png(path: Path) -> UInt8[np.ndarray, "h w"]:
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise UserError(
                    f"the label has colours (mode {image.mode}) instead of classes",
                    where=str(path),
                    fix="save it as a palette PNG whose values are classes",
                )
            return np.array(image, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the label: {why}", where=str(path)) from error


def _read_sbd(path: Path) -> UInt8[np.ndarray, "h w"]:
    from scipy.io import loadmat

    try:
        content = loadmat(path)
    except Exception as error:  # a damaged file fails in many layers, each with its own exception
        raise UserError(f"cannot read the label: {error}", where=str(path)) from error
    try:
        label = np.asarray(content["GTcls"][0]["Segmentation"][0])
    except (KeyError, IndexError, ValueError) as error:
        there = ", ".join(key for key in content if not key.startswith("__")) or "nothing"
        what = f"not a label of SBD, GTcls with a field Segmentation is missing; it holds {there}"
        raise UserError(what, where=str(path)) from error
    if label.ndim != 2 or label.dtype.kind not in "ui" or (label.size and label.max() > 255):
        what = f"the segmentation is a {label.dtype} array of shape {label.shape}"
        raise UserError(f"{what}, not a class for every pixel", where=str(path))
    return label.astype(np.uint8)


def read_pair(
    entry: SegmentationEntry, num_classes: int
) -> tuple[Image.Image, UInt8[np.ndarray, "h w"]]:
    """An image and the classes of its pixels.

    Raises:
        UserError: an unusable file, or sizes that differ; names the file.
    """
    image, label = read_image(entry.image), read_label(entry.label, num_classes)
    if image.size != (label.shape[1], label.shape[0]):
        ours, theirs = f"{image.width}x{image.height}", f"{label.shape[1]}x{label.shape[0]}"
        what = f"the label has {theirs} pixels, its image {ours}"
        raise UserError(what, where=str(entry.label))
    return image, label


def check_entries(entries: Sequence[SegmentationEntry], num_classes: int) -> None:
    """Decode every image and label, so that a run does not end in its middle.

    A minute or so for VOC with SBD.

    Raises:
        UserError: what is wrong with the first ten unusable files.
    """

    def read(number: int) -> None:
        read_pair(entries[number], num_classes)

    if error := find_offenders(read, len(entries), "checking labels"):
        raise error


def write_voc(
    images: UInt8[Tensor, "items 3 height width"],
    labels: Int[Tensor, "items height width"],
    root: Path,
    split: Literal["train", "val"] = "train",
) -> None:
    """Write images and labels in VOC's layout; `read_voc` and `read_pair` give them back equal.

    The images are PNG files, since JPEG would change them.

    Args:
        images: pixels.
        labels: classes, and 255 where there is none.
        root: parent of VOCdevkit, made if need be; another split may be there already.
        split: the list that names them.
    """
    folder = root / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = [f"{split}_{number:06d}" for number in range(len(images))]
    palette = voc_palette()
    pairs: Iterable[tuple[Tensor, Tensor]] = zip(images, labels, strict=True)
    for name, (image, label) in zip(
        names, track(pairs, len(names), f"writing {split}"), strict=True
    ):
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.png")
        classes = Image.fromarray(label.numpy().astype(np.uint8))
        classes.putpalette(palette)  # makes it a palette image of the same values
        classes.save(folder / "SegmentationClass" / f"{name}.png")
    listing = "".join(f"{name}\n" for name in names)
    (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(listing)
