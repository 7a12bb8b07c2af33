"""taps, zoo, cost and convert as a person types them; their figures against other counts."""

import argparse
import json
import re
import shlex
import sys
import types

import pytest
import torch
import yaml
from torch import nn

from ickd import zoo as cifar
from ickd.commands import cost
from ickd.commands.common import open_model, open_saved
from ickd.commands.taps import example_images, list_points
from ickd.data import ImageData, SegmentationData
from ickd.measure import icc_formula
from ickd.networks import Network, open_network
from ickd.taps import tap
from tenfold.cli import App, Command
from tenfold.errors import UserError

pytestmark = pytest.mark.usefixtures("uncollected_timings")
NAMES = ("convert", "cost", "data", "taps", "zoo")
app = App("ickd", "ickd", "", commands={n: Command(f"ickd.commands:{n}", "") for n in NAMES})


def run(*argv: object) -> int:
    return app.main([str(word) for word in argv])


def rows(text: str) -> dict[str, list[str]]:
    """Lines of a table by their first cell; cells are two or more spaces apart."""
    cells = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    return {first: others for first, *others in cells}


# -- taps --------------------------------------------------------------------------------------


def test_taps_lists_every_module_with_what_it_gives(capsys):
    assert run("taps", "zoo:resnet8", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    net = cifar.create("resnet8").eval()
    given = dict.fromkeys(name for name, _ in net.named_modules() if name)
    hooks = [
        module.register_forward_hook(lambda _, __, y, n=name: given.__setitem__(n, y.shape[1:]))
        for name, module in net.named_modules()
        if name
    ]
    net(torch.rand(2, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    assert {point["name"] for point in told["modules"]} == set(given)
    for point in told["modules"]:
        module = net.get_submodule(point["name"])
        assert point["shape"] == list(given[point["name"]])
        assert point["parameters"] == sum(p.numel() for p in module.parameters())
        assert point["kind"] == type(module).__name__
        assert point["spatial"] == (len(point["shape"]) == 3 and point["shape"][1] > 1)
    assert told["stages"] == ["relu", "layer1", "layer2", "layer3"]
    assert (told["model"], told["input"], told["ickd"]) == ("zoo:resnet8", [3, 32, 32], "layer3")


def test_taps_of_timm_on_images_of_a_given_size(capsys):
    assert run("taps", "timm:resnet18", "--input", "[3,64,96]") == 0
    told = capsys.readouterr().out
    table = rows(told)
    assert table["module"] == ["kind", "suggested", "output", "parameters", "spatial"]
    assert table["layer4"] == ["Sequential", "ickd", "512x2x3", "8,393,728", "yes"]
    assert table["layer1.0.conv2"] == ["Conv2d", "64x16x24", "36,864", "yes"]
    assert table["fc"] == ["Linear", "1000", "513,000"]
    assert "stages, shallow to deep: act1, layer1, layer2, layer3, layer4\n" in told
    assert told.endswith("tap for ICKD: layer4\n")


def test_taps_writes_json_to_a_file(tmp_path, capsys):
    file = tmp_path / "new" / "taps.json"
    assert run("taps", "zoo:resnet8", "--num-classes", 7, "--json", file) == 0
    assert capsys.readouterr().out == f"wrote {file}\n"
    assert json.loads(file.read_text())["modules"][-1]["shape"] == [7]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("zoo:wrn_16_1", ["conv1", "block1", "block2", "block3", "relu"]),
        ("zoo:MobileNetV2", ["conv1", "blocks.1", "blocks.2", "blocks.4", "blocks.6", "conv2"]),
        ("embedded:blobs-student", ["stages.0", "stages.1", "stages.2.body", "stages.2"]),
        ("deeplab:resnet18", [*(f"backbone.layer{n}" for n in (1, 2, 3, 4)), "aspp.bn1", "tap"]),
    ],
)
@torch.no_grad()
def test_the_suggestions_are_the_features_that_the_network_gives(name, names):
    """Hooks on the suggested modules of a network with taps of its own give just these maps."""
    torch.manual_seed(0)
    network = open_network(name).eval()
    points = list_points(network, example_images(network, None))
    marked = {point.name: point.suggested for point in points if point.suggested}
    assert list(marked) == [n if n != "tap" else "decoder.last_conv.5" for n in names]
    images = torch.randn(2, 3, 64, 64)
    own = network.net.taps(images)
    with tap(network.net, list(marked)) as features:
        network.net(images)
    (last,) = (n for n, mark in marked.items() if mark == "ickd")
    assert torch.equal(features[last], own.signal("last"))
    for map_ in own.maps:
        assert any(torch.equal(map_, feature) for feature in features.values())


def test_a_network_that_takes_images_of_one_size_alone(monkeypatch, capsys):
    mine = types.ModuleType("mine")

    def build() -> nn.Module:
        conv = nn.Conv2d(3, 2, 3)
        return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(2 * 6 * 6, 4))

    mine.build = build  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "mine", mine)
    assert run("taps", "python:mine:build", "--input", "[3,8,8]") == 0
    table = rows(capsys.readouterr().out)
    assert table["1"] == ["ReLU", "ickd", "2x6x6", "0", "yes"]
    assert table["3"] == ["Linear", "4", "292"]


