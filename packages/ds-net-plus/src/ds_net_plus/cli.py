"""Entry point: the table of commands."""

from tenfold.cli import App, Command


def _job(name: str, line: str) -> Command:
    return Command(f"ds_net_plus.commands:{name}", line)


app = App(
    name="ds-net-plus",
    package="ds_net_plus",
    description="Dynamic weight slicing (DS-Net, DS-Net++): one network that spends less compute "
    "on easy images, really faster.",
    model="ds_net_plus.module:SupernetModule",
    datamodule="ds_net_plus.data:ImageData",
    commands={
        "demo": _job("demo", "train, compare and draw on the embedded task, in minutes"),
        "train-gate": _job("train_gate", "Stage II: train the gate of a supernet"),
        "recalibrate": _job("recalibrate", "measure the batch-norm statistics of every route"),
        "calibrate-budget": _job("calibrate_budget", "find the tau that meets a budget"),
        "profile": _job("profile", "widths, parameters, MAdds and time of every route"),
        "benchmark": _job("benchmark", "grouped against masked, per-image and static execution"),
        "search-routes": _job("search_routes", "measure all routes, suggest a routing space"),
        "explain": _job("explain", "route and cost of every image in a folder, with a gallery"),
        "detect": _job("detect", "boxes that a detector finds, with their routes and a picture"),
        "export": _job("export", "routes and gate as plain networks: torch, ONNX, torch.export"),
        "convert-checkpoint": _job(
            "convert_checkpoint", "an official DS-Net file, or a timm network"
        ),
        "data": _job("data", "write the generated task to disk"),
    },
    shortcuts={
        "route": "model.init_args.route",
        "tau": "model.init_args.tau",
        "budget": "model.init_args.budget",
    },
)


def main() -> int:
    """Runs the command line."""
    return app.main()
