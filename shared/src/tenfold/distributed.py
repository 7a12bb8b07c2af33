"""What a loss needs to see the whole batch when ranks share it: a gather that gradients pass.

Where torch.distributed is not initialised, or has one rank, everything here is the identity.

Under DDP, which averages gradients over the ranks, a loss computed on gathered tensors has the
gradient that one rank would have with the whole batch: every rank adds its share to the gradient of
every row, and the average takes the number of ranks out again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def ranks() -> tuple[int, int]:
    """This process's rank, and how many there are: (0, 1) without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(
    x: Shaped[Tensor, " batch *shape"], travels_as: torch.dtype | None = None
) -> Shaped[Tensor, " whole *shape"]:
    """Join the rows of all ranks, with gradient.

    The order is that of a batch on one rank: samplers deal items out in turn, so row i of rank r
    becomes row i * ranks + r.

    Example:
        >>> z = gather(model(x))  # (batch, dim) -> (ranks * batch, dim)
        >>> loss = relations(z)

    Args:
        x: of the same shape on all ranks.
        travels_as: type in which rows are sent, such as float16 for half the traffic; what comes
            back has the type of `x`, and so have gradients.
    """
    kind = travels_as or x.dtype
    return x if ranks()[1] == 1 else _Gather.apply(x, kind)  # pyright: ignore[reportReturnType]


def check_even(count: int) -> None:
    """Make sure that all ranks hold as many rows, which `gather` needs.

    Raises:
        ValueError: they do not; names the sizes, rank by rank.
    """
    _, world = ranks()
    if world == 1:
        return
    counts = torch.zeros(world, dtype=torch.int64, device=_device())
    counts[ranks()[0]] = count
    dist.all_reduce(counts)
    if len({*counts.tolist()}) > 1:
        sizes = ", ".join(f"rank {rank}: {n}" for rank, n in enumerate(counts.tolist()))
        raise ValueError(f"ranks hold batches of different sizes ({sizes}): use drop_last")


def largest(count: int) -> int:
    """The largest of a number over all ranks."""
    if ranks()[1] == 1:
        return count
    value = torch.tensor(count, device=_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def _device() -> torch.device:
    """Where tensors must be that the process group can send."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def own_rows() -> slice:
    """Where this rank's rows are in what `gather` returns."""
    rank, world = ranks()
    return slice(rank, None, world)


def whole_batch(x: Shaped[Tensor, " batch *shape"]) -> Shaped[Tensor, " whole *shape"]:
    """The rows of all ranks, for a loss that looks across the batch.

    In validation, without gradients, they are this rank's own: ranks may then hold batches of
    different sizes, which cannot be gathered.
    """
    return gather(x) if torch.is_grad_enabled() else x


def own_part() -> slice:
    """Where this rank's rows are in a `whole_batch`."""
    return own_rows() if torch.is_grad_enabled() else slice(None)


class _Gather(torch.autograd.Function):
    """All-gather, whose backward pass is the sum over ranks of what each wants from a row.

    torch's own, in torch.distributed.nn, is deprecated; its heir there is still private.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: torch.dtype) -> Tensor:
        sent = x.to(kind).contiguous()
        parts = sent.new_empty(dist.get_world_size(), *x.shape)
        dist.all_gather([*parts.unbind()], sent)
        return parts.transpose(0, 1).flatten(0, 1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[own_rows()], None
