"""compare, sweep and cache-teacher: what is run, what is not run again, and what is told of it."""

import csv
import importlib
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from ickd import comparison
from ickd.cache import TeacherCache
from ickd.cli import app
from ickd.commands import cache_teacher
from ickd.comparison import StepTimes, compare_losses
from ickd.module import Distiller, fit_recipe, load_student, make_data
from ickd.scores import Comparison, paired
from tenfold.errors import UserError
from tenfold.recipes import recipe_parts
from tenfold.runs import make_trainer
from tenfold.training import LAST

compare = importlib.import_module("ickd.commands.compare")  # its name is the command's too

TEACHER = "embedded:gratings-teacher"
SMALL = {"train_size": 32, "teacher_size": 64, "val_size": 8, "test_size": 30, "batch_size": 16}


def small(recipe: str, losses: list[str], out: Path, **options: object) -> Comparison:
    usual = {"seeds": (0, 1), "data": SMALL, "epochs": 1, "progress": False, "accelerator": "cpu"}
    return compare_losses(recipe, losses, out, **{**usual, **options})


class Runs:
    """Stands in for `fit_recipe`: notes every run, and may break one off."""

    def __init__(self, break_at: int | None = None) -> None:
        self.folders: list[str] = []
        self.watched: dict[str, Watch] = {}
        self.break_at = break_at

    def __call__(self, recipe: str, folder: Path, **options: object) -> object:
        if len(self.folders) == self.break_at:
            raise KeyboardInterrupt
        self.folders.append("/".join(folder.parts[-2:]))
        self.watched[self.folders[-1]] = watch = Watch()
        callbacks = [*options.pop("callbacks", ()), watch]
        return fit_recipe(recipe, folder, callbacks=callbacks, **options)


