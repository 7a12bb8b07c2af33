"""Inter-channel correlation against published arrays, plain loops, invariants and differences."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold.distillation import (
    DistillationLoss,
    GridICCLoss,
    ICCLoss,
    Taps,
    available_losses,
    create_loss,
    dead_channels,
    get_loss,
    grid_cells,
    icc_matrix,
    loss_class,
)
from tenfold.errors import UserError

REFERENCE = Path(__file__).parent / "reference" / "ickd"
FORMS = ["direct", "low_memory"]
NORMALIZATIONS: list[dict[str, Any]] = [
    {"normalize": "row"},
    {"normalize": "none"},
    {"normalize": "none", "per_pixel": True},
    {"normalize": "frobenius"},
]
PRECISIONS = [("f4", "", 1e-5), ("f8", "64", 1e-9)]


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def plain(channels: int, **options: Any) -> ICCLoss:
    """The loss without an embedding."""
    return ICCLoss(channels, embed=False, **options)


def value_and_gradient(loss: nn.Module, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    s = s.clone().requires_grad_()
    value = loss(s, t)
    value.backward()
    assert s.grad is not None
    return value.detach(), s.grad


def relative(found: Tensor, expected: np.ndarray | Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    wanted = torch.as_tensor(expected)
    return ((found.detach() - wanted).abs().max() / wanted.abs().max()).item()


# ------------------------------------------------------------------------------- plain loops


def gram_rows(f: Tensor) -> list[list[Tensor]]:
    """G of one map (channels, height, width): a number for every pair of channels."""
    return [[(a * b).sum() for b in f] for a in f]


def length(numbers: list[Tensor]) -> Tensor:
    return torch.stack([n * n for n in numbers]).sum().sqrt()


def is_dead(rows: list[list[Tensor]]) -> list[bool]:
    lengths = [math.sqrt(sum(n.item() ** 2 for n in row)) for row in rows]
    return [norm <= 1e-6 * sum(lengths) / len(lengths) for norm in lengths]


def row_loop(s: Tensor, t: Tensor) -> Tensor:
    """Section 3.1 with the masks of section 11, row by row; of one image, not yet divided."""
    g_s, g_t = gram_rows(s), gram_rows(t)
    total = s.sum() * 0
    for a, b, dead_s, dead_t in zip(g_s, g_t, is_dead(g_s), is_dead(g_t), strict=True):
        if dead_t:
            continue
        if dead_s:
            total = total + 1
            continue
        for x, y in zip(a, b, strict=True):
            total = total + (x / length(a) - y / length(b)) ** 2
    return total


def loop_loss(s: Tensor, t: Tensor, normalize: str, per_pixel: bool = False) -> Tensor:
    batch, channels = s.shape[:2]
    total = s.sum() * 0
    for image_s, image_t in zip(s, t, strict=True):
        if normalize == "row":
            total = total + row_loop(image_s, image_t) / channels
            continue
        flat = [[n for row in gram_rows(f) for n in row] for f in (image_s, image_t)]
        scales: list[Any] = [1.0, 1.0]
        if normalize == "frobenius":
            scales = [length(numbers) for numbers in flat]
        elif per_pixel:
            scales = [f.shape[1] * f.shape[2] for f in (image_s, image_t)]
        for x, y in zip(*flat, strict=True):
            total = total + (x / scales[0] - y / scales[1]) ** 2 / (
                channels**2 if normalize == "none" else 1
            )
    return total / batch


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("options", NORMALIZATIONS)
@pytest.mark.parametrize("size_t", [(2, 3), (4, 2)])
def test_the_loss_is_the_written_sum(form: str, options: dict, size_t: tuple[int, int]) -> None:
    s, t = normal(0, 2, 5, 2, 3), normal(1, 2, 5, *size_t)
    value, gradient = value_and_gradient(plain(5, form=form, **options), s, t)
    leaf = s.clone().requires_grad_()
    expected = loop_loss(leaf, t, **options)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative(gradient, expected_gradient) <= 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_the_row_form_may_be_a_sum(form: str) -> None:
    s, t = normal(2, 3, 6, 2, 2), normal(3, 3, 6, 3, 1)
    mean = plain(6, form=form)(s, t).item()
    assert plain(6, form=form, reduction="sum")(s, t).item() == pytest.approx(6 * mean, rel=1e-14)


# ------------------------------------------------------------------------- published numbers


def published(name: str, dtype: str) -> tuple[Any, Tensor, Tensor]:
    data = np.load(REFERENCE / f"loss_{name}.npz")
    f_s, f_t = (torch.from_numpy(data[key].astype(dtype)) for key in ("f_s", "f_t"))
    return data, f_s, f_t


def embedded_loss(data: Any, dtype: torch.dtype, **options: Any) -> ICCLoss:
    loss = ICCLoss(6, 10, **options)
    mine = {k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.embed_s.")}
    state = {key: torch.from_numpy(value) for key, value in mine.items()}
    assert state.keys() == loss.state_dict().keys()  # the names of the published program
    loss.load_state_dict(state)
    return loss.to(dtype)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize(("dtype", "tail", "tolerance"), PRECISIONS)
def test_cifar_form(form: str, compat: bool, dtype: str, tail: str, tolerance: float) -> None:
    data, f_s, f_t = published("ickd_cifar_train", dtype)
    loss = embedded_loss(data, f_s.dtype, form=form, reference_compat=compat)
    value, gradient = value_and_gradient(loss, f_s, f_t)
    assert relative(value, data["loss" + tail]) <= tolerance
    assert relative(gradient, data["grad_s" + tail]) <= tolerance
    for name, parameter in loss.named_parameters():
        assert parameter.grad is not None
        assert relative(parameter.grad, data[f"grad_param.{name}{tail}"]) <= tolerance
    norm = loss.get_submodule("embed_s.l2norm")
    for statistic in ("running_mean", "running_var"):
        assert relative(norm.get_buffer(statistic), data[f"{statistic}_after"]) <= 1e-5
    assert norm.get_buffer("num_batches_tracked") == 1


def test_cifar_embedding_and_matrices() -> None:
    data, f_s, f_t = published("ickd_cifar_train", "f4")
    embedded = embedded_loss(data, f_s.dtype).embed_s(f_s)
    assert relative(embedded, data["embedded_s"]) <= 1e-5
    assert relative(icc_matrix(embedded), data["icc_s"]) <= 1e-5
    assert relative(icc_matrix(f_t), data["icc_t"]) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "tail", "tolerance"), PRECISIONS)
def test_imagenet_form(form: str, dtype: str, tail: str, tolerance: float) -> None:
    data, f_s, f_t = published("ickd_imagenet", dtype)
    loss = plain(12, form=form, reference_scale="imagenet")
    value, gradient = value_and_gradient(loss, f_s, f_t)
    assert relative(value, data["loss" + tail]) <= tolerance
    assert relative(gradient, data["grad_s" + tail]) <= tolerance
    unscaled = plain(12, form=form)(f_s, f_t)
    assert relative(unscaled, 4 * data["loss" + tail]) <= tolerance


@pytest.mark.parametrize(
    ("form", "compat"), [("direct", False), ("low_memory", False), ("auto", True)]
)
@pytest.mark.parametrize(("dtype", "tail", "tolerance"), PRECISIONS)
def test_grid_form(form: str, compat: bool, dtype: str, tail: str, tolerance: float) -> None:
    data, f_s, f_t = published("ickd_grid_2x4", dtype)
    grid = int(data["n"]), int(data["m"])
    cells = grid_cells(f_s, grid, reference_compat=compat)
    assert np.array_equal(cells.flatten(2).numpy().astype("f4"), data["cells_s"])
    loss = GridICCLoss(6, grid=grid, form=form, cell_reduction="sum", reference_compat=compat)
    value, gradient = value_and_gradient(loss, f_s, f_t)
    scale = 1 if compat else 3  # that program divides by the batch once more
    assert relative(value, scale * data["loss" + tail]) <= tolerance
    assert relative(gradient, scale * data["grad_s" + tail]) <= tolerance


def official(s: Tensor, t: Tensor) -> Tensor:
    """The published programs' formula, rows divided by max(length, 1e-12)."""
    hats = []
    for f in (s.flatten(2), t.flatten(2)):
        g = f @ f.transpose(1, 2)
        hats.append(g / g.norm(dim=2, keepdim=True).clamp_min(1e-12))
    return (hats[0] - hats[1]).square().sum() / (s.shape[0] * s.shape[1])


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("dead", [(), (0,), (1,), (0, 1)])
def test_compat_keeps_the_published_numbers_of_dead_rows(form: str, dead: tuple[int, ...]) -> None:
    maps = [normal(4, 3, 6, 2, 2), normal(5, 3, 6, 3, 3)]
    for side in dead:
        maps[side][1, 2] = 0
    s, t = maps
    value, gradient = value_and_gradient(plain(6, form=form, reference_compat=True), s, t)
    leaf = s.clone().requires_grad_()
    expected = official(leaf, t)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative(gradient, expected_gradient) <= 1e-12
    if 0 in dead and 1 not in dead:
        assert gradient.abs().max() > 1e9  # what the masks spare us
    if dead == (1,):
        kept = plain(6, form=form)(s, t)  # whose dead teacher's row counts 1 there, nothing here
        assert value.item() - kept.item() == pytest.approx(1 / 18, rel=1e-10)


