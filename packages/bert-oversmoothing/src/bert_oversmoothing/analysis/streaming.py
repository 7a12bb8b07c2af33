"""Every text once through the model, with nothing kept but sums.

Legend of the shape suffixes: b texts, d width, k layers 0..L, l blocks 1..L.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from bert_oversmoothing.analysis.corpus import Batch, Corpus
from bert_oversmoothing.analysis.reduce import Raw, Reduced, Reducer
from bert_oversmoothing.capture import capture
from bert_oversmoothing.diagnostics.metrics import PerText, Spread, TokenCosine
from bert_oversmoothing.families import Encoder
from bert_oversmoothing.fusion import LayerFusion
from bert_oversmoothing.report.tables import SPREAD_ENDS, Row
from tenfold.errors import UserError
from tenfold.progress import track

_TOGETHER = 16  # batches that are added up at a time: small sums cost as much as large ones

_DISTANCES = ("distance", "relative_distance", "high_frequency", "mad")


def run_batch(model: nn.Module, batch: Batch) -> None:
    """One forward pass on the model's device, for its hooks alone."""
    parameter = next(model.parameters())
    model(
        **{
            key: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for key, value in batch.inputs.items()
        }
    )


class _Spreads(PerText):
    """Measures of many layers as one metric."""

    update, compute = PerText.count, PerText.spreads


class Sums:
    """Sums over texts of what `Reducer` found, by name and layer or block."""

    def __init__(self) -> None:
        self.spreads: _Spreads | None = None
        self.places: list[tuple[str, int]] = []
        self.units: Tensor | float = 0.0
        self.unit_squares: Tensor | float = 0.0
        self.texts = self.tokens = self.own_pairs = self.zero_tokens = 0

    def add(self, found: Reduced) -> None:
        """Count the texts of a batch."""
        n_b = found.tokens_b
        self.texts += len(n_b)
        self.tokens += int(n_b.sum())
        self.own_pairs += int(n_b.square().sum())
        if found.zeros_kb is not None:
            self.zero_tokens += int(found.zeros_kb.sum())
        by_layer = {"distance": found.distance_kb} | found.by_layer if found.by_layer else {}
        measured = by_layer | found.by_block
        names = sorted(measured, key=lambda name: name.startswith("log_"))  # logarithms last
        if self.spreads is None:
            self.places = [
                (name, row + (name in found.by_block))  # a block stands in the row behind it
                for name in names
                for row in range(len(measured[name]))
            ]
            logarithms = sum(name.startswith("log_") for name, _ in self.places)
            self.spreads = _Spreads(len(self.places), logarithms)
        # They have two tokens or more, all of them.
        two_b2 = torch.ones(len(n_b), 2, dtype=torch.bool)
        self.spreads.count(torch.cat([measured[name] for name in names]), two_b2)
        if found.unit_sum_kbd is not None:
            self.units = self.units + found.unit_sum_kbd.sum(1)
            self.unit_squares = self.unit_squares + found.unit_sum_kbd.square().sum((1, 2))

    def rows(self, layers: int, metrics: Collection[str]) -> list[Row]:
        """The columns of layers.csv that come from all texts."""
        rows: list[Row] = [{"layer": layer, "texts": self.texts} for layer in range(layers)]
        spreads = self.spreads.spreads() if self.spreads else []
        for (name, layer), spread in zip(self.places, spreads, strict=True):
            row = rows[layer]
            if name == "mad" and "cos" in metrics:
                row |= _spread("cosine", spread.one_minus())
            if name in _DISTANCES and "dm" not in metrics:
                continue
            row |= _spread(name, spread)
            if name == "high_frequency":
                row["high_frequency_left_out"] = spread.left_out
            elif name in ("sigma1_min", "sigma2_min") and spread.texts:
                row[name.replace("min", "lowest")] = spread.minimum
            elif name in ("contraction", "log_contraction"):  # logarithms come last, and stay
                row["left_out"] = spread.left_out
        if "cos" in metrics:
            self._between(rows)
        return rows

    def _between(self, rows: list[Row]) -> None:
        """As `BetweenTextCosine`, of all layers at once."""
        assert isinstance(self.units, Tensor)
        pairs = self.tokens**2 - self.own_pairs
        between = (self.units.square().sum(1) - self.unit_squares).tolist()
        for row, value in zip(rows, between, strict=True):
            within = row["cosine"]
            if pairs and isinstance(within, float):
                row["cosine_between"] = value / pairs
                row["cosine_excess"] = within - value / pairs


