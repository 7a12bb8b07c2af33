"""The margins of OFD come from the batch norm in front of each stage's last ReLU."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ickd.module.margins import teacher_margins
from ickd.networks import Network, open_network
from tenfold.distillation import margin_from_bn
from tenfold.distillation.ofd import margin_from_map


def trained(name: str) -> Network:
    """Norms whose weights and biases all differ."""
    network = open_network(name).eval()
    generator = torch.Generator().manual_seed(2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = 0.5 + torch.rand(module.weight.shape, generator=generator)
            module.bias.data = 0.5 * torch.randn(module.bias.shape, generator=generator)
    return network


def images(network: Network) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(network.example(4).shape, generator=generator)


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        # the last norm of the residual path, with another one in the shortcut
        ("embedded:gratings-teacher", [f"stages.{n}.body.conv2.1" for n in (1, 2, 3)]),
        ("embedded:gratings-student", [f"stages.{n}.body.1" for n in (1, 2, 3)]),
        ("zoo:resnet14", [f"layer{n}.1.bn2" for n in (1, 2, 3)]),
        ("zoo:resnet8x4", [f"layer{n}.0.bn2" for n in (1, 2, 3)]),
        # the norm that the next stage begins with
        ("zoo:wrn_16_1", ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]),
        ("zoo:vgg8", [f"block{n}.1" for n in (1, 2, 3, 4)]),
    ],
)
def test_a_margin_is_of_the_norm_before_the_last_relu(name, norms):
    network = trained(name)
    x = images(network)
    found = teacher_margins(network, x)
    measured = [margin_from_map(map_) for map_ in network.taps(x).signal("preact_stages")]
    for margin, key, other in zip(found, norms, measured, strict=True):
        norm = network.net.get_submodule(key)
        assert torch.equal(margin, margin_from_bn(norm.weight, norm.bias))
        assert (margin - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["zoo:resnet8", "zoo:wrn_16_1", "embedded:gratings-teacher"])
def test_synchronised_norms_give_the_same_margins(name):
    network = trained(name)
    several = copy.deepcopy(network)
    several.net = nn.SyncBatchNorm.convert_sync_batchnorm(several.net)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in several.modules())
    x = images(network)
    pairs = zip(teacher_margins(several, x), teacher_margins(network, x), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
