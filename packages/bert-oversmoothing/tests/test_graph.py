"""Graph statistics against the reference arrays, closed forms and loops in numpy."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bert_oversmoothing.diagnostics.graph import (
    PARTS,
    AttentionGraph,
    asymmetry,
    graph_statistics,
    lambda_max,
    mean_distance,
    real_attention,
    row_entropy,
    second_modulus,
    self_mass,
    sink,
)

FIELDS = (
    "lam",
    "second_modulus",
    "row_entropy",
    "self_mass",
    "sink_mass",
    "mean_distance",
    "asymmetry",
)
IN_REFERENCE = dict(zip(FIELDS, FIELDS, strict=True)) | {
    "second_modulus": "lam2_abs",
    "row_entropy": "row_entropy_rel",
}


def random_attention(*shape: int, seed: int = 0, peak: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)
    return (peak * logits).softmax(-1)


def all_real(attention: Tensor) -> Tensor:
    return torch.ones(attention.shape[0], attention.shape[-1], dtype=torch.bool)


def with_garbage(attention: Tensor, mask: Tensor, garbage: float) -> Tensor:
    """A text's attention spread over the places of the mask, garbage at all others."""
    n = len(mask)
    found = torch.full((1, attention.shape[1], n, n), garbage, dtype=attention.dtype)
    places = mask.nonzero()[:, 0]
    found[:, :, places[:, None], places] = attention
    return found


def in_numpy(a: np.ndarray) -> dict[str, float]:
    """All figures of one matrix, by their definitions."""
    n = len(a)
    project = np.eye(n) - np.full((n, n), 1 / n)
    entropy = [-sum(p * math.log(p) for p in row if p > 0) for row in a]
    column_means = [sum(a[i, j] for i in range(n)) / n for j in range(n)]
    return {
        "lam": np.linalg.svd(project @ a, compute_uv=False)[0] ** 2,
        "second_modulus": sorted(abs(np.linalg.eigvals(a)))[-2],
        "row_entropy": sum(entropy) / n / math.log(n),
        "self_mass": sum(a[i, i] for i in range(n)) / n,
        "sink_mass": max(column_means),
        "sink_index": column_means.index(max(column_means)),
        "mean_distance": sum(a[i, j] * abs(i - j) for i in range(n) for j in range(n)) / n,
        "asymmetry": np.linalg.norm(a - a.T) / 2 / np.linalg.norm(a),
    }


# -- against the truth ----------------------------------------------------------------------------


def test_the_figures_are_the_reference_s(reference):
    arrays = np.load(reference / "diagnostics.npz")
    found = graph_statistics(torch.tensor(arrays["attention"]), torch.tensor(arrays["mask"]))
    for ours, theirs in IN_REFERENCE.items():
        value = getattr(found, ours).numpy()
        np.testing.assert_allclose(value, arrays[theirs], rtol=0, atol=1e-9, err_msg=ours)
    assert found.lam_exact is not None
    assert found.lam_exact.all()
    assert torch.equal(found.lam_upper, found.lam)


@pytest.mark.parametrize("n", [2, 3, 17])
def test_the_figures_are_the_definitions(n):
    attention = random_attention(2, 3, n)
    found = graph_statistics(attention, all_real(attention))
    for text in range(2):
        for head in range(3):
            for name, want in in_numpy(attention[text, head].numpy()).items():
                value = getattr(found, name)[text, head].item()
                assert value == pytest.approx(want, abs=1e-11), name


def test_each_function_gives_its_part_alone():
    attention = random_attention(2, 3, 9)
    mask = all_real(attention)
    mask[1, 6:] = False
    found = graph_statistics(attention, mask)
    equations = {
        "second_modulus": second_modulus,
        "row_entropy": row_entropy,
        "self_mass": self_mass,
        "mean_distance": mean_distance,
        "asymmetry": asymmetry,
    }
    for name, equation in equations.items():
        alone = graph_statistics(attention, mask, parts=(name,))
        assert torch.equal(equation(attention, mask), getattr(found, name)), name
        assert torch.equal(getattr(alone, name), getattr(found, name)), name
        assert [n for n, x in alone._asdict().items() if x is not None] == [name]
    for pair in (lambda_max(attention, mask), sink(attention, mask)):
        for name, value in pair._asdict().items():
            assert torch.equal(value, getattr(found, name)), name


