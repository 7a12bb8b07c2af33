"""The symmetric contrastive loss on two matrices of scores, one for each direction.

Yao et al., "FILIP", ICLR 2022, equation 1; with several positives, its fine-tuning on captions.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def soft_targets(
    positives: Shaped[Tensor, "images texts"], dtype: torch.dtype = torch.float32
) -> tuple[Float[Tensor, "images texts"], Float[Tensor, "images texts"]]:
    """Target distributions of both directions: 1/#positives on each positive.

    Args:
        positives: 0/1 (or boolean), 1 where a text describes an image.
        dtype: of the targets.

    Returns:
        Rows that sum to 1 (over texts, for image to text) and columns that sum to 1 (over images,
        for text to image).

    Raises:
        ValueError: an image or a text without a positive, which is named.
    """
    hits = (positives != 0).to(dtype)
    for side, dim in (("image", 1), ("text", 0)):
        lonely = (hits.sum(dim) == 0).nonzero().flatten().tolist()
        if lonely:
            raise ValueError(f"no positive for {side} {', '.join(map(str, lonely[:5]))}")
    return hits / hits.sum(1, keepdim=True), hits / hits.sum(0, keepdim=True)


def info_nce(
    s_i2t: Float[Tensor, "images texts"],
    s_t2i: Float[Tensor, "images_t texts_t"],
    scale: Float[Tensor, ""] | float,
    targets: Shaped[Tensor, "images_y texts_y"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    r"""Find each image's text among all texts, and each text's image among all images.

    .. math::
        L = -\frac{1}{2B} \sum_k \log \frac{e^{s^I_{kk}/\tau}}{\sum_j e^{s^I_{kj}/\tau}}
            -\frac{1}{2B} \sum_k \log \frac{e^{s^T_{kk}/\tau}}{\sum_j e^{s^T_{jk}/\tau}}

    Both matrices are (images, texts): image to text is a softmax along the rows of s_i2t, text to
    image one along the columns of s_t2i. A batch of 1 has a loss of 0.

    Args:
        s_i2t: scores of image to text.
        s_t2i: scores of text to image.
        scale: 1/tau, more than 0.
        targets: 0/1 (or boolean), 1 where a text describes an image (see `soft_targets`); if left
            out, text k belongs to image k.
        label_smoothing: a share of the target that is spread over the whole row or column.

    Raises:
        ValueError: shapes that differ, other than as many texts as images without targets, an image
            or a text without a positive, a smoothing that is not in 0..1.
    """
    shape = tuple(s_i2t.shape)
    if s_t2i.shape != s_i2t.shape:
        raise ValueError(f"s_i2t has shape {shape}, s_t2i {tuple(s_t2i.shape)}")
    if targets is None and shape[0] != shape[1]:
        raise ValueError(f"{shape[0]} images and {shape[1]} texts are no pairs: give targets")
    if targets is not None and tuple(targets.shape) != shape:
        raise ValueError(f"targets have shape {tuple(targets.shape)}, the scores {shape}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in 0..1, got {label_smoothing}")
    dtype = torch.promote_types(s_i2t.dtype, torch.float32)
    soft = (None, None) if targets is None else soft_targets(targets, dtype)
    i2t = _cross_entropy(s_i2t.to(dtype) * scale, soft[0], 1, label_smoothing)
    return (i2t + _cross_entropy(s_t2i.to(dtype) * scale, soft[1], 0, label_smoothing)) / 2


def _cross_entropy(
    logits: Float[Tensor, "images texts"],
    target: Float[Tensor, "images texts"] | None,
    dim: int,
    smoothing: float,
) -> Float[Tensor, ""]:
    log_p = logits.log_softmax(dim)
    right = log_p.diagonal() if target is None else (log_p * target).sum(dim)
    if not smoothing:
        return -right.mean()
    return -(1 - smoothing) * right.mean() - smoothing * log_p.mean()
