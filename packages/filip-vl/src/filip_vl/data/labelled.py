"""Labelled images for zero-shot classification: torchvision's sets on disk, folders of classes.

Nothing is downloaded: the layouts are those of the authors' archives, as torchvision unpacks them.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torchvision import datasets as torchvision_sets

from filip_vl.data.folder import class_name, read_class_folders
from tenfold.errors import UserError
from tenfold.images import Split, read_cifar10, read_cifar100

log = logging.getLogger(__name__)

SUN397_TEST_LIST = "Testing_01.txt"
IMAGENET_NAMES = "LOC_synset_mapping.txt"


class _Set(NamedTuple):
    """Test images and classes of CLIP's protocol, and how and where its files are found."""

    images: int
    classes: int
    read: Callable[[Path], Split]
    tree: str


def _named(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(class_name(name.replace("/", " ")) for name in names)


def _of(made: Any) -> Split:
    """Images and labels of a torchvision set that was told to leave images as their paths."""
    pairs = [made[n] for n in range(len(made))]
    return Split([str(path) for path, _ in pairs], [int(n) for _, n in pairs], _named(made.classes))


def _pets(root: Path) -> Split:
    made = torchvision_sets.OxfordIIITPet(root, split="test")
    return Split([str(path) for path in made._images], list(made._labels), _named(made.classes))


def _caltech(root: Path) -> Split:
    """All categories, the background among them: CLIP's protocol has 102 classes."""
    split = read_class_folders(root / "caltech101" / "101_ObjectCategories")
    names = ("background" if name == "BACKGROUND Google" else name for name in split.names)
    return Split(split.sources, split.labels, tuple(names))


def _sun397(root: Path) -> Split:
    """The first test split of the set's own lists where it is there, else every image."""
    split = _of(torchvision_sets.SUN397(root, loader=str))
    found = dict(zip(split.sources, split.labels or (), strict=True))
    kept = sorted(found)
    test_list = root / "SUN397" / SUN397_TEST_LIST
    if test_list.is_file():
        lines = test_list.read_text().splitlines()
        kept = [str(root / "SUN397" / line.strip().lstrip("/")) for line in lines if line.strip()]
        absent = [path for path in kept if path not in found]
        if absent:
            raise UserError(f"{len(absent)} listed images are not there", where=absent[0])
    return Split(kept, [found[path] for path in kept], split.names)


def _imagenet(root: Path) -> Split:
    folder = next((root / name for name in ("val", "validation") if (root / name).is_dir()), root)
    split = read_class_folders(folder)
    mapping = root / IMAGENET_NAMES
    if not mapping.is_file():
        log.warning("classes of ImageNet are named by their WordNet ids: no %s", mapping)
        return split
    lines = (line.partition(" ") for line in mapping.read_text().splitlines())
    names = {key: words.partition(",")[0].strip() for key, _, words in lines}
    return Split(split.sources, split.labels, tuple(names.get(name, name) for name in split.names))


def _torchvision(name: str, **options: Any) -> Callable[[Path], Split]:
    """A set whose images torchvision can leave as paths."""
    return lambda root: _of(getattr(torchvision_sets, name)(root, loader=str, **options))


_SETS = {
    "cifar10": _Set(10000, 10, lambda root: read_cifar10(root)["test"], "cifar-10-batches-py/"),
    "cifar100": _Set(10000, 100, lambda root: read_cifar100(root)["test"], "cifar-100-python/"),
    "caltech101": _Set(6085, 102, _caltech, "caltech101/101_ObjectCategories/<class>/*.jpg"),
    "stanford_cars": _Set(
        8041,
        196,
        _torchvision("StanfordCars", split="test"),
        "stanford_cars/{devkit/,cars_test/,cars_test_annos_withlabels.mat}",
    ),
    "flowers102": _Set(
        6149,
        102,
        _torchvision("Flowers102", split="test"),
        "flowers-102/{jpg/,imagelabels.mat,setid.mat}",
    ),
    "food101": _Set(
        25250, 101, _torchvision("Food101", split="test"), "food-101/{images/,meta/test.json}"
    ),
    "sun397": _Set(
        19850, 397, _sun397, f"SUN397/{{ClassName.txt,a/...,z/...}}, and {SUN397_TEST_LIST} there"
    ),
    "dtd": _Set(1880, 47, _torchvision("DTD", split="test"), "dtd/dtd/{images/,labels/test1.txt}"),
    "aircraft": _Set(
        3333, 100, _torchvision("FGVCAircraft", split="test"), "fgvc-aircraft-2013b/data/"
    ),
    "oxford_pets": _Set(3669, 37, _pets, "oxford-iiit-pet/{images/,annotations/test.txt}"),
    "eurosat": _Set(
        5000,
        10,
        lambda root: read_class_folders(root / "eurosat" / "2750"),
        "eurosat/2750/<class>/*.jpg",
    ),
    "imagenet": _Set(50000, 1000, _imagenet, f"val/<wnid>/*.JPEG, and {IMAGENET_NAMES}"),
}

ZERO_SHOT_SETS = tuple(_SETS)
"""Names that `read_labelled` knows, besides any folder of classes."""


def read_labelled(root: Path, name: str | None = None) -> Split:
    """Test images of a labelled set: what `tenfold.images.read_image` takes, labels, class names.

    Where an archive has no test split of its own (Caltech101, EuroSAT), or its list is not there
    (SUN397), all images are read; a difference from CLIP's protocol in numbers is logged.

    Args:
        root: folder in which the set's own folder lies.
        name: one of `ZERO_SHOT_SETS`; a folder for each class if left out.

    Raises:
        UserError: an unknown set, or files that are not there or damaged.
    """
    if name is None:
        return read_class_folders(root)
    if name not in _SETS:
        raise UserError(f"the set must be one of {', '.join(_SETS)}, got {name!r}")
    known = _SETS[name]
    expected = f"expected {root}/{known.tree}"
    if not root.is_dir():
        raise UserError("no such folder", where=str(root), fix=expected)
    try:
        split = known.read(root)
    except UserError as error:
        fix = error.fix or expected
        raise UserError(error.what, where=error.where, fix=fix) from error
    except Exception as error:  # every set of torchvision has its own way to fail
        what = f"{name} is not there or damaged: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(what, where=str(root), fix=expected) from error
    if (len(split.sources), len(split.names)) != (known.images, known.classes):
        log.warning(
            "%s: %d images of %d classes, CLIP's protocol has %d of %d",
            *(name, len(split.sources), len(split.names), known.images, known.classes),
        )
    return split
