"""Settings of the core's tests, and a toy package to run the command line on."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tenfold.pytest_plugin import check_annotations

check_annotations("tenfold")

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