def test_a_part_that_there_is_not_is_named():
    attention = random_attention(1, 1, 3)
    with pytest.raises(ValueError, match="no such parts: lamb; there are lam,"):
        # The annotation, which the tests enforce, would already refuse it.
        inspect.unwrap(graph_statistics)(attention, all_real(attention), parts=("lamb",))


# -- closed forms ---------------------------------------------------------------------------------


def figures(a: Tensor) -> dict[str, float]:
    found = graph_statistics(a[None, None].double(), all_real(a[None]))
    return {name: x.item() for name, x in found._asdict().items() if x is not None}


@pytest.mark.parametrize("n", [2, 5, 12])
def test_uniform_attention(n):
    assert figures(torch.full((n, n), 1 / n)) == pytest.approx(
        {
            "lam": 0,
            "lam_upper": 0,
            "lam_exact": True,
            "second_modulus": 0,
            "row_entropy": 1,
            "self_mass": 1 / n,
            "sink_mass": 1 / n,
            "sink_index": 0,
            "mean_distance": (n * n - 1) / (3 * n),
            "asymmetry": 0,
        },
        abs=1e-7,
    )


@pytest.mark.parametrize("n", [2, 5, 12])
def test_everyone_looks_at_one_token(n):
    a = torch.zeros(n, n)
    a[:, 1] = 1
    found = figures(a)
    assert found["lam"] == pytest.approx(0, abs=1e-14)
    assert found["row_entropy"] == 0
    assert (found["sink_mass"], found["sink_index"]) == (1, 1)
    # All entries off the diagonal count in the difference, n of them in the norm.
    assert found["asymmetry"] == pytest.approx(math.sqrt(2 * (n - 1)) / (2 * math.sqrt(n)))


@pytest.mark.parametrize("n", [2, 5, 12])
def test_identity_and_permutation(n):
    found = figures(torch.eye(n))
    assert found["lam"] == pytest.approx(1)
    assert found["second_modulus"] == pytest.approx(1)
    assert (found["self_mass"], found["mean_distance"], found["asymmetry"]) == (1, 0, 0)
    found = figures(torch.eye(n).roll(1, 1))
    assert found["lam"] == pytest.approx(1)
    assert found["second_modulus"] == pytest.approx(1)
    assert (found["self_mass"], found["row_entropy"]) == (0, 0)
    assert found["mean_distance"] == pytest.approx(2 * (n - 1) / n)
    assert found["asymmetry"] == pytest.approx(0 if n == 2 else math.sqrt(0.5))


def test_two_tokens():
    p, q = 0.9, 0.3  # rows (p, 1 - p) and (q, 1 - q)
    found = figures(torch.tensor([[p, 1 - p], [q, 1 - q]], dtype=torch.float64))
    assert found["lam"] == pytest.approx((p - q) ** 2)
    assert found["second_modulus"] == pytest.approx(p - q)


def test_the_bounds_of_lambda():
    attention = random_attention(1, 40, 11, peak=3)
    doubly = attention.clone()
    for _ in range(2000):  # Sinkhorn's iteration makes it doubly stochastic
        doubly = doubly / doubly.sum(-2, keepdim=True)
        doubly = doubly / doubly.sum(-1, keepdim=True)
    assert lambda_max(doubly, all_real(doubly)).lam.max() <= 1 + 1e-6
    # Half of the tokens look at one, half at another: n (1/2), the columns apart.
    split = torch.zeros(1, 1, 10, 10, dtype=torch.float64)
    split[..., :5, 0] = split[..., 5:, 1] = 1
    assert lambda_max(split, all_real(split)).lam.item() == pytest.approx(10 / 2)
    assert lambda_max(attention, all_real(attention)).lam.max() <= 11


def test_lambda_bounds_the_distance_to_equal_rows():
    attention = random_attention(1, 6, 9)
    x = torch.randn(50, 1, 9, 4, generator=torch.Generator().manual_seed(1)).double()
    centre = torch.eye(9).double() - 1 / 9
    grown = (centre @ attention @ x).flatten(2).norm(dim=2) / (centre @ x).flatten(2).norm(dim=2)
    lam = lambda_max(attention, all_real(attention)).lam
    assert (grown**2 <= lam).all()


