"""How alike the tokens of a text are, one value for each text.

Every function takes hidden states (B texts, n tokens, d features) and a mask that is True at the
real tokens, which may lie anywhere; what stands at the others counts for nothing, NaN included.
Half precision is promoted to float32. A text of fewer than two real tokens gives NaN, and so does
one with a real token that is not finite. In the formulas n counts the real tokens, h_i are their
vectors, H is the matrix of them, u_i = h_i / max(||h_i||, 1e-12) and U the matrix of those.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

EPS = 1e-12
"""The least norm by which a token is divided."""

Hidden = Float[Tensor, "batch tokens width"]
Mask = Bool[Tensor, "batch tokens"]
PerText = Float[Tensor, " batch"]


class Distances(NamedTuple):
    """Of `distances`, each of shape (B)."""

    distance: PerText
    relative: PerText
    high_frequency: PerText


class ScaleStatistics(NamedTuple):
    """Of `scale_statistics`, each of shape (B)."""

    minimum: PerText
    low: PerText
    median: PerText
    mean: PerText


def cosine(hidden_bnd: Hidden, mask_bn: Mask) -> PerText:
    """Mean cosine over all ordered pairs of different tokens, -1/(n-1)..1.

    A zero vector has cosine 0 with every other (`zero_tokens` counts them). Time is linear in n.
    """
    return 1 - mad(hidden_bnd, mask_bn)


def cosine_without_mean(hidden_bnd: Hidden, mask_bn: Mask) -> PerText:
    """`cosine` after the mean of the real tokens of all texts together was subtracted.

    An offset that all texts share (anisotropy) drops out. The batch has to be the whole sample.
    Texts with a value that is not finite are left out of the mean.
    """
    sums_bd = _real(hidden_bnd, mask_bn).sum(1)
    good_b = sums_bd.isfinite().all(1)
    corpus_d = sums_bd[good_b].sum(0) / mask_bn[good_b].sum()
    return cosine(_promoted(hidden_bnd) - corpus_d, mask_bn)


def mad(hidden_bnd: Hidden, mask_bn: Mask) -> PerText:
    """Mean average distance of graph networks: 1 - `cosine`, 0..n/(n-1).

    Computed as d_M(U)^2 / (n-1), plus 1/n for each zero vector. Unlike 1 minus a mean of cosines,
    the form loses no digits where all tokens are nearly alike.
    """
    return mad_of_units(unit_rows(hidden_bnd, mask_bn), mask_bn)


def rank_one_distance(hidden_bnd: Hidden, mask_bn: Mask) -> PerText:
    """d_M(H) = ||H - row mean||_F, 0 or more: the distance to the matrices whose rows are equal."""
    return distances(hidden_bnd, mask_bn).distance


def relative_distance(hidden_bnd: Hidden, mask_bn: Mask) -> PerText:
    """d_M(H) / ||H||_F, 0..1; NaN where all tokens are zero."""
    return distances(hidden_bnd, mask_bn).relative


def high_frequency_ratio(hidden_bnd: Hidden, mask_bn: Mask) -> PerText:
    """d_M(H) / (sqrt(n) ||row mean||), 0 or more: the part that varies over the constant part.

    A row mean of zero up to rounding gives infinity; NaN where all tokens are zero.
    """
    return distances(hidden_bnd, mask_bn).high_frequency


def distances(hidden_bnd: Hidden, mask_bn: Mask) -> Distances:
    """`rank_one_distance`, `relative_distance` and `high_frequency_ratio` in one pass."""
    centred_bnd, constant_b, n_b = _split(hidden_bnd, mask_bn)
    distance_b = _frobenius(centred_bnd, mask_bn)
    norm_b = torch.hypot(distance_b, constant_b)
    # A mean of zero is rounded to something of this size, seldom to zero.
    rounding_b = torch.finfo(norm_b.dtype).eps * n_b.sqrt() * norm_b
    constant_b = torch.where(constant_b > rounding_b, constant_b, 0)
    values = (distance_b, distance_b / norm_b, distance_b / constant_b)
    return Distances(*(_defined(value_b, n_b) for value_b in values))


def effective_rank(hidden_bnd: Hidden, mask_bn: Mask, *, centred: bool = False) -> PerText:
    """Exponential entropy of p_i = s_i / sum s, s the singular values of H, 1..min(n, d).

    In float64. NaN where all singular values are zero: zero tokens, or equal ones if centred.

    Args:
        hidden_bnd: hidden states.
        mask_bn: the real tokens.
        centred: of H minus its row mean.
    """
    return effective_rank_of(singular_values(hidden_bnd, mask_bn, centred=centred))


def stable_rank(hidden_bnd: Hidden, mask_bn: Mask, *, centred: bool = False) -> PerText:
    """||H||_F^2 / ||H||_2^2, 1..min(n, d); float64. Arguments and NaN as `effective_rank`."""
    return stable_rank_of(singular_values(hidden_bnd, mask_bn, centred=centred))


def effective_rank_of(s_bk: Float[Tensor, "batch smaller"]) -> PerText:
    """`effective_rank`, from what `singular_values` gave."""
    p_bk = s_bk / s_bk.sum(1, keepdim=True)
    return torch.special.entr(p_bk).sum(1).exp()


def stable_rank_of(s_bk: Float[Tensor, "batch smaller"]) -> PerText:
    """`stable_rank`, from what `singular_values` gave."""
    square_bk = s_bk.square()
    return square_bk.sum(1) / square_bk.amax(1)


def singular_values(
    hidden_bnd: Hidden, mask_bn: Mask, *, centred: bool = False
) -> Float[Tensor, "batch smaller"]:
    """Singular values of H in float64, ascending, from the smaller Gram matrix.

    Values below about 1e-8 of the largest are zero: the Gram matrix cannot tell them from rounding.
    A text with fewer than min(tokens, width) of them is filled up with zeros; NaN for a text of
    fewer than two tokens, or with a real token that is not finite.
    """
    h_bnd, n_b = hidden_bnd.double(), mask_bn.sum(1)
    x_bnd = _real(_split(h_bnd, mask_bn)[0] if centred else h_bnd, mask_bn)
    tokens, width = x_bnd.shape[1:]
    gram_bkk = x_bnd @ x_bnd.mT if tokens <= width else x_bnd.mT @ x_bnd
    finite_b = gram_bkk.isfinite().all(-1).all(-1)
    # LAPACK refuses the whole batch for one value that is not finite.
    lam_bk = torch.linalg.eigvalsh(torch.where(finite_b[:, None, None], gram_bkk, 0))
    # No more than this many can differ from zero: padding and centring add zeros.
    most_b = n_b.sub(int(centred)).clamp(0, width)
    place_k = torch.arange(lam_bk.shape[1], 0, -1, device=lam_bk.device)
    cut_b = n_b.clamp(max=width) * torch.finfo(torch.float64).eps * lam_bk.amax(1)
    kept_bk = (place_k <= most_b[:, None]) & (lam_bk > cut_b[:, None])
    s_bk = torch.where(kept_bk, lam_bk, 0).sqrt()
    return torch.where((finite_b & (n_b >= 2))[:, None], s_bk, torch.nan)


def norm_scale(
    input_bnd: Float[Tensor, "*batch tokens width"], eps: float = 0.0, *, centred: bool = True
) -> Float[Tensor, "*batch tokens"]:
    """What a norm divides each token by: sqrt(var + eps) with the population variance of the width.

    Args:
        input_bnd: states before the norm.
        eps: of the norm.
        centred: False for RMSNorm, which divides by sqrt(mean square + eps).
    """
    x_bnd = _promoted(input_bnd)
    if centred:
        x_bnd = x_bnd - x_bnd.mean(-1, keepdim=True)
    return (x_bnd.square().mean(-1) + eps).sqrt()


def scale_statistics(sigma_bn: Float[Tensor, "batch tokens"], mask_bn: Mask) -> ScaleStatistics:
    """Minimum, 5 % quantile, median and mean of a value for each token.

    Quantiles are interpolated between neighbours, as numpy's default.

    Args:
        sigma_bn: standard deviations before a layer norm.
        mask_bn: the real tokens.
    """
    n_b = mask_bn.sum(1)
    sigma_bn = torch.where(mask_bn, _promoted(sigma_bn), torch.nan)
    low_b, median_b = sigma_bn.nanquantile(sigma_bn.new_tensor([0.05, 0.5]), dim=1)
    minimum_b = torch.where(mask_bn, sigma_bn, torch.inf).amin(1)
    mean_b = torch.where(mask_bn, sigma_bn, 0).sum(1) / n_b
    # `nanquantile` leaves out a real NaN as it leaves out padding; the mean does not.
    bad_b = ~mean_b.isfinite()
    values = (minimum_b, low_b, median_b, mean_b)
    return ScaleStatistics(
        *(_defined(value_b.masked_fill(bad_b, torch.nan), n_b) for value_b in values)
    )


def zero_tokens(hidden_bnd: Hidden, mask_bn: Mask) -> Int[Tensor, " batch"]:
    """How many real tokens have a norm below 1e-12, so that their cosine is 0 by definition."""
    norm_bn = torch.linalg.vector_norm(_promoted(hidden_bnd), dim=2)
    return (mask_bn & (norm_bn < EPS)).sum(1)


def unit_rows(hidden_bnd: Hidden, mask_bn: Mask) -> Hidden:
    """The u_i, and zeros in place of the other tokens."""
    x_bnd = _promoted(hidden_bnd)
    norm_bn1 = torch.linalg.vector_norm(x_bnd, dim=2, keepdim=True)
    return (x_bnd / norm_bn1.clamp(min=EPS)).masked_fill_(~mask_bn[..., None], 0)


def mad_of_units(u_bnd: Hidden, mask_bn: Mask) -> PerText:
    """`mad`, from what `unit_rows` gave."""
    centred_bnd, _, n_b = _split(u_bnd, mask_bn)
    square_bn = torch.linalg.vector_norm(u_bnd, dim=2).square()
    # A norm of 1 is rounded, and what is left of 1 - 1 would drown a small distance.
    lost_bn = torch.where(square_bn < 0.9999, 1 - square_bn, 0)
    lost_b = torch.where(mask_bn, lost_bn, 0).sum(1)
    return _defined(_frobenius(centred_bnd, mask_bn).square() / (n_b - 1) + lost_b / n_b, n_b)


def _promoted(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _real(hidden_bnd: Hidden, mask_bn: Mask) -> Hidden:
    return torch.where(mask_bn[..., None], _promoted(hidden_bnd), 0)


def _split(hidden_bnd: Hidden, mask_bn: Mask) -> tuple[Hidden, PerText, PerText]:
    """H minus its row mean (anything at the other tokens), sqrt(n) ||row mean||, and n.

    Differences of similar numbers are exact, so the rows are compared with one of them before
    anything is averaged: the distance keeps its digits however near they are, and equal rows have
    exactly 0. A mean of the rows themselves is rounded to their size. Memory is what this costs, so
    the differences are centred where they are.
    """
    first_b = mask_bn.int().argmax(1)
    anchor_b1d = _promoted(hidden_bnd.take_along_dim(first_b[:, None, None], 1))
    x_bnd = (hidden_bnd - anchor_b1d).masked_fill_(~mask_bn[..., None], 0)
    n_b = mask_bn.sum(1).to(x_bnd.dtype)
    mean_b1d = x_bnd.sum(1, keepdim=True) / n_b[:, None, None]
    x_bnd -= mean_b1d
    constant_b = torch.linalg.vector_norm(anchor_b1d + mean_b1d, dim=(1, 2)) * n_b.sqrt()
    return x_bnd, constant_b, n_b


def _frobenius(x_bnd: Hidden, mask_bn: Mask) -> PerText:
    # Two short sums round less than a long one.
    norm_bn = torch.linalg.vector_norm(x_bnd, dim=2)
    return torch.linalg.vector_norm(torch.where(mask_bn, norm_bn, 0), dim=1)


def _defined(value_b: PerText, n_b: Shaped[Tensor, " batch"]) -> PerText:
    return torch.where(n_b >= 2, value_b, torch.nan)
