"""Paths and builders that several test files share."""

import contextlib
from pathlib import Path

import pytest

from tenfold.pytest_plugin import check_annotations

check_annotations("tenfold", "ickd")


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference arrays; its README says what they are."""
    return Path(__file__).parent / "reference"


@pytest.fixture
def uncollected_timings(monkeypatch) -> None:
    """Timers collect no garbage first, which here takes longer than what they time."""
    monkeypatch.setattr("tenfold.device._no_garbage_collection", contextlib.nullcontext)


@pytest.fixture
def unsaved_pictures(monkeypatch) -> None:
    """Empty files in the place of pictures: drawing takes longer than all that leads to them."""

    def save(figure: object, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    monkeypatch.setattr("ickd.report.common.save", save)
