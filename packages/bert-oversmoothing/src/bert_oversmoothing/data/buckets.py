"""Batches of items of like length, which need less padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tenfold.data import Draw, EpochSampler
from tenfold.training import mix


class BucketSampler(EpochSampler):
    """Yields `Draw`s so that items of one batch have like length; a function of (seed, epoch).

    The epoch's permutation is cut into pools of some batches. A pool is sorted by length, and the
    order of all full batches is shuffled. What is left over comes last, as it is.

    Args:
        lengths: of all items.
        batch_size: of one rank.
        pool: batches that are sorted together.
        seed: see above.
        replicas: number of ranks, which have items of like length at the same time.
        rank: this one.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        pool: int,
        seed: int = 0,
        replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(len(lengths), seed=seed, replicas=replicas, rank=rank)
        self.lengths = torch.tensor(lengths)
        self.batch, self.pool = batch_size * replicas, pool

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        order = torch.randperm(len(self.lengths), generator=generator)
        order = order[: self.num_samples * self.num_replicas]
        whole = len(order) // self.batch * self.batch
        pools = order[:whole].split(self.pool * self.batch)
        by_length = [pool[self.lengths[pool].argsort(stable=True)] for pool in pools]
        batches = torch.cat(by_length).view(-1, self.batch) if by_length else order[:0]
        batches = batches[torch.randperm(len(batches), generator=generator)]
        kept = torch.cat((batches.flatten(), order[whole:]))
        mine = kept[self.rank :: self.num_replicas].tolist()
        epoch, skip, self.skip = self.epoch, self.skip, 0
        return (Draw(epoch, index) for index in mine[skip:])
