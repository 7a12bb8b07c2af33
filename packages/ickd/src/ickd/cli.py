"""Entry point: the table of commands."""

from tenfold.cli import App, Command


def _job(name: str, line: str) -> Command:
    return Command(f"ickd.commands:{name}", line)


app = App(
    name="ickd",
    package="ickd",
    description="Distil a small network from a large one: inter-channel correlation (ICKD) and "
    "twenty other losses.",
    model="ickd.module:Distiller",
    datamodule="ickd.data:ImageData",
    commands={
        "demo": _job("demo", "train, compare and draw on the embedded task, in minutes"),
        "compare": _job("compare", "many losses on one pair of networks, over seeds"),
        "sweep": _job("sweep", "one loss with several weights"),
        "taps": _job("taps", "the tap points of a network, and which to take"),
        "icc": _job("icc", "draw the channel correlations of networks"),
        "cost": _job("cost", "what every loss costs: parameters, multiply-adds, memory, time"),
        "cache-teacher": _job("cache_teacher", "run a teacher once over images that stay the same"),
        "convert": _job("convert", "a published checkpoint as a network of this package"),
        "export": _job("export", "the student alone: ONNX, torch.export or safetensors"),
        "zoo": _job("zoo", "the networks that come with the package"),
        "data": _job("data", "write a generated task to disk"),
    },
    shortcuts={
        "teacher": "model.init_args.teacher",
        "student": "model.init_args.student",
        "teacher-ckpt": "model.init_args.teacher_ckpt",
        "losses": "model.init_args.losses",
        "classes": "model.init_args.num_classes",
    },
)


def main() -> int:
    """Runs the command line."""
    return app.main()