def test_a_module_that_does_not_run_is_listed_without_an_output():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x).mean((2, 3))

    network = Network(Half(), "half").eval()
    used, unused = list_points(network, example_images(network, (3, 8, 8)))
    assert (used.name, used.shape, used.suggested) == ("used", (4, 6, 6), "ickd")
    assert (unused.name, unused.shape, unused.parameters) == ("unused", None, 112)
    assert not unused.spatial


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["zoo:resnet9"], "no network of the zoo is called 'resnet9': choose"),
        (["resnet8"], "no network and no file is 'resnet8': write a name such as zoo:resnet20"),
        (["zoo:resnet8", "--input", "[3,32]"], "--input must be channels, height and width"),
        (["zoo:resnet8", "--input", "[3,0,32]"], "--input must be channels, height and width"),
        (["timm:resnet18", "--input", "[1,32,32]"], r"timm:resnet18 does not take images \(1, 32"),
        (["zoo:resnet8", "--num-classes", "0"], "num_classes must be 1 or more"),
    ],
)
def test_bad_input_of_taps(arguments, line, capsys):
    assert run("taps", *arguments) == 2
    assert re.match(f"error: {line}", capsys.readouterr().err)


# -- zoo ---------------------------------------------------------------------------------------


def test_the_list_of_networks(monkeypatch, capsys):
    rows_of_zoo = {  # a few: test_zoo knows all
        "resnet8": ("83,892", 12.5, "64x8x8", []),
        "resnet32x4": ("7,433,860", 1083.0, "256x8x8", ["79.42 top-1"]),
        "vgg8": ("3,965,028", 96.2, "512x4x4", ["70.36 top-1"]),
        "MobileNetV2": ("812,836", 6.5, "1280x2x2", ["64.60 top-1"]),
    }
    monkeypatch.setattr(cifar, "names", lambda: list(rows_of_zoo))
    assert run("zoo", "list") == 0
    table = rows(capsys.readouterr().out)
    for name, (params, macs, shape, top1) in rows_of_zoo.items():
        found = table[f"zoo:{name}"]
        assert [found[0], *found[2:]] == [params, "3x32x32", shape, *top1]
        assert float(found[1].removesuffix(" M")) == pytest.approx(macs, abs=0.0501)
    assert sum(name.startswith("zoo:") for name in table) == len(rows_of_zoo)
    for name, params, macs, miou in [
        ("resnet101", "59,344,309", 92.8, "77.89 mIoU"),
        ("resnet18", "16,608,181", 42.7, "72.07 mIoU"),
        ("mobilenet_v2", "5,816,053", 27.1, "68.46 mIoU"),
    ]:
        found = table[f"deeplab:{name}"]
        assert [found[0], *found[2:]] == [params, "3x513x513", "256x129x129", miou]
        assert float(found[1].removesuffix(" M")) / 1e3 == pytest.approx(macs, abs=0.051)
    params = {name: table[f"embedded:{name}"][0] for name in ("gratings-teacher", "blobs-student")}
    assert params == {"gratings-teacher": "44,055", "blobs-student": "8,152"}


