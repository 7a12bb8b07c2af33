"""The generated task on disk, in formats that the readers read back."""

import pickle
from pathlib import Path

import numpy as np
from torch import Tensor

import tenfold.images
from ds_net_plus.synthetic import CLASS_NAMES, MEAN, STD, glyph_mix
from tenfold.progress import track


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, H, W) grey values 0..255 of normalised glyph images, values outside clipped."""
    values = (images[:, 0] * STD + MEAN).clamp(0, 1) * 255
    return values.round().byte().numpy()


def write_parquet(
    out: Path,
    *,
    train: int = 8000,
    test: int = 4000,
    train_seed: int = 0,
    test_seed: int = 99,
    size: int = 32,
) -> None:
    """train.parquet and test.parquet with columns image (PNG), label and hard.

    Args:
        out: folder, made if need be.
        train: training images.
        test: test images.
        train_seed: of the training images.
        test_seed: of the test images.
        size: side in pixels.
    """
    for name, count, seed in (("train", train, train_seed), ("test", test, test_seed)):
        glyphs = glyph_mix(count, seed, size=size)
        images = track(to_uint8(glyphs.image), label=f"writing {name}")
        tenfold.images.write_parquet(
            out / f"{name}.parquet",
            images,
            glyphs.label.tolist(),
            CLASS_NAMES,
            hard=glyphs.hard.tolist(),
        )


def write_cifar10(
    out: Path,
    *,
    train: int = 8000,
    test: int = 4000,
    train_seed: int = 0,
    test_seed: int = 99,
) -> None:
    """cifar-10-batches-py with 32x32 glyph images, grey in all three planes.

    Args:
        out: parent folder, made if need be.
        train: training images, spread over five batches.
        test: test images.
        train_seed: of the training images.
        test_seed: of the test images.
    """
    folder = out / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    for names, count, seed in (
        ([f"data_batch_{i}" for i in range(1, 6)], train, train_seed),
        (["test_batch"], test, test_seed),
    ):
        glyphs = glyph_mix(count, seed)
        planes = np.repeat(to_uint8(glyphs.image).reshape(count, 1, -1), 3, 1).reshape(count, -1)
        for name, rows in zip(names, np.array_split(np.arange(count), len(names)), strict=True):
            labels = glyphs.label[rows].tolist()
            content = {b"batch_label": name.encode(), b"labels": labels, b"data": planes[rows]}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {b"label_names": [name.encode() for name in CLASS_NAMES], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
