"""Contrastive representation distillation (CRD): tell an image's teacher vector from others'."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.distillation.base import DistillationLoss, in_full_precision, register
from tenfold.distillation.embeds import LinearEmbed, MLPEmbed
from tenfold.distillation.negatives import NEGATIVES, OtherClassSampler, Sampling
from tenfold.distillation.rows import vectors
from tenfold.distillation.taps import Taps
from tenfold.distributed import whole_batch
from tenfold.errors import UserError

_EMBEDS = {"linear": LinearEmbed, "mlp": MLPEmbed}
_EPS = 1e-7
_DENSE = 16
"""While the memory has at most this many rows for each candidate, scores come from one product with
the whole memory, and from gathered rows beyond (ten times slower at the size of CIFAR)."""


@register("crd")
class CRDLoss(DistillationLoss[Tensor]):
    r"""Noise-contrastive estimation between embeddings of the one side and a memory of the other.

    Both sides are embedded and divided by their length, e. With scores exp(⟨m_j, e_i⟩ / τ) of the
    student's embedding against the teacher's memory m, divided by a constant Z that is their mean
    over the first batch times N, image i has P_ij for itself and for K items of other classes, and

    .. math::  L_s = -\frac{1}{B} \sum_i \Bigl[ \log \frac{P_{ii}}{P_{ii} + K/N + 10^{-7}}
               + \sum_j \log \frac{K/N}{P_{ij} + K/N + 10^{-7}} \Bigr]

    The loss is L_s plus the same with the sides exchanged. In training, the images' rows of both
    memories then move half of the way to the new embeddings. Ranks agree on Z and on all rows, so
    that DDP need not broadcast the memories.

    Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020,
    https://arxiv.org/abs/1910.10699. State dicts of the authors' program load.

    Example:
        >>> loss = CRDLoss(dim_s=64, dim_t=256, n_data=50_000, labels=train_labels)
        >>> loss(student_vector, teacher_vector, index).backward()

    Args:
        dim_s: entries of the student's vector.
        dim_t: of the teacher's.
        n_data: N, the number of training items.
        labels: (N,) their classes, -1 for none, to draw negatives by; not needed where every call
            brings its own. They are not saved.
        dim: of the embeddings.
        negatives: K; if left out 16384, or as many as every class leaves if that is less.
        temperature: τ.
        momentum: the share of a row that an update keeps.
        embed: "linear", or "mlp" for two layers.
        sampling: of negatives: "exact" without replacement, "fast" with. Draws come from torch's
            global generator.

    Raises:
        ValueError: an option that does not exist or is out of range.
        UserError: labels that do not fit ``n_data``, or fewer other items than negatives.
    """

    signal = "pooled"
    default_weight = 0.8
    reads = ("index",)

    def __init__(
        self,
        dim_s: int,
        dim_t: int,
        n_data: int,
        labels: Int[Tensor, " items"] | Sequence[int] | None = None,
        *,
        dim: int = 128,
        negatives: int | None = None,
        temperature: float = 0.07,
        momentum: float = 0.5,
        embed: Literal["linear", "mlp"] = "linear",
        sampling: Sampling = "exact",
    ) -> None:
        super().__init__()
        options = {"embed": (embed, tuple(_EMBEDS)), "sampling": (sampling, get_args(Sampling))}
        for option, (value, known) in options.items():
            if value not in known:
                raise ValueError(f"{option} must be one of {known}, got {value!r}")
        if n_data < 1 or (negatives is not None and negatives < 1):
            raise ValueError(f"n_data and negatives must be positive: {n_data}, {negatives}")
        if not (temperature > 0 and 0 <= momentum < 1):
            raise ValueError(f"temperature {temperature} or momentum {momentum} is out of range")
        self.n_data, self.negatives = n_data, negatives
        self.sampling: Sampling = sampling
        self.embed_s = _EMBEDS[embed](dim_s, dim, normalize=True)
        self.embed_t = _EMBEDS[embed](dim_t, dim, normalize=True)
        self.contrast = _Memories(n_data, dim, negatives or NEGATIVES, temperature, momentum)
        self.sampler: OtherClassSampler | None = None
        if labels is not None:
            self.set_labels(labels)

    def set_labels(self, labels: Int[Tensor, " items"] | Sequence[int]) -> None:
        """Give the classes of all training items, to draw negatives by.

        Raises:
            UserError: labels that do not fit ``n_data``, or fewer other items than negatives.
        """
        if len(labels) != self.n_data:
            raise UserError(f"{self.name} has {len(labels)} labels for {self.n_data} items")
        sampler = OtherClassSampler(labels, self.negatives, self.sampling)
        self.sampler = sampler.to(self.contrast.params.device)
        self.contrast.params[0] = sampler.count

    @classmethod
    def for_taps(cls, student: Taps, teacher: Taps, **kwargs: Any) -> CRDLoss:
        """Build the loss for two networks; see `DistillationLoss.for_taps`.

        Raises:
            UserError: without ``n_data`` and ``labels``.
        """
        missing = [name for name in ("n_data", "labels") if kwargs.get(name) is None]
        if missing:
            raise UserError(
                f"{cls.name} remembers a vector of every training item and draws negatives of "
                f"other classes, but was not given {' and '.join(missing)}",
                fix="pass n_data, the number of training items, and labels, their classes",
            )
        s, t = vectors(student.signal(cls.signal), teacher.signal(cls.signal), cls.name)
        return cls(s.shape[1], t.shape[1], **kwargs)

    def forward(
        self,
        student: Float[Tensor, "batch_s ..."],
        teacher: Float[Tensor, "batch_t ..."],
        index: Int[Tensor, " batch_s"] | None = None,
        contrast_index: Int[Tensor, "batch_s candidates"] | None = None,
    ) -> Float[Tensor, ""]:
        """Compare a vector with a vector.

        Args:
            student: the pooled vector of the student.
            teacher: that of the teacher, of the same images; taken as constant.
            index: the images' positions in the training set, 0 to N - 1.
            contrast_index: positions of the images themselves and, behind them, of their negatives;
                drawn if left out.

        Raises:
            UserError: different batches, no positions, or nothing to draw negatives by.
        """
        s, t = vectors(student, teacher, self.name)
        if index is None:
            fix = 'the loader must give "index", the position of each item in the training set'
            raise UserError(f"{self.name} needs to know which training items it sees", fix=fix)
        if len(index) != len(s):
            raise UserError(f"{self.name} met {len(index)} positions for {len(s)} images")
        index = index.long()
        candidates = self._draw(index) if contrast_index is None else contrast_index
        e_s, e_t = self.embed_s(s), self.embed_t(t)
        with torch.autocast(s.device.type, enabled=False):
            p_s, p_t = self.contrast(e_s, e_t, index, candidates)
        return self._estimate(p_s) + self._estimate(p_t)

    def _draw(self, index: Int[Tensor, " batch"]) -> Int[Tensor, "batch candidates"]:
        if self.sampler is None:
            fix = "pass labels to the loss, or contrast_index to the call"
            raise UserError(f"{self.name} draws negatives by class, but has no labels", fix=fix)
        return torch.cat([index.unsqueeze(1).int(), self.sampler(index)], 1)

    def _estimate(self, p: Float[Tensor, "batch candidates"]) -> Float[Tensor, ""]:
        noise = (p.shape[1] - 1) / self.n_data
        positive, negative = p[:, :1], p[:, 1:]
        log_hit = (positive / (positive + noise + _EPS)).log()
        log_rejected = (noise / (negative + noise + _EPS)).log()
        return -(log_hit.sum() + log_rejected.sum()) / len(p)


class _Memories(nn.Module):
    """A vector of every training item for both sides, v1 the student's and v2 the teacher's.

    ``params`` is the published program's: K, τ, Z of v1, Z of v2 (-1 before the first batch), and
    the momentum.
    """

    params: Float[Tensor, "5"]
    memory_v1: Float[Tensor, "items dim"]
    memory_v2: Float[Tensor, "items dim"]

    def __init__(self, items: int, dim: int, count: int, temperature: float, momentum: float):
        super().__init__()
        bound = 1 / math.sqrt(dim / 3)
        self.register_buffer("params", torch.tensor([count, temperature, -1, -1, momentum]))
        for name in ("memory_v1", "memory_v2"):
            self.register_buffer(name, torch.empty(items, dim).uniform_(-bound, bound))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Memories:
        """As usual, but keep the five numbers in full precision: float16 cannot hold Z."""
        params = self.params
        super()._apply(fn, recurse)
        if self.params.dtype in (torch.float16, torch.bfloat16):
            self.params = params.to(self.params.device)
        return self

    def forward(
        self,
        e_1: Float[Tensor, "batch dim"],
        e_2: Float[Tensor, "batch dim"],
        index: Int[Tensor, " batch"],
        candidates: Int[Tensor, "batch candidates"],
    ) -> tuple[Float[Tensor, "batch candidates"], Float[Tensor, "batch candidates"]]:
        """Score each side against the other's memory, normalise, and in training remember."""
        _, temperature, z_1, z_2, momentum = self.params.clone()
        scores_1 = (_inner_products(self.memory_v2, e_1, candidates) / temperature).exp()
        scores_2 = (_inner_products(self.memory_v1, e_2, candidates) / temperature).exp()
        means = torch.stack([scores_1.detach().mean(), scores_2.detach().mean()])
        first = whole_batch(means.unsqueeze(0)).mean(0) * len(self.memory_v1)
        z = torch.stack([z_1, z_2])
        z = torch.where(z < 0, first.to(z.dtype), z)
        if self.training:
            self.params[2:4] = z
            rows = whole_batch(index)
            _move(self.memory_v1, rows, whole_batch(e_1.detach()), momentum)
            _move(self.memory_v2, rows, whole_batch(e_2.detach()), momentum)
        return scores_1 / z[0], scores_2 / z[1]


