"""Hold the theorem against random blocks: the measured ratio of d_M, and both its bounds.

Letters in shapes: B texts, n tokens, d width, h heads.
"""

import itertools
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from bert_oversmoothing.diagnostics.graph import lambda_max
from bert_oversmoothing.diagnostics.measures import rank_one_distance
from bert_oversmoothing.theorem.blocks import (
    BlockDesign,
    BlockTrace,
    RandomBlock,
    random_block,
    random_tokens,
)
from bert_oversmoothing.theorem.bounds import (
    Order,
    attention_bound,
    block_norms,
    min_sigma,
    v_paper,
    v_tight,
)

STDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Standard deviations of the weights, from a block that does nothing to one that is chaotic."""

ROUNDING = 1e-9
"""A ratio above v by less than this share of it is equal to it: float64 blocks round by less."""


@dataclass(frozen=True)
class Trial:
    """One random block on one text.

    Attributes:
        design: how the block was drawn.
        ratio: d_M(block(H)) / d_M(H), measured.
        v_tight: the bound on it.
        v_paper: the paper's form of the bound.
        sigma1: smallest σ at the first norm.
        sigma2: smallest σ at the second norm.
        attention_gain: d_M after attention and its residual, over d_M(H).
        attention_bound: the bound on that.
    """

    design: BlockDesign
    ratio: float
    v_tight: float
    v_paper: float
    sigma1: float
    sigma2: float
    attention_gain: float
    attention_bound: float

    @property
    def violation(self) -> bool:
        """True where the block breaks the theorem, by more than rounding."""
        return self.ratio > self.v_tight * (1 + ROUNDING)

    @property
    def vacuous(self) -> bool:
        """True where the bound is no less than 1, and so promises no contraction."""
        return self.v_tight >= 1


@dataclass(frozen=True)
class Summary:
    """Medians over the trials of one order and one standard deviation of the weights.

    Attributes:
        order: "post" or "pre".
        std: of the weights.
        trials: how many there were.
        ratio: median measured ratio.
        v_tight: median bound.
        v_paper: median of the paper's form.
        sigma1: median of the smallest σ at the first norm.
        sigma2: median of the smallest σ at the second norm.
        attention_gain: median gain of attention.
        attention_bound: median bound on it.
        contracting: share of the trials with v_tight < 1.
        violations: how many broke the theorem; any but 0 is an error in this program.
    """

    order: Order
    std: float
    trials: int
    ratio: float
    v_tight: float
    v_paper: float
    sigma1: float
    sigma2: float
    attention_gain: float
    attention_bound: float
    contracting: float
    violations: int


def check_theorem(
    trials: int,
    *,
    seed: int = 0,
    orders: Sequence[Order] = ("post", "pre"),
    stds: Sequence[float] = STDS,
) -> list[Trial]:
    """Try random blocks with ReLU and GELU, soft and peaky attention, on 8, 16 or 64 tokens.

    Orders and standard deviations take turns, so that each gets its share of the trials; the rest
    is drawn. The same seed gives the same trials.

    Raises:
        ValueError: fewer than 1 trial.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, not {trials}")
    choose = random.Random(seed).choice
    generator = torch.Generator().manual_seed(seed)
    turns = itertools.islice(itertools.cycle(itertools.product(stds, orders)), trials)
    designs = [
        BlockDesign(
            tokens=choose((8, 16, 64)),
            width=choose((32, 48, 64)),
            heads=choose((2, 4)),
            order=order,
            activation=choose(("relu", "gelu")),
            std=std,
            sharpness=choose((1.0, 4.0)),
        )
        for std, order in turns
    ]
    return [check_block(generator, design) for design in designs]


def check_block(generator: torch.Generator, design: BlockDesign) -> Trial:
    """Draw a block and a text of its design, and measure what it does to d_M."""
    block = random_block(generator, design)
    hidden_bnd = random_tokens(generator, 1, design.tokens, design.width)
    mask_bn = torch.ones(1, design.tokens, dtype=torch.bool)
    return _measured(design, block, block.forward(hidden_bnd, mask_bn), mask_bn)


def summarise(trials: Iterable[Trial]) -> list[Summary]:
    """Medians by order and standard deviation of the weights, in that order."""
    groups: dict[tuple[Order, float], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.design.order, trial.design.std), []).append(trial)
    return [_medians(order, std, group) for (order, std), group in sorted(groups.items())]


def _medians(order: Order, std: float, group: Sequence[Trial]) -> Summary:
    return Summary(
        order=order,
        std=std,
        trials=len(group),
        ratio=statistics.median(t.ratio for t in group),
        v_tight=statistics.median(t.v_tight for t in group),
        v_paper=statistics.median(t.v_paper for t in group),
        sigma1=statistics.median(t.sigma1 for t in group),
        sigma2=statistics.median(t.sigma2 for t in group),
        attention_gain=statistics.median(t.attention_gain for t in group),
        attention_bound=statistics.median(t.attention_bound for t in group),
        contracting=statistics.fmean(not t.vacuous for t in group),
        violations=sum(t.violation for t in group),
    )


def _measured(
    design: BlockDesign, block: RandomBlock, trace: BlockTrace, mask_bn: Bool[Tensor, "B n"]
) -> Trial:
    norms = block_norms(block.weights)
    lam_bh = lambda_max(trace.attention_bhnn, mask_bn).lam_upper
    sigma1_b, sigma2_b = (min_sigma(s, mask_bn) for s in (trace.sigma1_bn, trace.sigma2_bn))
    tight_b = v_tight(norms, lam_bh, sigma1_b, sigma2_b)
    paper_b = v_paper(norms, lam_bh, sigma1_b, sigma2_b)
    if tight_b is None or paper_b is None:
        raise ValueError(f"{design.activation} has no Lipschitz constant, hence no bound")
    before_b, attended_b, *_, after_b = (rank_one_distance(s, mask_bn) for s in trace.states)
    return Trial(
        design=design,
        ratio=float(after_b / before_b),
        v_tight=float(tight_b),
        v_paper=float(paper_b),
        sigma1=float(sigma1_b),
        sigma2=float(sigma2_b),
        attention_gain=float(attended_b / before_b),
        attention_bound=float(attention_bound(norms, lam_bh, sigma1_b)),
    )
