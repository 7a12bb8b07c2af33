"""Metrics over a corpus: against all texts at once, in any split, over processes, by hand."""

import math
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric

from bert_oversmoothing.diagnostics import (
    AttentionGraph,
    BetweenTextCosine,
    EffectiveRank,
    LayerCKA,
    LayerNormScale,
    RankOneDistance,
    Spread,
    TokenCosine,
    cosine,
    effective_rank,
    high_frequency_ratio,
    mad,
    rank_one_distance,
    relative_distance,
    scale_statistics,
    stable_rank,
)
from bert_oversmoothing.diagnostics.metrics import PerText
from tenfold.testing import PackageContract, in_processes

WIDTH, TOKENS, TEXTS, RANKS = 6, 7, 23, 2
BIN = 2 ** (1 / 256) - 1  # half a bin


def corpus(seed: int = 0, texts: int = TEXTS) -> tuple[Tensor, Tensor]:
    """Texts of 0 to 7 tokens around a common offset, with NaN as padding, and odd ones."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(texts, TOKENS, WIDTH, generator=generator, dtype=torch.float64) + 0.7
    lengths = torch.randint(0, TOKENS + 1, (texts,), generator=generator)
    lengths[:4] = torch.tensor([0, 1, TOKENS, TOKENS])
    hidden[2] = 1.5  # equal tokens: no centred rank
    hidden[1, 0] = hidden[3, 0] = 0  # the text of one token is skipped with its zero
    lengths[4:7] = 4
    hidden[4, :2], hidden[4, 2:4] = hidden[5, :2], -hidden[5, :2]  # row mean 0
    hidden[5] = 0
    hidden[6, 1, 2] = torch.inf
    mask = torch.arange(TOKENS) < lengths[:, None]
    hidden[~mask] = torch.nan
    return hidden, mask


def metrics() -> dict[str, Metric]:
    return {
        "cosine": TokenCosine(),
        "distance": RankOneDistance(),
        "rank": EffectiveRank(),
        "scale": LayerNormScale(),
        "between": BetweenTextCosine(WIDTH),
    }


def sigmas(hidden: Tensor) -> Tensor:
    return (hidden - hidden.mean(-1, keepdim=True)).square().mean(-1).sqrt()


def feed(metric: Metric, hidden: Tensor, mask: Tensor) -> None:
    if isinstance(metric, LayerNormScale):
        hidden = sigmas(hidden)
    metric.update(hidden, mask)


def figures(value: Any) -> list[float]:
    """All numbers of a summary, in order."""
    return [float(x) for part in value for x in (part if isinstance(part, tuple) else [part])]


def same(a: Any, b: Any) -> bool:
    return figures(a) == pytest.approx(figures(b), rel=1e-10, abs=1e-12, nan_ok=True)


def check_spread(found: Spread, values: Tensor, mask: Tensor, error: float | None = None) -> None:
    """Against numpy on the values of every text."""
    asked = values[mask.sum(1) >= 2].numpy()
    kept = asked[np.isfinite(asked)]
    exact = [kept.mean(), kept.std(), kept.min(), kept.max()]
    ours = [found.mean, found.std, found.minimum, found.maximum]
    assert ours == pytest.approx(exact, rel=1e-9, abs=1e-9)
    for ours, q in ((found.low, 0.05), (found.high, 0.95)):
        truth = np.quantile(kept, q)
        assert abs(ours - truth) <= (BIN * abs(truth) if error is None else error) + 1e-12
    assert found.texts == len(kept)
    assert found.left_out == len(asked) - len(kept)
    assert found.skipped == len(mask) - len(asked)


def test_against_all_texts_at_once():
    hidden, mask = corpus()
    every = metrics()
    for metric in every.values():
        for rows in torch.arange(TEXTS).split(5):
            feed(metric, hidden[rows], mask[rows])
    found = {name: metric.compute() for name, metric in every.items()}
    # 1 - cosine is in the histogram: half a bin of that.
    check_spread(found["cosine"].cosine, cosine(hidden, mask), mask, BIN * 2)
    assert found["cosine"].zero_tokens == 1 + 4
    measures = {
        "distance": (rank_one_distance, relative_distance, high_frequency_ratio, mad),
        "rank": (
            effective_rank,
            lambda h, m: effective_rank(h, m, centred=True),
            stable_rank,
            lambda h, m: stable_rank(h, m, centred=True),
        ),
    }
    for name, functions in measures.items():
        for spread, measure in zip(found[name], functions, strict=True):
            check_spread(spread, measure(hidden, mask), mask)
    assert found["distance"].distance.left_out == 1
    assert found["distance"].relative.left_out == 2
    assert found["distance"].high_frequency.left_out == 3
    assert found["rank"].effective_centred.left_out == 3
    sigma = sigmas(hidden)
    for spread, values in zip(found["scale"], scale_statistics(sigma, mask), strict=False):
        check_spread(spread, values, mask)
    real = sigma[mask & (mask.sum(1) >= 2)[:, None]]
    assert found["scale"].overall_minimum == float(real[real.isfinite()].min())


def test_cosine_between_texts_by_pairs():
    """Every pair of tokens of different texts, one by one."""
    hidden, mask = corpus(1, 9)
    metric = BetweenTextCosine(WIDTH)
    for rows in torch.arange(9).split(4):
        metric.update(hidden[rows], mask[rows])
    found = metric.compute()
    texts = [h[m].numpy() for h, m in zip(hidden, mask, strict=True) if m.sum() >= 2]
    texts = [text for text in texts if np.isfinite(text).all()]
    unit = [t / np.maximum(np.linalg.norm(t, axis=1, keepdims=True), 1e-12) for t in texts]
    between = [
        float(x @ y) for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j
        for x in a for y in b
    ]  # fmt: skip
    within = [
        np.mean([float(a[i] @ a[j]) for i in range(len(a)) for j in range(len(a)) if i != j])
        for a in unit
    ]
    assert found.between == pytest.approx(np.mean(between), abs=1e-12)
    assert found.within == pytest.approx(np.mean(within), abs=1e-12)
    assert found.excess == pytest.approx(np.mean(within) - np.mean(between), abs=1e-12)
    skipped = int((mask.sum(1) < 2).sum())
    assert (found.texts, found.left_out, found.skipped) == (len(texts), 1, skipped)
    assert found.zero_tokens == 5
    with pytest.raises(ValueError, match="3 features, not 6"):
        metric.update(hidden[..., :3], mask)


def test_a_common_offset_is_no_excess():
    """Independent tokens around an offset are as similar between texts as inside them."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(200, 12, 16, generator=generator) + 2
    every = torch.ones(200, 12, dtype=torch.bool)
    metric = BetweenTextCosine(16)
    metric.update(hidden, every)
    assert metric.compute().within > 0.7
    assert abs(metric.compute().excess) < 0.01
    metric.reset()
    metric.update(hidden + 2 * torch.randn(200, 1, 16, generator=generator), every)
    assert metric.compute().excess > 0.1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 40))
