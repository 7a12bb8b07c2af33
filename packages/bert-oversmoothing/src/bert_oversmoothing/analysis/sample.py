"""What needs more than sums, on a sample of the texts: ranks, likeness of layers, graph, bound.

Legend of the shape suffixes: b texts, h heads, n tokens, d width, k layers 0..L, l blocks 1..L,
r singular values; N tokens of all texts of the sample.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bert_oversmoothing.analysis.bound import ContractionBound, head_norms, model_norms
from bert_oversmoothing.analysis.corpus import Batch, Corpus
from bert_oversmoothing.analysis.streaming import run_batch
from bert_oversmoothing.capture import capture
from bert_oversmoothing.diagnostics import (
    AttentionGraph,
    cosine,
    graph_statistics,
    identity_accuracy,
    identity_cosine,
    linear_cka,
    rank_one_distance,
)
from bert_oversmoothing.diagnostics.measures import (
    effective_rank_of,
    singular_values,
    stable_rank_of,
)
from bert_oversmoothing.families import Encoder
from bert_oversmoothing.report.tables import SPREAD_ENDS, Row
from bert_oversmoothing.theorem import min_sigma
from tenfold.progress import track

CKA_TOKENS = 4096
"""Of longer samples so many tokens, evenly chosen, are compared between layers."""

Attention = Literal["eager", "recompute", "off"]


@dataclass
class Sample:
    """The states of some texts and what was measured on them while they were made.

    Attributes:
        rows: the texts, in the order in which they lie in the states.
        lengths: tokens of each that count.
        states: of every layer, float32 or better, the texts one after the other.
        sigmas: of both norms of every block, a value a token that counts; none where there is no
            such norm.
        graphs: a metric a block; none if the maps were not asked for.
        bound: over all real tokens, special ones included; None if not asked for.
    """

    rows: list[int]
    lengths: list[int]
    states: list[Float[Tensor, "N d"]]
    sigmas: dict[tuple[int, int], Float[Tensor, " N"]] = field(default_factory=dict)
    graphs: list[AttentionGraph] = field(default_factory=list)
    bound: ContractionBound | None = None

    def texts(self) -> list[tuple[int, Float[Tensor, "k n d"]]]:
        """Every text with its states in all layers."""
        parts = zip(*(state.split(self.lengths) for state in self.states), strict=True)
        return [(row, torch.stack(part)) for row, part in zip(self.rows, parts, strict=True)]


def choose(rows: Sequence[int], count: int) -> list[int]:
    """So many of the rows, evenly over their order by place."""
    if len(rows) <= count:
        return sorted(rows)
    places = np.linspace(0, len(rows) - 1, count).round().astype(int)
    ordered = sorted(rows)
    return [ordered[place] for place in places]


@torch.no_grad()
def draw(
    encoder: Encoder,
    corpus: Corpus,
    rows: Sequence[int],
    metrics: Collection[str],
    *,
    batch_size: int,
    attention: Attention,
    progress: bool = False,
) -> Sample:
    """Run the model on some texts and keep their states.

    Raises:
        UserError: attention maps were asked for and are not to be had.
    """
    rows = sorted(rows, key=corpus.length, reverse=True)
    run = _Run(encoder, metrics, attention != "off", corpus.prefix)
    batches = corpus.batches(rows, batch_size)
    if progress:
        batches = track(batches, -(-len(rows) // batch_size), "sample, batch")
    how = "eager" if attention == "off" else attention
    maps = None if attention == "off" else run.map
    with capture(encoder, run.state, norms=run.norm, maps=maps, attention=how):
        for batch in batches:
            run.start(batch)
            run_batch(encoder.model, batch)
            run.finish()
    return run.result()


class _Run:
    """Consumer of `capture` over the batches of a sample."""

    def __init__(self, encoder: Encoder, metrics: Collection[str], maps: bool, prefix: int) -> None:
        self.encoder, self.prefix = encoder, prefix
        self.rows: list[int] = []
        self.lengths: list[int] = []
        self.states: list[list[Tensor]] = [[] for _ in range(len(encoder.blocks) + 1)]
        self.sigmas: dict[tuple[int, int], list[Tensor]] = {}
        self.graphs: list[AttentionGraph] = []
        self.graph_wanted = maps and "graph" in metrics
        norms = model_norms(encoder) if maps and "bound" in metrics else []
        self.bound = ContractionBound(norms) if any(norms) else None

    def start(self, batch: Batch) -> None:
        device = next(self.encoder.model.parameters()).device
        self.batch = batch
        self.real = None if batch.mask_bn is None else batch.mask_bn.to(device)
        self.counted = None if batch.counted_bn is None else batch.counted_bn.to(device)
        self.distances: list[Tensor] = []
        self.least: dict[tuple[int, int], Tensor] = {}
        self.lams: list[Tensor] = []

    def _masks(self, like_bn: Tensor) -> tuple[Bool[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Real tokens and those that count; of images the model alone knows how many there are."""
        if self.real is None or self.counted is None:
            self.real = torch.ones(like_bn.shape[:2], dtype=torch.bool, device=like_bn.device)
            self.counted = self.real.clone()
            self.counted[:, : self.prefix] = False
        return self.real, self.counted

    def state(self, layer: int, hidden_bnd: Tensor) -> None:
        real, counted = self._masks(hidden_bnd)
        self.distances.append(rank_one_distance(hidden_bnd, real))
        kept = hidden_bnd[counted]
        self.states[layer].append(kept.to("cpu", torch.promote_types(kept.dtype, torch.float32)))
        if layer == 0:
            self.rows += self.batch.rows
            self.lengths += counted.sum(1).tolist()

    def norm(self, layer: int, place: int, input_bnd: Tensor, output_bnd: Tensor) -> None:
        norms = self.encoder.blocks[layer - 1].norms
        if place > 1 or place >= len(norms) or (norm := norms[place]) is None:
            return
        sigma_bn = norm.sigma(input_bnd)
        real, counted = self._masks(sigma_bn)
        self.least[layer, place] = min_sigma(sigma_bn, real)
        self.sigmas.setdefault((layer, place), []).append(sigma_bn[counted].cpu())

    def map(self, layer: int, attention_bhnn: Tensor) -> None:
        real, _ = self._masks(attention_bhnn[:, 0])
        if not self.graph_wanted:
            parts = ("lam",)
        else:
            if len(self.graphs) < layer:
                self.graphs.append(AttentionGraph(attention_bhnn.shape[1]))
            parts = self.graphs[layer - 1].parts
        found = graph_statistics(attention_bhnn, real, parts=parts)
        if self.graph_wanted:
            self.graphs[layer - 1].count(found, real)
        assert found.lam_upper is not None
        self.lams.append(found.lam_upper)

    def finish(self) -> None:
        if self.bound is not None:
            blocks = range(1, len(self.encoder.blocks) + 1)
            sigma1, sigma2 = ([self.least.get((k, place)) for k in blocks] for place in (0, 1))
            self.bound.update(torch.stack(self.distances), self.lams, sigma1, sigma2)

    def result(self) -> Sample:
        states = [torch.cat(parts) for parts in self.states]
        sigmas = {key: torch.cat(parts) for key, parts in self.sigmas.items()}
        return Sample(self.rows, self.lengths, states, sigmas, self.graphs, self.bound)