def test_one_network_in_full(capsys):
    assert run("zoo", "show", "--name", "wrn_16_2") == 0
    told = capsys.readouterr().out
    assert told.startswith("zoo:wrn_16_2: 703,284 parameters, 101.12 M MACs at 32x32\n")
    assert "published without a teacher: 73.26 top-1" in told
    assert "mean 0.5071, 0.4867, 0.4408 and std 0.2675, 0.2565, 0.2761" in told
    table = rows(told)
    shapes = [("conv1", "16x32x32"), ("block2", "64x16x16"), ("block3", "128x8x8")]
    assert [table[name] for name, _ in shapes] == [[shape] for _, shape in shapes]
    assert table["relu"] == ["128x8x8", "compared by ickd"]
    assert run("zoo", "show", "--name", "embedded:blobs-teacher") == 0
    told = capsys.readouterr().out
    assert "published" not in told
    assert rows(told)["stages.2.body"] == ["32x12x12", "compared by ickd"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["show"], "show needs the name of a network"),
        (["list", "--name", "resnet20"], "list takes no name, got 'resnet20'"),
        (["show", "--name", "resnet21"], "no network of the zoo is called 'resnet21': choose"),
        (["show", "--name", "deeplab:vgg"], "no network is called 'deeplab:vgg': there are"),
        (["show", "--name", "timm:resnet18"], "'timm:resnet18' is no network of this package"),
        (["draw"], ".*draw"),
    ],
)
def test_bad_input_of_zoo(arguments, line, capsys):
    assert run("zoo", *arguments) == 2
    assert re.match(f"error: {line}", capsys.readouterr().err)


# -- cost --------------------------------------------------------------------------------------


def test_cost_adds_up(tmp_path, capsys):
    file = tmp_path / "new" / "cost.json"
    pair = ["--student", "embedded:gratings-student", "--teacher", "embedded:gratings-teacher"]
    small = ["--image-size", 16, "--batch", 4, "--repeats", 1, "--device", "cpu", "--out", file]
    assert run("cost", *pair, "--losses", "none,kd,ickd,kd+ickd", *small) == 0
    told = capsys.readouterr().out
    result = json.loads(file.read_text())
    student, teacher, floor = result["student"], result["teacher"], result["floor"]["macs"]
    assert (student["parameters"], teacher["parameters"]) == (14_919, 44_055)
    # the student: a stem and three convolutions 3x3, and the classifier
    convs = 27 * 12 * 256 + 9 * (12 * 12 * 64 + 12 * 24 * 16 + 24 * 48 * 16)
    assert student["macs"] == convs + 48 * 3
    assert floor == 3 * student["macs"] + teacher["macs"]
    kd, ickd, both = result["losses"]
    assert [loss["name"] for loss in (kd, ickd, both)] == ["kd", "ickd", "kd+ickd"]
    assert (kd["parameters"], kd["adaptor_macs"], kd["macs"], kd["macs_share"]) == (0, 0, 0, 1)
    adaptor = 48 * 48 * 16
    assert ickd["parameters"] == both["parameters"] == 48 * 48 + 2 * 48
    assert ickd["adaptor_macs"] == adaptor
    # the low-memory form: three kernels and their products forward, of which five have gradients
    assert ickd["macs"] >= 3 * adaptor + icc_formula(48, (16, 16), low_memory=True)[0]
    assert ickd["macs_share"] == floor / (floor + ickd["macs"])
    assert both["macs"] == ickd["macs"]
    assert both["bytes"] >= ickd["bytes"] > kd["bytes"] > 0
    for loss in result["losses"]:
        times = result["floor"]["timing"]["median_ms"], loss["step"]["median_ms"]
        assert loss["time_share"] == times[0] / times[1]
    (icc,) = result["icc"]
    assert (icc["channels"], icc["pixels"], icc["auto"]) == (48, [16, 16], "low_memory")
    assert icc["forms"]["direct"]["macs"] == 2 * 48 * 48 * 16
    table = rows(told)
    assert table["student"][:3] == ["embedded:gratings-student", "14,919", "0.37 M"]
    assert table["ickd"][:2] == ["2,400", "0.04 M"]
    assert table["direct"][0] == "0.07 M"
    assert f"3 x student + teacher: {floor / 1e6:.2f} M MACs/image" in told


