"""A compiled network against the network, whether it tells its features itself or by hooks."""

import json
import subprocess
import sys

from ickd.compiling import CompiledNetwork
from ickd.networks import open_network

# in a process of its own: the compiler would trace the checks of shapes that other tests run under
COMPILE = """
import json, torch
from torch import nn
from torch._dynamo.utils import counters
from ickd.compiling import CompiledNetwork
from ickd.networks import Network, open_network

layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
hooked = Network(nn.Sequential(*layers), tap_names=("0", "1"), example_size=8)
found = {}
for name, network in {"hooks": hooked, "own": open_network("embedded:gratings-teacher")}.items():
    network.eval().requires_grad_(False)
    counters.clear()
    compiled, same = CompiledNetwork(network, backend="eager"), []
    for seed in range(4):
        pixels = torch.rand(2, 3, network.example_size, network.example_size)
        ours, theirs = compiled.taps(pixels), network.taps(pixels)
        said = [(*taps.maps, taps.pooled, taps.logits) for taps in (ours, theirs)]
        same += [torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*said, strict=True)]
    graphs, breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
    same.append(torch.allclose(compiled(pixels), network(pixels), rtol=1e-5, atol=1e-6))
    found[name] = [graphs, breaks, len(theirs.maps), all(same)]
print(json.dumps(found))
"""


def test_a_compiled_network_says_the_same_in_one_graph():
    command = [sys.executable, "-c", COMPILE]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == {"hooks": [1, 0, 2, True], "own": [1, 0, 4, True]}


def test_the_network_keeps_no_hooks():
    network = open_network("timm:resnet18").eval()
    compiled = CompiledNetwork(network, backend="eager")
    hooked = [m for m in compiled.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
