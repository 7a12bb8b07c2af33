import numpy as np
import pytest
import torch
from torch import Tensor

from ickd.diagnostics import (
    ChannelMapFit,
    DiversityMeter,
    Moments,
    cell_distances,
    cell_icc,
    diversity,
    effective_rank,
    fit_channel_map,
    homology_ratio,
    icc_distance,
    mean_icc,
    moments,
)
from tenfold.distillation import ICCLoss
from tenfold.errors import UserError


def maps(*shape: int, seed: int = 0, rank: int = 0) -> Tensor:
    """Correlated channels with means far from zero, as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    look = {"generator": generator, "dtype": torch.float64}
    sources = torch.randn(batch, rank or channels, height, width, **look)
    mix = torch.randn(channels, rank or channels, **look)
    return torch.einsum("cr,brhw->bchw", mix, sources) + 3 * torch.rand(channels, 1, 1, **look)


def rows(x: Tensor) -> np.ndarray:
    """(channels, pixels of all images), in float64."""
    return x.numpy().transpose(1, 0, 2, 3).reshape(x.shape[1], -1)


def rotation(channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(channels, channels, generator=generator).double())[0]


def turned(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("dc,bchw->bdhw", matrix, x)


# -- moments ------------------------------------------------------------------------------------


def test_moments_are_numpys_in_any_batches():
    x = maps(7, 5, 3, 2)
    found, want = moments([x[:1], x[1:4], x[4:]]), rows(x)
    assert found.pixels == want.shape[1] == 42
    np.testing.assert_allclose(found.mean, want.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found.scatter, 41 * np.cov(want), rtol=1e-10)


def test_moments_refuse_other_channels_and_nan():
    counted = Moments()
    counted.update(maps(2, 5, 3, 3))
    with pytest.raises(UserError, match="4 channels after maps of 5"):
        counted.update(maps(2, 4, 3, 3))
    with pytest.raises(UserError, match="NaN or infinite"):
        counted.update(torch.full((1, 5, 2, 2), float("nan")))


# -- effective rank -----------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "rank"), [(6, 0), (12, 4), (40, 0)])
def test_effective_rank_is_that_of_a_direct_svd(channels, rank):
    x = maps(4, channels, 4, 5, rank=rank)
    values = rows(x)
    sigma = np.linalg.svd(values - values.mean(1, keepdims=True), compute_uv=False)
    share = sigma / sigma.sum()
    share = share[share > 1e-9]
    want = np.exp(-(share * np.log(share)).sum())
    assert effective_rank(x) == pytest.approx(want, rel=1e-6)
    assert effective_rank([x[:3], x[3:]]) == pytest.approx(effective_rank(x), rel=1e-9)
    np.testing.assert_allclose(diversity(x).spectrum.numpy()[: len(share)], share, rtol=1e-6)


def test_effective_rank_counts_equal_directions():
    # 8 channels, of which 5 are orthogonal with mean 0 and equal length, and 3 are constant
    waves = torch.fft.fft(torch.eye(16).double()).real[1:6]
    assert effective_rank(
        torch.cat([waves, torch.full((3, 16), 0.7)])[None, :, None]
    ) == pytest.approx(5.0)
    assert effective_rank(waves[:1].repeat(4, 1)[None, :, None]) == pytest.approx(1.0)
    assert effective_rank(torch.full((2, 4, 3, 3), 0.3)) == 0.0


def test_half_precision_is_raised_first():
    x = maps(5, 9, 4, 4).bfloat16()
    assert effective_rank(x) == effective_rank(x.double())
    assert mean_icc(x).dtype == torch.float64


def test_effective_rank_does_not_see_rotations_offsets_and_scale():
    x = maps(5, 9, 4, 4)
    changed = 0.02 * turned(x, rotation(9)) + torch.arange(9).view(-1, 1, 1)
    assert effective_rank(changed) == pytest.approx(effective_rank(x), rel=1e-9)
    stretched = x * torch.tensor([30.0, *([1.0] * 8)]).view(-1, 1, 1)
    assert effective_rank(stretched) < effective_rank(x)


# -- homology -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8])
def test_homology_is_counted_as_numpy_counts(threshold):
    x = maps(6, 10, 3, 3, rank=3)
    table = np.abs(np.corrcoef(rows(x)))
    want = (table > threshold)[~np.eye(10, dtype=bool)].mean()
    assert 0 < want < 1
    assert homology_ratio([x[:2], x[2:]], threshold) == pytest.approx(want)


def test_homology_does_not_see_sign_scale_offset_and_constant_channels():
    x = maps(6, 10, 3, 3, rank=3)
    factor = torch.tensor([-3.0, 0.01, *([1.0] * 8)]).view(-1, 1, 1)
    assert homology_ratio(x * factor - 5) == homology_ratio(x)
    dead = torch.cat([x, torch.full((6, 4, 3, 3), 0.1)], dim=1)
    assert homology_ratio(dead) == homology_ratio(x)
    assert homology_ratio(x[:, :1].repeat(1, 3, 1, 1)) == 1.0
    assert homology_ratio(x[:, :1]) == 0.0
    assert homology_ratio(torch.ones(2, 3, 2, 2)) == 0.0


# -- correlations -------------------------------------------------------------------------------


def slow_icc(x: Tensor, normalize: str) -> np.ndarray:
    """Mean over images, entry by entry."""
    batch, channels = x.shape[:2]
    whole = np.zeros((channels, channels))
    for image in x.numpy().reshape(batch, channels, -1):
        g = np.array([[(a * b).sum() for b in image] for a in image])
        if normalize == "row":
            g = g / np.sqrt((g**2).sum(1))[:, None]
        elif normalize == "frobenius":
            g = g / np.sqrt((g**2).sum())
        elif normalize == "cosine":
            g = g / np.sqrt(np.diag(g))[:, None] / np.sqrt(np.diag(g))[None]
        whole += g / batch
    return whole


@pytest.mark.parametrize("normalize", ["row", "frobenius", "none", "cosine"])
def test_mean_icc_is_the_mean_over_images(normalize):
    x = maps(5, 4, 3, 2)
    want = slow_icc(x, normalize)
    np.testing.assert_allclose(mean_icc([x[:2], x[2:]], normalize), want, rtol=1e-9)
    cells = cell_icc(x, (3, 2), normalize)
    assert cells.shape == (3, 2, 4, 4)
    np.testing.assert_allclose(
        cells[2, 1], slow_icc(x[:, :, 2:, 1:], normalize), rtol=1e-9, atol=1e-12
    )


def test_cosines_are_correlations_and_dead_channels_have_none():
    x = maps(5, 6, 3, 3)
    x[:, 2] = 0
    found = mean_icc(x, "cosine")
    assert torch.equal(found[2], torch.zeros(6).double())
    assert torch.equal(found[:, 2], torch.zeros(6).double())
    alive = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(found.diagonal()[alive], torch.ones(5).double())
    torch.testing.assert_close(found, found.mT)
    assert found.abs().max() <= 1 + 1e-12


# -- the fitted map -----------------------------------------------------------------------------


def test_the_fit_is_numpys_least_squares():
    student, teacher = maps(6, 4, 3, 3), maps(6, 7, 3, 3, seed=1).clamp_min(0)
    found = fit_channel_map([student[:2], student[2:]], [teacher[:2], teacher[2:]])
    design = np.vstack([rows(student), np.ones(54)])
    want, *_ = np.linalg.lstsq(design.T, rows(teacher).T, rcond=None)
    np.testing.assert_allclose(found.weight, want[:-1].T, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found.bias, want[-1], rtol=1e-8, atol=1e-10)
    lifted = found(student)
    np.testing.assert_allclose(rows(lifted), want.T @ design, rtol=1e-8, atol=1e-10)


def test_the_fit_survives_channels_that_are_copies_or_constant():
    student = maps(6, 4, 3, 3)
    doubled = torch.cat([student, student, torch.full((6, 1, 3, 3), 2.0)], dim=1)
    teacher = turned(student, torch.randn(5, 4).double()) + 1
    found = fit_channel_map(doubled, teacher)
    torch.testing.assert_close(found(doubled), teacher, rtol=1e-8, atol=1e-8)
    # of all exact maps the smallest: the copies share their weight
    torch.testing.assert_close(found.weight[:, :4], found.weight[:, 4:8])
    torch.testing.assert_close(found.weight[:, 8], torch.zeros(5).double(), atol=1e-9, rtol=0)


def test_the_fit_averages_the_larger_map():
    teacher = maps(4, 5, 8, 4)
    pooled = teacher.unflatten(3, (2, 2)).unflatten(2, (4, 2)).mean((3, 5))
    student = turned(pooled, rotation(5))
    found = fit_channel_map(student, teacher)
    torch.testing.assert_close(found.weight, rotation(5).mT, rtol=1e-7, atol=1e-8)
    other_way = fit_channel_map(teacher, student)
    torch.testing.assert_close(other_way.weight, rotation(5), rtol=1e-7, atol=1e-8)


def test_the_fit_refuses_what_does_not_belong_together():
    with pytest.raises(UserError, match=r"different batches.*\(3,.*\(2,"):
        fit_channel_map(maps(3, 4, 2, 2), maps(2, 4, 2, 2))
    with pytest.raises(ValueError, match="no map to fit"):
        ChannelMapFit().solve()


# -- distances ----------------------------------------------------------------------------------


def slow_distance(student: Tensor, teacher: Tensor) -> float:
    """Section 3.1: mean over images and rows of the squared row distance."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        a, b = slow_icc(s[None], "row"), slow_icc(t[None], "row")
        total += ((a - b) ** 2).sum() / len(a)
    return total / len(student)


