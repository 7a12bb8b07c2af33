"""Batch-norm statistics of every route, measured anew after Stage I."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_net_plus.layers import SwitchableBN
from ds_net_plus.model import DynamicNet
from tenfold.errors import UserError


@torch.no_grad()
def recalibrate(
    net: DynamicNet, images: Iterable[Tensor], routes: Sequence[int] | None = None
) -> int:
    """Replaces all running statistics by their mean over `images`.

    Every batch runs the front, then the rest of each route, then the front of mode "largest". So
    the wide front has its own statistics, and behind it mode "largest" uses those of the widest
    route. A set that several of these share counts the first only. The t-th batch has weight 1/t;
    means are averaged over ranks.

    Args:
        net: left in the mode it had.
        images: batches (N, C, H, W) on the network's device.
        routes: routes to measure, all where None.

    Returns:
        The number of batches; 0 for a network without batch norms, which has nothing to measure.

    Raises:
        UserError: there was no batch.
    """
    norms = [layer for layer in net.modules() if isinstance(layer, SwitchableBN)]
    if not norms:
        return 0
    sets: list[torch.nn.BatchNorm2d] = [bn for layer in norms for bn in layer.aux_bn]  # pyright: ignore[reportAssignmentType]
    momenta = [bn.momentum for bn in sets]

    def visited(layer: SwitchableBN, args: tuple[Tensor, ...], output: Tensor) -> None:
        layer.statistics(args[0].shape[1]).momentum = 0.0

    hooks = [layer.register_forward_hook(visited) for layer in norms]  # pyright: ignore[reportArgumentType]
    training, count = net.training, 0
    net.train()
    try:
        for batch in images:
            count += 1
            for bn in sets:
                bn.momentum = 1.0 / count
            features = net.front(batch).features
            for route in range(net.num_routes) if routes is None else routes:
                net.rest(features, route)
            net.front(batch, largest=True)
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
        for bn, momentum in zip(sets, momenta, strict=True):
            bn.momentum = momentum
    if count == 0:
        raise UserError("recalibration needs at least one batch of images")
    if dist.is_available() and dist.is_initialized():
        for bn in sets:
            for statistic in bn.buffers():
                if statistic.is_floating_point():
                    dist.all_reduce(statistic)
                    statistic.div_(dist.get_world_size())
    return count
