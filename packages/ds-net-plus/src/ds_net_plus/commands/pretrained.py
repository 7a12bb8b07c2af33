"""convert-checkpoint for a network of timm."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_net_plus.checkpoint import DATA, STUDENT, Saved
from ds_net_plus.commands.common import open_data
from ds_net_plus.commands.stages import write
from ds_net_plus.convert import from_timm, load_timm, timm_deviation
from ds_net_plus.data import normalisation
from ds_net_plus.model import DSResNet, DSViT, DynamicNet, create_model

PREFIX = "timm:"
TOLERANCE = 1e-4


def convert_timm(
    source: str,
    out: Path | None,
    pretrained: bool,
    data: dict[str, Any] | None,
    options: dict[str, Any],
) -> None:
    """Turns a timm network into a checkpoint of this package, and tells what became of it.

    Args:
        source: timm:NAME or timm:NAME:FILE.
        out: where to write the checkpoint; NAME-converted.ckpt where None.
        pretrained: fetch the weights of that name, where no file is given.
        data: images for importance "taylor", as changes to ImageNet's.
        options: those of `from_timm` that were given.

    Raises:
        RuntimeError: the full route answers otherwise than timm.
    """
    _, name, *file = source.split(":", 2)
    if pretrained and not file:
        print(f"fetching the weights of {name}")
    model = load_timm(name, pretrained, *file)
    images = _images(model, data, options) if options.get("importance") == "taylor" else None
    net = from_timm(model, images=images, **options)
    print(f"network: {net.name} from {name}, {net.num_classes} classes")
    for route in net.routes:
        widths = "/".join(map(str, route.widths))
        print(
            f"route {route.index}: widths {widths}, {route.madds / 1e9:.3f} G MAdds, "
            f"{route.params / 1e6:.2f} M parameters"
        )
    deviation = timm_deviation(net, model)
    text = f"the full route differs from timm's by {deviation:.1e} of the largest output"
    if not deviation <= TOLERANCE:
        raise RuntimeError(f"{text}, more than {TOLERANCE:g}")
    print(f"parity: {text}")
    arguments = _imagenet(net, model)
    at = write(out or Path(f"{name}-converted.ckpt"), Saved({DATA: arguments}, {STUDENT: net}))
    print(f"wrote {at}; next:")
    for line in _next_steps(net, at, arguments):
        print(f"  {line}")


def _imagenet(net: DynamicNet, model: nn.Module) -> dict[str, Any]:
    """Arguments of the data that the original was trained on."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    theirs = tuple(tuple(config.get(key, ())) for key in ("mean", "std"))
    arguments: dict[str, Any] = {"source": "imagenet", "image_size": net.image_size}
    if all(theirs) and theirs != normalisation(net.in_channels):
        arguments |= {"mean": list(theirs[0]), "std": list(theirs[1])}
    if 0 < config.get("crop_pct", 0) <= 1:
        arguments["crop_pct"] = config["crop_pct"]
    return arguments


def _images(
    model: nn.Module, data: dict[str, Any] | None, options: dict[str, Any]
) -> Iterable[Any]:
    """Training images that fit the network, in small batches since gradients need memory."""
    net = from_timm(model, **{**options, "importance": "none"})
    saved = Saved({DATA: {**_imagenet(net, model), "batch_size": 16}}, {STUDENT: net})
    return open_data(saved, data, "fit").train_dataloader()


def _next_steps(net: DynamicNet, ckpt: Path, images: dict[str, Any]) -> list[str]:
    """The command lines that make the narrow routes good."""
    with torch.device("meta"):
        named = create_model(net.name).config
    arguments = {key: value for key, value in net.config.items() if value != named[key]}
    start, lines = ckpt, []
    if isinstance(net, DSResNet):  # slices of the statistics are not those of narrow routes
        start = ckpt.with_name(f"{ckpt.stem}-recalibrated.ckpt")
        narrow = ",".join(map(str, range(net.num_routes - 1)))
        lines.append(f"ds-net-plus recalibrate --ckpt {ckpt} --routes {narrow} --data.root DIR")
    recipe = "imagenet-vit-finetune" if isinstance(net, DSViT) else "imagenet-resnet50"
    look = "".join(f" --data.{key} {images[key]}" for key in ("crop_pct",) if key in images)
    look += "".join(f" --data.{key} '{images[key]}'" for key in ("mean", "std") if key in images)
    own = f" --model.net '{json.dumps(arguments)}'" if arguments else ""
    lines.append(
        f"ds-net-plus fit --config {recipe} --data.root DIR --model.arch {net.name}{own} "
        f"--model.init_from {start}{look}"
    )
    return lines
