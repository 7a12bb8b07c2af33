"""Similarity of layers against loops in numpy, invariances and closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bert_oversmoothing.diagnostics import similarity
from bert_oversmoothing.diagnostics.similarity import (
    LayerCKA,
    identity_accuracy,
    identity_cosine,
    linear_cka,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related_layers(layers: int = 4, tokens: int = 30, width: int = 6) -> Tensor:
    """Layers that drift away from the first one, off the origin."""
    steps = random(layers, tokens, width, seed=1)
    return random(1, tokens, width) + 3 + 0.7 * steps.cumsum(0)


def cka_in_numpy(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC by its definition, with the centring matrix and the traces."""
    centre = np.eye(len(x)) - 1 / len(x)

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.trace(a @ a.T @ centre @ b @ b.T @ centre))

    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


# -- between layers -------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "width"), [(30, 6), (5, 12), (2, 3)])
@pytest.mark.parametrize("entries", [2**23, 4 * 30 * 7, 1])
def test_cka_is_the_double_loop(tokens, width, entries, monkeypatch):
    monkeypatch.setattr(similarity, "GRAM_ENTRIES", entries)  # bands of all, 7 and single rows
    states = related_layers(4, tokens, width)
    found = linear_cka(states)
    for row in range(4):
        for column in range(4):
            want = cka_in_numpy(states[row].numpy(), states[column].numpy())
            assert found[row, column].item() == pytest.approx(want, abs=1e-12)


def test_cka_is_the_feature_form():
    x, y = (layer - layer.mean(0) for layer in related_layers(2))
    want = (y.T @ x).norm() ** 2 / (x.T @ x).norm() / (y.T @ y).norm()
    assert linear_cka(related_layers(2))[0, 1].item() == pytest.approx(want.item(), abs=1e-12)


def test_cka_knows_no_rotation_scale_or_offset():
    states = related_layers()
    turned = torch.stack(
        [
            scale * layer @ torch.linalg.qr(random(6, 6, seed=seed))[0] + offset
            for layer, scale, offset, seed in zip(
                states, (1.0, -2.0, 1e-3, 1e4), (0.0, 5.0, 1.0, -1e4), range(4), strict=True
            )
        ]
    )
    torch.testing.assert_close(linear_cka(turned), linear_cka(states), rtol=0, atol=1e-9)
    assert linear_cka(torch.stack([states[0], turned[0]])) == pytest.approx(np.ones((2, 2)))


def test_cka_knows_no_order_of_tokens_but_the_same_one():
    states = related_layers()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear_cka(states[:, order]), linear_cka(states))
    broken = linear_cka(torch.stack([states[0], states[0, order]]))
    assert broken[0, 1] < 0.5


def test_cka_of_uncorrelated_columns_is_zero():
    x = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    y = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]])
    assert torch.equal(linear_cka(torch.stack([x, y])), torch.eye(2).double())