def test_quantiles_are_those_of_numpy(seed, texts):
    rng = np.random.default_rng(seed)
    sigma = torch.from_numpy(np.exp(3 * rng.normal(size=(texts, 1))) * np.ones((1, 2)))
    metric = LayerNormScale()
    metric.update(sigma, torch.ones(texts, 2, dtype=torch.bool))
    check_spread(metric.compute().mean, sigma[:, 0], torch.ones(texts, 2, dtype=torch.bool))


class Logarithms(PerText):
    """Two values that are 0 or more, and two natural logarithms."""

    update, compute = PerText.count, PerText.spreads


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 40))
def test_quantiles_of_logarithms_are_those_of_numpy(seed, texts):
    """To the logarithm of half a bin, for logarithms of either sign."""
    rng = np.random.default_rng(seed)
    logs = torch.from_numpy(rng.normal([[0.0], [-4.0]], [[0.2], [3.0]], (2, texts)))
    logs[1, :1] = -torch.inf
    mask = torch.ones(texts, 2, dtype=torch.bool)
    metric = Logarithms(4, 2)
    for part in torch.arange(texts).split(7):
        metric.update(torch.cat([logs.exp(), logs])[:, part], mask[part])
    *_, first, second = metric.compute()
    check_spread(first, logs[0], mask, math.log1p(BIN))
    assert (second.texts, second.left_out) == (texts - 1, 1)
    if texts > 1:
        check_spread(second, logs[1], mask, math.log1p(BIN))
    # The exponentials of those that are there have the same quantiles, by their own bins.
    check_spread(metric.compute()[0], logs[0].exp(), mask)


