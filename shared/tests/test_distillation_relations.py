"""The relation losses against published numbers, plain loops, invariants and differences."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.nn import functional as F

from tenfold.distillation import (
    CCLoss,
    CRDLoss,
    LinearEmbed,
    MLPEmbed,
    OtherClassSampler,
    PKTLoss,
    RKDLoss,
    SPLoss,
    Taps,
    crd,
    create_loss,
    loss_class,
    negatives,
)
from tenfold.errors import UserError

REFERENCE = Path(__file__).parent / "reference" / "ickd"
NAMES = ["sp", "cc", "rkd", "pkt", "crd"]
OPTIONS: dict[str, dict[str, Any]] = {
    "cc": {"dim_s": 6, "dim_t": 9},
    "crd": {"dim_s": 6, "dim_t": 9, "n_data": 12, "labels": [0, 1, 2] * 4, "negatives": 7},
}


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return create_loss(name, **OPTIONS.get(name, {})).to(dtype)


def call(name: str, student: Tensor, teacher: Tensor, loss: Any = None) -> Tensor:
    """A loss of vectors, with positions and fixed negatives where it takes them."""
    loss = make(name, student.dtype) if loss is None else loss
    if name != "crd":
        return loss(student, teacher)
    index = torch.arange(len(student))
    others = torch.arange(1, 8).add(index.unsqueeze(1)).remainder(12)
    return loss(student, teacher, index, torch.cat([index.unsqueeze(1), others], 1))


def relative(found: Tensor, expected: np.ndarray | Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    wanted = torch.as_tensor(expected)
    return ((found.detach() - wanted).abs().max() / wanted.abs().max()).item()


# ------------------------------------------------------------------------------ published numbers


@pytest.mark.parametrize(("dtype", "tail", "tolerance"), [("f4", "", 1e-5), ("f8", "64", 1e-9)])
@pytest.mark.parametrize("name", ["sp", "rkd", "pkt"])
def test_published_numbers(name: str, dtype: str, tail: str, tolerance: float) -> None:
    data = np.load(REFERENCE / f"loss_{name}.npz")
    s, t = (torch.from_numpy(data[key].astype(dtype)) for key in ("f_s0", "f_t0"))
    loss = create_loss(name)(s.requires_grad_(), t)
    loss.backward()
    assert s.grad is not None
    assert relative(loss, data["loss" + tail]) <= tolerance
    assert relative(s.grad, data["grad_s" + tail]) <= tolerance


@pytest.mark.parametrize("dense", [0, 16])
def test_crd_equals_the_published_program(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crd, "_DENSE", dense)
    data = np.load(REFERENCE / "loss_crd.npz")
    loss = CRDLoss(6, 9, 20, dim=8, negatives=5)
    before = {key: value for key, value in data.items() if key.startswith("state_before.")}
    state = {key.partition(".")[2]: torch.from_numpy(v) for key, v in before.items()}
    assert state.keys() == loss.state_dict().keys()
    loss.load_state_dict(state)
    index, candidates = (torch.from_numpy(data[key]) for key in ("idx", "contrast_idx"))
    for step in ("call1", "call2"):
        s = torch.from_numpy(data["f_s"]).requires_grad_()
        value = loss(s, torch.from_numpy(data["f_t"]), index, candidates)
        value.backward()
        assert s.grad is not None
        assert relative(value, data[f"loss_{step}"].squeeze()) <= 1e-5
        assert relative(s.grad, data[f"grad_s_{step}"]) <= 1e-5
        if step == "call1":
            for key in data:
                part, _, name = key.partition(".")
                if part == "state_after_call1":
                    assert relative(loss.get_buffer(name), data[key]) <= 1e-5
                elif part == "grad_param_call1":
                    grad = loss.get_parameter(name).grad
                    assert grad is not None
                    assert relative(grad, data[key]) <= 1e-5


# ----------------------------------------------------------------------------------- plain loops


def test_sp_is_the_written_sum() -> None:
    s, t = normal(0, 4, 3, 2, 5), normal(1, 4, 7, 3, 3)

    def similarities(f: np.ndarray) -> np.ndarray:
        g = [[float((a * b).sum()) for b in f] for a in f]
        return np.array([[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in g])

    expected = ((similarities(s.numpy()) - similarities(t.numpy())) ** 2).sum() / 4**2
    assert SPLoss()(s, t).item() == pytest.approx(expected, rel=1e-12)


def test_pkt_is_the_written_sum() -> None:
    s, t = normal(2, 5, 6), normal(3, 5, 4)

    def neighbours(x: np.ndarray) -> np.ndarray:
        unit = [v / (math.sqrt((v * v).sum()) + 1e-7) for v in x]
        rows = [[(float(a @ b) + 1) / 2 for b in unit] for a in unit]
        return np.array([[v / sum(row) for v in row] for row in rows])

    k_s, k_t = neighbours(s.numpy()), neighbours(t.numpy())
    pairs = zip(k_s.flat, k_t.flat, strict=True)
    expected = sum(b * math.log((b + 1e-7) / (a + 1e-7)) for a, b in pairs) / 25
    assert PKTLoss()(s, t).item() == pytest.approx(expected, rel=1e-10)


def test_cc_is_the_written_sum() -> None:
    torch.manual_seed(0)
    loss, s, t = CCLoss(6, 9, dim=4).double(), normal(4, 5, 6), normal(5, 5, 9)
    embedded = []
    for x, linear in ((s, loss.embed_s.linear), (t, loss.embed_t.linear)):
        weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
        embedded.append([weight @ row + bias for row in x.numpy()])
    delta = [np.abs(a - b) for a, b in zip(*embedded, strict=True)]
    expected = sum(float(a @ b) for a, b in pairwise(delta)) / 4
    assert loss(s, t).item() == pytest.approx(expected, rel=1e-12)


def smooth_l1(a: Tensor, b: Tensor) -> Tensor:
    d = (a - b).abs()
    return torch.where(d < 1, d * d / 2, d - 0.5)


def rkd_by_differences(s: Tensor, t: Tensor) -> Tensor:
    """Park et al., with a vector for every pair of images and a loop over every triple."""
    n, distances, angles = len(s), [], []
    for x in (s, t):
        lengths = [
            (x[j] - x[i]).norm() if i != j else x.new_zeros(()) for i in range(n) for j in range(n)
        ]
        d = torch.stack(lengths)
        distances.append(d / d[d > 0].mean())
        u = [[F.normalize(x[j] - x[i], dim=0) for j in range(n)] for i in range(n)]
        triples = [u[i][j] @ u[i][k] for i in range(n) for j in range(n) for k in range(n)]
        angles.append(torch.stack(triples))
    return 25 * smooth_l1(*distances).mean() + 50 * smooth_l1(*angles).mean()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_rkd_from_inner_products_is_rkd_of_differences(
    dtype: torch.dtype, tolerance: float
) -> None:
    # Far from the origin, where inner products alone would lose the differences
    s, t = normal(6, 6, 7) + 50, normal(7, 6, 5)
    exact, found = s.clone().requires_grad_(), s.to(dtype).requires_grad_()
    exact.data.copy_(found.detach())
    teacher = t.to(dtype)
    expected = rkd_by_differences(exact, teacher.double())
    loss = RKDLoss()(found, teacher)
    expected.backward()
    loss.backward()
    assert exact.grad is not None
    assert found.grad is not None
    assert relative(loss.double(), expected.detach()) <= tolerance
    assert relative(found.grad.double(), exact.grad) <= tolerance


def test_rkd_holds_no_vector_for_every_pair() -> None:
    batch, dim, sizes = 8, 500, []
    s, t = normal(8, batch, dim).requires_grad_(), normal(9, batch, dim)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.numel()) or x, lambda x: x
    ):
        RKDLoss()(s, t)
    assert max(sizes) == batch * dim  # the vectors; all pairs would be 32,000 numbers
    assert batch**3 in sizes


def test_crd_is_the_written_sum() -> None:
    torch.manual_seed(0)
    n_data, k, tau = 12, 7, 0.07
    loss = make("crd")
    s, t = normal(10, 3, 6), normal(11, 3, 9)
    e_s, e_t = F.normalize(loss.embed_s(s)).detach(), F.normalize(loss.embed_t(t)).detach()
    memory_1, memory_2 = loss.contrast.memory_v1.clone(), loss.contrast.memory_v2.clone()
    tau = loss.contrast.params[1].item()
    candidates = [[i, *(((i + j) % 12) for j in range(1, 8))] for i in range(3)]
    expected, z = 0.0, []
    for e, memory in ((e_s, memory_2), (e_t, memory_1)):
        scores = [
            [math.exp(float(memory[j] @ e[i]) / tau) for j in candidates[i]] for i in range(3)
        ]
        z.append(sum(map(sum, scores)) / (3 * 8) * n_data)
        for row in scores:
            p, *rest = (v / z[-1] for v in row)
            expected -= math.log(p / (p + k / n_data + 1e-7)) / 3
            for q in rest:
                expected -= math.log((k / n_data) / (q + k / n_data + 1e-7)) / 3
    assert call("crd", s, t, loss).item() == pytest.approx(expected, rel=1e-10)
    assert loss.contrast.params[2:4].tolist() == pytest.approx(z, rel=1e-12)
    for memory, after, e in (
        (memory_1, loss.contrast.memory_v1, e_s),
        (memory_2, loss.contrast.memory_v2, e_t),
    ):
        moved = [0.5 * memory[i] + 0.5 * e[i] for i in range(3)]
        for i in range(3):
            torch.testing.assert_close(after[i], moved[i] / moved[i].norm())
        assert torch.equal(after[3:], memory[3:])


# -------------------------------------------------------------------------------------- invariants


def rotation(seed: int, size: int) -> Tensor:
    return torch.linalg.qr(normal(seed, size, size)).Q


@pytest.mark.parametrize("name", ["sp", "rkd", "pkt"])
def test_relations_see_neither_rotation_nor_scale_nor_order(name: str) -> None:
    loss, s, t = create_loss(name), normal(12, 6, 7), normal(13, 6, 4)
    expected = loss(s, t).item()
    assert loss(s @ rotation(14, 7), t @ rotation(15, 4)).item() == pytest.approx(
        expected, rel=1e-9
    )
    assert loss(3 * s, t / 5).item() == pytest.approx(expected, rel=1e-6)  # eps of 1e-7
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert loss(s[order], t[order]).item() == pytest.approx(expected, rel=1e-9)
    assert expected > 1e-3
    assert loss(2 * t @ rotation(16, 4), t).item() == pytest.approx(0, abs=1e-9)


def test_rkd_sees_no_shift_and_pkt_no_lengths() -> None:
    s, t = normal(17, 6, 7), normal(18, 6, 4)
    rkd, pkt, lengths = RKDLoss(), PKTLoss(), normal(19, 6, 1).exp()
    assert rkd(s + normal(20, 7), t).item() == pytest.approx(rkd(s, t).item(), rel=1e-9)
    assert pkt(s * lengths, t).item() == pytest.approx(pkt(s, t).item(), rel=1e-5)
    assert rkd(s * lengths, t).item() != pytest.approx(rkd(s, t).item(), rel=1e-3)


def test_cc_couples_neighbours_in_the_batch() -> None:
    loss, s, t = make("cc"), normal(21, 5, 6), normal(22, 5, 9)
    assert loss(s.flip(0), t.flip(0)).item() == pytest.approx(loss(s, t).item(), rel=1e-12)
    order = torch.tensor([0, 2, 4, 1, 3])
    assert loss(s[order], t[order]).item() != pytest.approx(loss(s, t).item(), rel=1e-4)


def test_maps_of_any_size_are_compared() -> None:
    s, t = normal(23, 4, 6, 1, 1), normal(24, 4, 9, 1, 1)
    for name in NAMES:
        assert torch.equal(call(name, s, t), call(name, s.flatten(1), t.flatten(1)))
    assert SPLoss()(normal(25, 4, 3, 8, 8), normal(26, 4, 5, 2, 2)).isfinite()


# --------------------------------------------------------------------------------- degenerate input


@pytest.mark.parametrize("name", ["sp", "cc", "rkd", "pkt"])
def test_a_batch_of_one_image_has_no_relations(name: str) -> None:
    s = normal(27, 1, 6).requires_grad_()
    loss = call(name, s, normal(28, 1, 9))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert s.grad is not None
    assert s.grad.abs().max().item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["sp", "rkd", "pkt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_equal_images_have_bounded_gradients(name: str, dtype: torch.dtype, value: float) -> None:
    # Two dead images, or two copies: a division by the eps would give gradients of 1e12 or NaN
    s, t = normal(29, 5, 6).to(dtype), normal(30, 5, 4).to(dtype)
    s[1] = s[3] = value
    usual = s.clone().requires_grad_()
    usual.data[3] = normal(31, 6).to(dtype)
    s.requires_grad_()
    for x in (s, usual):
        create_loss(name)(x, t).backward()
    assert s.grad is not None
    assert usual.grad is not None
    assert s.grad.isfinite().all()
    assert s.grad.abs().max() < 100 * usual.grad.abs().max()


def test_a_collapsed_student_has_a_finite_gradient() -> None:
    for name in NAMES:
        s = torch.full((4, 6), 0.25, requires_grad=True)
        loss = call(name, s, normal(32, 4, 9).float())
        loss.backward()
        assert loss.isfinite(), name
        assert s.grad is not None
        assert s.grad.isfinite().all(), name
        assert s.grad.abs().max() < 1e3, name


# ------------------------------------------------------------------------------ rules for all five


@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_finite_differences(name: str) -> None:
    loss = make(name).eval()  # where crd forgets
    s, t = normal(33, 4, 6).requires_grad_(), normal(34, 4, 9)
    # Z of the first batch is a constant in the gradient, so that it must be fixed before
    if name == "crd":
        loss.contrast.params[2:4] = torch.tensor([30.0, 40.0])
    assert torch.autograd.gradcheck(lambda x: call(name, x, t, loss), (s,))
    for parameter in loss.parameters():
        call(name, s, t, loss).backward()
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_teacher_is_a_constant(name: str) -> None:
    s, t = normal(35, 4, 6).requires_grad_(), normal(36, 4, 9).requires_grad_()
    call(name, s, t).backward()
    assert t.grad is None
    assert s.grad is not None
    assert s.grad.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    s, t = (100 * normal(37, 4, 6)).to(dtype), (100 * normal(38, 4, 9)).to(dtype)
    expected = call(name, s.float(), t.float()).item()
    with torch.autocast("cpu", torch.bfloat16):
        result = call(name, s, t.float(), make(name, torch.float32))
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["cc", "crd"])
def test_adaptors_may_be_kept_in_half_precision(name: str) -> None:
    s, t = normal(39, 4, 6).bfloat16(), normal(40, 4, 9).bfloat16()
    loss = make(name, torch.bfloat16)
    value = call(name, s, t, loss)
    value.backward()
    assert value.item() == pytest.approx(call(name, s.float(), t.float()).item(), rel=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_terms_and_adaptors_come_from_taps(name: str) -> None:
    maps = normal(41, 4, 6, 3, 3), normal(42, 4, 9, 2, 2)
    student, teacher = (Taps(maps=(f,), pooled=f.mean((2, 3))) for f in maps)
    needed = {"n_data": 12, "labels": [0, 1, 2] * 4} if name == "crd" else {}
    torch.manual_seed(0)
    loss = loss_class(name).for_taps(student, teacher, **needed).double()
    terms = loss.terms(student, teacher, {"index": torch.arange(4), "label": torch.zeros(4)})
    assert list(terms) == [name]
    assert terms[name].ndim == 0
    assert terms[name].isfinite()
    if name not in ("cc", "crd"):
        both = [x.signal("deepest" if name == "sp" else "pooled") for x in (student, teacher)]
        torch.testing.assert_close(terms[name], loss(*both))
    else:
        assert loss.embed_s.linear.weight.shape == (128, 6)
        assert loss.embed_t.linear.weight.shape == (128, 9)


@pytest.mark.parametrize("name", NAMES)
def test_batches_must_agree(name: str) -> None:
    message = rf"{name} met features of different batches: student \(4, 6\), teacher \(3, 9\)"
    with pytest.raises(UserError, match=message):
        call(name, normal(43, 4, 6), normal(44, 3, 9))
    with pytest.raises(UserError, match="without entries"):
        call(name, normal(45, 4, 0), normal(46, 4, 9))
    with pytest.raises(UserError, match=r"features of images, \(batch, \.\.\.\)"):
        make(name)(normal(47, 4), normal(48, 4))


@pytest.mark.parametrize("name", ["cc", "crd"])
def test_widths_must_be_those_of_the_embeddings(name: str) -> None:
    with pytest.raises(UserError, match=r"takes 6 features an image, got \(4, 5\)"):
        call(name, normal(49, 4, 5), normal(50, 4, 9))


def test_weights_are_those_of_the_comparison() -> None:
    weights = {name: loss_class(name).default_weight for name in NAMES}
    assert weights == {"sp": 3000, "cc": 0.02, "rkd": 1, "pkt": 30000, "crd": 0.8}
    assert {loss_class(name).default_ce_weight for name in NAMES} == {1.0}


@pytest.mark.parametrize(
    ("embed", "layers"),
    [
        (LinearEmbed(12), 1),
        (LinearEmbed(12, normalize=True), 1),
        (MLPEmbed(12), 2),
        (MLPEmbed(12, normalize=False), 2),
    ],
)
def test_embeddings_flatten_and_project(embed: Callable[..., Tensor], layers: int) -> None:
    assert isinstance(embed, LinearEmbed | MLPEmbed)
    shapes = [tuple(p.shape) for p in embed.parameters() if p.ndim == 2]
    assert shapes == ([(128, 12)] if layers == 1 else [(256, 12), (128, 256)])
    x = normal(51, 3, 3, 2, 2).float()
    linears = [m for m in embed.modules() if isinstance(m, torch.nn.Linear)]
    expected = linears[0](x.reshape(3, 12))
    expected = expected if layers == 1 else linears[1](expected.clamp_min(0))
    if embed.normalize:
        expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(embed(x), expected)


# --------------------------------------------------------------------------------------------- crd


def test_crd_scores_rows_and_the_whole_memory_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for dense in (0, 1000):
        monkeypatch.setattr(crd, "_DENSE", dense)
        loss, s = make("crd"), normal(52, 4, 6).requires_grad_()
        values = [call("crd", s, normal(53, 4, 9), loss) for _ in range(2)]
        torch.stack(values).sum().backward()  # also when the memory has moved on in between
        results.append([*values, s.grad, *(p.grad for p in loss.parameters()), *loss.buffers()])
    torch.testing.assert_close(results[0], results[1])


def test_crd_remembers_in_training_only() -> None:
    loss = make("crd").eval()
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    s, t = normal(54, 4, 6), normal(55, 4, 9)
    first = call("crd", s, t, loss)
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())
    assert loss.contrast.params[2:4].tolist() == [-1, -1]
    torch.testing.assert_close(call("crd", s, t, loss.train()), first)
    z = loss.contrast.params[2:4].clone()
    assert (z > 0).all()
    call("crd", -s, -t, loss)
    assert torch.equal(loss.contrast.params[2:4], z)


def test_crd_resumes_exactly() -> None:
    s, t, index = normal(56, 4, 6), normal(57, 4, 9), torch.tensor([1, 4, 6, 11])

    def steps(loss: CRDLoss, start: int) -> list[float]:
        values = []
        for step in range(start, start + 2):
            torch.manual_seed(step)  # as StepSeed does
            values.append(loss(s, t, index).item())
        return values

    whole, cut = make("crd"), make("crd")
    expected = [*steps(whole, 0), *steps(whole, 2)]
    found, state = steps(cut, 0), cut.state_dict()
    torch.manual_seed(99)
    resumed = create_loss("crd", **OPTIONS["crd"]).double()
    resumed.load_state_dict(state)
    assert [*found, *steps(resumed, 2)] == expected
    assert len(set(expected)) == 4


def test_an_item_that_comes_twice_takes_its_last_place() -> None:
    loss, s, t = make("crd"), normal(58, 3, 6), normal(59, 3, 9)
    old = loss.contrast.memory_v1[5].clone()
    loss(s, t, torch.tensor([5, 2, 5]))
    moved = 0.5 * old + 0.5 * F.normalize(loss.embed_s(s))[2]
    torch.testing.assert_close(loss.contrast.memory_v1[5], F.normalize(moved, dim=0))


def test_crd_draws_the_item_first_and_then_others() -> None:
    loss = make("crd")
    drawn, index = loss._draw(torch.tensor([1, 4, 9])), [1, 4, 9]
    assert drawn.dtype == torch.int32
    assert drawn[:, 0].tolist() == index
    for row, item in zip(drawn.tolist(), index, strict=True):
        assert len(set(row)) == 8
        assert all(other % 3 != item % 3 for other in row[1:])


def test_crd_draws_as_many_as_there_are() -> None:
    labels = [0] * 4 + [1] * 5 + [2]
    loss = CRDLoss(6, 9, 10, labels)
    assert loss.sampler is not None
    assert loss.sampler.count == 5
    assert loss.contrast.params[0].item() == 5
    assert CRDLoss(6, 9, 10, labels, negatives=3).contrast.params[0].item() == 3
    assert CRDLoss(6, 9, 10, labels, negatives=40, sampling="fast").contrast.params[0].item() == 40
    with pytest.raises(UserError, match=r"6 negatives cannot be drawn .* from the 5 items"):
        CRDLoss(6, 9, 10, labels, negatives=6)


def test_crd_tells_what_it_lacks() -> None:
    s, t, index = normal(60, 4, 6), normal(61, 4, 9), torch.arange(4)
    student, teacher = Taps(pooled=s), Taps(pooled=t)
    loss = make("crd")
    with pytest.raises(UserError, match='the loader must give "index"'):
        loss.terms(student, teacher, {"label": index})
    with pytest.raises(UserError, match="draws negatives by class, but has no labels"):
        CRDLoss(6, 9, 12)(s.float(), t.float(), index)
    for missing, kwargs in [("n_data", {"labels": index}), ("labels", {"n_data": 4})]:
        with pytest.raises(UserError, match=f"was not given {missing}:"):
            CRDLoss.for_taps(student, teacher, **kwargs)
    with pytest.raises(UserError, match="was not given n_data and labels"):
        CRDLoss.for_taps(student, teacher)
    with pytest.raises(UserError, match="3 labels for 12 items"):
        CRDLoss(6, 9, 12, [0, 1, 2])
    with pytest.raises(UserError, match="only one class"):
        CRDLoss(6, 9, 3, [7, 7, 7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed": "none"}, "embed must be one of|type hint"),
        ({"sampling": "some"}, "sampling must be one of|type hint"),
        ({"negatives": 0}, "must be positive"),
        ({"n_data": 0}, "must be positive"),
        ({"temperature": 0.0}, "out of range"),
        ({"momentum": 1.0}, "out of range"),
    ],
)
def test_crd_checks_its_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        CRDLoss(**{"dim_s": 6, "dim_t": 9, "n_data": 12, **options})


def test_crd_may_embed_with_two_layers() -> None:
    loss = CRDLoss(6, 9, 12, [0, 1, 2] * 4, embed="mlp", dim=16)
    value = loss(normal(62, 3, 6).float(), normal(63, 3, 9).float(), torch.arange(3))
    value.backward()
    assert isinstance(loss.embed_t, MLPEmbed)
    assert all(p.grad is not None for p in loss.parameters())


# ----------------------------------------------------------------------------------------- sampling


LABELS = [2, 0, 2, 1, 0, 2, 2, 0, 5, 1, 2, 0]


@pytest.mark.parametrize("sampling", ["exact", "fast"])
@pytest.mark.parametrize("keys", [1 << 24, 20])
def test_negatives_are_of_other_classes(
    sampling: Any, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(negatives, "_KEYS", keys)  # the second takes one row at a time
    torch.manual_seed(0)
    sampler = OtherClassSampler(LABELS, 6, sampling)
    index = torch.arange(12).repeat(20)
    drawn = sampler(index)
    assert drawn.shape == (240, 6)
    assert drawn.dtype == torch.int32
    for item, row in zip(index.tolist(), drawn.tolist(), strict=True):
        assert all(LABELS[other] != LABELS[item] for other in row)
        assert sampling == "fast" or len(set(row)) == 6
    for label in set(LABELS):  # all items of all other classes come
        mine = torch.tensor([LABELS[item] == label for item in index.tolist()])
        others = {item for item, other in enumerate(LABELS) if other != label}
        assert set(drawn[mine].flatten().tolist()) == others


@pytest.mark.parametrize("sampling", ["exact", "fast"])
def test_negatives_are_uniform(sampling: Any) -> None:
    torch.manual_seed(1)
    drawn = OtherClassSampler(LABELS, 3, sampling)(torch.full((4000,), 3))
    counts = torch.bincount(drawn.flatten(), minlength=12)
    others = [item for item, label in enumerate(LABELS) if label != 1]
    assert counts.sum() == counts[others].sum()
    assert chisquare(counts[others].numpy()).pvalue > 0.01


def test_exact_pairs_are_as_likely_as_each_other() -> None:
    torch.manual_seed(2)
    sampler = OtherClassSampler([0, 0, 1, 1, 1, 1], 2)
    drawn = sampler(torch.zeros(6000, dtype=torch.long)).sort(1).values
    pairs = torch.bincount(drawn[:, 0] * 6 + drawn[:, 1])
    assert len(pairs.nonzero()) == 6
    assert chisquare(pairs[pairs > 0].numpy()).pvalue > 0.01


def test_exact_may_take_all_others() -> None:
    drawn = OtherClassSampler([0, 0, 1, 1, 2, 2])(torch.arange(6))
    assert drawn.sort(1).values.tolist() == [
        [item for item in range(6) if item // 2 != mine // 2] for mine in range(6)
    ]


def test_items_without_label_are_classes_of_their_own() -> None:
    torch.manual_seed(3)
    labels = [0, -1, 0, -1, 1]
    sampler = OtherClassSampler(torch.tensor(labels), 3)
    drawn = sampler(torch.arange(5).repeat(50)).view(50, 5, 3)
    seen = [set(drawn[:, item].flatten().tolist()) for item in range(5)]
    assert seen == [{1, 3, 4}, {0, 2, 3, 4}, {1, 3, 4}, {0, 1, 2, 4}, {0, 1, 2, 3}]


def test_draws_repeat_with_the_global_seed() -> None:
    sampler = OtherClassSampler(LABELS)
    draws = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        draws.append(sampler(torch.arange(12)).tolist())
    assert draws[0] == draws[1] != draws[2]
    assert not sampler.state_dict()


def test_rkd_tells_near_duplicates_apart_in_float32() -> None:
    # the distance of two images that are nearly the same is a rest of products 10^5 times larger
    x = normal(90, 16, 64).double() * 1.4
    x[1] = x[0] + 1e-2 * normal(91, 64).double()
    found = []
    for dtype in (torch.float64, torch.float32):
        s = x.detach().to(dtype, copy=True).requires_grad_()
        loss = RKDLoss()(s, normal(92, 16, 32).to(dtype))
        loss.backward()
        found.append((loss.detach().double(), s.grad.double()))
    for exact, rough in zip(*found, strict=True):
        assert float((exact - rough).abs().max()) <= 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_crd_counts_in_full_precision_whatever_the_module_is(dtype: torch.dtype) -> None:
    """Z is some thousands times the number of images: float16 ends at 65504."""
    n_data, labels = 50_000, torch.arange(50_000) % 10
    torch.manual_seed(0)
    loss = CRDLoss(6, 9, n_data, labels, negatives=7, sampling="fast")
    again = CRDLoss(6, 9, n_data, labels, negatives=7, sampling="fast")
    again.load_state_dict(loss.state_dict())
    again.to(dtype)
    s, t = normal(50, 4, 6).float(), normal(51, 4, 9).float()
    index = torch.arange(4)
    candidates = torch.cat([index.unsqueeze(1), torch.arange(4, 32).view(4, 7)], 1)
    exact = loss(s, t, index, candidates)
    found = again(s.to(dtype), t.to(dtype), index, candidates)
    assert found.item() == pytest.approx(exact.item(), rel=2e-2)
    assert again.contrast.params.dtype == torch.float32
    torch.testing.assert_close(again.contrast.params, loss.contrast.params, rtol=2e-2, atol=0)


@pytest.mark.parametrize("shape", [(2, 64), (4, 480), (8, 1024)])
def test_pkt_in_float32_keeps_its_digits(shape: tuple[int, int]) -> None:
    """It is the small rest of terms that cancel."""
    s, t = normal(52, *shape), normal(53, *shape)
    exact, found = PKTLoss()(s, t).item(), PKTLoss()(s.float(), t.float())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact, rel=1e-5)


def test_the_hidden_layer_of_the_other_head_follows_its_width() -> None:
    assert MLPEmbed(20).linear1.out_features == 256
    assert MLPEmbed(20, 16).linear1.out_features == 32
    assert MLPEmbed(20, 16, 7).linear1.out_features == 7
