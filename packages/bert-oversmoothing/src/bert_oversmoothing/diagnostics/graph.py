"""Self-attention as a weighted directed graph on the tokens (section 3.2): its statistics.

Row i of a head's attention A says where token i looks. Every function takes the attention weights
>= 0 of B texts and h heads, and a mask that is True at the n real tokens. A is cut to these and its
rows are renormalised, so what padded queries and keys hold counts for nothing, NaN included. The
values are float64, on the CPU if the device has no float64. They are NaN for texts of fewer than
two tokens, and for heads with a NaN, an infinity or an empty row among the real tokens.

Legend of the shape suffixes: b texts, h heads, n tokens (rows look at columns), r Ritz vectors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from torchmetrics import Metric

Attention = Float[Tensor, "texts heads tokens tokens"]
Mask = Bool[Tensor, "texts tokens"]
PerHead = Float[Tensor, "texts heads"]

EXACT_TOKENS = 256
"""Up to so many real tokens lambda is exact."""

RITZ_VECTORS = 4
RITZ_STEPS = 30

Part = Literal[
    "lam", "second_modulus", "row_entropy", "self_mass", "sink", "mean_distance", "asymmetry"
]
PARTS: tuple[Part, ...] = get_args(Part)
"""What `graph_statistics` can compute; "second_modulus" costs more than all others together."""


class Lambda(NamedTuple):
    """The largest eigenvalue of A^T (I - ee^T) A, in 0..n.

    Attributes:
        lam: of every text and head; never above the truth where it is not exact.
        lam_upper: never below the truth: `lam` where it is exact, else the squared Frobenius norm.
        lam_exact: of every text, whether `lam` is exact and not from a power iteration.
    """

    lam: PerHead
    lam_upper: PerHead
    lam_exact: Bool[Tensor, " texts"]


class Sink(NamedTuple):
    """The token that all others look at most.

    Attributes:
        sink_mass: the largest column mean of A, in 1/n..1.
        sink_index: that token's place in the sequence as given, padding counted, so that it finds
            the token's id; the first of several; -1 where the mass is NaN.
    """

    sink_mass: PerHead
    sink_index: Int64[Tensor, "texts heads"]


class GraphStatistics(NamedTuple):
    """What `graph_statistics` was asked for, by the names of the functions; None for the rest."""

    lam: PerHead | None = None
    lam_upper: PerHead | None = None
    lam_exact: Bool[Tensor, " texts"] | None = None
    second_modulus: PerHead | None = None
    row_entropy: PerHead | None = None
    self_mass: PerHead | None = None
    sink_mass: PerHead | None = None
    sink_index: Int64[Tensor, "texts heads"] | None = None
    mean_distance: PerHead | None = None
    asymmetry: PerHead | None = None


class GraphSummary(NamedTuple):
    """Of `AttentionGraph`.

    Attributes:
        means: over texts, under the names of `GraphStatistics`; NaN if no text counts. In place of
            "sink_index", "sink_first" and "sink_last" are the shares of the texts whose sink is the
            first and the last real token ([CLS] and [SEP] mostly).
        texts: that count.
        left_out: texts of two tokens or more with a NaN, an infinity or an empty row in any head.
        skipped: texts of fewer than two tokens.
        approximate: texts that count and whose lambda is not exact.
    """

    means: dict[str, Float[Tensor, " heads"]]
    texts: int
    left_out: int
    skipped: int
    approximate: int


def real_attention(attention_bhnn: Attention, mask_bn: Mask) -> Attention:
    """Attention among the real tokens: zero where either token is padding, rows that sum to 1.

    Float64, for the eigenvalues of a nearly uniform A are differences of nearly equal numbers. Rows
    that have no finite, positive mass on real keys are NaN, and so is the entry of a single token.
    """
    real_bhnn = mask_bn[:, None, :, None] & mask_bn[:, None, None, :]
    a_bhnn = attention_bhnn.double().masked_fill(~real_bhnn, 0)
    total_bhn1 = a_bhnn.sum(-1, keepdim=True)
    total_bhn1 = total_bhn1.masked_fill(~total_bhn1.isfinite(), torch.nan)
    total_bhn1 = total_bhn1.masked_fill(~mask_bn[:, None, :, None], 1)
    single_b111 = (mask_bn.sum(1) == 1)[:, None, None, None]
    return (a_bhnn / total_bhn1).masked_fill(single_b111 & real_bhnn, torch.nan)


_Found = TypeVar("_Found", Tensor, Lambda, Sink)
_Equation = Callable[[Tensor, Tensor], _Found]
_EQUATIONS: dict[str, _Equation[Any]] = {}


def _part(name: Part) -> Callable[[_Equation[_Found]], _Equation[_Found]]:
    """Let an equation on `real_attention` take any attention; `graph_statistics` prepares once."""

    def register(equation: _Equation[_Found]) -> _Equation[_Found]:
        _EQUATIONS[name] = equation

        @functools.wraps(equation)
        def public(attention_bhnn: Tensor, mask_bn: Tensor) -> _Found:
            return equation(*_prepare(attention_bhnn, mask_bn))

        return public

    return register


def _prepare(attention_bhnn: Tensor, mask_bn: Tensor) -> tuple[Tensor, Tensor]:
    if attention_bhnn.device.type == "mps":  # it has no float64
        attention_bhnn, mask_bn = attention_bhnn.cpu(), mask_bn.cpu()
    return real_attention(attention_bhnn, mask_bn), mask_bn


def graph_statistics(
    attention_bhnn: Attention, mask_bn: Mask, *, parts: Collection[Part] = PARTS
) -> GraphStatistics:
    """Statistics of every text's and head's attention graph, each under its function's name.

    Example:
        >>> found = graph_statistics(attention_bhnn, mask_bn, parts=("lam", "sink"))
        >>> found.lam, found.sink_index

    Args:
        attention_bhnn: weights.
        mask_bn: True for real tokens.
        parts: what to compute, of `PARTS`.

    Raises:
        ValueError: a part that there is not.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"no such parts: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    a_bhnn, mask_bn = _prepare(attention_bhnn, mask_bn)
    found: dict[str, Tensor] = {}
    for part in parts:
        values = _EQUATIONS[part](a_bhnn, mask_bn)
        found |= {part: values} if isinstance(values, Tensor) else values._asdict()
    return GraphStatistics(**found)


