"""FILIP's objective: contrast images with captions by their token-wise late interaction."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.contrastive import (
    drop_small_gradients,
    info_nce,
    late_interaction,
    rowblock_info_nce,
    select_tokens,
    soft_targets,
    token_scores,
)
from tenfold.contrastive.late import Impl, Reduce
from tenfold.distributed import check_even, gather, largest, own_rows, ranks

Sides = Literal["both", "keys"]
TextBase = Literal["padded", "valid"]
Distributed = Literal["none", "rowblock", "gather"]
CommType = Literal["float32", "float16", "bfloat16"]

_EPS = 1e-12


class FilipLoss(nn.Module):
    r"""Symmetric contrastive loss on the late interaction of a batch of pairs.

    .. math::  L = \tfrac12 \operatorname{mean}_k \operatorname{CE}(s^I_{k\cdot} / \tau, k)
               + \tfrac12 \operatorname{mean}_k \operatorname{CE}(s^T_{\cdot k} / \tau, k)

    The softmax of s^I, image to text, runs over texts, that of s^T over images; both are indexed
    (image, text). Yao et al., "FILIP", ICLR 2022, section 3.1, equations 1 to 6.

    A CLIP loss is the same on one token a side: the mean of one maximum is the cosine.

    Example:
        >>> loss = FilipLoss(token_fraction=0.25)
        >>> out = model(pixels, ids)
        >>> loss(out.image.tokens, out.text.tokens, out.logit_scale, text_mask=out.text.mask)

    Args:
        token_fraction: share of the tokens that are kept, those that match others of this process's
            batch best (section 3.5.3 of the paper: 0.25); 1 keeps all.
        select_sides: "both" sides of a product use the kept tokens; "keys" alone, and tokens that
            ask stay whole, as DeCLIP has it.
        select_text_base: the fraction is of the "padded" length of the texts (the paper), or of
            each caption's "valid" words.
        distributed: contrast the pairs of all processes, by "rowblock" (exact, texts travel alone)
            or "gather" (both sides travel, two rectangular products); or "none", each its own.
        comm_dtype: in which tokens travel between processes, and under autocast on CUDA are
            multiplied (sums are float32 all the same); "float32" leaves them as they are.
        label_smoothing: share of the target that is spread over all.
        skip_tol: leave pairs out of the backward pass whose gradient is below this share of the
            largest; 0 leaves none out.
        impl: of the late interaction, see `tenfold.contrastive.late_interaction`.
        reduce: see there; "sum" is an ablation.
        mask_padding: see there; without it all tokens count, which is an ablation too.

    Raises:
        ValueError: an option that does not exist, or a number out of range.
    """

    def __init__(
        self,
        token_fraction: float = 1.0,
        select_sides: Sides = "both",
        select_text_base: TextBase = "padded",
        distributed: Distributed = "rowblock",
        comm_dtype: CommType = "float16",
        label_smoothing: float = 0.0,
        skip_tol: float = 0.0,
        impl: Impl = "auto",
        reduce: Reduce = "mean",
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        options = {
            "select_sides": (select_sides, Sides),
            "select_text_base": (select_text_base, TextBase),
            "distributed": (distributed, Distributed),
            "comm_dtype": (comm_dtype, CommType),
            "impl": (impl, Impl),
            "reduce": (reduce, Reduce),
        }
        for name, (value, known) in options.items():
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {get_args(known)}, got {value!r}")
        if not 0 < token_fraction <= 1:
            raise ValueError(f"token_fraction must be above 0 and at most 1, got {token_fraction}")
        for name, value in (("label_smoothing", label_smoothing), ("skip_tol", skip_tol)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {value}")
        self.token_fraction, self.select_sides = token_fraction, select_sides
        self.select_text_base: TextBase = select_text_base
        self.distributed = distributed
        self.comm_dtype = None if comm_dtype == "float32" else getattr(torch, comm_dtype)
        self.label_smoothing, self.skip_tol = label_smoothing, skip_tol
        self.impl: Impl = impl
        self.reduce: Reduce = reduce
        self.mask_padding = mask_padding

    def forward(
        self,
        image_tokens: Float[Tensor, "images patches dim"],
        text_tokens: Float[Tensor, "texts words dim"],
        logit_scale: Float[Tensor, ""] | float,
        image_mask: Bool[Tensor, "images patches"] | None = None,
        text_mask: Bool[Tensor, "texts nominal"] | None = None,
        targets: Bool[Tensor, "images whole"] | Num[Tensor, "images whole"] | None = None,
    ) -> Float[Tensor, ""]:
        """Contrast the images of a batch with its texts, pair by pair.

        Under DDP the gradient is this process's share times their number, which averaging takes out
        again; the value is that of all pairs ("rowblock"), or of this process's ("gather").

        Args:
            image_tokens: not normalised.
            text_tokens: of as many texts, not normalised.
            logit_scale: logarithm of 1 / temperature, as the model keeps it.
            image_mask: True where a token counts; all do if left out.
            text_mask: likewise. Of captions that were cropped it may be as long as they were, since
                a share of the "padded" length is one of the mask's.
            targets: 0/1 positives of this process's images among all texts, made soft inside; one
                text each, in order, if left out. Texts of several processes are in the order of
                `tenfold.distributed.gather`.

        Raises:
            ValueError: shapes that do not fit, an image or text without a token that counts or
                without a positive, or processes with batches of different sizes.
        """
        scale = logit_scale.exp() if isinstance(logit_scale, Tensor) else math.exp(logit_scale)
        nominal = text_tokens.shape[1] if text_mask is None else text_mask.shape[1]
        if text_mask is not None:
            text_mask = _cropped(text_mask, text_tokens.shape[1])
        if not self.mask_padding:
            image_mask = text_mask = None
        elif text_mask is not None and self.token_fraction == 1 and self.impl != "naive":
            longest = int(text_mask.any(0).cumsum(0).argmax()) + 1  # what nobody needs is left out
            text_tokens, text_mask = text_tokens[:, :longest], text_mask[:, :longest]
        image, text = _side(image_tokens, image_mask), _side(text_tokens, text_mask)
        keys = (image, text) if self.token_fraction == 1 else self._select(image, text, nominal)
        asking = keys if self.select_sides == "both" else (image, text)
        if self.distributed == "gather" and ranks()[1] > 1:
            return self._gathered(asking, keys, scale, targets)
        alone = self.distributed == "none" or ranks()[1] == 1
        if not alone:
            check_even(len(image.tokens))
            asking, keys = ((side[0], self._all(side[1])) for side in (asking, keys))
        i2t, t2i = self._scores(asking, keys)
        contrast = info_nce if alone else rowblock_info_nce
        return contrast(i2t, t2i, scale, targets, self.label_smoothing)

    def _select(self, image: _Side, text: _Side, nominal: int) -> tuple[_Side, _Side]:
        scores = token_scores(image.tokens, text.tokens, image.mask, text.mask)
        share, base = self.token_fraction, self.select_text_base
        kept = select_tokens(image.tokens, scores[0], image.mask, fraction=share)
        words = select_tokens(
            text.tokens, scores[1], text.mask, fraction=share, base=base, length=nominal
        )
        return _Side(*kept[:2]), _Side(*words[:2])

    def _scores(self, asking: tuple[_Side, _Side], keys: tuple[_Side, _Side]) -> list[Tensor]:
        """s_i2t and s_t2i, whose gradients may lack small entries."""
        (image, text), (patches, words) = asking, keys
        if asking is keys or (image is patches and text is words):
            both = self._late(image, text)
        else:
            both = self._late(image, words)[0], self._late(patches, text)[1]
        return [drop_small_gradients(scores, self.skip_tol) for scores in both]

    def _late(self, image: _Side, text: _Side) -> tuple[Tensor, Tensor]:
        v, t, dtype = image.tokens, text.tokens, self.comm_dtype
        if dtype is not None and v.is_cuda and torch.is_autocast_enabled("cuda"):
            v, t = v.to(dtype), t.to(dtype)
        return late_interaction(v, t, image.mask, text.mask, impl=self.impl, reduce=self.reduce)

    def _all(self, side: _Side) -> _Side:
        """The same side of all processes; what is shorter is padded."""
        short = largest(side.tokens.shape[1]) - side.tokens.shape[1]
        tokens, mask = F.pad(side.tokens, (0, 0, 0, short)), F.pad(side.mask, (0, short))
        return _Side(gather(tokens, self.comm_dtype), gather(mask.byte()).bool())

    def _gathered(
        self,
        asking: tuple[_Side, _Side],
        keys: tuple[_Side, _Side],
        scale: Tensor | float,
        targets: Tensor | None,
    ) -> Tensor:
        check_even(len(asking[0].tokens))
        patches, words = map(self._all, keys)
        i2t, t2i = self._late(asking[0], words)[0], self._late(patches, asking[1])[1].T
        right = [torch.arange(len(words.tokens), device=i2t.device)[own_rows()]] * 2
        if targets is not None:
            if targets.shape != i2t.shape:
                shapes = tuple(targets.shape), tuple(i2t.shape)
                raise ValueError(f"targets have shape {shapes[0]}, the scores {shapes[1]}")
            of_images, of_texts = soft_targets(gather(targets.to(i2t.dtype)), i2t.dtype)
            right = [of_images[own_rows()], of_texts.T[own_rows()]]
        halves = [
            F.cross_entropy(
                drop_small_gradients(s, self.skip_tol) * scale,
                target,
                label_smoothing=self.label_smoothing,
            )
            for s, target in zip((i2t, t2i), right, strict=True)
        ]
        return (halves[0] + halves[1]) / 2


class _Side(NamedTuple):
    """Normalised tokens of one side, and which count."""

    tokens: Float[Tensor, "rows tokens dim"]
    mask: Bool[Tensor, "rows tokens"]


def _side(tokens: Tensor, mask: Tensor | None) -> _Side:
    whole = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    counted = torch.ones_like(tokens[..., 0], dtype=torch.bool) if mask is None else mask
    return _Side(F.normalize(whole, dim=-1, eps=_EPS), counted)


def _cropped(mask: Tensor, length: int) -> Tensor:
    """The mask of captions that were cropped to a length, where no word was."""
    if mask[:, length:].any():
        rows = mask[:, length:].any(1).nonzero().flatten().tolist()
        raise ValueError(f"the text mask counts words behind the {length} given, in row {rows[0]}")
    return mask[:, :length]
