"""What every feature loss has in common: its call, its constants, precision, batches, bad input."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tenfold.distillation import (
    DistillationLoss,
    FitNetLoss,
    FSPLoss,
    FTLoss,
    KDSVDLoss,
    OFDLoss,
    ReviewKDLoss,
    Taps,
    VIDLoss,
    create_loss,
    loss_class,
)
from tenfold.distillation.maps import pool_to_smaller
from tenfold.errors import UserError

# signal, weight of the loss and stage of training, from the CIFAR comparison (spec 4.5, 4.6).
RULES = {
    "ab": ("preact_stages", 1.0, "init"),
    "at": ("stages", 1000.0, "joint"),
    "fitnet": ("hint", 100.0, "joint"),
    "fsp": ("trunk", 50.0, "init"),
    "ft": ("deepest", 200.0, "joint"),
    "kdsvd": ("stages", 1.0, "joint"),
    "mse": ("last", 2.0, "joint"),
    "nst": ("stages", 50.0, "joint"),
    "ofd": ("preact_stages", 1e-3, "joint"),
    "reviewkd": ("preact_stages", 1.0, "joint"),
    "vid": ("stages", 1.0, "joint"),
}
SAME_WIDTHS = ("fsp", "kdsvd")
every_loss = pytest.mark.parametrize("name", RULES)


def taps(seed: int, widths: list[int], sizes: list[int], batch: int = 4) -> Taps:
    """What a network of four stages might say, the last three before a ReLU too."""
    generator = torch.Generator().manual_seed(seed)
    preacts = [
        torch.randn(batch, c, n, n, generator=generator) for c, n in zip(widths, sizes, strict=True)
    ]
    maps = tuple(x.relu() for x in preacts)
    return Taps(maps=maps, pooled=maps[-1].mean((2, 3)), preacts=tuple(preacts))


def student_taps() -> Taps:
    return taps(0, [4, 6, 7, 8], [8, 8, 4, 4])


def teacher_taps(name: str) -> Taps:
    return taps(1, [4, 6, 7, 8] if name in SAME_WIDTHS else [5, 9, 10, 12], [8, 8, 8, 4])


def build(name: str) -> DistillationLoss[Any]:
    torch.manual_seed(0)
    return loss_class(name).for_taps(student_taps(), teacher_taps(name))


def mapped(of: Taps, change: Any) -> Taps:
    """The same taps with every tensor changed."""
    assert of.pooled is not None
    return Taps(
        maps=tuple(change(x) for x in of.maps),
        pooled=change(of.pooled),
        preacts=tuple(change(x) for x in of.preacts),
    )


def value(loss: DistillationLoss[Any], student: Taps, teacher: Taps) -> Tensor:
    terms = loss.terms(student, teacher, {})
    assert list(terms) == [loss.name]
    return terms[loss.name]


@every_loss
def test_what_is_declared(name: str) -> None:
    cls = loss_class(name)
    assert (cls.signal, cls.default_weight, cls.stage) == RULES[name]
    assert cls.default_ce_weight == 1


@every_loss
def test_student_and_adaptors_learn_from_a_constant_teacher(name: str) -> None:
    loss = build(name)
    student, teacher = (
        mapped(x, lambda t: t.clone().requires_grad_())
        for x in (student_taps(), teacher_taps(name))
    )
    total = value(loss, student, teacher)
    assert total.shape == ()
    assert total.dtype == torch.float32
    assert total.isfinite()
    assert total > 0
    total.backward()
    gradients = [x.grad for x in (*student.maps, *student.preacts) if x.grad is not None]
    assert gradients
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert all(x.grad is None for x in (*teacher.maps, *teacher.preacts, teacher.pooled))  # pyright: ignore[reportOptionalMemberAccess]
    trained = {key for key, p in loss.named_parameters() if p.grad is not None}
    apart = {key for key, _ in loss.named_parameters() if key.startswith("paraphraser.")}
    assert trained == {key for key, _ in loss.named_parameters()} - apart


@every_loss
def test_the_size_of_the_batch_does_not_matter(name: str) -> None:
    loss = build(name).double()
    student, teacher = (mapped(x, Tensor.double) for x in (student_taps(), teacher_taps(name)))
    total = value(loss, student, teacher)  # in training: twice the batch has the same statistics
    twice = [mapped(x, lambda t: torch.cat([t, t])) for x in (student, teacher)]
    torch.testing.assert_close(value(loss, *twice), total)
    backwards = [mapped(x, lambda t: t.flip(0)) for x in (student, teacher)]
    torch.testing.assert_close(value(loss, *backwards), total)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_to_float32(name: str, dtype: torch.dtype) -> None:
    loss = build(name).eval()
    half = [mapped(x, lambda t: (50 * t).to(dtype)) for x in (student_taps(), teacher_taps(name))]
    expected = value(loss, *(mapped(x, Tensor.float) for x in half))
    torch.testing.assert_close(value(loss, *half), expected, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(value(loss, *half), expected, rtol=0, atol=0)


@every_loss
def test_adaptors_of_low_precision_run_in_theirs(name: str) -> None:
    loss, student, teacher = build(name).eval(), student_taps(), teacher_taps(name)
    expected = value(loss, student, teacher)
    total = value(loss.bfloat16(), student, teacher)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=0.05, atol=0)


@every_loss
def test_the_state_is_all_that_a_loss_remembers(name: str) -> None:
    loss, other = build(name), build(name)
    value(loss, student_taps(), teacher_taps(name))  # moves the running statistics
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.1)
    other.load_state_dict(loss.state_dict())
    pairs = [(x.eval(), student_taps(), teacher_taps(name)) for x in (loss, other)]
    torch.testing.assert_close(*(value(*pair) for pair in pairs), rtol=0, atol=0)


@every_loss
def test_batches_of_different_length_are_refused(name: str) -> None:
    short = mapped(teacher_taps(name), lambda t: t[:3])
    with pytest.raises(UserError, match=r"different batches: student \(4, .*, teacher \(3, "):
        value(build(name), student_taps(), short)


@every_loss
def test_maps_without_entries_are_refused(name: str) -> None:
    loss = build(name)
    empty = [mapped(x, lambda t: t[:0]) for x in (student_taps(), teacher_taps(name))]
    with pytest.raises(UserError, match=r"without entries: student \(0, .*, teacher \(0, "):
        value(loss, *empty)


@every_loss
def test_what_is_no_map_is_refused(name: str) -> None:
    flat = [mapped(x, lambda t: t.flatten(1)) for x in (student_taps(), teacher_taps(name))]
    if name == "reviewkd":
        flat = [replace(x, pooled=torch.zeros(4, 8)) for x in flat]
    with pytest.raises(UserError, match=r"compares maps \(batch, channels, height, width\)"):
        value(build(name), *flat)


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("at", "nst")])
def test_maps_of_other_channels_are_refused(name: str) -> None:
    wider = mapped(teacher_taps(name), lambda t: torch.cat([t, t], 1))
    with pytest.raises(UserError, match=r"\d+, .*\(4, \d+, "):
        value(build(name), student_taps(), wider)
    if name not in SAME_WIDTHS:
        wider = mapped(student_taps(), lambda t: torch.cat([t, t], 1))
        with pytest.raises(UserError, match=r"takes maps \(batch, \d+, height, width\), got \(4, "):
            value(build(name), wider, teacher_taps(name))


@pytest.mark.parametrize("name", ["ab", "at", "fsp", "kdsvd", "nst", "ofd", "reviewkd", "vid"])
def test_stages_must_pair(name: str) -> None:
    loss, student, teacher = build(name), student_taps(), teacher_taps(name)
    fewer = replace(teacher, maps=teacher.maps[:-1], preacts=teacher.preacts[:-1])
    with pytest.raises(UserError, match=r"the student has \d and the teacher \d"):
        value(loss, student, fewer)
    if name in ("ab", "ofd", "reviewkd", "vid"):
        both = (replace(x, maps=x.maps[:-1], preacts=x.preacts[:-1]) for x in (student, teacher))
        with pytest.raises(UserError, match=r"adaptors for \d stages, got \d"):
            value(loss, *both)


@pytest.mark.parametrize("loss", [FSPLoss(), KDSVDLoss()])
def test_a_transition_needs_two_stages(loss: DistillationLoss[Any]) -> None:
    with pytest.raises(UserError, match="needs 2 or more stages, got 1"):
        loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("name", ["ab", "ofd", "reviewkd"])
def test_maps_before_their_activation_must_exist(name: str) -> None:
    with pytest.raises(UserError, match="gives no maps before their activation"):
        loss_class(name).for_taps(replace(student_taps(), preacts=()), teacher_taps(name))


@pytest.mark.parametrize("name", ["ab", "at", "nst", "ofd", "reviewkd", "vid"])
def test_one_map_is_a_list_of_one(name: str) -> None:
    student, teacher = student_taps().preacts[-1], teacher_taps(name).preacts[-1]
    one = {
        "ab": ([student.shape[1:]], [teacher.shape[1:]]),
        "ofd": ([8], [-torch.ones(12)]),
        "reviewkd": ([8], [12]),
        "vid": ([8], [12]),
    }
    loss = create_loss(name) if name not in one else loss_class(name)(*one[name])
    torch.testing.assert_close(loss(student, teacher), loss([student], [teacher]))


@pytest.mark.parametrize("name", ["fitnet", "mse", "ofd", "ft", "reviewkd", "ab"])
def test_a_single_pixel_cannot_train_a_batch_norm(name: str) -> None:
    student = taps(2, [4, 6, 7, 8], [1, 1, 1, 1], batch=1)
    teacher = taps(3, [5, 9, 10, 12], [1, 1, 1, 1], batch=1)
    loss = loss_class(name).for_taps(student, teacher)
    with pytest.raises(UserError, match="cannot train on a single image of a single pixel"):
        value(loss, student, teacher)
    assert value(loss.eval(), student, teacher).isfinite()


def test_kdsvd_says_that_a_map_is_not_finite() -> None:
    student, teacher = ([torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)] for _ in range(2))
    student[0][1, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="are its entries finite"):
        KDSVDLoss()(student, teacher)


def test_kdsvd_says_that_a_map_is_too_small_for_k() -> None:
    pixels = [torch.randn(2, 5, 1, 1), torch.randn(2, 5, 3, 3)]
    with pytest.raises(UserError, match=r"wants 2 .*, but a map \(2, 5, 1, 1\) has 1"):
        KDSVDLoss(k=2)(pixels, pixels)


GRADCHECKED = {
    "ab": lambda: create_loss("ab", shapes_s=[(2, 2, 2)] * 2, shapes_t=[(2, 2, 2)] * 2),
    "at": lambda: create_loss("at"),
    "fsp": FSPLoss,
    "kdsvd": KDSVDLoss,
    "nst": lambda: create_loss("nst"),
    "ofd": lambda: OFDLoss([2, 2], [-torch.ones(2), -torch.ones(2)]),
    "reviewkd": lambda: ReviewKDLoss([2, 2], [2, 2]),
    "vid": lambda: VIDLoss([2, 2], [2, 2]),
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradient_equals_finite_differences(name: str) -> None:
    torch.manual_seed(4)
    loss = GRADCHECKED[name]().double()
    student, teacher = (
        [torch.randn(2, 2, 2, 2, dtype=torch.float64) for _ in range(2)] for _ in range(2)
    )
    inputs = tuple(x.requires_grad_() for x in student)
    assert torch.autograd.gradcheck(lambda *maps: loss(list(maps), teacher), inputs)


@pytest.mark.parametrize("name", ["at", "fsp", "kdsvd", "nst"])
def test_equal_maps_have_no_distance_and_pixels_have_no_order(name: str) -> None:
    loss, teacher = create_loss(name), teacher_taps("fsp")
    maps = [x.double() for x in teacher.signal(loss.signal)]
    assert loss(maps, maps).item() == pytest.approx(0, abs=1e-12)
    student = [x.double() for x in student_taps().signal(loss.signal)]
    sizes = {x.shape[2] for x in student}
    assert sizes == {4, 8}
    # The transposed maps have the same pixels at other places, for both sides alike.
    turned = [[x.mT for x in side] for side in (student, maps)]
    if name != "kdsvd":  # whose teacher may change a sign
        torch.testing.assert_close(loss(*turned), loss(student, maps))


@pytest.mark.parametrize("name", ["at", "nst"])
def test_neither_scale_nor_order_of_channels_matters(name: str) -> None:
    loss, student, teacher = create_loss(name), student_taps().maps, teacher_taps(name).maps
    other = [3 * x.flip(1) for x in student]
    torch.testing.assert_close(loss(other, teacher), loss(student, teacher))


def test_kdsvd_sees_neither_the_students_scale_nor_its_signs() -> None:
    loss, student, teacher = KDSVDLoss(), student_taps().maps, teacher_taps("kdsvd").maps
    torch.testing.assert_close(loss([-3 * x for x in student], teacher), loss(student, teacher))


@pytest.mark.parametrize("name", ["at", "nst", "vid"])
def test_the_larger_map_is_averaged_down_first(name: str) -> None:
    loss = VIDLoss([3], [5]) if name == "vid" else create_loss(name)
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)
    small_s, small_t = (nn.functional.avg_pool2d(x, 2) for x in (student, teacher))
    torch.testing.assert_close(loss(student, small_t), loss(small_s, small_t))
    torch.testing.assert_close(loss(small_s, teacher), loss(small_s, small_t))


def test_the_larger_map_is_averaged_down_side_by_side() -> None:
    a, b = pool_to_smaller(torch.ones(1, 2, 8, 3), torch.ones(1, 3, 4, 6))
    assert (a.shape, b.shape) == ((1, 2, 4, 3), (1, 3, 4, 3))
    same = torch.randn(1, 2, 4, 4)
    assert pool_to_smaller(same, same)[0] is same


def test_ofd_measures_the_margins_that_it_is_not_given() -> None:
    student, teacher = student_taps(), teacher_taps("ofd")
    measured = OFDLoss.for_taps(student, teacher).margins
    negative = teacher.preacts[1][:, 0]
    torch.testing.assert_close(measured[0][0], negative[negative < 0].mean())
    given = [-torch.ones(c) for c in (9, 10, 12)]
    loss = OFDLoss.for_taps(student, teacher, margins=given, form="overhaul")
    assert [m.tolist() for m in loss.margins] == [m.tolist() for m in given]
    assert loss.dividers == (4, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "at", "power": 0.0}, "power must be a positive number"),
        ({"name": "kdsvd", "k": 0}, "k must be 1 or more"),
        ({"name": "ab", "shapes_s": [], "shapes_t": [], "margin": 0.0}, "margin must be positive"),
        ({"name": "ft", "channels_s": 4, "p": 0.0}, "p must be positive"),
        ({"name": "vid", "channels_s": [1], "channels_t": [1], "variance": 0.0}, "variance must"),
        ({"name": "vid", "channels_s": [1], "channels_t": [1, 2]}, "shorter|longer"),
        ({"name": "ofd", "channels_s": [1], "margins": [torch.ones(1)]}, "above zero"),
        (
            {"name": "ofd", "channels_s": [1], "margins": [-torch.ones(1)], "dividers": [1, 2]},
            "1 positive dividers are needed",
        ),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_loss(**arguments)


def test_a_new_form_is_no_form() -> None:
    with pytest.raises(Exception, match=r"form|type hint"):  # jaxtyping may be first to see it
        OFDLoss([1], [-torch.ones(1)], "other")  # pyright: ignore[reportArgumentType]


def test_adaptors_say_who_they_are() -> None:
    assert isinstance(FitNetLoss((2, 4, 4), (3, 4, 4)).regressor.bn, nn.BatchNorm2d)
    assert "power=2" in repr(create_loss("at"))
    assert "k=1" in repr(KDSVDLoss())
    assert "margin=1" in repr(create_loss("ab", shapes_s=[], shapes_t=[]))
    assert "p=1" in repr(FTLoss(2))
    assert "form='overhaul'" in repr(OFDLoss([1], [-torch.ones(1)], "overhaul"))
