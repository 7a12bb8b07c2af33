"""Stage I as a Lightning module: the sandwich rule with its moving-average teacher."""

import copy
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import timm
import torch
from lightning.pytorch.trainer.states import TrainerFn
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torchmetrics.classification import MulticlassAccuracy

from ds_net_plus.checkpoint import TEACHER, load_net
from ds_net_plus.data import Batch, ImageData
from ds_net_plus.model import DynamicNet, RouteLike, check_statistics
from ds_net_plus.module.base import NetModule, check_numbers
from ds_net_plus.steps import (
    DISTILL_MODES,
    drop_zero_gradients,
    ema_update,
    sample_routes,
    stage1_step,
)
from tenfold.checkpoint import compare_keys, ema_decay, load_state
from tenfold.errors import UserError

log = logging.getLogger(__name__)


def start_from(net: DynamicNet, path: str) -> None:
    """Loads the weights of another supernet of the same widths, a fitting classifier included.

    Raises:
        UserError: anything but the classifier differs.
    """
    state = load_net(path).state_dict()
    keys = compare_keys(state, net.state_dict())
    others = [k for k, *_ in keys.mismatched if not k.startswith("classifier.")]
    if keys.missing or keys.unexpected or others:
        raise UserError(f"the checkpoint is of another network: {keys.summary()}", where=path)
    fresh = {k: v for k, v in net.state_dict().items() if k.startswith("classifier.")}
    net.load_state_dict({**state, **fresh} if keys.mismatched else state)


def mixing(mixup: float, cutmix: float, classes: int) -> Mixup | None:
    """Mixup and CutMix of timm, of a whole batch; None where both are off.

    Raises:
        UserError: a negative alpha.
    """
    if min(mixup, cutmix) < 0:
        raise UserError(f"mixup and cutmix must be 0 or more, got {mixup} and {cutmix}")
    if max(mixup, cutmix) == 0:
        return None
    return Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=classes)


def external_teacher(name: str, net: DynamicNet) -> nn.Module:
    """The classifier that timm:NAME or timm:NAME:FILE names, frozen.

    Raises:
        UserError: another form of name, a model that timm does not know or cannot fetch, or one of
            another number of classes.
    """
    scheme, _, rest = name.partition(":")
    model, _, file = rest.partition(":")
    if scheme != "timm" or not model:
        raise UserError(f"teacher {name!r} is none", fix="give timm:NAME or timm:NAME:FILE")
    if file and not file.endswith(".npz"):
        load_state(file)  # tells what is wrong with a file better than timm does
    options: dict[str, Any] = {"in_chans": net.in_channels}
    if file:  # holds a classifier for these classes; what is fetched has its own
        options["num_classes"] = net.num_classes
    try:
        teacher = timm.create_model(
            model, pretrained=not file, checkpoint_path=file or None, **options
        )
    except Exception as error:  # timm, the hub and the network raise many kinds
        line = f"{type(error).__name__}, {str(error).partition(chr(10))[0]}".rstrip(", ")
        raise UserError(
            f"the teacher cannot be made: {line}",
            where=name,
            fix="choose a model of timm.list_models(pretrained=True), or give a file of weights",
        ) from error
    if teacher.num_classes != net.num_classes:
        raise UserError(
            f"the teacher has {teacher.num_classes} classes, the network {net.num_classes}",
            where=name,
        )
    return teacher.requires_grad_(False).eval()