@pytest.mark.parametrize(("eps", "centred"), [(1e-12, True), (0.3, True), (0.3, False)])
def test_scale_of_what_a_norm_is_given(eps, centred):
    hidden, mask = corpus()
    metric = LayerNormScale(eps, centred=centred)
    metric.update(hidden, mask)
    texts = [x[m].numpy() for x, m in zip(hidden, mask, strict=True)]
    texts = [x for x in texts if len(x) > 1 and np.isfinite(x).all()]
    sigma = [np.sqrt((x.var(1) if centred else (x**2).mean(1)) + eps) for x in texts]
    found = metric.compute()
    quantiles = [np.quantile(s, [0, 0.05, 0.5]) for s in sigma]
    means = np.mean([[*q, s.mean()] for q, s in zip(quantiles, sigma, strict=True)], axis=0)
    assert [spread.mean for spread in found[:4]] == pytest.approx(means, rel=1e-12)
    assert found.overall_minimum == pytest.approx(min(s.min() for s in sigma), rel=1e-12)


def test_one_value_is_its_own_quantile():
    metric = TokenCosine()
    h = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]], dtype=torch.float64)
    for _ in range(3):
        metric.update(h, torch.ones(1, 2, dtype=torch.bool))
    mean, std, low, high, minimum, maximum, *counts = metric.compute().cosine
    assert [mean, low, high, minimum, maximum] == pytest.approx([0.6] * 5, abs=1e-12)
    assert std == pytest.approx(0, abs=1e-7)
    assert counts == [3, 0, 0]


def test_collapsed_texts_keep_their_digits():
    """1 - cosine near 1e-8: its spread over texts is not lost in float32."""
    rng = np.random.default_rng(5)
    base = 5 * rng.normal(size=(40, 1, 64))
    hidden = torch.from_numpy(base + 5e-4 * rng.normal(size=(40, 9, 64))).float()
    every = torch.ones(40, 9, dtype=torch.bool)
    metric = TokenCosine()
    metric.update(hidden, every)
    found, truth = metric.compute().cosine, mad(hidden.double(), every).numpy()
    assert 1 - found.mean == pytest.approx(truth.mean(), rel=1e-3)
    assert found.std == pytest.approx(truth.std(), rel=1e-2)
    assert 1 - found.low == pytest.approx(np.quantile(truth, 0.95), rel=2 * BIN)


@pytest.mark.parametrize("name", metrics())
def test_nothing_counted(name):
    """NaN and zeros where no text has two tokens."""
    metric = metrics()[name]
    feed(metric, torch.full((3, 4, WIDTH), torch.nan), torch.eye(3, 4).bool())
    value = metric.compute()
    first = value[0]
    if isinstance(first, Spread):
        assert all(math.isnan(x) for x in first[:6])
        assert first[6:] == (0, 0, 3)
    else:
        assert all(math.isnan(x) for x in value[:3])
        assert value[3:] == (0, 0, 3, 0)


