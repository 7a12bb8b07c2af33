"""Generated images on disk, in a format that the reader reads back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tenfold.images
from tenfold.progress import track


def write_parquet(splits: Mapping[str, Any], folder: Path, names: Sequence[str]) -> None:
    """A file for each split, with columns image (PNG, so nothing is lost) and label.

    `--data.source parquet` reads the folder, and so does `datasets.load_dataset`.

    >>> splits = {"train": bound_gratings(800, 1), "test": bound_gratings(2000, 3)}
    >>> write_parquet(splits, Path("gratings"), grating_class_names())

    Args:
        splits: "train", "val" or "test" -> images, uint8 (N, 3, H, W), and labels (N,).
        folder: made if need be.
        names: of the classes.
    """
    for name, (images, labels, *_) in splits.items():
        pixels = images.permute(0, 2, 3, 1).numpy()
        shown = track(pixels, label=f"writing {name}")
        tenfold.images.write_parquet(folder / f"{name}.parquet", shown, labels.tolist(), names)
