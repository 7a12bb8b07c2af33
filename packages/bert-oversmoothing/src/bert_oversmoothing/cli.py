"""Entry point: the table of commands."""

from tenfold.cli import App, Command


def _job(name: str, line: str) -> Command:
    return Command(f"bert_oversmoothing.commands:{name}", line)


app = App(
    name="bert-oversmoothing",
    package="bert_oversmoothing",
    description="Measure over-smoothing in any Hugging Face encoder, layer by layer, and cure it "
    "with hierarchical fusion.",
    model="bert_oversmoothing.module:FusionModule",
    datamodule="bert_oversmoothing.data:OversmoothingData",
    commands={
        "demo": _job("demo", "train last layer and fusions on generated texts, compare and draw"),
        "analyze": _job("analyze", "how alike tokens become, layer by layer, and what does it"),
        "compare": _job("compare", "the curves of several models on the same texts"),
        "probe": _job("probe", "the error of every layer's head against its token similarity"),
        "theorem": _job("theorem", "the bound on the contraction of a block, against measurements"),
        "convert": _job("convert", "a plain model as one with fusion, and back"),
        "report": _job("report", "draw the pictures and the page of an analysis again"),
        "export": _job("export", "a trained model: ONNX, torch.export or safetensors"),
        "data": _job("data", "write the generated task to disk"),
    },
    shortcuts={
        "weights": "model.init_args.weights",
        "fusion": "model.init_args.fusion",
        "layers": "model.init_args.layers",
    },
)


def main() -> int:
    """Runs the command line."""
    return app.main()
