"""fit, validate, test and predict, on the toy package."""

import csv
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from tenfold import verbs
from tenfold.testing import quiet_trainer
from tenfold.training import CLASSES, Resumable
from tenfold.verbs import plan_run


def results(folder) -> dict[str, float]:
    """The last row of a metrics.csv."""
    *_, row = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return {key: float(value) for key, value in row.items() if value}


def table_row(folder, **values) -> str:
    """A row of a metrics.csv, with a loss of 1."""
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    return ",".join(str({"loss": 1, **values}.get(key, "")) for key in header) + "\n"


def test_fit_writes_its_config_and_test_needs_no_more_than_the_checkpoint(run, tmp_path, capfd):
    assert run("fit --config demo --model.lr 0.3") == 0
    folder = tmp_path / "runs" / "tenfold" / "demo"
    assert "Tip" not in capfd.readouterr().err
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"] == {"width": 5, "lr": 0.3, "route": "dynamic"}
    assert config["seed_everything"] == 0
    assert list(folder.glob("events.out.tfevents*"))
    assert results(folder)["step"] == 1

    assert run(f"test --ckpt {folder / 'last.ckpt'}") == 0
    tested = results(folder / "test")
    expected = {"width": 5.0, "lr": 0.3, "rows": 6.0, "route": -1.0}
    assert {key: tested[key] for key in expected} == pytest.approx(expected)
    assert results(folder)["step"] == 1  # the log of fit is still there

    line = "test --config demo --ckpt_path auto --model.lr 0.5 --route=3 --data.rows 4"
    assert run(line) == 0
    expected = {"width": 5.0, "lr": 0.5, "rows": 4.0, "route": 3.0}
    tested = results(folder / "test")
    assert {key: tested[key] for key in expected} == pytest.approx(expected)

    for verb in ("validate", "predict"):
        assert run(f"{verb} --ckpt {folder / 'last.ckpt'}") == 0
    table = (folder / "predict" / "predictions.csv").read_text().splitlines()
    assert (table[0], len(table)) == ("first,last", 7)  # three batches of two


@pytest.mark.parametrize(
    "typed", ["", "--trainer.precision bf16-mixed", "--trainer.precision=64-true"]
)
def test_the_precision_of_a_recipe_is_that_of_accelerators(run, tmp_path, monkeypatch, typed):
    told, made = [], []
    instantiate = LightningCLI.instantiate_trainer

    def noted(self, **options):
        trainer = instantiate(self, **options)
        made.append(trainer.precision)
        return trainer

    monkeypatch.setattr(LightningCLI, "instantiate_trainer", noted)
    monkeypatch.setattr(verbs, "rank_zero_info", told.append)
    (tmp_path / "mine.yaml").write_text(
        "trainer: {max_epochs: 1, accelerator: cpu, precision: bf16-mixed}\n"
    )
    run(f"fit --config demo --config mine.yaml {typed}")
    assert made == [re.split("[ =]", typed)[-1] or "32-true"]
    assert any("on this CPU the precision is 32-true" in line for line in told) == (not typed)


def test_a_class_that_a_recipe_names_keeps_its_own_defaults(run, tmp_path):
    # not those that the app's class has for arguments of the same names
    (tmp_path / "mine.yaml").write_text(
        "model: {class_path: toy.module.Deep}\ndata: {class_path: toy.data.FewRows}\n"
        "trainer: {max_epochs: 1}\n"
    )
    assert run("fit --config mine.yaml") == 0
    config = yaml.safe_load((tmp_path / "runs/tenfold/mine/config.yaml").read_text())
    assert config["data"]["init_args"] == {"batch_size": 2, "rows": 4}
    assert config["model"]["init_args"] == {"width": 3, "depth": 2, "lr": 0.1}
    assert run("test --ckpt runs/tenfold/mine") == 0
    assert results(tmp_path / "runs/tenfold/mine/test")["rows"] == 4.0


def test_a_new_fit_never_writes_over_an_old_one(app, tmp_path, error_line):
    runs = tmp_path / "runs" / "tenfold"
    for folder in ("demo", "demo-2", "mine"):
        (runs / folder).mkdir(parents=True)
        (runs / folder / "config.yaml").write_text("")
    (runs / "demo-2" / "last.ckpt").write_text("not read here")
    demo = ["--config", "demo"]
    assert plan_run(app, "fit", demo).folder.name == "demo-3"
    assert plan_run(app, "fit", ["--model", "toy.module.Deep"]).folder.name == "Deep"
    assert plan_run(app, "test", demo).folder.name == "demo-2"
    assert "the folder holds a run (runs/tenfold/mine): go on with --resume auto" in error_line(
        "fit --config demo --trainer.default-root-dir runs/tenfold/mine"
    )
    resumed = plan_run(app, "fit", [*demo, "--trainer.default_root_dir=new", "--resume=auto"])
    assert (str(resumed.folder), resumed.checkpoint) == ("new", None)


