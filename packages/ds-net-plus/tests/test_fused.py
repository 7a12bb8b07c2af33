"""Fused layers against convolution, bias and activation one after the other."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_net_plus import fused
from ds_net_plus.fused import FusedConvAct, fuse
from ds_net_plus.layers import ConvAct

needs_onednn = pytest.mark.skipif(not fused.works(), reason="this PyTorch has no such operators")


def plain(*arguments: int, act: str = "silu", **options: int) -> tuple[ConvAct, nn.Conv2d]:
    conv = nn.Conv2d(*arguments, **options).requires_grad_(False)
    bn = nn.BatchNorm2d(conv.out_channels, eps=0.0).eval()  # the identity
    return ConvAct(conv, bn, act), conv


@needs_onednn
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (plain(8, 24, 3, stride=2, padding=1), 9),
        (plain(48, 48, 3, padding=1, act="none"), 6),
        (plain(20, 12, 1, act="relu"), 5),
        (plain(24, 24, 3, padding=1, groups=24), 7),
        (plain(24, 24, 5, stride=2, padding=2, groups=24), 8),
    ],
)
def test_a_fused_layer_equals_its_parts_at_every_batch_size(layer, size):
    reference, conv = layer
    one = FusedConvAct(reference)
    with torch.inference_mode():
        for batch in (3, 1, 32, 0):  # the weights are packed for the first
            x = torch.randn(batch, conv.in_channels, size, size)
            y = F.conv2d(
                x.double(),
                conv.weight.double(),
                conv.bias.double(),
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
            )
            y = {"silu": F.silu, "relu": F.relu, "none": lambda y: y}[reference.act](y)
            for form in (torch.channels_last, torch.contiguous_format):
                torch.testing.assert_close(
                    one(x.contiguous(memory_format=form)).double(), y, rtol=1e-5, atol=1e-5
                )


@needs_onednn
@pytest.mark.parametrize("act", ["silu", "relu", "none"])
@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.BatchNorm2d(8)])
def test_a_norm_that_is_not_folded_runs_behind_the_convolution(norm, act):
    nn.init.normal_(norm.weight)
    layer = ConvAct(nn.Conv2d(4, 8, 3), norm, act, fold_bn=False).eval().requires_grad_(False)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(FusedConvAct(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_only_float32_layers_are_fused():
    layers = {
        "folded": ConvAct(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        "with norm": ConvAct(nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4)),
        "double": ConvAct(nn.Conv2d(4, 4, 1).double(), nn.BatchNorm2d(4).double()),
    }
    network = fuse(nn.Sequential(nn.Sequential(*layers.values())))
    assert [type(layer) is FusedConvAct for layer in network[0]] == [True, True, False]


def test_a_build_without_the_operators_keeps_its_layers(monkeypatch):
    monkeypatch.setattr(fused, "works", lambda: False)
    network = fuse(nn.Sequential(ConvAct(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))))
    assert type(network[0]) is ConvAct