@pytest.mark.parametrize("name", metrics())
def test_memory_does_not_grow(name):
    hidden, mask = corpus()
    metric, sizes = metrics()[name], set()
    for _ in range(3):
        feed(metric, hidden, mask)
        states = [getattr(metric, state) for state in metric._defaults]
        sizes.add(sum(state.nbytes for state in states))
    assert len(sizes) == 1
    assert sizes.pop() < 200_000


@pytest.mark.parametrize("name", metrics())
def test_merged_states_are_one(name):
    hidden, mask = corpus()
    one, two, three = (metrics()[name] for _ in range(3))
    feed(one, hidden, mask)
    feed(two, hidden[:9], mask[:9])
    feed(three, hidden[9:], mask[9:])
    two.merge_state(three)
    assert same(two.compute(), one.compute())
    one.reset()
    feed(one, hidden[9:], mask[9:])
    assert same(one.compute(), three.compute())


@pytest.mark.parametrize("name", metrics())
def test_a_mask_may_be_that_of_a_tokenizer(name):
    hidden, mask = corpus()
    one, two = metrics()[name], metrics()[name]
    feed(one, hidden, mask)
    feed(two, hidden, mask.long())
    assert same(one.compute(), two.compute())
    assert layers_and_graph(hidden, mask.long()) == layers_and_graph(hidden, mask)


def test_forward_gives_the_batch_and_counts_it():
    hidden, mask = corpus()
    metric = TokenCosine()
    metric.update(hidden[:9], mask[:9])
    batch = metric(hidden[9:], mask[9:])
    alone = TokenCosine()
    alone.update(hidden[9:], mask[9:])
    assert same(batch, alone.compute())
    alone.update(hidden[:9], mask[:9])
    assert same(metric.compute(), alone.compute())


def layers_and_graph(hidden: Tensor, mask: Tensor) -> tuple[list[float], list[float]]:
    """Likeness of two layers and the graph of two heads, both made of finite states."""
    h = hidden.nan_to_num(0.0, 0.0, 0.0)
    cka, graph = LayerCKA(), AttentionGraph(num_heads=2)
    cka.update([h, h.square()], mask)
    graph.update(torch.stack([(scale * h @ h.mT).softmax(-1) for scale in (1, 3)], 1), mask)
    summary = graph.compute()
    heads = torch.stack([*summary.means.values()]).flatten().tolist()
    return cka.compute().flatten().tolist(), [*heads, *map(float, summary[1:])]


class Ranks(PackageContract):
    """What the processes run."""

    def rank(self, folder: str, rank: int) -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=60),
        )
        hidden, mask = corpus()
        found = {}
        for name, metric in metrics().items():
            feed(metric, hidden[rank::RANKS], mask[rank::RANKS])
            found[name] = figures(metric.compute())
        uneven = metrics()
        for name, metric in uneven.items():  # the second process has no texts
            if rank == 0:
                feed(metric, hidden, mask)
            found[f"{name}, uneven"] = figures(metric.compute())
        found["cka"], found["graph"] = layers_and_graph(hidden[rank::RANKS], mask[rank::RANKS])
        torch.save(found, f"{folder}/{rank}.pt")
        dist.destroy_process_group()


def test_two_processes_give_the_same(tmp_path):
    codes = in_processes(Ranks(), [("rank", str(tmp_path), rank) for rank in range(RANKS)])
    assert codes == [0, 0], f"the ranks ended with {codes}, see stderr"
    hidden, mask = corpus()
    cka, graph = layers_and_graph(hidden, mask)
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["cka"] == pytest.approx(cka, rel=1e-10)
        assert found["graph"] == pytest.approx(graph, rel=1e-10, abs=1e-12)
        for name, metric in metrics().items():
            feed(metric, hidden, mask)
            one = figures(metric.compute())
            for case in (name, f"{name}, uneven"):
                assert found[case] == pytest.approx(one, rel=1e-10, abs=1e-12, nan_ok=True)
