"""A run that a command starts: trained, gone on with, and refused in another run's folder."""

import csv

import pytest
import torch
from lightning.pytorch import LightningModule

from tenfold.checkpoint import load_state
from tenfold.data import DataModule, TensorItems
from tenfold.errors import UserError
from tenfold.runs import begun, make_trainer
from tenfold.training import LAST


class Regression(LightningModule):
    """A regression."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, _):
        loss = (self.layer(batch["x"]) - 1).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams["lr"])


class Points(DataModule):
    """Twelve points."""

    def train_dataset(self):
        return TensorItems({"x": torch.arange(24.0).reshape(12, 2) / 24})


def fit(folder, epochs, **options):
    module = Regression(**options)
    checkpoint = begun(folder, module, epochs)
    trainer = make_trainer(folder, epochs=epochs, seed=3, accelerator="cpu", progress=False)
    trainer.fit(module, datamodule=Points(4), ckpt_path=checkpoint)
    return module.layer.weight.detach()


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_where_it_stood(tmp_path):
    assert begun(tmp_path / "a", Regression(), 2) is None
    fit(tmp_path / "a", 1)
    assert begun(tmp_path / "a", Regression(), 2) == tmp_path / "a" / LAST
    weight = fit(tmp_path / "a", 2)
    assert load_state(tmp_path / "a" / LAST)["global_step"] == 6
    assert torch.equal(weight, fit(tmp_path / "b", 2))
    with (tmp_path / "a" / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]


@pytest.mark.filterwarnings("ignore")
def test_the_folder_of_another_run_is_refused(tmp_path):
    fit(tmp_path, 2)
    with pytest.raises(UserError, match=r"other settings \(lr 0.1 -> 0.2\)") as caught:
        begun(tmp_path, Regression(lr=0.2), 2)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="epochs 2 -> 1"):
        begun(tmp_path, Regression(), 1)


def test_further_options_are_the_trainers(tmp_path):
    options = {"limit_val_batches": 0, "log_every_n_steps": 3}
    trainer = make_trainer(tmp_path, epochs=1, accelerator="cpu", progress=False, **options)
    assert (trainer.limit_val_batches, trainer.log_every_n_steps) == (0, 3)
