"""Measures of each text: reference arrays, definitions in float64, closed forms, invariances."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bert_oversmoothing.diagnostics.measures import (
    cosine,
    cosine_without_mean,
    distances,
    effective_rank,
    high_frequency_ratio,
    mad,
    rank_one_distance,
    relative_distance,
    scale_statistics,
    singular_values,
    stable_rank,
    zero_tokens,
)


def effective_rank_centred(hidden: Tensor, mask: Tensor) -> Tensor:
    return effective_rank(hidden, mask, centred=True)


def stable_rank_centred(hidden: Tensor, mask: Tensor) -> Tensor:
    return stable_rank(hidden, mask, centred=True)


MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cos": cosine,
    "dm": rank_one_distance,
    "dm_rel": relative_distance,
    "hf_ratio": high_frequency_ratio,
    "mad": mad,
    "erank": effective_rank,
    "erank_centred": effective_rank_centred,
    "stable_rank": stable_rank,
    "stable_rank_centred": stable_rank_centred,
}


def by_definition(h: np.ndarray) -> dict[str, float]:
    """The measures of one text without padding, by pairs, projections and a plain SVD."""
    h = h.astype(np.float64)
    n = len(h)
    u = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    cos = sum(float(u[i] @ u[j]) for i, j in pairs if i != j) / (n * (n - 1))
    dm = math.sqrt(sum(float(((h[i] - h[j]) ** 2).sum()) for i, j in pairs) / (2 * n))
    found = {
        "cos": cos,
        "dm": dm,
        "dm_rel": dm / np.linalg.norm(h),
        "hf_ratio": dm / np.linalg.norm(np.ones((n, n)) / n @ h),
        "mad": 1 - cos,
    }
    for name, x in (("", h), ("_centred", h - h.mean(0))):
        s = np.linalg.svd(x, compute_uv=False)
        p = s[s > 1e-13 * s[0]] / s.sum()
        found["erank" + name] = math.exp(-float((p * np.log(p)).sum()))
        found["stable_rank" + name] = float((s**2).sum() / s[0] ** 2)
    return {name: float(value) for name, value in found.items()}


def scattered(
    seed: int, lengths: list[int], tokens: int, width: int
) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    """Texts whose real tokens lie anywhere between NaN, infinity and large numbers."""
    rng = np.random.default_rng(seed)
    hidden = rng.choice([np.nan, np.inf, -np.inf, 1e30], (len(lengths), tokens, width))
    mask = np.zeros((len(lengths), tokens), bool)
    texts = []
    for b, n in enumerate(lengths):
        places = np.sort(rng.choice(tokens, n, replace=False))
        mask[b, places] = True
        texts.append(rng.normal(size=(n, width)) + rng.normal(size=width))
        hidden[b, places] = texts[-1]
    return torch.from_numpy(hidden), torch.from_numpy(mask), texts


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
@pytest.mark.parametrize("name", [name for name in MEASURES if name != "stable_rank_centred"])
def test_reference_arrays(reference, name, dtype, tolerance):
    arrays = np.load(reference / "diagnostics.npz")
    hidden = torch.from_numpy(arrays["hidden"]).to(getattr(torch, dtype))
    found = MEASURES[name](hidden, torch.from_numpy(arrays["mask"]))
    np.testing.assert_allclose(found.numpy(), arrays[name], rtol=tolerance, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.lists(st.integers(2, 9), min_size=1, max_size=3),
    st.integers(0, 3),
    st.sampled_from([1, 4, 7, 16]),
)
def test_definitions_wherever_the_padding_is(seed, lengths, spare, width):
    hidden, mask, texts = scattered(seed, lengths, max(lengths) + spare, width)
    expected = [by_definition(h) for h in texts]
    for name, measure in MEASURES.items():
        if width == 1 and "rank" in name:
            continue  # one feature: see the closed forms
        found = measure(hidden, mask)
        assert found.tolist() == pytest.approx([e[name] for e in expected], rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_invariances(name):
    measure = MEASURES[name]
    h = torch.from_numpy(np.random.default_rng(3).normal(size=(2, 6, 5)) + 0.5)
    every = torch.ones(2, 6, dtype=torch.bool)
    plain = measure(h, every)
    torch.testing.assert_close(
        measure(h[:, torch.randperm(6)], every), plain, rtol=1e-10, atol=1e-12
    )
    garbage = torch.full((2, 3, 5), torch.nan, dtype=torch.float64)
    for pieces in ([h, garbage], [garbage, h], [h[:, :2], garbage, h[:, 2:]]):
        padded = torch.cat(pieces, 1)
        mask = padded.isfinite().all(-1)
        torch.testing.assert_close(measure(padded, mask), plain, rtol=1e-10, atol=1e-12)
        filled = padded.nan_to_num(nan=1e9)
        torch.testing.assert_close(measure(filled, mask), plain, rtol=1e-10, atol=1e-12)
    rotation = torch.linalg.qr(torch.from_numpy(np.random.default_rng(4).normal(size=(5, 5))))[0]
    torch.testing.assert_close(measure(h @ rotation, every), plain, rtol=1e-10, atol=1e-12)
    scale = 3.5 if name == "dm" else 1
    torch.testing.assert_close(measure(-3.5 * h, every), scale * plain, rtol=1e-10, atol=1e-12)


def test_a_shared_offset_leaves_the_distance():
    hidden, mask, _ = scattered(5, [4, 7], 8, 6)
    shift = torch.linspace(-3, 3, 6, dtype=torch.float64)
    found = rank_one_distance(hidden + shift, mask)
    torch.testing.assert_close(found, rank_one_distance(hidden, mask), rtol=1e-12, atol=0)
    ranks = effective_rank_centred(hidden + shift, mask)
    torch.testing.assert_close(ranks, effective_rank_centred(hidden, mask), rtol=1e-10, atol=0)


def test_identities():
    """r^2 = (n-1)(1-cos)/n for rows of equal norm, r = hf/sqrt(1+hf^2)."""
    hidden, mask, _ = scattered(6, [2, 5, 9], 9, 8)
    n = mask.sum(1)
    equal_norms = 7 * hidden / hidden.norm(dim=2, keepdim=True)
    r = relative_distance(equal_norms, mask)
    torch.testing.assert_close(r.square(), (n - 1) * (1 - cosine(equal_norms, mask)) / n)
    _, relative, hf = distances(hidden, mask)
    torch.testing.assert_close(relative, hf / (1 + hf.square()).sqrt())


def test_closed_forms():
    """Orthonormal tokens, equal tokens, opposite tokens, one feature."""
    n, every = 4, torch.ones(1, 4, dtype=torch.bool)
    eye = torch.eye(n, 6, dtype=torch.float64)[None]
    expected = {
        "cos": 0,
        "dm": math.sqrt(n - 1),
        "dm_rel": math.sqrt((n - 1) / n),
        "hf_ratio": math.sqrt(n - 1),
        "mad": 1,
        "erank": n,
        "erank_centred": n - 1,
        "stable_rank": n,
        "stable_rank_centred": n - 1,
    }
    assert {k: float(f(eye, every)) for k, f in MEASURES.items()} == pytest.approx(expected)
    one = torch.tensor([1.0, -2.0, 5.0, 0.5])[None, :, None]
    for name in MEASURES:
        if "rank" in name:
            assert float(MEASURES[name](one, every)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_tokens_are_at_distance_zero_exactly(dtype):
    row = torch.randn(96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = (3 * row).to(dtype).expand(1, 37, 96)
    every = torch.ones(1, 37, dtype=torch.bool)
    values = {name: float(measure(hidden, every)) for name, measure in MEASURES.items()}
    assert [values[name] for name in ("dm", "dm_rel", "hf_ratio", "mad")] == [0] * 4
    assert values["cos"] == 1
    assert values["erank"] == pytest.approx(1, abs=1e-12)
    assert values["stable_rank"] == pytest.approx(1, abs=1e-12)
    assert math.isnan(values["erank_centred"])
    assert math.isnan(values["stable_rank_centred"])


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_nearly_equal_tokens_keep_their_digits(gap):
    """Float32 states on a large common offset, against the definitions in float64."""
    rng = np.random.default_rng(7)
    text = (5 * rng.normal(size=64) + gap * rng.normal(size=(24, 64))).astype(np.float32)
    hidden, every = torch.from_numpy(text)[None], torch.ones(1, 24, dtype=torch.bool)
    truth = by_definition(text)
    found = {name: float(measure(hidden, every)) for name, measure in MEASURES.items()}
    for name in ("dm", "dm_rel", "hf_ratio", "erank_centred", "stable_rank_centred"):
        assert found[name] == pytest.approx(truth[name], rel=2e-6)
    # Rows are rounded as they are normalised: 6e-8 of a feature, against the gap.
    u = text.astype(np.float64) / np.linalg.norm(text.astype(np.float64), axis=1, keepdims=True)
    exact = float(((u - u.mean(0)) ** 2).sum()) / 23
    assert found["mad"] == pytest.approx(exact, rel=max(1e-5, 2e-7 / gap))
    assert found["cos"] == pytest.approx(1 - exact, abs=1e-7)


def test_an_outlier_as_the_first_token():
    """The token from which differences are taken may be far from the others."""
    rng = np.random.default_rng(8)
    text = (1 + 1e-3 * rng.normal(size=(1, 12, 32))).astype(np.float32)
    text[0, 0] = 1e4
    every = torch.ones(1, 12, dtype=torch.bool)
    truth = by_definition(text[0])
    for name in ("cos", "dm", "dm_rel", "hf_ratio", "mad"):
        found = float(MEASURES[name](torch.from_numpy(text), every))
        assert found == pytest.approx(truth[name], rel=1e-5, abs=1e-6)


def test_the_always_zero_singular_value_of_centred_states():
    """A clamp at 0 would leave it at 1e-8 and lift the effective rank by 6e-8."""
    text = np.random.default_rng(9).normal(size=(20, 30))
    every = torch.ones(1, 20, dtype=torch.bool)
    truth = by_definition(text)["erank_centred"]
    hidden = torch.from_numpy(text)[None]
    assert float(effective_rank_centred(hidden, every)) == pytest.approx(truth, abs=1e-10)
    assert float(singular_values(hidden, every, centred=True)[0, 0]) == 0
    twice = torch.cat([hidden[:, :10]] * 2, 1)
    assert (singular_values(twice, every)[0, :10] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted(dtype):
    """512 tokens of 1024 features: sums of squares far beyond the largest float16, 65504."""
    generator = torch.Generator().manual_seed(1)
    hidden = (30 * torch.randn(1, 512, 1024, generator=generator)).to(dtype)
    every = torch.ones(1, 512, dtype=torch.bool)
    for measure in (cosine, rank_one_distance, relative_distance, high_frequency_ratio, mad):
        found, truth = measure(hidden, every), measure(hidden.double(), every)
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(float(truth), rel=1e-5, abs=1e-6)
    few = every & (torch.arange(512) < 16)
    assert effective_rank(hidden, few).equal(effective_rank(hidden.float(), few))


@pytest.mark.parametrize("name", MEASURES)
def test_texts_without_a_value(name):
    """Empty text, one token, a NaN, an infinity: NaN, and the other texts do not notice."""
    measure = MEASURES[name]
    hidden, mask, _ = scattered(10, [5, 0, 1, 5, 5, 4], 6, 8)
    hidden[3, mask[3].nonzero()[1]] = torch.nan
    hidden[4, mask[4].nonzero()[0], 2] = torch.inf
    found = measure(hidden.float(), mask)
    assert found.isnan().tolist() == [False, True, True, True, True, False]
    alone = measure(hidden[[0, 5]].float(), mask[[0, 5]])
    torch.testing.assert_close(found[[0, 5]], alone)


def test_zero_vectors():
    """Cosine 0 with every other token, also with another zero vector."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    hidden[0, :2] = 0
    hidden[1] = 0
    hidden[2, 0] = 1e-14
    every = torch.ones(3, 5, dtype=torch.bool)
    assert zero_tokens(hidden, every).tolist() == [2, 5, 1]
    assert zero_tokens(hidden, every & (torch.arange(5) > 0)).tolist() == [1, 4, 0]
    for row in (0, 2):
        truth = by_definition(hidden[row].numpy())
        assert float(cosine(hidden, every)[row]) == pytest.approx(truth["cos"], abs=1e-12)
        assert float(mad(hidden, every)[row]) == pytest.approx(truth["mad"], abs=1e-12)
    nothing = {name: float(measure(hidden, every)[1]) for name, measure in MEASURES.items()}
    assert nothing["cos"] == nothing["dm"] == 0
    assert all(math.isnan(nothing[k]) for k in ("dm_rel", "hf_ratio", "erank", "stable_rank"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_mean_of_zero_makes_the_ratio_infinite(dtype):
    h = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    every = torch.ones(1, 14, dtype=torch.bool)
    opposite = torch.cat([h, -h], 1).to(dtype)
    assert float(high_frequency_ratio(opposite, every)) == math.inf
    assert float(relative_distance(opposite, every)) == pytest.approx(1)
    centred = (h - h.mean(1, keepdim=True)).to(dtype)
    assert float(high_frequency_ratio(centred, every[:, :7])) == math.inf
    nearly = (h - h.mean(1, keepdim=True) + 1e-3).to(dtype)
    assert math.isfinite(float(high_frequency_ratio(nearly, every[:, :7])))


def test_cosine_without_the_corpus_mean():
    hidden, mask, texts = scattered(11, [3, 6, 0, 2], 7, 5)
    mean = np.concatenate(texts).mean(0)
    truth = [by_definition(text - mean)["cos"] for text in texts if len(text)]
    found = cosine_without_mean(hidden, mask)
    assert found[[0, 1, 3]].tolist() == pytest.approx(truth, abs=1e-10)
    assert found[2].isnan()
    torch.testing.assert_close(cosine_without_mean(hidden + 50, mask), found, equal_nan=True)


def test_scale_statistics():
    rng = np.random.default_rng(12)
    sigma, mask = np.full((5, 40), np.nan), np.zeros((5, 40), bool)
    for b, n in enumerate([40, 7, 2, 1, 3]):
        places = rng.choice(40, n, replace=False)
        mask[b, places], sigma[b, places] = True, rng.gamma(2, size=n)
    sigma[4, mask[4].argmax()] = np.nan
    found = scale_statistics(torch.from_numpy(sigma), torch.from_numpy(mask))
    for b in range(3):
        real = sigma[b, mask[b]]
        truth = [real.min(), np.quantile(real, 0.05), np.median(real), real.mean()]
        assert [float(value[b]) for value in found] == pytest.approx(truth, rel=1e-12)
    assert torch.stack(found)[:, 3:].isnan().all()
