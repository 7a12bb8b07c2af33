"""Items of other classes, drawn on the device: the negatives of CRD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Int, Int32
from torch import Tensor, nn

from tenfold.distillation.rows import UNLABELLED
from tenfold.errors import UserError

Sampling = Literal["exact", "fast"]

NEGATIVES = 16384
"""CRD's number of negatives for an image."""

_KEYS = 1 << 24
"""Random keys held at a time."""


class OtherClassSampler(nn.Module):
    """Draws items whose class is another one, uniformly.

    All items lie sorted by class in one table. The items of other classes are then two runs of it,
    before and behind the item's own class, and a draw is a random number that jumps over that
    class. An item without a label (-1) is a class of its own. The tables are int32, move with
    the module, and are not saved.

    Draws come from torch's global generator of the device.

    Example:
        >>> sampler = OtherClassSampler(train_labels, 16384)
        >>> sampler(batch["index"])  # (batch, 16384)

    Args:
        labels: (items,) classes, in the order of the items' index.
        count: of negatives for each item; if left out 16384, or as many as every class leaves if
            that is less.
        sampling: "exact" draws without replacement, "fast" with.

    Raises:
        UserError: fewer than two classes, or without replacement fewer other items than ``count``.
    """

    order: Int32[Tensor, " items"]
    class_of: Int32[Tensor, " items"]
    starts: Int32[Tensor, " classes_and_end"]

    def __init__(
        self,
        labels: Int[Tensor, " items"] | Sequence[int],
        count: int | None = None,
        sampling: Sampling = "exact",
    ) -> None:
        super().__init__()
        classes = torch.as_tensor(labels).long().clone()
        alone = classes <= UNLABELLED
        classes[alone] = classes.max() + 1 + torch.arange(int(alone.sum()), device=classes.device)
        _, class_of, sizes = classes.unique(return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise UserError("negatives are of other classes, but the labels have only one class")
        fewest, self.most = (len(classes) - int(n) for n in (sizes.max(), sizes.min()))
        self.count = min(NEGATIVES, fewest) if count is None else count
        self.sampling: Sampling = sampling
        if sampling == "exact" and self.count > fewest:
            raise UserError(
                f"{self.count} negatives cannot be drawn without replacement from the {fewest} "
                "items that the largest class leaves",
                fix=f'draw at most {fewest}, or take sampling="fast"',
            )
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        tables = {"order": class_of.argsort(stable=True), "class_of": class_of, "starts": starts}
        for name, table in tables.items():
            self.register_buffer(name, table.int(), persistent=False)

    def forward(self, index: Int[Tensor, " batch"]) -> Int32[Tensor, "batch count"]:
        """Draw items of other classes for every item.

        Args:
            index: positions of the items.
        """
        first = self.starts[self.class_of[index]].unsqueeze(1)
        size = self.starts[self.class_of[index] + 1].unsqueeze(1) - first
        others = len(self.order) - size
        if self.sampling == "exact":
            position = self._without_replacement(others)
        else:
            wide = torch.randint(1 << 62, (len(index), self.count), device=first.device)
            position = (wide % others).int()  # of so wide a range, no remainder is favoured
        return self.order[position + size * (position >= first)]

    def _without_replacement(
        self, others: Int32[Tensor, "batch 1"]
    ) -> Int32[Tensor, "batch count"]:
        """Different numbers below ``others`` in every row: where random keys are largest."""
        places = torch.arange(self.most, device=others.device)
        chunks = []
        for below in others.split(max(_KEYS // self.most, 1)):
            keys = torch.rand(len(below), self.most, device=others.device)
            keys = keys.masked_fill_(places >= below, -1)
            chunks.append(keys.topk(self.count, sorted=False).indices.int())
        return torch.cat(chunks)