class Watch(Callback):
    """The student that a run starts from, and the images of all its batches."""

    def on_train_start(self, trainer, pl_module):
        self.student = {k: v.clone() for k, v in pl_module.student.state_dict().items()}
        self.batches: list[list[int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch.index.tolist())


@pytest.fixture
def runs(monkeypatch) -> Runs:
    noted = Runs()
    monkeypatch.setattr(comparison, "fit_recipe", noted)
    return noted


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A comparison of three losses over two seeds; tests that add to it take a copy."""
    out = tmp_path_factory.mktemp("finished") / "out"
    small("demo", ["none", "kd", "ickd"], out)
    return out


@pytest.fixture
def out(finished, tmp_path) -> Path:
    """A copy; files of the runs name the teacher where it was."""
    return shutil.copytree(finished, tmp_path / "out")


# ---- differences


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_interval_is_students(count):
    differences = np.random.default_rng(count).normal(1, 2, count)
    wanted = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    found = paired(differences.tolist())
    assert found.mean == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)


def test_one_seed_has_no_interval():
    assert paired([1.5]) == (1.5, -math.inf, math.inf)


def test_differences_are_paired_by_seed():
    scores = {"none": [60.0, 70.0, 80.0], "ickd": [61.0, 73.0, 82.0]}
    found = Comparison(scores, dict.fromkeys(scores, 0.1), 90.0, "top-1")
    assert found.difference("ickd").mean == pytest.approx(2.0)
    # apart, the two would overlap by far: the seeds' own spread cancels
    wanted = stats.ttest_rel(scores["ickd"], scores["none"]).confidence_interval(0.95)
    low, high = found.difference("ickd")[1:]
    assert (low, high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)
    assert found.difference("none") is None
    assert found.difference("ickd", "kd") is None


# ---- what is to be run


def plan(name: str, recipe: str = "cifar100", weights=None, **model: object) -> dict[str, object]:
    return comparison._plans(recipe, [name], weights or {}, model, None, None)[name]


@pytest.mark.parametrize(
    ("name", "weights", "losses", "ce_weight"),
    [
        ("none", {}, None, 1.0),
        ("kd", {}, {"kd": 0.9}, 0.1),  # section 4.5, where nothing is configured
        ("kd", {"kd": 1.0}, {"kd": 1.0}, 1.0),
        ("kd@1", {}, {"kd": 1.0}, 1.0),
        ("kd_mixed", {}, {"kd_mixed": 1.0}, 0.0),  # the labels are inside
        ("kd_mixed@1", {}, {"kd_mixed": 1.0}, 0.0),
        ("kd_mixed+ickd", {}, {"kd_mixed": 1.0, "ickd": 2.5}, 0.0),
        ("at", {}, {"at": 1000.0}, 1.0),
        ("kd+ickd", {}, {"kd": 1.0, "ickd": 2.5}, 1.0),
        ("kd+ickd@2", {"kd": 1.0}, {"kd": 1.0, "ickd": 2.0}, 1.0),
        ("ickd", {"ickd": 4.0}, {"ickd": 4.0}, 1.0),
        ("ickd_grid:6x4@2", {}, {"ickd_grid": {"weight": 2.0, "grid": [6, 4]}}, 1.0),
    ],
)
def test_weights_of_losses_and_labels(name, weights, losses, ce_weight):
    found = plan(name, weights=weights)["model"]
    assert found["losses"] == losses
    assert found["ce_weight"] == ce_weight
    assert (found.get("teacher", "kept") is None) is (losses is None)


def test_a_recipes_own_weights_and_options_are_kept():
    """Those of ImageNet: 0.5 CE + 0.5 KD at T = 1 + 500 ICC in that program's scale."""
    own = recipe_parts("ickd", "imagenet")["model"]["init_args"]["losses"]
    both = plan("ickd+kd", "imagenet")["model"]
    assert (both["losses"], both["ce_weight"]) == (own, 0.5)
    heavier = plan("ickd@800", "imagenet")["model"]["losses"]
    assert heavier == {"ickd": {"weight": 800.0, "reference_scale": "imagenet"}}
    assert plan("at", "imagenet")["model"]["ce_weight"] == 1.0
    kd = plan("kd", "cifar100-kd")["model"]
    assert (kd["losses"], kd["ce_weight"]) == ({"kd": 0.9}, 0.1)


def test_a_recipes_weight_of_the_labels_belongs_to_its_own_losses():
    """Others are compared as by any recipe: with 1 CE, and 1 KD beside them (section 4.5)."""
    for name in ("ickd", "kd+ickd", "kd+at", "none"):
        here, elsewhere = (plan(name, recipe)["model"] for recipe in ("cifar100-kd", "cifar100"))
        assert here["losses"] == elsewhere["losses"]
        assert here["ce_weight"] == elsewhere["ce_weight"] == 1.0
    kept = plan("kd+at", "imagenet")["model"]["losses"]["kd"]
    assert kept == {"weight": 1.0, "temperature": 1.0}


@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 2])
@pytest.mark.parametrize("name", ["kd", "kd@1", "kd_mixed", "ickd+kd", "at"])
@pytest.mark.parametrize("recipe", ["cifar100", "cifar100-kd", "imagenet"])
def test_a_weight_of_the_labels_that_is_asked_for_is_that_of_every_row(recipe, name, ce_weight):
    assert plan(name, recipe, ce_weight=ce_weight)["model"]["ce_weight"] == ce_weight


def test_the_student_alone_needs_labels():
    assert plan("none", ce_weight=0.5)["model"]["ce_weight"] == 0.5
    with pytest.raises(UserError, match=r"\(none\) has nothing to learn from: leave none out"):
        plan("none", ce_weight=0.0)
    for wrong in (-1, math.nan, "much"):
        with pytest.raises(UserError, match="ce_weight must be 0 or more"):
            plan("kd", ce_weight=wrong)


def test_a_short_run_is_known_to_be_short(tmp_path):
    """A loss that warms up does so in the task's epochs, not in those that prepare it."""
    losses = {"ab": None, "dkd": None}
    model = {"losses": losses, "init_epochs": 1, "teacher_recipe": None, "teacher_cache": None}
    options = {"data": SMALL, "epochs": 3, "progress": False, "accelerator": "cpu"}
    module, _ = fit_recipe("demo", tmp_path, model=model, **options)
    assert module.objective.task_epochs == 2


@pytest.mark.parametrize(
    ("name", "recipe", "options", "init_epochs", "epochs"),
    [
        ("kd", "cifar100", {}, 0, 240),
        ("ab", "cifar100", {}, 30, 270),
        ("ft+kd", "cifar100", {"init_epochs": 12}, 12, 252),
        ("ft", "cifar100-ft", {}, 30, 270),
        ("ickd", "cifar100-ft", {}, 0, 240),  # as long as all others
        ("fsp", "demo", {}, 3, 28),
    ],
)
def test_losses_that_prepare_have_their_epochs_in_front(name, recipe, options, init_epochs, epochs):
    found = plan(name, recipe, **options)
    assert found["model"]["init_epochs"] == init_epochs
    assert found["epochs"] == epochs


