"""PASCAL VOC in its released layout: which images a set has, and the objects of each."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ds_net_plus.metrics import Truth
from ds_net_plus.scenes import SCENE_CLASSES, SceneItem, glyph_scene
from tenfold.errors import UserError
from tenfold.progress import track

VOC_CLASSES = (
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
TRAIN_SETS, TEST_SETS = ("2007_trainval", "2012_trainval"), ("2007_test",)

_TREE = """{root}/
  VOCdevkit/VOC2007/{{JPEGImages,Annotations,ImageSets/Main}}   trainval and test
  VOCdevkit/VOC2012/{{JPEGImages,Annotations,ImageSets/Main}}   trainval"""
_FROM = (
    "get VOCtrainval_06-Nov-2007.tar, VOCtest_06-Nov-2007.tar and VOCtrainval_11-May-2012.tar "
    "from host.robots.ox.ac.uk/pascal/VOC and unpack all three here"
)
_SLOP = 1.0  # pixels that a box may stick out: some tools count from 0


class VOCEntry(NamedTuple):
    """The files of one image."""

    image: Path
    annotation: Path


def _missing(root: Path, what: str) -> UserError:
    return UserError(what, where=str(root), fix=f"expected {_TREE.format(root=root)}; {_FROM}")


def read_voc(root: Path, sets: Sequence[str]) -> list[VOCEntry]:
    """The images of some sets, in the order of their lists.

    Only names are read here: an annotation is parsed with its image.

    Args:
        root: the folder that holds VOCdevkit, or VOCdevkit itself.
        sets: year and split, such as "2007_trainval".

    Raises:
        UserError: a set that is not there or not complete, told with the tree that is expected.
    """
    devkit = root if root.name == "VOCdevkit" else root / "VOCdevkit"
    entries: list[VOCEntry] = []
    for name in sets:
        year, _, split = name.partition("_")
        if not (year.isdigit() and split):
            fix = "write it as 2007_trainval"
            raise UserError(f"{name!r} is not a year and a split of VOC", fix=fix)
        entries += _read_set(root, devkit / f"VOC{year}", split)
    return entries


def _read_set(root: Path, folder: Path, split: str) -> list[VOCEntry]:
    names_file = folder / "ImageSets" / "Main" / f"{split}.txt"
    place = f"{folder.name}/ImageSets/Main/{split}.txt"
    if not names_file.is_file():
        raise _missing(root, f"no {place}")
    try:
        lines = names_file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"not a list of images, {error}", where=str(names_file)) from error
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise _missing(root, f"{place} names no image")
    entries = [
        VOCEntry(folder / "JPEGImages" / f"{n}.jpg", folder / "Annotations" / f"{n}.xml")
        for n in names
    ]
    for part, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        there = {path.name for path in (folder / part).glob(f"*.{suffix}")}
        absent = [name for name in names if f"{name}.{suffix}" not in there]
        if absent:
            what = f"{folder.name}/{part} lacks {len(absent)} of the {len(names)} files of {split}"
            raise _missing(root, f"{what}, first {absent[0]}.{suffix}")
    return entries


def read_annotation(path: Path, names: Sequence[str], size: tuple[int, int]) -> Truth:
    """The objects of one image.

    VOC's boxes name the first and the last pixel, counted from 1; ours are half-open and counted
    from 0: x0 = xmin - 1, y0 = ymin - 1, x1 = xmax, y1 = ymax.

    Args:
        path: the XML file.
        names: the classes.
        size: (width, height) of the image; a box may stick out by one pixel and is clipped.

    Raises:
        UserError: a damaged file, a class that is not among `names`, or a box that is empty or
            outside the image; names the file.
    """
    where = str(path)
    try:
        root = ET.fromstring(path.read_bytes())
    except ET.ParseError as error:
        raise UserError(f"the annotation is damaged, {error}", where=where) from error
    except OSError as error:
        raise UserError(f"cannot read the annotation: {error.strerror}", where=where) from error
    boxes, labels, difficult = [], [], []
    for number, item in enumerate(root.iterfind("object")):
        name = (item.findtext("name") or "").strip()
        if name not in names:
            fix = f"the classes are {', '.join(names)}; others go to --data.class_names"
            raise UserError(
                f"object {number} is of an unknown class {name!r}", where=where, fix=fix
            )
        boxes.append(_read_box(item, number, size, where))
        labels.append(names.index(name))
        difficult.append((item.findtext("difficult") or "0").strip() == "1")
    return Truth(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(difficult, dtype=torch.bool),
    )


def _read_box(
    item: ET.Element, number: int, size: tuple[int, int], where: str
) -> tuple[float, float, float, float]:
    box = item.find("bndbox")
    texts = [None if box is None else box.findtext(k) for k in ("xmin", "ymin", "xmax", "ymax")]
    try:
        xmin, ymin, xmax, ymax = (float(text or "") for text in texts)
    except ValueError:
        what = f"object {number} has no box of four numbers, but {texts}"
        raise UserError(what, where=where) from None
    x0, y0, x1, y1 = xmin - 1, ymin - 1, xmax, ymax
    told = f"box {xmin:g} {ymin:g} {xmax:g} {ymax:g} of object {number}"
    if not (x1 > x0 and y1 > y0):
        raise UserError(f"{told} is empty", where=where)
    width, height = size
    if not (min(x0, y0) >= -_SLOP and x1 <= width + _SLOP and y1 <= height + _SLOP):
        raise UserError(f"{told} lies outside the image of {width} x {height}", where=where)
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))


def write_voc(
    out: Path,
    *,
    train: int = 800,
    test: int = 200,
    train_seed: int = 0,
    test_seed: int = 99,
    size: int = 128,
) -> None:
    """Glyph scenes in the released layout of VOC: 2007 trainval and test, 2012 trainval.

    The training scenes are split evenly over the two years. VOC's boxes are whole pixels, and its
    images JPEG files: what is read back is the scene to half a pixel.

    Args:
        out: parent of VOCdevkit, made if need be.
        train: training scenes.
        test: test scenes.
        train_seed: of the training scenes.
        test_seed: of the test scenes.
        size: side in pixels.
    """
    early = (train + 1) // 2
    for year, split, indices, seed in (
        ("2007", "trainval", range(early), train_seed),
        ("2007", "test", range(test), test_seed),
        ("2012", "trainval", range(early, train), train_seed),
    ):
        folder = out / "VOCdevkit" / f"VOC{year}"
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        first = 1 + (early if split == "test" else 0)  # one numbering a year, as VOC has it
        names = []
        for number, index in enumerate(track(indices, label=f"writing {year} {split}")):
            name = f"{first + number:06d}" if year == "2007" else f"2012_{1 + number:06d}"
            names.append(name)
            _write_scene(folder, name, glyph_scene(index, seed, size))
        if names:
            listing = "".join(f"{name}\n" for name in names)
            (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(listing)


def _write_scene(folder: Path, name: str, scene: SceneItem) -> None:
    image = Image.fromarray(scene.image.permute(1, 2, 0).numpy())
    image.save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
    root = ET.Element("annotation")
    ET.SubElement(root, "folder").text = folder.name
    ET.SubElement(root, "filename").text = f"{name}.jpg"
    size = ET.SubElement(root, "size")
    for key, value in (("width", image.width), ("height", image.height), ("depth", 3)):
        ET.SubElement(size, key).text = str(value)
    for box, label, hard in zip(
        whole_pixels(scene.boxes), scene.labels.tolist(), scene.difficult.tolist(), strict=True
    ):
        item = ET.SubElement(root, "object")
        ET.SubElement(item, "name").text = SCENE_CLASSES[label]
        ET.SubElement(item, "difficult").text = str(int(hard))
        corners = ET.SubElement(item, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ET.SubElement(corners, key).text = str(value)
    ET.indent(root)
    ET.ElementTree(root).write(folder / "Annotations" / f"{name}.xml", encoding="unicode")


def whole_pixels(boxes: Tensor) -> list[list[int]]:
    """VOC's xmin, ymin, xmax, ymax of half-open boxes: the first and the last pixel, from 1."""
    corners = boxes.round().long()
    return torch.cat([corners[:, :2] + 1, corners[:, 2:]], 1).tolist()
