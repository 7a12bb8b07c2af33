"""Counts against closed forms and torch's own counter, timings against a sleep."""

import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ickd.measure import (
    FLOOR,
    NetworkCost,
    PeakBytes,
    Term,
    count_layers,
    floor_macs,
    icc_cost,
    icc_formula,
    leaf_taps,
    network_cost,
    step_times,
    tensors_of,
    term_cost,
    term_times,
)
from ickd.networks import Input, Network, open_network
from tenfold.distillation import ICCLoss, KnowledgeDistillation, Taps

B = 4
pytestmark = pytest.mark.usefixtures("uncollected_timings")


def only(loss: nn.Module, student: torch.Tensor, teacher: torch.Tensor) -> tuple[Term, Taps, Taps]:
    """A loss of two maps as a term, and the taps of both sides."""
    term = Term("icc", lambda s, t: loss(s.maps[-1], t.maps[-1]), loss)
    return term, leaf_taps(Taps(maps=(student,))), Taps(maps=(teacher,))


# -- networks ----------------------------------------------------------------------------------


def test_a_network_costs_what_its_paper_says():
    cost = network_cost(open_network("zoo:resnet8"), 32)
    assert cost == NetworkCost("zoo:resnet8", 83_892, 12_507_392, (3, 32, 32))
    teacher = network_cost(open_network("zoo:wrn_16_1"), 32)
    assert (teacher.parameters, round(teacher.macs / 1e6, 1)) == (180_916, 26.7)
    assert floor_macs(cost, teacher) == 3 * 12_507_392 + teacher.macs


def test_multiply_adds_equal_those_of_torchs_counter():
    network = open_network("embedded:gratings-teacher").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.rand(2, 3, 16, 16))
    assert network_cost(network, 16).macs == counter.get_total_flops() // 4


def test_a_network_that_resizes_is_counted_at_its_own_size():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
    given = Network(net, "mine", Input(size=8), tap_names=["1"])
    assert network_cost(given, 32) == NetworkCost("mine", 140, 8 * 8 * 5 * 27, (3, 8, 8))
    free = Network(net, "mine", tap_names=["1"])
    assert network_cost(free, 32).macs == 32 * 32 * 5 * 27


def test_layers_of_adaptors_are_counted_by_kind():
    layers = {
        nn.Conv2d(6, 9, 3, stride=2, padding=1, groups=3): 9 * 4 * 4 * (2 * 9),
        nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1): 6 * 8 * 8 * (4 * 16),
        nn.Conv2d(6, 4, 1): 4 * 8 * 8 * 6,
    }
    for layer, expected in layers.items():
        with count_layers(nn.Sequential(layer)) as macs:
            layer(torch.randn(B, 6, 8, 8))
        assert macs == [B * expected]
        assert not layer._forward_hooks
    linear = nn.Linear(7, 11)
    with count_layers(linear) as macs:
        linear(torch.randn(B, 7))
        linear(torch.randn(B, 7))
    assert macs == [B * 77, B * 77]


# -- bytes -------------------------------------------------------------------------------------


def test_the_peak_is_that_of_the_tensors_alive_together():
    with PeakBytes() as memory:
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        c = torch.empty(250)
    assert memory.peak == 4 * 1500
    assert memory.live == 4 * 750
    del b, c
    assert memory.live == 0


def test_shared_memory_counts_once_and_what_was_there_not_at_all():
    before = torch.randn(100, 100)
    with PeakBytes([before]) as memory:
        view = before.view(-1)
        view.add_(1)
        assert memory.peak == 0
        made = view * 2
        halves = made[:5000], made[5000:]
    assert memory.peak == 4 * 10_000
    assert len(halves) == 2


def test_the_backward_pass_is_part_of_the_peak():
    x = torch.randn(1000, requires_grad=True)
    with PeakBytes([x]) as forward:
        kept = x.exp()
    with PeakBytes([x]) as both:
        x.exp().sum().backward()
    assert forward.peak == 4 * 1000
    # the saved result and the gradient
    assert 4 * 2000 <= both.peak <= 4 * 2000 + 64
    assert len(kept) == 1000