def test_causal_attention_has_the_eigenvalues_of_its_diagonal():
    n = 60
    attention = random_attention(1, 2, n).tril()
    attention = attention / attention.sum(-1, keepdim=True)
    want = attention.diagonal(dim1=2, dim2=3).sort(-1)[0][..., -2]
    torch.testing.assert_close(second_modulus(attention, all_real(attention)), want)


# -- padding, precision, bad input ----------------------------------------------------------------


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30, -3.0])
@pytest.mark.parametrize("pattern", ["1111100", "0011111", "1011010110"])
def test_padding_has_no_say(garbage, pattern):
    mask = torch.tensor([digit == "1" for digit in pattern])
    attention = random_attention(1, 3, int(mask.sum()))
    want = graph_statistics(attention, all_real(attention))
    found = graph_statistics(with_garbage(attention, mask, garbage), mask[None])
    places = mask.nonzero()[:, 0]
    for name, value in found._asdict().items():
        expected = getattr(want, name)
        if name == "sink_index":
            expected = places[expected]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12, msg=name)


def test_rows_are_renormalised_over_real_keys():
    attention = random_attention(1, 2, 6)
    mask = torch.tensor([[True, True, True, True, False, False]])
    cut = attention[..., :4, :4]
    real = real_attention(attention, mask)
    torch.testing.assert_close(real[..., :4, :4], cut / cut.sum(-1, keepdim=True))
    assert real[..., 4:].count_nonzero() == real[..., 4:, :].count_nonzero() == 0


def test_half_precision_is_promoted():
    attention = random_attention(1, 2, 8).bfloat16()
    found = graph_statistics(attention, all_real(attention))
    want = graph_statistics(attention.double(), all_real(attention))
    for name, value in found._asdict().items():
        assert torch.equal(value, getattr(want, name)), name


def test_texts_without_a_graph_are_nan():
    attention = random_attention(3, 2, 5)
    mask = torch.tensor([[False] * 5, [False, True] + [False] * 3, [True] * 5])
    found = graph_statistics(attention, mask)
    for name in FIELDS:
        value = getattr(found, name)
        assert value[:2].isnan().all(), name
        assert value[2].isfinite().all(), name
    assert found.sink_index is not None
    assert (found.sink_index[:2] == -1).all()


@pytest.mark.parametrize(("bad", "keys"), [(math.nan, [1]), (math.inf, [1]), (0.0, range(5))])
def test_only_the_head_with_a_bad_row_is_nan(bad, keys):
    attention = random_attention(2, 2, 5)
    want = graph_statistics(attention, all_real(attention))
    attention[1, 0, 3, list(keys)] = bad
    found = graph_statistics(attention, all_real(attention))
    for name in FIELDS:
        value, expected = getattr(found, name), getattr(want, name).clone()
        expected[1, 0] = math.nan
        torch.testing.assert_close(value, expected, equal_nan=True, msg=name)


# -- long texts -----------------------------------------------------------------------------------


def long_attention() -> tuple[Tensor, Tensor]:
    """Heads of several kinds over 300 tokens, and their lambda from a decomposition."""
    n = 300
    soft, peaky = random_attention(1, 2, n, peak=1), random_attention(1, 2, n, seed=1, peak=4)
    apart = (torch.arange(n)[:, None] - torch.arange(n)).abs().double()
    local = (-apart / 2).softmax(-1)[None, None]
    split = torch.zeros(1, 1, n, n, dtype=torch.float64)
    split[..., ::2, 0] = split[..., 1::2, 9] = 1
    attention = torch.cat([soft, peaky, local, split], 1)
    spread = attention - attention.mean(-2, keepdim=True)
    return attention, torch.linalg.matrix_norm(spread, 2) ** 2