# -- eigenvalues ----------------------------------------------------------------------------------


@_part("lam")
def lambda_max(attention_bhnn: Attention, mask_bn: Mask) -> Lambda:
    """The square of sigma_max(A - 1 m^T), m the column mean of A; see `Lambda`.

    Under A the distance to the matrices of equal rows grows at most by sqrt(lambda). Lambda is 0 if
    all tokens look alike, 1 for A = I, at most 1 if A is doubly stochastic. Exact up to
    `EXACT_TOKENS` real tokens; above, a block power iteration, whose cost grows with n^2 only.
    """
    lam_bh = _by_text(attention_bhnn, mask_bn, lambda a_hnn: _lambda(_spread(a_hnn)))
    frobenius_bh = _by_text(attention_bhnn, mask_bn, lambda a_hnn: _frobenius(_spread(a_hnn)))
    exact_b = mask_bn.sum(1) <= EXACT_TOKENS
    return Lambda(lam_bh, torch.where(exact_b[:, None], lam_bh, frobenius_bh), exact_b)


@_part("second_modulus")
def second_modulus(attention_bhnn: Attention, mask_bn: Mask) -> PerHead:
    """Modulus of the second largest eigenvalue of A, in 0..1; 1 for I and for permutations."""
    # Of A itself: the spread A - 1 m^T has the same eigenvalues besides 1, but is no longer
    # triangular where A is causal, and then loses digits.
    return _by_text(
        attention_bhnn, mask_bn, lambda a_hnn: torch.linalg.eigvals(a_hnn).abs().topk(2)[0][:, 1]
    )