def test_a_fit_that_names_nothing_takes_the_demo_recipe(run, app, tmp_path):
    assert run("fit --model.lr 0.3 --trainer.max_steps 1") == 0
    folder = tmp_path / "runs" / "tenfold" / "demo"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["width"] == 5
    assert config["model"]["init_args"]["lr"] == 0.3
    resumed = plan_run(app, "fit", ["--resume", "auto"])
    assert resumed.checkpoint == Path("runs/tenfold/demo/last.ckpt")
    assert "--config=runs/tenfold/demo/config.yaml" in resumed.argv  # of that run, not the recipe
    recipe, own = [
        config
        for config in plan_run(app, "fit", ["--config", "demo", "--resume", "auto"]).argv
        if config.endswith(".yaml")
    ]
    assert recipe.endswith("recipes/demo.yaml")
    assert own == "--config=runs/tenfold/demo/config.yaml"  # the lr of 0.3 is in it
    assert plan_run(app, "fit", []).folder.name == "demo-2"
    assert run("validate --ckpt auto") == 0  # what fit has just left


def test_a_model_without_a_checkpoint_is_told(run, caplog):
    assert run("test --config demo") == 0
    assert "untrained" in caplog.text


@pytest.mark.parametrize("option", ["--help", "--print_config", "--model.help"])
def test_what_only_explains_measures_nothing(run, capsys, caplog, option):
    assert run(f"validate {option}") == 0
    assert capsys.readouterr().out
    assert "untrained" not in caplog.text


def test_a_fit_that_saved_nothing_leaves_its_folder_to_the_next(run, tmp_path, monkeypatch):
    line = "fit --config demo --trainer.default_root_dir mine"
    monkeypatch.setenv("TOY_BUG", "1")
    assert run(line) == 1
    assert run(line) == 1  # another exception than "the folder holds a run", which is 2
    monkeypatch.delenv("TOY_BUG")
    assert run(line) == 0
    monkeypatch.setenv("TOY_BUG", "1")
    assert run(f"{line} --resume auto --trainer.max_epochs 9 --trainer.max_steps 9") == 1
    assert (tmp_path / "mine" / "config.yaml").is_file()  # of the run that saved a state