def test_cost_of_losses_with_options_and_of_those_that_prepare(tmp_path):
    file = tmp_path / "cost.json"
    pair = {"student": "embedded:blobs-student", "teacher": "embedded:blobs-teacher"}
    losses = {"ickd_grid": {"grid": (6, 6)}, "at": 1.0}
    cost(**pair, losses=losses, batch=2, repeats=1, device="cpu", out=file)
    result = json.loads(file.read_text())
    (icc,) = result["icc"]
    assert (icc["name"], icc["cells"], icc["pixels"]) == ("ickd_grid", 36, [4, 4])
    assert icc["forms"]["direct"]["bytes"] == 36 * 6 * 32 * 32 * 4
    assert [loss["parameters"] for loss in result["losses"]] == [0, 0]
    pair = ["--student", "zoo:resnet8", "--teacher", "zoo:resnet14", "--num-classes", 10]
    small = ["--batch", 2, "--repeats", 1, "--device", "cpu", "--out", file]
    assert run("cost", *pair, "--losses", "ab,crd", "--items", 500, *small) == 0
    result = json.loads(file.read_text())
    ab, crd = result["losses"]
    assert (ab["parameters"], crd["parameters"]) == (0, 2 * (64 * 128 + 128))
    # without an ICC loss both forms of the plain one are shown
    assert [icc["name"] for icc in result["icc"]] == ["ickd"]
    assert result["student"]["parameters"] == 83_892 - 90 * 65


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["--losses", "none"], "no loss in --losses 'none'"),
        (["--losses", "kd,icdk"], "no distillation loss is called 'icdk'"),
        (["--batch", "1"], "--batch must be 2 or more, got 1"),
        (["--repeats", "0"], "--repeats must be 1 or more, got 0"),
        (["--device", "tpu"], "'tpu' is no device"),
        (["--teacher", "zoo:resnet9"], "no network of the zoo is called 'resnet9'"),
        (["--teacher", "zoo:resnet8"], "kd compares logits, but the student has 3 classes and the"),
        (["--losses", "ickd_grid"], "a grid of 16x16 cells does not fit a map of 4x4 pixels"),
        (["--losses", '{"kd": {"tau": 3}}'], "cannot build the loss kd: "),
    ],
)
def test_bad_input_of_cost(changes, line, capsys):
    pair = ["--student", "embedded:gratings-student", "--teacher", "embedded:gratings-teacher"]
    small = ["--image-size", 16, "--device", "cpu", "--losses", "kd"]
    assert run("cost", *pair, *small, *changes) == 2
    assert re.match(f"error: {line}", capsys.readouterr().err)


# -- data --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "items", "classes"),
    [
        (["--classes", "coarse2"], ImageData, 2),
        (["--task", "textured-blobs"], SegmentationData, 6),
    ],
)
def test_data_is_written_once_and_read_back(tmp_path, monkeypatch, capfd, options, items, classes):
    """By the arguments of the line of fit that is printed."""
    monkeypatch.chdir(tmp_path)
    counts = ["--out", "of mine", "--train", 8, "--test", 6]
    assert run("data", *options, *counts) == 0
    told, progress = capfd.readouterr()
    assert "Casting" not in progress
    assert "Creating" not in progress
    line = told.splitlines()[-1]
    assert line.startswith("  ickd fit --")
    words = iter(shlex.split(line)[2:])
    given = {name: yaml.safe_load(value) for name, value in zip(words, words, strict=True)}
    data = {k.removeprefix("--data."): v for k, v in given.items() if k.startswith("--data.")}
    read = items(**data)
    read.setup("fit")
    assert (len(read.train_dataset()), len(read.val_dataset())) == (8, 6)
    assert read.num_classes == given.get("--classes", 6) == classes
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run("data", *options, *counts, "--train-seed", 2) == 2
    assert "there are files already (of mine): choose another --out" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# -- convert -----------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    """A checkpoint as RepDistiller writes it."""
    torch.manual_seed(1)
    net = cifar.create("resnet8", 20)
    path = tmp_path / "ckpt_epoch_240.pth"
    options = argparse.Namespace(model="resnet8")
    torch.save({"opt": options, "model": net.state_dict(), "accuracy": 61.5}, path)
    return path, net.eval()