def test_a_loss_that_remembers_images_is_told_their_number():
    weights = {"crd": 0.5}
    [found] = comparison._plans("demo", ["crd"], weights, {}, {"train_size": 77}, 3).values()
    assert found["model"]["losses"] == {"crd": {"weight": 0.5, "n_data": 77}}
    own = plan("crd", "cifar100-crd")["model"]["losses"]
    assert own == {"crd": {"weight": 0.8, "n_data": 50000}}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ickd@much", "a weight behind @, got 'ickd@much'"),
        ("ickd:6x6x6", "a grid behind : and"),
        ("ickd@-1", "the weight of ickd must be 0 or more"),
        ("ikcd", "did you mean 'ickd'"),
    ],
)
def test_names_that_cannot_be_run(name, message):
    with pytest.raises(UserError, match=message):
        plan(name)


# ---- runs


def test_a_comparison_holds_every_run(finished):
    results = json.loads((finished / "results.json").read_text())["runs"]
    assert set(results) == {
        "teacher/0",
        *(f"{n}/{s}" for n in ("none", "kd", "ickd") for s in (0, 1)),
    }
    assert (finished / "teacher-0" / LAST).is_file()
    for name in ("none/0", "kd/1", "ickd/1"):
        assert (finished / name / LAST).is_file()
        run = results[name]
        assert run["metric"] == "top-1"
        assert 0 <= run["score"] <= 100
        assert run["seconds"] > 0


def test_scores_are_lightnings(finished):
    """Measured again by `trainer.test` on the student of a run's checkpoint."""
    results = json.loads((finished / "results.json").read_text())["runs"]
    module = Distiller.load_from_checkpoint(finished / "ickd/0" / LAST)
    trainer = make_trainer(finished, epochs=1, accelerator="cpu", progress=False, logger=False)
    [found] = trainer.test(module, datamodule=make_data("demo", SMALL), verbose=False)
    assert results["ickd/0"]["score"] == pytest.approx(100 * found["test/top1"], rel=1e-6)


def test_memory_of_a_step_grows_with_what_is_compared(finished):
    results = json.loads((finished / "results.json").read_text())["runs"]
    memory = {name: run["bytes"] for name, run in results.items() if "bytes" in run}
    # the student's own maps, before and after each norm and ReLU, are kept for the backward pass
    maps = 4 * (12 * 256 + 12 * 64 + 24 * 16 + 48 * 16)
    assert 2 * maps < memory["none/0"] < 20 * maps
    assert memory["none/0"] < memory["kd/0"] <= memory["ickd/0"]
    assert memory["ickd/0"] == memory["ickd/1"]


def test_finished_runs_are_not_repeated(out, finished, runs):
    first = small("demo", ["none", "kd", "ickd"], out)
    assert runs.folders == []
    results = json.loads((finished / "results.json").read_text())["runs"]
    assert first.scores["kd"] == [results["kd/0"]["score"], results["kd/1"]["score"]]
    assert first.teacher == results["teacher/0"]["score"]
    assert first.metric == "top-1"


def test_losses_and_seeds_can_be_added(out, runs):
    found = small("demo", ["none", "ickd@2"], out, seeds=(0, 1, 2))
    assert runs.folders == ["ickd@2/0", "ickd@2/1", "none/2", "ickd@2/2"]
    assert list(found.scores) == ["none", "ickd@2"]
    assert {len(scores) for scores in found.scores.values()} == {3}
    kept = json.loads((out / "results.json").read_text())
    assert {"kd/0", "ickd/1"} <= kept["runs"].keys()
    assert {"kd", "ickd", "ickd@2"} <= kept["settings"]["plans"].keys()
    weights = torch.load(out / "ickd@2/0" / LAST, weights_only=True)["hyper_parameters"]["losses"]
    assert weights == {"ickd": 2.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "gratings-fine"}, "another recipe: demo, not gratings-fine"),
        ({"data": {**SMALL, "train_size": 16}}, "another data"),
        ({"epochs": 2}, "another epochs: 1, not 2"),
        ({"model": {"lr": 0.1}}, "another model"),
        ({"weights": {"kd": 3.0}}, "results of kd with other weights"),
        ({"teacher_per_seed": True}, "another teacher_per_seed"),
        ({"split": "val"}, "another split: test, not val"),
    ],
)
def test_other_settings_are_refused(out, runs, options, message):
    recipe = options.pop("recipe", "demo")
    with pytest.raises(UserError, match=message):
        small(recipe, ["none", "kd"], out, **options)
    assert runs.folders == []


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": {}}'])
def test_results_that_are_none(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"no JSON of results .*results.json.*: remove it"):
        small("demo", ["none"], tmp_path)


