"""Builders that several test files share."""

from functools import partial

import pytest
import torch

from tenfold.pytest_plugin import check_annotations

check_annotations("tenfold", "ds_net_plus")

from torch import nn

from ds_net_plus.layers import MultiHeadGate, SwitchableBN, TokenGate
from ds_net_plus.model import DSConvNet, DSMobileNet, DSResNet, DSViT, DynamicNet


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


def build_tiny_resnet(**overrides: object) -> DSResNet:
    """DS-ResNet in small: three stages with a gate each, 7 classes, 32x32 images."""
    arguments: dict = {
        "num_classes": 7,
        "depths": (1, 2, 2),
        "base_widths": (64, 64, 128),
        "gates": 3,
        "stem_width": 32,
        "image_size": 32,
    }
    return DSResNet(**{**arguments, **overrides})


def build_tiny_vit(**overrides: object) -> DSViT:
    """DS-ViT in small: routes that differ in every size, and widen the front's; 16x16 images."""
    arguments: dict = {
        "num_classes": 7,
        "front": (24, 1, 2),
        "front_blocks": 1,
        "routes": ((16, 1, 1, 1), (24, 1, 2, 2), (32, 2, 2, 2), (40, 2, 4, 3)),
        "head_dim": 8,
        "patch_size": 4,
        "image_size": 16,
    }
    return DSViT(**{**arguments, **overrides})


FAMILIES = {
    "mbnet": build_tiny_mbnet,
    "mbnet-kernels": partial(
        build_tiny_mbnet, kernel_size=5, route_kernels=(3,) * 4 + (5,) * 10, image_size=32
    ),
    "cnn": DSConvNet,
    "resnet": build_tiny_resnet,
    "resnet-bn": partial(build_tiny_resnet, gates=1),
    "resnet-in-block": partial(build_tiny_resnet, gate_position="in_block", stem="small"),
    "resnet-one-in-block": partial(build_tiny_resnet, gates=1, gate_position="in_block"),
    "vit": build_tiny_vit,
    "vit-depth": partial(
        build_tiny_vit, routes=[(24, 1, 2, blocks) for blocks in (1, 2, 3, 4)], gate_hidden=8
    ),
}


def randomize_net(net: DynamicNet, seed: int = 0) -> DynamicNet:
    """Random statistics, affine pairs, attention and gates, activations of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, SwitchableBN):
            for bn in layer.aux_bn:
                bn.running_mean.normal_(0, 0.3, generator=generator)
                bn.running_var.uniform_(0.5, 1.5, generator=generator)
            _randomize_affine(layer.aux_bn[-1], generator)
        elif isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            _randomize_affine(layer, generator)
        elif isinstance(layer, MultiHeadGate) and layer.attention == "tanh1p":
            nn.init.normal_(layer.conv_expand.weight, 0, 0.3, generator=generator)
        elif isinstance(layer, TokenGate):
            nn.init.normal_(layer.expand.weight, 0, 0.3, generator=generator)
            nn.init.normal_(layer.reduce.weight, 0, 0.5, generator=generator)
    if isinstance(net, DSViT):  # 0.02 would leave every token as good as equal
        for name, parameter in net.named_parameters():
            if parameter.ndim > 1 and "gate" not in name:
                nn.init.normal_(parameter, 0, 0.3, generator=generator)
    for head in net.gate_heads():
        nn.init.normal_(head, 0, 1.0, generator=generator)
    return net.eval()


def _randomize_affine(norm: nn.Module, generator: torch.Generator) -> None:
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        nn.init.normal_(norm.bias, 0, 0.2, generator=generator)


@pytest.fixture(scope="session")
def tiny_mbnet():
    """The builder of DS-MBNet in small."""
    return build_tiny_mbnet


@pytest.fixture(scope="session")
def randomize():
    """The function that gives a network random statistics and a random gate."""
    return randomize_net


@pytest.fixture(scope="session")
def families():
    """The builder of each family in small, by name."""
    return FAMILIES


@pytest.fixture(params=list(FAMILIES))
def net(request) -> DynamicNet:
    """Each family in small, with random statistics and gates that use several routes."""
    return randomize_net(FAMILIES[request.param]())


def nine_images(net: DynamicNet) -> torch.Tensor:
    """Nine images for `net`."""
    generator = torch.Generator().manual_seed(1)
    shape = (9, net.in_channels, net.image_size, net.image_size)
    return torch.randn(shape, generator=generator)


@pytest.fixture(scope="session")
def images_of():
    """The function that makes nine images for a network."""
    return nine_images


@pytest.fixture
def images(net) -> torch.Tensor:
    """Nine images for `net`."""
    return nine_images(net)
