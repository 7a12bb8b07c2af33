"""Progress as lines in a log, as a bar on a terminal."""

import itertools
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tenfold.progress import span, track


def test_progress_is_plain_lines_in_a_log(run, capsys):
    line = "fit --config demo --trainer.callbacks tenfold.progress.PlainProgress"
    assert run(f"{line} --trainer.callbacks.seconds 0") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert re.fullmatch(r"epoch 0, step 1, loss 0\.\d+, lr 0\.2, 0:00 left", lines[0])
    assert re.fullmatch(r"epoch 0, step 2, loss 0\.\d+, lr 0\.2, 0:00 left", lines[1])


@pytest.mark.parametrize(
    ("verb", "word"), [("validate", "validation"), ("test", "test"), ("predict", "prediction")]
)
def test_batches_that_are_not_trained_have_a_name_for_people(run, capsys, verb, word):
    line = f"{verb} --config demo --trainer.callbacks tenfold.progress.PlainProgress"
    assert run(f"{line} --trainer.callbacks.seconds 0") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if ", batch " in line]
    assert lines[0] == f"{word}, batch 1"


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


def test_track_needs_no_torch():
    code = "import sys; from tenfold.progress import track; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (61.4, "1:01"), (3599.6, "1:00:00"), (7384.0, "2:03:04")]
)
def test_span(seconds, text):
    assert span(seconds) == text
