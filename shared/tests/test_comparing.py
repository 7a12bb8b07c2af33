"""Where two trees differ, told by place."""

import copy
import math

import numpy as np
import torch

from tenfold.comparing import differences


def test_differences_name_places():
    left = {"a": [torch.ones(2), 1.0, "x"], "b": None}
    assert differences(left, copy.deepcopy(left)) == ""
    right = {"a": [torch.tensor([1.0, 1.5]), 1.0, "y"], "c": None}
    told = differences(left, right)
    places = ["a.0 (by 0.5 of 1.5)", "a.2 ('x', 'y')", "b (in one of them)", "c (in one of them)"]
    assert told == ", ".join(places)
    assert differences(torch.ones(2), torch.full((2,), 1 + 1e-6), 1e-5) == ""
    assert "torch.float64" in differences(torch.ones(2), torch.ones(2).double(), 1e-5)
    assert differences(torch.ones(2), torch.tensor([1.0, math.nan]), 1e-5)
    assert differences(list(range(9)), list(range(1, 10))).endswith("and 4 more")
    # the gradient of a bias before a softmax: zero, but for rounding of the others
    weight, bias = torch.ones(2).double(), torch.zeros(1).double()
    noise = [{"weight": weight, "bias": bias}, {"weight": weight, "bias": bias + 1e-17}]
    assert differences(*noise, 1e-6) == ""
    assert differences(*noise) != ""


def test_the_same_bits_include_what_is_no_number():
    left = {"a": torch.tensor([1.0, math.nan, math.inf]), "b": np.arange(3.0), "c": math.nan}
    assert differences(left, copy.deepcopy(left)) == ""
    assert differences(left, {**left, "b": np.arange(3.0) + 1}) == "b (by 1 of 3)"
    assert differences(torch.tensor([True, False]), torch.tensor([True, True])) != ""
