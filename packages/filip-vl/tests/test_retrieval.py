"""Ranks against loops over all queries and against torchmetrics, however the work is cut up."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.retrieval import RetrievalHitRate

from filip_vl import retrieval
from filip_vl.model import TokenBatch
from filip_vl.retrieval import (
    Ranks,
    TokenSet,
    fine_recall,
    ranks_of,
    recall_at,
    retrieval_metrics,
    retrieval_ranks,
)


def batch(rows: int, length: int, seed: int, dim: int = 6) -> TokenBatch:
    """Random tokens of which one or more count in every row, not only at the front."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[:, 1] = True
    return TokenBatch(torch.randn(rows, length, dim, generator=generator), mask)


def test_tokens_travel_without_the_rest_of_their_batch():
    """Pickled, as other ranks get them, a row that is a view holds all that it is a view of."""
    tokens = TokenSet([batch(64, 16, 0, dim=64)])
    numbers = sum(row.numel() for row in tokens.rows)
    assert len(pickle.dumps(tokens)) < 2 * 4 * numbers


def s_i2t(image: TokenBatch, text: TokenBatch) -> np.ndarray:
    """Mean over patches of their best word, in float64, one pair at a time."""
    v, t = (x.tokens.double() / x.tokens.double().norm(dim=-1, keepdim=True) for x in (image, text))
    scores = np.zeros((len(v), len(t)))
    for i, j in itertools.product(range(len(v)), range(len(t))):
        products = (v[i, image.mask[i]] @ t[j, text.mask[j]].T).numpy()
        scores[i, j] = np.mean([row.max() for row in products])
    return scores


def rank_by_loops(scores: np.ndarray, positive: np.ndarray) -> list[int]:
    ranks = []
    for row, right in zip(scores, positive, strict=True):
        best = max(s for s, yes in zip(row, right, strict=True) if yes)
        ranks.append(1 + sum(s > best for s, yes in zip(row, right, strict=True) if not yes))
    return ranks


@pytest.fixture(scope="module")
def captioned() -> tuple[TokenBatch, TokenBatch, Tensor]:
    """Seven images and fifteen captions in no order, one to four an image."""
    image = batch(7, 5, 0)
    owner = torch.tensor([3, 0, 6, 6, 1, 2, 4, 5, 0, 3, 3, 1, 6, 6, 2])
    text = batch(15, 4, 1)
    # captions lie near their images, or every query would fail
    text.tokens.add_(0.8 * image.tokens[owner, :4])
    return image, text, owner


@pytest.mark.parametrize(("image_chunk", "text_chunk"), [(64, 1024), (3, 4), (1, 1), (2, 15)])
def test_ranks_are_those_of_loops(captioned, image_chunk, text_chunk):
    image, text, owner = captioned
    ranks = retrieval_ranks(
        TokenSet([image]), TokenSet([text]), owner, image_chunk=image_chunk, text_chunk=text_chunk
    )
    positive = np.arange(7)[:, None] == owner.numpy()
    assert ranks.i2t.tolist() == rank_by_loops(s_i2t(image, text), positive)
    assert ranks.t2i.tolist() == rank_by_loops(s_i2t(text, image), positive.T)
    assert len({*ranks.i2t.tolist()}) > 2


def test_recall_is_torchmetrics_hit_rate(captioned):
    image, text, owner = captioned
    metrics = retrieval_metrics(retrieval_ranks(TokenSet([image]), TokenSet([text]), owner))
    positive = np.arange(7)[:, None] == owner.numpy()
    total = 0.0
    for name, scores, right in (
        ("i2t", s_i2t(image, text), positive),
        ("t2i", s_i2t(text, image), positive.T),
    ):
        query = np.indices(scores.shape)[0]
        for k in (1, 5, 10):
            hits = RetrievalHitRate(top_k=k)
            flat = [torch.from_numpy(x.ravel()) for x in (scores, right, query)]
            want = float(hits(*flat[:2], indexes=flat[2]))
            assert metrics[f"{name}_r{k}"] == pytest.approx(want, abs=1e-6)
            total += want
    assert metrics["rsum"] == pytest.approx(total, abs=1e-5)