# ------------------------------------------------------------------------------ the two forms


@pytest.mark.parametrize("options", NORMALIZATIONS)
@pytest.mark.parametrize("sizes", [((4, 4), (4, 4)), ((5, 3), (2, 2)), ((1, 2), (3, 7))])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_both_forms_are_one_function(
    options: dict, sizes: Any, dtype: torch.dtype, tolerance: float
) -> None:
    s, t = (normal(6 + n, 3, 24, *size).to(dtype) for n, size in enumerate(sizes))
    losses = [plain(24, form=form, **options) for form in (*FORMS, "auto")]
    (direct, g_direct), *others = (value_and_gradient(loss, s, t) for loss in losses)
    for value, gradient in others:
        assert relative(value, direct) <= tolerance
        assert relative(gradient, g_direct) <= tolerance


def test_maps_of_one_pixel() -> None:
    # All rows of a matrix of rank one point the same way or the opposite one.
    s, t = normal(8, 3, 24, 1, 1), normal(9, 3, 24, 1, 1)
    sign = (s * t).sign().flatten(1)
    unit = F.normalize(s * s.sign(), dim=1), F.normalize(t * s.sign(), dim=1)
    cosine = (unit[0] * unit[1]).sum(1, keepdim=True).flatten(1)
    expected = (2 - 2 * sign * cosine).mean().item()
    for form in FORMS:
        assert plain(24, form=form)(s, t).item() == pytest.approx(expected, rel=1e-12)


