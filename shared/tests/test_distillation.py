"""The logit losses against closed forms, finite differences and published programs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation import (
    DistillationLoss,
    KnowledgeDistillation,
    SoftTargetCrossEntropy,
    Taps,
    available_losses,
    create_loss,
    register,
)
from tenfold.distillation.base import check_same_shape
from tenfold.errors import UserError

REFERENCE = Path(__file__).parent / "reference"


def logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def softmax_by_hand(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def test_soft_target_is_the_written_sum() -> None:
    z, t = logits(0, 5, 7), logits(1, 5, 7).softmax(-1)
    rows = [
        -sum(b * math.log(a) for a, b in zip(softmax_by_hand(zr), tr, strict=True))
        for zr, tr in zip(z.tolist(), t.tolist(), strict=True)
    ]
    assert SoftTargetCrossEntropy()(z, t).item() == pytest.approx(sum(rows) / 5, rel=1e-12)


def test_soft_target_equals_the_official_program() -> None:
    data = np.load(REFERENCE / "ds-net-plus" / "losses.npz")
    z = torch.from_numpy(data["logits"])
    t = torch.from_numpy(data["teacher_logits"]).softmax(-1)
    assert SoftTargetCrossEntropy()(z, t).item() == pytest.approx(
        data["soft_target_ce"].item(), rel=1e-5
    )


def test_torch_label_smoothing_equals_the_official_program() -> None:
    # Stage I takes its label smoothing from torch; this is the proof that it is the same thing.
    data = np.load(REFERENCE / "ds-net-plus" / "losses.npz")
    z, y = torch.from_numpy(data["logits"]), torch.from_numpy(data["target"])
    expected = data["label_smoothing_01"].item()
    assert F.cross_entropy(z, y, label_smoothing=0.1).item() == pytest.approx(expected, rel=1e-5)
    # Smoothing is a soft target: 0.9 on the label and 0.1 spread over all eleven classes.
    t = 0.9 * F.one_hot(y, 11).float() + 0.1 / 11
    assert SoftTargetCrossEntropy()(z, t).item() == pytest.approx(expected, rel=1e-5)


def test_soft_target_gradient_is_softmax_minus_target() -> None:
    z, t = logits(2, 4, 6).requires_grad_(), logits(3, 4, 6).softmax(-1)
    SoftTargetCrossEntropy()(z, t).backward()
    torch.testing.assert_close(z.grad, (z.detach().softmax(-1) - t) / 4)


def test_kd_is_the_written_sum() -> None:
    zs, zt, temperature = logits(4, 3, 5), logits(5, 3, 5), 2.5
    total = 0.0
    for s, t in zip(zs.tolist(), zt.tolist(), strict=True):
        ps = softmax_by_hand([v / temperature for v in s])
        pt = softmax_by_hand([v / temperature for v in t])
        total += sum(b * math.log(b / a) for a, b in zip(ps, pt, strict=True))
    loss = KnowledgeDistillation(temperature)(zs, zt).item()
    assert loss == pytest.approx(temperature**2 * total / 3, rel=1e-12)


def test_kd_equals_the_published_program() -> None:
    data = np.load(REFERENCE / "ickd" / "loss_kd_T4.npz")
    kd = KnowledgeDistillation(data["T"].item())
    for dtype, tail, value_tol, grad_tol in [
        (np.float32, "", 1e-5, 1e-4),
        (np.float64, "64", 1e-9, 1e-9),
    ]:
        zs = torch.from_numpy(data["logits_s"].astype(dtype)).requires_grad_()
        loss = kd(zs, torch.from_numpy(data["logits_t"].astype(dtype)))
        loss.backward()
        assert loss.item() == pytest.approx(data["loss" + tail].item(), rel=value_tol)
        expected = torch.from_numpy(data["grad_s" + tail])
        torch.testing.assert_close(
            zs.grad, expected, rtol=0, atol=grad_tol * expected.abs().max().item()
        )


def test_kd_of_a_hot_teacher_matches_centred_logits() -> None:
    # Hinton et al., section 2.1: for large T the gradient is (z_s - z_t) / C, means taken out.
    zs, zt = logits(6, 8, 10, scale=1.0).requires_grad_(), logits(7, 8, 10, scale=1.0)
    KnowledgeDistillation(1e4)(zs, zt).backward()
    difference = (zs - zt).detach()
    expected = (difference - difference.mean(-1, keepdim=True)) / (8 * 10)
    torch.testing.assert_close(zs.grad, expected, rtol=1e-3, atol=1e-6)


def test_kd_is_a_divergence() -> None:
    kd = KnowledgeDistillation(3.0)
    zs, zt = logits(8, 16, 9), logits(9, 16, 9)
    assert kd(zs, zt).item() > 0
    assert kd(zs, zs).item() == pytest.approx(0.0, abs=1e-14)
    # A softmax does not see a constant, nor does a mean see the order of the batch.
    assert kd(zs + 5.0, zt - 3.0).item() == pytest.approx(kd(zs, zt).item(), rel=1e-12)
    order = torch.arange(15, -1, -1)
    assert kd(zs[order], zt[order]).item() == pytest.approx(kd(zs, zt).item(), rel=1e-12)


def test_the_two_losses_differ_by_the_entropy_of_the_target() -> None:
    zs, zt = logits(10, 6, 4), logits(11, 6, 4)
    t = zt.softmax(-1)
    entropy = -(t * t.log()).sum(-1).mean()
    difference = SoftTargetCrossEntropy()(zs, t) - KnowledgeDistillation(1.0)(zs, zt)
    torch.testing.assert_close(difference, entropy)


@pytest.mark.parametrize("name", ["soft_target", "kd"])
def test_gradient_equals_finite_differences(name: str) -> None:
    loss = create_loss(name)
    teacher = logits(12, 3, 4).softmax(-1)
    student = logits(13, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher), (student,))


@pytest.mark.parametrize("name", ["soft_target", "kd"])
def test_teacher_is_a_constant(name: str) -> None:
    student, teacher = logits(14, 3, 4).requires_grad_(), logits(15, 3, 4).requires_grad_()
    create_loss(name)(student, teacher.softmax(-1)).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("name", ["soft_target", "kd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    loss = create_loss(name)
    student = logits(16, 8, 1000).to(dtype)
    teacher = logits(17, 8, 1000).float().softmax(-1)
    result = loss(student, teacher)
    assert result.dtype == torch.float32
    expected = loss(student.double(), teacher.double()).item()
    assert result.item() == pytest.approx(expected, rel=1e-5)


def test_dense_predictions_average_over_all_positions() -> None:
    zs, zt = logits(18, 2, 5, 3, 4), logits(19, 2, 5, 3, 4)
    rows = [z.permute(0, 2, 3, 1).reshape(24, 5) for z in (zs, zt)]
    kd = KnowledgeDistillation(2.0)
    torch.testing.assert_close(kd(zs, zt), kd(*rows))


def test_shapes_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(4, 10\), teacher \(1, 10\)"):
        check_same_shape(torch.zeros(4, 10), torch.zeros(1, 10))
    with pytest.raises(Exception, match=r"shape|type hint"):  # jaxtyping may be first to see it
        KnowledgeDistillation()(torch.zeros(4, 10), torch.zeros(1, 10))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        KnowledgeDistillation(temperature)


def test_registry() -> None:
    assert {"kd", "soft_target"} <= set(available_losses())
    kd = create_loss("kd", temperature=2.0)
    assert isinstance(kd, KnowledgeDistillation)
    assert (kd.name, kd.temperature) == ("kd", 2.0)
    with pytest.raises(UserError, match="did you mean 'soft_target'"):
        create_loss("soft_targets")
    with pytest.raises(ValueError, match=r"'kd' is taken by tenfold\.distillation\.kd"):

        @register("kd")
        class Impostor(SoftTargetCrossEntropy):
            pass


def test_base_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        DistillationLoss()  # pyright: ignore[reportAbstractUsage]


def test_a_class_of_another_module_does_not_take_a_name() -> None:
    foreign = type("KnowledgeDistillation", (KnowledgeDistillation,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match=r"'kd' is taken by tenfold\.distillation\.kd"):
        register("kd")(foreign)
    assert type(create_loss("kd")) is KnowledgeDistillation


def test_a_loss_is_called_with_names_too() -> None:
    zs, zt = logits(22, 4, 6), logits(23, 4, 6)
    kd = KnowledgeDistillation()
    named = kd(student_logits=zs, teacher_logits=zt)
    torch.testing.assert_close(named, kd(zs, zt))
    torch.testing.assert_close(kd(Taps(logits=zs), Taps(logits=zt), {})["kd"], named)


@pytest.mark.parametrize("name", ["soft_target", "kd"])
def test_dense_logits_are_rows_for_a_direct_call_too(name: str) -> None:
    zs, zt = logits(24, 2, 5, 3, 4), logits(25, 2, 5, 3, 4)
    target = zt.softmax(1) if name == "soft_target" else zt
    rows = [z.movedim(1, -1).reshape(-1, 5) for z in (zs, target)]
    torch.testing.assert_close(create_loss(name)(zs, target), create_loss(name)(*rows))


def test_kd_of_a_teacher_that_masks_a_class() -> None:
    zs, zt = logits(26, 4, 6), logits(27, 4, 6)
    zt[:, 2] = -torch.inf
    log_s, p = (zs / 4).log_softmax(1), (zt / 4).softmax(1)
    wanted = sum(
        float(p[b, c] * (p[b, c].log() - log_s[b, c])) for b in range(4) for c in (0, 1, 3, 4, 5)
    )
    assert KnowledgeDistillation()(zs, zt).item() == pytest.approx(4 * wanted, rel=1e-6)


def test_soft_target_takes_the_softmax_of_a_teachers_logits() -> None:
    zs, zt = logits(20, 4, 6), logits(21, 4, 6)
    found = SoftTargetCrossEntropy().terms(Taps(logits=zs), Taps(logits=zt), {})
    wanted = -(zt.softmax(-1) * zs.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(found["soft_target"], wanted)


def test_arguments_that_a_loss_does_not_take_are_told_with_those_that_it_takes() -> None:
    with pytest.raises(UserError, match=r"the loss dkd has .*'bta'.*it takes alpha.*beta.*temper"):
        create_loss("dkd", bta=6)
    with pytest.raises(UserError, match=r"the loss ickd has .*'channels_s'.*it takes channels_s"):
        create_loss("ickd")


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_weights_inside_dkd_are_not_negative(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 0 or more"):
        create_loss("dkd", **{name: -6.0})
