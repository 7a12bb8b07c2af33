"""The theorem's bound beside what the blocks of a model really do.

Legend of the shape suffixes: b texts, h heads, k layers 0..L, l blocks 1..L.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import Metric

from bert_oversmoothing.families import BlockTensors, Encoder
from bert_oversmoothing.theorem import (
    BlockNorms,
    BlockWeights,
    block_norms,
    v_paper,
    v_tight,
    vo_norms,
)


def block_weights(encoder: Encoder, index: int) -> BlockWeights | None:
    """What the theorem reads of block `index` (from 0); None where it says nothing about it.

    `Encoder.unbounded` says why. Rows of `value` and columns of `output` go head by head.
    """
    if encoder.unbounded(index) or encoder.order is None or encoder.activation is None:
        return None
    tensors = encoder.tensors(index)
    if tensors.up_fd is None:
        return None
    value, output = _heads_in_line(tensors)
    norms = encoder.blocks[index].norms
    return BlockWeights(
        value=value,
        output=output,
        heads=tensors.value_hkd.shape[0],
        w1=tensors.up_fd,
        w2=tensors.down_df,
        gamma1=_gain(tensors.gamma1_d, encoder),
        gamma2=_gain(tensors.gamma2_d, encoder),
        activation=encoder.activation,
        order=encoder.order,
        scale1=tensors.scale1_d,
        scale2=tensors.scale2_d,
        eps=max((norm.eps for norm in norms if norm is not None), default=0.0),
    )


def model_norms(encoder: Encoder) -> list[BlockNorms | None]:
    """`block_norms` of every block, None where there is no bound; shared modules are read once."""
    found: dict[nn.Module, BlockNorms | None] = {}
    for index, block in enumerate(encoder.blocks):
        # A block that is called twice may have a bound in one place only: a convolution follows it.
        bounded = encoder.unbounded(index) is None
        if bounded and block.module not in found:
            weights = block_weights(encoder, index)
            norms = None if weights is None else block_norms(weights)
            known = norms is not None and norms.lipschitz is not None
            found[block.module] = norms if known else None
    return [
        None if encoder.unbounded(index) else found[block.module]
        for index, block in enumerate(encoder.blocks)
    ]


def head_norms(encoder: Encoder) -> list[Float[Tensor, " h"] | None]:
    """||W_k^V W_k^O||_2 of each head of every block, gated ones as well; None for strangers."""
    if encoder.layout is None:
        return [None] * len(encoder.blocks)
    found: dict[nn.Module, Tensor] = {}
    for index, block in enumerate(encoder.blocks):
        if block.module not in found:
            tensors = encoder.tensors(index)
            value, output = _heads_in_line(tensors)
            found[block.module] = vo_norms(value, output, tensors.value_hkd.shape[0])
    return [found[block.module] for block in encoder.blocks]


def _heads_in_line(tensors: BlockTensors) -> tuple[Tensor, Tensor]:
    return tensors.value_hkd.flatten(0, 1), tensors.output_hdk.transpose(0, 1).flatten(1)


def _gain(gamma_d: Tensor | None, encoder: Encoder) -> Tensor:
    return torch.ones(encoder.width) if gamma_d is None else gamma_d


class BoundSummary(NamedTuple):
    """Of `ContractionBound`, a value a block; NaN where there is none.

    Attributes:
        v_tight: median over texts.
        v_paper: median over texts.
        vacuous_share: share of the texts with v_tight of 1 or more.
        contraction: median over texts of the measured d_M(H_l) / d_M(H_{l-1}).
        tightness: the largest contraction over its own v_tight; above 1 the theorem would be wrong.
        texts: that have a bound.
    """

    v_tight: list[float]
    v_paper: list[float]
    vacuous_share: list[float]
    contraction: list[float]
    tightness: list[float]
    texts: list[int]


class ContractionBound(Metric):
    """How much each block may multiply d_M by, and how much it does.

    Three numbers a text and block are kept, as medians need them all: it is meant for a sample. A
    text whose d_M is 0 has no contraction, and does not count.

    Example:
        >>> bound = ContractionBound(model_norms(read_encoder(model)))
        >>> bound.update(distance_kb, lam_lbh, sigma1_lb, sigma2_lb)
        >>> bound.compute().v_tight

    Args:
        norms: of the blocks' weights, None for a block without a bound.
        **kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    values: list[Tensor]

    def __init__(self, norms: Sequence[BlockNorms | None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norms = [*norms]
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(
        self,
        distance_kb: Float[Tensor, "k b"],
        lam_lbh: Sequence[Float[Tensor, "b h"]],
        sigma1_lb: Sequence[Float[Tensor, " b"] | None],
        sigma2_lb: Sequence[Float[Tensor, " b"] | None],
    ) -> None:
        """Add a batch; all of it over the same real tokens.

        Args:
            distance_kb: d_M of H_0 to H_L.
            lam_lbh: lambda of each head of each block, never below the truth (`lam_upper`).
            sigma1_lb: smallest sigma that the first norm of each block meets; None if it has none.
            sigma2_lb: the same for the second norm.
        """
        distance_kb = distance_kb.to("cpu", torch.float64)
        nothing_b = torch.full_like(distance_kb[0], torch.nan)
        measured_lb = distance_kb[1:] / distance_kb[:-1]
        rows = []
        for index, norms in enumerate(self.norms):
            tight_b = paper_b = None
            sigma1_b, sigma2_b = sigma1_lb[index], sigma2_lb[index]
            if norms is not None and sigma1_b is not None and sigma2_b is not None:
                given = norms, lam_lbh[index], sigma1_b, sigma2_b
                tight_b, paper_b = v_tight(*given), v_paper(*given)
            bounds = [nothing_b if v is None else v for v in (tight_b, paper_b)]
            rows.append(torch.stack([*bounds, measured_lb[index]]))
        self.values.append(torch.stack(rows).permute(2, 0, 1))  # processes join along texts

    def per_text(self) -> Float[Tensor, "b l 3"]:
        """v_tight, v_paper and contraction of every text and block, NaN where there is none."""
        if not len(self.values):
            return torch.full((0, len(self.norms), 3), torch.nan, dtype=torch.float64)
        return torch.cat(self.values) if isinstance(self.values, list) else self.values

    def compute(self) -> BoundSummary:
        """Over all texts so far."""
        value_bl3 = self.per_text()
        value_bl3 = value_bl3.masked_fill(~value_bl3.isfinite(), torch.nan)
        tight_bl, paper_bl, measured_bl = value_bl3.unbind(2)
        has_bl = ~(tight_bl.isnan() | measured_bl.isnan())
        texts_l = has_bl.sum(0)
        vacuous_l = ((tight_bl >= 1) & has_bl).sum(0) / texts_l
        ratio_bl = torch.where(has_bl, measured_bl / tight_bl, -torch.inf)
        # a text more, that has no bound, for no text at all
        largest_l = torch.cat([ratio_bl, ratio_bl.new_full((1, len(texts_l)), -torch.inf)]).amax(0)
        return BoundSummary(
            v_tight=_medians(tight_bl),
            v_paper=_medians(paper_bl),
            vacuous_share=vacuous_l.tolist(),
            contraction=_medians(measured_bl),
            tightness=largest_l.masked_fill(texts_l == 0, torch.nan).tolist(),
            texts=texts_l.tolist(),
        )


def _medians(value_bl: Float[Tensor, "b l"]) -> list[float]:
    """Over the texts that have a value; the mean of the two middle ones, as everywhere."""
    if not len(value_bl):
        return [torch.nan] * value_bl.shape[1]
    return value_bl.nanquantile(0.5, dim=0).tolist()
