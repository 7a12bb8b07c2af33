"""What both training stages share: evaluation, prediction and checkpoint metadata."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from ds_net_plus.checkpoint import META, STUDENT, check_same_network, net_metadata
from ds_net_plus.data import Batch, ImageData
from ds_net_plus.losses import gumbel_noise
from ds_net_plus.model import (
    DynamicNet,
    DynamicOutput,
    RouteLike,
    check_finite,
    check_statistics,
    create_model,
    naming_images,
    tau_for_budget,
)
from ds_net_plus.module.schedule import cosine_schedule
from tenfold.checkpoint import strip_prefix
from tenfold.errors import UserError


class NetModule(LightningModule):
    """Evaluation and checkpoint metadata that both stages share."""

    net: DynamicNet

    def __init__(
        self,
        arch: str = "ds_cnn_tiny",
        net: dict[str, Any] | None = None,
        route: str = "dynamic",
        tau: float = 0.0,
        budget: float | None = None,
        eval_gumbel: bool = False,
    ) -> None:
        """Builds the network.

        Args:
            arch: a name of `create_model`.
            net: constructor arguments that differ from the named configuration.
            route: what validate, test and predict run: "dynamic", "largest", a route index, or one
                for each gate, such as 0,2,1,3.
            tau: price of compute in dynamic decisions.
            budget: target share of the widest route's MAdds instead of `tau`, looked up in the
                table that `calibrate-budget` left in the checkpoint.
            eval_gumbel: keep the Gumbel noise in dynamic decisions, as the official program does.

        Raises:
            UserError: an unknown architecture, argument or route.
        """
        super().__init__()
        self.save_hyperparameters()
        self.net = create_model(arch, **(net or {}))
        self.route = parse_route(self.net, route)
        self.tau, self.budget, self.eval_gumbel = tau, budget, eval_gumbel
        self.top1 = MulticlassAccuracy(self.net.num_classes, average="micro")
        top_k = min(5, self.net.num_classes)
        self.top5 = MulticlassAccuracy(self.net.num_classes, average="micro", top_k=top_k)
        self.mean_madds = MeanMetric()

    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, int(self.trainer.estimated_stepping_batches))

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """The schedule of this run, by the arguments `warmup`, `cooldown`, `schedule` and so on."""
        epochs = self.trainer.max_epochs or 0
        return cosine_schedule(optimizer, self.steps(), epochs, self.hparams)

    def evaluated(self) -> DynamicNet:
        """The network that validate, test and predict run."""
        return self.net

    def forward(self, x: Tensor) -> DynamicOutput:
        """Runs the chosen route, or the gate's choice, on normalised images.

        Raises:
            UserError: an image or class logits that are not finite.
        """
        net = self.evaluated()
        if self.route is None:
            tau = self.tau if self.budget is None else tau_for_budget(net, self.budget)
            noise = None
            if self.eval_gumbel:
                several = (net.num_gates,) if net.num_gates > 1 else ()
                noise = gumbel_noise(x.new_empty(len(x), *several, net.gate_outputs))
            output: DynamicOutput = net(x, tau=tau, noise=noise)  # pyright: ignore[reportAssignmentType]
            check_finite(output.logits)
            return output
        logits = net(x, route=self.route)
        check_finite(logits)  # pyright: ignore[reportArgumentType]
        path = (-1,) * net.num_gates if self.route == "largest" else net.path(self.route)
        cost = net.madds(self.route, x.shape[-1])
        return DynamicOutput(
            logits,  # pyright: ignore[reportArgumentType]
            torch.tensor([path], device=x.device).expand(len(x), -1),
            torch.full((len(x),), cost, device=x.device),
        )

    def setup(self, stage: str) -> None:
        """Refuses data that the network was not made for."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageData):
            check_data(self.net, data)

    def on_test_start(self) -> None:
        """Refuses networks whose statistics or gate were never trained."""
        net = self.evaluated()
        check_statistics(net, net.routing_space if self.route is None else [self.route])
        if self.route is None:
            net.check_gate()

    on_predict_start = on_test_start

    def on_validation_start(self) -> None:
        """The command `validate` measures as `test` does."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self.on_test_start()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy and cost of the chosen route, or of the gate's choices."""
        self._measure(batch, "test")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy and cost of the chosen route, or of the gate's choices."""
        self._measure(batch, "val")

    def _measure(self, batch: Batch, split: str) -> None:
        with naming_images(batch.index.tolist()):
            output = self(batch.image)
        self.top1(output.logits, batch.label)
        self.top5(output.logits, batch.label)
        self.mean_madds(output.madds.float())
        self.log(f"{split}/top1", self.top1, prog_bar=True)
        self.log(f"{split}/top5", self.top5)
        self.log(f"{split}/madds", self.mean_madds)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One row for each image: index or file, label, score, route and MAdds."""
        index = batch.index.tolist()
        files = getattr(self.trainer.datamodule, "predict_files", ())  # pyright: ignore[reportAttributeAccessIssue]
        images = [str(files[n]) for n in index] if files else index
        with naming_images(images):
            output = self(batch.image)
        score, label = output.logits.softmax(1).max(1)
        rows = {
            "image": images,
            "label": label.tolist(),
            "score": score.tolist(),
            "route": [route_name(path) for path in output.routes.tolist()],
            "madds": output.madds.tolist(),
        }
        return [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the network's name, arguments and gate metadata."""
        checkpoint[META] = net_metadata(self.net)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the gate metadata.

        Raises:
            UserError: the file holds another network; lists what differs.
        """
        if META in checkpoint:
            state = {
                k: v for k, v in checkpoint["state_dict"].items() if k.startswith(f"{STUDENT}.")
            }
            check_same_network(self.net, checkpoint[META], strip_prefix(state, f"{STUDENT}."))
            self.evaluated().load_gate_state(checkpoint[META]["gate"])
            self.net.load_gate_state(checkpoint[META]["gate"])


def check_data(net: DynamicNet, data: ImageData) -> None:
    """Makes sure that a network fits its images and classes.

    Raises:
        UserError: another number of classes or of colours.
    """
    if data.class_names and data.num_classes != net.num_classes:
        raise UserError(
            f"the data have {data.num_classes} classes, the network {net.num_classes}",
            where=str(data.hparams["root"] or data.source),
            fix=f"choose other data, or train with --model.net.num_classes {data.num_classes}",
        )
    if data.channels != net.in_channels:
        raise UserError(
            f"the images have {data.channels} channels, the network takes {net.in_channels}",
            fix=f"give --data.channels {net.in_channels}, or train with "
            f"--model.net.in_channels {data.channels}",
        )


_RANGES = {  # of arguments of both stages
    "lr": (1e-12, math.inf),
    "weight_decay": (0.0, math.inf),
    "warmup": (0.0, math.inf),
    "cooldown": (0.0, math.inf),
    "random_routes": (0, math.inf),
    "momentum": (0.0, 1.0),
    "smoothing": (0.0, 1.0),
    "ema": (0.0, 1.0),
}


def check_numbers(arguments: Mapping[str, Any]) -> None:
    """Makes sure that a module's numbers lie where they mean something.

    Raises:
        UserError: names the first that does not, and its range.
    """
    for name, (low, high) in _RANGES.items():
        if name in arguments and not low <= arguments[name] <= high:
            wanted = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
            raise UserError(f"{name} must be {wanted}, got {arguments[name]}")


def route_name(path: Sequence[int]) -> int | str:
    """A path as it is written in tables: the index of a single gate, else such as 0,2,1,3."""
    return path[0] if len(path) == 1 else ",".join(map(str, path))


def parse_route(net: DynamicNet, route: str | int) -> RouteLike | None:
    """A command-line route: None for "dynamic", "largest", an index, or one for each gate (0,2,1).

    Raises:
        UserError: anything else.
    """
    if route == "dynamic":
        return None
    if isinstance(route, str) and route.lstrip("-").isdigit():
        route = int(route)
    if isinstance(route, str) and re.fullmatch(r"\d+(,\d+)+", route):
        return net.check_route(tuple(map(int, route.split(","))))
    return net.check_route(route)
