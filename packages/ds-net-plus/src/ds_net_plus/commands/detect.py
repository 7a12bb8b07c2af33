"""detect: what a trained detector finds, as a table and a picture."""

import csv
from pathlib import Path
from typing import Any

import torch

from ds_net_plus.checkpoint import DATA
from ds_net_plus.commands.common import told_to_skip
from ds_net_plus.data import DetectionBatch, VOCData
from ds_net_plus.metrics import Truth
from ds_net_plus.model import Detections, naming_images
from ds_net_plus.module import DetectionModule
from ds_net_plus.module.base import parse_route
from ds_net_plus.module.detection import detection_rows, in_original_pixels, load_detector
from ds_net_plus.report import detections
from tenfold.checkpoint import load_state
from tenfold.console import at_least
from tenfold.device import pick_device
from tenfold.errors import UserError
from tenfold.plotting import save
from tenfold.progress import track


class _Shown:
    """The first images, for the picture."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.images: list[torch.Tensor] = []
        self.results: list[dict[str, torch.Tensor]] = []
        self.truths: list[Truth] = []
        self.sizes: list[tuple[int, int]] = []
        self.routes: list[list[int]] = []
        self.madds: list[int] = []

    def add(
        self, batch: DetectionBatch, results: list[dict[str, torch.Tensor]], found: Detections
    ) -> None:
        """Keeps what there is room for."""
        room = self.most - len(self.images)
        self.images += [*batch.image[:room].cpu()]
        self.results += results[:room]
        self.truths += batch.truths()[:room]
        self.sizes += [(int(height), int(width)) for height, width in batch.size[:room]]
        self.routes += found.routes[:room].tolist()
        self.madds += found.madds[:room].tolist()


def detect(
    *,
    ckpt: Path,
    images: Path | None = None,
    out: Path = Path("detected"),
    route: str = "dynamic",
    tau: float = 0.0,
    budget: float | None = None,
    min_score: float = 0.3,
    shown: int = 12,
    on_error: str = "fail",
    device: str = "auto",
) -> None:
    """List and draw what a detector finds in a folder, or on the test images of its data.

    Args:
        ckpt: a checkpoint of a detector.
        images: folder of image files; the test images, with their true boxes, if left out.
        out: folder for boxes.csv and detections.png.
        route: dynamic, largest or a route index.
        tau: price of compute in the gate's decision.
        budget: share of the widest route's MAdds instead of tau, see calibrate-budget.
        min_score: of the detections that are listed and drawn.
        shown: images in the picture, the first.
        on_error: what to do with an unreadable file: fail, or skip it and count.
        device: auto, cpu, cuda or mps.
    """
    if on_error not in ("fail", "skip"):
        raise UserError(f"on_error must be 'fail' or 'skip', got {on_error!r}")
    at_least(1, shown=shown)
    module = load_detector(ckpt)
    module.route = parse_route(module.net, route)
    module.hparams.update(tau=tau, budget=budget)
    module.on_test_start()
    bad = {"fail": "raise", "skip": "skip"}[on_error]
    data = _open_data(ckpt, module, {"predict_root": images and str(images), "on_bad_item": bad})
    with told_to_skip():
        rows, picture = _detect_all(module.to(pick_device(device)), data, min_score, shown)
    if not rows:
        raise UserError("there is no readable image", where=str(images))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "boxes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = detections(
        torch.stack(picture.images),
        picture.results,
        truths=() if images else picture.truths,
        names=data.class_names,
        mean=data.mean,
        std=data.std,
        min_score=min_score,
        sizes=picture.sizes,
        routes=torch.tensor(picture.routes),
        madds=picture.madds,
    )
    print(f"wrote {out / 'boxes.csv'} and {save(figure, out / 'detections.png')}")
    found = sum(row["label"] != "" for row in rows)
    print(f"{found} objects found" + ("" if found else ", lower --min-score to see weaker ones"))


def _open_data(ckpt: Path, module: DetectionModule, changes: dict[str, Any]) -> VOCData:
    arguments = load_state(ckpt).get(DATA, {}) | changes
    data = VOCData(**{k: v for k, v in arguments.items() if not k.startswith("_")})
    data.setup("predict")
    module.check_data(data)
    return data


@torch.no_grad()
def _detect_all(
    module: DetectionModule, data: VOCData, min_score: float, shown: int
) -> tuple[list[dict[str, Any]], _Shown]:
    """A row for every detection, and the first images."""
    rows, picture = [], _Shown(shown)
    for batch in track(data.predict_dataloader(), label="detecting"):
        names = data.predict_files or range(len(data.predict_dataset()))
        images = [str(names[n]) for n in batch.index.tolist()]
        with naming_images(images):
            found: Detections = module(batch.image.to(module.device))
        found = found._replace(
            results=[{k: v.cpu() for k, v in result.items()} for result in found.results]
        )
        results = in_original_pixels(found, batch)
        picture.add(batch, results, found)
        rows += detection_rows(
            results, images, data.class_names, found.routes, found.madds, min_score
        )
    return rows, picture
