"""data, export and convert-checkpoint: files in, files out."""

from pathlib import Path

from ds_net_plus.checkpoint import DATA, STUDENT, TEACHER, Saved
from ds_net_plus.commands.common import at_least, beside, open_network
from ds_net_plus.commands.stages import write
from ds_net_plus.convert import convert_official, parity_check
from ds_net_plus.data import normalisation, write_cifar10, write_parquet
from ds_net_plus.export import export_routes
from tenfold.checkpoint import load_state
from tenfold.errors import UserError


def data(
    *,
    out: Path = Path("glyph-mix"),
    layout: str = "parquet",
    size: int = 32,
    train: int = 8000,
    test: int = 4000,
    train_seed: int = 0,
    test_seed: int = 99,
) -> None:
    """Write the generated task glyph-mix to disk, to look at or to read back.

    Args:
        out: folder to write to.
        layout: parquet (image, label), or cifar10 (the released layout, 32 pixels, colour).
        size: side of the images in pixels (parquet).
        train: number of training images.
        test: number of test images.
        train_seed: of the training images.
        test_seed: of the test images.
    """
    at_least(1, size=size, train=train, test=test)
    writers = {"parquet": write_parquet, "cifar10": write_cifar10}
    if layout not in writers:
        raise UserError(f"layout must be one of {', '.join(writers)}, got {layout!r}")
    options = {} if layout == "cifar10" else {"size": size}
    writers[layout](
        out, train=train, test=test, train_seed=train_seed, test_seed=test_seed, **options
    )
    print(f"wrote {train} training and {test} test images to {out}; read them back with")
    print(f"  --data.source {layout} --data.root {out}")


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
    routes: str | list[int | str] = route
    if route != "all":
        routes = [int(r) if r.strip().isdigit() else r.strip() for r in route.split(",")]
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
    *, source: Path, out: Path | None = None, gate_trained: bool | None = None
) -> None:
    """Turn an official DS-Net .pth.tar into a checkpoint of this package.

    Args:
        source: the file that you have.
        out: where to write the checkpoint; beside the source if left out.
        gate_trained: whether the file comes from gate training; judged from the file if left out.
    """
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