def test_the_distance_is_the_loss_after_the_map():
    teacher, student = maps(6, 5, 4, 4), maps(6, 3, 2, 2, seed=1)
    lift = fit_channel_map(student[:4], teacher[:4])
    want = slow_distance(lift(student[4:]), teacher[4:])
    assert 0 < want < 4
    parts = [[x[4:5], x[5:]] for x in (student, teacher)]
    assert icc_distance(*parts, lift) == pytest.approx(want, rel=1e-9)


def test_the_distance_of_a_map_to_itself_and_to_a_rotated_copy():
    teacher = maps(6, 5, 4, 4)
    assert icc_distance(teacher, teacher) == pytest.approx(0, abs=1e-12)
    student = turned(teacher, rotation(5)) * 3
    assert icc_distance(student, teacher) > 0.1
    lift = fit_channel_map(student[:3], teacher[:3])
    assert icc_distance(student[3:], teacher[3:], lift) == pytest.approx(0, abs=1e-10)


def test_a_trained_embedding_is_a_lift():
    teacher, student = maps(6, 5, 4, 4), maps(6, 3, 4, 4, seed=1)
    loss = ICCLoss(3, 5).double().eval()
    with torch.no_grad():
        want = float(loss(student, teacher))
    assert icc_distance(student, teacher, loss.embed_s) == pytest.approx(want, rel=1e-9)


