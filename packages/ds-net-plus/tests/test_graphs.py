"""Networks as CUDA graphs: rounding and padding everywhere, the graphs themselves on a GPU."""

import pytest
import torch
from torch import nn

from ds_net_plus.graphs import SIZES, Captured, GraphedNetwork, rounded_up
from ds_net_plus.runner import DynamicRunner
from tenfold.testing import needs_cuda


class Replayed(GraphedNetwork):
    """Runs the network where a GPU would replay a graph: always on the whole buffer."""

    def capture(self, inputs):
        outputs = self.network(inputs)
        parts = outputs if isinstance(outputs, tuple) else (outputs,)

        def replay():
            fresh = self.network(inputs)
            for old, new in zip(
                parts, fresh if isinstance(fresh, tuple) else (fresh,), strict=True
            ):
                old.copy_(new)

        return Captured(replay, inputs, outputs)


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x * 2, x.sum((1, 2, 3))


def test_sizes_are_rounded_up():
    assert [rounded_up(n) for n in (1, 2, 3, 5, 9, 33, 64)] == [1, 2, 4, 8, 16, 64, 64]


@pytest.mark.parametrize("network", [nn.Conv2d(3, 5, 3), TwoOutputs()])
@pytest.mark.parametrize("count", [0, 1, 3, 64, 150])
@torch.no_grad()
def test_padded_batches_answer_as_the_network_does(network, count):
    graphed = Replayed(network)
    for seed in (0, 1):  # the second run meets what the first left in the buffers
        x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(graphed(x), network(x))
    sizes = {key[0] for key in graphed.captured}
    assert sizes <= set(SIZES)
    assert len(graphed.captured) == (0 if count == 0 else 2 if count == 150 else 1)


@torch.no_grad()
def test_answers_outlive_the_next_call():
    network = nn.Conv2d(3, 5, 3)
    graphed, x = Replayed(network), torch.randn(3, 3, 8, 8)
    first = graphed(x)
    graphed(torch.randn(4, 3, 8, 8))
    torch.testing.assert_close(first, network(x))


@torch.no_grad()
def test_the_memory_layout_is_kept():
    graphed = Replayed(nn.Conv2d(3, 5, 3))
    graphed(torch.randn(3, 3, 8, 8).contiguous(memory_format=torch.channels_last))
    (run,) = graphed.captured.values()
    assert run.inputs.is_contiguous(memory_format=torch.channels_last)


@needs_cuda
@pytest.mark.gpu
@torch.no_grad()
def test_graphs_on_a_gpu_equal_the_network(net, images):
    net, images = net.cuda(), images.cuda()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain, graphed = DynamicRunner(net, graphs=False), DynamicRunner(net, graphs=True)
        for x in (images, images[:3], images.repeat(9, 1, 1, 1)):
            expected, actual = plain(x), graphed(x)
            assert torch.equal(actual.routes, expected.routes)
            scale = float(expected.logits.abs().max())
            torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-4 * scale)


@needs_cuda
@pytest.mark.gpu
@torch.no_grad()
def test_one_transfer_to_the_host_for_each_gate(net, images):
    runner = DynamicRunner(net.cuda(), graphs=False)
    x = images.cuda()
    runner(x)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        runner(x)
        torch.cuda.synchronize()
    copies = [event for event in profile.events() if "Memcpy DtoH" in event.name]
    assert len(copies) == net.num_gates
