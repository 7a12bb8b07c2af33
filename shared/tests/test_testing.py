"""The contract on a sample package: a sound one passes, and each planted defect fails its test.

The sample is written to a folder, as a package of its own would be installed; the contracts are
classes of this file, which the contract's processes load by its path.
"""

import inspect
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tenfold.testing import PackageContract

pytestmark = pytest.mark.filterwarnings("ignore")

MODULE = '''
import torch
from lightning.pytorch import LightningModule
from torch import nn
from typing import NamedTuple

from tenfold.data import DataModule, TensorItems
from tenfold.errors import UserError


class Batch(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Toy(LightningModule):
    """A regression with dropout, a batch norm and a moving average; `defect` spoils one thing."""

    def __init__(self, width: int = 16, defect: str = "") -> None:
        super().__init__()
        if width < 1:
            raise UserError(f"width {width} must be at least 1")
        if defect == "crash" and width == 7:
            raise ZeroDivisionError("seven")
        self.save_hyperparameters()
        norm = nn.BatchNorm1d(width)
        self.net = nn.Sequential(nn.Linear(8, width), norm, nn.Dropout(0.1), nn.Linear(width, 1))
        self.defect, self.generator = defect, torch.Generator().manual_seed(0)
        average = [p.detach().clone() for p in self.net.parameters()]
        self.average = average if defect == "unsaved" else nn.ParameterList(average)
        for p in self.average:
            p.requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        x, y = batch
        if self.defect == "generator":
            x = x + 0.1 * torch.randn(x.shape, generator=self.generator)
        if self.defect == "across":
            x = x - x.mean(0)
        prediction = self.net(x).squeeze(1)
        if self.defect == "bf16":
            prediction = prediction / (prediction.dtype != torch.bfloat16)
        if self.defect == "rough":
            prediction = prediction + (prediction.dtype == torch.bfloat16)
        loss = (prediction - y).square()
        return loss.sum() if self.defect == "sum" else loss.mean()

    def on_train_batch_end(self, *_):
        for average, p in zip(self.average, self.net.parameters(), strict=True):
            average.lerp_(p.detach().to(average), 0.1)
        if self.defect == "unsaved":  # and it matters
            self.net[0].bias.data.lerp_(self.average[1].to(self.dtype), 0.5)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict]:
        rank = self.global_rank if self.defect == "rank" else 0
        if self.defect == "mute":
            return self.net(batch.x)
        return [{"y": y, "sign": rank + int(y > 0)} for y in self.net(batch.x).squeeze(1).tolist()]

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if self.defect == "load":
            checkpoint["state_dict"]["net.0.bias"] *= 1 + 1e-6

    def configure_optimizers(self):
        rate = 1e-5 if self.defect == "lazy" else 0.05
        return torch.optim.SGD(self.net.parameters(), rate, momentum=0.9)


class Numbers(DataModule):
    def __init__(self, items: int = 40, batch_size: int = 8) -> None:
        super().__init__(batch_size)
        self.save_hyperparameters()
        if items < 1:
            raise UserError(f"items {items} must be at least 1")
        self.items = items

    def train_dataset(self) -> TensorItems:
        x = torch.randn(self.items, 8, generator=torch.Generator().manual_seed(1))
        return TensorItems(Batch(x, x.sum(1)))

    predict_dataset = val_dataset = train_dataset


def refuse(file: str) -> None:
    """Refuses a file."""
    raise UserError("no good file", where=file)
'''

CLI = """
from tenfold.cli import App, Command

MODEL = {"model": "sample.module:Toy", "datamodule": "sample.module:Numbers"}
COMMANDS = {"refuse": Command("sample.module:refuse", "refuse a file")}
app = App("sample", "sample", "A sample.", **MODEL, commands=COMMANDS)
"""

RECIPES = {
    "small": "model: {init_args: {width: 4}}",
    "vast": "model: {init_args: {width: 1000000}}",
}


_FOLDER = tempfile.TemporaryDirectory()


def write_toy(folder: Path) -> None:
    (folder / "recipes").mkdir(parents=True)
    files = {"__init__.py": "", "module.py": MODULE, "cli.py": CLI}
    files["slow.py"] = "import torch\nfrom sample.cli import app"
    files |= {f"recipes/{name}.yaml": text for name, text in RECIPES.items()}
    for name, text in files.items():
        (folder / name).write_text(text)


