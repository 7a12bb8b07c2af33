"""The feature losses against published programs, slow sums in float64, and closed forms."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold.distillation import (
    ABLoss,
    ATLoss,
    FeatureMSELoss,
    FitNetLoss,
    FSPLoss,
    KDSVDLoss,
    NSTLoss,
    OFDLoss,
    VIDLoss,
    margin_from_bn,
)
from tenfold.distillation.at import attention_map
from tenfold.distillation.ft import factor_distance
from tenfold.distillation.kdsvd import right_singular_vectors
from tenfold.distillation.nst import _from_channel_products, _from_pixel_kernels
from tenfold.distillation.ofd import margin_from_map, partial_distance
from tenfold.distillation.reviewkd import hierarchical_context
from tenfold.distillation.vid import VIDStage

REFERENCE = Path(__file__).parent / "reference" / "ickd"
Arrays = dict[str, np.ndarray]


def arrays(name: str) -> Arrays:
    with np.load(REFERENCE / f"{name}.npz") as data:
        return dict(data)


def parameters(data: Arrays) -> dict[str, Tensor]:
    prefix = "param."
    return {
        key.removeprefix(prefix): torch.from_numpy(value)
        for key, value in data.items()
        if key.startswith(prefix)
    }


def features(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_close(actual: Tensor | None, expected: Any, tolerance: float) -> None:
    """Equal to a tolerance relative to the largest entry."""
    assert actual is not None
    expected = torch.as_tensor(expected)
    assert actual.dtype == expected.dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def check_against_program(
    data: Arrays, loss: Callable[[list[Tensor], list[Tensor]], Tensor], tail: str
) -> None:
    """Value and gradients of a loss on the stages f_s0, f_s1, ... of a file."""
    dtype, tolerance = (torch.float64, 1e-9) if tail else (torch.float32, 1e-5)
    count = sum(key.startswith("f_s") for key in data)
    student, teacher = (
        [torch.from_numpy(data[f"f_{side}{i}"]).to(dtype) for i in range(count)] for side in "st"
    )
    for map_ in student:
        map_.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert_close(value.detach(), data["loss" + tail], tolerance)
    for i, map_ in enumerate(student):
        key = f"grad_s{i}{tail}" if f"grad_s{i}" in data else f"grad_s{tail}"
        assert_close(map_.grad, data[key], tolerance)


def same_shape_ab(data: Arrays) -> ABLoss:
    shapes = [data[f"f_s{i}"].shape[1:] for i in range(2)]
    return ABLoss(shapes, shapes, margin=data["margin"].item())


def programs_vid(data: Arrays) -> VIDLoss:
    loss = VIDLoss([4], [5], [6])
    loss.stages[0].load_state_dict(parameters(data))
    return loss


PROGRAMS: dict[str, Callable[[Arrays], Any]] = {
    "loss_at": lambda data: ATLoss(),
    "loss_nst": lambda data: NSTLoss(),
    "loss_fsp": lambda data: FSPLoss(),
    "loss_ab": same_shape_ab,
    "loss_vid": programs_vid,
    "loss_ft_factor_p2_1": lambda data: lambda s, t: factor_distance(s[0], t[0]),
    "loss_overhaul_margin_relu": lambda data: (
        lambda s, t: partial_distance(s[0], t[0], torch.from_numpy(data["margin"]))
    ),
}


@pytest.mark.parametrize("tail", ["", "64"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_loss_equals_the_published_program(name: str, tail: str) -> None:
    data = arrays(name)
    loss = PROGRAMS[name](data)
    if tail and isinstance(loss, nn.Module):
        loss.double()
    check_against_program(data, loss, tail)


def test_vid_trains_what_the_published_program_trains() -> None:
    data = arrays("loss_vid")
    stage = VIDStage(4, 5, 6)
    stage.load_state_dict(parameters(data))
    stage(torch.from_numpy(data["f_s0"]), torch.from_numpy(data["f_t0"])).backward()
    gradients = {name: parameter.grad for name, parameter in stage.named_parameters()}
    assert "log_scale" in gradients
    for name, gradient in gradients.items():
        assert_close(gradient, data[f"grad_param.{name}"], 1e-5)


# Slow sums, written anew.


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """A convolution with half padding, entry by entry."""
    out, _, kernel, _ = weight.shape
    pad = kernel // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    size = (x.shape[2] + 2 * pad - kernel) // stride + 1
    result = np.zeros((len(x), out, size, size))
    for b, c, i, j in np.ndindex(*result.shape):
        i0, j0 = i * stride, j * stride
        patch = padded[b, :, i0 : i0 + kernel, j0 : j0 + kernel]
        result[b, c, i, j] = (patch * weight[c]).sum() + bias[c]
    return result


def batch_normed(x: np.ndarray, bn: nn.BatchNorm2d) -> np.ndarray:
    """With the statistics of the batch, as in training."""
    result = np.zeros_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        deviation = math.sqrt(((values - values.mean()) ** 2).mean() + bn.eps)
        result[:, c] = (values - values.mean()) / deviation * bn.weight[c].item()
        result[:, c] += bn.bias[c].item()
    return result


def test_fitnet_is_the_written_sum() -> None:
    torch.manual_seed(0)
    loss = FitNetLoss((2, 4, 4), (3, 2, 2)).double()
    nn.init.uniform_(loss.regressor.bn.weight, 0.5, 2)
    nn.init.normal_(loss.regressor.bn.bias)
    s, t = features(1, 3, 2, 4, 4), features(2, 3, 3, 2, 2)
    conv = loss.regressor.conv
    assert conv.bias is not None
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    lifted = batch_normed(convolved(s.numpy(), weight, bias, 2), loss.regressor.bn)
    expected = ((np.maximum(lifted, 0) - t.numpy()) ** 2).mean()
    assert loss(s, t).item() == pytest.approx(expected, rel=1e-12)


def test_mse_is_the_written_sum() -> None:
    torch.manual_seed(0)
    loss = FeatureMSELoss(3, 5).double()
    s, t = features(3, 2, 3, 4, 4), features(4, 2, 5, 2, 2)
    weight = loss.embed_s.conv2d.weight.detach().numpy()
    lifted = batch_normed(convolved(s.numpy(), weight, np.zeros(5), 1), loss.embed_s.l2norm)
    total = 0.0
    for b, c, i, j in np.ndindex(2, 5, 2, 2):  # the student's map is averaged down by two
        total += (lifted[b, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() - t[b, c, i, j]) ** 2
    assert loss(s, t).item() == pytest.approx(float(total) / (2 * 5 * 4), rel=1e-12)


def test_higher_powers_of_attention_look_at_the_strongest_channel() -> None:
    f = features(5, 2, 4, 3, 3)
    strongest = f.abs().amax(1).flatten(1)
    strongest = strongest / strongest.amax(1, keepdim=True)
    # The mean over four channels is one of them, up to 4^(1/200) = 1.007.
    sharp = attention_map(f, power=200.0).pow(1 / 200)
    torch.testing.assert_close(sharp / sharp.amax(1, keepdim=True), strongest, rtol=0.01, atol=0)


def nst_by_points(s: Tensor, t: Tensor) -> float:
    """Maximum mean discrepancy, pair of points by pair of points."""
    total = 0.0
    for s_b, t_b in zip(s.flatten(2), t.flatten(2), strict=True):
        sides = [[row / row.norm() for row in side] for side in (s_b, t_b)]

        def kernel(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
            pairs = itertools.product(a, b)
            return sum(torch.dot(x, y).item() ** 2 for x, y in pairs) / (len(a) * len(b))

        ours, theirs = sides
        total += kernel(theirs, theirs) + kernel(ours, ours) - 2 * kernel(ours, theirs)
    return total / len(s)


@pytest.mark.parametrize(("channels_s", "channels_t", "size"), [(6, 9, 2), (3, 5, 3), (4, 4, 2)])
def test_both_forms_of_nst_are_the_sum_over_points(
    channels_s: int, channels_t: int, size: int
) -> None:
    s, t = features(6, 2, channels_s, size, size), features(7, 2, channels_t, size, size)
    expected = nst_by_points(s, t)
    assert NSTLoss()(s, t).item() == pytest.approx(expected, rel=1e-12)
    s_hat, t_hat = (nn.functional.normalize(x.flatten(2), dim=2) for x in (s, t))
    s_hat.requires_grad_()
    forms = [form(s_hat, t_hat) for form in (_from_pixel_kernels, _from_channel_products)]
    gradients = [torch.autograd.grad(value, s_hat)[0] for value in forms]
    assert [value.item() for value in forms] == pytest.approx([expected] * 2, rel=1e-12)
    torch.testing.assert_close(*gradients)


def test_nst_builds_no_product_of_channels_for_small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    s, t = features(8, 2, 40, 2, 2).requires_grad_(), features(9, 2, 60, 2, 2)
    with Watch():
        NSTLoss()(s, t).backward()
    assert largest == t.numel()  # the products would have 2·40·40 entries and more
    s, t = features(8, 2, 4, 8, 8).requires_grad_(), features(9, 2, 4, 8, 8)
    with Watch():
        NSTLoss()(s, t).backward()
    assert largest == s.numel()  # and here the kernels 2·64·64


def kdsvd_by_hand(student: list[Tensor], teacher: list[Tensor], k: int) -> float:
    """Eigenvectors of FᵀF by numpy, matched and compared entry by entry; image by image."""

    def eigenvectors(f: Tensor, n: int) -> tuple[np.ndarray, np.ndarray]:
        matrix = f.flatten(1).numpy()  # (channels, pixels)
        values, vectors = np.linalg.eigh(matrix @ matrix.T)
        order = np.argsort(-values)[:n]
        return vectors[:, order], np.sqrt(values[order])

    total = 0.0
    for b in range(len(student[0])):
        before: tuple[np.ndarray, np.ndarray] | None = None
        for f_s, f_t in zip(student, teacher, strict=True):
            v_t, values = eigenvectors(f_t[b], k)
            v_s, _ = eigenvectors(f_s[b], k + 3)
            # An eigenvector has no sign: the teacher's are those of torch's decomposition.
            signed = torch.linalg.svd(f_t[b].flatten(1).T, full_matrices=False)[2][:k].T.numpy()
            v_t = v_t * np.sign((v_t * signed).sum(0))
            weight = values / np.sqrt((values**2).sum())
            ours = np.zeros_like(v_t)
            for j in range(k):
                cosines = v_s.T @ v_t[:, j]
                best = int(np.argmax(np.abs(cosines)))
                ours[:, j] = v_s[:, best] * np.sign(cosines[best]) * weight[j]
            now = ours, v_t * weight
            if before is not None:
                for c, d, j in np.ndindex(len(ours), len(before[0]), k):
                    r_s, r_t = (
                        math.exp(-((new[c, j] - old[d, j]) ** 2) / 8)
                        for new, old in zip(now, before, strict=True)
                    )
                    total += (r_s - r_t) ** 2
            before = now
    return total / len(student[0])


@pytest.mark.parametrize("k", [1, 2])
def test_kdsvd_is_the_written_sum(k: int) -> None:
    shapes_s, shapes_t = [(2, 6, 4, 4), (2, 8, 2, 3), (2, 5, 3, 3)], [(2, 6, 3, 3), (2, 8, 4, 4)]
    shapes_t.append((2, 5, 3, 3))
    student = [features(10 + i, *shape).clamp_min(-0.3) for i, shape in enumerate(shapes_s)]
    teacher = [features(20 + i, *shape).clamp_min(-0.3) for i, shape in enumerate(shapes_t)]
    expected = kdsvd_by_hand(student, teacher, k)
    assert expected > 0
    assert KDSVDLoss(k)(student, teacher).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 16, 6), (3, 5, 9)])
def test_singular_vectors_have_the_gradient_of_torch(shape: tuple[int, int, int]) -> None:
    f, weight = features(30, *shape).requires_grad_(), features(31, 3, shape[2], 4)
    ours = right_singular_vectors(f, 4)[0]
    theirs = torch.linalg.svd(f, full_matrices=False)[2][:, :4].mT
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    gradients = [torch.autograd.grad((v * weight).sum(), f)[0] for v in (ours, theirs)]
    assert_close(gradients[0], gradients[1], 1e-9)


@pytest.mark.parametrize("dead", [2, 6])  # with 3 an arbitrary null vector is compared, too
def test_kdsvd_has_a_gradient_in_spite_of_dead_channels(dead: int) -> None:
    # They make equal singular values, where differentiating torch's decomposition divides 0 by 0.
    loss, teacher = KDSVDLoss(), [features(34 + i, 2, 6, 4, 4).relu() for i in range(2)]
    student = [features(32 + i, 2, 6, 4, 4).relu() for i in range(2)]
    alive = torch.ones(6, 1, 1, dtype=torch.float64)
    alive[:dead] = 0
    student = [(f * alive).requires_grad_() for f in student]
    gradients = torch.autograd.grad(loss(student, teacher), student)
    assert all(gradient.isfinite().all() for gradient in gradients)
    step = [1e-6 * alive * features(36 + i, 2, 6, 4, 4) for i in range(2)]
    further, nearer = (
        loss([f.detach() + sign * d for f, d in zip(student, step, strict=True)], teacher).item()
        for sign in (1, -1)
    )
    slope = sum((g * d).sum().item() for g, d in zip(gradients, step, strict=True))
    assert slope == pytest.approx((further - nearer) / 2, rel=1e-6)
    assert (slope == 0) == (dead == 6)


def ofd_by_hand(s: Tensor, t: Tensor, margins: Tensor, form: str) -> float:
    total = 0.0
    for b, c, i, j in np.ndindex(*s.shape):
        x, y, m = s[b, c, i, j].item(), t[b, c, i, j].item(), margins[c].item()
        if form == "classification":
            total += (x - m) ** 2 * (x > m and y <= m)
            total += (x - y) ** 2 * (x > y and m < y <= 0)
            total += (x - y) ** 2 * (y > 0)
        else:
            y = max(y, m)
            total += (x - y) ** 2 * (x > y or y > 0)
    return total / len(s)


@pytest.mark.parametrize("form", ["classification", "overhaul"])
def test_ofd_is_the_written_sum(form: Any) -> None:
    torch.manual_seed(0)
    margins = [-features(40, 5).abs(), -features(41, 4).abs()]
    loss = OFDLoss([3, 6], margins, form).double()
    student = [features(42, 2, 3, 3, 3), features(43, 2, 6, 2, 2)]
    teacher = [features(44, 2, 5, 3, 3), features(45, 2, 4, 2, 2)]
    terms = []
    for connector, s, t, margin in zip(loss.connectors, student, teacher, margins, strict=True):
        assert isinstance(connector, nn.Sequential)
        conv, bn = connector
        assert isinstance(bn, nn.BatchNorm2d)
        weight = conv.get_parameter("weight").detach().numpy()
        lifted = batch_normed(convolved(s.numpy(), weight, np.zeros(len(weight)), 1), bn)
        terms.append(ofd_by_hand(torch.from_numpy(lifted), t, margin, form))
    expected = terms[0] / (2 if form == "overhaul" else 1) + terms[1]
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_ofd_takes_other_dividers() -> None:
    margins = [-torch.ones(2)] * 6
    assert OFDLoss([2] * 6, margins, "overhaul").dividers == (32, 16, 8, 4, 2, 1)
    loss = OFDLoss([2] * 6, margins, "overhaul", dividers=(8, 4, 2, 1, 1, 16)).double().eval()
    maps = (
        [features(46 + i, 2, 2, 3, 3) for i in range(6)],
        [features(52 + i, 2, 2, 3, 3) for i in range(6)],
    )
    terms = [
        partial_distance(connector(s), t, margin) / divider
        for connector, s, t, margin, divider in zip(
            loss.connectors, *maps, margins, (8, 4, 2, 1, 1, 16), strict=True
        )
    ]
    torch.testing.assert_close(loss(*maps), torch.stack(terms).sum())


def test_margins_equal_the_published_program_and_a_truncated_normal() -> None:
    data = arrays("loss_overhaul_margin_relu")
    weight, bias = (torch.from_numpy(data[key]) for key in ("bn_weight", "bn_bias"))
    assert_close(margin_from_bn(weight, bias), data["margin"], 1e-5)
    weight = torch.tensor([1.5, -0.4, 2.0, 0.5], dtype=torch.float64)
    bias = torch.tensor([0.3, -2.0, 0.0, 1.5], dtype=torch.float64)
    scale = weight.abs().numpy()
    expected = truncnorm.mean(-np.inf, -bias.numpy() / scale, loc=bias.numpy(), scale=scale)
    torch.testing.assert_close(margin_from_bn(weight, bias), torch.from_numpy(expected))


def test_margins_of_constant_channels() -> None:
    weight = torch.zeros(3, requires_grad=True)
    margins = margin_from_bn(weight, torch.tensor([-2.0, 0.0, 2.0]))
    assert margins.tolist() == [-2.0, 0.0, 0.0]
    assert not margins.requires_grad


def test_margins_of_a_map_are_those_of_its_batch_norm() -> None:
    bn = nn.BatchNorm2d(3)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, 0.5, 0.2]))
        bn.bias.copy_(torch.tensor([0.2, -0.3, 1.0]))  # the last one is negative once in 3.5e6
        map_ = bn(features(60, 64, 3, 40, 40).float())
    expected = margin_from_bn(bn.weight, bn.bias)
    torch.testing.assert_close(margin_from_map(map_), expected, rtol=0.02, atol=0)


def pooled_by_hand(f: Tensor, size: int) -> Tensor:
    step = f.shape[2] // size
    rows = [f[:, :, i * step : (i + 1) * step] for i in range(size)]
    cells = [
        [r[:, :, :, j * step : (j + 1) * step].mean((2, 3)) for j in range(size)] for r in rows
    ]
    return torch.stack([torch.stack(row, -1) for row in cells], -2)


def test_hierarchical_context_goes_by_the_height() -> None:
    s, t = features(63, 2, 3, 6, 4), features(64, 2, 3, 6, 4)
    pooled = {k: [F.adaptive_avg_pool2d(f, k) for f in (s, t)] for k in (4, 2, 1)}
    total = F.mse_loss(s, t)
    for weight, (a, b) in zip((0.5, 0.25, 0.125), pooled.values(), strict=True):
        total = total + weight * F.mse_loss(a, b)
    torch.testing.assert_close(hierarchical_context(s, t), total / 1.875)


@pytest.mark.parametrize(
    ("size", "weights"),
    [(8, {4: 0.5, 2: 0.25, 1: 0.125}), (4, {2: 0.5, 1: 0.25}), (2, {1: 0.5}), (1, {})],
)
def test_hierarchical_context_is_the_written_sum(size: int, weights: dict[int, float]) -> None:
    s, t = features(61, 2, 3, size, size), features(62, 2, 3, size, size)
    total = ((s - t) ** 2).mean().item()
    for smaller, weight in weights.items():
        difference = pooled_by_hand(s, smaller) - pooled_by_hand(t, smaller)
        total += weight * (difference**2).mean().item()
    expected = total / (1 + sum(weights.values()))
    assert hierarchical_context(s, t).item() == pytest.approx(expected, rel=1e-12)


def test_a_student_that_no_rule_enlarges_is_compared_at_its_own_size() -> None:
    loss = FitNetLoss((2, 4, 4), (3, 12, 12)).double()
    s, t = features(70, 2, 2, 4, 4), features(71, 2, 3, 12, 12)
    expected = ((loss.regressor(s) - pooled_by_hand(t, 4)) ** 2).mean()
    torch.testing.assert_close(loss(s, t), expected)


def test_vid_starts_at_a_variance_of_five_and_learns_the_residual() -> None:
    loss = VIDLoss([3, 4], [4, 5], variance=5.0).double()
    for stage in loss.stages:
        assert isinstance(stage, VIDStage)
        assert isinstance(stage.log_scale, nn.Parameter)
        torch.testing.assert_close(stage.variance(), torch.full_like(stage.variance(), 5.0))
    stage = loss.stages[0]
    assert isinstance(stage, VIDStage)
    s, t = features(72, 2, 3, 4, 4), features(73, 2, 4, 4, 4)
    residual = ((stage.regressor(s) - t) ** 2).mean((0, 2, 3))
    # The likelihood is greatest where the variance is the mean squared residual of the channel.
    with torch.no_grad():
        stage.log_scale.copy_((residual - 1e-5).expm1().log())
    stage(s, t).backward()
    torch.testing.assert_close(stage.log_scale.grad, torch.zeros_like(residual), atol=1e-12, rtol=0)
