"""Token selection against published arrays, plain loops and the counts of the paper."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.contrastive import (
    info_nce,
    kept_count,
    late_interaction,
    select_tokens,
    selection,
    token_scores,
)

REFERENCE = np.load(Path(__file__).parent / "reference/filip-vl/reference_late_interaction.npz")
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-6)]


def reference(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    array = torch.from_numpy(REFERENCE[name])
    return array.to(dtype) if array.is_floating_point() else array


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        found.double(), expected.double(), atol=tolerance, rtol=10 * tolerance
    )


@pytest.mark.parametrize("impl", ["naive", "tiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_a_quarter_of_the_tokens_is_the_published_quarter(dtype, tolerance, impl):
    raw = [reference(f"{side}_tokens", dtype).requires_grad_() for side in ("image", "text")]
    (v, t), mask = (F.normalize(x, dim=2) for x in raw), reference("text_mask")
    scores = token_scores(v, t, None, mask)
    assert not any(s.requires_grad for s in scores)
    close(scores[0], reference("select_image_score"), tolerance)
    close(scores[1], reference("select_text_score"), tolerance)
    images = select_tokens(v, scores[0], fraction=0.25)
    texts = select_tokens(t, scores[1], mask, fraction=0.25)
    assert torch.equal(images.positions, reference("select_image_index"))
    kept = texts.mask
    assert torch.equal(texts.positions[kept], reference("select_text_index")[kept])
    i2t, t2i = late_interaction(images.tokens, texts.tokens, images.mask, kept, impl=impl)
    close(i2t, reference("select_sim_i2t"), tolerance)
    close(t2i, reference("select_sim_t2i"), tolerance)
    loss = info_nce(i2t, t2i, reference("log_scale", dtype).exp())
    close(loss.detach(), reference("select_loss"), tolerance)
    for found, side in zip(torch.autograd.grad(loss, raw), ("image", "text"), strict=True):
        close(found, reference(f"select_grad_{side}_tokens"), tolerance)


def test_scores_are_maxima_over_the_valid_tokens_of_the_batch(monkeypatch):
    monkeypatch.setattr(selection, "_TILE_IMAGES", 4)
    monkeypatch.setattr(selection, "_TILE_WORDS", 3)
    v, t = normal(0, 3, 5, 4), normal(1, 4, 6, 4)
    v_mask, t_mask = normal(2, 3, 5) < 0.5, normal(3, 4, 6) < 0.5
    v_mask[:, 0] = t_mask[:, 1] = True
    v[~v_mask], t[~t_mask] = torch.nan, torch.inf
    found = token_scores(v, t, v_mask, t_mask)
    for side, (own, own_mask, other, other_mask) in enumerate(
        [(v, v_mask, t, t_mask), (t, t_mask, v, v_mask)]
    ):
        for i in range(own.shape[0]):
            for k in range(own.shape[1]):
                best = max(float(own[i, k] @ word) for word in other[other_mask])
                expected = best if own_mask[i, k] else -math.inf
                assert float(found[side][i, k]) == pytest.approx(expected, abs=1e-12)


def test_scores_of_half_tokens_are_float32_under_autocast_too():
    v, t = normal(0, 3, 5, 4).half(), normal(1, 4, 6, 4).half()
    with torch.autocast("cpu", torch.bfloat16):
        found = token_scores(v, t)
    expected = token_scores(v.float(), t.float())
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("fraction", "length", "count"),
    [(0.25, 49, 12), (0.25, 256, 64), (0.25, 77, 19), (0.25, 3, 1), (1.0, 7, 7), (0.29, 100, 29)],
)
def test_counts_are_the_papers(fraction, length, count):
    assert kept_count(fraction, length) == count


def test_the_best_valid_tokens_come_first_and_short_rows_keep_all_they_have():
    tokens = normal(0, 3, 6, 2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]).bool()
    scores = torch.tensor([[3.0, 9, 1, 9, 5, 7]]).repeat(3, 1)
    kept = select_tokens(tokens, scores, mask, fraction=0.5)
    assert kept.positions[0].tolist() == [1, 3, 5]  # the first of equals first
    assert kept.positions[1, :2].tolist() == [1, 4]
    assert kept.positions[2, :1].tolist() == [0]
    assert kept.mask.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    for row in range(3):
        assert torch.equal(kept.tokens[row], tokens[row, kept.positions[row]])


def test_a_share_of_the_valid_tokens_is_rounded_up_row_by_row():
    mask = torch.arange(12) < torch.tensor([12, 9, 5, 4, 1])[:, None]
    kept = select_tokens(normal(0, 5, 12, 2), normal(1, 5, 12), mask, fraction=0.25, base="valid")
    assert kept.mask.sum(1).tolist() == [3, 3, 2, 1, 1]
    assert kept.tokens.shape == (5, 3, 2)


def test_a_cropped_batch_keeps_as_many_as_the_whole_one():
    tokens, scores = normal(0, 2, 24, 3), normal(1, 2, 24)
    kept = select_tokens(tokens, scores, fraction=0.25, length=77)
    assert kept.tokens.shape[1] == 19
    assert kept.mask.all()
    assert select_tokens(tokens, scores, fraction=0.5, length=77).tokens.shape[1] == 24


def test_all_tokens_are_kept_by_a_share_of_one():
    v, t, mask = normal(0, 3, 5, 4), normal(1, 3, 6, 4), torch.rand(3, 6) < 0.5
    mask[:, 2] = True
    scores = token_scores(v, t, None, mask)
    v_kept = select_tokens(v, scores[0], fraction=1.0)
    t_kept = select_tokens(t, scores[1], mask, fraction=1.0)
    found = late_interaction(v_kept.tokens, t_kept.tokens, v_kept.mask, t_kept.mask)
    for x, y in zip(found, late_interaction(v, t, None, mask), strict=True):
        torch.testing.assert_close(x, y)


def test_chosen_vectors_have_a_gradient_and_others_none():
    tokens = normal(0, 2, 4, 3).requires_grad_()
    scores = normal(1, 2, 4).requires_grad_()
    kept = select_tokens(tokens, scores, fraction=0.5)
    (gradient,) = torch.autograd.grad(kept.tokens.sum(), tokens)
    expected = torch.zeros(2, 4, 3).double()
    for row in range(2):
        expected[row, kept.positions[row]] = 1
    assert torch.equal(gradient, expected)


def test_misfits_are_refused():
    tokens, scores = normal(0, 2, 4, 3), normal(1, 2, 4)
    for fraction in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match="fraction must be in"):
            select_tokens(tokens, scores, fraction=fraction)
    with pytest.raises(ValueError, match=r"scores of shape \(2, 3\)"):
        select_tokens(tokens, scores[:, :3], fraction=0.5)
    with pytest.raises(ValueError, match="no valid token in token row 1"):
        select_tokens(tokens, scores, torch.tensor([[1], [0]]).bool().expand(2, 4), fraction=0.5)
    with pytest.raises(Exception, match=r"base must be|type hint"):
        select_tokens(tokens, scores, fraction=0.5, base="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="width 3, text tokens 2"):
        token_scores(tokens, tokens[..., :2])