def _inner_products(
    memory: Float[Tensor, "items dim"],
    e: Float[Tensor, "batch dim"],
    candidates: Int[Tensor, "batch candidates"],
) -> Float[Tensor, "batch candidates"]:
    memory = in_full_precision(memory).to(e.dtype)
    if len(memory) <= _DENSE * candidates.shape[1]:
        # A copy, since the memory moves on before the backward pass needs it
        return (e @ memory.clone().mT).gather(1, candidates.long())
    rows = memory.index_select(0, candidates.flatten()).unflatten(0, candidates.shape)
    return torch.bmm(rows, e.unsqueeze(2)).squeeze(2)


@torch.no_grad()
def _move(
    memory: Float[Tensor, "items dim"],
    rows: Int[Tensor, " batch"],
    e: Float[Tensor, "batch dim"],
    momentum: Float[Tensor, ""],
) -> None:
    """Take the rows a step towards the embeddings, and back to length 1."""
    moved = F.normalize(momentum * memory[rows] + (1 - momentum) * e)
    # An item that comes twice is written twice, in an order that GPUs leave open: the last counts
    last = torch.where(rows.unsqueeze(1) == rows, torch.arange(len(rows), device=rows.device), -1)
    memory[rows] = moved[last.amax(1)].to(memory.dtype)