def test_both_forms_agree_through_the_embedding() -> None:
    s, t = normal(8, 3, 4, 2, 3), normal(9, 3, 16, 2, 2)
    results = []
    for form in FORMS:
        torch.manual_seed(0)
        loss = ICCLoss(4, 16, form=form).double()
        value, gradient = value_and_gradient(loss, s, t)
        parts = [gradient, *(p.grad for p in loss.parameters() if p.grad is not None)]
        results.append((value, *parts))
    assert len(results[0]) == 5
    for a, b in zip(*results, strict=True):
        assert relative(a, b) <= 1e-12


def test_equal_maps_are_at_distance_zero() -> None:
    f = normal(10, 2, 8, 3, 3)
    for options in NORMALIZATIONS:
        for form in FORMS:
            value, gradient = value_and_gradient(plain(8, form=form, **options), f, f)
            assert abs(value.item()) <= 1e-12
            assert gradient.abs().max() <= 1e-12


class Sizes(TorchDispatchMode):
    """Notes the shape of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.shapes.append(tuple(result.shape))
        return result


def squares(shapes: list[tuple[int, ...]], channels: int) -> list[tuple[int, ...]]:
    return [shape for shape in shapes if shape.count(channels) >= 2]


def test_the_low_memory_form_never_builds_a_matrix_of_channels() -> None:
    s, t = normal(11, 2, 64, 2, 3), normal(12, 2, 64, 2, 2)
    for options in NORMALIZATIONS:
        for form, expected in (("low_memory", False), ("direct", True), ("auto", False)):
            saved: list[tuple[int, ...]] = []
            leaf = s.clone().requires_grad_()

            def pack(x: Tensor, saved: list = saved) -> Tensor:
                saved.append(tuple(x.shape))
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), Sizes() as computed:
                plain(64, form=form, **options)(leaf, t).backward()
            assert bool(squares(saved, 64)) == bool(squares(computed.shapes, 64)) == expected
            largest = max(math.prod(shape) for shape in [*saved, *computed.shapes])
            assert (largest <= 2 * 64 * 6) == (not expected)


@pytest.mark.parametrize(
    ("sizes", "small"),
    [
        (((2, 4), (2, 4)), True),
        (((3, 3), (2, 2)), False),
        (((2, 2), (3, 3)), False),
        (((4, 4), (4, 4)), False),
    ],
)
def test_auto_is_low_memory_up_to_half_the_channels(sizes: Any, small: bool) -> None:
    s, t = (normal(13 + n, 1, 16, *size) for n, size in enumerate(sizes))
    with Sizes() as computed:
        plain(16)(s, t)
    assert bool([x for x in computed.shapes if x[-2:] == (16, 16)]) != small


def test_auto_looks_at_the_cells_of_a_grid() -> None:
    s, t = normal(15, 1, 32, 8, 8), normal(16, 1, 32, 8, 8)
    with Sizes() as computed:
        plain(32, grid=(2, 2))(s, t)  # cells of 16 pixels
    assert not [x for x in computed.shapes if x[-2:] == (32, 32)]


# ------------------------------------------------------------------------------------- grids


def test_a_grid_is_the_mean_over_its_cells() -> None:
    # 7 x 9 into 2 x 4 cells of 3 x 2: the last row and the last column belong to none.
    s, t = normal(17, 2, 5, 7, 9), normal(18, 2, 5, 4, 5)
    whole = plain(5)
    parts = []
    for row in range(2):
        for column in range(4):
            a = s[:, :, 3 * row : 3 * row + 3, 2 * column : 2 * column + 2]
            b = t[:, :, 2 * row : 2 * row + 2, column : column + 1]
            parts.append(whole(a, b).item())
    for form in FORMS:
        for reduction, expected in (("mean", sum(parts) / 8), ("sum", sum(parts))):
            loss = plain(5, grid=(2, 4), form=form, cell_reduction=reduction)
            value, gradient = value_and_gradient(loss, s, t)
            assert value.item() == pytest.approx(expected, rel=1e-12)
            assert gradient[:, :, 6].abs().max() == 0
            assert gradient[:, :, :, 8].abs().max() == 0


def test_cells_are_exactly_as_many_as_asked_for() -> None:
    f = torch.arange(2 * 1 * 9 * 11.0).view(2, 1, 9, 11)
    cells = grid_cells(f, (4, 4))
    assert cells.shape == (2 * 16, 1, 2, 2)
    assert torch.equal(cells[16 + 4 * 2 + 1, 0], f[1, 0, 4:6, 2:4])  # image 1, row 2, column 1


def test_compat_cuts_on_while_cells_fit() -> None:
    f, g = normal(19, 2, 3, 9, 11), normal(20, 2, 3, 9, 11)
    cells = grid_cells(f, (4, 4), reference_compat=True)
    assert cells.shape == (2 * 4 * 5, 3, 2, 2)
    unfolded = F.unfold(f, 2, stride=2).unflatten(1, (3, 4)).permute(0, 3, 1, 2)
    assert torch.equal(cells.flatten(2), unfolded.flatten(0, 1))
    # the sum over cells and rows, divided by C·B·B
    other = F.unfold(g, 2, stride=2).unflatten(1, (3, 4)).permute(0, 3, 1, 2).flatten(0, 1)
    expected = official(unfolded.flatten(0, 1).unsqueeze(3), other.unsqueeze(3)).item()
    loss = GridICCLoss(3, grid=(4, 4), reference_compat=True)
    assert loss(f, g).item() == pytest.approx(expected * (3 * 40) / (3 * 2 * 2), rel=1e-12)


def test_a_grid_of_one_cell_is_no_grid() -> None:
    s, t = normal(21, 3, 6, 5, 4), normal(22, 3, 6, 3, 3)
    for options in NORMALIZATIONS:
        values = [plain(6, grid=grid, **options)(s, t) for grid in (None, (1, 1))]
        torch.testing.assert_close(values[0], values[1], rtol=1e-14, atol=0)


def test_the_grid_loss_has_no_embedding_and_sixteen_cells_a_side() -> None:
    loss = GridICCLoss(8)
    assert loss.grid == (16, 16)
    assert not list(loss.parameters())
    assert isinstance(loss.embed_s, nn.Identity)
    assert loss.default_weight == 2.0
    assert repr(loss).startswith("GridICCLoss(\n  normalize='row', form='auto', grid=(16, 16)")


# ----------------------------------------------------------------------------- dead channels


def maps_with_dead(dead_s: Any, dead_t: Any, factor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Maps of three images; (image, channel) pairs are multiplied by a factor."""
    s, t = normal(23, 3, 6, 2, 3).relu(), normal(24, 3, 6, 2, 2).relu()
    for f, dead in ((s, dead_s), (t, dead_t)):
        for image, channel in dead:
            f[image, channel] *= factor
    return s, t


