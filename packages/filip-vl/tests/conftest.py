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
def _rough_pictures(request, monkeypatch) -> None:
    """Pictures have few pixels; those that commands draw are not laid out either.

    test_report.py looks at all kinds of them.
    """
    monkeypatch.setattr("tenfold.plotting.figures.DPI", 80)
    if request.path.name != "test_report.py":
        engine = "matplotlib.layout_engine.ConstrainedLayoutEngine"
        monkeypatch.setattr(f"{engine}.execute", lambda engine, figure: None)
