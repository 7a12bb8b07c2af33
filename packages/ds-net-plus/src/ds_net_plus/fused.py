"""Convolution, bias and activation in one oneDNN call, with weights packed once.

On a CPU PyTorch runs the three apart and packs the weights anew in every call, which narrow routes
and small groups of images feel most. The two operators used here are those that PyTorch's own
compiler emits; where they are missing or wrong, networks stay as they are.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_net_plus.layers import ConvAct, activate


class FusedConvAct(nn.Module):
    """`ConvAct` for float32 inference on a CPU."""

    def __init__(self, layer: ConvAct) -> None:
        """Takes over the weights of `layer`; a norm that is left runs behind the call."""
        super().__init__()
        conv = layer.conv
        self.weight, self.bias = conv.weight.detach(), conv.bias
        self.how = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.norm, self.act = layer.norm, layer.act
        fused = layer.act if layer.norm is None else "none"
        self.activation = {"silu": "swish"}.get(fused, fused)
        self.packed = False

    def forward(self, x: Tensor) -> Tensor:
        """act(norm(conv(x))); the first call decides how the weights are packed."""
        ops = torch.ops.mkldnn
        if not self.packed:
            shape = list(x.shape)
            self.weight = ops._reorder_convolution_weight(self.weight, *self.how, shape)
            self.packed = True
        arguments = (self.weight, self.bias, *self.how, self.activation, [], "")
        y = ops._convolution_pointwise(x, *arguments)
        return y if self.norm is None else activate(self.norm(y), self.act)


@cache
def works() -> bool:
    """Whether this build of PyTorch has the operators, and they compute what they should."""
    conv = nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
    x = torch.linspace(-1, 1, 16 * 25).view(1, 16, 5, 5)
    try:
        fused = FusedConvAct(ConvAct(conv, nn.BatchNorm2d(16)))(x)
    except (AttributeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return False
    return torch.allclose(fused, F.silu(conv(x)), atol=1e-5)


def fuse(network: nn.Module) -> nn.Module:
    """Puts `FusedConvAct` in the place of every layer that allows it, in place.

    Args:
        network: a plain network on its device, in eval mode.

    Returns:
        The same network.
    """
    for name, child in network.named_children():
        if isinstance(child, ConvAct):
            weight = child.conv.weight
            fits = weight.device.type == "cpu" and weight.dtype == torch.float32
            if fits and works():
                setattr(network, name, FusedConvAct(child))
        else:
            fuse(child)
    return network
