"""Words hidden from a model that is to find them (BERT, section 3.1)."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from tenfold.data import Draw
from tenfold.errors import UserError
from tenfold.training import mix

IGNORED = -100
"""Label of a token that is not to be found."""

MASKED, REPLACED = 0.8, 0.1
"""Of the chosen tokens, those that become the mask token and those that become a random one."""


class Masking:
    """Chooses 15 % of a text's tokens; which ones is a function of (seed, epoch, index).

    Special tokens are never chosen, and of other tokens at least one.

    Args:
        tokenizer: with a mask token.
        seed: see above.
        share: of the tokens that are chosen.

    Raises:
        UserError: a tokenizer without a mask token, or a share that is none.
    """

    def __init__(self, tokenizer: Any, seed: int = 0, share: float = 0.15) -> None:
        if tokenizer.mask_token_id is None:
            raise UserError("this tokenizer has no mask token, which hidden words need")
        if not 0 < share <= 1:
            raise UserError(f"the share of hidden words is above 0 and up to 1, not {share}")
        self.seed, self.share, self.mask = seed, share, tokenizer.mask_token_id
        special = set(tokenizer.all_special_ids)
        known = [number for number in range(len(tokenizer)) if number not in special]
        self.words = np.array(known)
        """Ids that a random token may have."""

    def __call__(self, item: dict[str, Any], draw: Draw) -> dict[str, Any]:
        """The item with hidden words and `labels`, in the place of `special_tokens_mask`.

        Args:
            item: with lists of `input_ids` and `special_tokens_mask`.
            draw: key of the item.
        """
        special = np.array(item["special_tokens_mask"], bool)
        places = np.flatnonzero(~special)
        count = min(len(places), max(1, round(self.share * len(places))))
        order, fate, word = _uniform(mix(self.seed, draw.epoch, draw.index), len(places))
        chosen = places[order.argsort()[:count]]
        ids = np.array(item["input_ids"])
        labels = np.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        other = self.words[(word[:count] * len(self.words)).astype(np.int64)]
        kept = np.where(fate[:count] < MASKED + REPLACED, other, ids[chosen])
        ids[chosen] = np.where(fate[:count] < MASKED, self.mask, kept)
        masked = {name: value for name, value in item.items() if name != "special_tokens_mask"}
        return masked | {"input_ids": ids.tolist(), "labels": labels.tolist()}


def _uniform(seed: int, count: int) -> Float[ndarray, "3 n"]:
    """Numbers in [0, 1), made from the bits of a generator whose key is the seed."""
    bits = np.random.Philox(key=seed).random_raw(3 * count)
    return (bits >> np.uint64(11)).reshape(3, count) * 2.0**-53