# -- tables ---------------------------------------------------------------------------------------


def add_columns(rows: list[Row], sample: Sample, metrics: Collection[str]) -> dict[str, np.ndarray]:
    """Add what the sample tells to the rows of layers.csv; return the arrays of sample.npz.

    A value is the mean over the sample's texts; of v_tight and v_paper it is the median, for one
    text with a tiny sigma would rule their mean, and `_std` is still the deviation from the mean.
    """
    arrays: dict[str, np.ndarray] = {}
    texts = sample.texts()
    if "cos" in metrics:
        mean_k1d = torch.stack([state.mean(0, keepdim=True) for state in sample.states])
        values = [cosine(x - mean_k1d, _all(x)) for _, x in texts]
        _add(rows, "cosine_without_mean", torch.stack(values, 1))
    if "rank" in metrics:
        values = [identity_cosine(x, _origin(x), _all(x)) for _, x in texts]
        _add(rows, "identity_cosine", torch.stack(values, 1))
        values = [identity_accuracy(x, _origin(x), _all(x)) for _, x in texts]
        _add(rows, "identity_accuracy", torch.stack(values, 1))
        arrays["spectrum"] = _add_ranks(rows, texts)
        places = np.linspace(0, len(sample.states[0]) - 1, CKA_TOKENS).round().astype(int)
        chosen = slice(None) if len(sample.states[0]) <= CKA_TOKENS else places
        cka = linear_cka(torch.stack([state[chosen] for state in sample.states]))
        arrays["cka"] = cka.numpy()
    if "sigma" in metrics:
        arrays |= _sigma_quantiles(sample, len(rows) - 1)
    if sample.bound is not None:
        tight_bl, paper_bl, _ = sample.bound.per_text().unbind(2)
        _add(rows[1:], "v_tight", tight_bl.mT, median=True)
        _add(rows[1:], "v_paper", paper_bl.mT, median=True)
        for row, value in zip(rows[1:], sample.bound.compute().vacuous_share, strict=True):
            row["vacuous_share"] = value
    return arrays


