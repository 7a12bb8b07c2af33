"""Contrastive objectives on tokens: late interaction, token selection, InfoNCE.

>>> from tenfold.contrastive import info_nce, late_interaction
>>> s_i2t, s_t2i = late_interaction(image_tokens, text_tokens, text_mask=mask)
>>> info_nce(s_i2t, s_t2i, scale=1 / 0.07).backward()
"""

from tenfold.contrastive.info_nce import info_nce, soft_targets
from tenfold.contrastive.late import Impl, Reduce, drop_small_gradients, late_interaction
from tenfold.contrastive.rowblock import rowblock_info_nce
from tenfold.contrastive.selection import SelectedTokens, kept_count, select_tokens, token_scores

__all__ = [
    "Impl",
    "Reduce",
    "SelectedTokens",
    "drop_small_gradients",
    "info_nce",
    "kept_count",
    "late_interaction",
    "rowblock_info_nce",
    "select_tokens",
    "soft_targets",
    "token_scores",
]
