"""Paths and builders that several test files share."""

from pathlib import Path

import pytest

from tenfold.pytest_plugin import check_annotations

check_annotations("tenfold", "filip_vl")


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference arrays; its README says what they are."""
    return Path(__file__).parent / "reference"


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch) -> None:
    """Pictures of a quarter of the pixels: tests look at what they show."""
    monkeypatch.setattr("tenfold.plotting.figures.DPI", 80)
