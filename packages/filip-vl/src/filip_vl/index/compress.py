"""Fewer and smaller tokens: which of an image's tokens an index keeps, and in how many bits."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float16, Int8, Int64
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from tenfold.contrastive import kept_count

_MOST = 127  # of int8; -128 is not used


def keep_tokens(
    tokens: Float[Tensor, "images tokens dim"], fraction: float
) -> tuple[Float[Tensor, "images kept dim"], Int64[Tensor, "images kept"]]:
    """Tokens of each image that stand for all of them, in their order.

    The first is the one farthest from the mean of the image's tokens, and each further one is the
    farthest from those that are kept already (farthest-point traversal; Gonzalez, 1985), so that
    what is left out has something like it among what is kept. The maximum over an image's tokens,
    which text to image (s^T) averages, can only fall, and by no more than the largest distance of a
    token from the nearest kept one.

    The paper chooses by similarity with the texts of a batch (section 3.3), which are not known
    when images are indexed: this rule is ours. The count is the paper's, the share rounded down, at
    least one.

    Args:
        tokens: normalised.
        fraction: share of them to keep, above 0 up to 1.

    Returns:
        The kept tokens, and the places where they were.

    Raises:
        ValueError: a share that is none.
    """
    images, length, _ = tokens.shape
    count = kept_count(fraction, length)
    if count == length:
        return tokens, torch.arange(length, device=tokens.device).expand(images, -1)
    mean = F.normalize(tokens.mean(1), dim=-1)
    nearest = (tokens @ mean[:, :, None])[..., 0]
    places = torch.empty(images, count, dtype=torch.long, device=tokens.device)
    row = torch.arange(images, device=tokens.device)
    for n in range(count):
        farthest = nearest.argmin(1)
        places[:, n] = farthest
        similarity = (tokens @ tokens[row, farthest, :, None])[..., 0]
        nearest = nearest.maximum(similarity) if n else similarity
        nearest[row[:, None], places[:, : n + 1]] = torch.inf
    places = places.sort(1).values
    return tokens.take_along_dim(places.unsqueeze(2), 1), places


def quantise(
    tokens: Float[ndarray, "tokens dim"],
) -> tuple[Int8[ndarray, "tokens dim"], Float16[ndarray, " tokens"]]:
    """Tokens as whole numbers from -127 to 127, with a scale for each.

    The error of an entry is at most half a step, the token's largest entry / 254, and a little more
    where the scale was rounded.

    Args:
        tokens: finite.
    """
    scales = (abs(tokens).max(1, initial=0) / _MOST).astype(np.float16)
    steps = np.where(scales > 0, scales, 1).astype(np.float32)[:, None]
    return np.rint(tokens / steps).clip(-_MOST, _MOST).astype(np.int8), scales
