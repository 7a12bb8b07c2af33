"""The commands as a person types them, on a network trained for seconds."""

import csv
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from ds_net_plus.checkpoint import load_net, read_checkpoint
from ds_net_plus.cli import app
from ds_net_plus.data import ImageData
from ds_net_plus.evaluate import collect, point_at
from ds_net_plus.export import load_exported
from ds_net_plus.module import GateModule
from ds_net_plus.runner import DynamicRunner

NET = (
    '{"front_widths": [4], "stage_widths": [[4, 16], [4, 24]], "depths": [1, 1], '
    '"gate_outputs": 2, "image_size": 16}'
)


def run(*argv: object) -> int:
    return app.main([str(word) for word in argv])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with last.ckpt (Stage I), recalibrated.ckpt and gate.ckpt."""
    folder = tmp_path_factory.mktemp("run")
    options = [
        "--model.net", NET, "--model.lr", "0.1", "--model.schedule", "step", "--model.warmup", "0",
        "--model.cooldown", "0", "--data.image_size", "16", "--data.train_size", "192",
        "--data.val_size", "64", "--data.test_size", "96", "--data.batch_size", "32",
        "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", folder,
    ]  # fmt: skip
    assert run("fit", *options) == 0
    stage1, fixed = folder / "last.ckpt", folder / "recalibrated.ckpt"
    assert run("recalibrate", "--ckpt", stage1, "--out", fixed, "--batches", "3") == 0
    gate = ["--steps", "30", "--batch-size", "64", "--device", "cpu"]
    assert run("train-gate", "--ckpt", fixed, "--out", folder / "gate.ckpt", *gate) == 0
    return folder


def test_the_gate_checkpoint_speaks_for_itself(folder):
    net = load_net(folder / "gate.ckpt")
    assert net.gate_trained
    assert net.gate_score == "probability"
    assert net.budgets
    assert all(cost <= net.madds(1) for _, cost in net.budgets)
    assert (folder / "gate.confusion.png").stat().st_size > 1000
    supernet = load_net(folder / "recalibrated.ckpt")
    x = torch.randn(3, 1, 16, 16)
    assert torch.equal(net(x, route=1), supernet(x, route=1))


@pytest.mark.parametrize("route", ["0", "largest", "dynamic"])
def test_test_reports_accuracy_and_cost(folder, route, capsys):
    assert run("test", "--ckpt", folder / "gate.ckpt", "--route", route) == 0
    told = capsys.readouterr().out
    assert "test/top1" in told
    if route != "dynamic":
        net = load_net(folder / "gate.ckpt")
        cost = net.madds(int(route) if route.isdigit() else route)
        assert f"{float(cost):.1f}"[:6] in told.replace(",", "")


def test_validate_measures_the_chosen_route(folder, tmp_path, capsys):
    net, data = (
        load_net(folder / "gate.ckpt"),
        ImageData(image_size=16, train_size=192, val_size=64, test_size=96),
    )
    data.setup()
    table = collect(net, data.calibration_loader())
    budget = round(net.budgets[-1][1] / net.madds(1), 3)
    for options, point in (
        (["--route", "1"], (table.static_top1()[1], net.madds(1))),
        (["--tau", "0.02"], (point_at(table, 0.02).top1, point_at(table, 0.02).madds)),
        (["--budget", budget], None),
    ):
        assert run("validate", "--ckpt", folder / "gate.ckpt", *options) == 0
        with (folder / "validate" / "metrics.csv").open() as file:
            *_, row = csv.DictReader(file)
        if point is not None:
            assert float(row["val/top1"]) == pytest.approx(point[0], abs=1e-5)
            assert float(row["val/madds"]) == pytest.approx(point[1], rel=1e-6)
    assert run("validate", "--ckpt", folder / "recalibrated.ckpt") == 0
    assert "val/top1_largest" in capsys.readouterr().out


def test_stage2_on_images_uses_those_kept_for_the_gate(folder, tmp_path, capsys):
    """The official loss and optimizer, without a cache, on a share of the training images."""
    seen = []
    given = [
        "--ckpt", folder / "recalibrated.ckpt", "--out", tmp_path / "gate.ckpt", "--device", "cpu",
        "--cache", "false", "--gate-split", "0.25", "--batch-size", "16", "--epochs", "2",
        "--gate-loss", "sgs", "--estimator", "mask", "--sgs-on", "probs", "--scale", "1e9",
        "--optimizer", "sgd", "--lr", "0.08", "--weight-decay", "0.01",
    ]  # fmt: skip
    record = GateModule.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            GateModule,
            "training_step",
            lambda self, batch, n: seen.append(batch.index) or record(self, batch, n),
        )
        assert run("train-gate", *given) == 0
    data = ImageData(image_size=16, train_size=192, val_size=64, test_size=96, gate_split=0.25)
    data.setup()
    kept = data.gate_dataset().indices
    assert [len(index) for index in seen] == [16] * 6
    assert sorted(torch.cat(seen[:3]).tolist()) == kept
    assert "gate accuracy" in capsys.readouterr().out


def test_dynamic_test_without_a_gate_is_refused(folder, capsys):
    assert run("test", "--ckpt", folder / "recalibrated.ckpt") == 2
    assert "train-gate" in capsys.readouterr().err


def test_training_that_diverges_stops_and_says_where_the_good_state_is(tmp_path, capsys):
    options = [
        "--model.net", NET, "--model.lr", "1e12", "--data.image_size", "16",
        "--data.train_size", "640", "--data.val_size", "32", "--data.test_size", "32",
        "--data.batch_size", "32", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", tmp_path,
    ]  # fmt: skip
    assert run("fit", *options) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "NaN or infinite from step" in told
    assert "lower the learning rate" in told


def test_an_unmeasured_route_is_refused(folder, tmp_path, capsys):
    raw = torch.load(folder / "last.ckpt", weights_only=True)
    for key in raw["state_dict"]:
        if key.endswith("running_mean"):
            raw["state_dict"][key].zero_()
        if key.endswith("running_var"):
            raw["state_dict"][key].fill_(1)
    torch.save(raw, tmp_path / "raw.ckpt")
    assert run("test", "--ckpt", tmp_path / "raw.ckpt", "--route", "0") == 2
    assert "recalibrate" in capsys.readouterr().err


def test_calibrate_budget_stores_a_tau_that_test_can_use(folder, tmp_path, capsys):
    out = tmp_path / "budget.ckpt"
    given = ["--ckpt", folder / "gate.ckpt", "--out", out, "--device", "cpu"]
    assert run("calibrate-budget", *given, "--target-saving", "1.3") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[0])
    net = load_net(out)
    assert found["mean_madds"] <= net.madds(1) / 1.3
    assert [found["tau"], found["mean_madds"]] in [list(pair) for pair in net.budgets]
    assert run("test", "--ckpt", out, "--budget", "0.8") == 0
    assert run("test", "--ckpt", out, "--budget", "0.01") == 2
    assert "not feasible" in capsys.readouterr().err
    assert run("calibrate-budget", *given, "--target-madds", "1") == 2
    assert "outside what the routes can do" in capsys.readouterr().err
    assert run("calibrate-budget", *given, "--target-ms", "5", "--target-madds", "1") == 2


def test_profile_writes_what_it_prints(tmp_path, capsys):
    given = ["--model", "ds_cnn_tiny", "--latency", "--batch", "2", "--out", tmp_path]
    assert run("profile", *given) == 0
    assert "24/48" in capsys.readouterr().out
    content = json.loads((tmp_path / "profile.json").read_text())
    assert [row["madds"] for row in content["routes"]] == [245_688, 429_168, 716_328, 1_107_168]
    with (tmp_path / "profile.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["widths"] for row in rows] == ["6/12", "12/24", "18/36", "24/48"]
    assert all(float(row["ms_batch2"]) > 0 for row in rows)


def test_benchmark_compares_all_executions(folder, tmp_path, capsys):
    out = tmp_path / "b.json"
    shares = ["--model", "ds_cnn_tiny", "--mix", "0.5,0.25,0.25,0", "--batch", "8"]
    assert run("benchmark", *shares, "--repeats", "2", "--out", out) == 0
    result = json.loads(out.read_text())
    assert result["counts"] == [4, 2, 2, 0]
    costs = [245_688, 429_168, 716_328, 1_107_168]
    mean = (4 * costs[0] + 2 * costs[1] + 2 * costs[2]) / 8
    assert result["madds_ratio"] == pytest.approx(mean / costs[3])
    assert set(result["time_ratio"]) >= {"grouped", "masked", "per image", "widest"}
    assert run("benchmark", "--ckpt", folder / "gate.ckpt", "--batch", "8", "--repeats", "1") == 0
    assert run("benchmark", "--model", "ds_cnn_tiny", "--mix", "0.5,0.6") == 2
    assert "shares" in capsys.readouterr().err


def test_search_routes_suggests_a_space(folder, capsys):
    given = ["--ckpt", folder / "recalibrated.ckpt", "--device", "cpu", "--count", "2"]
    status = run("search-routes", *given)
    told = capsys.readouterr()
    # a network trained for seconds may have one Pareto route only, which is said
    assert status in (0, 2)
    assert "--routing-space 0,1" in told.out if status == 0 else "only one route" in told.err


def test_explain_tells_every_image(folder, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(3):
        Image.new("L", (20 + n, 20), 60 * n).save(pictures / f"{n}.png")
    (pictures / "bad.png").write_bytes(b"no image")
    given = ["--ckpt", folder / "gate.ckpt", "--images", pictures, "--device", "cpu"]
    assert run("explain", *given, "--out", tmp_path / "a") == 2
    assert "bad.png" in capsys.readouterr().err
    assert run("explain", *given, "--out", tmp_path / "b", "--on-error", "skip") == 0
    with (tmp_path / "b" / "routes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    net = load_net(folder / "gate.ckpt")
    for row in rows:
        assert int(row["madds"]) == net.madds(int(row["route"]))
        assert 0 <= float(row["p_route0"]) <= 1
    assert (tmp_path / "b" / "gallery.png").stat().st_size > 1000


def test_data_writes_what_fit_reads(tmp_path, capsys):
    assert run("data", "--out", tmp_path, "--train", "12", "--test", "4", "--size", "16") == 0
    assert "--data.source parquet" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test.parquet", "train.parquet"]
    assert run("data", "--layout", "tar") == 2


def test_predict_writes_a_row_for_every_image(folder, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(3):
        Image.new("L", (20, 20), 60 * n).save(pictures / f"{n}.png")
    given = ["--ckpt", folder / "gate.ckpt", "--route", "1", "--trainer.accelerator", "cpu"]
    assert run("predict", *given, "--data.predict_root", pictures) == 0
    with (folder / "predict" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    net = load_net(folder / "gate.ckpt")
    assert {(int(row["route"]), int(row["madds"])) for row in rows} == {(1, net.madds(1))}
    assert run("predict", *given) == 0  # the test images, over the old table
    with (folder / "predict" / "predictions.csv").open() as file:
        assert [row["image"] for row in csv.DictReader(file)] == [str(n) for n in range(96)]


def test_export_writes_plain_networks(folder, tmp_path, capsys):
    given = ["--ckpt", folder / "gate.ckpt", "--format", "torch", "--out", tmp_path / "files"]
    assert run("export", *given, "--route", "0") == 0
    assert "equal to the checkpoint" in capsys.readouterr().out
    image = json.loads((tmp_path / "files" / "manifest.json").read_text())["image"]
    assert image["preprocessing"] == {"pixels": "0..1", "mean": [0.15], "std": [0.3]}
    net, x = load_net(folder / "gate.ckpt"), torch.randn(2, 1, 16, 16)
    plain = load_exported(tmp_path / "files", 0)
    torch.testing.assert_close(plain(x), net(x, route=0), rtol=0, atol=1e-5)
    assert run("export", *given, "--route", "7") == 2
    assert "route 7" in capsys.readouterr().err


def test_convert_checkpoint_reads_an_official_file(tiny_mbnet, randomize, tmp_path, capsys):
    weights, average = (randomize(tiny_mbnet(), seed) for seed in (1, 2))
    state = {f"module.{key}": value for key, value in weights.state_dict().items()}
    torch.save({"state_dict": state, "state_dict_ema": average.state_dict()}, tmp_path / "o.pth")
    assert run("convert-checkpoint", "--source", tmp_path / "o.pth") == 0
    assert "0 missing, 0 unexpected" in capsys.readouterr().out
    found = read_checkpoint(tmp_path / "o-converted.ckpt").nets
    for name, expected in (("net", weights), ("teacher", average)):
        state = found[name].state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (80, 60), (200, 20, 20)).save(pictures / "0.png")
    given = ["--ckpt", tmp_path / "o-converted.ckpt", "--data.predict_root", pictures]
    place = ["--trainer.default_root_dir", tmp_path / "run", "--trainer.accelerator", "cpu"]
    assert run("predict", *given, "--data.image_size", "64", "--route", "3", *place) == 0
    with (tmp_path / "run" / "predict" / "predictions.csv").open() as file:
        [row] = csv.DictReader(file)
    assert row["madds"] == str(average.madds(3))
    assert run("profile", "--ckpt", tmp_path / "o.pth", "--routes", "0,3") == 0
    assert "state_dict_ema" in capsys.readouterr().out  # which of the two was read
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    assert run("convert-checkpoint", "--source", tmp_path / "bad.pth") == 2
    assert "bad.pth" in capsys.readouterr().err


def test_the_demo_tells_what_its_checkpoint_does(tmp_path, monkeypatch, capsys):
    parts = {
        "model": {
            "init_args": {
                "net": json.loads(NET) | {"stage_widths": [[4, 8, 12, 16]] * 2, "gate_outputs": 4},
                "lr": 0.1, "schedule": "step", "warmup": 0, "cooldown": 0, "distill": "none",
            }
        },
        "data": {
            "init_args": {"image_size": 16, "train_size": 256, "val_size": 96, "test_size": 64}
        },
        "trainer": {"max_epochs": 2},
    }  # fmt: skip
    module = import_module("ds_net_plus.commands.demo")  # the package's attribute is the function
    monkeypatch.setattr(module, "recipe_parts", lambda package, name: parts)
    out = tmp_path / "demo"
    assert run("demo", "--out", out, "--gate-steps", "40") == 0
    assert "of the widest route's MAdds" in capsys.readouterr().out
    pictures = {path.stem for path in out.glob("*.png")}
    assert pictures >= {"tradeoff", "gallery", "easy-and-hard", "routes", "classes", "training"}

    told, net = json.loads((out / "demo.json").read_text()), load_net(out / "gate.ckpt")
    data = ImageData(**parts["data"]["init_args"])
    data.setup()
    images, labels, *_ = next(iter(data.test_loader()))
    for row in told["static"]:
        top1 = (net(images, route=row["route"]).argmax(1) == labels).double().mean()
        assert row["top1"] == pytest.approx(float(top1))
    for point in told["dynamic"]:
        answer = DynamicRunner(net, (0, 3), point["tau"])(images)
        top1 = (answer.logits.argmax(1) == labels).double().mean()
        assert point["top1"] == pytest.approx(float(top1))
        assert point["madds"] == pytest.approx(float(answer.madds.double().mean()))
