"""What the tests' settings promise: annotations that are checked, and forks that can train."""

import importlib
import sys

import jaxtyping
import pytest
import torch

from tenfold.pytest_plugin import check_annotations
from tenfold.testing import can_fork

SOURCE = """
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from nowhere import Unknown


def product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"],
            wrong: bool = False) -> Float[Tensor, "rows columns"]:
    return (a @ b).T if wrong else a @ b


def outer(rows: list[Float[Tensor, "size"]], other: Float[Tensor, "size"]) -> None:
    product(other[None], rows[0][:, None])  # has sizes of its own
    product(ones(4, 4), ones(4, 4))
    assert len(inner(rows)) == 2


def inner(rows: list) -> list:
    return [product(row[None], row[:, None]) for row in rows]


def ones(*shape: int) -> Float[Tensor, "..."]:
    return torch.ones(shape)


def half(x: float) -> float:
    return x / 2


def later(x: Unknown, rows: Float[Tensor, "rows"]) -> int:
    return len(rows)


def each(rows: Float[Tensor, "rows width"]) -> Iterator[Float[Tensor, " width"]]:
    yield from rows


def zeros(size: int) -> Float[Tensor, " {size}"]:
    return torch.zeros(max(size, 2))


@dataclass
class Pair:
    one: Float[Tensor, " size"]
    other: Float[Tensor, " size"]


class Net:
    @property
    def size(self) -> int:
        return "three"

    @classmethod
    def of(cls, size: int) -> Net:
        return cls()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    name = "annotated_for_a_test"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    check_annotations(name)
    yield importlib.import_module(name)
    sys.meta_path[:] = finders
    del sys.modules[name]


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def test_what_fits_passes(module):
    assert module.product(ones(2, 3), ones(3, 4)).shape == (2, 4)
    assert module.product(ones(5, 1), ones(1, 2)).shape == (5, 2)  # sizes of another call
    module.outer([ones(3), ones(3)], ones(3))
    assert module.half(3) == 1.5  # an int is a float
    assert module.later(object(), ones(4)) == 4  # nobody knows what Unknown is
    assert len(list(module.each(ones(2, 3)))) == 2
    assert len(module.zeros(3)) == 3
    module.Pair(ones(3), ones(3))
    assert isinstance(module.Net.of(3), module.Net)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.product(ones(2, 3), ones(4, 4)),
        lambda m: m.product(ones(2, 3), ones(3)),
        lambda m: m.product(ones(2, 3), ones(3, 4).long()),
        lambda m: m.product(ones(2, 3), ones(3, 4), wrong=True),
        lambda m: m.outer([ones(3), ones(2)], ones(2)),
        lambda m: m.outer([ones(2), ones(2)], ones(3)),
        lambda m: m.half("3"),
        lambda m: m.later(object(), ones(4, 4)),
        lambda m: m.each(ones(2)),
        lambda m: m.zeros(1),
        lambda m: m.Pair(ones(3), ones(4)),
        lambda m: m.Net().size,
        lambda m: m.Net.of("3"),
    ],
)
def test_what_does_not_fit_is_refused(module, call):
    with pytest.raises(Exception, match=r"hint|Type-check"):
        call(module)


def test_the_checks_can_be_suspended(module, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert module.product(ones(2, 3), ones(3, 4), wrong=True).shape == (4, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="forks can train on Linux alone")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator keeps forks away")
def test_forks_can_train_after_an_export():
    torch.export.export(torch.nn.Linear(3, 3), (ones(2, 3),))
    ones(1).requires_grad_().sum().backward()
    assert can_fork()
