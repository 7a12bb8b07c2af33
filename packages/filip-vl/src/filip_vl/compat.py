"""FILIP as other programs compute it, faults included: for their checkpoints and their numbers.

`filip_vl.losses.FilipLoss` is the paper's. These differ from it, and from each other, in padding,
in the axis of a softmax and in what is selected; each function says how.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

DECLIP_KEYS = 16
"""Tokens that DeCLIP keeps of a side that is asked."""

Scale = Float[Tensor, ""] | float


def declip(
    image_tokens: Float[Tensor, "batch patches dim"],
    text_tokens: Float[Tensor, "batch words dim"],
    scale: Scale,
    *,
    keys: int = DECLIP_KEYS,
) -> Float[Tensor, ""]:
    """DeCLIP's: padding counts as words, and only tokens that are asked are selected.

    Of a pair's similarities P the patches of largest sum over words are the image's keys, the words
    of largest sum over patches the text's. All patches ask a text's keys, all words an image's.

    Args:
        image_tokens: after the mapping, not normalised.
        text_tokens: likewise, padding included.
        scale: 1 / temperature, the exponential of `logit_scale_dense`.
        keys: tokens that a side is asked by.
    """
    v, t = (F.normalize(x, dim=-1, eps=1e-12) for x in (image_tokens, text_tokens))
    p = v.detach() @ t.detach().mT
    image_keys, text_keys = (_largest(x, p.sum(d), keys) for x, d in ((v, 2), (t, 1)))
    per_image = torch.einsum("ind,jkd->ijnk", v, text_keys).amax(3).mean(2)
    per_text = torch.einsum("jmd,ikd->jimk", t, image_keys).amax(3).mean(2)
    return _both(scale * per_image, scale * per_text)


def mindformers(
    image_tokens: Float[Tensor, "batch patches dim"],
    text_tokens: Float[Tensor, "batch words dim"],
    text_mask: Bool[Tensor, "batch words"],
    scale_image: Scale,
    scale_text: Scale,
) -> Float[Tensor, ""]:
    """MindFormers': padded words are vectors of zero, so that a patch's maximum is at least 0.

    Logits are clipped to -100..100, and targets smoothed by 0.1.

    Args:
        image_tokens: not normalised.
        text_tokens: likewise.
        text_mask: True where the id is not 0, which is that program's rule.
        scale_image: of image to text.
        scale_text: of text to image, which learns apart.
    """
    v = F.normalize(image_tokens, dim=-1, eps=1e-12)
    t = F.normalize(text_tokens, dim=-1, eps=1e-12) * text_mask.unsqueeze(2)
    s = torch.einsum("ind,jmd->ijnm", v, t)
    per_image = s.amax(3).mean(2)
    per_text = ((s.amax(2) * text_mask).sum(2) / text_mask.sum(1)).T
    logits = (scale_image * per_image, scale_text * per_text)
    return _both(*(z.clamp(-100, 100) for z in logits), smoothing=0.1)


def mindformers_select(
    tokens: Float[Tensor, "batch length dim"],
    others: Float[Tensor, "batch length_o dim"],
    mask: Bool[Tensor, "batch length"],
    fraction: float,
) -> tuple[Float[Tensor, "batch kept dim"], Bool[Tensor, "batch kept"]]:
    """MindFormers' selection, which its program never calls: zero vectors have a score as well.

    Args:
        tokens: of one side, normalised, padding zero.
        others: of the other side, likewise.
        mask: True where a token counts.
        fraction: of the padded length, rounded down.

    Returns:
        The tokens of largest similarity with any of the batch, best first, and their mask.
    """
    score = torch.einsum("ind,jmd->ijnm", tokens.detach(), others.detach()).amax((1, 3))
    chosen = score.topk(int(fraction * tokens.shape[1]), dim=1).indices
    return tokens.take_along_dim(chosen.unsqueeze(2), 1), mask.take_along_dim(chosen, 1)


def xclip(
    image_tokens: Float[Tensor, "batch patches dim"],
    text_tokens: Float[Tensor, "batch words dim"],
    text_mask: Bool[Tensor, "batch words"],
    scale: Scale,
) -> Float[Tensor, ""]:
    """x-clip's: scores and masks are right, but both softmaxes run over images.

    Args:
        image_tokens: normalised, without the class token.
        text_tokens: likewise.
        text_mask: True where a word counts; at least one in every text.
        scale: the exponential of its temperature.
    """
    s = torch.einsum("jmd,ind->jimn", text_tokens, image_tokens)  # text, image, word, patch
    valid = text_mask[:, None]
    t2i = (s.amax(3) * valid).sum(2) / valid.sum(2)
    i2t = s.masked_fill(~valid.unsqueeze(3), -torch.inf).amax(2).mean(2)
    return _both(scale * i2t, scale * t2i)


def _largest(
    x: Float[Tensor, "batch length dim"], score: Float[Tensor, "batch length"], count: int
) -> Float[Tensor, "batch kept dim"]:
    chosen = score.topk(min(count, x.shape[1]), dim=1).indices
    return x.take_along_dim(chosen.unsqueeze(2), 1)


def _both(
    one: Float[Tensor, "batch batch"], other: Float[Tensor, "batch batch"], smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Mean of two cross-entropies along rows; a row's own column is right."""
    own = torch.arange(len(one), device=one.device)
    losses = (F.cross_entropy(z, own, label_smoothing=smoothing) for z in (one, other))
    return sum(losses, start=one.new_zeros(())) / 2