# -- losses ------------------------------------------------------------------------------------


def test_leaves_keep_what_is_shared():
    x = torch.randn(2, 3, 4, 4)
    taps = Taps(maps=(x, x * 2), pooled=torch.randn(2, 3), last=x)
    leaves = leaf_taps(taps)
    assert leaves.last is leaves.maps[0]
    assert leaves.maps[0] is not x
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in tensors_of(leaves))
    assert len(tensors_of(leaves)) == 3
    assert leaves.logits is None


@pytest.mark.parametrize(("c_s", "c_t", "p", "q"), [(6, 16, 5, 4), (16, 16, 4, 4), (12, 32, 3, 6)])
def test_a_term_costs_its_closed_form(c_s, c_t, p, q):
    student, teacher = torch.randn(B, c_s, p, p), torch.randn(B, c_t, q, q)
    loss = ICCLoss(c_s, c_t, form="direct")
    cost = term_cost(*only(loss, student, teacher))
    pixels, squares = p * p, c_t * c_t
    adaptor = c_s * c_t * pixels
    assert cost.parameters == c_s * c_t + 2 * c_t
    assert cost.adaptor_macs == adaptor
    # the adaptor's gradients cost twice its forward pass, those of G_s = S Sᵀ twice G_s
    assert cost.macs == 3 * adaptor + squares * (pixels + q * q) + 2 * squares * pixels
    # G_s, G_t and the squared difference are alive at some moment
    assert cost.bytes > 3 * 4 * squares
    assert all(parameter.grad is None for parameter in loss.parameters())


def test_a_loss_of_logits_has_no_adaptor_and_no_products():
    loss = KnowledgeDistillation()
    term = Term("kd", lambda s, t: loss(s.logits, t.logits), loss, needs_taps=False)
    ours, theirs = leaf_taps(Taps(logits=torch.randn(8, 50))), Taps(logits=torch.randn(8, 50))
    cost = term_cost(term, ours, theirs)
    assert (cost.parameters, cost.adaptor_macs, cost.macs) == (0, 0, 0)
    # two log-softmaxes at the least, and no more than a dozen tensors like the logits
    assert 2 * 4 * 50 <= cost.bytes <= 12 * 4 * 50
    assert ours.logits is not None
    assert ours.logits.grad is None


# -- inter-channel correlation -----------------------------------------------------------------

SHAPES = [(256, 64, 64), (512, 16, 16), (512, 49, 49), (64, 32, 16), (64, 16, 32), (128, 9, 64)]


@pytest.mark.parametrize(("channels", "p", "q"), SHAPES)
@pytest.mark.parametrize("low_memory", [False, True])
def test_the_formula_of_the_correlation_loss(channels, p, q, low_memory):
    form = "low_memory" if low_memory else "direct"
    loss = ICCLoss(channels, embed=False, form=form)
    student = torch.randn(2, channels, p, 1, requires_grad=True)
    teacher = torch.randn(2, channels, q, 1)
    macs, size = icc_formula(channels, (p, q), low_memory=low_memory)
    with FlopCounterMode(display=False) as counter:
        loss(student, teacher)
    assert macs == counter.get_total_flops() // 4
    with PeakBytes([student, teacher]) as memory:
        loss(student, teacher).backward()
    assert size == pytest.approx(memory.peak / 2, rel=0.1)


def test_the_formula_gives_the_figures_of_the_zoo():
    """C = 256: 8 M MACs, 1.5 MB; ResNet-18: 26 M, 6 MB; ResNet50: 134 M, 100 MB (section 12)."""
    for channels, pixels, macs, megabytes in [
        (256, 64, 8, 1.5),
        (512, 49, 26, 6),
        (2048, 16, 134, 100),
    ]:
        counted, size = icc_formula(channels, (pixels, pixels), low_memory=False)
        assert round(counted / 1e6) == macs
        assert size / 1e6 == pytest.approx(megabytes, rel=0.06)
    direct, low = (icc_formula(2048, (16, 16), low_memory=form)[1] for form in (False, True))
    assert direct / low > 150


