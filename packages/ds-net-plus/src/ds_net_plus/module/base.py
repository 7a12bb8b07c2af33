"""What both training stages share: evaluation, prediction and checkpoint metadata."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from ds_net_plus.checkpoint import META, net_metadata
from ds_net_plus.data import Batch
from ds_net_plus.model import (
    DynamicNet,
    DynamicOutput,
    check_statistics,
    create_model,
    tau_for_budget,
)


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
    ) -> None:
        """Builds the network.

        Args:
            arch: a name of `create_model`.
            net: constructor arguments that differ from the named configuration.
            route: what validate, test and predict run: "dynamic", "largest" or a route index.
            tau: price of compute in dynamic decisions.
            budget: target share of the widest route's MAdds instead of `tau`, looked up in the
                table that `calibrate-budget` left in the checkpoint.

        Raises:
            UserError: an unknown architecture, argument or route.
        """
        super().__init__()
        self.save_hyperparameters()
        self.net = create_model(arch, **(net or {}))
        self.route = parse_route(self.net, route)
        self.tau, self.budget = tau, budget
        self.top1 = MulticlassAccuracy(self.net.num_classes, average="micro")
        top_k = min(5, self.net.num_classes)
        self.top5 = MulticlassAccuracy(self.net.num_classes, average="micro", top_k=top_k)
        self.mean_madds = MeanMetric()

    def evaluated(self) -> DynamicNet:
        """The network that validate, test and predict run."""
        return self.net

    def forward(self, x: Tensor) -> DynamicOutput:
        """Runs the chosen route, or the gate's choice, on normalised images."""
        net = self.evaluated()
        if self.route is None:
            tau = self.tau if self.budget is None else tau_for_budget(net, self.budget)
            return net(x, tau=tau)  # pyright: ignore[reportReturnType]
        logits = net(x, route=self.route)
        routes = -1 if self.route == "largest" else int(self.route)
        cost = net.madds(self.route, x.shape[-1])
        return DynamicOutput(
            logits,  # pyright: ignore[reportArgumentType]
            torch.full((len(x), 1), routes, device=x.device),
            torch.full((len(x),), cost, device=x.device),
        )

    def on_test_start(self) -> None:
        """Refuses networks whose statistics or gate were never trained."""
        check_statistics(self.evaluated(), [0] if self.route is None else [self.route])
        if self.route is None:
            self.evaluated().check_gate()

    on_predict_start = on_test_start

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy and cost of the chosen route, or of the gate's choices."""
        output = self(batch.image)
        self.top1(output.logits, batch.label)
        self.top5(output.logits, batch.label)
        self.mean_madds(output.madds.double())
        self.log("test/top1", self.top1)
        self.log("test/top5", self.top5)
        self.log("test/madds", self.mean_madds)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One row for each image: index or file, label, score, route and MAdds."""
        output = self(batch.image)
        score, label = output.logits.softmax(1).max(1)
        index = batch.index.tolist()
        files = getattr(self.trainer.datamodule, "predict_files", ())  # pyright: ignore[reportAttributeAccessIssue]
        rows = {
            "image": [str(files[n]) for n in index] if files else index,
            "label": label.tolist(),
            "score": score.tolist(),
            "route": output.routes[:, 0].tolist(),
            "madds": output.madds.tolist(),
        }
        return [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the network's name, arguments and gate metadata."""
        checkpoint[META] = net_metadata(self.net)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the gate metadata."""
        if META in checkpoint:
            self.evaluated().load_gate_state(checkpoint[META]["gate"])
            self.net.load_gate_state(checkpoint[META]["gate"])


def parse_route(net: DynamicNet, route: str | int) -> int | str | None:
    """A command-line route: None for "dynamic", "largest", or an index.

    Raises:
        UserError: anything else.
    """
    if route == "dynamic":
        return None
    if isinstance(route, str) and route.lstrip("-").isdigit():
        route = int(route)
    return net.check_route(route)