EVERY = [(image, channel) for image in range(3) for channel in range(6)]
CASES = {
    "teacher": ([], [(0, 1), (2, 4)]),
    "student": ([(0, 1), (2, 4)], []),
    "both": ([(1, 3)], [(1, 3)]),
    "side by side": ([(1, 3)], [(1, 2), (1, 4)]),
    "all of the teacher": ([], EVERY),
    "all of the student": (EVERY, []),
    "all of one image": (EVERY[:6], EVERY[6:12]),
    "all": (EVERY, EVERY),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("factor", [0.0, 1e-7, 1e-3])
def test_dead_rows(form: str, case: str, factor: float) -> None:
    s, t = maps_with_dead(*CASES[case], factor)
    value, gradient = value_and_gradient(plain(6, form=form), s, t)
    leaf = s.clone().requires_grad_()
    expected = loop_loss(leaf, t, "row")
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    assert value.item() == pytest.approx(expected.item(), rel=1e-11, abs=1e-12)
    scale = max(expected_gradient.abs().max().item(), 1e-3)
    assert (gradient - expected_gradient).abs().max().item() <= 1e-10 * scale


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_dead_rows_count(form: str, dtype: torch.dtype) -> None:
    loss = plain(6, form=form)
    alive, _ = maps_with_dead([], [])
    s, t = alive.to(dtype), torch.zeros(3, 6, 2, 2, dtype=dtype)
    for pair, expected in (((s, t), 0.0), ((s * 0, s), 1.0), ((s * 0, t), 0.0)):
        value, gradient = value_and_gradient(loss, *pair)
        assert value.item() == pytest.approx(expected, abs=1e-6)
        assert torch.equal(gradient, torch.zeros_like(gradient))
    # one row of 18: dead in the teacher it leaves, dead in the student it counts one
    t = s.clone()
    t[0, 1] = 0
    lone = s.clone()
    lone[0, 1] = 0
    rest = loop_loss(lone.double(), s.double(), "row").item()
    assert loss(lone, s).item() == pytest.approx(rest, abs=1e-5)
    assert loss(lone, t).item() == pytest.approx(0.0, abs=1e-6)
    assert rest > 1 / 18


def test_a_dead_channel_can_come_back_to_life() -> None:
    # Its own row has no gradient, but its entries in the rows of living channels have one.
    s, t = maps_with_dead([(0, 1)], [])
    for form in FORMS:
        _, gradient = value_and_gradient(plain(6, form=form), s, t)
        assert 0 < gradient[0, 1].abs().max() < 10


def test_dead_channels_tells_them() -> None:
    for shape in ((6, 2, 2), (6, 4, 4)):
        f = normal(25, 2, *shape)
        f[0, 1] = 0
        f[1, 3] *= 1e-7
        f[1, 4] *= 1e-4
        expected = torch.zeros(2, 6, dtype=torch.bool)
        expected[0, 1] = expected[1, 3] = True
        assert torch.equal(dead_channels(f), expected)
        assert dead_channels(torch.zeros(2, *shape)).all()
        huge = (f[:, 4:] * 3e3).half()
        with torch.autocast("cpu", torch.bfloat16):
            assert not dead_channels(huge).any()


@pytest.mark.parametrize("normalize", ["none", "frobenius"])
@pytest.mark.parametrize("form", FORMS)
def test_maps_of_zeros_in_the_other_forms(normalize: str, form: str) -> None:
    f, zero = normal(26, 2, 5, 2, 2), torch.zeros(2, 5, 3, 3, dtype=torch.float64)
    alone = (icc_matrix(f, normalize) ** 2).sum().item() / (2 * (25 if normalize == "none" else 1))
    for pair, expected in (((f, zero), alone), ((zero, f), alone), ((zero, zero), 0.0)):
        value, gradient = value_and_gradient(plain(5, normalize=normalize, form=form), *pair)
        assert value.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)
        assert gradient.isfinite().all()
    assert normalize == "none" or alone == pytest.approx(1)