def test_a_fit_that_has_nothing_to_do_says_so(run, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("tenfold.verbs.rank_zero_info", told.append)
    assert run("fit --config demo") == 0
    assert told[-1] == "fit: trained; the checkpoint is runs/tenfold/demo/last.ckpt"
    step = torch.load("runs/tenfold/demo/last.ckpt", weights_only=True)["global_step"]
    for limit in (step - 1, step):
        assert run(f"fit --resume auto --trainer.max_steps {limit}") == 0
        assert f"nothing is done, the run is already at step {step}" in told[-1]


def test_a_signal_saves_and_resume_goes_on(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TOY_SIGNAL_AT", "2")  # the end of an epoch
    line = "fit --config demo --trainer.max_steps 5"
    assert run(line) == 130
    assert "resume from runs/tenfold/demo/last.ckpt" in capfd.readouterr().err
    monkeypatch.delenv("TOY_SIGNAL_AT")
    folder = tmp_path / "runs" / "tenfold" / "demo"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3
    with (folder / "metrics.csv").open("a") as table:  # as after SIGKILL some steps later
        table.write(table_row(folder, step=3) + table_row(folder, step=4))
    assert run(f"{line} --resume auto") == 0
    resumed = torch.load(folder / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == 5
    steps = [row["step"] for row in csv.DictReader((folder / "metrics.csv").open()) if row["loss"]]
    assert steps == ["0", "1", "2", "3", "4"]

    # the same without interruption, elsewhere
    assert run(f"{line} --trainer.default_root_dir whole") == 0
    whole = torch.load("whole/last.ckpt", weights_only=True)
    for key, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], value)

    # a run that is named by its folder goes on with its own config
    assert run("fit --resume runs/tenfold/demo --trainer.max_steps 6") == 0
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_scheduler_that_ends_an_evaluation_is_told_so(run, monkeypatch, capsys, verb):
    assert run("fit --config demo") == 0
    monkeypatch.setenv("TOY_TERMINATE", "1")
    assert run(f"{verb} --ckpt runs/tenfold/demo/last.ckpt") == 130
    assert "SIGTERM" in capsys.readouterr().err


def test_the_config_lies_in_the_run_whatever_the_logger(run, tmp_path):
    assert run("fit --config demo --trainer.logger true") == 0
    assert run("fit --config demo --trainer.logger true") == 0
    runs = tmp_path / "runs" / "tenfold"
    for folder in ("demo", "demo-2"):
        assert {"config.yaml", "last.ckpt"} <= {p.name for p in (runs / folder).iterdir()}


def test_a_checkpoint_made_in_python_names_its_classes(run, error_line, tmp_path, toy_root):
    from toy.data import Rows
    from toy.module import Deep

    trainer = quiet_trainer(tmp_path, callbacks=[Resumable()], max_epochs=1)
    trainer.fit(Deep(width=4), datamodule=Rows(rows=6))
    assert run("test --ckpt last.ckpt --trainer.accelerator cpu") == 0
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state[CLASSES] == {"model": "toy.module.Deep", "data": "toy.data.Rows"}
    state[CLASSES]["model"] = "elsewhere.Deep"
    torch.save(state, tmp_path / "other.ckpt")
    assert error_line("test --ckpt other.ckpt").startswith("the checkpoint is of elsewhere.Deep")


def test_ctrl_c_that_lightning_swallows_is_130(run, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setenv("TOY_CTRL_C", "1")
    try:
        assert run("fit --config demo") == 130
        assert capsys.readouterr().err.endswith("interrupted\n")
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_missing_optional_package_is_told_in_one_line(error_line, monkeypatch):
    missing = "Requirement 'wandb>=0.12.10' not met"
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", Missing(missing))
    assert error_line("fit --config demo --trainer.logger WandbLogger") == missing


class Missing(str):
    def __bool__(self):
        return False


def test_a_bug_in_a_module_is_1(run, monkeypatch, capsys):
    monkeypatch.setenv("TOY_BUG", "1")
    assert run("fit --config demo") == 1
    assert "ZeroDivisionError: ours" in capsys.readouterr().err


def test_any_module_can_be_named(run, tmp_path):
    line = "fit --model Deep --model.depth 4 --trainer.max_steps 1 --trainer.accelerator cpu"
    assert run(line) == 0
    config = tmp_path / "runs" / "tenfold" / "Deep" / "config.yaml"
    model = yaml.safe_load(config.read_text())["model"]
    assert model == {
        "class_path": "toy.module.Deep",
        "init_args": {"width": 3, "depth": 4, "lr": 0.1},
    }
    assert run(f"test --ckpt {config.with_name('last.ckpt')}") == 0
    assert results(config.parent / "test")["width"] == 3


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--model.wdth 3", "--model: Option 'wdth' is not accepted: see"),
        ("--model.width x", "--model.width: expected int, got x: see"),
        ("--model.width 0 --trainer.max_steps 1", "width 0 is not positive"),
        (
            "--model.width 3 --route foo",
            "--model.route: expected int or Literal['dynamic'], got ",
        ),
        ("--trainer.max_steps q", "--trainer.max_steps: expected int, got q: see tenfold fit --h"),
        ("--bogus 3", "unrecognized arguments: --bogus 3: see tenfold fit --help"),
        ("--model Nope", "--model: expected dot import path string: Nope: see tenfold fit --help"),
        ("--config", "argument -c/--config: expected one argument: see tenfold fit --help"),
        ("--model Line", "--model: the following arguments are required: width: see tenfold"),
        ("--model.width 3 --trainer.accelerator foo", "You selected an invalid accelerator name"),
        ("--config demo --seed_everything -1", "--seed_everything: -1 is not in bounds"),
        ("--config demo --trainer.default_root_dir /dev/null/x", "cannot write into the folder"),
        ("--ckpt nope.ckpt", "no such checkpoint (nope.ckpt)"),
        ("--ckpt broken.ckpt", ""),
        ("--ckpt weights.pt", "weights, but not a checkpoint of fit (weights.pt)"),
        ("--config broken.yaml", "not a YAML file of settings: "),
        ("--config list.yaml", "not a YAML file of settings: "),
    ],
)
def test_bad_input_of_a_verb_is_told_in_one_line(error_line, tmp_path, argv, line):
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "broken.yaml").write_text("trainer: [")
    (tmp_path / "list.yaml").write_text("- 1\n")
    torch.save({"layer.weight": torch.zeros(1)}, tmp_path / "weights.pt")
    assert line in error_line(f"fit {argv}")


def test_a_checkpoint_of_another_width_is_told_in_one_line(run, error_line):
    assert run("fit --config demo") == 0
    line = error_line("test --config demo --ckpt auto --model.width 7")
    assert line.startswith("the checkpoint is of another model or optimizer: ")
    assert "size mismatch for layer.weight" in line
    assert "no run has saved a checkpoint yet" in error_line("test --model Deep --ckpt auto")


def test_help_of_a_verb_tells_the_short_options(run, capsys):
    assert run("test --help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--route for --model.init_args.route" in out
    assert run("test --model.help") == 0
    assert "Learning rate." in capsys.readouterr().out
