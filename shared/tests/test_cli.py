"""The command line, on the toy package beside this file."""

import importlib
import importlib.metadata
import os
import subprocess
import sys
import time

import pytest
import torch

from tenfold.__main__ import app as core
from tenfold.cli import App, Command, short_parse_error

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


def test_help_lists_every_command(run, capsys):
    assert run("") == 0
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


def test_version(run, capsys):
    assert run("--version") == 0
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


def test_a_signature_is_a_command_line(run):
    assert run("work here") == 0
    assert last_call() == ("here", 3, None, False, "mask")
    line = "work here --target-madds 2.5 --fold-bn --steps=-1 --estimator mixture"
    assert run(line) == 0
    assert last_call() == ("here", -1, 2.5, True, "mixture")
    assert run("work here --target_madds 1e3 --fold_bn false") == 0
    assert last_call() == ("here", 3, 1000.0, False, "mask")


def test_its_arguments_can_lie_in_a_file_and_options_win(run, tmp_path):
    (tmp_path / "work.yaml").write_text("source: there\nsteps: 7\nfold_bn: true\n")
    assert run("work --config work.yaml --steps 9") == 0
    assert last_call() == ("there", 9, None, True, "mask")


def test_its_docstring_is_the_help(run, capsys):
    assert run("work --help") == 0
    out = capsys.readouterr().out
    assert "Does some work." in out
    assert "--target-madds" in out
    assert "The budget." in out


def test_its_return_value_is_the_exit_status(run):
    assert run("fail no --status 0") == 0
    assert run("fail no --status 3") == 3


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


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("show list", ("list", None, "auto", None)),
        ("show one line", ("one", "line", "auto", None)),
        ("show one --name line --from there", ("one", "line", "there", None)),
        ("show one --sizes 3 16 16 --from=x", ("one", None, "x", [3, 16, 16])),
        ("show one --sizes [3,16]", ("one", None, "auto", [3, 16])),
    ],
)
def test_optional_words_lists_and_words_of_python(run, line, wanted):
    assert run(line) == 0
    assert importlib.import_module("toy.commands").calls[-1] == wanted


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("several one", ("one", None, "")),
        ("several one two", ("one", ["two"], "")),
        ("several one two 3 [four] --last x", ("one", ["two", "3", "[four]"], "x")),
        ("several one --names [a,b]", ("one", ["a", "b"], "")),
    ],
)
def test_a_list_of_words_takes_all_that_are_left(run, line, wanted):
    assert run(line) == 0
    assert importlib.import_module("toy.commands").calls[-1] == wanted


def test_help_spells_an_option_as_it_is_typed(run, capsys):
    assert run("show --help") == 0
    text = capsys.readouterr().out
    assert "--from " in text
    assert "--from-" not in text


# -- exit status ------------------------------------------------------------------------------


def test_a_user_error_is_one_line(error_line):
    assert error_line("fail user --status 0") == "bad width (--width): use a whole number"
    assert error_line("fail wrapped --status 0") == "bad depth"


def test_a_user_error_has_a_traceback_for_debugging(run, capsys, monkeypatch):
    monkeypatch.setenv("TENFOLD_DEBUG", "1")
    assert run("fail user --status 0") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1] == "error: bad width (--width): use a whole number"


@pytest.mark.parametrize("how", ["bug", "handled"])
def test_a_bug_has_a_traceback(run, capsys, how):
    assert run(f"fail {how} --status 0") == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ZeroDivisionError: ours" in err


def test_an_interrupt_is_130(run, capsys):
    assert run("fail interrupt --status 0") == 130
    assert capsys.readouterr().err == "interrupted\n"


# -- recipes ----------------------------------------------------------------------------------


def test_recipes_are_listed_and_printed(run, capsys):
    assert run("recipes") == 0
    assert capsys.readouterr().out.splitlines() == ["big", "demo  two steps, to look around"]
    assert run("recipes big") == 0
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


def test_the_cause_of_a_nested_parse_error():
    message = (
        'Parser key "trainer.logger":\n  Does not validate against any of the Union subtypes\n'
        "  Subtypes: [<class 'a.Logger'>, <class 'bool'>, <class 'NoneType'>]\n  Errors:\n"
        "    - Expected a <class 'bool'>\n    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'str'>\n  Given value: maybe"
    )
    assert short_parse_error(message) == "--trainer.logger: expected bool, got maybe"