def test_long_texts_have_a_lower_and_an_upper_bound():
    attention, truth = long_attention()
    found = lambda_max(attention, all_real(attention))
    assert not found.lam_exact.any()
    assert (found.lam <= truth * (1 + 1e-12)).all()
    assert (found.lam >= truth * 0.97).all()
    assert (truth <= found.lam_upper).all()
    assert found.lam[0, -1].item() == pytest.approx(150)  # rank one: found at once
    spread = attention - attention.mean(-2, keepdim=True)
    torch.testing.assert_close(found.lam_upper, spread.square().sum((-2, -1)))


def test_a_long_text_does_not_depend_on_its_company():
    attention, _ = long_attention()
    alone = lambda_max(attention, all_real(attention))
    mask = torch.zeros(2, 310, dtype=torch.bool)
    mask[0, 4:304] = mask[1, :20] = True
    batch = torch.full((2, attention.shape[1], 310, 310), math.nan, dtype=torch.float64)
    batch[0, :, 4:304, 4:304] = attention
    batch[1, :, :20, :20] = attention[0, :, :20, :20]
    found = lambda_max(batch, mask)
    assert found.lam_exact.tolist() == [False, True]
    torch.testing.assert_close(found.lam[:1], alone.lam, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.lam_upper[:1], alone.lam_upper)
    assert torch.equal(found.lam_upper[1], found.lam[1])


# -- over many texts ------------------------------------------------------------------------------


def test_the_metric_is_the_mean_over_texts():
    attention = random_attention(5, 2, 7)
    mask = all_real(attention)
    mask[1, 4:] = mask[2, 1:] = mask[3] = False
    attention[4, 1, 2, 2] = math.nan
    metric = AttentionGraph(2)
    size = sum(getattr(metric, state).nbytes for state in metric._defaults)
    for text in range(5):
        metric.update(attention[text : text + 1], mask[text : text + 1])
    found, *counts = metric.compute()
    assert counts == [2, 1, 2, 0]  # counted, left out, skipped, approximate
    want = graph_statistics(attention[:2], mask[:2])
    for name in (*FIELDS, "lam_upper"):
        torch.testing.assert_close(found[name], getattr(want, name).mean(0), msg=name)
    assert want.sink_index is not None
    last = want.sink_index == torch.tensor([[6], [3]])
    torch.testing.assert_close(found["sink_first"], (want.sink_index == 0).double().mean(0))
    torch.testing.assert_close(found["sink_last"], last.double().mean(0))
    assert set(found) == {*FIELDS, "lam_upper", "sink_first", "sink_last"}
    assert sum(getattr(metric, state).nbytes for state in metric._defaults) == size
    together = AttentionGraph(2)
    together.update(attention, mask)
    for name, value in together.compute().means.items():
        torch.testing.assert_close(value, found[name], msg=name)


def test_the_sink_is_first_or_last_among_the_real_tokens():
    attention = torch.zeros(2, 1, 6, 6)
    attention[0, 0, :, 2] = attention[1, 0, :, 4] = 1
    mask = torch.tensor([[False, False, True, True, True, False]] * 2)
    metric = AttentionGraph(1, parts=("sink",))
    metric.update(attention, mask)
    found = metric.compute().means
    assert found["sink_first"].item() == found["sink_last"].item() == 0.5
    assert found["sink_mass"].item() == 1


def test_the_metric_counts_approximate_texts():
    attention, _ = long_attention()
    metric = AttentionGraph(attention.shape[1], parts=("lam",))
    metric.update(attention, all_real(attention))
    metric.update(attention[..., :12, :12], all_real(attention[..., :12, :12]))
    found = metric.compute()
    assert (found.texts, found.approximate) == (2, 1)
    assert (found.means["lam"] <= found.means["lam_upper"]).all()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_the_metric_of_nothing_is_nan():
    found = AttentionGraph(3, parts=("self_mass",)).compute()
    assert found.texts == 0
    assert found.means["self_mass"].shape == (3,)
    assert found.means["self_mass"].isnan().all()


def test_the_metric_names_another_number_of_heads():
    attention = random_attention(1, 2, 4)
    with pytest.raises(ValueError, match="2 heads, not 3"):
        AttentionGraph(3).update(attention, all_real(attention))


def test_the_parts_are_all_there_is():
    assert set(PARTS) == {*FIELDS, "sink"} - {"sink_mass"}
