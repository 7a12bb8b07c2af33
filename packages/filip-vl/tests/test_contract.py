"""The contract of every package (`tenfold.testing`), kept by FILIP and by its CLIP baseline."""

from pathlib import Path

import torch
from torch import nn

from filip_vl.data import FilipDataModule
from filip_vl.model import FilipModel
from filip_vl.module import FilipModule
from tenfold.testing import PackageContract
from tenfold.training import LAST

BASE, LARGE, LARGE_392 = 150_949_633, 426_699_009, 427_239_681
# fewer ids and positions, and a token learner
WUKONG = LARGE - (49408 - 21128 + 77 - 32) * 768 + 2 * 256 + 2 * 256 * 32 + 256 * 24
TINY, CLIP_TINY = 222_401, 234_689


class Towers(nn.Module):
    """Both towers as one network of tensors."""

    def __init__(self, model: FilipModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image, text = self.model.encode_image(pixels), self.model.encode_text(ids)
        return image.normalized(), text.normalized() * text.mask.unsqueeze(2)


class TestContract(PackageContract):
    cli = "filip_vl.cli:app"
    modules = ("filip", "clip")
    parameter_counts = {  # noqa: RUF012
        "demo": TINY,
        "demo-clip": CLIP_TINY,
        "yfcc-base": BASE,
        "yfcc15m-declip": BASE,
        "filip340m-base": BASE,
        "filip340m-large": LARGE,
        "retrieval-large": LARGE_392,
        "wukong-finetune": WUKONG,
    }
    steps, falls_to = 12, 0.5
    fit_options = (
        "--data.train_size=64",
        "--data.val_size=16",
        "--data.test_size=16",
        "--data.batch_size=16",
        "--trainer.val_check_interval=1.0",
    )
    bad_inputs = (
        (["fit", "--config", "nosuch"], "the recipes are demo"),
        (["fit", "--model.model", "filip_huge"], "filip_base_patch32_224"),
        (["fit", "--model.model", "torn.ckpt"], "torn.ckpt"),
        (["fit", "--model.lr", "-1"], "lr"),
        (["fit", "--model.base_lr", "0.001"], "give one of them"),
        (["fit", "--model.token_fraction", "0"], "token_fraction must be above 0"),
        (["fit", "--model.optimizer", "sgd"], "sgd"),
        (["fit", "--data.source", "coco"], "source must be one of"),
        (["fit", "--data.source", "csv"], "--data.root DIR"),
        (["fit", "--data.source", "csv", "--data.root", "nowhere"], "nowhere"),
        (["fit", "--data.image_size", "64"], "images of 64 pixels, and a model of 48"),
        (["fit", "--data.context_length", "40"], "do not fit a context of 24"),
        (["test", "--ckpt", "nowhere.ckpt"], "no such checkpoint"),
        (["test", "--ckpt", "torn.ckpt"], "cut short"),
        (["demo", "--seeds", "0"], "must be 1 or more"),
    )

    def filip(self) -> FilipModule:
        exact = {"comm_dtype": "float32"}  # ranks are compared to the last digits
        return FilipModule("filip_tiny", lr=2e-3, decay="matrices", warmup=2, **exact)

    def clip(self) -> FilipModule:
        """The baseline, with what the other leaves out.

        LAMB and gradients clipped one by one, both sides gathered, towers that encode part by part
        and blocks computed again.
        """
        return FilipModule(
            "clip_tiny",
            optimizer="lamb",
            distributed="gather",
            comm_dtype="float32",
            lr=2e-2,
            warmup=2,
            clip_each=1.0,
            tower_batch=4,
            gradient_checkpointing=True,
            fields={"vision_layers": 2, "text_layers": 1},
        )

    def data(self) -> FilipDataModule:
        return FilipDataModule(batch_size=8, train_size=24, val_size=8, test_size=16)

    def exported(self) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
        module = self.filip()
        ids = torch.randint(3, 20, (2, 16))
        ids[:, 9:] = 26
        return Towers(module.model).eval(), (torch.rand(2, 3, 48, 48), ids)

    def prepare_bad_inputs(self, folder: Path) -> None:
        good = (self.finished("filip")[0] / LAST).read_bytes()
        (folder / "torn.ckpt").write_bytes(good[:-1000])