def test_an_interrupted_comparison_goes_on_to_the_same_numbers(tmp_path, finished, monkeypatch):
    monkeypatch.setattr(comparison, "fit_recipe", Runs(break_at=2))
    with pytest.raises(KeyboardInterrupt):
        small("demo", ["none", "kd", "ickd"], tmp_path / "out")
    monkeypatch.setattr(comparison, "fit_recipe", rest := Runs())
    found = small("demo", ["none", "kd", "ickd"], tmp_path / "out")
    assert rest.folders == ["ickd/0", "none/1", "kd/1", "ickd/1"]
    whole = json.loads((finished / "results.json").read_text())["runs"]
    for name, scores in found.scores.items():
        assert scores == [whole[f"{name}/{seed}"]["score"] for seed in (0, 1)]


def test_students_of_one_seed_start_alike_and_see_the_same_batches(out, runs):
    names = ["kd@1", "at", "kd+ickd"]
    small("demo", names, out)
    for seed in (0, 1):
        first, *others = (runs.watched[f"{name}/{seed}"] for name in names)
        assert len(first.batches) == 2
        for other in others:
            assert other.batches == first.batches
            assert all(torch.equal(first.student[k], v) for k, v in other.student.items())
    zero, one = runs.watched["at/0"], runs.watched["at/1"]
    assert zero.batches != one.batches
    key = "net.stages.0.body.0.weight"
    assert not torch.equal(zero.student[key], one.student[key])


def test_the_plain_student_starts_as_the_distilled_ones(tmp_path, runs):
    small("demo", ["none", "ickd"], tmp_path, seeds=(3,), model={"teacher_recipe": None})
    none, ickd = runs.watched["none/3"], runs.watched["ickd/3"]
    assert none.batches == ickd.batches
    assert all(torch.equal(none.student[k], v) for k, v in ickd.student.items())


def test_a_teacher_for_all_seeds_or_for_each(finished, tmp_path):
    assert sorted(path.name for path in finished.glob("teacher*")) == ["teacher-0"]
    found = small("demo", ["ickd"], tmp_path, teacher_per_seed=True)
    assert sorted(path.name for path in tmp_path.glob("teacher*")) == ["teacher-0", "teacher-1"]
    scores = [found.runs[f"teacher/{seed}"]["score"] for seed in (0, 1)]
    assert found.teacher == pytest.approx(sum(scores) / 2)
    states = [load_student(tmp_path / f"teacher-{seed}").net.state_dict() for seed in (0, 1)]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
    for seed in (0, 1):
        raw = torch.load(tmp_path / f"ickd/{seed}" / LAST, weights_only=True)
        assert raw["hyper_parameters"]["teacher_ckpt"] == str(tmp_path / f"teacher-{seed}" / LAST)
        key = "stages.0.body.0.weight"
        assert torch.equal(raw["state_dict"][f"teacher.net.{key}"], states[seed][key])
    # the first one is that of a comparison with one teacher for all
    same = load_student(finished / "teacher-0").net.state_dict()
    assert all(torch.equal(same[key], value) for key, value in states[0].items())


def test_a_given_teacher_is_measured_once(finished, tmp_path, monkeypatch):
    file = str(finished / "teacher-0" / LAST)
    measured: list[str] = []
    original = comparison.evaluate

    def evaluate(module: Distiller, network: object, *rest: object) -> tuple[str, float]:
        measured.append("teacher" if network is module.teacher else "student")
        return original(module, network, *rest)

    monkeypatch.setattr(comparison, "evaluate", evaluate)
    found = small(
        "demo", ["none", "ickd", "kd"], tmp_path, seeds=(0,), model={"teacher_ckpt": file}
    )
    assert measured == ["student", "student", "teacher", "student"]
    results = json.loads((finished / "results.json").read_text())["runs"]
    assert found.teacher == pytest.approx(results["teacher/0"]["score"])
    assert not (tmp_path / "teacher-0").exists()