def _all(x_knd: Tensor) -> Bool[Tensor, "k n"]:
    return torch.ones(x_knd.shape[:2], dtype=torch.bool)


def _origin(x_knd: Tensor) -> Tensor:
    return x_knd[:1].expand_as(x_knd)


def _add(
    rows: Sequence[Row], name: str, value_kb: Float[Tensor, "k b"], *, median: bool = False
) -> None:
    """Mean or median over the texts that have a value, population deviation, and quantiles."""
    value_kb = value_kb.double()
    value_kb = value_kb.masked_fill(~value_kb.isfinite(), torch.nan)
    mean_k = value_kb.nanmean(1)
    std_k = (value_kb - mean_k[:, None]).square().nanmean(1).sqrt()
    low_k, middle_k, high_k = value_kb.nanquantile(value_kb.new_tensor([0.05, 0.5, 0.95]), dim=1)
    columns = (middle_k if median else mean_k, std_k, low_k, high_k)
    for end, column_k in zip(SPREAD_ENDS, columns, strict=True):
        for row, value in zip(rows, column_k.tolist(), strict=True):
            row[f"{name}{end}"] = value


def _add_ranks(rows: list[Row], texts: Sequence[tuple[int, Tensor]]) -> np.ndarray:
    """Ranks, and the mean over texts of the singular values over the largest.

    A text has as many as tokens, and behind them zeros: so the mean falls as those of a text do.
    """
    spectra: list[Tensor] = []
    values: dict[str, list[Tensor]] = {}
    for _, x_knd in texts:
        for centred, end in ((False, ""), (True, "_centred")):
            s_kr = singular_values(x_knd, _all(x_knd), centred=centred)
            values.setdefault(f"effective_rank{end}", []).append(effective_rank_of(s_kr))
            values.setdefault(f"stable_rank{end}", []).append(stable_rank_of(s_kr))
            if not centred:
                spectra.append((s_kr / s_kr.amax(1, keepdim=True)).flip(1))
    for name, of_text in values.items():
        _add(rows, name, torch.stack(of_text, 1))
    longest = max(s.shape[1] for s in spectra)
    padded = [torch.nn.functional.pad(s, (0, longest - s.shape[1])) for s in spectra]
    return torch.stack(padded).nanmean(0).numpy()


