"""What both stages' steps share: modes that are put back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ds_net_plus.model import DynamicNet


@contextmanager
def eval_mode(net: torch.nn.Module) -> Iterator[None]:
    """The network evaluates inside, whatever its mode."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)


@contextmanager
def gate_alone(model: DynamicNet) -> Iterator[None]:
    """Only the slimming heads collect gradients inside."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in model.gate_parameters():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
