"""Entry point: the table of commands."""

from tenfold.cli import App, Command


def _job(name: str, line: str) -> Command:
    return Command(f"filip_vl.commands:{name}", line)


app = App(
    name="filip-vl",
    package="filip_vl",
    description="Image-text pre-training with token-wise late interaction (FILIP).",
    model="filip_vl.module:FilipModule",
    datamodule="filip_vl.data:FilipDataModule",
    commands={
        "demo": _job("demo", "train FILIP and CLIP on generated scenes, compare and draw"),
        "zeroshot": _job("zeroshot", "classify images by the names of classes"),
        "retrieve": _job("retrieve", "recall of images and captions for each other"),
        "index": _job("index", "the tokens of many images on the disk, to be searched"),
        "search": _job("search", "images that fit a text or a picture, also as a local page"),
        "align": _job("align", "draw which word every patch of an image chose"),
        "probe": _job("probe", "a linear classifier on frozen image tokens"),
        "convert": _job("convert", "a published CLIP or FILIP as a model folder"),
        "export": _job("export", "both towers: ONNX, torch.export or safetensors"),
        "info": _job("info", "what a checkpoint is"),
        "data": _job("data", "write the generated scenes to disk"),
        "filter": _job("filter", "keep the pairs of the web that the paper would"),
        "augment-text": _job("augment_text", "more captions for every image, by your function"),
        "bench-loss": _job("bench_loss", "time and memory of the loss against its equations"),
    },
)


def main() -> int:
    """Runs the command line."""
    return app.main()
