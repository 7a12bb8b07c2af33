"""Folders of images: one for each class, or any."""

from pathlib import Path

from filip_vl.data.pairs import Pairs, gather
from tenfold.errors import UserError
from tenfold.images import Split, image_files


def class_name(folder: str) -> str:
    """What a class is called, from the name of its folder: underscores are blanks."""
    return " ".join(folder.replace("_", " ").split())


def read_class_folders(root: Path) -> Split:
    """Images of `root/<class>/`, with the number of their class in alphabetical order.

    Raises:
        UserError: no such folder, or no image in any class.
    """
    if not root.is_dir():
        raise UserError("no such folder of classes", where=str(root))
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    files, labels = [], []
    for label, folder in enumerate(folders):
        found = image_files(folder)
        files += found
        labels += [label] * len(found)
    if not files:
        fix = f"expected {root}/<class>/*.jpg"
        raise UserError("no image in a folder of a class", where=str(root), fix=fix)
    return Split(files, labels, tuple(class_name(folder.name) for folder in folders))


def read_class_captions(root: Path) -> Pairs:
    """Images of `root/<class>/`; the caption of each is the name of its class.

    Raises:
        UserError: see `read_class_folders`.
    """
    split = read_class_folders(root)
    labels = split.labels or ()
    entries = zip(split.sources, labels, strict=True)
    return gather(
        (path, [split.names[label]], str(path.relative_to(root))) for path, label in entries
    )


def read_images(root: Path) -> Pairs:
    """All images below a folder, without captions.

    Raises:
        UserError: no such folder, or no image in it.
    """
    files = image_files(root)
    if not files:
        raise UserError("no image in the folder", where=str(root))
    return gather((path, [], str(path.relative_to(root))) for path in files)
