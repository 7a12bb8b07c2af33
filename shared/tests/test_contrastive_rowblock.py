"""InfoNCE from one block of scores: alone it is the plain one; two ranks are filip-vl's tests."""

import pytest
import torch

from tenfold.contrastive import info_nce, rowblock_info_nce


def scores(seed: int, size: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, size, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("several", [False, True])
def test_alone_it_is_the_plain_loss(smoothing: float, several: bool) -> None:
    targets = torch.eye(5) + torch.eye(5).roll(1, 1) if several else None
    found = []
    for loss in (info_nce, rowblock_info_nce):
        leaves = scores(0), scores(1), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        value = loss(*leaves, targets, smoothing)
        value.backward()
        found.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_large_logits_do_not_overflow() -> None:
    x = 1e4 * scores(2).detach()
    assert rowblock_info_nce(x, x, 100.0).isfinite()


def test_what_does_not_fit_is_told() -> None:
    x = scores(3)
    with pytest.raises(ValueError, match=r"blocks \(b, 1 b\)"):
        rowblock_info_nce(x[:3], x[:3], 1.0)
    with pytest.raises(ValueError, match="image 2 has no positive"):
        rowblock_info_nce(x, x, 1.0, torch.eye(5).index_fill(0, torch.tensor([2]), 0))
    with pytest.raises(ValueError, match="text 4 has no positive"):
        rowblock_info_nce(x, x, 1.0, torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 3, 0]), 5))
