"""Training, measuring and using a detector: the contract of every package, and what is its own."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from ds_net_plus import report
from ds_net_plus.checkpoint import STUDENT, Saved, write_checkpoint
from ds_net_plus.cli import app
from ds_net_plus.data import VOCData, write_voc
from ds_net_plus.metrics import Truth, coco_ap50
from ds_net_plus.model import DSConvNet
from ds_net_plus.module import DetectionModule, load_detector
from ds_net_plus.module.detection import META, detection_rows
from ds_net_plus.recalibration import recalibrate
from tenfold.checkpoint import load_state
from tenfold.errors import UserError
from tenfold.testing import CPU, PackageContract, quiet_trainer
from tenfold.training import LAST

NET = {
    "in_channels": 3,
    "front_widths": [8, 12],
    "stage_widths": [[8, 16, 32, 48], [12, 24, 48, 64]],
    "image_size": 64,
}
SCALES = [0.22, 0.35, 0.5, 0.7]


def small(**options) -> DetectionModule:
    arguments = {"arch": "ds_cnn_tiny", "net": NET, "num_classes": 10, "levels": [4, 8]}
    arguments |= {"extras": 1, "width": 32, "scales": SCALES, "gate": "value", "lr": 0.05}
    return DetectionModule(**{**arguments, **options})


def scenes(**options) -> VOCData:
    arguments = {"image_size": 64, "train_size": 32, "val_size": 8, "test_size": 16}
    return VOCData(**{**arguments, "batch_size": 8, **options})


def ready(module: DetectionModule) -> DetectionModule:
    """Measured statistics and a gate that uses several routes: what dynamic inference needs."""
    net = module.net
    recalibrate(net, [torch.randn(16, net.in_channels, 64, 64)])
    nn.init.normal_(net.gate_heads()[0])
    net.gate_trained = True
    return module


class TestDetectionContract(PackageContract):
    cli = "ds_net_plus.cli:app"
    modules = ("detection",)
    fit_options = (
        "--config=scenes",
        "--data.train_size=64",
        "--data.val_size=16",
        "--data.test_size=16",
        "--data.seed=1",
    )
    bad_inputs = (
        (["detect", "--ckpt", "nowhere.ckpt"], "no such checkpoint"),
        (["detect", "--ckpt", "classifier.ckpt"], "no detector"),
        (["detect", "--ckpt", "good.ckpt", "--images", "nowhere"], "no such folder"),
        (["detect", "--ckpt", "good.ckpt", "--images", "images"], "torn.png"),
        (["detect", "--ckpt", "good.ckpt", "--route", "9"], "0 (widths 8/12"),
        (["detect", "--ckpt", "good.ckpt", "--shown", "0"], "--shown must be 1 or more"),
        (["detect", "--ckpt", "good.ckpt", "--budget", "0.5"], "calibrate-budget"),
        (["detect", "--ckpt", "no-gate.ckpt"], "gate"),
        (["test", "--ckpt", "unmeasured.ckpt", "--route", "0"], "recalibrate"),
        (["fit", "--config", "voc", "--data.root", "nowhere"], "VOCtrainval_06-Nov-2007.tar"),
        (["fit", "--config", "voc", "--data.root", "torn"], "000002.xml"),
        (["fit", "--config", "scenes", "--model.num_classes", "3"], "10 classes, the detector 3"),
        (["fit", "--config", "scenes", "--model.levels", "[8, 64]"], "choose levels from 2, 4"),
        (["fit", "--config", "scenes", "--model.gate", "sgs"], "gate"),
        (["fit", "--config", "scenes", "--model.init_from", "nowhere.ckpt"], "no such checkpoint"),
        (["fit", "--config", "scenes", "--data.augment", "mixup"], "none, light, ssd"),
    )
    test_help_is_quick = None  # the same program as in test_contract.py, and its recipes
    test_recipe = None

    def detection(self) -> DetectionModule:
        return ready(small())

    def data(self) -> VOCData:
        return scenes()

    def prepare_bad_inputs(self, folder: Path) -> None:
        (folder / "images").mkdir()
        (folder / "images/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        write_checkpoint(folder / "classifier.ckpt", Saved({}, {STUDENT: DSConvNet()}))
        good = (self.finished("detection")[0] / LAST).read_bytes()
        (folder / "good.ckpt").write_bytes(good)
        raw = torch.load(folder / "good.ckpt", weights_only=True)
        raw[META]["gate"]["gate_trained"] = False
        torch.save(raw, folder / "no-gate.ckpt")
        for key, tensor in raw["state_dict"].items():
            if "running" in key:
                tensor.fill_(float(key.endswith("var")))
        raw["_class_path"] = "ds_net_plus.module.DetectionModule"
        raw["hyper_parameters"]["_class_path"] = "ds_net_plus.module.DetectionModule"
        raw["datamodule_hyper_parameters"]["_class_path"] = "ds_net_plus.data.VOCData"
        torch.save(raw, folder / "unmeasured.ckpt")
        write_voc(folder / "torn", train=4, test=2, size=32)
        (folder / "torn/VOCdevkit/VOC2007/Annotations/000002.xml").unlink()


# ------------------------------------------------------------------------------------- learning


def precision(module: DetectionModule, route: int | None, folder: Path, data: VOCData) -> float:
    module.route = route
    [measured] = quiet_trainer(folder).test(module, data, verbose=False)
    return measured["test/map"]


@pytest.mark.slow
def test_a_short_training_raises_precision(tmp_path):
    torch.manual_seed(0)
    coarse = {"levels": [8], "scales": [0.25, 0.4, 0.6]}
    module = ready(small(lr=0.15, warmup=0.5, random_routes=1, **coarse))
    data = scenes(train_size=320, test_size=60, batch_size=16, eval_batch_size=30)
    before = [precision(module, route, tmp_path, data) for route in (0, 3)]
    quiet_trainer(tmp_path, max_epochs=5, limit_val_batches=0).fit(module, data)
    after = [precision(module, route, tmp_path, data) for route in (0, 3, None)]
    assert min(after) > max(before) + 0.05, (before, after)


def test_predictions_are_rows_with_every_image(tmp_path):
    module, data = ready(small(min_score=0.9)), scenes()
    rows = [row for part in quiet_trainer(tmp_path).predict(module, data) for row in part]
    assert {row["image"] for row in rows} == set(range(16))
    assert " ".join(rows[0]) == "image label score x0 y0 x1 y1 route madds"


def test_rows_tell_names_and_paths():
    result = {
        "boxes": torch.tensor([[1.0, 2, 3, 4], [0, 0, 1, 1]]),
        "scores": torch.tensor([0.9, 0.2]),
        "labels": torch.tensor([1, 0]),
    }
    routes, madds = torch.tensor([[0, 2], [3, 3]]), torch.tensor([10, 20])
    rows = detection_rows([result] * 2, ["a.png", "b.png"], ("cat", "dog"), routes, madds, 0.5)
    assert [list(row.values()) for row in rows] == [
        ["a.png", "dog", 0.9, 1, 2, 3, 4, "0-2", 10],
        ["b.png", "dog", 0.9, 1, 2, 3, 4, "3-3", 20],
    ]
    [empty] = detection_rows([result], ["c.png"], (), torch.tensor([[1]]), madds, 0.95)
    assert list(empty.values()) == ["c.png", *[""] * 6, 1, 10]


def test_validation_measures_two_routes_until_there_is_a_gate(tmp_path):
    module, data = small(), scenes(eval_batch_size=8)
    module.net.gate_trained = False
    trainer = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, data)
    assert {"val/map_route_0", "val/map_route_3", "val/map"} <= set(trainer.callback_metrics)
    low, high = (float(trainer.callback_metrics[f"val/madds_route_{k}"]) for k in (0, 3))
    assert low < float(trainer.callback_metrics["val/madds"]) + 1 <= high + 1


def test_test_tells_both_precisions_and_the_cost(tmp_path):
    [measured] = quiet_trainer(tmp_path).test(ready(small()), scenes(), verbose=False)
    wanted = {"test/map", "test/madds"}
    assert set(measured) == (wanted if isinstance(coco_ap50(), str) else wanted | {"test/ap50"})


# ------------------------------------------------------------------------------------ its parts


def test_unused_weights_are_frozen(tmp_path):
    module = small(levels=[4], gate="keep", scales=[0.2, 0.3, 0.4])
    quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, scenes())
    net = module.net
    assert not any(p.requires_grad for p in net.classifier.parameters())
    assert not any(p.requires_grad for p in net.stages[1].parameters())
    assert not any(p.requires_grad for p in net.gate_parameters())
    assert all(p.requires_grad for p in net.stages[0].parameters())


@pytest.mark.parametrize(
    ("arch", "levels"), [("ds_resnet_cifar", [2, 4]), ("ds_mbnet_cifar", [4, 8])]
)
def test_other_backbones_learn(tmp_path, arch, levels):
    module = small(arch=arch, net=None, levels=levels, gate="keep", random_routes=1)
    data = scenes(image_size=32, train_size=4, batch_size=4)
    before = [p.detach().clone() for p in module.parameters()]
    quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)
    moved = [not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True)]
    trained = [p.requires_grad for p in module.parameters()]
    assert sum(moved) > 0.5 * sum(trained)  # attention that starts at zero passes no gradient yet
    assert not any(m and not t for m, t in zip(moved, trained, strict=True))


def test_a_backbone_comes_from_a_classifier(tmp_path):
    classifier = ready(small()).net
    classifier.budgets = [(0.0, 1e6)]
    write_checkpoint(tmp_path / "net.ckpt", Saved({}, {STUDENT: classifier}))
    module = small(arch="ds_mbnet", net=None, init_from=str(tmp_path / "net.ckpt"), gate="keep")
    assert module.hparams["arch"] == "ds_cnn_tiny"
    assert module.hparams["init_from"] is None
    for key, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, module.net.state_dict()[key])
    assert module.net.gate_trained
    assert module.net.budgets == [(0.0, 1e6)]
    assert small(gate="keep").net.gate_trained is False  # from scratch


def test_a_checkpoint_gives_the_detector_back(tmp_path):
    module = ready(small()).eval()
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = load_detector(tmp_path / "one.ckpt")
    assert loaded.net.gate_trained
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(module(x).results, loaded(x).results, strict=True):
            assert torch.equal(one["boxes"], other["boxes"])
    raw = load_state(tmp_path / "one.ckpt")
    del raw["state_dict"]["detector.laterals.0.0.weight"]
    torch.save(raw, tmp_path / "two.ckpt")
    with pytest.raises(UserError, match="do not fit"):
        load_detector(tmp_path / "two.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "both"}, "keep, value"),
        ({"schedule": "never"}, "epoch, step"),
        ({"lr": -1}, "lr must be"),
        ({"clip": 0.0}, "clip must be"),
        ({"arch": "ds_resnet50", "net": None, "levels": [8, 16, 32], "scales": None}, "one gate"),
        ({"num_classes": 0}, "num_classes 0"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(UserError, match=message):
        small(**options)


def test_data_of_other_colours_are_refused(tmp_path):
    module = small(net={**NET, "in_channels": 1})
    with pytest.raises(UserError, match="3 channels, the network takes 1"):
        quiet_trainer(tmp_path, max_steps=1).fit(module, scenes())


# -------------------------------------------------------------------------- pictures and command


def test_picture_shows_boxes_of_both_kinds(tmp_path):
    result = {
        "boxes": torch.tensor([[2.0, 2, 20, 20], [30, 30, 60, 62]]),
        "scores": torch.tensor([0.9, 0.2]),
        "labels": torch.tensor([1, 0]),
    }
    truth = Truth(result["boxes"], result["labels"], torch.tensor([False, True]))
    figure = report.detections(
        torch.rand(3, 3, 64, 64),
        [result] * 3,
        truths=[truth] * 3,
        names=("cat", "dog"),
        routes=torch.tensor([0, -1, 3]),
        madds=[10_000_000, 20_000_000, 40_000_000],
        columns=2,
    )
    assert [ax.get_xlabel() for ax in figure.axes[:3]] == [
        "route 0 · 10.0 M",
        "route largest · 20.0 M",
        "route 3 · 40.0 M",
    ]
    first = figure.axes[0]
    assert len(first.patches) == 1 + 2 * 2  # one found above the threshold, two there, each twice
    assert [text.get_text() for text in first.texts] == ["dog 0.90"]
    [path] = report.save_all({"detections": figure}, tmp_path)
    assert path.stat().st_size > 10_000
    assert report.detections(torch.rand(1, 1, 32, 32), [result]).axes[0].get_xlabel() == ""
    with pytest.raises(ValueError, match="2 results"):
        report.detections(torch.rand(3, 3, 64, 64), [result] * 2)


@pytest.mark.filterwarnings("ignore")
def test_detect_leaves_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = str(TestDetectionContract.finished("detection")[0] / LAST)
    common = ["--ckpt", checkpoint, "--device", "cpu", "--min-score", "0.01", "--shown", "3"]
    assert app.main(["detect", *common]) == 0
    assert (tmp_path / "detected/detections.png").is_file()
    write_voc(tmp_path, train=2, test=3, size=40)
    folder = str(tmp_path / "VOCdevkit/VOC2007/JPEGImages")
    (Path(folder) / "bad.jpg").write_bytes(b"")
    skipping = ["--images", folder, "--on-error", "skip", "--route", "0", "--out", "two"]
    assert app.main(["detect", *common, *skipping]) == 0
    with (tmp_path / "two/boxes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["image"]).name for row in rows} == {f"{n:06d}.jpg" for n in range(1, 5)}
    assert {row["route"] for row in rows} == {"0"}
    assert all(0 <= float(row["x0"]) <= float(row["x1"]) <= 40 for row in rows if row["label"])


def test_scenes_are_written_by_the_data_command(tmp_path, capsys):
    out = str(tmp_path / "voc")
    assert app.main(["data", "--layout", "voc", "--out", out, "--train", "4", "--test", "2"]) == 0
    told = capsys.readouterr().out
    assert "--data.source voc" in told
    assert "--data.class_names '[glyph0," in told
    names = ",".join(f"glyph{k}" for k in range(10))
    source = ["--data.source", "voc", "--data.root", out, "--data.class_names", f"[{names}]"]
    options = ["--data.batch_size", "2", "--trainer.max_steps", "1", *CPU]
    folder = ["--trainer.default_root_dir", str(tmp_path / "run")]
    status = app.main(["fit", "--config", "scenes", *source, *options, *folder])
    assert status == 0
    assert (tmp_path / "run" / LAST).is_file()


def test_the_recipe_for_voc_is_ssd300_on_ds_mbnet():
    with torch.device("meta"):
        module = DetectionModule()
    head = sum(p.numel() for p in module.detector.parameters()) - 7_676_204
    norm, anchors = 2 * 128, (4, 6, 6, 6, 6, 6)
    laterals = sum(width * 128 + norm for width in (264, 640, 1152))
    extras = 3 * (128 * 128 + 9 * 128 + 128 * 128 + 3 * norm)
    blocks = sum(9 * 128 + norm + 129 * k * a for k in (21, 4) for a in anchors)
    assert head == laterals + extras + blocks
