"""How much the units of a trained network matter, so that narrow routes keep the best of them."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tenfold.errors import UserError

MOST_IMAGES = 1000


class Readers(NamedTuple):
    """The layers that read what a group of units writes.

    Attributes:
        layers: linear layers or convolutions with these units as their input.
        channels: input channels that belong to one unit, such as those of an attention head.
    """

    layers: tuple[nn.Module, ...]
    channels: int = 1


def taylor_scores(
    model: nn.Module,
    readers: Mapping[str, Readers],
    batches: Iterable[Any],
    most: int = MOST_IMAGES,
) -> dict[str, Float[Tensor, " units"]]:
    """First-order Taylor importance: what the loss of an image does when a unit goes.

    |sum of w dL/dw| over the weights w that read the unit, L the cross-entropy of one image; summed
    over images. A layer that reads x has sum_o w_oc dL/dw_oc = sum over positions of x_c dL/dx_c,
    so one backward pass to the layers' inputs gives it for every image of a batch.

    Args:
        model: image -> class logits; run in eval mode and left as it was.
        readers: the layers that read each group of units.
        batches: (images, labels, ...) each.
        most: images to look at; further ones are not read.

    Returns:
        The scores of every group.

    Raises:
        UserError: no images, or a label that is no class.
    """
    totals: dict[str, Tensor] = {}
    training, parameter, seen = model.training, next(model.parameters()), 0
    model.eval()
    try:
        for batch in batches:
            if not isinstance(batch, list | tuple) or len(batch) < 2:
                raise UserError("Taylor importance needs batches of (images, labels)")
            images, labels = batch[:2]
            images = images[: most - seen].to(parameter)
            labels = labels[: most - seen].to(parameter.device)
            for key, score in _batch_scores(model, readers, images, labels).items():
                totals[key] = totals[key] + score if key in totals else score
            seen += len(images)
            if seen >= most:
                break
    finally:
        model.train(training)
    if not seen:
        raise UserError("Taylor importance needs at least one batch of images")
    return totals


def _batch_scores(
    model: nn.Module, readers: Mapping[str, Readers], images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """`taylor_scores` of one batch."""
    inputs: dict[nn.Module, Tensor] = {}

    def alias(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        inputs[layer] = args[0].view_as(args[0])  # the gradient of this reader alone
        return (inputs[layer],)

    layers = [layer for group in readers.values() for layer in group.layers]
    hooks = [layer.register_forward_pre_hook(alias) for layer in layers]
    try:
        with torch.enable_grad():
            logits = model(images.detach().requires_grad_())
            _check_labels(labels, logits.shape[1])
            loss = F.cross_entropy(logits, labels, reduction="sum")
            gradients = torch.autograd.grad(loss, [inputs[layer] for layer in layers])
    finally:
        for hook in hooks:
            hook.remove()
    effects = {
        layer: _per_channel(layer, inputs[layer].detach() * gradient)
        for layer, gradient in zip(layers, gradients, strict=True)
    }
    scores = {}
    for key, group in readers.items():
        total = torch.stack([effects[layer] for layer in group.layers]).sum(0)
        scores[key] = total.unflatten(1, (-1, group.channels)).sum(2).abs().sum(0)
    return scores


def _per_channel(layer: nn.Module, values: Tensor) -> Float[Tensor, "batch channels"]:
    """Sums over positions; channels come second in a convolution's input, last in others."""
    if not isinstance(layer, nn.Conv2d):
        values = values.movedim(-1, 1)
    return values.reshape(*values.shape[:2], -1).sum(2)


def _check_labels(labels: Tensor, classes: int) -> None:
    bad = labels[(labels < 0) | (labels >= classes)]
    if len(bad):
        raise UserError(f"label {int(bad[0])} is none of the {classes} classes of the network")