def _by_text(a_bhnn: Attention, mask_bn: Mask, statistic: Callable[[Tensor], Tensor]) -> PerHead:
    """A statistic of each text's own n x n matrices: the cost is cubic, padding would be dear."""
    found_bh = a_bhnn.new_full(a_bhnn.shape[:2], torch.nan)
    for text, real in enumerate(mask_bn):
        a_hnn = a_bhnn[text][:, real][:, :, real]
        finite_h = a_hnn.isfinite().all(-1).all(-1)  # LAPACK refuses the others
        if len(a_hnn[0]) > 1 and finite_h.any():
            found_bh[text, finite_h] = statistic(a_hnn[finite_h])
    return found_bh


def _spread(a_hnn: Float[Tensor, "heads n n"]) -> Float[Tensor, "heads n n"]:
    """C = A - 1 m^T = (I - ee^T) A."""
    return a_hnn - a_hnn.mean(-2, keepdim=True)


def _frobenius(c_hnn: Float[Tensor, "heads n n"]) -> Float[Tensor, " heads"]:
    return c_hnn.square().sum((-2, -1))


def _lambda(c_hnn: Float[Tensor, "heads n n"]) -> Float[Tensor, " heads"]:
    if c_hnn.shape[-1] > EXACT_TOKENS:
        return _largest_ritz_value(c_hnn)
    return torch.linalg.eigvalsh(c_hnn.mT @ c_hnn)[:, -1].clamp_min(0)


def _largest_ritz_value(c_hnn: Float[Tensor, "heads n n"]) -> Float[Tensor, " heads"]:
    """Of C^T C on the subspace that a block power iteration ends in; never above the truth."""
    places = torch.arange(1, c_hnn.shape[-1] + 1, device=c_hnn.device, dtype=c_hnn.dtype)
    # Fractions of irrational multiples spread evenly, and owe nothing to a generator's state.
    roots = torch.tensor([2, 3, 5, 7], device=c_hnn.device, dtype=c_hnn.dtype)[:RITZ_VECTORS].sqrt()
    q_hnr = torch.linalg.qr((places[:, None] * roots).frac() - 0.5)[0].expand(len(c_hnn), -1, -1)
    for _ in range(RITZ_STEPS):
        q_hnr = torch.linalg.qr(c_hnn.mT @ (c_hnn @ q_hnr))[0]
    image_hnr = c_hnn @ q_hnr
    return torch.linalg.eigvalsh(image_hnr.mT @ image_hnr)[:, -1].clamp_min(0)


# -- where the mass lies --------------------------------------------------------------------------


@_part("row_entropy")
def row_entropy(attention_bhnn: Attention, mask_bn: Mask) -> PerHead:
    """Mean over the rows of -sum_j A_ij ln A_ij, divided by ln n: 0 for one-hot, 1 for uniform."""
    count_b1 = mask_bn.sum(1, keepdim=True).to(attention_bhnn.dtype)
    return torch.special.entr(attention_bhnn).sum((-2, -1)) / (count_b1 * count_b1.log())


@_part("self_mass")
def self_mass(attention_bhnn: Attention, mask_bn: Mask) -> PerHead:
    """Mean of A_ii, in 0..1: the self-loops."""
    return attention_bhnn.diagonal(dim1=-2, dim2=-1).sum(-1) / mask_bn.sum(1, keepdim=True)


@_part("sink")
def sink(attention_bhnn: Attention, mask_bn: Mask) -> Sink:
    """The largest column mean of A and its token; see `Sink`."""
    mean_bhn = attention_bhnn.sum(-2) / mask_bn.sum(1)[:, None, None]
    index_bh = mean_bhn.argmax(-1)
    # Not the value at the index: where one column is NaN, all are.
    mass_bh = mean_bhn.amax(-1)
    return Sink(mass_bh, index_bh.masked_fill(mass_bh.isnan(), -1))


@_part("mean_distance")
def mean_distance(attention_bhnn: Attention, mask_bn: Mask) -> PerHead:
    """sum_ij A_ij |i - j| / n, in 0..n - 1; i and j count the real tokens."""
    place_bn = mask_bn.cumsum(1)
    apart_bnn = (place_bn[:, :, None] - place_bn[:, None]).abs().to(attention_bhnn.dtype)
    total_bh = torch.einsum("bhij,bij->bh", attention_bhnn, apart_bnn)
    return total_bh / mask_bn.sum(1, keepdim=True)


