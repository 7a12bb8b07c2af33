"""The command line, on a small package that is written to a temporary folder."""

import csv
import importlib.metadata
import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch
import yaml

from tenfold.__main__ import app as core
from tenfold.cli import App, Command, short_parse_error
from tenfold.progress import span, track
from tenfold.verbs import plan_run  # and Lightning, whose log handler keeps the present stderr

FILES = {
    "__init__.py": "",
    "cli.py": """
        from tenfold.cli import App, Command

        app = App(
            name="tenfold",  # an installed distribution, for --version
            package="toy",
            description="A toy.",
            model="toy.module:Line",
            datamodule="toy.data:Rows",
            commands={
                "work": Command("toy.commands:work", "do some work"),
                "fail": Command("toy.commands:fail", "fail in many ways"),
            },
            shortcuts={"route": "model.init_args.route"},
        )
    """,
    "commands.py": """
        from pathlib import Path
        from typing import Literal

        from tenfold.errors import UserError

        calls = []


        def work(
            source: Path,
            steps: int = 3,
            *,
            target_madds: float | None = None,
            fold_bn: bool = False,
            estimator: Literal["mask", "mixture"] = "mask",
        ) -> int | None:
            '''Does some work.

            Args:
                source: Where from.
                steps: How many steps.
                target_madds: The budget.
                fold_bn: Folds the norms.
                estimator: Which estimator.
            '''
            calls.append((source, steps, target_madds, fold_bn, estimator))
            return 0 if steps > 0 else None


        def fail(how: str, *, status: int) -> int:
            if how == "user":
                raise UserError("bad width", where="--width", fix="use a whole number")
            if how == "wrapped":
                try:
                    raise UserError("bad depth")
                except UserError as error:
                    raise ValueError("a wrapper") from error
            if how == "bug":
                raise ZeroDivisionError("ours")
            if how == "handled":  # a bug while a UserError is handled is still a bug
                try:
                    raise UserError("bad depth")
                except UserError:
                    raise ZeroDivisionError("ours")
            if how == "interrupt":
                raise KeyboardInterrupt
            return status
    """,
    "data.py": """
        import torch
        from lightning.pytorch import LightningDataModule
        from torch.utils.data import DataLoader


        class Rows(LightningDataModule):
            def __init__(self, batch_size: int = 2, rows: int = 8):
                super().__init__()
                self.save_hyperparameters()

            def train_dataloader(self):
                rows = torch.arange(4.0 * self.hparams.rows).reshape(-1, 4) / 100
                return DataLoader(rows, batch_size=self.hparams.batch_size)

            test_dataloader = predict_dataloader = val_dataloader = train_dataloader
    """,
    "module.py": """
        import os
        import signal
        from typing import Literal

        import torch
        from lightning.pytorch import LightningModule

        from tenfold.errors import UserError


        class Line(LightningModule):
            '''A line.

            Args:
                width: How many outputs.
                lr: Learning rate.
                route: What test runs.
            '''

            def __init__(
                self, width: int, lr: float = 0.1, route: int | Literal["dynamic"] = "dynamic"
            ):
                super().__init__()
                if width < 1:
                    raise UserError(f"width {width} is not positive")
                self.save_hyperparameters()
                self.lr, self.route = lr, route
                self.layer = torch.nn.Linear(4, width)

            def training_step(self, batch, batch_idx):
                if self.global_step == int(os.environ.get("TOY_SIGNAL_AT", -1)):
                    os.kill(os.getpid(), signal.SIGINT)
                if "TOY_CTRL_C" in os.environ:
                    raise KeyboardInterrupt
                if "TOY_BUG" in os.environ:
                    raise ZeroDivisionError("ours")
                loss = self.layer(batch).square().mean()
                self.log("loss", loss)
                return loss

            def validation_step(self, batch, batch_idx):
                self.log("val_loss", self.layer(batch).square().mean())

            def test_step(self, batch, batch_idx):
                self.log("route", -1.0 if self.route == "dynamic" else float(self.route))
                self.log("width", float(self.layer.out_features))
                self.log("lr", self.lr)
                self.log("rows", float(len(batch)), reduce_fx="sum")

            def predict_step(self, batch, batch_idx):
                return self.layer(batch)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=self.lr)


        class Deep(Line):
            def __init__(self, width: int = 3, depth: int = 2, lr: float = 0.1):
                super().__init__(width, lr)
                self.save_hyperparameters()
    """,
    "recipes/demo.yaml": """\
        # two steps, to look around
        trainer: {max_steps: 2, accelerator: cpu, log_every_n_steps: 1, logger: null}
        model: {class_path: toy.module.Line, init_args: {width: 5, lr: 0.2}}
        data: {class_path: toy.data.Rows, init_args: {rows: 6}}
    """,
    "recipes/big.yaml": "trainer: {max_steps: 4}\n",
}


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy_root")
    for name, text in FILES.items():
        path = root / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    yield root
    sys.path.remove(str(root))
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]


