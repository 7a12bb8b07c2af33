"""Steps that the scaler of float16 leaves out: how many in a row are too many."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from tenfold.errors import UserError
from tenfold.training import StopOnBadLoss

REMEDY = "raise weight_decay, lower the rate, or use --trainer.precision bf16-mixed"
"""What the authors did where the large model's float16 runs diverged (section 4), and may help."""


def scaler_of(trainer: Trainer) -> Any:
    """The scaler of a float16 run, None in other precisions."""
    return getattr(trainer.precision_plugin, "scaler", None)


class StopOnSkips(StopOnBadLoss):
    """Ends training where the scaler skips step after step; takes `StopOnBadLoss`'s place.

    The scaler skips a step whose gradients are not finite, be it that the loss is not or that they
    overflow, and halves its factor. The weights stay as they are, so that one skip is no harm.

    Args:
        most: skips in a row that end training.
    """

    def __init__(self, most: int = 20) -> None:
        super().__init__(patience=sys.maxsize)  # skips are counted here, not bad losses
        self.most, self.skips = most, 0
        self._before: float | None = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Remembers the scaler's factor, which falls where it skips."""
        self._before = scaler_of(trainer).get_scale()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts skips in a row.

        Raises:
            UserError: too many.
        """
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._before is None:  # gradients of one step are still gathering
            return
        self.skips = self.skips + 1 if scaler_of(trainer).get_scale() < self._before else 0
        self._before = None
        if self.skips == self.most:
            what = f"{self.skips} steps in a row were skipped, their gradients were not finite"
            raise UserError(what, fix=REMEDY)
