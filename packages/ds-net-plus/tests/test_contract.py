"""The contract of every package (`tenfold.testing`), kept by both training stages."""

from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ds_net_plus.data import ImageData
from ds_net_plus.model import DynamicNet
from ds_net_plus.module import GateModule, SupernetModule
from ds_net_plus.recalibration import recalibrate
from tenfold.testing import PackageContract
from tenfold.training import LAST

MBNET = 7_676_204  # with 1000 classes
CLASS = 1152 + 1  # what a class costs in DS-MBNet's classifier


def cnn_parameters(
    colours: int,
    front: list[int],
    stages: list[int],
    hidden: int,
    depths: tuple[int, ...] = (2, 2),
) -> int:
    """DS-CNN, counted by hand: convolutions and norms, gate of four outputs, ten classes."""
    deep = [width for width, depth in zip(stages, depths, strict=True) for _ in range(depth)]
    blocks = [colours, *front, *deep]
    convs = sum(9 * a * b + 2 * b for a, b in pairwise(blocks))
    gate = (2 * front[-1] + 1) * hidden + (hidden + 1) * 4
    return convs + gate + (stages[-1] + 1) * 10


def resnet50_parameters(classes: int) -> int:
    """ResNet-50's, and at every stage's input a gate of a quarter of its channels and 4 outputs."""
    gates = sum(2 * c * (c // 4) + c // 4 + c + 4 * (c // 4) for c in (64, 256, 512, 1024))
    return 25_557_032 + gates - (1000 - classes) * 2049


def vit_parameters(
    front: tuple[int, int, int], last: tuple[int, int, int], classes: int, pixels: int, tokens: int,
    head_dim: int = 64, blocks: tuple[int, int] = (2, 10), hidden: int = 0,
) -> int:  # fmt: skip
    """DS-ViT by hand, from (features, heads, MLP units) of the front and behind the gate."""
    total = max(front[0], last[0]) * (pixels + 1 + 1 + tokens)
    for (d, heads, m), count in ((front, blocks[0]), (last, blocks[1])):
        inner = heads * head_dim
        total += count * (4 * d + (d + 1) * 3 * inner + (inner + 1) * d + (d + 1) * m + (m + 1) * d)
    r = front[0] // 4
    gate = 2 * front[0] * r + r + front[0] + (4 * r if not hidden else (r + 1 + 4) * hidden)
    return total + gate + 2 * last[0] + (last[0] + 1) * classes


def vit_small_parameters(classes: int, front: tuple[int, int, int] = (384, 3, 768)) -> int:
    """DS-ViT-S at 224 pixels."""
    return vit_parameters(front, (384, 6, 1536), classes, 768, 197)


def ready(net: DynamicNet) -> None:
    """Measured statistics and a gate that uses several routes: what dynamic inference needs."""
    recalibrate(net, [torch.randn(16, net.in_channels, net.image_size, net.image_size)])
    for head in net.gate_heads():
        nn.init.normal_(head)
    net.gate_trained = True


class TestContract(PackageContract):
    cli = "ds_net_plus.cli:app"
    modules = ("supernet", "gate", "vit", "resnet", "resnet_gates")
    parameter_counts = {  # noqa: RUF012
        "imagenet": MBNET,
        "imagenet-gate": MBNET,
        "cifar10": MBNET - 990 * CLASS,
        "cifar10-transfer": MBNET - 990 * CLASS,
        "cifar100": MBNET - 900 * CLASS,
        "cifar100-transfer": MBNET - 900 * CLASS,
        "imagenet-resnet50": resnet50_parameters(1000),
        "imagenet-resnet50-gate": resnet50_parameters(1000),
        "cifar10-resnet50-transfer": resnet50_parameters(10),
        "cifar100-resnet50-transfer": resnet50_parameters(100),
        "imagenet-vit-small": vit_small_parameters(1000),
        "imagenet-vit-small-gate": vit_small_parameters(1000),
        "imagenet-vit-finetune": vit_small_parameters(1000, front=(384, 6, 1536)),
        "cifar10-vit-small-transfer": vit_small_parameters(10),
        "cifar100-vit-small-transfer": vit_small_parameters(100),
        "cifar10-vit-cpu": vit_parameters(
            (128, 2, 256), (128, 4, 512), 10, 48, 65, head_dim=32, blocks=(1, 5), hidden=64
        ),
        "glyph-mix-vit": vit_parameters(
            (96, 3, 192), (96, 6, 384), 10, 64, 17, head_dim=16, blocks=(1, 4), hidden=64
        ),
        "demo": cnn_parameters(1, [8, 8], [128, 256], 128),
        "glyph-mix": cnn_parameters(1, [8, 8], [24, 48], 32),
        "glyph-mix-48": cnn_parameters(1, [8, 8], [128, 256], 128),
        "voc": MBNET,  # of a detector, the backbone
        "scenes": cnn_parameters(3, [12, 16], [48, 64, 96], 32, depths=(1, 2, 2)),
        "cifar10-cpu": cnn_parameters(3, [16, 24], [96, 192], 64),
    }
    fit_options = (
        "--data.train_size=64",
        "--data.val_size=16",
        "--data.test_size=16",
        "--data.batch_size=16",
        "--data.seed=1",
    )
    bad_inputs = (
        (["fit", "--config", "nosuch"], "the recipes are cifar10"),
        (["fit", "--model.arch", "ds_huge"], "choose from ds_mbnet"),
        (["fit", "--route", "9"], "0 (widths 32/64, "),
        (["fit", "--model.net", '{"stage_widths": [[24, 12], [24, 48]]}'], "ascending"),
        (["fit", "--model.net", '{"widths": 3}'], "'widths'"),
        (["fit", "--model.weights", "best"], "ema, student"),
        (["fit", "--data.source", "mnist"], "generated"),
        (["fit", "--data.eval_batch_size", "-1"], "eval_batch_size -1"),
        (["fit", "--model.warmup", "3"], "no room"),
        (["fit", "--model.lr", "-1"], "lr must be"),
        (["fit", "--model.net", '{"num_classes": -1}'], "num_classes must be a whole number"),
        (["fit", "--data.views", "2"], "--data.augment light"),
        (["fit", "--model.ema", "2"], "ema must be from 0 to 1, got 2"),
        (["demo", "--gate-steps", "-5"], "--gate-steps must be 1 or more, got -5"),
        (["data", "--train", "0"], "--train must be 1 or more"),
        (["data", "--out", "good.ckpt"], "good.ckpt"),
        (["profile", "--model", "ds_cnn_tiny", "--out", "good.ckpt"], "good.ckpt"),
        (["explain", "--ckpt", "good.ckpt", "--images", "images"], "torn.png"),
        (["train-gate", "--ckpt", "good.ckpt", "--routing-space", "3"], "two or more"),
        (["fit", "--model.net", '{"num_classes": 7}'], "10 classes, the network 7"),
        (["test", "--ckpt", "good.ckpt", "--model.net", '{"in_channels": 3}'], "--data.channels 3"),
        (["fit", "--data.source", "cifar10", "--data.root", "nowhere"], "data_batch_1"),
        (["fit", "--data.source", "imagefolder", "--data.root", "tree"], "differ: dog"),
        (["test", "--ckpt", "nowhere.ckpt"], "no such checkpoint"),
        (["test", "--ckpt", "torn.ckpt"], "cut short"),
        (["test", "--ckpt", "no-gate.ckpt"], "train-gate"),
        (["test", "--ckpt", "unmeasured.ckpt", "--route", "0"], "recalibrate"),
        (["validate", "--ckpt", "unmeasured.ckpt", "--route", "0"], "recalibrate"),
        (["validate", "--ckpt", "unmeasured.ckpt"], "recalibrate"),
        (["test", "--ckpt", "good.ckpt", "--model.arch", "ds_cnn_wide"], "another"),
        (
            ["test", "--ckpt", "good.ckpt", "--model.net", '{"depths": [1, 1]}'],
            "depths [2, 2] instead of [1, 1]; 30 unexpected",
        ),
        (["test", "--ckpt", "good.ckpt", "--budget", "0.5"], "calibrate-budget"),
        (["predict", "--ckpt", "good.ckpt", "--data.predict_root", "images"], "torn.png"),
        (["train-gate", "--ckpt", "good.ckpt", "--routing-space", "3,1"], "ascending"),
        (["train-gate", "--ckpt", "good.ckpt", "--routing-space", "0,9"], "0 (widths 6/12"),
        (["train-gate", "--ckpt", "good.ckpt", "--routing-space", "one"], "got 'one'"),
        (["calibrate-budget", "--ckpt", "good.ckpt", "--target-madds", "1"], "choose"),
        (["calibrate-budget", "--ckpt", "good.ckpt"], "--target-saving"),
        (["explain", "--ckpt", "good.ckpt", "--images", "nowhere"], "no such folder"),
        (["recalibrate", "--ckpt", "good.ckpt", "--batches", "many"], "--batches"),
    )

    def supernet(self) -> SupernetModule:
        module = SupernetModule(lr=0.05, warmup=0, cooldown=0, ema=0.9)
        for net in (module.net, module.teacher):
            ready(net)
        return module

    def gate(self) -> GateModule:
        module = GateModule()
        ready(module.net)
        return module

    def vit(self) -> SupernetModule:
        """A transformer with another optimizer."""
        sizes = {"front": (24, 1, 2), "routes": ((16, 1, 1, 1), (24, 2, 2, 2), (32, 2, 2, 2))}
        module = SupernetModule(
            arch="ds_vit_glyph",
            net={**sizes, "gate_outputs": 3},
            optimizer="adamw",
            lr=5e-3,
            warmup=0,
            cooldown=0,
            ema=0.9,
        )
        for net in (module.net, module.teacher):
            ready(net)
        return module

    def _resnet(self) -> dict:
        return {"in_channels": 1, "depths": (1, 1), "base_widths": (32, 32), "gates": 2}

    def resnet(self) -> SupernetModule:
        """Paths of two gates in Stage I."""
        module = SupernetModule(
            arch="ds_resnet_cifar",
            net=self._resnet(),
            optimizer="adamw",
            lr=0.01,
            warmup=0,
            cooldown=0,
            ema=0.9,
        )
        for net in (module.net, module.teacher):
            ready(net)
        return module

    def resnet_gates(self) -> GateModule:
        """Two gates, with a path upstream that is drawn for every step."""
        module = GateModule(arch="ds_resnet_cifar", net=self._resnet(), lr=0.1)
        ready(module.net)
        return module

    def data(self) -> ImageData:
        return ImageData(batch_size=8, train_size=32, val_size=8, test_size=16)

    def exported(self) -> tuple[nn.Module, tuple[torch.Tensor]]:
        return self.supernet().net.materialize(2), (torch.randn(2, 1, 32, 32),)

    def prepare_bad_inputs(self, folder: Path) -> None:
        for name in ("train/cat", "train/dog", "val/cat"):
            (folder / "tree" / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(folder / "tree" / name / "1.png")
        (folder / "images").mkdir()
        (folder / "images/torn.png").write_bytes((folder / "tree/val/cat/1.png").read_bytes()[:50])
        good = (self.finished("supernet")[0] / LAST).read_bytes()
        (folder / "good.ckpt").write_bytes(good)
        (folder / "torn.ckpt").write_bytes(good[:-1000])
        raw = torch.load(folder / "good.ckpt", weights_only=True)
        raw["ds_net_plus"]["gate"]["gate_trained"] = False
        torch.save(raw, folder / "no-gate.ckpt")
        for key, tensor in raw["state_dict"].items():
            if "running" in key:
                tensor.fill_(float(key.endswith("var")))
        torch.save(raw, folder / "unmeasured.ckpt")
