"""Settings of the core's tests, and a toy package to run the command line on."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# Two processes share the cores, and tiny operations are slow on many threads. Lightning's launchers
# set the number to that of the cores, unless the environment has one.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Checks every shape annotation while the tests run; an int may stand for a float (PEP 484).
install_import_hook(
    "tenfold", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

from tenfold.cli import App


@pytest.fixture(scope="module")
def toy_root():
    root = Path(__file__).parent
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


@pytest.fixture
def run(app) -> Callable[[str], int]:
    """Runs a command line and returns its status."""
    return lambda line: app.main(line.split())


@pytest.fixture
def error_line(run, capsys) -> Callable[[str], str]:
    """Runs a command line that must end with status 2, and returns the one line it printed."""

    def error_line(line: str) -> str:
        capsys.readouterr()
        assert run(line) == 2
        *_, line = lines = capsys.readouterr().err.splitlines()
        assert not any("Traceback" in line for line in lines)
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return error_line
