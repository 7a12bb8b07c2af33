"""The contract of every package (`tenfold.testing`), kept with and without a teacher."""

from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ickd.data import ImageData
from ickd.module import Distiller
from tenfold.testing import PackageContract
from tenfold.training import LAST

RESNET8X4, RESNET20, RESNET32X4 = 1_233_540, 278_324, 7_433_860
RESNET18, RESNET18_DEEPLAB = 11_689_512, 16_608_181


class TestContract(PackageContract):
    cli = "ickd.cli:app"
    modules = ("distiller", "alone", "relations", "folded")
    parameter_counts = {  # noqa: RUF012
        "demo": 14_919,
        "demo-teacher": 44_055,
        "gratings-fine": 15_556,
        "gratings-fine-teacher": 44_692,
        "blobs": 8_152,
        "blobs-teacher": 63_082,
        "cifar10-cpu": 83_892 - 90 * 65,
        "cifar10-cpu-teacher": RESNET20 - 90 * 65,
        "cifar100": RESNET8X4,
        "cifar100-kl": RESNET8X4,
        "cifar100-kd": RESNET8X4,
        "cifar100-crd": RESNET8X4,
        "cifar100-dkd": RESNET8X4,
        "cifar100-ofd": RESNET8X4,
        "cifar100-reviewkd": RESNET8X4,
        "cifar100-light": 812_836,
        "cifar100-teacher": RESNET32X4,
        "cifar100-ab": RESNET20,
        "cifar100-fsp": RESNET20,
        "cifar100-ft": RESNET20,
        "images": 1_593_224,
        "imagenet": RESNET18,
        "imagenet-scratch": RESNET18,
        "imagenet-dkd": RESNET18,
        "voc": RESNET18_DEEPLAB,
        "voc-mobilenet": 5_816_053,
        "voc-teacher": 59_344_309,
    }
    steps = 15
    fit_options = (
        "--data.train_size=64",
        "--data.teacher_size=64",
        "--data.val_size=16",
        "--data.test_size=16",
        "--data.batch_size=16",
        "--data.seed=1",
    )
    bad_inputs = (
        (["fit", "--config", "nosuch"], "the recipes are blobs"),
        (["fit", "--student", "zoo:resnet9"], "resnet8"),
        (["fit", "--teacher", "resnet20"], "zoo:NAME"),
        (["fit", "--losses", "ikcd"], "did you mean 'ickd'"),
        (["fit", "--losses", '{"ickd": -1}'], "must be 0 or more"),
        (["fit", "--classes", "7"], "the data have 3 classes, the student 7"),
        (["fit", "--teacher-ckpt", "nowhere.ckpt"], "no such checkpoint"),
        (["fit", "--teacher-ckpt", "torn.ckpt"], "cut short"),
        (["fit", "--teacher-ckpt", "good.ckpt"], "not of embedded:gratings-teacher"),
        (["fit", "--model.optimizer", "adam"], "adam"),
        (["fit", "--model.lr", "-1"], "lr must be above 0"),
        (["fit", "--data.source", "mnist"], "generated"),
        (["fit", "--data.source", "cifar100", "--data.root", "nowhere"], "cifar-100-python"),
        (["fit", "--model.pairs", '[["stage9", "stage3", 1.0]]'], "no module 'stage9'"),
        (["fit", "--model.teacher_cache", "nowhere.safetensors"], "cache-teacher"),
        (["test", "--ckpt", "nowhere.ckpt"], "no such checkpoint"),
        (["test", "--ckpt", "torn.ckpt"], "cut short"),
        (["predict", "--ckpt", "good.ckpt", "--data.predict_root", "images"], "torn.png"),
        (["compare", "--losses", "none,ikcd"], "did you mean 'ickd'"),
        (["compare", "--seeds", "0"], "--seeds must be 1 or more"),
        (["sweep", "--beta", "one"], "--beta must be numbers"),
        (["cache-teacher", "--teacher", "nowhere"], "no network and no file"),
    )

    def distiller(self) -> Distiller:
        """The demo's pair, with three kinds of loss."""
        losses = {"ickd": 4.0, "kd": 1.0, "at": 10.0}
        return Distiller(
            "embedded:gratings-student",
            "embedded:gratings-teacher",
            losses=losses,
            num_classes=3,
            optimizer="adamw",
            lr=5e-3,
            schedule="onecycle",
        )

    def alone(self) -> Distiller:
        """Without a teacher."""
        return Distiller("embedded:gratings-student", num_classes=3, lr=0.05, schedule="constant")

    def relations(self) -> Distiller:
        """Losses that look across the batch."""
        return Distiller(
            "embedded:gratings-student",
            "embedded:gratings-teacher",
            losses={"sp": 100.0, "rkd": 1.0, "pkt": 1000.0, "cc": 0.02},
            num_classes=3,
            lr=0.02,
            schedule="cosine",
        )

    def folded(self) -> Distiller:
        """Two pairs of named taps on networks of timm, the teacher folded."""
        small = {"image_size": 32}
        return Distiller(
            "timm:test_resnet",
            "timm:test_resnet",
            pairs=[("layer3", "layer3", 0.5), ("layer4", "layer4", 1.0)],
            losses={"ickd": 2.5, "fitnet": 1.0},
            num_classes=3,
            student_options=small,
            teacher_options=small,
            optimizer="adamw",
            lr=2e-3,
            schedule="constant",
            fold_teacher=True,
        )

    def data(self) -> ImageData:
        return ImageData(batch_size=8, train_size=24, val_size=8, test_size=16)

    def exported(self) -> tuple[nn.Module, tuple[torch.Tensor]]:
        return self.distiller().student.eval(), (torch.rand(2, 3, 16, 16),)

    def prepare_bad_inputs(self, folder: Path) -> None:
        (folder / "images").mkdir()
        Image.new("RGB", (16, 16)).save(folder / "images/torn.png")
        path = folder / "images/torn.png"
        path.write_bytes(path.read_bytes()[:40])
        good = (self.finished("distiller")[0] / LAST).read_bytes()
        (folder / "good.ckpt").write_bytes(good)
        (folder / "torn.ckpt").write_bytes(good[:-1000])
