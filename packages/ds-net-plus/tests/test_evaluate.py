"""Metrics, budget search, recalibration and the runner against hand computation."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_net_plus.evaluate import (
    RouteTable,
    calibrate_tau,
    collect,
    cost_curve,
    gain_at_equal_madds,
    oracle,
    point_at,
    point_of,
    random_routing,
    saving_at_equal_accuracy,
    sweep,
    tau_at,
    with_gate,
)
from ds_net_plus.model import DSConvNet, choose_routes, tau_for_budget
from ds_net_plus.train import CachedRoutes
from tenfold.data import Draw
from tenfold.errors import UserError


class Images:
    """The fields of a batch that `collect` reads."""

    def __init__(self, image, label, hard=None):
        self.image, self.label, self.hard = image, label, hard


def table_of(correct: list[list[int]], scores: list[list[float]], madds=(100, 200, 400)):
    """A table of two classes in which the given routes are right."""
    right = torch.tensor(correct).bool()
    logits = torch.stack([right.float(), (~right).float()], 2)
    labels = torch.zeros(len(right), dtype=torch.int64)
    return RouteTable(torch.zeros(len(right), 1), torch.tensor(scores), logits, labels, madds)


@pytest.fixture
def table():
    return table_of(
        [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]],
        [[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]],
    )


def test_points_by_hand(table):
    assert table.static_top1() == [0.25, 0.5, 0.75]
    point = point_at(table)
    assert point.top1 == 0.75
    assert point.madds == (100 + 200 + 400 + 100) / 4
    assert point.shares == (0.5, 0.25, 0.25)
    assert gain_at_equal_madds(point, table) == pytest.approx(0.75 - 0.5)
    assert saving_at_equal_accuracy(point, table) == pytest.approx(400 / 200)
    assert random_routing(table, point.shares) == pytest.approx((200, 0.5 * 0.25 + 0.5 * 0.625))


def test_saving_interpolates_and_saturates(table):
    assert saving_at_equal_accuracy(point_of(table, torch.tensor([0, 0, 0, 0])), table) == 1.0
    half = point_of(table, torch.tensor([0, 1, 0, 0]))  # top-1 0.5 at 125
    assert saving_at_equal_accuracy(half, table) == pytest.approx(200 / 125)


def test_oracle_takes_the_cheapest_correct_route(table):
    point = oracle(table)
    assert point.top1 == 0.75
    assert point.madds == (100 + 200 + 400 + 100) / 4


@given(
    seed=st.integers(0, 1000),
    share=st.floats(0, 1),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
)
@settings(max_examples=60, deadline=None)
def test_calibrated_tau_meets_the_target_and_no_smaller_tau_does(seed, share, scale):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(50, 3, generator=generator) * scale
    madds = (100, 150, 400)
    target = 100 + share * 300
    tau = calibrate_tau(scores, madds, target)
    costs = torch.tensor(madds, dtype=torch.float64)
    assert costs[choose_routes(scores, madds, tau)].mean() <= target
    if target < 400:
        cheaper = choose_routes(scores, madds, tau - 1e-3 * scale)
        # mean cost falls with tau: just below, the target is missed or a step lies between
        assert costs[cheaper].mean() >= costs[choose_routes(scores, madds, tau)].mean()


def test_mean_cost_falls_with_tau():
    scores = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    costs = torch.tensor((1, 2, 3, 5), dtype=torch.float64)
    means = [
        float(costs[choose_routes(scores, (1, 2, 3, 5), tau)].mean())
        for tau in torch.linspace(-60, 60, 81).tolist()
    ]
    assert means[0] == 5
    assert means[-1] == 1
    assert all(low >= high for low, high in pairwise(means))


def test_infeasible_targets_state_the_range(table):
    with pytest.raises(UserError, match="from 100 to 400"):
        calibrate_tau(table.scores, table.madds, 50)


def test_budgets_are_looked_up_in_the_table(randomize):
    net = randomize(DSConvNet())
    with pytest.raises(UserError, match="calibrate-budget"):
        tau_for_budget(net, 0.5)
    widest = net.madds(3)
    net.budgets = [(0.0, 0.9 * widest), (0.2, 0.5 * widest), (0.6, 0.3 * widest)]
    assert tau_for_budget(net, 0.7) == pytest.approx(0.1)
    with pytest.raises(UserError, match=r"0\.300 to 1"):
        tau_for_budget(net, 0.2)


def test_collect_equals_running_every_route(net, images):
    labels = torch.arange(len(images)) % 10
    batches = [Images(images[:4], labels[:4]), Images(images[4:], labels[4:])]
    table = collect(net, batches)
    for j, route in enumerate(net.routing_space):
        expected = net(images, route=route)
        assert torch.allclose(table.logits[:, j], expected, rtol=1e-4, atol=1e-4)
    if net.num_gates > 1:
        assert table.scores.shape == (len(images), net.num_gates, 4)
        with pytest.raises(ValueError, match="use sweep"):
            point_at(table)
        return
    output = net(images)
    chosen = torch.tensor(net.routing_space)[choose_routes(table.scores, table.madds)]
    assert torch.equal(output.routes[:, 0], chosen)
    assert float(output.madds.double().mean()) == pytest.approx(point_at(table).madds)
    assert torch.equal(with_gate(table, net).scores, table.scores)


def test_gate_inputs_are_those_of_the_paths_upstream(families, randomize, images_of):
    net = randomize(families["resnet"]())
    x, paths = images_of(net), [(0, 0, 0), (2, 1, 3)]
    batches = [Images(i, torch.arange(len(i))) for i in x.split(4)]
    table = collect(net, batches, upstream=paths)
    assert table.labels.tolist() == [0, 1, 2, 3] * 2 + [0]
    assert len(table.logits) == len(x)  # once, whatever the number of paths
    features, first = net.front(x)
    features, second = net.stage(net.enter(features, 0, 2), 0, 2)
    _, third = net.stage(net.enter(features, 1, 1), 1, 1)
    expected = torch.cat([first, second, third], 1)
    torch.testing.assert_close(table.gate_input[:, 1], expected, rtol=1e-4, atol=1e-4)
    assert table.gate_input.shape[1] == len(paths)
    assert not torch.equal(table.gate_input[:, 0], table.gate_input[:, 1])
    torch.testing.assert_close(
        table.scores, net.scores(net.all_gate_logits(table.gate_input[:, 0])).detach()
    )


def test_each_draw_of_a_cached_image_takes_one_of_its_paths():
    inputs = torch.arange(20 * 3).view(20, 3, 1).float()
    logits, labels = torch.zeros(20, 4, 2), torch.arange(20)
    table = RouteTable(inputs, torch.zeros(20, 2, 4), logits, labels, (1, 2, 3, 4))
    data = CachedRoutes(table, batch_size=10, seed=0)
    seen = set()
    for epoch in range(8):
        batch = data.items.__getitems__([Draw(epoch, n) for n in range(20)])
        row = batch.gate_input[:, 0].long()
        assert torch.equal(row // 3, batch.label)
        seen |= set(row.tolist())
    assert len(seen) > 50
    again = data.items.__getitems__([Draw(7, n) for n in range(20)])
    assert torch.equal(again.gate_input, batch.gate_input)


def test_a_sweep_is_the_network_at_every_price(net, images):
    labels = torch.arange(len(images)) % net.num_classes
    batches = [Images(i, y) for i, y in zip(images.split(4), labels.split(4), strict=True)]
    taus = [-1e5, 0.0, 0.5, 1e5]  # beyond what random gates can think of
    points = sweep(net, batches, taus)
    for tau, point in zip(taus, points, strict=True):
        output = net(images, tau=tau)
        assert point.top1 == pytest.approx(
            float((output.logits.argmax(1) == labels).float().mean())
        )
        assert point.madds == pytest.approx(float(output.madds.double().mean()))
        counts = [(output.routes == k).double().mean() for k in net.routing_space]
        assert point.shares == pytest.approx([float(c) for c in counts])
    assert points[0].madds == net.madds(net.routing_space[-1], images.shape[-1])
    assert points[-1].madds == net.madds(net.routing_space[0], images.shape[-1])
    with pytest.raises(UserError, match="no images"):
        sweep(net, [], [0.0])


def test_a_price_from_the_curve_meets_its_target(families, randomize, images_of):
    torch.manual_seed(0)
    net = randomize(families["resnet"]())
    net.gate_score = "probability"
    x = torch.randn(60, *images_of(net).shape[1:])
    batches = [Images(x, torch.zeros(60, dtype=torch.int64))]
    costs = net.space_madds()
    curve = cost_curve(net, lambda: batches, costs)
    assert [p.tau for p in curve] == sorted(p.tau for p in curve)
    assert curve[0].madds == costs[-1]
    assert curve[-1].madds == costs[0]
    for share in (0.3, 0.5, 0.7):
        (point,) = sweep(net, batches, [tau_at(curve, share * costs[-1])])
        assert abs(point.madds / costs[-1] - share) < 0.05
    with pytest.raises(UserError, match="choose a target from"):
        tau_at(curve, 2 * costs[-1])


def test_collect_names_an_image_that_is_not_finite(net, images):
    images[7] = float("inf")
    batches = [Images(i, torch.zeros(len(i), dtype=torch.int64)) for i in images.split(4)]
    with pytest.raises(UserError, match="image 7"):
        collect(net, batches)
    with pytest.raises(UserError, match="no images"):
        collect(net, [])
