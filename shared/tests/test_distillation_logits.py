"""The logit losses against published numbers, plain loops, scipy, closed forms and differences."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy, pearsonr
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation import (
    DISTLoss,
    DKDLoss,
    KDLogitStdLoss,
    KDMixedLoss,
    KnowledgeDistillation,
    Taps,
    create_loss,
    loss_class,
)
from tenfold.errors import UserError

REFERENCE = Path(__file__).parent / "reference" / "ickd"
NAMES = ["kd_mixed", "dkd", "dist", "kd_logit_std"]
LABELLED = ("kd_mixed", "dkd")


def logits(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def call(name: str, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """A loss of logits, with labels 0, 1, 2, ... where it takes them."""
    more = ()
    if name in LABELLED:
        pixels = [student.shape[0], *student.shape[2:]]
        more = (torch.arange(math.prod(pixels)).remainder(student.shape[1]).view(pixels),)
    return create_loss(name, **options)(student, teacher, *more)


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row - row.max())
    return weights / weights.sum()


# ------------------------------------------------------------------------------ published numbers


@pytest.mark.parametrize(("dtype", "tail", "tolerance"), [("f4", "", 1e-5), ("f8", "64", 1e-9)])
def test_dkd_equals_the_published_program(dtype: str, tail: str, tolerance: float) -> None:
    data = np.load(REFERENCE / "loss_dkd.npz")
    z = torch.from_numpy(data["logits_s"].astype(dtype)).requires_grad_()
    options = {"alpha": "alpha", "beta": "beta", "temperature": "T"}
    dkd = DKDLoss(**{name: data[key].item() for name, key in options.items()})
    target = torch.from_numpy(data["target"])
    loss = dkd(z, torch.from_numpy(data["logits_t"].astype(dtype)), target)
    loss.backward()
    assert loss.item() == pytest.approx(data["loss" + tail].item(), rel=tolerance)
    expected = torch.from_numpy(data["grad_s" + tail])
    torch.testing.assert_close(
        z.grad, expected, rtol=0, atol=tolerance * expected.abs().max().item()
    )


# ----------------------------------------------------------------------------------- plain loops


def test_dkd_is_the_written_sum() -> None:
    zs, zt, y = logits(0, 5, 7), logits(1, 5, 7), [3, 0, 6, 3, 1]
    alpha, beta, t = 0.7, 3.0, 2.5
    total = 0.0
    for row_s, row_t, target in zip(zs.numpy() / t, zt.numpy() / t, y, strict=True):
        p_s, p_t = softmax(row_s)[target], softmax(row_t)[target]
        total += alpha * entropy([p_t, 1 - p_t], [p_s, 1 - p_s])
        others = [np.delete(row, target) for row in (row_t, row_s)]
        total += beta * entropy(*map(softmax, others))
    found = DKDLoss(alpha, beta, t)(zs, zt, torch.tensor(y)).item()
    assert found == pytest.approx(t**2 * total / 5, rel=1e-12)


def test_kd_mixed_is_the_written_sum() -> None:
    zs, zt, y = logits(2, 4, 6), logits(3, 4, 6), [5, 0, 2, 2]
    a, t = 0.3, 3.0
    hard = soft = 0.0
    for row_s, row_t, target in zip(zs.numpy(), zt.numpy(), y, strict=True):
        hard -= math.log(softmax(row_s)[target])
        soft += t**2 * entropy(softmax(row_t / t), softmax(row_s / t))
    found = KDMixedLoss(a, t)(zs, zt, torch.tensor(y)).item()
    assert found == pytest.approx((a * hard + (1 - a) * soft) / 4, rel=1e-12)


@pytest.mark.parametrize("t_squared", [True, False])
def test_kd_logit_std_is_the_written_sum(t_squared: bool) -> None:
    zs, zt, t = logits(4, 5, 8), 7 * logits(5, 5, 8), 2.0
    total = 0.0
    for row_s, row_t in zip(zs.numpy(), zt.numpy(), strict=True):
        s, w = ((row - row.mean()) / (row.std(ddof=1) + 1e-7) for row in (row_s, row_t))
        total += entropy(softmax(w / t), softmax(s / t))
    found = KDLogitStdLoss(t, t_squared=t_squared)(zs, zt).item()
    assert found == pytest.approx((t**2 if t_squared else 1) * total / 5, rel=1e-12)


def test_dist_is_made_of_the_correlations_of_scipy() -> None:
    zs, zt, beta, gamma, tau = logits(6, 5, 7), logits(7, 5, 7), 0.8, 1.7, 2.0
    p, q = (np.stack([softmax(row / tau) for row in z.numpy()]) for z in (zs, zt))
    rows = np.mean([pearsonr(a, b).statistic for a, b in zip(p, q, strict=True)])
    columns = np.mean([pearsonr(a, b).statistic for a, b in zip(p.T, q.T, strict=True)])
    expected = tau**2 * (beta * (1 - rows) + gamma * (1 - columns))
    assert DISTLoss(beta, gamma, tau)(zs, zt).item() == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------ closed forms, invariants


def test_dkd_with_the_weight_of_one_image_is_kd() -> None:
    # The decoupling itself: KD weighs the other classes by what the teacher leaves them.
    zs, zt, y, t = logits(8, 1, 9), logits(9, 1, 9), torch.tensor([4]), 3.0
    left = 1 - (zt / t).softmax(1)[0, 4].item()
    expected = KnowledgeDistillation(t)(zs, zt).item()
    assert DKDLoss(1.0, left, t)(zs, zt, y).item() == pytest.approx(expected, rel=1e-12)


def test_dkd_of_a_certain_student_stays_finite() -> None:
    # In float32 the probability of the rest is 0 here, its logarithm is not
    z = torch.tensor([[300.0, 0.0, 1.0]], requires_grad=True)
    loss = DKDLoss(1.0, 1.0, 1.0)(z, torch.zeros(1, 3), torch.tensor([0]))
    loss.backward()
    rest = [math.e / (1 + math.e), 1 / (1 + math.e)]
    target = entropy([1 / 3, 2 / 3]) * -1 + 2 / 3 * (300 - math.log(1 + math.e))
    assert loss.item() == pytest.approx(target + entropy([0.5, 0.5], rest), rel=1e-6)
    assert z.grad is not None
    assert z.grad[0, 0].item() == pytest.approx(2 / 3, rel=1e-5)  # logits of 300 have 5 digits


def test_kd_mixed_goes_from_distillation_to_cross_entropy() -> None:
    zs, zt, y = logits(10, 6, 5), logits(11, 6, 5), torch.arange(6) % 5
    soft, hard = KnowledgeDistillation(2.0)(zs, zt), F.cross_entropy(zs, y)
    torch.testing.assert_close(KDMixedLoss(0.0, 2.0)(zs, zt, y), soft)
    torch.testing.assert_close(KDMixedLoss(1.0, 2.0)(zs, zt, y), hard)


def test_kd_logit_std_sees_neither_scale_nor_shift() -> None:
    loss, zs, zt = KDLogitStdLoss(2.0), logits(12, 4, 9), logits(13, 4, 9)
    scale, shift = torch.tensor([[0.5], [2.0], [9.0], [1.0]]), logits(14, 4, 1)
    expected = loss(zs, zt).item()
    assert loss(zs * scale + shift, zt / scale - shift).item() == pytest.approx(expected, rel=1e-6)
    assert loss(3 * zt + 1, zt).item() == pytest.approx(0.0, abs=1e-12)


def test_dist_sees_no_affine_change_of_the_probabilities() -> None:
    loss, zs, zt = DISTLoss(), logits(15, 6, 5), logits(16, 6, 5)
    assert loss(zs + logits(17, 6, 1), zt).item() == pytest.approx(loss(zs, zt).item(), rel=1e-12)
    # A teacher mixed with the uniform distribution has the same order in all rows and columns
    softer = (0.3 * zt.softmax(1) + 0.7 / 5).log()
    assert loss(softer, zt).item() == pytest.approx(0.0, abs=1e-13)
    assert loss(zs, softer).item() == pytest.approx(loss(zs, zt).item(), rel=1e-12)
    assert KnowledgeDistillation(1.0)(softer, zt).item() > 0.1
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert loss(zs[order], zt[order]).item() == pytest.approx(loss(zs, zt).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_rows_have_no_gradient(dtype: torch.dtype) -> None:
    # A classifier that starts at zero: a division by its deviation would give 1e7 or NaN
    zt = logits(18, 4, 7).to(dtype)
    for loss, expected in [(DISTLoss(), 2.0), (KDLogitStdLoss(), None)]:
        zs = torch.full((4, 7), 0.3, dtype=dtype, requires_grad=True)
        value = loss(zs, zt)
        value.backward()
        assert expected is None or value.item() == pytest.approx(expected)
        assert zs.grad is not None
        assert zs.grad.abs().max().item() == 0


def test_dist_of_one_image_compares_its_classes_only() -> None:
    zs, zt = logits(19, 1, 7).requires_grad_(), logits(20, 1, 7)
    rho = pearsonr(softmax(zs.detach().numpy()[0]), softmax(zt.numpy()[0])).statistic
    loss = DISTLoss()(zs, zt)
    loss.backward()
    assert loss.item() == pytest.approx((1 - rho) + 1, rel=1e-12)
    assert zs.grad is not None
    assert zs.grad.isfinite().all()


# ----------------------------------------------------------------------------- rules for all four


@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_finite_differences(name: str) -> None:
    zs, zt = logits(21, 4, 5).requires_grad_(), logits(22, 4, 5)
    assert torch.autograd.gradcheck(lambda z: call(name, z, zt), (zs,))


@pytest.mark.parametrize("name", NAMES)
def test_teacher_is_a_constant(name: str) -> None:
    zs, zt = logits(23, 4, 5).requires_grad_(), logits(24, 4, 5).requires_grad_()
    call(name, zs, zt).backward()
    assert zt.grad is None
    assert zs.grad is not None
    assert zs.grad.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    zs, zt = logits(25, 8, 200).to(dtype), logits(26, 8, 200).to(dtype)
    expected = call(name, zs.double(), zt.double()).item()
    with torch.autocast("cpu", torch.bfloat16):
        result = call(name, zs, zt.float())  # a teacher may keep another precision
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_pixel_of_a_dense_prediction_is_a_row(name: str) -> None:
    zs, zt = logits(27, 2, 5, 3, 4), logits(28, 2, 5, 3, 4)
    rows = [z.permute(0, 2, 3, 1).reshape(24, 5) for z in (zs, zt)]
    torch.testing.assert_close(call(name, zs, zt), call(name, *rows))


@pytest.mark.parametrize("name", NAMES)
def test_terms_are_the_loss_of_both_networks_logits(name: str) -> None:
    zs, zt = logits(29, 4, 5), logits(30, 4, 5)
    batch = {"label": torch.arange(4), "index": torch.arange(4)}
    terms = create_loss(name).terms(Taps(logits=zs), Taps(logits=zt), batch)
    assert list(terms) == [name]
    torch.testing.assert_close(terms[name], call(name, zs, zt))


@pytest.mark.parametrize("name", NAMES)
def test_classes_must_agree(name: str) -> None:
    with pytest.raises(Exception, match=r"\(4, 10\), teacher \(4, 9\)|type hint"):
        call(name, torch.zeros(4, 10), torch.zeros(4, 9))
    with pytest.raises(ValueError, match=r"logits are \(batch, classes\) or .* got \(2, 3, 4\)"):
        create_loss(name)(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperature_must_be_positive(name: str, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        create_loss(name, temperature=temperature)


# ----------------------------------------------------------------------------------------- labels


def test_images_without_label_leave_the_cross_entropy() -> None:
    zs, zt = logits(31, 5, 6), logits(32, 5, 6)
    y = torch.tensor([2, -1, 0, -1, 5])
    expected = 0.4 * F.cross_entropy(zs[[0, 2, 4]], y[[0, 2, 4]])
    expected = expected + 0.6 * KnowledgeDistillation(4.0)(zs, zt)
    torch.testing.assert_close(KDMixedLoss(0.4)(zs, zt, y), expected)


def test_a_batch_without_any_label_is_distilled() -> None:
    zs, zt = logits(33, 3, 6).requires_grad_(), logits(34, 3, 6)
    loss = KDMixedLoss(0.4)(zs, zt, torch.full((3,), -1))
    torch.testing.assert_close(loss, 0.6 * KnowledgeDistillation(4.0)(zs, zt))
    loss.backward()
    assert zs.grad is not None
    assert zs.grad.isfinite().all()


def test_dkd_refuses_images_without_label() -> None:
    with pytest.raises(UserError, match="an image has no label"):
        DKDLoss()(logits(35, 3, 4), logits(36, 3, 4), torch.tensor([0, -1, 2]))


def test_dkd_leaves_pixels_without_label_out() -> None:
    """Every mask of Pascal VOC has a boundary of them."""
    zs, zt = logits(38, 2, 5, 3, 4), logits(39, 2, 5, 3, 4)
    y = torch.arange(24).reshape(2, 3, 4) % 5
    y[0, 1], y[1, :, 2] = -1, -1
    rows = [z.movedim(1, -1)[y >= 0] for z in (zs, zt)]
    torch.testing.assert_close(DKDLoss()(zs, zt, y), DKDLoss()(*rows, y[y >= 0]))
    nothing = DKDLoss()(zs.requires_grad_(), zt, torch.full_like(y, -1))
    nothing.backward()
    assert nothing.item() == 0
    assert not zs.grad.any()


@pytest.mark.parametrize("scale", [30.0, 100.0])
def test_dist_of_confident_logits_stays_finite(scale: float) -> None:
    """Columns of classes that nobody chooses are next to nothing; their lengths must not vanish."""
    for seed in range(10):
        torch.manual_seed(seed)
        zs, zt = (torch.randn(16, 100) * scale for _ in range(2))
        loss = DISTLoss()(zs.requires_grad_(), zt)
        loss.backward()
        assert loss.isfinite()
        assert zs.grad.isfinite().all()


def test_dist_has_the_floor_of_torchs_cosine() -> None:
    """Many classes, few images: columns near 1e-8 count as the published program counts them."""
    zs, zt = (5 * logits(k, 3, 1000) for k in (41, 42))
    s, t = zs.softmax(1), zt.softmax(1)
    rows, columns = (
        F.cosine_similarity(*(x - x.mean(d, keepdim=True) for x in (s, t)), dim=d).mean()
        for d in (1, 0)
    )
    assert DISTLoss()(zs, zt).item() == pytest.approx(2 - (rows + columns).item(), rel=1e-12)


@pytest.mark.parametrize("name", LABELLED)
def test_missing_labels_are_told(name: str) -> None:
    z = logits(37, 3, 4)
    with pytest.raises(UserError, match=f"{name} needs the labels of the batch"):
        create_loss(name)(z, z)
    with pytest.raises(UserError, match=f"{name} needs the labels of the batch"):
        create_loss(name).terms(Taps(logits=z), Taps(logits=z), {})
    with pytest.raises(Exception, match=r"met 2 labels for 3 rows|type hint"):
        create_loss(name)(z, z, torch.tensor([0, 1]))


# --------------------------------------------------------------------------------------- defaults


def test_weights_are_those_of_the_comparison() -> None:
    weights = {name: loss_class(name).default_weight for name in ("kd", *NAMES)}
    assert weights == {"kd": 0.9, "kd_mixed": 1, "dkd": 1, "dist": 1, "kd_logit_std": 1}
    beside = {name: loss_class(name).default_ce_weight for name in ("kd", *NAMES)}
    assert beside == {"kd": 0.1, "kd_mixed": 0, "dkd": 1, "dist": 1, "kd_logit_std": 1}


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be in"):
        KDMixedLoss(alpha)


def test_options_are_shown() -> None:
    shown = " ".join(repr(create_loss(name)) for name in NAMES)
    for option in ("alpha=0.1", "beta=8", "gamma=1", "t_squared=True", "temperature=4"):
        assert option in shown
