"""data: the embedded tasks on disk."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from ickd.data import write_parquet
from ickd.data.voc import write_voc
from ickd.synthetic import (
    BLOB_CLASSES,
    BLOBS_SIZE,
    GRATINGS_SIZE,
    GratingClasses,
    bound_gratings,
    grating_class_names,
    textured_blobs,
)
from tenfold.console import at_least
from tenfold.errors import UserError


def data(
    *,
    task: str = "bound-gratings",
    out: Path | None = None,
    train: int | None = None,
    test: int | None = None,
    classes: GratingClasses = "coarse3",
    train_seed: int = 1,
    test_seed: int = 4,
) -> None:
    """Write a generated task to disk, to look at or to read back as one's own data.

    Args:
        task: bound-gratings (parquet files with image and label), or textured-blobs (a VOC tree
            of pictures and label PNGs).
        out: folder; the task's name if left out.
        train: number of training images; 800, or 100 of textured-blobs.
        test: number of test images; 2,000, or 300 of textured-blobs.
        classes: of bound-gratings: coarse3, coarse2 or fine16.
        train_seed: 1 draws the student's images, 2 the teacher's.
        test_seed: 4 draws the test images.
    """
    at_least(1, train=train, test=test)
    tasks = {"bound-gratings": (800, 2000), "textured-blobs": (100, 300)}
    if task not in tasks:
        raise UserError(f"--task must be one of {', '.join(tasks)}, got {task!r}")
    counts = [given or usual for given, usual in zip((train, test), tasks[task], strict=True)]
    folder = out or Path(task)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fix = "choose another --out, or remove it"
        raise UserError("there are files already", where=str(folder), fix=fix)
    seeds = train_seed, test_seed
    if task == "bound-gratings":
        how = _write_gratings(folder, counts, seeds, classes)
    else:
        how = _write_blobs(folder, counts, seeds)
    print(f"wrote {counts[0]} training and {counts[1]} test images to {folder}; learn from them:")
    print(f"  ickd fit {shlex.join(how)}")


def _write_gratings(
    folder: Path, counts: Sequence[int], seeds: Sequence[int], classes: GratingClasses
) -> list[str]:
    """Parquet files; returned are the arguments of fit that read them."""
    import datasets

    datasets.disable_progress_bars()  # those of its steps; the writer shows how far all is
    train, test = (
        bound_gratings(count, seed, classes=classes)
        for count, seed in zip(counts, seeds, strict=True)
    )
    names, size = grating_class_names(classes), str(GRATINGS_SIZE)
    write_parquet({"train": train, "test": test}, folder, names)
    reader = ["--data.source", "parquet", "--data.root", str(folder), "--data.image_size", size]
    return [*reader, "--classes", str(len(names))]


def _write_blobs(folder: Path, counts: Sequence[int], seeds: Sequence[int]) -> list[str]:
    """A tree as VOC's; returned are the arguments of fit that read it."""
    for split, count, seed in zip(("train", "val"), counts, seeds, strict=True):
        blobs = textured_blobs(count, seed)
        write_voc(blobs.image, blobs.label, folder, split)
    reader = ["--config", "blobs", "--data.source", "voc", "--data.root", str(folder)]
    reader += ["--data.base_size", str(BLOBS_SIZE), "--data.class_names", json.dumps(BLOB_CLASSES)]
    return reader