def test_losses_that_prepare_and_that_remember(tmp_path, finished):
    model = {"teacher_ckpt": str(finished / "teacher-0" / LAST)}
    found = small("demo", ["none", "ab", "ft", "crd"], tmp_path, seeds=(0,), model=model)
    assert all(0 <= score <= 100 for [score] in found.scores.values())
    epochs = {
        name: torch.load(tmp_path / name / "0" / LAST, weights_only=True)["epoch"]
        for name in found.scores
    }
    assert epochs == {"none": 1, "ab": 2, "ft": 2, "crd": 1}


def test_masks_are_compared_by_their_iou(tmp_path):
    data = {"train_size": 16, "teacher_size": 24, "val_size": 4, "test_size": 8, "batch_size": 8}
    names = ["none", "ickd_grid", "ickd_grid:4x4+kd"]
    found = small("blobs", names, tmp_path, seeds=(0,), data=data)
    assert found.metric == "mIoU"
    assert 0 < found.teacher < 100
    losses = {}
    for name in names[1:]:
        raw = torch.load(tmp_path / name / "0" / LAST, weights_only=True)
        losses[name] = raw["hyper_parameters"]["losses"]
    own = {"weight": 2.0, "embed": True}
    assert losses[names[1]] == {"ickd_grid": {**own, "grid": [6, 6]}}  # the recipe's
    assert losses[names[2]]["ickd_grid"] == {**own, "grid": [4, 4]}


def test_the_time_of_a_step_leaves_the_first_out():
    clock = StepTimes()
    assert clock.median is None
    clock.seconds = [9.0, 9.0]
    assert clock.median == 9.0
    clock.seconds = [9.0] * 5 + [1.0, 3.0, 2.0]
    assert clock.median == 2.0


def test_the_clock_waits_for_the_device(monkeypatch):
    """Work that a GPU was handed before a step is not of this step, and its own is."""
    now, work = [0.0], [5.0]  # the time, and what is queued

    def wait(device: str) -> None:
        assert device == "cuda:1"
        now[0] += work[0]
        work[0] = 0.0

    monkeypatch.setattr(comparison, "synchronize", wait)
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: now[0])
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device="cuda:1"))
    clock = StepTimes()
    clock.on_train_batch_start(trainer, None, None, 0)
    work[0] = 3.0
    clock.on_train_batch_end(trainer, None, None, None, 0)
    assert clock.seconds == [3.0]


@pytest.mark.usefixtures("unsaved_pictures")
@pytest.mark.parametrize(("load", "busy"), [(0.0, False), (999.0, True)])
def test_times_from_a_busy_machine_are_marked(tmp_path, monkeypatch, capsys, load, busy):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    small("demo", ["none"], tmp_path, seeds=(0,))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    found = small("demo", ["none"], tmp_path, seeds=(0,))  # which trains nothing
    compare.tell(found, tmp_path, "compare")
    note = "the machine was busy with other work: times of steps are not to be relied on"
    assert (note in capsys.readouterr().out) is busy
    assert (note in (tmp_path / "compare.md").read_text()) is busy


@pytest.mark.usefixtures("unsaved_pictures")
def test_costs_that_nobody_measured_are_left_open(out):
    """As of a run that was finished, but killed before it was noted."""
    content = json.loads((out / "results.json").read_text())
    for key in ("kd/0", "kd/1", "ickd/1"):
        content["runs"][key].update(seconds=None)
        del content["runs"][key]["bytes"]
    (out / "results.json").write_text(json.dumps(content))
    found = small("demo", ["none", "kd", "ickd"], out)
    assert math.isnan(found.seconds["kd"])
    assert math.isnan(found.memory["kd"])
    assert found.seconds["ickd"] == content["runs"]["ickd/0"]["seconds"]
    compare.tell(found, out, "compare")
    assert "| kd |" in (out / "compare.md").read_text()


# ---- what is told


TINY = (f"--data={json.dumps(SMALL)}", "--epochs=1", "--accelerator=cpu")


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG" and min(image.size) > 200


