"""Stage II as a Lightning module: the slimming head of a frozen supernet."""

import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Adam

from ds_net_plus.checkpoint import load_net
from ds_net_plus.data import Batch
from ds_net_plus.losses import GateLoss
from ds_net_plus.model import check_statistics, reset_gate, with_space
from ds_net_plus.module.base import NetModule, check_numbers
from ds_net_plus.steps import Stage2Output, gate_objective, sample_upstream
from tenfold.errors import UserError

log = logging.getLogger(__name__)

COLLAPSE_SHARE = 0.99


class GateBatch(NamedTuple):
    """Cached Stage-II data of a batch: what the gate reads, and what every route answers."""

    gate_input: Tensor
    route_logits: Tensor
    label: Tensor


class GateModule(NetModule):
    """Stage II: trains the slimming head of a frozen supernet."""

    def __init__(
        self,
        arch: str = "ds_cnn_tiny",
        net: dict[str, Any] | None = None,
        init_from: str | None = None,
        routing_space: list[int] | None = None,
        gate_loss: str = "value",
        estimator: str = "mixture",
        sgs: str = "try_best",
        sgs_on: str = "logits",
        lambda_ce: float = 1.0,
        lambda_cplx: float = 0.5,
        lambda_sgs: float = 1.0,
        scale: float | None = None,
        smoothing: float = 0.1,
        optimizer: str = "adam",
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        warmup: float = 0.0,
        cooldown: float = 0.0,
        warmup_lr: float = 0.0,
        min_lr: float = 0.0,
        schedule: str = "step",
        seed: int = 0,
        route: str = "dynamic",
        tau: float = 0.0,
        budget: float | None = None,
        eval_gumbel: bool = False,
    ) -> None:
        """Builds the network, with the supernet of a checkpoint where one is given.

        Args:
            arch: a name of `create_model`; without meaning beside `init_from`.
            net: constructor arguments that differ from the named configuration; likewise.
            init_from: checkpoint of the supernet; without it the caller loads the weights.
            routing_space: routes to choose from; the network's own if left out.
            gate_loss: "value" (one gate for every budget) or "sgs" (the paper's loss).
            estimator: gradient of the paper's loss: "mixture" or "mask".
            sgs: difficulty labels: "try_best", "give_up", "ladder" or "none".
            sgs_on: "logits", or "probs" as in the official program.
            lambda_ce: weight of the classification loss.
            lambda_cplx: weight of the complexity term.
            lambda_sgs: weight of the difficulty labels.
            scale: MAdds that count as 1 in the complexity term; the widest route's if left out.
            smoothing: label smoothing.
            optimizer: "adam", or "sgd" (Nesterov 0.9, the official choice).
            lr: peak learning rate.
            weight_decay: on the slimming head (official: 0.01).
            warmup: epochs of linear warm-up from `warmup_lr`.
            cooldown: epochs at `min_lr` in the end.
            warmup_lr: learning rate at the start.
            min_lr: learning rate at the end of the cosine.
            schedule: "step" changes the rate after every step, "epoch" once an epoch (official).
            seed: of the gate's initialisation from a checkpoint.
            route: what validate, test and predict run: "dynamic", "largest" or a route index.
            tau: price of compute in dynamic decisions.
            budget: target share of the widest route's MAdds instead of `tau`.
            eval_gumbel: keep the Gumbel noise in dynamic decisions.

        Raises:
            UserError: an option that does not exist, or an unreadable checkpoint.
        """
        if optimizer not in ("adam", "sgd"):
            raise UserError(f"optimizer must be 'adam' or 'sgd', got {optimizer!r}")
        if schedule not in ("epoch", "step"):
            raise UserError(f"schedule must be 'epoch' or 'step', got {schedule!r}")
        supernet = None if init_from is None else load_net(init_from)
        if supernet is not None:
            space = supernet.routing_space if routing_space is None else routing_space
            supernet = with_space(supernet, space)
            arch, net = supernet.name, supernet.config
        super().__init__(arch, net, route, tau, budget, eval_gumbel)
        self.save_hyperparameters()
        check_numbers(self.hparams)
        # the checkpoint of this run has all that came from the supernet's
        self.hparams.update(arch=arch, net=net, init_from=None)
        if supernet is not None:
            self.net.load_state_dict(supernet.state_dict())
            self.net.routing_space = supernet.routing_space
            reset_gate(self.net, seed)
        elif routing_space is not None:
            self.net.routing_space = routing_space
        self.net.requires_grad_(False).eval()
        for parameter in self.net.gate_parameters():
            parameter.requires_grad_(True)
        self.net.gate_score = "probability" if gate_loss == "value" else "logit"
        scale = None if scale is None else float(scale)
        self._counts = torch.zeros(self.net.num_gates, self.net.gate_outputs, dtype=torch.int64)
        self.objective = GateLoss(lambda_ce, lambda_cplx, lambda_sgs, scale, sgs_on, smoothing)

    def train(self, mode: bool = True) -> "GateModule":
        """The frozen supernet stays in eval mode."""
        super().train(mode)
        self.net.eval()
        return self

    def configure_optimizers(self) -> Any:
        """Adam or SGD over the slimming head."""
        h, parameters = self.hparams, self.net.gate_parameters()
        optimizer = (
            Adam(parameters, h["lr"], weight_decay=h["weight_decay"])
            if h["optimizer"] == "adam"
            else SGD(parameters, h["lr"], 0.9, weight_decay=h["weight_decay"], nesterov=True)
        )
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": h["schedule"]}]

    def on_fit_start(self) -> None:
        """Refuses a supernet that was never trained."""
        try:
            check_statistics(self.net, self.net.routing_space)
        except UserError as error:
            fix = "give its checkpoint with --model.init_from, and recalibrate that before"
            raise UserError(f"Stage II needs a trained supernet: {error.what}", fix=fix) from error

    def on_train_start(self) -> None:
        """From here on the gate counts as trained."""
        self.net.gate_trained = True

    def training_step(self, batch: Batch | GateBatch, batch_idx: int) -> Tensor:
        """Stage-II loss of one batch, from the images or from the cache."""
        output = self._objective(batch)
        for name, value in output.losses.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name == "loss")
        chosen = output.gate_logits.detach().argmax(-1).view(len(batch.label), -1).cpu()
        self._counts += F.one_hot(chosen, self.net.gate_outputs).sum(0)
        return output.loss

    def _objective(self, batch: Batch | GateBatch) -> Stage2Output:
        options = {k: self.hparams[k] for k in ("gate_loss", "estimator", "sgs")}
        if isinstance(batch, GateBatch):
            return gate_objective(
                self.net,
                batch.gate_input,
                batch.label,
                route_logits=batch.route_logits,
                objective=self.objective,
                **options,
            )
        with torch.no_grad():
            front = self.net.front(batch.image)
        # the same path on every rank
        seed = self.hparams["seed"] * 1_000_003 + self.global_step
        generator = torch.Generator().manual_seed(seed)
        return gate_objective(
            self.net,
            front.gate_input,
            batch.label,
            features=front.features,
            objective=self.objective,
            size=batch.image.shape[-1],
            upstream=sample_upstream(self.net, generator),
            **options,
        )

    def on_train_epoch_end(self) -> None:
        """Warns of every gate that sends nearly every image on one route."""
        # a value gate favours the widest route by nature, until tau puts a price on it
        for gate, counts in enumerate(self._counts if self.hparams["gate_loss"] == "sgs" else ()):
            if float(counts.max() / counts.sum().clamp(min=1)) > COLLAPSE_SHARE:
                number = f" of gate {gate}" if self.net.num_gates > 1 else ""
                log.warning(
                    "gate collapse%s: routes %s chosen %s times; turn SGS on (--sgs try_best), "
                    "change --lambda-cplx, or set tau",
                    number,
                    list(self.net.routing_space),
                    counts.tolist(),
                )
        self._counts.zero_()