@pytest.fixture
def app(toy_root, tmp_path, monkeypatch) -> App:
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("toy.cli").app


def run(app: App, line: str) -> int:
    return app.main(line.split())


@pytest.fixture
def error_line(app, capsys):
    """Run a command line that must end with status 2, and return the one line it printed."""

    def error_line(line: str) -> str:
        capsys.readouterr()
        assert run(app, line) == 2
        *_, line = lines = capsys.readouterr().err.splitlines()
        assert not any("Traceback" in line for line in lines)
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return error_line


def results(folder) -> dict[str, float]:
    """The last row of a metrics.csv."""
    *_, row = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return {key: float(value) for key, value in row.items() if value}


# -- help -------------------------------------------------------------------------------------


def python(code: str, root) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("argv", [[], ["--help"], ["recipes"]])
def test_help_is_fast_and_imports_nothing_heavy(toy_root, argv):
    code = (
        f"import sys; from toy.cli import app; status = app.main({argv});"
        "print(status, {'torch', 'lightning', 'jsonargparse'} & set(sys.modules))"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = python(code, toy_root)
        seconds.append(time.perf_counter() - start)
        assert done.stdout.splitlines()[-1] == "0 set()", done.stderr
    assert min(seconds) < 1.0


def test_help_lists_every_command(app, capsys):
    assert app.main([]) == 0
    out = capsys.readouterr().out
    for words in (
        "A toy.",
        "work",
        "do some work",
        "fit",
        "validate",
        "test",
        "predict",
        "recipes",
    ):
        assert words in out


def test_version(app, capsys):
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"tenfold {importlib.metadata.version('tenfold')}"


def test_unknown_command_suggests_a_close_one(error_line):
    assert error_line("tets") == "there is no command 'tets': did you mean test?"
    assert error_line("--config demo") == "there is no command '--config': see tenfold --help"


def test_an_app_without_a_model_has_only_its_functions(capsys):
    plain = App("plain", "tenfold", "Plain.", commands={"x": Command("m:f", "do x")})
    assert plain.main([]) == 0
    assert "fit" not in capsys.readouterr().out
    assert plain.main(["fit"]) == 2


def test_tenfold_doctor_is_a_command(capsys):
    assert core.main(["doctor"]) == 0
    assert torch.__version__.partition("+")[0] in capsys.readouterr().out


# -- plain functions --------------------------------------------------------------------------


def last_call():
    calls = importlib.import_module("toy.commands").calls
    source, *rest = calls[-1]
    return str(source), *rest


def test_a_signature_is_a_command_line(app):
    assert app.main(["work", "here"]) == 0
    assert last_call() == ("here", 3, None, False, "mask")
    line = "work here --target-madds 2.5 --fold-bn --steps=-1 --estimator mixture"
    assert run(app, line) == 0
    assert last_call() == ("here", -1, 2.5, True, "mixture")
    assert run(app, "work here --target_madds 1e3 --fold_bn false") == 0
    assert last_call() == ("here", 3, 1000.0, False, "mask")


def test_its_arguments_can_lie_in_a_file_and_options_win(app, tmp_path):
    (tmp_path / "work.yaml").write_text("source: there\nsteps: 7\nfold_bn: true\n")
    assert run(app, "work --config work.yaml --steps 9") == 0
    assert last_call() == ("there", 9, None, True, "mask")


def test_its_docstring_is_the_help(app, capsys):
    assert app.main(["work", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Does some work." in out
    assert "--target-madds" in out
    assert "The budget." in out


def test_its_return_value_is_the_exit_status(app):
    assert run(app, "fail no --status 0") == 0
    assert run(app, "fail no --status 3") == 3


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("work", "the following arguments are required: source: see tenfold work --help"),
        ("work x --steps q", "--steps: expected int, got q: see tenfold work --help"),
        ("work x --bogus 3", "unrecognized arguments: --bogus 3: see tenfold work --help"),
        (
            "work x --estimator foo",
            "--estimator: expected Literal['mask', 'mixture'], got foo: see tenfold work --help",
        ),
        ("fail x", "the following arguments are required: status: see tenfold fail --help"),
    ],
)
def test_bad_arguments_are_told_in_one_line(error_line, argv, line):
    assert error_line(argv) == line


# -- exit status ------------------------------------------------------------------------------


def test_a_user_error_is_one_line(error_line):
    assert error_line("fail user --status 0") == "bad width (--width): use a whole number"
    assert error_line("fail wrapped --status 0") == "bad depth"


def test_a_user_error_has_a_traceback_for_debugging(app, capsys, monkeypatch):
    monkeypatch.setenv("TENFOLD_DEBUG", "1")
    assert run(app, "fail user --status 0") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1] == "error: bad width (--width): use a whole number"


