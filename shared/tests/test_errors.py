"""UserError: one line, whatever goes in and however it travels."""

import pickle

import pytest
from torch.utils.data import DataLoader, Dataset

from tenfold.errors import UserError


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({}, "no such route"),
        ({"where": "--route"}, "no such route (--route)"),
        ({"fix": "choose 0 to 13"}, "no such route: choose 0 to 13"),
        (
            {"where": "--route", "fix": "choose 0\n  to 13"},
            "no such route (--route): choose 0 to 13",
        ),
    ],
)
def test_parts_make_one_line(parts, line):
    error = UserError("no such route", **parts)
    assert str(error) == line
    assert (error.what, error.where, error.fix) == (
        "no such route",
        parts.get("where"),
        parts.get("fix"),
    )


def test_pickle_keeps_everything():
    error = pickle.loads(pickle.dumps(UserError("bad", where="a.png", fix="mend it")))
    assert (str(error), error.where, error.fix) == ("bad (a.png): mend it", "a.png", "mend it")


class _Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise UserError("not an image", where="cat.png", fix="replace it")


def test_a_loader_worker_hands_over_the_line_without_its_traceback():
    with pytest.raises(UserError) as caught:
        next(iter(DataLoader(_Broken(), num_workers=1)))
    assert str(caught.value) == "not an image (cat.png): replace it"