def test_compare_from_the_command_line(out, capsys):
    """Of a folder with all runs in it, noted as having the weights that the command takes."""
    content, names = json.loads((out / "results.json").read_text()), ("none", "kd", "ickd")
    model = content["settings"]["plans"]["kd"]["model"]
    model.update(losses={"kd": compare.TOY_WEIGHTS["kd"]}, ce_weight=1.0)
    (out / "results.json").write_text(json.dumps(content))
    assert app.main(["compare", "--losses=none,kd,ickd", "--seeds=2", f"--out={out}", *TINY]) == 0

    told, runs = capsys.readouterr().out, content["runs"]
    head, *rows = [line for line in told.splitlines() if "  " in line]
    assert head.split()[0] == "losses"
    assert [row.split()[0] for row in rows] == list(names)
    scores = np.array([[runs[f"{name}/{seed}"]["score"] for seed in (0, 1)] for name in names])
    for row, own in zip(rows, scores, strict=True):
        assert f"{own.mean():.2f} ± {own.std(ddof=1):.2f}" in row
    for mine, other in ((2, 0), (2, 1), (1, 0)):
        wanted = paired((scores[mine] - scores[other]).tolist())
        assert f"{wanted.mean:+.2f} [{wanted.low:+.2f}, {wanted.high:+.2f}]" in rows[mine]
    assert f"teacher: {runs['teacher/0']['score']:.2f} %" in told

    lines = (out / "compare.md").read_text().splitlines()
    assert lines[0].startswith("| losses | test top-1, % | against none | against kd | step |")
    assert set(lines[1]) <= set("| -")
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| none", "| kd", "| ickd"]
    assert lines[6].startswith("students start from scratch; teacher: ")
    assert "the teacher's pass is not in their time (ickd cost)" in lines[8]
    assert lines[8] in told
    with (out / "compare.csv").open() as file:
        table = list(csv.DictReader(file))
    keys = [f"{row['losses']}/{row['seed']}" for row in table]
    assert keys == [f"{name}/{seed}" for name in names for seed in (0, 1)]
    for key, row in zip(keys, table, strict=True):
        assert float(row["score"]) == pytest.approx(runs[key]["score"], abs=1e-4)
        for column in ("seconds", "bytes"):  # without the digits that are noise
            assert float(row[column]) == pytest.approx(runs[key][column], rel=1e-5)
            assert len(row[column].strip("0.").replace(".", "")) <= 6
    check_differences(table, scores)
    for name in ("compare", "compare-time", "compare-memory"):
        assert is_picture(out / f"{name}.png")
        assert str(out / f"{name}.png") in told


def check_differences(table: list[dict[str, str]], scores: np.ndarray) -> None:
    """Those of the rows none, kd, ickd of two seeds each, in the columns of a CSV file."""
    ends = ("", "_mean", "_low", "_high")
    for other, column in enumerate(("none", "kd")):
        for row, (own, seed) in zip(table, np.ndindex(3, 2), strict=True):
            found = [row[f"diff_to_{column}{end}"] for end in ends]
            if own == other:
                assert found == [""] * 4
                continue
            apart = scores[own] - scores[other]
            interval = stats.ttest_1samp(apart, 0).confidence_interval(0.95)
            wanted = [apart[seed], apart.mean(), interval.low, interval.high]
            np.testing.assert_allclose([float(value) for value in found], wanted, atol=6e-5)


@pytest.mark.usefixtures("unsaved_pictures")
def test_both_demos_run_in_one_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = {"teacher_size": 24, "val_size": 16, "test_size": 16, "batch_size": 8}
    for argv, count in (
        (["--losses=ickd"], 80),
        (["--task=textured-blobs", "--losses=ickd_grid:6x6"], 16),  # too few steps to be logged
    ):
        given = f"--data={json.dumps({**data, 'train_size': count})}"
        assert app.main(["demo", *argv, given, "--seeds=1", "--epochs=1"]) == 0
    told = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ickd-demo", "ickd-demo-blobs"]
    for folder, pictures in (
        ("ickd-demo", {"demo", "icc", "training"}),
        ("ickd-demo-blobs", {"demo", "icc", "grids", "masks"}),
    ):
        drawn = {path.stem for path in Path(folder).glob("*.png")}
        assert drawn == pictures | {"demo-time", "demo-memory"}
        assert f"{folder}/icc.png" in told
        numbers = json.loads(Path(folder, "demo.json").read_text())
        runs = json.loads(Path(folder, "results.json").read_text())["runs"]
        assert {key: run["score"] for key, run in runs.items() if "teacher" not in key} == {
            f"{name}/0": scores[0] for name, scores in numbers["scores"].items()
        }