def test_groups_may_have_several_images(captioned):
    image, text, owner = captioned
    image_groups = torch.tensor([0, 1, 1, 2, 0, 2, 0])
    text_groups = image_groups[owner]
    ranks = retrieval_ranks(
        TokenSet([image]), TokenSet([text]), text_groups, image_groups, image_chunk=2, text_chunk=4
    )
    positive = image_groups.numpy()[:, None] == text_groups.numpy()
    assert ranks.i2t.tolist() == rank_by_loops(s_i2t(image, text), positive)
    assert ranks.t2i.tolist() == rank_by_loops(s_i2t(text, image), positive.T)


def test_equal_captions_of_other_images_do_no_harm():
    image, text = batch(8, 5, 0), batch(1, 4, 1)
    same = TokenBatch(text.tokens.expand(8, -1, -1), text.mask.expand(8, -1))
    for chunk in (1, 3, 8):
        ranks = retrieval_ranks(
            TokenSet([image]), TokenSet([same]), torch.arange(8), image_chunk=2, text_chunk=chunk
        )
        assert ranks.i2t.tolist() == [1] * 8  # all tie
        assert sorted(ranks.t2i.tolist()) == [*range(1, 9)]


def test_every_pair_of_chunks_is_scored_once(captioned, monkeypatch):
    image, text, owner = captioned
    sizes = []
    late_interaction = retrieval.late_interaction

    def note(v, t, *masks):
        sizes.append(len(v) * len(t))
        return late_interaction(v, t, *masks)

    monkeypatch.setattr(retrieval, "late_interaction", note)
    retrieval_ranks(TokenSet([image]), TokenSet([text]), owner, image_chunk=3, text_chunk=4)
    assert sum(sizes) == 7 * 15
    assert max(sizes) <= 12


def test_a_token_set_keeps_what_counts():
    first, second = batch(3, 5, 0), batch(2, 7, 1)
    kept = TokenSet([first, second], torch.float16)
    assert len(kept) == 5
    assert [len(row) for row in kept.rows] == [
        *first.mask.sum(1).tolist(),
        *second.mask.sum(1).tolist(),
    ]
    tokens, mask = kept.padded(torch.tensor([4, 0]))
    assert tokens.dtype == torch.float16
    assert mask.sum(1).tolist() == [int(second.mask[1].sum()), int(first.mask[0].sum())]
    want = second.normalized()[1, second.mask[1]]
    torch.testing.assert_close(tokens[0, mask[0]].float(), want, atol=1e-3, rtol=0)
    assert not tokens[~mask].any()


def test_a_rank_counts_strictly_better_negatives():
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.1], [0.2, 0.2, 0.2, 0.2], [0.1, 0.2, 0.3, 0.4]])
    positive = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 0]]).bool()
    ranks = ranks_of(scores, positive)
    assert ranks.tolist() == [2, 1, 4]
    assert recall_at(ranks, 1) == pytest.approx(1 / 3)
    assert recall_at(ranks, 2) == pytest.approx(2 / 3)
    perfect = Ranks(torch.ones(4, dtype=torch.int64), torch.ones(9, dtype=torch.int64))
    assert retrieval_metrics(perfect)["rsum"] == 6


def test_queries_without_an_answer_are_told(captioned):
    image, text, owner = captioned
    with pytest.raises(ValueError, match="images that have nothing to find: 3, 6"):
        retrieval_ranks(
            TokenSet([image]), TokenSet([text]), owner.where(owner != 6, 5).where(owner != 3, 5)
        )
    with pytest.raises(ValueError, match="14 text groups for 15 texts"):
        retrieval_ranks(TokenSet([image]), TokenSet([text]), owner[1:])
    with pytest.raises(ValueError, match="queries that have nothing to find: 0"):
        ranks_of(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))


def test_fine_recall_looks_inside_groups_alone():
    image, text = batch(12, 5, 0), batch(12, 4, 1)
    text.tokens.add_(0.5 * image.tokens[:, :4])
    forth, back = s_i2t(image, text), s_i2t(text, image)
    hits = {"i2t_r1": 0, "t2i_r1": 0}
    for first in range(0, 12, 4):
        for row in range(4):
            inside = slice(first, first + 4)
            hits["i2t_r1"] += forth[first + row, inside].argmax() == row
            hits["t2i_r1"] += back[first + row, inside].argmax() == row
    found = fine_recall(image, text, 4)
    assert found == {name: pytest.approx(count / 12) for name, count in hits.items()}
    assert 0 < found["i2t_r1"] < 1
    with pytest.raises(ValueError, match="no groups of 5 pairs"):
        fine_recall(image, text, 5)
