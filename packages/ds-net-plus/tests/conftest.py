"""Builders that several test files share."""

import pytest
import torch
from jaxtyping import install_import_hook

# Two processes share the cores, and tiny convolutions are slow on many threads.
torch.set_num_threads(1)

# Checks every shape annotation while the tests run; an int may stand for a float (PEP 484).
install_import_hook(
    ["tenfold", "ds_net_plus"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

from torch import nn

from ds_net_plus.layers import SwitchableBN
from ds_net_plus.model import DSConvNet, DSMobileNet, DynamicNet


def build_tiny_mbnet(**overrides: object) -> DSMobileNet:
    """DS-MBNet in small: 14 routes, 10 classes, 64x64 images."""
    arguments: dict = {
        "num_classes": 10,
        "stem_widths": (8, 12),
        "stage_widths": (
            (8, 16),
            (12, 20),
            (16, 28),
            tuple(range(16, 69, 4)),
            tuple(range(24, 77, 4)),
        ),
        "depths": (1, 2, 2, 3, 2),
        "dropout": 0.0,
        "image_size": 64,
    }
    return DSMobileNet(**{**arguments, **overrides})


def randomize_net(net: DynamicNet, seed: int = 0) -> DynamicNet:
    """Random statistics, affine pairs and gate, activations of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, SwitchableBN):
            for bn in layer.aux_bn:
                bn.running_mean.normal_(0, 0.3, generator=generator)
                bn.running_var.uniform_(0.5, 1.5, generator=generator)
            if layer.aux_bn[-1].affine:
                nn.init.uniform_(layer.aux_bn[-1].weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(layer.aux_bn[-1].bias, 0, 0.2, generator=generator)
    head = net.gate_parameters()[-1]
    nn.init.normal_(head, 0, 1.0, generator=generator)
    return net.eval()


@pytest.fixture(scope="session")
def tiny_mbnet():
    """The builder of DS-MBNet in small."""
    return build_tiny_mbnet


@pytest.fixture(scope="session")
def randomize():
    """The function that gives a network random statistics and a random gate."""
    return randomize_net


@pytest.fixture(params=["mbnet", "cnn"])
def net(request) -> DynamicNet:
    """Each family in small, with random statistics and a gate that uses several routes."""
    built = build_tiny_mbnet() if request.param == "mbnet" else DSConvNet()
    return randomize_net(built)


@pytest.fixture
def images(net) -> torch.Tensor:
    """Nine images for `net`."""
    generator = torch.Generator().manual_seed(1)
    shape = (9, net.in_channels, net.image_size, net.image_size)
    return torch.randn(shape, generator=generator)
