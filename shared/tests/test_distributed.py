"""Two gloo ranks: what `gather` returns, and losses that look across the batch."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tenfold.distillation import create_loss
from tenfold.distributed import gather, own_rows, ranks
from tenfold.testing import PackageContract, in_processes

ITEMS, RANKS = 8, 2
LOSSES: Mapping[str, Mapping[str, int]] = {
    "sp": {},
    "pkt": {},
    "rkd": {},
    "dist": {},
    "cc": {"dim_s": 5, "dim_t": 5, "dim": 4},
    "crd": {"dim_s": 5, "dim_t": 5, "dim": 4, "n_data": 30, "negatives": 6},
}


class Student(nn.Module):
    """A network and a loss, as DDP wraps them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        self.net = nn.Linear(3, 5)
        self.loss = create_loss(name, **LOSSES[name])

    def forward(self, x: Tensor, teacher: Tensor, *positions: Tensor) -> Tensor:
        return self.loss(self.net(x), teacher, *(positions if self.name == "crd" else ()))


def batch() -> list[Tensor]:
    """Images, teacher's vectors, positions and candidates; both ranks get item 4."""
    g = torch.Generator().manual_seed(1)
    x, teacher = torch.randn(ITEMS, 3, generator=g), torch.randn(ITEMS, 5, generator=g)
    index = torch.tensor([4, 7, 0, 9, 29, 11, 2, 4])
    negatives = torch.randint(30, (ITEMS, 6), generator=g)
    return [x.double(), teacher.double(), index, torch.cat([index.unsqueeze(1), negatives], 1)]


def step(name: str, parts: Sequence[Tensor], *, ddp: bool = False) -> dict[str, Any]:
    """Loss, gradients and buffers after a step on a batch, or on a rank's share of it."""
    student = Student(name).double()
    model = DistributedDataParallel(student) if ddp else student
    loss = model(*parts)
    loss.backward()
    gradients = {key: p.grad for key, p in student.named_parameters()}
    return {"loss": loss.detach(), "grad": gradients, "state": dict(student.named_buffers())}


def share(rank: int) -> list[Tensor]:
    return [part[rank::RANKS] for part in batch()]


def validation(name: str, rank: int) -> Tensor:
    """A loss of more images on one rank than on the other."""
    with torch.no_grad():
        return Student(name).double().eval()(*(part[: 3 + 2 * rank] for part in batch()))


class Ranks(PackageContract):
    """What the processes run."""

    def rank(self, folder: str, rank: int) -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=60),
        )
        x = torch.arange(6.0).view(3, 2).add(10 * rank).requires_grad_()
        whole = gather(x)
        (whole * torch.arange(1.0, 7.0).view(6, 1) * (1 + rank)).sum().backward()
        results = {name: step(name, share(rank), ddp=True) for name in LOSSES}
        seen = {"whole": whole.detach(), "own": whole[own_rows()].detach(), "grad": x.grad}
        uneven = {name: validation(name, rank) for name in LOSSES}
        everything = {"seen": seen, "ranks": ranks(), "uneven": uneven, **results}
        torch.save(everything, f"{folder}/{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    codes = in_processes(Ranks(), [("rank", str(folder), rank) for rank in range(RANKS)])
    assert codes == [0, 0], f"the ranks ended with {codes}, see stderr"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_alone_all_is_the_identity() -> None:
    x = torch.arange(6.0).view(3, 2)
    assert gather(x) is x
    assert ranks() == (0, 1)
    assert torch.equal(x[own_rows()], x)


def test_rows_come_back_in_the_order_that_samplers_dealt_them(two: list[dict]) -> None:
    expected = [[0, 1], [10, 11], [2, 3], [12, 13], [4, 5], [14, 15]]
    for rank, result in enumerate(two):
        assert result["ranks"] == (rank, RANKS)
        assert result["seen"]["whole"].tolist() == expected
        assert result["seen"]["own"].tolist() == expected[rank::RANKS]


def test_a_gradient_is_the_sum_of_what_all_ranks_want(two: list[dict]) -> None:
    # Row k is multiplied by k + 1 on rank 0 and by twice that on rank 1
    for rank, result in enumerate(two):
        assert result["seen"]["grad"].tolist() == [[3.0 * (k + 1)] * 2 for k in range(rank, 6, 2)]


@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_do_as_one(name: str, two: list[dict]) -> None:
    alone = step(name, batch())
    for result in two:
        for part in ("grad", "state"):
            assert list(result[name][part]) == list(alone[part])
            for key, expected in alone[part].items():
                found = result[name][part][key]
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    mean = sum(result[name]["loss"] for result in two) / RANKS
    torch.testing.assert_close(mean, alone["loss"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_without_gather_they_would_not(name: str) -> None:
    alone, halves = step(name, batch()), [step(name, share(rank)) for rank in range(RANKS)]
    for key, whole in alone["grad"].items():
        mean = sum(half["grad"][key] for half in halves) / RANKS
        assert (mean - whole).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.parametrize("name", LOSSES)
def test_validation_of_uneven_batches_stays_on_each_rank(name: str, two: list[dict]) -> None:
    for rank, result in enumerate(two):
        expected = validation(name, rank)
        assert expected > 0
        torch.testing.assert_close(result["uneven"][name], expected, rtol=1e-12, atol=0)
