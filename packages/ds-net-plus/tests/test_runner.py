"""Grouped plain networks against the sliced network."""

import pytest
import torch

from ds_net_plus.layers import SwitchableBN
from ds_net_plus.model import DSConvNet
from ds_net_plus.runner import CHUNK_PIXELS, ChunkedFront, DynamicRunner
from tenfold.errors import UserError
from tenfold.testing import needs_cuda


def test_runner_equals_the_network(net, images):
    for tau in (0.0, 0.05, -0.05):
        expected, actual = net(images, tau=tau), DynamicRunner(net, tau=tau)(images)
        assert torch.equal(actual.routes, expected.routes)
        assert torch.equal(actual.madds, expected.madds)
        scale = float(expected.logits.abs().max())
        assert torch.allclose(actual.logits, expected.logits, atol=1e-5 * scale)


def test_runner_on_prescribed_paths_equals_the_network(net, images):
    """Every pair of neighbouring routes occurs, so every plain part is built and used."""
    runner, space = DynamicRunner(net), net.routing_space
    pairs = [(j, k) for j in range(len(space)) for k in range(len(space))]
    x = images[torch.arange(len(pairs)) % len(images)]
    paths = torch.tensor([(j, k, j)[: net.num_gates] for j, k in pairs])
    output = runner.run(*runner.front(x), lambda logits, gate: paths[:, gate], x.shape[-1])
    assert torch.equal(output.routes, torch.tensor(space)[paths])
    for n, path in enumerate(output.routes.tolist()):
        route = tuple(path) if net.num_gates > 1 else path[0]
        expected = net(x[n : n + 1], route=route).detach()
        scale = float(expected.abs().max())
        torch.testing.assert_close(output.logits[n : n + 1], expected, rtol=0, atol=1e-5 * scale)
        assert int(output.madds[n]) == net.madds(route, x.shape[-1])


def test_runner_equals_single_images_and_takes_empty_batches(net, images):
    runner = DynamicRunner(net)
    together = runner(images)
    for n in range(len(images)):
        alone = runner(images[n : n + 1])
        assert torch.equal(alone.routes[0], together.routes[n])
        scale = float(together.logits.abs().max())
        assert torch.allclose(alone.logits[0], together.logits[n], atol=1e-5 * scale)
    assert runner(images[:0]).logits.shape == (0, net.num_classes)


@pytest.mark.parametrize("score", ["logit", "probability"])
def test_runner_on_a_subset_of_the_space(net, images, score):
    net.gate_score = score
    space, (low, *_, high) = net.routing_space, net.routing_space[1:]
    features = net.front(images)
    scores = net.scores(net.gate_logits(features.gate_input))
    price = torch.tensor(net.space_madds(images.shape[-1])) / net.madds(space[-1])
    columns = [space.index(low), space.index(high)]
    for tau in (0.0, 1.0, 1e6, -1e6):
        better = (scores - tau * price)[:, columns].argmax(1)
        routes = DynamicRunner(net, routes=(low, high), tau=tau)(images).routes[:, 0]
        assert routes.tolist() == [(low, high)[j] for j in better.tolist()]


@pytest.mark.parametrize("routes", [(), (1, 2, 99), (-1,)])
def test_runner_refuses_routes_outside_the_space(net, routes):
    with pytest.raises(UserError, match=r"not of the routing space: choose from \["):
        DynamicRunner(net, routes=routes)


def test_tau_prices_the_size_of_the_images(randomize):
    net = randomize(DSConvNet(image_size=64))  # the ratio of its routes depends on the size
    x = torch.randn(64, 1, 24, 24)
    with torch.no_grad():
        scores = net.gate_logits(net.front(x).gate_input)
    costs = torch.tensor([net.madds(k, 24) for k in net.routing_space])
    expected = (scores - 3.0 * costs / costs[-1]).argmax(1)
    assert torch.equal(net(x, tau=3.0).routes[:, 0], expected)
    assert torch.equal(DynamicRunner(net, tau=3.0)(x).routes[:, 0], expected)


def test_mapping_over_batches_gives_the_answers_of_single_calls(net, images):
    runner = DynamicRunner(net)
    batches = [images[:4], images[4:5], images[5:]]
    answers = list(runner.map(iter(batches)))
    for answer, batch in zip(answers, batches, strict=True):
        expected = runner(batch)
        assert all(torch.equal(a, e) for a, e in zip(answer, expected, strict=True))
    assert list(runner.map([])) == []
    images[7] = float("nan")
    with pytest.raises(UserError, match="image 2 of the batch"):
        list(runner.map(batches))


def test_a_budget_is_its_price(net, images):
    net.budgets = [(0.4, 0.5 * net.madds(net.routing_space[-1])), (0.1, net.madds(3))]
    runner = DynamicRunner(net, budget=0.5)
    assert runner.tau == pytest.approx(0.4)
    with pytest.raises(UserError, match="not feasible"):
        DynamicRunner(net, budget=0.2)


def test_bfloat16_parts_answer_in_float32(net, images):
    exact, runner = DynamicRunner(net), DynamicRunner(net, dtype=torch.bfloat16)
    paths = torch.arange(len(images))[:, None].expand(-1, net.num_gates) % 4

    def run(runner):
        x = images.to(runner.dtype).contiguous(memory_format=torch.channels_last)
        return runner.run(*runner.front(x), lambda logits, gate: paths[:, gate], x.shape[-1])

    expected, actual = run(exact).logits, run(runner).logits
    assert actual.dtype == torch.float32
    assert runner(images).logits.dtype == torch.float32
    error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < 0.05  # eight bits of mantissa, a dozen layers


def test_runner_refuses_untrained_gates():
    with pytest.raises(UserError, match="train-gate"):
        DynamicRunner(DSConvNet().eval())


def test_runner_refuses_unmeasured_statistics(net):
    if not any(isinstance(layer, SwitchableBN) for layer in net.modules()):
        DynamicRunner(net)  # nothing to measure
        return
    for bn in net.modules():
        if isinstance(bn, torch.nn.BatchNorm2d):
            bn.reset_running_stats()
    with pytest.raises(UserError, match="never measured"):
        DynamicRunner(net)


def test_the_front_in_chunks_is_the_front(net):
    size = net.image_size
    count = CHUNK_PIXELS // size**2
    x = torch.randn(2 * count + 1, net.in_channels, size, size)
    whole = net.materialize_front()
    for chunked, expected in zip(ChunkedFront(whole)(x), whole(x), strict=True):
        torch.testing.assert_close(chunked, expected, rtol=1e-5, atol=1e-5)


@needs_cuda
def test_runner_on_a_gpu_equals_the_cpu(net, images):
    expected = DynamicRunner(net)(images)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        actual = DynamicRunner(net.cuda())(images.cuda())
    assert torch.equal(actual.routes.cpu(), expected.routes)
    assert torch.equal(actual.madds.cpu(), expected.madds)
    scale = float(expected.logits.abs().max())
    torch.testing.assert_close(actual.logits.cpu(), expected.logits, rtol=0, atol=1e-4 * scale)
