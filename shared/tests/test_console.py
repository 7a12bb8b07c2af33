import math

import pytest

from tenfold.console import at_least, columns
from tenfold.errors import UserError


def test_columns_are_as_wide_as_their_widest_cell():
    text = columns([["name", "n"], ["a", "1,000"], ["long one", ""]])
    assert text == "name          n\na         1,000\nlong one"


def test_several_columns_flush_left():
    assert columns([["a", "bcd", "1"], ["ab", "c", "10"]], left=2) == "a   bcd   1\nab  c    10"


@pytest.mark.parametrize("bad", [0, -1, 0.5, math.nan])
def test_a_number_that_is_too_small_names_its_option(bad):
    with pytest.raises(UserError, match=r"--batch-size must be 1 or more, got"):
        at_least(1, steps=1, seed=None, batch_size=bad)


def test_numbers_that_are_large_enough_pass():
    at_least(0, steps=0, seed=None, share=0.5, all=math.inf)
