"""One forward pass down to a few numbers a text, while the layers come out of the model.

The measures are those of `diagnostics`, arranged so that a pass costs a few per cent: one workspace
for all tensors, no copy of a layer, no wait for the device before the pass is over.

Legend of the shape suffixes: b texts, n tokens, d width, k layers 0..L, l blocks 1..L, s states.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bert_oversmoothing.diagnostics.measures import EPS, scale_statistics
from bert_oversmoothing.families import Encoder
from bert_oversmoothing.theorem import log_decomposition

NEARLY_EQUAL = 0.995
"""A mean of unit vectors as long as this is taken off them before anything is squared."""

SCALES = ("min", "p5", "median", "mean")
"""Of a text's standard deviations before a norm."""


class Raw(NamedTuple):
    """What is left of a forward pass, on the CPU; p are the states in and between the blocks.

    Attributes:
        tokens_b: tokens that count.
        distance_pb: d_M.
        constant_pb: norm of the row mean.
        largest_pb: largest distance of a token from the row mean.
        square_kb: squared d_M of the unit vectors where they are nearly equal, else NaN.
        unit_kdb: mean unit vector.
        zeros_kb: zero vectors.
        scale_4sb: statistics of sigma before the norms s.
    """

    tokens_b: Tensor
    distance_pb: Tensor
    constant_pb: Tensor
    largest_pb: Tensor
    square_kb: Tensor | None
    unit_kdb: Tensor | None
    zeros_kb: Tensor | None
    scale_4sb: Tensor | None


class Reduced(NamedTuple):
    """The measures of some texts in float64; NaN where a text has no such value.

    Attributes:
        tokens_b: tokens that count.
        distance_kb: d_M of every layer.
        by_layer: relative distance, high-frequency ratio and MAD of every layer.
        unit_sum_kbd: sum of the unit vectors of a text's tokens; None if not asked for.
        zeros_kb: zero vectors; None if not asked for.
        by_block: of every block: terms of ln c, its shares and standard deviations, each (l, b).
    """

    tokens_b: Int[Tensor, " b"]
    distance_kb: Float[Tensor, "k b"]
    by_layer: dict[str, Float[Tensor, "k b"]]
    unit_sum_kbd: Float[Tensor, "k b d"] | None
    zeros_kb: Int[Tensor, "k b"] | None
    by_block: dict[str, Float[Tensor, "l b"]]


class _Rows:
    """Tensors of one shape in a piece of memory that outlives the passes.

    Small tensors that are kept between the large ones of a forward pass scatter the heap: malloc
    would hand pages back and fetch them again all the time, at a fifth of the pass's cost.

    Args:
        most: how many there are at most.
    """

    def __init__(self, most: int) -> None:
        self.most, self.flat = most, torch.empty(0)

    def start(self, like: Tensor, *shape: int) -> None:
        """Forget all rows; the next ones have a shape, and the type and device of a tensor."""
        size = self.most * math.prod(shape)
        if self.flat.numel() < size or (self.flat.dtype, self.flat.device) != (
            like.dtype,
            like.device,
        ):
            self.flat = torch.empty(size, dtype=like.dtype, device=like.device)
        self.rows = self.flat[:size].view(self.most, *shape)
        self.place: dict[tuple, int] = {}
        self.used = 0

    def add(self, key: tuple) -> Tensor:
        """The next row, to be written into."""
        self.place[key] = self.used
        self.used += 1
        return self.rows[self.used - 1]

    def all(self) -> Tensor:
        """All rows so far."""
        return self.rows[: self.used]


