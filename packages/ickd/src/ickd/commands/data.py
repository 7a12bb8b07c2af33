"""data: the embedded tasks on disk."""

import json
from pathlib import Path

from ickd.commands.common import at_least
from ickd.data import write_parquet
from ickd.data.voc import write_voc
from ickd.synthetic import (
    BLOB_CLASSES,
    GratingClasses,
    bound_gratings,
    grating_class_names,
    textured_blobs,
)
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
    if task == "bound-gratings":
        seeds = (train_seed, test_seed)
        train_part, test_part = (
            bound_gratings(count, seed, classes=classes)
            for count, seed in zip(counts, seeds, strict=True)
        )
        write_parquet(
            {"train": train_part, "test": test_part}, folder, grating_class_names(classes)
        )
        how = f"--data.source parquet --data.root {folder} --data.image_size 16"
    else:
        blobs = textured_blobs(counts[0], train_seed)
        write_voc(blobs.image, blobs.label, folder, "train")
        blobs = textured_blobs(counts[1], test_seed)
        write_voc(blobs.image, blobs.label, folder, "val")
        how = (
            f"--config blobs --data.source voc --data.root {folder} --data.base_size 24 "
            f"--data.class_names '{json.dumps(BLOB_CLASSES)}'"
        )
    print(f"wrote {counts[0]} training and {counts[1]} test images to {folder}; read them with")
    print(f"  {how}")