@pytest.mark.parametrize("options", NORMALIZATIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_not_masked(
    options: dict, form: str, number: float, side: int
) -> None:
    maps = [normal(27, 2, 6, 2, 2), normal(28, 2, 6, 2, 2)]
    maps[side][1, 2, 0, 1] = number
    assert not plain(6, form=form, **options)(*maps).isfinite()


# -------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("options", NORMALIZATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_what_leaves_the_loss_alone(options: dict, form: str) -> None:
    s, t = normal(29, 3, 6, 2, 4), normal(30, 3, 6, 3, 3)
    loss = plain(6, form=form, **options)
    expected = pytest.approx(loss(s, t).item(), rel=1e-12)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert loss(s[:, order], t[:, order]).item() == expected
    assert loss(s[:, order], t).item() != expected
    shuffled = s.flatten(2)[:, :, torch.tensor([7, 1, 4, 0, 2, 6, 5, 3])].view_as(s)
    assert loss(shuffled, t.transpose(2, 3).flip(3)).item() == expected
    assert loss(s.view(3, 6, 4, 2), t.view(3, 6, 1, 9)).item() == expected
    assert loss(s, t.requires_grad_()).item() == expected
    assert loss(s[[2, 0, 1]], t[[2, 0, 1]]).item() == expected
    assert loss(-s, t).item() == expected
    for scaled in ((s, 7.0 * t), (0.01 * s, t)):
        assert (loss(*scaled).item() == expected) == (options["normalize"] != "none")


@pytest.mark.parametrize("options", [*NORMALIZATIONS, {"grid": (2, 3)}])
def test_the_batch_is_a_mean(options: dict) -> None:
    s, t = normal(31, 5, 4, 4, 6), normal(32, 5, 4, 4, 6)
    for form in FORMS:
        loss = plain(4, form=form, **options)
        alone = [loss(s[n : n + 1], t[n : n + 1]).item() for n in range(5)]
        assert loss(s, t).item() == pytest.approx(sum(alone) / 5, rel=1e-12)
    imagenet = plain(4, reference_scale="imagenet", **options)
    assert imagenet(s, t).item() == pytest.approx(sum(alone) / 25, rel=1e-12)


def test_the_row_form_lies_between_zero_and_four() -> None:
    for seed in range(40):
        s = normal(seed, 2, 3, 1, 1 + seed % 4) * (10.0 ** normal(99 + seed, 1, 3, 1, 1))
        t = normal(seed + 500, 2, 3, 2, 2) ** 3
        for form in FORMS:
            assert -1e-12 <= plain(3, form=form)(s, t).item() <= 4
    # a small channel along a large one, and against it: its row turns round, the other's stays
    s = torch.tensor([0.01, 1.0], dtype=torch.float64).view(1, 2, 1, 1)
    t = s * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)
    for form in FORMS:
        assert plain(2, form=form)(s, t).item() == pytest.approx(4 / 2, rel=1e-3)


