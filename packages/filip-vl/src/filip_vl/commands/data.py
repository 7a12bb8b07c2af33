"""data: the embedded task on disk."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from filip_vl.commands.common import must_be_new
from filip_vl.data import write_shapes
from filip_vl.data.shapes import CONTEXT_LENGTH
from filip_vl.synthetic import SIZE, TEST_PAIRS, TRAIN_PAIRS
from tenfold.console import at_least


def data(
    *,
    out: Path = Path("shapes"),
    format: Literal["jsonl", "csv", "webdataset"] = "jsonl",
    seed: int = 0,
    train: int = TRAIN_PAIRS,
    test: int = TEST_PAIRS,
) -> None:
    """Write the generated scenes and captions to disk, to look at or to read back as one's own.

    Args:
        out: folder; it must be new or empty.
        format: jsonl (with the objects and where they are seen), csv (a table of paths and titles),
            or webdataset (tar shards).
        seed: of the training set; the test set is always the same.
        train: number of training pairs.
        test: number of test pairs.
    """
    at_least(0, seed=seed)
    at_least(1, train=train, test=test)
    must_be_new(out)
    write_shapes(out, format, seed, train, test)
    print(f"wrote {train} training and {test} test pairs to {out}; learn from them:")
    print(f"  filip-vl fit {shlex.join(reading(out, format, train))}")


def reading(folder: Path, format: str, train: int = TRAIN_PAIRS) -> list[str]:
    """The arguments of fit that read what `data` wrote, as the recipe reads it in memory."""
    options = {
        "source": format,
        "root": str(folder),
        "image_size": str(SIZE),
        "context_length": str(CONTEXT_LENGTH),
        "augment": "none",
    }
    words = [word for name, value in options.items() for word in (f"--data.{name}", value)]
    if train < TRAIN_PAIRS:
        words += ["--data.batch_size", str(min(train, 64))]
    return ["--config", "demo", *words]
