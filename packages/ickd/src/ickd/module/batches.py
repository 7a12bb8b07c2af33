"""Batches of any loader, under the names that the data modules of this package give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tenfold.distillation.rows import UNLABELLED
from tenfold.errors import UserError


class LoadedBatch(NamedTuple):
    """A batch of a loader that is none of this package's.

    Attributes:
        image: (batch, colours, height, width), pixels in 0..1, not normalised.
        label: (batch,) classes, or (batch, height, width) of masks; -1 where the loader has none.
        index: (batch,) positions in the training set; None where the loader does not tell.
    """

    image: Tensor
    label: Tensor
    index: Tensor | None = None  # pyright: ignore[reportIncompatibleMethodOverride]


def as_batch(batch: Any) -> Any:
    """Batches of data modules as they are; images, (images, labels) or a dict under their names.

    Raises:
        UserError: something else, in which no images are found.
    """
    if all(hasattr(batch, name) for name in LoadedBatch._fields) and batch.index is not None:
        return batch
    if isinstance(batch, Tensor):
        found = [batch]
    elif isinstance(batch, Mapping):
        found = [batch.get(name) for name in LoadedBatch._fields]
    elif hasattr(batch, "image"):
        found = [getattr(batch, name, None) for name in LoadedBatch._fields]
    else:
        found = list(batch[:3]) if isinstance(batch, Sequence) else []
    if not (found and isinstance(found[0], Tensor)):
        what = f"a batch of the loader is a {type(batch).__name__} without images"
        raise UserError(what, fix="give (images, labels), or a dict of image, label and index")
    image, label, index = [*found, None, None][:3]
    if label is None:
        label = torch.full((len(image),), UNLABELLED, device=image.device)
    return LoadedBatch(image, label, index)