@pytest.mark.usefixtures("unsaved_pictures")
def test_compare_names_teacher_and_student(tmp_path, monkeypatch):
    given: dict[str, object] = {}

    def note(recipe: str, losses: list[str], out: Path, **options: object) -> Comparison:
        given.update(options, recipe=recipe, losses=losses)
        return Comparison({"kd": [50.0]}, {"kd": 0.1}, math.nan, "top-1")

    monkeypatch.setattr(compare, "compare_losses", note)
    argv = ["compare", "--recipe=cifar100", "--teacher=zoo:resnet56", "--student=zoo:resnet20"]
    argv += ["--losses=kd", "--weights", '{"kd": 2.0}', "--model", '{"lr": 0.01}']
    assert app.main([*argv, "--seeds=4", f"--out={tmp_path}"]) == 0
    assert given["model"] == {"lr": 0.01, "teacher": "zoo:resnet56", "student": "zoo:resnet20"}
    assert given["weights"] == {"kd": 2.0}
    assert (given["recipe"], given["losses"]) == ("cifar100", ["kd"])
    assert list(given["seeds"]) == [0, 1, 2, 3]
    assert app.main(["compare", f"--out={tmp_path}", "--losses=none,kd"]) == 0
    assert given["weights"] == compare.TOY_WEIGHTS


def test_a_single_seed_and_a_single_loss_are_drawn_too(tmp_path, capsys):
    found = Comparison({"kd": [50.0]}, {"kd": 0.1}, math.nan, "top-1", {}, {"kd": 2048.0})
    compare.tell(found, tmp_path, "compare")
    told = capsys.readouterr().out
    assert "teacher" not in told  # nor that its features were cached
    assert "busy" not in told
    assert "100.0 ms" in told
    assert "2.0 KiB" in told
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == ["compare.png"]
    scores = {"none": [40.0], "kd": [50.0]}
    compare.tell(Comparison(scores, dict.fromkeys(scores, 0.1), 9.0, "top-1"), tmp_path, "two")
    with (tmp_path / "two.csv").open() as file:
        _, kd = csv.DictReader(file)
    assert (kd["diff_to_none"], kd["diff_to_none_mean"]) == ("10.0000", "10.0000")
    assert kd["diff_to_none_low"] == kd["diff_to_none_high"] == ""


@pytest.mark.usefixtures("unsaved_pictures")
def test_sweep_from_the_command_line(tmp_path, finished, capsys):
    file = str(finished / "teacher-0" / LAST)
    argv = ["sweep", "--beta=0.5,4", "--loss=kd+ickd", "--seeds=1", f"--teacher-ckpt={file}"]
    assert app.main([*argv, f"--out={tmp_path}", *TINY]) == 0
    told = capsys.readouterr().out
    assert "kd+ickd@0.5" in told
    assert "kd+ickd@4" in told
    raw = torch.load(tmp_path / "kd+ickd@0.5/0" / LAST, weights_only=True)["hyper_parameters"]
    assert raw["losses"] == {"kd": compare.TOY_WEIGHTS["kd"], "ickd": 0.5}
    assert raw["ce_weight"] == 1.0
    assert {path.name for path in tmp_path.glob("sweep*")} >= {"sweep.md", "sweep.csv", "sweep.png"}
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert set(runs) == {"none/0", "kd+ickd@0.5/0", "kd+ickd@4/0"}
    # a weight is chosen by the validation images, whose score here is Lightning's
    module = Distiller.load_from_checkpoint(tmp_path / "kd+ickd@4/0" / LAST)
    trainer = make_trainer(tmp_path, epochs=1, accelerator="cpu", progress=False, logger=False)
    [found] = trainer.validate(module, datamodule=make_data("demo", SMALL), verbose=False)
    assert runs["kd+ickd@4/0"]["score"] == pytest.approx(100 * found["val/top1"], rel=1e-6)
    assert "| losses | validation top-1, % |" in (tmp_path / "sweep.md").read_text()
    assert "test images" not in told


