"""Detection as a Lightning module: the sandwich rule with the losses of SSD."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchmetrics import MeanMetric

from ds_net_plus.checkpoint import DETECTOR, load_net, net_metadata
from ds_net_plus.data import DetectionBatch, VOCData
from ds_net_plus.metrics import VOCMeanAP, as_coco, coco_ap50
from ds_net_plus.model import (
    LARGEST,
    Detections,
    Detector,
    DynamicNet,
    ImageLosses,
    RouteLike,
    check_statistics,
    create_model,
    naming_images,
    tau_for_budget,
)
from ds_net_plus.module.base import check_numbers, parse_route
from ds_net_plus.module.schedule import cosine_schedule
from ds_net_plus.steps import drop_zero_gradients, sample_routes
from tenfold.checkpoint import compare_keys, load_state
from tenfold.errors import UserError

log = logging.getLogger(__name__)

META = DETECTOR


class DetectionModule(LightningModule):
    """Trains and measures a detector, all of its routes at once and, if wanted, its gate."""

    def __init__(
        self,
        arch: str = "ds_mbnet",
        net: dict[str, Any] | None = None,
        num_classes: int = 20,
        levels: list[int] = [8, 16, 32],  # noqa: B006 (a default to read, never changed)
        extras: int = 3,
        width: int = 128,
        scales: list[float] | None = None,
        init_from: str | None = None,
        gate: str = "keep",
        random_routes: int = 2,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        clip: float = 10.0,
        warmup: float = 0.0,
        cooldown: float = 0.0,
        warmup_lr: float = 0.0,
        min_lr: float = 0.0,
        schedule: str = "step",
        seed: int = 0,
        route: str = "dynamic",
        tau: float = 0.0,
        budget: float | None = None,
        min_score: float = 0.3,
    ) -> None:
        """Builds the detector, on the backbone of a classification checkpoint where one is given.

        Args:
            arch: a name of `create_model`; without meaning beside `init_from`.
            net: constructor arguments that differ from the named configuration; likewise.
            num_classes: classes of objects.
            levels: strides of the backbone's maps.
            extras: further maps, each of half the side.
            width: channels of the head.
            scales: sides of the default boxes, shares of the image's; SSD300's if left out.
            init_from: checkpoint of a classifier whose backbone and gate to start from.
            gate: "keep" leaves the backbone's gate as it is; "value" trains it beside the
                detector: the output of route k learns exp(-loss of k) of every image, the mean
                loss over anchors.
            random_routes: routes between smallest and largest in every step.
            lr: peak learning rate.
            momentum: of Nesterov SGD.
            weight_decay: on weights of two or more dimensions.
            clip: largest norm of the gradient.
            warmup: epochs of linear warm-up from `warmup_lr`.
            cooldown: epochs at `min_lr` in the end.
            warmup_lr: learning rate at the start.
            min_lr: learning rate at the end.
            schedule: "step" changes the rate after every step, "epoch" once an epoch.
            seed: of the sampled routes.
            route: what validate, test and predict run: "dynamic", "largest" or a route index.
            tau: price of compute in dynamic decisions.
            budget: target share of the widest route's MAdds instead of `tau`, looked up in the
                table that `calibrate-budget` left in the classifier's checkpoint.
            min_score: of the detections that predict lists.

        Raises:
            UserError: an option that does not exist, or an unreadable checkpoint.
        """
        super().__init__()
        for name, value, allowed in (
            ("gate", gate, ("keep", "value")),
            ("schedule", schedule, ("epoch", "step")),
        ):
            if value not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if clip <= 0:
            raise UserError(f"clip must be above 0, got {clip}")
        start = None if init_from is None else load_net(init_from)
        if start is not None:
            arch, net = start.name, start.config
        self.save_hyperparameters()
        check_numbers(self.hparams)
        # the checkpoint of this run has all that came from the classifier's
        self.hparams.update(arch=arch, net=net, init_from=None)
        backbone = create_model(arch, **(net or {}))
        if start is not None:
            backbone.load_state_dict(start.state_dict())
            backbone.load_gate_state(start.gate_state())
        self.detector = Detector(backbone, num_classes, levels, extras, width, scales)
        self._start_gate(gate, trained=start is not None and start.gate_trained)
        self.route = parse_route(backbone, route)
        self.automatic_optimization = False
        self.maps = nn.ModuleDict({name: VOCMeanAP(num_classes) for name in self._names()})
        self.mean_madds = nn.ModuleDict({name: MeanMetric() for name in self._names()})
        ap50 = coco_ap50()
        self.ap50 = None if isinstance(ap50, str) else ap50
        self._ap50_note = ap50 if isinstance(ap50, str) else ""

    @property
    def net(self) -> DynamicNet:
        """The backbone."""
        return self.detector.net

    def _start_gate(self, gate: str, trained: bool | None) -> None:
        net = self.net
        if gate == "value":
            if net.num_gates > 1:
                raise UserError("gate value is for networks with one gate", fix="use keep")
            net.gate_score = "probability"
        elif not trained:
            net.gate_trained = False
        for parameter in net.gate_parameters():
            parameter.requires_grad_(gate == "value")

    def _names(self) -> list[str]:
        """What is measured: the chosen route, and in training without a gate two static ones."""
        return ["chosen", *(f"route_{k}" for k in self.watched_routes())]

    def watched_routes(self) -> list[int]:
        """The static routes that validation measures while there is no gate."""
        return [0, self.net.num_routes - 1]

    def setup(self, stage: str) -> None:
        """Refuses data that the detector was not made for; freezes what it does not use."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, VOCData):
            self.check_data(data)
        if stage == "fit":
            self._freeze_unused()

    def check_data(self, data: VOCData) -> None:
        """Makes sure that the detector fits images and classes.

        Raises:
            UserError: another number of classes or of colours.
        """
        wanted, there = self.detector.num_classes, data.num_classes
        if wanted != there:
            raise UserError(
                f"the data have {there} classes, the detector {wanted}",
                where=str(data.hparams["root"] or data.source),
                fix=f"choose other data, or train with --model.num_classes {there}",
            )
        if data.channels != self.net.in_channels:
            raise UserError(
                f"the images have {data.channels} channels, the network takes "
                f"{self.net.in_channels}",
                fix=f"train with --model.net.in_channels {data.channels}",
            )

    def _freeze_unused(self) -> None:
        """No gradient for the classifier and for stages behind the last level.

        Distributed training would wait for theirs for ever.
        """
        gate = {id(parameter) for parameter in self.net.gate_parameters()}
        training, used = self.detector.training, list(self.detector.parameters())
        self.detector.eval()
        blank = used[0].new_zeros(1, self.net.in_channels, 64, 64)
        maps = self.detector.maps(
            self.net.features(blank, route=LARGEST, levels=self.detector.levels).maps
        )
        outputs = self.detector.ssd.head(maps)
        wanted = [p for p in used if p.requires_grad and id(p) not in gate]
        total = torch.stack([value.sum() for value in outputs.values()]).sum()
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        for parameter, gradient in zip(wanted, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
        self.detector.train(training)

    def configure_optimizers(self) -> Any:
        """Nesterov SGD with a cosine schedule; no decay on biases and norms."""
        h = self.hparams
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": h["weight_decay"]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = SGD(groups, h["lr"], h["momentum"], nesterov=h["momentum"] > 0)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        epochs = self.trainer.max_epochs or 0
        return [optimizer], [cosine_schedule(optimizer, steps, epochs, h)]

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> Tensor:
        """One sandwich step and the optimizer's step: largest, random routes, smallest."""
        h, losses = self.hparams, {}
        optimizer: Optimizer = self.optimizers()  # pyright: ignore[reportAssignmentType]
        optimizer.zero_grad()
        net = self.net
        middle = sample_routes(
            self.global_step, net.num_routes, h["random_routes"], h["seed"], net.num_gates
        )
        names = [LARGEST, *(f"R{i + 1}" for i in range(len(middle))), "S"]
        seen: dict[RouteLike, Tensor] = {}
        for name, route in zip(names, [LARGEST, *middle, 0], strict=True):
            each = self.detector.image_losses(batch.image, _targets(batch), route)
            seen[route] = _total(each).detach()
            parts = each.mean()
            loss = losses[name] = parts["bbox_regression"] + parts["classification"]
            last = name == "S"
            if last and h["gate"] == "value":
                # with the last loss: distributed training reduces gradients once, in one backward
                losses["gate"] = self._gate_loss(batch.image, seen)
                loss = loss + losses["gate"]
            no_sync = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
            with nullcontext() if last else no_sync():
                self.manual_backward(loss)
        self._update(optimizer)
        self.log_dict({f"train/loss_{k}": v.detach() for k, v in losses.items()})
        total = torch.stack(list(losses.values())).sum().detach()
        self.log("loss", total, prog_bar=True, logger=False)
        return total

    def _update(self, optimizer: Optimizer) -> None:
        parameters = [p for p in self.parameters() if p.requires_grad]
        drop_zero_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, self.hparams["clip"])
        optimizer.step()
        if self.hparams["schedule"] == "step":
            self.lr_schedulers().step()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue, reportCallIssue]

    def _gate_loss(self, x: Tensor, seen: dict[RouteLike, Tensor]) -> Tensor:
        """Binary cross-entropy of the slimming head's outputs to the merit of the routes that ran.

        An object's loss is that of one anchor on it and of the `neg_to_pos_ratio` hardest beside
        it: exp(-loss / their number) is their mean probability, a merit from 0 to 1. The gate reads
        the front without moving it, by its running statistics as at inference.
        """
        net, training = self.net, self.net.training
        net.eval()
        with torch.no_grad():
            gate_input = net.front(x).gate_input
        net.train(training)
        ran = [j for j, route in enumerate(net.routing_space) if route in seen]
        anchors = 1 + self.detector.ssd.neg_to_pos_ratio
        target = torch.stack([(seen[net.routing_space[j]] / -anchors).exp() for j in ran], 1)
        logits = net.gate_logits(gate_input)[:, ran]
        return F.binary_cross_entropy_with_logits(logits.float(), target.float())

    def on_train_epoch_end(self) -> None:
        """Moves the schedule, where it does so once an epoch; by now the gate knows something."""
        if self.hparams["schedule"] == "epoch":
            self.lr_schedulers().step()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue, reportCallIssue]
        if self.hparams["gate"] == "value":
            self.net.gate_trained = True

    def forward(self, x: Tensor) -> Detections:
        """Finds objects on the chosen route, or on the gate's choice, in normalised images."""
        budget = self.hparams["budget"]
        tau = self.hparams["tau"] if budget is None else tau_for_budget(self.net, budget)
        return self.detector(x, route=self.route, tau=tau)

    def on_test_start(self) -> None:
        """Refuses networks whose statistics or gate were never trained."""
        check_statistics(self.net, self.net.routing_space if self.route is None else [self.route])
        if self.route is None:
            self.net.check_gate()

    on_predict_start = on_test_start

    def on_validation_start(self) -> None:
        """The command `validate` measures as `test` does."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self.on_test_start()

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Measures the chosen route; while training without a gate, the narrowest and the widest.

        One of the latter's names says which: val/map_route_0 and so on.
        """
        fitting = self.trainer.state.fn != TrainerFn.VALIDATING
        if not (fitting and self.route is None and not self.net.gate_trained):
            self._measure(batch, "chosen", self._found(batch))
            return
        for k in self.watched_routes():
            self._measure(batch, f"route_{k}", self.detector(batch.image, route=k))

    def test_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Measures the chosen route."""
        self._measure(batch, "chosen", self._found(batch))

    def _found(self, batch: DetectionBatch) -> Detections:
        with naming_images(batch.index.tolist()):
            return self(batch.image)

    def _measure(self, batch: DetectionBatch, name: str, found: Detections) -> None:
        results, truths = in_original_pixels(found, batch), batch.truths()
        self.maps[name].update(results, truths, batch.index)  # pyright: ignore[reportCallIssue]
        self.mean_madds[name].update(found.madds.double())  # pyright: ignore[reportCallIssue]
        if name == "chosen" and self.ap50 is not None:
            self.ap50.update(
                [{k: v.float() if k != "labels" else v for k, v in r.items()} for r in results],
                [as_coco(truth) for truth in truths],
            )

    def on_test_epoch_end(self) -> None:
        """Logs both precisions and the mean cost."""
        self._log_measured("test")

    def on_validation_epoch_end(self) -> None:
        """Logs both precisions and the mean cost."""
        self._log_measured("val")

    def _log_measured(self, split: str) -> None:
        for name in self._names():
            metric, cost = self.maps[name], self.mean_madds[name]
            if not metric.update_called:
                continue
            suffix = "" if name == "chosen" else f"_{name}"
            self.log(f"{split}/map{suffix}", metric.compute().float(), prog_bar=True)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            self.log(f"{split}/madds{suffix}", cost.compute().float())  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            metric.reset()  # pyright: ignore[reportCallIssue]
            cost.reset()  # pyright: ignore[reportCallIssue]
        if self.ap50 is not None and self.ap50.update_called:
            self.log(f"{split}/ap50", self.ap50.compute()["map_50"])
            self.ap50.reset()
        elif self._ap50_note and split == "test":
            log.warning(self._ap50_note)

    def predict_step(self, batch: DetectionBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One row for each detection of at least `min_score`; one without a box where none is."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        files = getattr(data, "predict_files", ())
        index = batch.index.tolist()
        images = [str(files[n]) for n in index] if files else index
        names = getattr(data, "class_names", ())
        with naming_images(images):
            found = self(batch.image)
        return detection_rows(
            in_original_pixels(found, batch),
            images,
            names,
            found.routes,
            found.madds,
            self.hparams["min_score"],
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the backbone's name, arguments and gate metadata."""
        checkpoint[META] = net_metadata(self.net)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the gate metadata."""
        if META in checkpoint:
            self.net.load_gate_state(checkpoint[META]["gate"])


def load_detector(path: str | Path) -> DetectionModule:
    """The trained module of a checkpoint, in eval mode on the CPU.

    Raises:
        UserError: no such file, damaged, or of something else than a detector.
    """
    raw = load_state(path)
    if META not in raw:
        fix = "name a checkpoint that fit left of a DetectionModule"
        raise UserError("the checkpoint holds no detector", where=str(path), fix=fix)
    arguments = {k: v for k, v in raw["hyper_parameters"].items() if not k.startswith("_")}
    module = DetectionModule(**arguments)
    keys = compare_keys(raw["state_dict"], module.state_dict())
    if not keys.fits:
        what = f"the weights do not fit the detector that the file describes: {keys.summary()}"
        raise UserError(what, where=str(path))
    module.load_state_dict(raw["state_dict"])
    module.on_load_checkpoint(raw)
    return module.eval()


def _targets(batch: DetectionBatch) -> list[dict[str, Tensor]]:
    return [
        {"boxes": boxes, "labels": labels}
        for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
    ]


def _total(losses: ImageLosses) -> Float[Tensor, " batch"]:
    return losses.bbox_regression + losses.classification


def in_original_pixels(found: Detections, batch: DetectionBatch) -> list[dict[str, Tensor]]:
    """Results with boxes in pixels of the images before they were resized."""
    return [
        {**result, "boxes": result["boxes"] * scale}
        for result, scale in zip(found.results, batch.scales(), strict=True)
    ]


def detection_rows(
    results: list[dict[str, Tensor]],
    images: list[Any],
    names: tuple[str, ...],
    routes: Tensor,
    madds: Tensor,
    min_score: float,
) -> list[dict[str, Any]]:
    """Rows of a table, one for each detection, the best of an image first.

    Args:
        results: boxes, scores and labels of each image.
        images: what to call each image.
        names: of the classes; their numbers where empty.
        routes: (images, gates); several are joined as 0-2-1-3.
        madds: of each image.
        min_score: of the detections that are told.
    """
    rows = []
    for n, (image, result) in enumerate(zip(images, results, strict=True)):
        path = "-".join(str(k) for k in routes[n].tolist())
        ends = {"route": path if routes.shape[1] > 1 else int(path), "madds": int(madds[n])}
        kept = result["scores"] >= min_score
        parts = [result[key][kept].tolist() for key in ("labels", "scores", "boxes")]
        for label, score, box in zip(*parts, strict=True):
            name = names[label] if names else label
            corners = dict(zip(("x0", "y0", "x1", "y1"), (round(v, 2) for v in box), strict=True))
            rows.append(
                {"image": image, "label": name, "score": round(score, 4), **corners, **ends}
            )
        if not kept.any():
            empty = dict.fromkeys(("label", "score", "x0", "y0", "x1", "y1"), "")
            rows.append({"image": image, **empty, **ends})
    return rows