write_toy(Path(_FOLDER.name) / "sample")  # when pytest collects, the recipes must be there
sys.path.insert(0, _FOLDER.name)


class Traced(torch.nn.Module):
    """Another function once it is exported."""

    def forward(self, x):
        return x if torch.compiler.is_exporting() else x + 1


class Sound(PackageContract):
    """A package that keeps the contract."""

    parameter_counts = {"small": 4 * 8 + 3 * 4 + 4 + 1, "vast": 12_000_000 + 1}  # noqa: RUF012
    bad_inputs = (
        (["fit", "--config", "tiny"], "the recipes are small, vast"),
        (["fit", "--model.width=0"], "width 0 must be at least 1"),
        (["fit", "--data.items=0"], "items 0"),
        (["refuse", "file"], "no good file"),
    )
    defect = ""

    def module(self):
        from sample.module import Toy

        return Toy(defect=self.defect)

    def data(self):
        from sample.module import Numbers

        return Numbers(16 if self.defect == "few" else 40, 9 if self.defect == "odd" else 8)

    def exported(self):
        net = Traced() if self.defect == "traced" else self.module().net
        return net, (torch.ones(2, 8),)

    @property
    def cli(self):
        return "sample.slow:app" if self.defect == "slow" else "sample.cli:app"


class TestSound(Sound):
    """All of the contract, as a package has it."""


DEFECTS = [
    ("lazy", "test_one_batch_is_learned", "took its loss from"),
    ("generator", "test_interrupted_and_resumed", "ends in another state"),
    ("generator", "test_killed_and_resumed", "ends in another state"),
    ("unsaved", "test_interrupted_and_resumed", "ends in another state"),
    ("bf16", "test_bf16", "not finite after a step of module: .*net"),
    ("rough", "test_bf16", "in float32 and .* under bf16 autocast"),
    ("sum", "test_two_ranks_do_as_one", "gradients of module differ on rank 0"),
    ("across", "test_two_ranks_do_as_one", "gradients of module differ on rank 0"),
    ("rank", "test_two_ranks_do_as_one", "predictions of module differ"),
    ("load", "test_saved_and_loaded", r"weights of module differ after loading: net\.0\.bias"),
    ("mute", "test_predict_command", "predict left no file"),
    ("few", "test_interrupted_and_resumed", "data.. has 2 batches in an epoch"),
    ("odd", "test_two_ranks_do_as_one", "odd batch size, 9"),
    ("slow", "test_help_is_quick", "imports torch"),
    ("traced", "test_export", "computes something else"),
]
# classes of this file, for the processes that load them by name
globals().update({row[0]: type(row[0], (Sound,), {"defect": row[0]}) for row in DEFECTS})


def call(contract, test, **arguments):
    wanted = inspect.signature(getattr(contract, test)).parameters
    contract.setup_method(None)
    try:
        getattr(contract, test)(**{name: arguments[name] for name in wanted})
    finally:
        contract.teardown_method(None)


@pytest.mark.parametrize(("defect", "test", "message"), DEFECTS)
def test_a_planted_defect_fails_its_test(defect, test, message, tmp_path, monkeypatch):
    fixtures = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    with pytest.raises(AssertionError, match=message):
        call(globals()[defect](), test, name="module", **fixtures)


@pytest.mark.parametrize(
    ("recipe", "message"), [("small", "49 parameters instead of 50"), ("vast", "no number for")]
)
def test_a_wrong_recipe_fails(recipe, message, tmp_path):
    contract = Sound()
    contract.parameter_counts = {"small": 50}
    with pytest.raises(AssertionError, match=message):
        call(contract, "test_recipe", recipe=recipe, tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fit", "--model.width=7", "--model.defect=crash"], "status 1"),
        (["fit", "--model.width=0"], "without 'something else'"),
        (["recipes"], "status 0"),
    ],
)
def test_bad_input_badly_told_fails(argv, message, tmp_path, monkeypatch, capsys):
    fixtures = {"tmp_path": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    with pytest.raises(AssertionError, match=message):
        call(Sound(), "test_bad_input", argv=argv, message="something else", **fixtures)