def test_distances_in_cells_average_to_the_grids_distance():
    teacher, student = maps(6, 5, 9, 7), maps(6, 5, 4, 4, seed=1)
    found = cell_distances([student[:4], student[4:]], [teacher[:4], teacher[4:]], (2, 3))
    assert found.shape == (2, 3)
    want = slow_distance(student[:, :, 2:4, 1:2], teacher[:, :, 4:8, 2:4])
    assert float(found[1, 1]) == pytest.approx(want, rel=1e-9)
    whole = icc_distance(student, teacher, grid=(2, 3))
    assert float(found.mean()) == pytest.approx(whole, rel=1e-9)


def test_distances_refuse_channels_images_and_grids_that_do_not_fit():
    x = maps(2, 4, 3, 3)
    with pytest.raises(UserError, match="3 channels"):
        icc_distance(maps(2, 3, 3, 3), x)
    with pytest.raises(UserError, match="different batches"):
        icc_distance(maps(3, 4, 3, 3), x)
    with pytest.raises(UserError, match="4x4 cells does not fit a map of 3x3"):
        icc_distance(x, x, grid=(4, 4))
    with pytest.raises(UserError, match="NaN"):
        icc_distance(x * float("inf"), x)
    with pytest.raises(ValueError, match="no map to compare"):
        icc_distance([], [])


# -- all of them --------------------------------------------------------------------------------


def test_diversity_is_all_of_it():
    teacher, student = maps(6, 5, 4, 4), maps(6, 3, 2, 2, seed=1)
    student[:3, 1] = 0
    lift = fit_channel_map(student, teacher)
    found = diversity([student[:1], student[1:]], [teacher[:1], teacher[1:]], lift)
    assert (found.images, found.channels) == (6, 3)
    assert found.effective_rank == pytest.approx(effective_rank(student))
    assert found.homology_ratio == homology_ratio(student)
    assert found.dead == pytest.approx(3 / 18)
    torch.testing.assert_close(found.icc, mean_icc(student, "cosine", lift))
    assert found.icc_distance == pytest.approx(icc_distance(student, teacher, lift))
    assert float(found.spectrum.sum()) == pytest.approx(1)
    assert diversity(student).icc_distance is None
    with pytest.raises(ValueError, match="no map to measure"):
        DiversityMeter().result()