@pytest.mark.usefixtures("unsaved_pictures")
def test_sweep_tells_where_it_has_no_images_to_choose_by(tmp_path, finished, capsys):
    random = np.random.default_rng(0)
    for split, kind, count in (("train", "abc", 8), ("val", "abc", 2)):
        for name, n in ((name, n) for name in kind for n in range(count)):
            file = tmp_path / "images" / split / name / f"{n}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(file)
    data = {"source": "imagefolder", "root": str(tmp_path / "images"), "image_size": 16}
    data |= {"batch_size": 8}
    argv = ["sweep", "--beta=1", "--seeds=1", "--epochs=1", "--accelerator=cpu"]
    argv += [f"--teacher-ckpt={finished / 'teacher-0' / LAST}", '--model={"ce_weight": 0}']
    note = "the data have no validation images of their own: scores are of test images"
    for given, alone in ((data, True), (data | {"val_split": 0.25}, False)):
        out = tmp_path / str(alone)
        assert app.main([*argv, f"--data={json.dumps(given)}", f"--out={out}"]) == 0
        text = (out / "sweep.md").read_text()
        assert (note in text) is (note in capsys.readouterr().out) is alone
        assert f"{'test' if alone else 'validation'} top-1" in text
        assert [*json.loads((out / "results.json").read_text())["runs"]] == ["ickd@1/0"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("compare", "--losses="), "names no loss"),
        (("compare", "--losses=none,ikcd"), "did you mean 'ickd'"),
        (("compare", "--losses=ickd@x"), "a weight behind @, got 'ickd@x'"),
        (("compare", "--losses=ickd_grid:6"), "a grid behind : and"),
        (("compare", "--seeds=0"), "--seeds must be 1 or more"),
        (("compare", "--epochs=0"), "--epochs must be 1 or more"),
        (("compare", "--recipe=nosuch"), "no recipe is called 'nosuch'"),
        (("sweep", "--beta=1,two"), "--beta must be numbers"),
        (("sweep", "--seeds=-1"), "--seeds must be 1 or more"),
        (("cache-teacher", "--teacher=nowhere"), "no network and no file"),
        (("cache-teacher", f"--teacher={TEACHER}", "--keep=map"), "no field map"),
    ],
)
def test_wrong_options(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert app.main([*argv, f"--data={json.dumps(SMALL)}"]) == 2
    assert message in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_names_are_read_once_each():
    assert compare.parse_names(" none, kd ,kd+ickd@2,none") == ["none", "kd", "kd+ickd@2"]
    assert compare.parse_names("[none,kd]") == ["none", "kd"]


# ---- cache-teacher


@pytest.mark.parametrize("given", ["name and file", "run"])
def test_cache_teacher_and_fit(finished, tmp_path, capsys, given):
    file = tmp_path / "cache.safetensors"
    weights = str(finished / "teacher-0" / LAST)
    teacher = [f"--teacher={TEACHER}", f"--teacher-ckpt={weights}"]
    if given == "run":
        teacher = [f"--teacher={finished / 'teacher-0'}"]
    argv = [*teacher, f"--data={json.dumps(SMALL)}", "--device=cpu", f"--out={file}"]
    assert app.main(["cache-teacher", *argv]) == 0
    assert f"features of 32 images, {file.stat().st_size / 2**20:.1f} MiB: {file}" in (
        capsys.readouterr().out
    )
    options = {"data": SMALL, "epochs": 1, "progress": False, "accelerator": "cpu"}
    states = []
    for cache in (str(file), None):
        model = {
            "teacher_ckpt": weights,
            "teacher_cache": cache,
            "losses": {"ickd": 4.0, "kd": 1.0},
        }
        module, _ = fit_recipe("demo", tmp_path / str(cache is None), model=model, **options)
        assert (module.cache is None) is (cache is None)
        states.append(module.student.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-4, atol=1e-6)


def test_cache_teacher_keeps_what_is_asked_for_and_knows_the_recipes_teacher(tmp_path):
    file = tmp_path / "cache.safetensors"
    data = json.dumps({**SMALL, "train_size": 8})
    argv = [f"--teacher={TEACHER}", "--recipe=gratings-fine", "--keep=logits,pooled"]
    assert app.main(["cache-teacher", *argv, f"--data={data}", f"--out={file}"]) == 0
    sizes = {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}
    assert sizes == {"logits": (8, 16), "pooled": (8, 48)}


def test_cache_teacher_takes_options_of_a_network(tmp_path, monkeypatch):
    seen: list[tuple] = []

    def compute(cls: type, network, images, **_: object) -> TeacherCache:
        seen.append((network.expects.size, network.tap_names, len(images.train_labels())))
        return TeacherCache({"logits": torch.zeros(1)}, {})

    monkeypatch.setattr(TeacherCache, "compute", classmethod(compute))
    options = {"image_size": 32, "taps": ["layer3"]}
    cache_teacher(
        teacher="timm:test_resnet", options=options, data=SMALL, out=tmp_path / "x.safetensors"
    )
    assert seen == [(32, ("layer3",), 32)]
