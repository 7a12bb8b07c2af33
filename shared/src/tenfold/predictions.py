"""What predict leaves behind: a table with a row for every sample."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


class PredictionTable(Callback):
    """Writes the rows that `predict_step` returns, a list of dictionaries, batch by batch.

    Several ranks write a file each: predictions.csv, predictions-1.csv, ... Predictions of another
    kind, such as images, are for the module to write; it says so where nothing was written.
    """

    def __init__(self, folder: Path) -> None:
        """Writes into `folder`, which is made when there is a first row."""
        self.folder, self.path = folder, None

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the rows of a batch."""
        if not (isinstance(outputs, list) and outputs and isinstance(outputs[0], dict)):
            return
        first = self.path is None
        if self.path is None:
            rank = f"-{trainer.global_rank}" if trainer.global_rank else ""
            self.path = self.folder / f"predictions{rank}.csv"
            self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("w" if first else "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(outputs[0]))
            if first:
                writer.writeheader()
            writer.writerows(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells where the table is, or that there is none."""
        if self.path is not None:
            rank_zero_info(f"wrote {self.path}")
        elif not self.folder.is_dir():
            rank_zero_warn("predict_step returned no rows (a list of dicts): nothing was written")