class Renormalised(nn.Module):
    """A classifier behind another normalisation than the images have."""

    def __init__(
        self, network: nn.Module, ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
    ) -> None:
        """Takes (mean, std) of the images and those that the network was trained with."""
        super().__init__()
        self.network = network
        (mean, std), (mean_t, std_t) = (
            [torch.tensor(v).view(-1, 1, 1) for v in pair] for pair in (ours, theirs)
        )
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", std / std_t)
        self.register_buffer("shift", (mean - mean_t) / std_t)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits."""
        return self.network(x * self.scale + self.shift)


def own_normalisation(
    teacher: nn.Module, ours: tuple[Sequence[float], Sequence[float]] | None
) -> nn.Module:
    """The teacher for images normalised with `ours`, (mean, std), as far as both are known."""
    config = getattr(teacher, "pretrained_cfg", None) or {}
    theirs = tuple(tuple(config.get(key) or ()) for key in ("mean", "std"))
    if ours is None or len(theirs[0]) != len(ours[0]) or theirs == tuple(map(tuple, ours)):
        return teacher
    return Renormalised(teacher, ours, theirs)


def check_teacher(teacher: nn.Module, image: Tensor, name: str) -> None:
    """Makes sure that an external teacher takes the images of a batch.

    Raises:
        UserError: it is for images of another size.
    """
    try:
        with torch.no_grad():
            teacher(image[:1])
    except (AssertionError, RuntimeError) as error:  # timm's transformers assert their size
        raise UserError(
            f"the teacher does not take images of {image.shape[-2]} x {image.shape[-1]} pixels",
            where=name,
            fix="choose another --data.image_size or another teacher",
        ) from error


class SupernetModule(NetModule):
    """Stage I: sandwich rule with distillation, and the moving average that teaches."""

    def __init__(
        self,
        arch: str = "ds_cnn_tiny",
        net: dict[str, Any] | None = None,
        distill: str = "ib",
        ensemble: bool = False,
        random_routes: int = 2,
        smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mvco: str = "off",
        teacher: str | None = None,
        optimizer: str = "sgd",
        lr: float = 0.08,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup: float = 5,
        cooldown: float = 10,
        warmup_lr: float = 1e-5,
        min_lr: float = 1e-5,
        schedule: str = "epoch",
        ema: float = 0.997,
        ema_warmup: bool = True,
        weights: str = "ema",
        check_ranks: bool = False,
        init_from: str | None = None,
        seed: int = 0,
        route: str = "dynamic",
        tau: float = 0.0,
        budget: float | None = None,
        eval_gumbel: bool = False,
    ) -> None:
        """Builds student and teacher.

        Args:
            arch: a name of `create_model`.
            net: constructor arguments that differ from the named configuration.
            distill: what all modes but the largest learn from, see `stage1_step`.
            ensemble: ensemble bootstrapping of the smallest route (IEB).
            random_routes: routes between smallest and largest in every step.
            smoothing: label smoothing.
            mixup: alpha of mixup, 0 for none.
            cutmix: alpha of CutMix, 0 for none; with both, one of them is drawn for each batch.
            mvco: multi-view consistency: "cross" shows another view of the images to all modes but
                the largest (needs --data.views 2), "off" shows all the same.
            teacher: a trained classifier that teaches the largest mode in equal parts with the
                labels: timm:NAME, or timm:NAME:FILE for weights on disk.
            optimizer: "sgd" (Nesterov), or "adamw".
            lr: peak learning rate.
            momentum: of Nesterov SGD.
            weight_decay: on weights of two or more dimensions.
            warmup: epochs of linear warm-up from `warmup_lr`.
            cooldown: epochs at `min_lr` in the end.
            warmup_lr: learning rate at the start.
            min_lr: learning rate at the end.
            schedule: "epoch" changes the rate once an epoch, "step" after every step.
            ema: decay of the teacher's moving average, per step.
            ema_warmup: start with min(ema, (1 + t) / (10 + t)).
            weights: which copy validate, test and predict run: "ema" or "student".
            check_ranks: compare the sampled routes across ranks in every step.
            init_from: a checkpoint to start from; a classifier of other size is left out.
            seed: of the sampled routes.
            route: what validate, test and predict run: "dynamic", "largest" or a route index.
            tau: price of compute in dynamic decisions.
            budget: target share of the widest route's MAdds instead of `tau`.
            eval_gumbel: keep the Gumbel noise in dynamic decisions.

        Raises:
            UserError: an option that does not exist.
        """
        super().__init__(arch, net, route, tau, budget, eval_gumbel)
        self.save_hyperparameters()
        for name, value, allowed in (
            ("distill", distill, DISTILL_MODES),
            ("mvco", mvco, ("off", "cross")),
            ("optimizer", optimizer, ("sgd", "adamw")),
            ("schedule", schedule, ("epoch", "step")),
            ("weights", weights, ("ema", "student")),
        ):
            if value not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        check_numbers(self.hparams)
        self.automatic_optimization = False
        self._mix = mixing(mixup, cutmix, self.net.num_classes)
        self._external: list[nn.Module] = []  # in a list: no part of the checkpoint
        if init_from is not None:
            start_from(self.net, init_from)
            self.hparams.update(init_from=None)  # the checkpoint of this run has all that came
        for parameter in self.net.gate_parameters():
            parameter.requires_grad_(False)
        self.net.gate_trained = False  # that is what Stage II is for
        self.teacher = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.route_top1 = nn.ModuleDict(
            {
                str(route): MulticlassAccuracy(self.net.num_classes, average="micro")
                for route in self.watched_routes()
            }
        )

    def watched_routes(self) -> list[int | str]:
        """The routes whose accuracy validation reports."""
        return [*self.net.routing_space, "largest"]

    def evaluated(self) -> DynamicNet:
        """The moving average, or the student if `weights` says so."""
        return self.teacher if self.hparams["weights"] == "ema" else self.net

    def train(self, mode: bool = True) -> "SupernetModule":
        """The teacher always stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the gate metadata of a Stage-I file.

        Raises:
            UserError: the file holds another network, or no moving average.
        """
        if not any(key.startswith(f"{TEACHER}.") for key in checkpoint["state_dict"]):
            raise UserError(
                "the checkpoint is of gate training: it has no moving average",
                fix="add --model ds_net_plus.module.GateModule",
            )
        super().on_load_checkpoint(checkpoint)

    def configure_optimizers(self) -> Any:
        """Nesterov SGD or AdamW with a cosine schedule; no decay on biases, norms and positions."""
        h, spared = self.hparams, self.net.no_weight_decay()
        trained = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        decayed = [p for n, p in trained.items() if p.ndim > 1 and n not in spared]
        others = [p for n, p in trained.items() if p.ndim <= 1 or n in spared]
        groups = [
            {"params": decayed, "weight_decay": h["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = (
            AdamW(groups, h["lr"])
            if h["optimizer"] == "adamw"
            else SGD(groups, h["lr"], h["momentum"], nesterov=h["momentum"] > 0)
        )
        return [optimizer], [self.scheduler(optimizer)]

    def on_fit_start(self) -> None:
        """Fetches the external teacher, if there is one."""
        if self.hparams["teacher"] is not None and not self._external:
            teacher = external_teacher(self.hparams["teacher"], self.net)
            data = getattr(self.trainer, "datamodule", None)
            ours = (data.mean, data.std) if isinstance(data, ImageData) else None
            self._external.append(own_normalisation(teacher, ours))
        for teacher in self._external:
            teacher.to(self.device)

    def on_train_start(self) -> None:
        """Warns of a teacher that never leaves its initial weights."""
        self._student_state = dict(self.net.state_dict())
        self._teacher_state = dict(self.teacher.state_dict())
        kept = 1.0
        for step in range(self.steps()):
            kept *= self._decay(step)
            if kept < 0.5:
                return
        if self.hparams["distill"] not in ("none", "inplace"):
            log.warning(
                "teacher still more than half initial weights at the end (share %.2f): "
                "lower --model.ema or train longer",
                kept,
            )

    def _decay(self, step: int) -> float:
        decay = self.hparams["ema"]
        return ema_decay(step, decay) if self.hparams["ema_warmup"] else decay

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One sandwich step, the optimizer's step and the teacher's."""
        h, step = self.hparams, self.global_step
        gates = self.net.num_gates
        routes = sample_routes(step, self.net.num_routes, h["random_routes"], h["seed"], gates)
        if h["check_ranks"]:
            self._check_ranks(routes)
        optimizer: Optimizer = self.optimizers()  # pyright: ignore[reportAssignmentType]
        optimizer.zero_grad()
        image, label, other = self._views(batch)
        if self._external and step == 0:
            check_teacher(self._external[0], image, h["teacher"])
        output = stage1_step(
            self.net,
            self.teacher,
            image,
            label,
            routes,
            other_view=other,
            external=self._external[0] if self._external else None,
            distill=h["distill"],
            ensemble=h["ensemble"],
            smoothing=h["smoothing"],
            progress=step / self.steps(),
            backward=self.manual_backward,
            no_sync=getattr(self.trainer.strategy, "block_backward_sync", nullcontext),
        )
        drop_zero_gradients(list(self.net.parameters()))
        optimizer.step()
        ema_update(self._teacher_state, self._student_state, self._decay(step))
        if h["schedule"] == "step":
            self.lr_schedulers().step()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue, reportCallIssue]
        self.log_dict({f"train/loss_{k}": v for k, v in output.losses.items()})
        self.log("loss", output.loss, prog_bar=True, logger=False)
        return output.loss

    def _views(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images, labels and the other view, mixed with the same partners and shares."""
        if self.hparams["mvco"] == "cross" and batch.other is None:
            raise UserError(
                "multi-view consistency needs two views of every image", fix="add --data.views 2"
            )
        other = batch.other if self.hparams["mvco"] == "cross" else None
        if self._mix is None:
            return batch.image, batch.label, other
        if len(batch.image) % 2:
            raise UserError("mixup and CutMix mix pairs", fix="choose an even --data.batch_size")
        both = batch.image if other is None else torch.cat([batch.image, other], 1)
        mixed, label = self._mix(both.clone(), batch.label)
        image, *others = mixed.split(batch.image.shape[1], 1)
        return image, label, others[0] if others else None

    def on_train_epoch_end(self) -> None:
        """The official schedule moves once an epoch."""
        if self.hparams["schedule"] == "epoch":
            self.lr_schedulers().step()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue, reportCallIssue]

    def _check_ranks(self, routes: tuple[RouteLike, ...]) -> None:
        mine = torch.tensor(routes, device=self.device)
        gathered = self.all_gather(mine)
        if not torch.equal(gathered, mine.expand_as(gathered)):  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
            raise RuntimeError(f"ranks sampled different routes; rank {self.global_rank}: {routes}")

    def _asked(self) -> bool:
        """Whether validation measures one thing: the chosen route, or a trained gate."""
        asked = self.route is not None or bool(self.evaluated().gate_trained)
        return asked and self.trainer.state.fn == TrainerFn.VALIDATING

    def on_validation_start(self) -> None:
        """Refuses statistics that were never measured, where there was no training before."""
        if self._asked():
            self.on_test_start()
        elif self.trainer.state.fn == TrainerFn.VALIDATING:
            check_statistics(self.evaluated(), self.watched_routes())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Top-1 of the watched routes, the front run once for all of them.

        The command `validate` measures the chosen route, or a trained gate, instead.
        """
        if self._asked():
            super().validation_step(batch, batch_idx)
            return
        net = self.evaluated()
        features = net.front(batch.image).features
        for route in self.watched_routes():
            logits = (
                net(batch.image, route=route) if route == "largest" else net.rest(features, route)
            )
            metric = self.route_top1[str(route)]
            metric(logits, batch.label)
            self.log(f"val/top1_{route}", metric, prog_bar=route in (0, "largest"))  # pyright: ignore[reportArgumentType]
