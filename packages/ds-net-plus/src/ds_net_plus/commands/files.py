"""data, export and convert-checkpoint: files in, files out."""

from pathlib import Path
from typing import Any

from ds_net_plus.checkpoint import DATA, STUDENT, TEACHER, Saved
from ds_net_plus.commands.common import beside, open_network, parse_numbers, parse_routes
from ds_net_plus.commands.pretrained import PREFIX, convert_timm
from ds_net_plus.commands.stages import write
from ds_net_plus.convert import convert_official, parity_check
from ds_net_plus.data import normalisation, write_cifar10, write_parquet, write_voc
from ds_net_plus.export import export_routes
from ds_net_plus.model import RouteLike
from ds_net_plus.scenes import SCENE_CLASSES
from tenfold.checkpoint import load_state
from tenfold.console import at_least
from tenfold.errors import UserError


def data(
    *,
    out: Path = Path("glyph-mix"),
    layout: str = "parquet",
    size: int | None = None,
    train: int = 8000,
    test: int = 4000,
    train_seed: int = 0,
    test_seed: int = 99,
) -> None:
    """Write the generated task to disk, to look at or to read back: glyph-mix, or glyph scenes.

    Args:
        out: folder to write to.
        layout: parquet (image, label), cifar10 (the released layout, 32 pixels, colour), or voc
            (scenes with boxes in the released layout).
        size: side of the images in pixels; 32 if left out, 128 for voc.
        train: number of training images.
        test: number of test images.
        train_seed: of the training images.
        test_seed: of the test images.
    """
    at_least(1, size=size, train=train, test=test)
    writers = {"parquet": write_parquet, "cifar10": write_cifar10, "voc": write_voc}
    if layout not in writers:
        raise UserError(f"layout must be one of {', '.join(writers)}, got {layout!r}")
    least = 32 if layout == "voc" else 8
    at_least(least, size=size)
    options = {} if layout == "cifar10" or size is None else {"size": size}
    writers[layout](
        out, train=train, test=test, train_seed=train_seed, test_seed=test_seed, **options
    )
    print(f"wrote {train} training and {test} test images to {out}; read them back with")
    classes = f" --data.class_names '[{','.join(SCENE_CLASSES)}]'" if layout == "voc" else ""
    print(f"  --data.source {layout} --data.root {out}{classes}")


def export(
    *,
    ckpt: Path,
    out: Path,
    route: str = "all",
    format: str = "torch,onnx,exported-program",
    image_size: int | None = None,
    fold_bn: bool = True,
    channels_last: bool = False,
    weights: str = "ema",
) -> None:
    """Write routes, front and gate as plain networks, each checked against the original.

    Args:
        ckpt: a checkpoint.
        out: folder to write to.
        route: a route index, several with commas, largest, or all.
        format: any of torch, onnx and exported-program, with commas.
        image_size: side of the images in pixels, the network's own if left out.
        fold_bn: fold batch norms into the convolutions.
        channels_last: keep the weights in channels-last order.
        weights: the copy of the network, ema or student.
    """
    at_least(1, image_size=image_size)
    _, net = open_network(ckpt, weights)
    routes: str | list[RouteLike] = route
    if route != "all":
        routes = parse_routes(net, route, "--route")
    mean, std = normalisation(net.in_channels)
    done = export_routes(
        net,
        out,
        routes=routes,
        formats=format.split(","),
        image_size=image_size,
        fold_bn=fold_bn,
        channels_last=channels_last,
        preprocessing={"pixels": "0..1", "mean": mean, "std": std},
    )
    for item in done:
        print(item)
    print(f"wrote {len(done)} files to {out}, all equal to the checkpoint to 1e-5")


def convert_checkpoint(
    *,
    source: str,
    out: Path | None = None,
    gate_trained: bool | None = None,
    pretrained: bool = True,
    routes: list[list[float]] | None = None,
    front_blocks: int | None = None,
    rhos: str | None = None,
    gates: int | None = None,
    importance: str = "magnitude",
    sort_embedding: bool = False,
    data: dict[str, Any] | None = None,
) -> None:
    """Turn an official DS-Net .pth.tar, or a network of timm, into a checkpoint of this package.

    Args:
        source: the official file that you have; or timm:NAME, which fetches the weights of a ViT or
            ResNet, or timm:NAME:FILE, which reads them from a file.
        out: where to write the checkpoint; if left out beside the official file, or here.
        gate_trained: whether the official file comes from gate training; judged from the file if
            left out.
        pretrained: fetch timm's weights; random ones if false.
        routes: of a ViT, such as [[384,3,2,10],[384,6,4,10]] (features, heads, MLP ratio, blocks).
        front_blocks: blocks of a ViT in front of the gate, 2 if left out.
        rhos: slimming ratios of a ResNet, such as 0.25,0.5,1.
        gates: of a ResNet, 4 or 1; 4 if left out.
        importance: what timm's units are sorted by: magnitude, taylor (on --data) or none.
        sort_embedding: also sort the features of a ViT's tokens, for routes of fewer features.
        data: images for taylor, such as --data.root DIR for ImageNet's.
    """
    given = {"routes": routes, "front_blocks": front_blocks, "rhos": rhos, "gates": gates}
    given |= {"sort_embedding": sort_embedding or None, "data": data}
    options = {key: value for key, value in given.items() if value is not None}
    if source.startswith(PREFIX):
        if rhos is not None:
            options["rhos"] = parse_numbers(rhos, float, "--rhos")
        options |= {"importance": importance}
        convert_timm(source, out, pretrained, options.pop("data", None), options)
    elif options:
        option = next(iter(options)).replace("_", "-")
        raise UserError(f"--{option} is for networks of timm", fix="give --source timm:NAME")
    else:
        _convert_official(Path(source), out, gate_trained)


def _convert_official(source: Path, out: Path | None, gate_trained: bool | None) -> None:
    """Both state dicts of an official file, and what was found in it."""
    raw = load_state(source)
    nets = {}
    for name, which in ((STUDENT, "model"), (TEACHER, "ema")):
        if name == STUDENT and "state_dict" not in raw and "state_dict_ema" in raw:
            which = "ema"
        if name == TEACHER and "state_dict_ema" not in raw:
            continue
        nets[name], report = convert_official(raw, which, gate_trained=gate_trained)
        for line in report.lines():
            print(f"{name}: {line}")
        print(f"{name}: sliced equals materialised to {parity_check(nets[name]):.1e}")
    images = {"source": "imagenet", "image_size": nets[STUDENT].image_size}
    print(f"wrote {write(out or beside(source, 'converted'), Saved({DATA: images}, nets))}")
