"""What is timed computes what it should, on the shares that were asked for."""

import pytest
import torch

from ds_net_plus.measure import execution_rivals, mix_to_choice, ordinary_activations
from ds_net_plus.model import DSConvNet
from tenfold.errors import UserError


def test_every_rival_runs_the_prescribed_routes(net, images):
    choice = torch.tensor([0, 3, 1, 1, 0, 2, 0, 3, 0])
    routes = [net.routing_space[j] for j in choice.tolist()]
    alone = [net(images[n : n + 1], route=route) for n, route in enumerate(routes)]
    expected = {
        "mix": torch.cat(alone),
        "widest": net(images, route=net.routing_space[-1]),
        "cheapest": net(images, route=net.routing_space[0]),
    }
    for name, run in execution_rivals(net, choice, net.image_size).items():
        answer = run(images)
        if name == "per image":
            answer = torch.cat([one.logits for one in answer])
        answer = getattr(answer, "logits", answer)
        wanted = expected.get(name.removeprefix("naive "), expected["mix"])
        scale = float(wanted.abs().max())
        torch.testing.assert_close(answer, wanted, rtol=0, atol=1e-5 * scale)


def test_a_mix_is_rounded_to_the_whole_batch():
    counts = mix_to_choice((0.9, 0.0, 0.0, 0.1), 32).bincount(minlength=4)
    assert counts.tolist() == [29, 0, 0, 3]
    assert mix_to_choice((1 / 3, 1 / 3, 1 / 3), 32).bincount().tolist() == [11, 10, 11]
    for shares in ((0.5, 0.6), (1.5, -0.5)):
        with pytest.raises(UserError, match="sum to 1"):
            mix_to_choice(shares, 8)


def test_activations_are_of_ordinary_size(tiny_mbnet):
    x = torch.randn(4, 3, 64, 64)
    for build in (tiny_mbnet, lambda: DSConvNet(in_channels=3)):
        net = ordinary_activations(build()).eval()
        for route in range(net.num_routes):
            spread = net.front(x).features.std(), net(x, route=route).std()
            assert all(1e-3 < float(s) < 1e3 for s in spread)