def test_the_teacher_is_a_constant() -> None:
    s, t = normal(33, 2, 4, 3, 3).requires_grad_(), normal(34, 2, 4, 3, 3).requires_grad_()
    for form in FORMS:
        plain(4, form=form)(s, t).backward()
    assert s.grad is not None
    assert t.grad is None


@pytest.mark.parametrize("grid", [None, (2, 1)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [*NORMALIZATIONS, {"reference_compat": True}])
def test_gradients(options: dict, form: str, grid: tuple[int, int] | None) -> None:
    s, t = normal(35, 2, 4, 2, 3).requires_grad_(), normal(36, 2, 4, 4, 1)
    loss = plain(4, form=form, grid=grid, **options)
    assert torch.autograd.gradcheck(lambda x: loss(x, t), s)


def test_gradients_of_the_embedding() -> None:
    torch.manual_seed(0)
    s, t = normal(37, 2, 3, 2, 2).requires_grad_(), normal(38, 2, 8, 2, 1)
    for form in FORMS:
        loss = ICCLoss(3, 8, form=form).double()
        weight = loss.embed_s.get_parameter("conv2d.weight")
        inputs = (s, weight.detach().clone().requires_grad_())

        def embedded(x: Tensor, w: Tensor, loss: ICCLoss = loss) -> Tensor:
            return torch.func.functional_call(loss, {"embed_s.conv2d.weight": w}, (x, t))

        assert torch.autograd.gradcheck(embedded, inputs)


# --------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("options", [*NORMALIZATIONS, {"reference_compat": True}])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_that_half_precision_cannot_hold(options: dict, form: str, dtype: torch.dtype) -> None:
    s, t = (300 * normal(39 + n, 2, 5, 6, 6) for n in range(2))
    assert (s.square().sum((2, 3)) > 65504).all()
    s, t = s.to(dtype), t.to(dtype)
    loss = plain(5, form=form, **options)
    expected, expected_gradient = value_and_gradient(loss, s.float(), t.float())
    assert expected.isfinite()
    for autocast, teacher in ((False, t), (True, t), (True, t.float())):
        leaf = s.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast):
            value = loss(leaf, teacher)
        value.backward()
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, expected_gradient.to(dtype), rtol=1e-2, atol=1e-7)


def test_matrices_are_full_precision_under_autocast() -> None:
    f = (300 * normal(41, 2, 5, 6, 6)).half()
    with torch.autocast("cpu", torch.float16):
        for normalize in ("row", "none", "frobenius"):
            found = icc_matrix(f, normalize)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, icc_matrix(f.float(), normalize))


def test_the_frobenius_form_holds_large_maps() -> None:
    # |G_s|² |G_t|² passes the largest float32 here, neither factor does
    s, t = (3e3 * normal(42 + n, 2, 8, 4, 4) for n in range(2))
    for form in FORMS:
        loss = plain(8, normalize="frobenius", form=form)
        found = loss(s.float(), t.float()).item()
        assert found == pytest.approx(loss(s, t).item(), rel=1e-5)


def test_an_embedding_under_autocast() -> None:
    torch.manual_seed(0)
    loss = ICCLoss(4, 6)
    s, t = normal(44, 4, 4, 3, 3).float(), normal(45, 4, 6, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = value_and_gradient(loss, s, t.bfloat16())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(s, t).item(), rel=0.05)
    assert gradient.isfinite().all()


# ------------------------------------------------------------------------------------ matrix