class Reducer:
    """Consumer of `capture`; `start` before and `finish` after every forward pass.

    Args:
        encoder: what is captured.
        metrics: of "cos", "dm", "sigma" and "who", what is wanted beside d_M itself.
        prefix: so many first tokens of every text do not count.
    """

    def __init__(self, encoder: Encoder, metrics: Collection[str], prefix: int = 0) -> None:
        self.encoder, self.prefix = encoder, prefix
        self.cos = "cos" in metrics or "dm" in metrics
        self.sigma = "sigma" in metrics
        self.who = "who" in metrics and encoder.order is not None
        blocks = len(encoder.blocks)
        states = blocks + 1 + (3 * blocks + 1 if self.who else 0)
        # ||h_i - row mean|| and the row mean: of states by (layer,), else by (layer, place, side)
        self.spreads, self.means = _Rows(states), _Rows(states)
        self.norms, self.units, self.unit_spreads = (_Rows(blocks + 1) for _ in range(3))
        # norm and sum of every token before a norm
        self.raw_norms, self.raw_sums = _Rows(2 * blocks), _Rows(2 * blocks)
        self.work = _Rows(1)
        self.norm_facts: list[Tensor] | None = None

    @property
    def norms_wanted(self) -> bool:
        """Whether `norm` has anything to do."""
        return self.sigma or self.who

    def start(self, mask_bn: Bool[Tensor, "b n"] | None) -> None:
        """Forget the last pass.

        Args:
            mask_bn: the tokens that count, anywhere; None for all but the prefix.
        """
        self.mask_bn, self.weight_b1n = mask_bn, None

    def state(self, layer: int, hidden_bnd: Float[Tensor, "b n d"]) -> None:
        """A hidden state."""
        x_bnd = self._ready(hidden_bnd)
        self._centre((layer,), x_bnd)
        if not self.cos:
            return
        norm_bn = torch.linalg.vector_norm(x_bnd, dim=2, out=self.norms.add((layer,)))
        divisor_bn = norm_bn.clamp(min=EPS)
        weight_b1n = self.weight_b1n / divisor_bn[:, None]
        mean_b1d = torch.bmm(weight_b1n, x_bnd, out=self.units.add((layer,)))
        # Where the mean is nearly as long as the units, 1 - ||mean||^2 has lost its digits.
        if torch.linalg.vector_norm(mean_b1d, dim=2).amax() > NEARLY_EQUAL:
            work_bnd = torch.div(x_bnd, divisor_bn[..., None], out=self.work.rows[0])
            work_bnd -= mean_b1d
            torch.linalg.vector_norm(work_bnd, dim=2, out=self.unit_spreads.add((layer,)))

    def norm(self, layer: int, place: int, input_bnd: Tensor, output_bnd: Tensor) -> None:
        """What a norm is given, and what it gives."""
        order, norms = self.encoder.order, self.encoder.blocks[layer - 1].norms
        if place == len(norms):  # the final one
            if self.who:
                self._centre((layer, place, "after"), self._ready(output_bnd))
            return
        if place > 1:
            return
        x_bnd = self._ready(input_bnd)
        if self.sigma and norms[place] is not None:
            torch.linalg.vector_norm(x_bnd, dim=2, out=self.raw_norms.add((layer, place)))
            torch.sum(x_bnd, 2, out=self.raw_sums.add((layer, place)))
        if not self.who:
            return
        if order == "pre" and place == 0:  # the state that has just come
            self.spreads.place[layer, place, "before"] = self.spreads.place[layer - 1,]
        else:
            self._centre((layer, place, "before"), x_bnd)
        # What the last norm of a post-norm block gives is the next state, and comes by itself.
        if order == "post" and place == 0:
            self._centre((layer, place, "after"), self._ready(output_bnd))

    def finish(self) -> Raw:
        """The pass is over."""
        assert self.mask_bn is not None
        tokens_b = self.mask_bn.sum(1)
        spread_pbn = self.spreads.all() * self.real_bn
        return Raw(
            tokens_b.cpu(),
            torch.linalg.vector_norm(spread_pbn, dim=2).cpu(),
            torch.linalg.vector_norm(self.means.all(), dim=(2, 3)).cpu(),
            spread_pbn.amax(2).cpu(),
            *self._cosines(tokens_b),
            self._scales() if self.raw_norms.place else None,
        )

    def finite(self, raw: Raw) -> Bool[Tensor, "k b"]:
        """Which layers of which texts hold finite numbers alone."""
        return raw.distance_pb[self._layers()].isfinite()

    def derive(self, raws: Sequence[Raw]) -> Reduced:
        """The measures of the texts of one or more passes."""
        parts = [None if x[0] is None else torch.cat(x, -1) for x in zip(*raws, strict=True)]
        tokens_b, distance_pb, constant_pb, largest_pb, square_kb, unit_kdb, zeros_kb, scales = (
            parts
        )
        assert tokens_b is not None
        assert distance_pb is not None
        assert constant_pb is not None
        assert largest_pb is not None
        n_b, eps = tokens_b.double(), torch.finfo(distance_pb.dtype).eps
        distance_pb, constant_pb = distance_pb.double(), constant_pb.double() * n_b.sqrt()
        norm_pb = torch.hypot(distance_pb, constant_pb)
        # The mean of equal rows is rounded to their size, and that is no distance.
        distance_pb = torch.where(distance_pb > 2 * eps * norm_pb, distance_pb, 0)
        layers = self._layers()
        distance_kb, norm_kb, constant_kb = (x[layers] for x in (distance_pb, norm_pb, constant_pb))
        by_layer, unit_sum_kbd = {}, None
        if square_kb is not None and unit_kdb is not None and zeros_kb is not None:
            # The same of rows whose mean is zero.
            constant_kb = constant_kb.masked_fill(constant_kb <= 2 * eps * n_b.sqrt() * norm_kb, 0)
            unit_sum_kbd = unit_kdb.mT.double() * n_b[:, None]
            # sum_i ||u_i - mean||^2, where ||u_i|| is 1, or 0
            from_mean_kb = n_b - zeros_kb - unit_sum_kbd.square().sum(2) / n_b
            square_kb = torch.where(square_kb.isnan(), from_mean_kb, square_kb)
            by_layer = {
                "relative_distance": distance_kb / norm_kb,
                "high_frequency": distance_kb / constant_kb,
                # A zero vector is at a distance of 1 from all others, which its row does not show.
                "mad": square_kb / (n_b - 1) + zeros_kb / n_b,
            }
        by_block = {"contraction": distance_kb[1:] / distance_kb[:-1]}
        if self.who:
            by_block |= self._who(distance_pb, (largest_pb.double() / distance_pb).square())
        if scales is not None:
            by_block |= self._by_place(scales.double())
        return Reduced(tokens_b, distance_kb, by_layer, unit_sum_kbd, zeros_kb, by_block)

    def _layers(self) -> list[int]:
        """Where the layers are among the states."""
        return [self.spreads.place[layer,] for layer in range(len(self.encoder.blocks) + 1)]

    def _ready(self, x_bnd: Tensor) -> Tensor:
        """In float32 or better; the first tensor of a pass makes what all others need."""
        x_bnd = x_bnd.to(torch.promote_types(x_bnd.dtype, torch.float32))
        if self.weight_b1n is None:
            self._prepare(x_bnd)
        return x_bnd

    def _prepare(self, x_bnd: Tensor) -> None:
        b, n, d = x_bnd.shape
        if self.mask_bn is None:
            self.mask_bn = torch.ones(b, n, dtype=torch.bool)
            self.mask_bn[:, : self.prefix] = False
        self.mask_bn = self.mask_bn.to(x_bnd.device)
        self.real_bn = self.mask_bn.to(x_bnd)
        self.weight_b1n = (self.real_bn / self.real_bn.sum(1, keepdim=True))[:, None]
        self.work.start(x_bnd, b, n, d)
        for rows in (self.spreads, self.norms, self.unit_spreads, self.raw_norms, self.raw_sums):
            rows.start(x_bnd, b, n)
        for rows in (self.means, self.units):
            rows.start(x_bnd, b, 1, d)

    def _centre(self, key: tuple, x_bnd: Tensor) -> None:
        """Keep ||h_i - row mean|| of every token, and the row mean."""
        assert self.weight_b1n is not None
        mean_b1d = torch.bmm(self.weight_b1n, x_bnd, out=self.means.add(key))
        work_bnd = torch.sub(x_bnd, mean_b1d, out=self.work.rows[0])
        torch.linalg.vector_norm(work_bnd, dim=2, out=self.spreads.add(key))

    def _cosines(self, tokens_b: Tensor) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
        """Of the unit vectors: squared d_M where it was measured, mean; number of zero vectors."""
        if not self.cos:
            return None, None, None
        assert self.mask_bn is not None
        zeros_kb = ((self.norms.all() < EPS) & self.mask_bn).sum(2)
        square_kb = self.norms.rows.new_full(zeros_kb.shape, torch.nan)
        for (layer,), place in self.unit_spreads.place.items():
            square_kb[layer] = (self.unit_spreads.rows[place] * self.real_bn).square().sum(1)
        # A copy, for the next pass writes over it; texts last, as everywhere.
        unit_kdb = self.units.all()[:, :, 0].mT.clone()
        return square_kb.cpu(), unit_kdb.cpu(), zeros_kb.cpu()

    def _who(self, distance_pb: Tensor, share_pb: Tensor) -> dict[str, Tensor]:
        """Terms of ln c, and the largest share that a token has of d_M^2 before a norm."""
        places, depth = self.spreads.place, len(self.encoder.blocks)
        # One more state that is NaN, for norms that are not there.
        distance_pb = torch.cat([distance_pb, torch.full_like(distance_pb[:1], torch.nan)])
        share_pb = torch.cat([share_pb, torch.zeros_like(share_pb[:1])])
        blocks = range(1, depth + 1)

        def of(place: int, side: str) -> list[int]:
            return [places.get((layer, place, side), -1) for layer in blocks]

        before, after = ([places[layer + shift,] for layer in blocks] for shift in (-1, 0))
        states, names = [before, of(1, "before"), after], ["attention", "feed_forward"]
        if self.encoder.order == "post":
            states = [before, of(0, "before"), of(0, "after"), of(1, "before"), after]
            names = ["attention", "norm1", "feed_forward", "norm2"]
        logs_sb = log_decomposition(
            distance_pb[torch.tensor(states).flatten()]
            .unflatten(0, (len(states), depth))
            .flatten(1)
        )
        terms = logs_sb.unflatten(1, (depth, -1))
        found = {f"log_{name}": term_lb for name, term_lb in zip(names, terms, strict=True)}
        found["log_contraction"] = terms.sum(0)
        final = places.get((depth, len(self.encoder.blocks[-1].norms), "after"))
        if final is not None:
            last_b = log_decomposition(distance_pb[[after[-1], final]])
            nothing_lb = torch.full_like(terms[0], torch.nan)
            found["log_final_norm"] = torch.cat([nothing_lb[1:], last_b])
        shares_lb = torch.maximum(share_pb[of(0, "before")], share_pb[of(1, "before")])
        return found | {"top_token_share": shares_lb}

    def _scales(self) -> Tensor:
        """Minimum, 5 %, median and mean of sigma, (4, norms, b)."""
        assert self.mask_bn is not None
        norm_sbn, sum_sbn = self.raw_norms.all(), self.raw_sums.all()
        if self.norm_facts is None:
            blocks = self.encoder.blocks
            norms = [blocks[layer - 1].norms[place] for layer, place in self.raw_norms.place]
            facts = zip(*[(norm.eps, norm.centred) for norm in norms if norm], strict=True)
            self.norm_facts = [norm_sbn.new_tensor(values)[:, None, None] for values in facts]
        eps, centred = self.norm_facts
        # var = mean square - square of the mean loses no digits that matter: features are spread
        # around 0 much more than their mean is away from it.
        width = self.encoder.width
        variance_sbn = norm_sbn.square() / width - centred * (sum_sbn / width).square()
        sigma_sbn = (variance_sbn.clamp(min=0) + eps).sqrt()
        mask_sbn = self.mask_bn.expand_as(sigma_sbn)
        values = scale_statistics(sigma_sbn.flatten(0, 1), mask_sbn.flatten(0, 1))
        return torch.stack(values).unflatten(1, sigma_sbn.shape[:2]).cpu()

    def _by_place(self, scale_4sb: Tensor) -> dict[str, Tensor]:
        """Statistics of sigma at both places of every block, and products of two of them."""
        rows, found = self.raw_norms.place, {}
        scale_4sb = torch.cat([scale_4sb, torch.full_like(scale_4sb[:, :1], torch.nan)], 1)
        blocks = range(1, len(self.encoder.blocks) + 1)
        for place in (0, 1):
            of_place = [rows.get((layer, place), -1) for layer in blocks]
            for name, value_sb in zip(SCALES, scale_4sb, strict=True):
                found[f"sigma{place + 1}_{name}"] = value_sb[of_place]
        for name in ("min", "median"):
            found[f"sigma_product_{name}"] = found[f"sigma1_{name}"] * found[f"sigma2_{name}"]
        return found