def test_a_published_file_becomes_a_model_folder(published, tmp_path, capsys):
    path, net = published
    assert run("convert", path, "--from", "repdistiller") == 0
    folder = tmp_path / "ckpt_epoch_240-native"
    told = capsys.readouterr().out
    assert told.startswith(f"{path}: zoo:resnet8\n")
    assert "61.50" in told
    assert told.endswith(f"wrote the model folder {folder}\n")
    config = json.loads((folder / "config.json").read_text())
    expects = {"mean": [0.5071, 0.4867, 0.4408], "std": [0.2675, 0.2565, 0.2761], "size": None}
    options = {"num_classes": 20}
    assert config == {"network": "zoo:resnet8", "options": options, "expects": expects}
    opened = open_saved(folder).network
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(opened.net(x), net(x))
    assert not opened.training
    # the file itself can be named wherever a network can
    assert torch.equal(open_model(path).net(x), net(x))


def test_a_torchvision_resnet_becomes_weights_for_timm(tmp_path, capsys):
    import timm
    from torchvision.models import resnet18

    torch.manual_seed(2)
    net, path = resnet18(num_classes=5).eval(), tmp_path / "from_resnet34.pt"
    state = {f"student_model.{key}": value for key, value in net.state_dict().items()}
    torch.save({"model": state, "best_value": 70.0, "args": argparse.Namespace()}, path)
    assert run("convert", path, "--from", "torchdistill", "--to", "timm") == 0
    out = tmp_path / "from_resnet34-timm.safetensors"
    line = f"timm.create_model('resnet18', num_classes=5, checkpoint_path='{out}')"
    assert line in capsys.readouterr().out
    theirs = timm.create_model("resnet18", num_classes=5, checkpoint_path=str(out)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), net(x), rtol=0, atol=1e-5)


def test_bad_input_of_convert(published, tmp_path, capsys):
    path, _ = published
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.ones(3, 4), "bias": torch.ones(3)}, other)
    wrong = tmp_path / "folder"
    wrong.mkdir()
    (wrong / "config.json").write_text('{"network": 3}')
    torch.save({}, wrong / "model.safetensors")
    for arguments, line in [
        ([tmp_path / "nowhere.pth"], "no such checkpoint"),
        ([path, "--from", "deeplab"], "not a DeepLab"),
        ([path, "--from", "somewhere"], "--from.*: expected"),
        ([path, "--to", "timm"], "timm has no network such as zoo:resnet8: use --to native"),
        ([other], "weights of an unknown network"),
        ([tmp_path], "a folder without a network"),
    ]:
        assert run("convert", *arguments) == 2
        assert re.match(f"error: {line}", capsys.readouterr().err)
    assert not (tmp_path / "ckpt_epoch_240-timm.safetensors").exists()


def test_a_model_folder_of_something_else(published, tmp_path):
    folder = tmp_path / "model"
    assert run("convert", published[0], "--out", folder) == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "network": 3}))
    with pytest.raises(UserError, match="it needs network, options and expects"):
        open_saved(folder)
    (folder / "config.json").write_text(json.dumps({**config, "network": "zoo:resnet14"}))
    with pytest.raises(UserError, match=r"the weights are not of zoo:resnet14: .* missing"):
        open_saved(folder)


# -- tables ------------------------------------------------------------------------------------