@pytest.mark.parametrize("normalize", ["row", "none", "frobenius"])
def test_icc_matrix_is_the_written_products(normalize: str) -> None:
    f = normal(46, 2, 4, 2, 3)
    f[1, 2] = 0
    for image, found in zip(f, icc_matrix(f, normalize), strict=True):
        rows = [[float(n) for n in row] for row in gram_rows(image)]
        norm = math.sqrt(sum(n * n for row in rows for n in row))
        for row, mine in zip(rows, found.tolist(), strict=True):
            scale = {"none": 1, "frobenius": norm, "row": math.hypot(*row) or 1}[normalize]
            assert mine == pytest.approx([n / scale for n in row], rel=1e-12, abs=1e-15)


# -------------------------------------------------------------------------------- complaints


def test_shapes_that_do_not_fit() -> None:
    loss = plain(4)
    s, t = normal(47, 3, 4, 2, 2), normal(48, 2, 4, 2, 2)
    both = r"student \(3, 4, 2, 2\), teacher \(2, 4, 2, 2\)"
    with pytest.raises(UserError, match=f"ickd met maps of different batches: {both}"):
        loss(s, t)
    with pytest.raises(UserError, match=r"as many channels on both sides.*\(3, 5, 2, 2\)"):
        loss(s, normal(49, 3, 5, 2, 2))
    with pytest.raises(
        UserError, match=r"without an embedding the student's 4 channels .* teacher's 5"
    ):
        ICCLoss(4, 5, embed=False)
    with pytest.raises(UserError, match=r"the embedding takes maps \(batch, 7, .*got \(3, 4"):
        ICCLoss(7, 4).double()(s, s)
    for shape in ((0, 4, 2, 2), (3, 4, 0, 2)):
        empty = torch.zeros(*shape, dtype=torch.float64)
        with pytest.raises(UserError, match=r"a map without entries: student \(\d, 4, \d, 2\)"):
            loss(empty, empty)


def test_taps_without_maps() -> None:
    vector = Taps(pooled=torch.ones(2, 4))
    with pytest.raises(UserError, match="the network gives no map"):
        loss_class("ickd").for_taps(vector, vector)
    flat = Taps(maps=(torch.ones(2, 9, 4),))
    with pytest.raises(UserError, match=r"\(batch, channels, height, width\), got .*\(2, 9, 4\)"):
        loss_class("ickd").for_taps(flat, flat)


@pytest.mark.parametrize(("grid", "size"), [((3, 1), (2, 5)), ((1, 6), (2, 5)), ((16, 16), (9, 9))])
def test_a_grid_finer_than_the_map_names_both(grid: tuple[int, int], size: Any) -> None:
    s, t = normal(50, 2, 4, *size), normal(51, 2, 4, 20, 20)
    cells = f"{grid[0]}x{grid[1]} cells does not fit a map of {size[0]}x{size[1]} pixels"
    for pair in ((s, t), (t, s)):
        with pytest.raises(UserError, match=cells):
            plain(4, grid=grid)(*pair)


def test_compat_cells_of_unlike_maps() -> None:
    loss = plain(3, grid=(4, 4), reference_compat=True)
    with pytest.raises(UserError, match="student's map has 20 cells and the teacher's 16"):
        loss(normal(52, 2, 3, 9, 11), normal(53, 2, 3, 8, 8))


def test_an_embedding_cannot_train_on_one_pixel() -> None:
    loss = ICCLoss(4, 6).double()
    one, t = normal(54, 1, 4, 1, 1), normal(55, 1, 6, 3, 3)
    with pytest.raises(UserError, match="cannot train on a single image of a single pixel"):
        loss(one, t)
    assert loss(one.expand(2, 4, 1, 1), t.expand(2, 6, 3, 3)).isfinite()
    assert loss(normal(56, 1, 4, 1, 2), t).isfinite()
    assert loss.eval()(one, t).isfinite()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("normalize", "rows"),
        ("form", "fast"),
        ("reduction", "mean"),
        ("cell_reduction", "max"),
        ("reference_scale", "cifar"),
        ("grid", (0, 4)),
    ],
)
def test_options_that_do_not_exist(option: str, value: Any) -> None:
    # past the type checks that the test run adds
    unchecked: Any = getattr(ICCLoss.__init__, "__wrapped__", ICCLoss.__init__)
    with pytest.raises(ValueError, match=f"{option} must be"):
        unchecked(ICCLoss.__new__(ICCLoss), 4, **{option: value})


# ---------------------------------------------------------------------------------- registry

