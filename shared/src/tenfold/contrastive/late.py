"""Token-wise late interaction: every patch finds its best word, and every word its best patch.

Yao et al., "FILIP: Fine-grained Interactive Language-Image Pre-Training", ICLR 2022,
https://arxiv.org/abs/2111.07783, section 3.1.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tenfold.contrastive.fused import LONGEST, late_interaction_fused
from tenfold.contrastive.masks import check_mask, check_tokens
from tenfold.contrastive.tiled import late_interaction_tiled
from tenfold.errors import first_line

Impl = Literal["auto", "naive", "tiled", "triton"]
Reduce = Literal["mean", "sum"]

Scores = tuple[Tensor, Tensor]
ScoresAndWinners = tuple[Tensor, Tensor, Tensor, Tensor]
Form = Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]
"""`late_interaction_tiled` and what takes and returns the same."""

log = logging.getLogger(__name__)

_APART = 1e-2  # relative; half tokens give some 1e-3


@overload
def late_interaction(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None = ...,
    text_mask: Tensor | None = ...,
    *,
    impl: Impl = ...,
    reduce: Reduce = ...,
    mask_padding: bool = ...,
    return_argmax: Literal[False] = ...,
) -> Scores: ...


@overload
def late_interaction(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None = ...,
    text_mask: Tensor | None = ...,
    *,
    impl: Impl = ...,
    reduce: Reduce = ...,
    mask_padding: bool = ...,
    return_argmax: Literal[True],
) -> ScoresAndWinners: ...


def late_interaction(
    image_tokens: Float[Tensor, "images patches dim"],
    text_tokens: Float[Tensor, "texts words dim_t"],
    image_mask: Bool[Tensor, "images_m patches_m"] | None = None,
    text_mask: Bool[Tensor, "texts_m words_m"] | None = None,
    *,
    impl: Impl = "auto",
    reduce: Reduce = "mean",
    mask_padding: bool = True,
    return_argmax: bool = False,
) -> Scores | ScoresAndWinners:
    r"""Score every image with every text, in both directions (sections 3.1 and 3.2).

    With S_ij[k,r] the inner product of patch k of image i with word r of text j,

    .. math::
        s^I_{ij} = \frac{1}{n_i} \sum_k \max_r S_{ij}[k,r], \qquad
        s^T_{ij} = \frac{1}{n_j} \sum_r \max_k S_{ij}[k,r]

    over valid patches and words only: padding is no candidate of a maximum, asks for none and is
    not counted. On equal maxima the first token wins, and has the gradient.

    "naive" writes the equations down and needs a tensor of all products, images x texts x patches x
    words, three times over in training. "tiled" and "triton" find the same numbers without it, and
    have no second derivative.

    Example:
        >>> v, t = F.normalize(patches, dim=-1), F.normalize(words, dim=-1)
        >>> s_i2t, s_t2i = late_interaction(v, t, text_mask=mask)

        ColBERT's MaxSim, the sum over a query's words of their best word in a document, is one
        direction of it, where documents take the images' place and queries the texts':

        >>> _, maxsim = late_interaction(
        ...     documents, queries, document_mask, query_mask, reduce="sum"
        ... )  # maxsim[i, j]: document i for query j

        PyLate scores so too, except that a padded word of a document counts as a similarity of 0
        and beats negative ones, as it does in colpali-engine, which divides the sum by the words of
        the query (`reduce="mean"`). Here padding never wins.

    Args:
        image_tokens: normalised patches of the images, -1..1.
        text_tokens: normalised words of the texts; as many texts as one likes.
        image_mask: True where a patch is valid; all are if left out.
        text_mask: True where a word is valid, which need not be at the front.
        impl: how: "triton" needs CUDA and Triton; "auto" takes it where it runs and agrees with
            "tiled" on a few tokens, else "tiled".
        reduce: "mean" over the valid tokens that ask, or their "sum" (an ablation, and ColBERT).
        mask_padding: without it padding counts as any token (an ablation).
        return_argmax: also return which word each patch chose and which patch each word.

    Returns:
        s_i2t and s_t2i, both (images, texts), -1..1 if a mean of unit vectors; float64 for float64
        tokens, else float32, under autocast as well. With `return_argmax` also the winners: word
        positions in the padded texts (images, texts, patches) and patches (images, texts, words),
        int64, -1 for a token that is padding itself.

    Raises:
        ValueError: tokens or masks that do not fit, a row without a valid token, an option that
            does not exist.
        UserError: "triton" where it cannot run, or what it does not take.
    """
    for option, value, known in (("impl", impl, Impl), ("reduce", reduce, Reduce)):
        if value not in get_args(known):
            raise ValueError(f"{option} must be one of {get_args(known)}, got {value!r}")
    check_tokens(image_tokens, text_tokens)
    image_mask = check_mask(image_mask, image_tokens, "image") if mask_padding else None
    text_mask = check_mask(text_mask, text_tokens, "text") if mask_padding else None
    form = _form(impl, image_tokens, text_tokens)
    with torch.autocast(image_tokens.device.type, enabled=False):
        i2t, t2i, *winners = form(
            image_tokens, text_tokens, image_mask, text_mask, return_argmax=return_argmax
        )
        if reduce == "mean":
            i2t = i2t / _count(image_mask, image_tokens)[:, None]
            t2i = t2i / _count(text_mask, text_tokens)
    return (i2t, t2i, *winners) if return_argmax else (i2t, t2i)  # pyright: ignore[reportReturnType]


def drop_small_gradients(
    scores: Float[Tensor, "images texts"], tol: float
) -> Float[Tensor, "images texts"]:
    """Return the scores; in the backward pass, pairs below `tol` of the largest gradient get none.

    Once training has settled, most pairs' gradients are below 1e-7 of the largest. Tiles skip pairs
    whose gradient is 0, so that scores that pass through here cost less to differentiate.

    Args:
        scores: of one direction.
        tol: a share of the largest gradient, 0 to drop nothing.

    Raises:
        ValueError: a share that is not in 0..1.
    """
    if not 0 <= tol < 1:
        raise ValueError(f"tol must be in 0..1 (1 excluded), got {tol}")
    return _DropSmall.apply(scores, tol) if tol else scores  # pyright: ignore[reportReturnType]


class _DropSmall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, tol: float) -> Tensor:
        ctx.tol = tol
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        size = grads[0].abs()
        return grads[0].masked_fill(size < ctx.tol * size.max(), 0), None


def late_interaction_naive(
    image_tokens: Float[Tensor, "images patches dim"],
    text_tokens: Float[Tensor, "texts words dim"],
    image_mask: Bool[Tensor, "images patches"] | None = None,
    text_mask: Bool[Tensor, "texts words"] | None = None,
    *,
    return_argmax: bool = False,
) -> tuple[
    Float[Tensor, "images texts"],
    Float[Tensor, "images texts"],
    Int[Tensor, "images texts patches"] | None,
    Int[Tensor, "images texts words"] | None,
]:
    """Sums of maxima in both directions, as the equations say; see `late_interaction_tiled`."""
    # what is hidden may be anything, even no number
    if image_mask is not None:
        image_tokens = image_tokens.masked_fill(~image_mask.unsqueeze(2), 0)
    if text_mask is not None:
        text_tokens = text_tokens.masked_fill(~text_mask.unsqueeze(2), 0)
    by_word = by_patch = torch.einsum("bnd,cmd->bcnm", image_tokens, text_tokens)
    if text_mask is not None:
        by_word = by_word.masked_fill(~text_mask[:, None], -torch.inf)
    if image_mask is not None:
        by_patch = by_patch.masked_fill(~image_mask[:, None, :, None], -torch.inf)
    (best_bcn, a_bcn), (best_bcm, b_bcm) = by_word.max(3), by_patch.max(2)
    if image_mask is not None:
        hidden = ~image_mask.unsqueeze(1)
        best_bcn, a_bcn = best_bcn.masked_fill(hidden, 0), a_bcn.masked_fill(hidden, -1)
    if text_mask is not None:
        best_bcm, b_bcm = best_bcm.masked_fill(~text_mask, 0), b_bcm.masked_fill(~text_mask, -1)
    sums = best_bcn.sum(2), best_bcm.sum(2)
    return (*sums, a_bcn, b_bcm) if return_argmax else (*sums, None, None)


def _form(impl: Impl, *tokens: Tensor) -> Form:
    """The function behind a name; all take the same arguments and return sums and winners."""
    device, dtype = tokens[0].device, torch.promote_types(tokens[0].dtype, tokens[1].dtype)
    if impl == "triton" or (
        impl == "auto"
        and device.type == "cuda"
        and dtype != torch.float64
        and tokens[1].shape[1] <= LONGEST
        and importlib.util.find_spec("triton") is not None
        and kernels_agree(device, dtype, tokens[0].shape[2])
    ):
        return late_interaction_fused
    form = late_interaction_naive if impl == "naive" else late_interaction_tiled
    dtype = torch.promote_types(dtype, torch.float32)
    return lambda v, t, *masks, **options: form(v.to(dtype), t.to(dtype), *masks, **options)


@functools.cache
def kernels_agree(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether the kernels give on a device what tiles give, tried once with a few tokens.

    What becomes of them depends on the device and the compiler, and a run should not end for it.
    """
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    try:
        # the first call may come from validation, whose tensors have no gradients
        with torch.inference_mode(False), torch.enable_grad():
            sides = [torch.randn(4, n, dim, generator=generator) for n in (20, 9)]
            v, t = (F.normalize(x, dim=-1).to(device, dtype).requires_grad_() for x in sides)
            lengths = torch.tensor([[9], [2], [5], [1]], device=device)
            mask = torch.arange(9, device=device) < lengths
            # in float64 no winner is decided by rounding, be it that of halves or of TF32
            for form, kind in (
                (late_interaction_fused, dtype),
                (late_interaction_tiled, torch.float64),
            ):
                i2t, t2i, *_ = form(v.to(kind), t.to(kind), None, mask)
                grads = torch.autograd.grad(i2t.square().sum() + t2i.square().sum(), (v, t))
                found.append(torch.cat([x.detach().float().flatten() for x in (i2t, t2i, *grads)]))
        apart = float((found[0] - found[1]).norm() / found[1].norm())
        wrong = None if apart < _APART else f"they differ by {apart:.1g}"
    except Exception as error:  # compilers raise many kinds
        wrong = first_line(error)
    if wrong is not None:
        log.warning("no fused kernels on %s, tiles do the work: %s", device, wrong)
    return wrong is None


def _count(mask: Tensor | None, tokens: Tensor) -> Float[Tensor, " rows"]:
    rows, length, _ = tokens.shape
    sizes = torch.full((rows,), length, device=tokens.device) if mask is None else mask.sum(1)
    return sizes.float()
