"""The theorem of over-smoothing as executable code: the bound v, its proof's parts, its check.

A block multiplies d_M, the distance to the matrices of identical rows, by at most v. The inequality
always holds; v is below 1, so that it promises contraction, for almost no realistic block, and for
a pre-norm block never. `log_decomposition` says exactly, and for every block, which part smooths.

>>> norms = block_norms(weights)
>>> v_b = v_tight(norms, lam_bh, min_sigma(sigma1_bn, mask_bn), min_sigma(sigma2_bn, mask_bn))
"""

from bert_oversmoothing.theorem.activations import lipschitz
from bert_oversmoothing.theorem.blocks import (
    BlockDesign,
    BlockTrace,
    RandomBlock,
    random_block,
    random_tokens,
)
from bert_oversmoothing.theorem.bounds import (
    BlockNorms,
    BlockWeights,
    Order,
    attention_bound,
    block_norms,
    min_sigma,
    v_paper,
    v_tight,
    vo_norms,
)
from bert_oversmoothing.theorem.check import Summary, Trial, check_block, check_theorem, summarise
from bert_oversmoothing.theorem.decomposition import TERMS, log_decomposition

__all__ = [
    "TERMS",
    "BlockDesign",
    "BlockNorms",
    "BlockTrace",
    "BlockWeights",
    "Order",
    "RandomBlock",
    "Summary",
    "Trial",
    "attention_bound",
    "block_norms",
    "check_block",
    "check_theorem",
    "lipschitz",
    "log_decomposition",
    "min_sigma",
    "random_block",
    "random_tokens",
    "summarise",
    "v_paper",
    "v_tight",
    "vo_norms",
]