def test_a_collapsed_layer_has_no_cka():
    states = related_layers(3)
    states[1] = states[1, 0]  # equal rows whose mean is not exactly their value
    found = linear_cka(states)
    assert found[1].isnan().all()
    assert found[:, 1].isnan().all()
    assert found[0, 2].isfinite()
    with pytest.raises(ValueError, match="no token"):
        linear_cka(states[:, :0])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_the_metric_takes_the_real_tokens_of_all_texts_together():
    states = related_layers(3, 2 * 3 * 5).unflatten(1, (2, 3, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    want = linear_cka(torch.cat([states[:, n][:, mask] for n in range(2)], 1))
    states.masked_fill_(~mask[..., None], math.nan)
    metric = LayerCKA()
    with pytest.raises(ValueError, match="no token"):
        metric.compute()
    for n in range(2):
        metric.update(list(states[:, n]), mask)
    torch.testing.assert_close(metric.compute(), want)
    metric.reset()
    metric.update(tuple(states[:, 0, :1, :3]), mask[:1, :3])  # another length, another batch
    torch.testing.assert_close(metric.compute(), linear_cka(states[:, 0, 0, :3]))


def test_the_metric_computes_from_joined_states():
    states = related_layers(3).unsqueeze(1)
    metric = LayerCKA()
    metric.update(list(states), torch.ones(1, 30, dtype=torch.bool))
    joined = torch.cat(metric.states)
    metric.states = joined  # what an exchange between processes leaves
    torch.testing.assert_close(metric.compute(), linear_cka(states[:, 0]))


# -- with the token's own origin ------------------------------------------------------------------


def identity_in_numpy(h: np.ndarray, origin: np.ndarray) -> tuple[float, float]:
    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))

    n = len(h)
    own = [cosine(h[i], origin[i]) for i in range(n)]
    nearest = [max(range(n), key=lambda j, i=i: cosine(h[i], origin[j])) for i in range(n)]
    return sum(own) / n, sum(i == j for i, j in enumerate(nearest)) / n


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_identity_is_what_loops_find(garbage):
    origin, mask = random(4, 9, 5), torch.ones(4, 9, dtype=torch.bool)
    mask[1, 6:] = mask[2, :3] = mask[3, ::2] = False
    hidden = origin + 1.5 * random(4, 9, 5, seed=1)
    want = [
        identity_in_numpy(hidden[b, mask[b]].numpy(), origin[b, mask[b]].numpy()) for b in range(4)
    ]
    for x in (hidden, origin):
        x.masked_fill_(~mask[..., None], garbage)
    assert identity_cosine(hidden, origin, mask).tolist() == pytest.approx(
        [w[0] for w in want], abs=1e-12
    )
    assert identity_accuracy(hidden, origin, mask).tolist() == pytest.approx(
        [w[1] for w in want], abs=1e-12
    )
    assert 0 < min(w[1] for w in want) < 1


def test_identity_of_the_origin_is_whole():
    origin, mask = random(2, 7, 5).float(), torch.ones(2, 7, dtype=torch.bool)
    scale = torch.arange(1, 8)[:, None]
    for hidden in (origin, scale * origin):
        assert identity_cosine(hidden, origin, mask).tolist() == pytest.approx([1, 1])
        assert identity_accuracy(hidden, origin, mask).tolist() == [1, 1]
    assert identity_cosine(-origin, origin, mask).tolist() == pytest.approx([-1, -1])
    assert identity_accuracy(-origin, origin, mask).tolist() == [0, 0]
    # The positive scale of a whole layer and a rotation of both change nothing.
    hidden = origin + random(2, 7, 5, seed=2).float()
    turn = torch.linalg.qr(random(5, 5))[0].float()
    for measure in (identity_cosine, identity_accuracy):
        torch.testing.assert_close(
            measure(3 * hidden @ turn, origin @ turn, mask), measure(hidden, origin, mask)
        )


def test_collapsed_rows_are_right_by_chance():
    origin, mask = random(1, 7, 5), torch.ones(1, 7, dtype=torch.bool)
    chance = pytest.approx(1 / 7, abs=1e-15)
    collapsed = origin[:, :1].expand_as(origin)
    assert identity_accuracy(collapsed, origin, mask).item() == chance
    assert identity_accuracy(torch.zeros_like(origin), origin, mask).item() == chance
    assert identity_cosine(torch.zeros_like(origin), origin, mask).item() == 0
    assert identity_accuracy(origin, collapsed, mask).item() == chance
    twins = origin.clone()
    twins[0, 5] = twins[0, 2]  # two of seven cannot be told apart
    assert identity_accuracy(twins, twins, mask).item() == pytest.approx(6 / 7)


def test_padding_is_nobody_s_neighbour():
    origin = torch.tensor([[[1.0, 0], [0, 1], [0, 0]]])
    hidden = -torch.tensor([[[0.2, 1], [1, 0.2], [1, 1]]])  # all cosines are negative
    mask = torch.tensor([[True, True, False]])
    assert identity_accuracy(hidden, origin, mask).item() == 1


def test_short_texts_have_no_identity():
    origin = random(3, 4, 5)
    mask = torch.tensor([[False] * 4, [False, True, False, False], [True] * 4])
    for measure in (identity_cosine, identity_accuracy):
        found = measure(origin, origin, mask)
        assert found.isnan().tolist() == [True, True, False]
    origin[2, 1] = math.nan
    for measure in (identity_cosine, identity_accuracy):
        assert measure(origin, origin, mask).isnan().all()
