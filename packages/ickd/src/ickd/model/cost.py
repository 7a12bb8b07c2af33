"""What a network costs: multiply-adds of its convolutions and linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from ickd.taps import still


def count_macs(model: nn.Module, image_size: int | tuple[int, int], channels: int = 3) -> int:
    """Multiply-adds of all `nn.Conv2d` and `nn.Linear` of one forward pass, per image.

    Args:
        model: any network of images, on any device ("meta" too); it is left as it was.
        image_size: side of the square image, or (height, width).
        channels: of the image.
    """
    total = 0

    def count(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        total += output.numel() * layer.weight[0].numel()

    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    like = next(model.parameters())
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with still(model):
            model(like.new_zeros(1, channels, *size))
    finally:
        for hook in hooks:
            hook.remove()
    return total