def _spread(name: str, spread: Spread) -> Row:
    ends = zip(SPREAD_ENDS, (spread.mean, spread.std, spread.low, spread.high), strict=True)
    return {f"{name}{end}": value if spread.texts else None for end, value in ends}


class Fusing:
    """The fused state of a fusion model, which is no layer: its cosine, and its weights.

    Args:
        fusion: what fuses.
        layers: which layers it reads.
    """

    def __init__(self, fusion: LayerFusion, layers: Collection[int]) -> None:
        self.fusion, self.layers = fusion, {*layers}
        self.cosine = TokenCosine()

    def start(self) -> None:
        """Before a forward pass."""
        self.stream = self.fusion.stream()

    def state(self, layer: int, hidden_bnd: Tensor) -> None:
        """A hidden state."""
        if layer in self.layers:
            self.stream.add(hidden_bnd)

    def finish(self, mask_bn: Tensor) -> None:
        """The pass is over, and was finite: count its texts.

        Args:
            mask_bn: the tokens that count.
        """
        self.cosine.update(self.stream.result(mask_bn).hidden, mask_bn)

    def weights(self, mask_bn: Tensor | None) -> Tensor | None:
        """The weights (texts, tokens, layers) of a gate, after a pass whose texts do not count."""
        weights = self.stream.result(mask_bn).weights
        return weights if weights is not None and weights.ndim == 3 else None


@torch.no_grad()  # not inference_mode: BEiT keeps tensors, which a later training could not use
def stream(
    encoder: Encoder,
    corpus: Corpus,
    metrics: Collection[str],
    *,
    batch_size: int,
    on_nan: Literal["raise", "skip"],
    fusing: Fusing | None = None,
    progress: bool = False,
) -> Sums:
    """All usable texts of a corpus; those with a NaN are counted there, and no longer usable.

    Raises:
        UserError: a text gives NaN or infinity and that is an error; it names layer and text.
    """
    run = _Pass(encoder, Reducer(encoder, metrics, corpus.prefix), fusing)
    batches = corpus.batches(corpus.usable, batch_size)
    if progress:
        batches = track(batches, -(-len(corpus.usable) // batch_size), "texts, batch")
    with run.capturing():
        for batch in batches:
            if run.count(batch).all():
                continue
            # One by one, also without padding whose garbage might be what is not finite.
            for alone in corpus.batches(batch.rows, 1):
                finite_k1 = run.count(alone)
                if not finite_k1.all():
                    _refuse(corpus, alone.rows[0], finite_k1, on_nan)
    run.flush()
    bad = {*corpus.counts.nan}
    corpus.usable = [row for row in corpus.usable if row not in bad]
    return run.sums


class _Pass:
    """Forward passes, reduced."""

    def __init__(self, encoder: Encoder, reducer: Reducer, fusing: Fusing | None) -> None:
        self.encoder, self.reducer, self.fusing = encoder, reducer, fusing
        self.sums, self.raws = Sums(), list[Raw]()

    def capturing(self) -> AbstractContextManager[None]:
        norms = self.reducer.norm if self.reducer.norms_wanted else None
        return capture(self.encoder, self._state, norms=norms)

    def _state(self, layer: int, hidden_bnd: Tensor) -> None:
        self.reducer.state(layer, hidden_bnd)
        if self.fusing is not None:
            self.fusing.state(layer, hidden_bnd)

    def count(self, batch: Batch) -> Tensor:
        """Run a batch, and count it if all of it is finite; returns which layers and texts are."""
        reducer = self.reducer
        reducer.start(batch.counted_bn)
        if self.fusing is not None:
            self.fusing.start()
        run_batch(self.encoder.model, batch)
        raw = reducer.finish()
        finite_kb = reducer.finite(raw)
        if finite_kb.all():
            if self.fusing is not None:
                assert reducer.mask_bn is not None
                self.fusing.finish(reducer.mask_bn)
            self.raws.append(raw)
            if len(self.raws) == _TOGETHER:
                self.flush()
        return finite_kb

    def flush(self) -> None:
        """Add up what has been counted."""
        if self.raws:
            self.sums.add(self.reducer.derive(self.raws))
            self.raws.clear()


def _refuse(corpus: Corpus, row: int, finite_k1: Tensor, on_nan: str) -> None:
    if on_nan == "raise":
        raise UserError(
            f"layer {int((~finite_k1[:, 0]).int().argmax())} holds NaN or infinity",
            where=corpus.name(row),
            fix="--on-nan skip leaves such texts out",
        )
    corpus.counts.nan.append(row)