CATALOGUE = {  # spec 4.6 and the weights of 4.5
    "kd": 0.9,
    "kd_mixed": 1.0,
    "fitnet": 100.0,
    "at": 1000.0,
    "sp": 3000.0,
    "cc": 0.02,
    "vid": 1.0,
    "rkd": 1.0,
    "pkt": 30000.0,
    "nst": 50.0,
    "fsp": 50.0,
    "kdsvd": 1.0,
    "ab": 1.0,
    "ft": 200.0,
    "crd": 0.8,
    "ofd": 1e-3,
    "reviewkd": 1.0,
    "dkd": 1.0,
    "dist": 1.0,
    "kd_logit_std": 1.0,
    "ickd": 2.5,
    "ickd_grid": 2.0,
}
EMBEDDED = {"ickd", "fitnet", "cc", "crd", "vid", "ft", "ofd", "reviewkd", "mse"}
OPTIONS: dict[str, dict[str, Any]] = {
    "ickd_grid": {"grid": (2, 2)},
    "crd": {"n_data": 12, "labels": [0, 1, 2] * 4, "negatives": 5},
}


def taps(seed: int) -> Taps:
    """Features of four images, of three classes, widths equal on both sides."""
    sizes = ((4, 8), (4, 8), (6, 4), (6, 4))
    preacts = tuple(normal(seed + n, 4, c, p, p).float() for n, (c, p) in enumerate(sizes))
    pooled = preacts[-1].relu().mean((2, 3))
    return Taps(tuple(f.relu() for f in preacts), pooled, pooled[:, :3].clone(), preacts)


def test_every_loss_of_the_catalogue_has_its_name_and_weight() -> None:
    assert CATALOGUE.keys() <= {*available_losses()}
    assert {name: loss_class(name).default_weight for name in CATALOGUE} == CATALOGUE
    for name in CATALOGUE:
        cls = loss_class(name)
        assert cls.name == name
        assert issubclass(cls, DistillationLoss)
        assert cls.__module__ == f"tenfold.distillation.{'ickd' if name == 'ickd_grid' else name}"
        assert cls.default_ce_weight == {"kd": 0.1, "kd_mixed": 0.0}.get(name, 1.0)
        assert cls.default_warmup == {"dkd": 20, "reviewkd": 20}.get(name, 0)
        assert cls.stage == ("init" if name in ("ab", "fsp") else "joint")


def test_losses_are_made_by_name() -> None:
    for make in (create_loss, get_loss):
        loss = make("ickd", channels_s=3, channels_t=5, form="direct")
        assert isinstance(loss, ICCLoss)
        assert (loss.form, loss.embed_s.conv2d.weight.shape) == ("direct", (5, 3, 1, 1))
    with pytest.raises(UserError, match=r"'ikcd': did you mean 'ickd'\? Known: ab, at"):
        get_loss("ikcd")


@pytest.mark.parametrize("name", sorted({*CATALOGUE, "mse", "soft_target"}))
def test_terms_are_one_number_by_name(name: str) -> None:
    torch.manual_seed(0)
    student, teacher = taps(60), taps(70)
    loss = loss_class(name).for_taps(student, teacher, **OPTIONS.get(name, {}))
    batch = {"label": torch.tensor([0, 2, 1, 0]), "index": torch.tensor([3, 8, 1, 11])}
    leaves = [*student.preacts, *student.maps, student.pooled, student.logits]
    for leaf in leaves:
        assert leaf is not None
        leaf.requires_grad_()
    terms = loss.terms(student, teacher, batch)
    assert list(terms) == [name]
    assert terms[name].shape == ()
    assert terms[name].isfinite()
    terms[name].backward()
    grads = [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]
    assert any(g.abs().max() > 0 for g in grads)
    assert all(g.isfinite().all() for g in grads)
    assert bool(list(loss.parameters())) == (name in EMBEDDED)


def test_no_loss_is_left_out() -> None:
    assert {*available_losses()} == {*CATALOGUE, "mse", "soft_target"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_maps_of_another_precision_than_the_embedding(dtype: torch.dtype) -> None:
    loss, s, t = ICCLoss(4, 6), torch.randn(3, 4, 5, 5), torch.randn(3, 6, 5, 5)
    wanted = loss(s.to(dtype).float(), t.to(dtype).float())
    torch.testing.assert_close(loss(s.to(dtype), t.to(dtype)).float(), wanted)


def test_a_loss_called_with_taps_gives_its_terms_by_name() -> None:
    loss, s, t = ICCLoss(4, 6).eval(), torch.randn(3, 4, 5, 5), torch.randn(3, 6, 5, 5)
    found = loss(Taps((s,)), Taps((t,)), {})
    assert set(found) == {"ickd"}
    torch.testing.assert_close(found["ickd"], loss(s, t))


def test_the_embedding_is_as_exact_as_that_of_the_plain_hint() -> None:
    """Under autocast too: the two losses are compared, and differ in their distance alone."""
    losses = ICCLoss(4, 6), create_loss("mse", channels_s=4, channels_t=6)
    seen = []
    for loss in losses:
        loss.embed_s.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            loss(torch.randn(2, 4, 3, 3), torch.randn(2, 6, 3, 3))
    assert seen == [torch.float32, torch.float32]
