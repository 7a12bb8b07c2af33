"""A compiled network against the network, whether it tells its features itself or by hooks."""

import inspect

import jaxtyping
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from ickd.compiling import CompiledNetwork
from ickd.networks import Network, open_network
from tenfold.distillation import Taps


def hooked() -> Network:
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    return Network(nn.Sequential(*layers), tap_names=("0", "1"), example_size=8)


@pytest.mark.parametrize(
    ("build", "maps"), [(hooked, 2), (lambda: open_network("embedded:gratings-teacher"), 4)]
)
def test_a_compiled_network_says_the_same_in_one_graph(build, maps, monkeypatch):
    # dynamo cannot trace the checks of shapes that these tests switch on
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(Taps, "__init__", inspect.unwrap(Taps.__init__))
    torch._dynamo.reset()
    counters.clear()
    network = build().eval().requires_grad_(False)
    compiled = CompiledNetwork(network, backend="eager")
    for seed in range(4):
        torch.manual_seed(seed)
        pixels = torch.rand(2, 3, network.example_size, network.example_size)
        ours, theirs = compiled.taps(pixels), network.taps(pixels)
        assert len(ours.maps) == maps
        said, wanted = ((*taps.maps, taps.pooled, taps.logits) for taps in (ours, theirs))
        torch.testing.assert_close(said, wanted, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(compiled(pixels), network(pixels), rtol=1e-5, atol=1e-6)


def test_the_network_keeps_no_hooks():
    network = open_network("timm:resnet18").eval()
    compiled = CompiledNetwork(network, backend="eager")
    hooked = [m for m in compiled.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