def _sigma_quantiles(sample: Sample, blocks: int) -> dict[str, np.ndarray]:
    """0 %, 1 %, ..., 100 % of sigma over all tokens, and of the product of minima over texts."""
    levels = torch.linspace(0, 1, 101, dtype=torch.float64)
    nothing = torch.full((101,), torch.nan, dtype=torch.float64)
    found = {name: [] for name in ("sigma1", "sigma2", "sigma_product")}
    for layer in range(1, blocks + 1):
        both = [sample.sigmas.get((layer, place)) for place in (0, 1)]
        for name, sigma in zip(("sigma1", "sigma2"), both, strict=True):
            # torch.quantile stops at 16 million values.
            found[name].append(
                nothing if sigma is None else torch.from_numpy(np.quantile(sigma.double(), levels))
            )
        least = [
            None if s is None else torch.stack([part.min() for part in s.split(sample.lengths)])
            for s in both
        ]
        first, second = least
        product = None if first is None or second is None else (first * second).double()
        found["sigma_product"].append(nothing if product is None else product.quantile(levels))
    return {f"{name}_quantiles": torch.stack(rows).numpy() for name, rows in found.items()}


def head_rows(encoder: Encoder, sample: Sample) -> list[Row]:
    """The rows of heads.csv."""
    rows: list[Row] = []
    known = head_norms(encoder) if sample.graphs else []
    for layer, (graph, norms) in enumerate(zip(sample.graphs, known, strict=True), 1):
        means = {name: value.tolist() for name, value in graph.summary().means.items()}
        for head in range(graph.sums.shape[1]):
            row: Row = {"layer": layer, "head": head}
            row |= {name: values[head] for name, values in means.items()}
            row["vo_norm"] = None if norms is None else float(norms[head])
            rows.append(row)
    return rows


def token_rows(corpus: Corpus, sample: Sample) -> list[Row]:
    """The rows of tokens.csv."""
    rows: list[Row] = []
    ends = np.cumsum(sample.lengths)
    for (row, x_knd), end in zip(sample.texts(), ends, strict=True):
        x_knd = x_knd.double()
        mean_k1d = x_knd.mean(1, keepdim=True)
        cosine_kn = torch.cosine_similarity(x_knd, mean_k1d, dim=2, eps=1e-12)
        square_kn = (x_knd - mean_k1d).square().sum(2)
        share_kn = square_kn / square_kn.sum(1, keepdim=True)
        words, first = _words(corpus, row, x_knd.shape[1]), int(end) - x_knd.shape[1]
        for layer in range(len(x_knd)):
            for position, word in enumerate(words):
                found: Row = {"text": row, "layer": layer, "position": position, "token": word}
                found["cosine_to_mean"] = float(cosine_kn[layer, position])
                found["distance_share"] = float(share_kn[layer, position])
                for place in (0, 1):
                    sigma = sample.sigmas.get((layer, place))
                    value = None if sigma is None else float(sigma[first + position])
                    found[f"sigma{place + 1}"] = value
                rows.append(found)
    return rows


def _words(corpus: Corpus, row: int, tokens: int) -> list[str]:
    """The words of the tokens that count, numbers where there are none."""
    words = corpus.counted_words(row)
    return words if len(words) == tokens else [str(place) for place in range(tokens)]


def picture_text(corpus: Corpus, sample: Sample) -> tuple[int, list[str], dict[str, np.ndarray]]:
    """The text whose length is the median one: its place, words, and cosines of its tokens."""
    by_length = sorted(range(len(sample.rows)), key=lambda k: (sample.lengths[k], sample.rows[k]))
    row, x_knd = sample.texts()[by_length[len(by_length) // 2]]
    layers = (0, (len(x_knd) - 1) // 2, len(x_knd) - 1)
    u_knd = torch.nn.functional.normalize(x_knd[[*layers]].double(), dim=2, eps=1e-12)
    matrices = (u_knd @ u_knd.mT).numpy()
    places = ("first", "middle", "last")
    arrays = {f"cosine_{place}": matrix for place, matrix in zip(places, matrices, strict=True)}
    return row, _words(corpus, row, x_knd.shape[1]), arrays