def test_both_forms_are_compared_on_the_maps():
    student, teacher = torch.randn(B, 8, 4, 4), torch.randn(B, 64, 4, 4)
    cost = icc_cost("ickd", ICCLoss(8, 64), student, teacher, repeats=1)
    assert (cost.channels, cost.pixels, cost.cells, cost.batch) == (64, (16, 16), 1, B)
    assert cost.auto == "low_memory"
    for name, form in cost.forms.items():
        expected = icc_formula(64, (16, 16), low_memory=name == "low_memory")
        assert (form.macs, form.bytes) == expected
        assert form.peak == pytest.approx(form.bytes, rel=0.1)
        assert form.timing.repeats == 1
    assert cost.forms["direct"].peak > cost.forms["low_memory"].peak
    wide = icc_cost("ickd", ICCLoss(8, 16), student, torch.randn(B, 16, 3, 3), repeats=1)
    assert (wide.pixels, wide.auto) == ((16, 9), "direct")


def test_fewer_images_are_timed_where_the_matrices_need_too_much_room():
    student, teacher = torch.randn(B, 64, 2, 2), torch.randn(B, 64, 2, 2)
    matrices = 7 * 64 * 64 * 4
    loss = ICCLoss(64)
    assert icc_cost("i", loss, student, teacher, repeats=1, limit=2 * matrices).batch == 2
    assert icc_cost("i", loss, student, teacher, repeats=1, limit=1).batch == 1
    assert loss.form == "auto"


def test_the_cells_of_a_grid_are_counted():
    loss = ICCLoss(32, grid=(2, 4), embed=False)
    cost = icc_cost("g", loss, torch.randn(B, 32, 8, 9), torch.randn(B, 32, 6, 8), repeats=1)
    # cells of 4x2 pixels in the one map, of 3x2 in the other
    assert (cost.pixels, cost.cells, cost.auto) == ((8, 6), 8, "low_memory")
    assert cost.forms["direct"].macs == 8 * 32 * 32 * (8 + 6)


# -- seconds -----------------------------------------------------------------------------------

PAUSE = 0.03


def test_a_step_is_longer_than_the_floor_by_its_loss():
    class Slow(nn.Module):
        def forward(self, student: Taps, teacher: Taps) -> torch.Tensor:
            assert not any(value.requires_grad for value in tensors_of(teacher))
            time.sleep(PAUSE)
            return student.maps[-1].square().mean()

    student, teacher = (open_network(f"embedded:gratings-{n}") for n in ("student", "teacher"))
    student.train()
    teacher.eval()
    before = {key: value.clone() for key, value in teacher.net.state_dict().items()}
    slow = Slow()
    pixels = torch.rand(2, 3, 16, 16)
    logits = Term("logits", lambda s, t: (s.logits - t.logits).square().mean(), nn.Module(), False)
    steps = step_times(student, teacher, [Term("slow", slow, slow), logits], pixels, repeats=3)
    assert list(steps) == [FLOOR, "slow", "logits"]
    assert steps["slow"].median_ms >= 1e3 * PAUSE
    assert steps[FLOOR].median_ms < steps["slow"].median_ms
    assert all(torch.equal(value, before[key]) for key, value in teacher.net.state_dict().items())
    ours = leaf_taps(student.taps(pixels))
    with torch.no_grad():
        still = teacher.taps(pixels)
    alone = term_times([Term("slow", slow, slow)], ours, still, torch.device("cpu"), repeats=2)
    assert alone["slow"].median_ms >= 1e3 * PAUSE
    assert all(leaf.grad is None for leaf in tensors_of(ours))