@_part("asymmetry")
def asymmetry(attention_bhnn: Attention, mask_bn: Mask) -> PerHead:
    """||A - A^T||_F / (2 ||A||_F), in 0..1/sqrt(2): 0 if symmetric."""
    norm = functools.partial(torch.linalg.vector_norm, dim=(-2, -1))
    return norm(attention_bhnn - attention_bhnn.mT) / (2 * norm(attention_bhnn))


# -- over many texts ------------------------------------------------------------------------------


class AttentionGraph(Metric):
    """Means over texts of one layer's graph statistics, by head; the memory does not grow.

    Example:
        >>> graph = AttentionGraph(num_heads=12, parts=("lam", "row_entropy"))
        >>> graph.update(attention_bhnn, mask_bn)
        >>> graph.compute().means["lam"]

    Args:
        num_heads: h.
        parts: what to compute, of `PARTS`.
        **kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: a part that there is not.
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor
    texts: Tensor
    left_out: Tensor
    skipped: Tensor
    approximate: Tensor

    def __init__(self, num_heads: int, parts: Collection[Part] = PARTS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts = tuple(parts)
        nothing = torch.ones(1, num_heads, 2, 2), torch.ones(1, 2, dtype=torch.bool)
        self.names = tuple(_by_head(graph_statistics(*nothing, parts=self.parts), nothing[1]))
        empty = torch.zeros(len(self.names), num_heads, dtype=torch.float64)
        self.add_state("sums", empty, dist_reduce_fx="sum")
        for count in ("texts", "left_out", "skipped", "approximate"):
            self.add_state(count, torch.tensor(0), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(
        self, attention_bhnn: Attention, mask_bn: Mask | Int[Tensor, "texts tokens"]
    ) -> None:
        """Add a batch.

        Args:
            attention_bhnn: weights.
            mask_bn: True or not 0 for real tokens.

        Raises:
            ValueError: another number of heads.
        """
        mask_bn = mask_bn.bool()
        if attention_bhnn.shape[1] != self.sums.shape[1]:
            raise ValueError(f"{attention_bhnn.shape[1]} heads, not {self.sums.shape[1]}")
        self.count(graph_statistics(attention_bhnn, mask_bn, parts=self.parts), mask_bn)

    def count(self, found: GraphStatistics, mask_bn: Mask) -> None:
        """Add a batch of which the statistics, those of `parts`, are known."""
        by_head = _by_head(found, mask_bn)
        values_bph = torch.stack([by_head[name] for name in self.names], 1).to(self.sums.device)
        long_b = (mask_bn.sum(1) > 1).to(self.sums.device)
        finite_b = values_bph.isfinite().flatten(1).all(1)
        counted_b = long_b & finite_b
        self.sums += values_bph[counted_b].sum(0)
        self.texts += counted_b.sum()
        self.left_out += (long_b & ~finite_b).sum()
        self.skipped += (~long_b).sum()
        if found.lam_exact is not None:
            self.approximate += (counted_b & ~found.lam_exact.to(counted_b.device)).sum()

    def compute(self) -> GraphSummary:
        """Over all texts so far."""
        return self.summary()

    def summary(self) -> GraphSummary:
        """`compute` of this process alone."""
        means = dict(zip(self.names, self.sums / self.texts, strict=True))
        counts = (self.texts, self.left_out, self.skipped, self.approximate)
        return GraphSummary(means, *(int(count) for count in counts))


def _by_head(found: GraphStatistics, mask_bn: Tensor) -> dict[str, Tensor]:
    """The values (texts, heads) that have a mean over texts."""
    values = {name: x for name, x in found._asdict().items() if x is not None}
    values.pop("lam_exact", None)
    if (index_bh := values.pop("sink_index", None)) is not None:
        place_bn = mask_bn.to(index_bh.device).cumsum(1)
        place_bh = place_bn.gather(1, index_bh.clamp_min(0))
        values["sink_first"] = (place_bh == 1).double()
        values["sink_last"] = (place_bh == place_bn[:, -1:]).double()
    return values
