"""The arithmetic of the results tables."""

import math

import pytest

from benchmarks.results import Results, cell, markdown, mean_interval, replace_block
from tenfold.errors import UserError


def test_interval_is_students():
    # n = 3, mean 2, sd 1: 2 +- 4.302652730 / sqrt(3)
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert high - 2.0 == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert 2.0 - low == pytest.approx(high - 2.0)
    assert cell([1.0, 2.0, 3.0]) == "+2.00 [-0.48, +4.48]"


def test_a_finished_run_is_not_done_again(tmp_path):
    done = []
    for _ in range(2):
        results = Results("claims", "x", tmp_path)
        assert results.once("a/0", lambda: done.append(1) or 7) == 7
    assert done == [1]


def test_blocks_are_replaced_between_their_marks(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("a\n<!-- t -->\nold\n<!-- /t -->\nb\n")
    with pytest.raises(UserError, match="add <!-- u -->"):
        replace_block(file, "u", "text")
    replace_block(file, "t", markdown(["x"], [["1"]]))
    assert file.read_text() == "a\n<!-- t -->\n| x |\n| --- |\n| 1 |\n<!-- /t -->\nb\n"
