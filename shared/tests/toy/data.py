"""Its data: eight rows of numbers."""

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader


class Rows(LightningDataModule):
    def __init__(self, batch_size: int = 2, rows: int = 8):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        rows = torch.arange(4.0 * self.hparams.rows).reshape(-1, 4) / 100
        return DataLoader(rows, batch_size=self.hparams.batch_size)

    test_dataloader = predict_dataloader = val_dataloader = train_dataloader


class FewRows(Rows):
    """Has an argument of another default than its parent's."""

    def __init__(self, batch_size: int = 2, rows: int = 4):
        super().__init__(batch_size, rows)