@pytest.mark.parametrize("how", ["bug", "handled"])
def test_a_bug_has_a_traceback(app, capsys, how):
    assert app.main(["fail", how, "--status", "0"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ZeroDivisionError: ours" in err


def test_an_interrupt_is_130(app, capsys):
    assert run(app, "fail interrupt --status 0") == 130
    assert capsys.readouterr().err == "interrupted\n"


# -- recipes ----------------------------------------------------------------------------------


def test_recipes_are_listed_and_printed(app, capsys):
    assert app.main(["recipes"]) == 0
    assert capsys.readouterr().out.splitlines() == ["big", "demo  two steps, to look around"]
    assert app.main(["recipes", "big"]) == 0
    assert capsys.readouterr().out == "trainer: {max_steps: 4}\n"


def test_a_recipe_is_found_by_name_a_file_by_path(app, toy_root, tmp_path, error_line):
    packaged = toy_root / "toy" / "recipes" / "demo.yaml"
    assert app.recipe("demo") == packaged
    (tmp_path / "demo.yaml").write_text("{}")
    (tmp_path / "big").mkdir()  # a run folder, say
    assert app.recipe("demo") == packaged
    assert str(app.recipe("demo.yaml")) == "demo.yaml"
    assert app.recipe("big").parent == packaged.parent
    for name in ("nope", "nope.yaml"):
        assert error_line(f"fit --config {name}") == (
            f"no recipe and no file is called '{name}': the recipes are big, demo"
        )


# -- fit, validate, test, predict -------------------------------------------------------------


def test_fit_writes_its_config_and_test_needs_no_more_than_the_checkpoint(app, tmp_path, capfd):
    assert run(app, "fit --config demo --model.lr 0.3") == 0
    folder = tmp_path / "runs" / "tenfold" / "demo"
    assert "Tip" not in capfd.readouterr().err
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"] == {"width": 5, "lr": 0.3, "route": "dynamic"}
    assert config["seed_everything"] == 0
    assert list(folder.glob("events.out.tfevents*"))
    assert results(folder)["step"] == 1

    assert app.main(["test", "--ckpt", str(folder / "last.ckpt")]) == 0
    tested = results(folder / "test")
    expected = {"width": 5.0, "lr": 0.3, "rows": 6.0, "route": -1.0}
    assert {key: tested[key] for key in expected} == pytest.approx(expected)
    assert results(folder)["step"] == 1  # the log of fit is still there

    line = "test --config demo --ckpt_path auto --model.lr 0.5 --route=3 --data.rows 4"
    assert run(app, line) == 0
    expected = {"width": 5.0, "lr": 0.5, "rows": 4.0, "route": 3.0}
    tested = results(folder / "test")
    assert {key: tested[key] for key in expected} == pytest.approx(expected)

    for verb in ("validate", "predict"):
        assert app.main([verb, "--ckpt", str(folder / "last.ckpt")]) == 0


def test_a_new_fit_never_writes_over_an_old_one(app, tmp_path, error_line):
    runs = tmp_path / "runs" / "tenfold"
    for folder in ("demo", "demo-2", "mine"):
        (runs / folder).mkdir(parents=True)
        (runs / folder / "config.yaml").write_text("")
    (runs / "demo-2" / "last.ckpt").write_text("not read here")
    demo = ["--config", "demo"]
    assert plan_run(app, "fit", demo).folder.name == "demo-3"
    assert plan_run(app, "fit", []).folder.name == "Line"
    assert plan_run(app, "test", demo).folder.name == "demo-2"
    assert "the folder holds a run (runs/tenfold/mine): go on with --resume auto" in error_line(
        "fit --config demo --trainer.default-root-dir runs/tenfold/mine"
    )
    resumed = plan_run(app, "fit", [*demo, "--trainer.default_root_dir=new", "--resume=auto"])
    assert (str(resumed.folder), resumed.checkpoint) == ("new", None)


def test_a_signal_saves_and_resume_goes_on(app, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TOY_SIGNAL_AT", "2")  # the end of an epoch
    line = "fit --config demo --trainer.max_steps 5"
    assert run(app, line) == 130
    assert "resume from runs/tenfold/demo/last.ckpt" in capfd.readouterr().err
    monkeypatch.delenv("TOY_SIGNAL_AT")
    folder = tmp_path / "runs" / "tenfold" / "demo"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3
    assert app.main([*line.split(), "--resume", "auto"]) == 0
    resumed = torch.load(folder / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == 5
    steps = [row["step"] for row in csv.DictReader((folder / "metrics.csv").open()) if row["loss"]]
    assert steps == ["0", "1", "2", "3", "4"]

    # the same without interruption, elsewhere
    assert app.main([*line.split(), "--trainer.default_root_dir", "whole"]) == 0
    whole = torch.load("whole/last.ckpt", weights_only=True)
    for key, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], value)

    # a run that is named by its folder goes on with its own config
    assert run(app, "fit --resume runs/tenfold/demo --trainer.max_steps 6") == 0
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6


def test_ctrl_c_that_lightning_swallows_is_130(app, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setenv("TOY_CTRL_C", "1")
    try:
        assert run(app, "fit --config demo") == 130
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


def test_a_bug_in_a_module_is_1(app, monkeypatch, capsys):
    monkeypatch.setenv("TOY_BUG", "1")
    assert run(app, "fit --config demo") == 1
    assert "ZeroDivisionError: ours" in capsys.readouterr().err


def test_any_module_can_be_named(app, tmp_path):
    line = "fit --model Deep --model.depth 4 --trainer.max_steps 1 --trainer.accelerator cpu"
    assert run(app, line) == 0
    config = tmp_path / "runs" / "tenfold" / "Deep" / "config.yaml"
    model = yaml.safe_load(config.read_text())["model"]
    assert model == {
        "class_path": "toy.module.Deep",
        "init_args": {"width": 3, "depth": 4, "lr": 0.1},
    }
    assert app.main(["test", "--ckpt", str(config.with_name("last.ckpt"))]) == 0
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
        ("", "--model: the following arguments are required: width: see tenfold fit --help"),
        ("--model.width 3 --trainer.accelerator foo", "You selected an invalid accelerator name"),
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


def test_a_checkpoint_of_another_width_is_told_in_one_line(app, error_line):
    assert run(app, "fit --config demo") == 0
    line = error_line("test --config demo --ckpt auto --model.width 7")
    assert line.startswith("the checkpoint is of another model: ")
    assert "size mismatch for layer.weight" in line
    assert "no run has saved a checkpoint yet" in error_line("test --ckpt auto")


def test_help_of_a_verb_tells_the_short_options(app, capsys):
    assert app.main(["test", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--route for --model.init_args.route" in out
    assert app.main(["test", "--model.help"]) == 0
    assert "Learning rate." in capsys.readouterr().out


def test_progress_is_plain_lines_in_a_log(app, capsys):
    line = "fit --config demo --trainer.callbacks tenfold.progress.PlainProgress"
    assert app.main([*line.split(), "--trainer.callbacks.seconds", "0"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert re.fullmatch(r"epoch 0, step 1, loss 0\.\d+, lr 0\.2, 0:00 left", lines[0])
    assert re.fullmatch(r"epoch 0, step 2, loss 0\.\d+, lr 0\.2, 0:00 left", lines[1])


def test_track_prints_a_line_when_one_is_due(monkeypatch, capsys):
    clock = itertools.count(0.0, 4.0)  # every look at the clock is 4 seconds later
    monkeypatch.setattr("tenfold.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(track("abcdefgh", label="letters")) == list("abcdefgh")
    first, *_, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"letters [1-7]/8, \d+:\d\d left", first)
    assert re.fullmatch(r"letters 8/8 done in \d+:\d\d", last)


def test_track_on_a_terminal_passes_the_items_on(monkeypatch):
    monkeypatch.setattr("tenfold.progress.on_terminal", lambda: True)
    assert list(track(iter("abc"), total=3, label="letters")) == list("abc")


def test_track_needs_no_torch(toy_root):
    code = "import sys; from tenfold.progress import track; print('torch' in sys.modules)"
    assert python(code, toy_root).stdout == "False\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (61.4, "1:01"), (3599.6, "1:00:00"), (7384.0, "2:03:04")]
)
def test_span(seconds, text):
    assert span(seconds) == text


def test_the_cause_of_a_nested_parse_error():
    message = (
        'Parser key "trainer.logger":\n  Does not validate against any of the Union subtypes\n'
        "  Subtypes: [<class 'a.Logger'>, <class 'bool'>, <class 'NoneType'>]\n  Errors:\n"
        "    - Expected a <class 'bool'>\n    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'str'>\n  Given value: maybe"
    )
    assert short_parse_error(message) == "--trainer.logger: expected bool, got maybe"
