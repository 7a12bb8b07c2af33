"""Measures of over-smoothing over a corpus: means over texts, in memory that does not grow.

Each metric is updated with batches and keeps sums, counts and a histogram of each measure, so that
texts may be split over batches and processes in any way. Sums are float64 and counts integers,
about 40 KiB a measure. The mean is over texts, each with the same weight (macro). A text of fewer
than two tokens is skipped and counted.

A quantile comes from the histogram: it is what `numpy.quantile` gives, to 0.27 %, for values from
3.6e-15 to 4.3e9; smaller and larger ones count as these.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from torchmetrics import Metric

from bert_oversmoothing.diagnostics.measures import (
    distances,
    effective_rank_of,
    mad,
    mad_of_units,
    norm_scale,
    scale_statistics,
    singular_values,
    stable_rank_of,
    unit_rows,
    zero_tokens,
)

Hidden = Float[Tensor, "batch tokens width"]
Mask = Bool[Tensor, "batch tokens"] | Int[Tensor, "batch tokens"]  # as tokenizers give it

QUANTILES = (0.05, 0.95)

# Bin edges are powers of 2^(1/128), from 2^-48 (3.6e-15) to 2^32 (4.3e9).
_PER_OCTAVE, _LOWEST, _BINS = 128, -48, 128 * 80


class Spread(NamedTuple):
    """How a measure is distributed over the texts that have it; NaN where none has.

    Attributes:
        mean: over texts.
        std: population standard deviation over texts.
        low: 5 % quantile, to 0.27 %, of a logarithm to 0.0027.
        high: 95 % quantile, likewise.
        minimum: least value.
        maximum: largest value.
        texts: that have a finite value.
        left_out: texts of two tokens or more whose value is infinite or undefined.
        skipped: texts of fewer than two tokens.
    """

    mean: float
    std: float
    low: float
    high: float
    minimum: float
    maximum: float
    texts: int
    left_out: int
    skipped: int

    def one_minus(self) -> "Spread":
        """The spread of 1 minus the measure; its quantiles are precise near 1 instead of near 0."""
        mean, std, low, high, minimum, maximum, *counts = self
        return Spread(1 - mean, std, 1 - high, 1 - low, 1 - maximum, 1 - minimum, *counts)


class CosineSummary(NamedTuple):
    """Of `TokenCosine`; `zero_tokens` had cosine 0 by definition."""

    cosine: Spread
    zero_tokens: int


class DistanceSummary(NamedTuple):
    """Of `RankOneDistance`."""

    distance: Spread
    relative: Spread
    high_frequency: Spread
    mad: Spread


class RankSummary(NamedTuple):
    """Of `EffectiveRank`."""

    effective: Spread
    effective_centred: Spread
    stable: Spread
    stable_centred: Spread


class ScaleSummary(NamedTuple):
    """Of `LayerNormScale`; `overall_minimum` is the least of all tokens of all texts."""

    minimum: Spread
    low: Spread
    median: Spread
    mean: Spread
    overall_minimum: float


class BetweenSummary(NamedTuple):
    """Of `BetweenTextCosine`.

    Attributes:
        between: mean cosine over all pairs of tokens of different texts; NaN for fewer than two.
        within: mean over texts of the mean cosine inside a text.
        excess: within minus between: what is not an offset that all texts share.
        texts: that count.
        left_out: texts of two tokens or more with a token that is not finite.
        skipped: texts of fewer than two tokens.
        zero_tokens: tokens whose cosine is 0 by definition.
    """

    between: float
    within: float
    excess: float
    texts: int
    left_out: int
    skipped: int
    zero_tokens: int


class PerText(Metric):
    """Sums and histograms of values, one for each text: 0 or more, or natural logarithms.

    Args:
        measures: values a text.
        logarithms: so many of them, the last, are natural logarithms of either sign.
        **kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor
    squares: Tensor
    least: Tensor
    largest: Tensor
    histogram: Tensor
    left_out: Tensor
    skipped: Tensor

    def __init__(self, measures: int, logarithms: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.logs = slice(measures - logarithms, measures)
        zeros = torch.zeros(measures, dtype=torch.float64)
        # Four bytes do for two billion texts a process; a sum over processes is taken in eight.
        counts = torch.zeros(measures, _BINS, dtype=torch.int32)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("squares", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("least", zeros + torch.inf, dist_reduce_fx="min")
        self.add_state("largest", zeros - torch.inf, dist_reduce_fx="max")
        self.add_state("histogram", counts, dist_reduce_fx="sum")
        self.add_state("left_out", counts[:, 0].long(), dist_reduce_fx="sum")
        self.add_state("skipped", torch.tensor(0), dist_reduce_fx="sum")

    def count(
        self, value_kb: Float[Tensor, "measures batch"], mask_bn: Bool[Tensor, "batch tokens"]
    ) -> None:
        """Add a batch: one value of each measure for each text."""
        counted_b = (mask_bn.sum(1) >= 2).to(self.sums.device)
        value_kb = value_kb.to(self.sums)
        finite_kb = value_kb.isfinite() & counted_b
        kept_kb = torch.where(finite_kb, value_kb, 0)
        self.sums += kept_kb.sum(1)
        self.squares += kept_kb.square().sum(1)
        low_k = torch.where(finite_kb, value_kb, torch.inf).amin(1)
        high_k = torch.where(finite_kb, value_kb, -torch.inf).amax(1)
        self.least = torch.minimum(self.least, low_k)
        self.largest = torch.maximum(self.largest, high_k)
        octave_kb = kept_kb.log2()
        octave_kb[self.logs] = kept_kb[self.logs] / math.log(2)
        place_kb = ((octave_kb - _LOWEST) * _PER_OCTAVE).clamp(0, _BINS - 1).long()
        self.histogram.scatter_add_(1, place_kb, finite_kb.int())
        self.left_out += (~finite_kb & counted_b).sum(1)
        self.skipped += (~counted_b).sum()

    def spreads(self) -> list[Spread]:
        """Of every measure."""
        upto_kn = self.histogram.cumsum(1)
        texts_k = upto_kn[:, -1]
        mean_k = self.sums / texts_k
        std_k = (self.squares / texts_k - mean_k.square()).clamp(min=0).sqrt()
        ends = [x.masked_fill(texts_k == 0, torch.nan) for x in (self.least, self.largest)]
        # Minimum and maximum are exact: no quantile of a bin may pass them.
        quantiles = [self._quantile(q, upto_kn).clamp(*ends) for q in QUANTILES]
        figures = torch.stack([mean_k, std_k, *quantiles, *ends], 1).tolist()
        counts = torch.stack([texts_k, self.left_out], 1).tolist()
        skipped = int(self.skipped)
        return [Spread._make((*f, *c, skipped)) for f, c in zip(figures, counts, strict=True)]

    def _quantile(
        self, q: float, upto_kn: Int64[Tensor, "measures bins"]
    ) -> Float[Tensor, " measures"]:
        """Interpolated between the centres of the bins of the two nearest order statistics."""
        place_k = q * (upto_kn[:, -1] - 1).clamp(min=0).double()
        near_k2 = torch.stack([place_k.floor(), place_k.ceil()], 1).long()
        bins_k2 = torch.searchsorted(upto_kn, near_k2, right=True).clamp(max=_BINS - 1)
        octave_k2 = (bins_k2.double() + 0.5) / _PER_OCTAVE + _LOWEST
        value_k2 = octave_k2.exp2()
        value_k2[self.logs] = octave_k2[self.logs] * math.log(2)
        return torch.lerp(value_k2[:, 0], value_k2[:, 1], place_k.frac())


class TokenCosine(PerText):
    """Mean cosine between the tokens of a text (`measures.cosine`).

    1 - cosine is what is kept, so that mean, spread and quantiles stay precise near 1.

    Example:
        >>> metric = TokenCosine()
        >>> metric.update(hidden_states, attention_mask.bool())
        >>> metric.compute().cosine.mean

    Args:
        **kwargs: of `torchmetrics.Metric`.
    """

    zero_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(1, **kwargs)
        self.add_state("zero_tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, hidden_bnd: Hidden, mask_bn: Mask) -> None:
        """Count a batch of texts; the mask is True or not 0 at the real tokens."""
        mask_bn = mask_bn.bool()
        self.count(mad(hidden_bnd, mask_bn)[None], mask_bn)
        self.zero_tokens += _zero_tokens(hidden_bnd, mask_bn).to(self.zero_tokens.device)

    def compute(self) -> CosineSummary:
        """Over all texts so far."""
        return CosineSummary(self.spreads()[0].one_minus(), int(self.zero_tokens))


class RankOneDistance(PerText):
    """Distance to equal tokens: d_M, d_M / ||H||_F, high-frequency ratio and MAD.

    A text whose row mean is zero has no high-frequency ratio, and one whose tokens are all zero no
    relative distance either: they are left out and counted, each by the measure that lacks them.

    Args:
        **kwargs: of `torchmetrics.Metric`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(4, **kwargs)

    def update(self, hidden_bnd: Hidden, mask_bn: Mask) -> None:
        """Count a batch of texts; the mask is True or not 0 at the real tokens."""
        mask_bn = mask_bn.bool()
        values = [*distances(hidden_bnd, mask_bn), mad(hidden_bnd, mask_bn)]
        self.count(torch.stack(values), mask_bn)

    def compute(self) -> DistanceSummary:
        """Over all texts so far."""
        return DistanceSummary(*self.spreads())


class EffectiveRank(PerText):
    """Effective and stable rank, of the states and of the states minus their row mean.

    An eigenvalue decomposition for each text: meant for a sample of the corpus. A text whose tokens
    are all equal has no rank once centred, and is left out and counted.

    Args:
        **kwargs: of `torchmetrics.Metric`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(4, **kwargs)

    def update(self, hidden_bnd: Hidden, mask_bn: Mask) -> None:
        """Count a batch of texts; the mask is True or not 0 at the real tokens."""
        mask_bn = mask_bn.bool()
        both = [singular_values(hidden_bnd, mask_bn, centred=each) for each in (False, True)]
        ranks = [rank(s_bk) for rank in (effective_rank_of, stable_rank_of) for s_bk in both]
        self.count(torch.stack(ranks), mask_bn)

    def compute(self) -> RankSummary:
        """Over all texts so far."""
        return RankSummary(*self.spreads())


class LayerNormScale(PerText):
    """Standard deviations that a layer norm divides by: minimum, 5 %, median and mean of a text.

    Example:
        >>> metric = LayerNormScale(eps=norm.eps)
        >>> hook = norm.register_forward_pre_hook(lambda _, args: metric.update(args[0], mask_bn))

    Args:
        eps: of the norm.
        centred: False for RMSNorm.
        **kwargs: of `torchmetrics.Metric`.
    """

    def __init__(self, eps: float = 1e-12, *, centred: bool = True, **kwargs: Any) -> None:
        super().__init__(4, **kwargs)
        self.eps, self.centred = eps, centred

    def update(self, hidden_bnd: Hidden | Float[Tensor, "batch tokens"], mask_bn: Mask) -> None:
        """Count a batch of texts.

        Args:
            hidden_bnd: what the norm is given; or, without the width, what it divides by.
            mask_bn: True or not 0 at the real tokens.
        """
        mask_bn = mask_bn.bool()
        if hidden_bnd.ndim == 3:
            hidden_bnd = norm_scale(hidden_bnd, self.eps, centred=self.centred)
        self.count(torch.stack(scale_statistics(hidden_bnd, mask_bn)), mask_bn)

    def compute(self) -> ScaleSummary:
        """Over all texts so far."""
        spreads = self.spreads()
        return ScaleSummary._make((*spreads, spreads[0].minimum))


class BetweenTextCosine(Metric):
    """Cosine between tokens of different texts, and how far the cosine inside texts exceeds it.

    A high cosine inside texts may be an offset that all texts share (anisotropy) and no smoothing;
    the excess does without it. Exact over all pairs, from sums alone: with u_i the unit vectors,
    N the tokens and n_t those of text t,

    (||sum_all u||^2 - sum_t ||sum_{i in t} u_i||^2) / (N^2 - sum_t n_t^2).

    Args:
        width: features of a token.
        **kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    squares: Tensor
    within: Tensor
    tokens: Tensor
    own_pairs: Tensor
    texts: Tensor
    left_out: Tensor
    skipped: Tensor
    zero_tokens: Tensor

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zero = torch.tensor(0.0, dtype=torch.float64)
        self.add_state("total", zero.repeat(width), dist_reduce_fx="sum")
        for state in ("squares", "within"):
            self.add_state(state, zero.clone(), dist_reduce_fx="sum")
        for state in ("tokens", "own_pairs", "texts", "left_out", "skipped", "zero_tokens"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, hidden_bnd: Hidden, mask_bn: Mask) -> None:
        """Count a batch of texts; the mask is True or not 0 at the real tokens.

        Raises:
            ValueError: tokens of another width.
        """
        mask_bn = mask_bn.bool()
        if hidden_bnd.shape[2] != len(self.total):
            raise ValueError(f"tokens have {hidden_bnd.shape[2]} features, not {len(self.total)}")
        u_bnd = unit_rows(hidden_bnd, mask_bn)
        sum_bd = u_bnd.sum(1).to(self.total)
        mad_b = mad_of_units(u_bnd, mask_bn).to(self.total)
        n_b = mask_bn.sum(1).to(self.total.device)
        good_b, enough_b = mad_b.isfinite(), n_b >= 2
        sum_bd, n_b = torch.where(good_b[:, None], sum_bd, 0), torch.where(good_b, n_b, 0)
        self.total += sum_bd.sum(0)
        self.squares += sum_bd.square().sum()
        self.within += torch.where(good_b, 1 - mad_b, 0).sum()
        self.tokens += n_b.sum()
        self.own_pairs += n_b.square().sum()
        self.texts += good_b.sum()
        self.left_out += (enough_b & ~good_b).sum()
        self.skipped += (~enough_b).sum()
        self.zero_tokens += _zero_tokens(hidden_bnd, mask_bn).to(self.total.device)

    def compute(self) -> BetweenSummary:
        """Over all texts so far."""
        pairs = self.tokens.square() - self.own_pairs
        between = (self.total.square().sum() - self.squares) / pairs
        between = between.masked_fill(pairs == 0, torch.nan)  # what rounding leaves, over nothing
        within = self.within / self.texts
        figures = torch.stack([between, within, within - between]).tolist()
        counts = (self.texts, self.left_out, self.skipped, self.zero_tokens)
        return BetweenSummary._make((*figures, *(int(count) for count in counts)))


def _zero_tokens(hidden_bnd: Hidden, mask_bn: Bool[Tensor, "batch tokens"]) -> Tensor:
    """Zero vectors in texts that count."""
    counted_b = mask_bn.sum(1) >= 2
    return (zero_tokens(hidden_bnd, mask_bn) * counted_b).sum()
