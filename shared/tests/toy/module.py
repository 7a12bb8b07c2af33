"""Its model, which the environment can make fail."""

import os
import signal
from typing import Literal

import torch
from lightning.pytorch import LightningModule

from tenfold.errors import UserError


class Line(LightningModule):
    """A line.

    Args:
        width: How many outputs.
        lr: Learning rate.
        route: What test runs.
    """

    def __init__(self, width: int, lr: float = 0.1, route: int | Literal["dynamic"] = "dynamic"):
        super().__init__()
        if width < 1:
            raise UserError(f"width {width} is not positive")
        self.save_hyperparameters()
        self.lr, self.route = lr, route
        self.layer = torch.nn.Linear(4, width)

    def training_step(self, batch, batch_idx):
        if self.global_step == int(os.environ.get("TOY_SIGNAL_AT", -1)):
            os.kill(os.getpid(), signal.SIGINT)
        if "TOY_CTRL_C" in os.environ:
            raise KeyboardInterrupt
        if "TOY_BUG" in os.environ:
            raise ZeroDivisionError("ours")
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def on_predict_batch_start(self, *_):
        if "TOY_TERMINATE" in os.environ:
            os.kill(os.getpid(), signal.SIGTERM)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).square().mean())

    def test_step(self, batch, batch_idx):
        self.log("route", -1.0 if self.route == "dynamic" else float(self.route))
        self.log("width", float(self.layer.out_features))
        self.log("lr", self.lr)
        self.log("rows", float(len(batch)), reduce_fx="sum")

    def predict_step(self, batch, batch_idx):
        return [{"first": y[0].item(), "last": y[-1].item()} for y in self.layer(batch)]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Deep(Line):
    def __init__(self, width: int = 3, depth: int = 2, lr: float = 0.1):
        super().__init__(width, lr)
        self.save_hyperparameters()
