"""InfoNCE against sums of exponentials, torch's cross-entropy and closed forms."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.contrastive import info_nce, soft_targets


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def some_positives(images: int, texts: int) -> Tensor:
    positives = normal(7, images, texts) < -0.5
    positives[torch.arange(images), torch.arange(images) % texts] = True
    positives[torch.arange(texts) % images, torch.arange(texts)] = True
    return positives


def by_sums(i2t: Tensor, t2i: Tensor, scale: float, targets: Tensor, smoothing: float) -> float:
    """The same number, one pair after the other."""
    images, texts = i2t.shape
    total = 0.0
    for i in range(images):
        chances = [math.exp(scale * float(i2t[i, j])) for j in range(texts)]
        hits = [float(targets[i, j]) for j in range(texts)]
        wanted = [(1 - smoothing) * hit / sum(hits) + smoothing / texts for hit in hits]
        pairs = zip(wanted, chances, strict=True)
        total -= sum(w * math.log(c / sum(chances)) for w, c in pairs) / images / 2
    for j in range(texts):
        chances = [math.exp(scale * float(t2i[i, j])) for i in range(images)]
        hits = [float(targets[i, j]) for i in range(images)]
        wanted = [(1 - smoothing) * hit / sum(hits) + smoothing / images for hit in hits]
        pairs = zip(wanted, chances, strict=True)
        total -= sum(w * math.log(c / sum(chances)) for w, c in pairs) / texts / 2
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 2)])
def test_it_is_what_sums_of_exponentials_say(shape, smoothing):
    i2t, t2i, targets = normal(0, *shape), normal(1, *shape), some_positives(*shape)
    expected = by_sums(i2t, t2i, 3.0, targets, smoothing)
    for y in (targets, targets.int(), targets.float()):
        found = info_nce(i2t, t2i, 3.0, y, smoothing)
        assert float(found) == pytest.approx(expected, abs=1e-12)
    if shape == (4, 4):
        found = info_nce(i2t, t2i, 3.0, label_smoothing=smoothing)
        expected = by_sums(i2t, t2i, 3.0, torch.eye(4), smoothing)
        assert float(found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_text_to_image_runs_along_columns(smoothing):
    i2t, t2i, y = normal(0, 5, 5), normal(1, 5, 5), torch.arange(5)
    expected = [
        F.cross_entropy(logits, y, label_smoothing=smoothing) for logits in (i2t * 7, t2i.T * 7)
    ]
    found = info_nce(i2t, t2i, 7.0, label_smoothing=smoothing)
    torch.testing.assert_close(found, (expected[0] + expected[1]) / 2)


def test_its_gradients_are_those_of_differences():
    inputs = normal(0, 3, 4), normal(1, 3, 4), torch.tensor(2.0).double()
    for x in inputs:
        x.requires_grad_()
    targets = some_positives(3, 4)
    assert torch.autograd.gradcheck(lambda a, b, s: info_nce(a, b, s, targets, 0.1), inputs)


def test_closed_forms():
    equal = torch.zeros(8, 8)
    assert float(info_nce(equal, equal, 10.0)) == pytest.approx(math.log(8), abs=1e-6)
    assert float(info_nce(equal[:1, :1], equal[:1, :1], 10.0)) == 0
    sure = 200 * torch.eye(8)
    assert float(info_nce(sure, sure, 100.0)) == 0
    assert float(info_nce(-sure, -sure, 100.0)) == pytest.approx(20000 + math.log(7))


def test_targets_are_shared_among_positives():
    rows, columns = soft_targets(torch.tensor([[1, 1, 0], [0, 1, 1]]))
    torch.testing.assert_close(rows, torch.tensor([[0.5, 0.5, 0], [0, 0.5, 0.5]]))
    torch.testing.assert_close(columns, torch.tensor([[1, 0.5, 0], [0, 0.5, 1]]))


def test_half_scores_are_summed_in_float32():
    i2t, t2i = normal(0, 6, 6).half(), normal(1, 6, 6).half()
    found = info_nce(i2t, t2i, 20.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, info_nce(i2t.float(), t2i.float(), 20.0))


def test_misfits_are_refused():
    s = normal(0, 3, 4)
    with pytest.raises(ValueError, match=r"\(3, 4\), s_t2i \(4, 3\)"):
        info_nce(s, s.T, 1.0)
    with pytest.raises(ValueError, match="3 images and 4 texts are no pairs"):
        info_nce(s, s, 1.0)
    with pytest.raises(ValueError, match=r"targets have shape \(3, 3\)"):
        info_nce(s, s, 1.0, torch.eye(3))
    for smoothing in (-0.1, 1.1):
        with pytest.raises(ValueError, match="label_smoothing"):
            info_nce(s[:, :3], s[:, :3], 1.0, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="no positive for image 1, 2"):
        info_nce(s, s, 1.0, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="no positive for text 3"):
        info_nce(s, s, 1.0, torch.tensor([1, 1, 1, 0]).expand(3, 4))
