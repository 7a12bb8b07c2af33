"""Distiller: one student, at most one teacher, cross-entropy and any distillation losses."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from ickd.cache import TeacherCache
from ickd.compiling import CompiledNetwork
from ickd.folding import fold
from ickd.metrics import IGNORE, SegmentationMetrics
from ickd.module.batches import as_batch
from ickd.module.checks import (
    check_classes,
    check_finite,
    check_strategy,
    naming_terms,
    warn_of_dead_channels,
    warn_of_score,
    warn_of_teacher,
)
from ickd.module.objective import Objective, Pair, parse_losses, usual_ce_weight
from ickd.module.optimisation import (
    FAST,
    OptimizerName,
    ScheduleName,
    make_optimizer,
    make_schedule,
    parameter_groups,
)
from ickd.module.starting import (
    check_files,
    check_size,
    example_taps,
    freeze,
    load_start,
    make_network,
)
from ickd.networks import Network
from tenfold.device import Precision, autocast
from tenfold.device import channels_last as to_channels_last
from tenfold.distillation import Taps
from tenfold.errors import UserError

log = logging.getLogger(__name__)

Init = Literal["scratch", "pretrained"]


class Distiller(LightningModule):
    """A student that learns from labels and from a frozen teacher; alone, where there is none.

    >>> module = Distiller(student, teacher, pairs=[("layer4", "layer4", 1.0)],
    ...                    losses={"ickd": 2.5, "kd": 1.0})
    >>> Trainer(max_epochs=240).fit(module, datamodule=ImageData("cifar100", root="data"))
    """

    def __init__(
        self,
        student: str | nn.Module = "embedded:gratings-student",
        teacher: str | nn.Module | None = None,
        pairs: Sequence[tuple[str, str, float]] | None = None,
        losses: str | dict[str, Any] | None = None,
        *,
        num_classes: int | None = None,
        ce_weight: float | None = None,
        student_init: Init = "scratch",
        student_ckpt: str | None = None,
        teacher_init: Init = "scratch",
        teacher_ckpt: str | None = None,
        teacher_recipe: str | None = None,
        teacher_cache: str | None = None,
        student_options: dict[str, Any] | None = None,
        teacher_options: dict[str, Any] | None = None,
        optimizer: OptimizerName = "sgd",
        lr: float = 0.05,
        weight_decay: float = 5e-4,
        momentum: float = 0.9,
        nesterov: bool = False,
        schedule: ScheduleName = "multistep",
        milestones: Sequence[int] = (150, 180, 210),
        warmup: float = 0.0,
        paper_decay: bool = False,
        init_epochs: int = 0,
        init_lr: float | None = None,
        scale_lr: bool = False,
        fast_head: bool = False,
        adaptor_factor: float = 1.0,
        channels_last: bool = False,
        fold_teacher: bool = False,
        compile_teacher: bool = False,
        teacher_precision: Precision | None = None,
    ) -> None:
        """Builds both networks; files and published weights are read when training begins.

        Args:
            student: a network by name ("kind:name", see ickd.networks), or a module; its weights
                go on training.
            teacher: likewise; frozen and in eval mode. None trains the student alone.
            pairs: (tap of the student, tap of the teacher, weight), shallow to deep; if left out,
                what both networks offer.
            losses: weights by name, {"ickd": 2.5, "kd": 1}, with options {"dkd": {"weight": 1,
                "warmup": 20, "beta": 6}}, or names alone, "kd+ickd". A warmup that is left out is
                the loss's own, in epochs, and at most half of the run: 20 for dkd and reviewkd.
            num_classes: of both classifiers; those of the named networks if left out.
            ce_weight: factor of the cross-entropy; 0 needs no labels. If left out 1, and where a
                lone loss has its usual weight, what goes with it (0.1 beside kd); 0 beside
                kd_mixed, which has the labels inside.
            student_init: "pretrained" starts from the weights that timm or torchvision publish.
            student_ckpt: file of weights to start from.
            teacher_init: as `student_init`.
            teacher_ckpt: file with the teacher's weights: a run of ickd, or a published one.
            teacher_recipe: trains the teacher by this recipe first, in a folder of the run, where
                it has no weights; without effect if the recipe trains another network.
            teacher_cache: file of `cache-teacher`, read instead of running the teacher; "memory"
                computes it when training begins, where images look the same in every epoch.
            student_options: further arguments of `open_network`, such as mean, std, image_size.
            teacher_options: likewise.
            optimizer: "sgd" or "adamw".
            lr: highest learning rate.
            weight_decay: of weights.
            momentum: of SGD; "onecycle" moves it, or AdamW's first beta, between 0.95 and 0.85.
            nesterov: of SGD.
            schedule: "constant", "multistep", "cosine", "poly" or "onecycle".
            milestones: of "multistep": epochs after which the rate falls to a tenth.
            warmup: share of the steps in which the rate grows; of "onecycle" 0.3 if it is 0.
            paper_decay: let norms and biases decay too, as the papers' programs do.
            init_epochs: epochs in front in which ab, fsp or ft prepare the student or an adaptor;
                without effect beside other losses.
            init_lr: learning rate of these epochs; that of the task if left out.
            scale_lr: multiply the learning rates by the number of processes.
            fast_head: ten times the rate for a segmentation network's head and for adaptors.
            adaptor_factor: learning rate of adaptors, in those of the student.
            channels_last: order of convolutions' memory, usually faster.
            fold_teacher: run the teacher with its batch norms folded into its convolutions; its
                features then differ in their last bits.
            compile_teacher: run it through torch.compile; the first step takes up to a minute more.
            teacher_precision: "fp32", "bf16" or "fp16", in which it runs; that of the trainer if
                left out. Of these three none touches features that are cached.

        Raises:
            UserError: an unknown network, loss, option or tap, or what cannot go together.
        """
        super().__init__()
        self.save_hyperparameters(ignore=_modules(student=student, teacher=teacher))
        self._check_arguments()
        self.pairs = [Pair(*pair) for pair in pairs or ()]
        names = [[pair.student for pair in self.pairs], [pair.teacher for pair in self.pairs]]
        self.student = make_network(student, num_classes, names[0], student_options)
        self.teacher: Network | None = None
        if teacher is not None:
            self.teacher = make_network(teacher, num_classes, names[1], teacher_options)
            freeze(self.teacher, new=isinstance(teacher, str))
        choices = parse_losses(losses)
        pixels = self.student.example(2)
        if self.teacher is not None and self.student.expects.size:
            pixels = self.teacher.example(2)  # of the two, the one that takes images as they come
        ours = example_taps(self.student, pixels)
        theirs = None if self.teacher is None else example_taps(self.teacher, pixels)
        check_classes(choices, ours, theirs)
        ce_weight = usual_ce_weight(losses) if ce_weight is None else ce_weight
        self.objective = Objective(choices, ours, theirs, ce_weight, self.pairs, init_epochs)
        if not self.objective.acts:
            what = "ce_weight is 0 and no loss acts beside it: there is nothing to learn from"
            raise UserError(what, fix="name a loss with --losses, or leave ce_weight out")
        assert ours.logits is not None
        self.num_classes, self.dense = ours.logits.shape[1], ours.logits.ndim == 4
        said = None if theirs is None else theirs.logits
        self.comparable = said is not None and said.shape[1] == self.num_classes
        self.cache: TeacherCache | None = None
        self.quick: list[Any] = []  # a list: no second teacher in the state dict
        if self.hparams["channels_last"]:
            to_channels_last(self.student)
            if self.teacher is not None:
                to_channels_last(self.teacher)
        self.teacher_scored, self.predicted = False, 0
        self.told: set[str] = set()
        self._make_metrics()

    def _check_arguments(self) -> None:
        given = self.hparams
        for which in ("student_init", "teacher_init"):
            if given[which] not in get_args(Init):
                known = " or ".join(get_args(Init))
                raise UserError(f"{which} must be {known}, got {given[which]!r}")
        for name in ("init_lr", "adaptor_factor"):
            value = given[name]
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} must be above 0, got {value}")

    # -- networks ------------------------------------------------------------------------------

    @property
    def net(self) -> nn.Module:
        """The student's network without its normalisation: what one takes away."""
        return self.student.net

    def train(self, mode: bool = True) -> Distiller:
        """The teacher stays in eval mode: its batch norms keep the statistics of its training."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """The student's logits of pixels in 0..1."""
        return self.student(pixels)

    def setup(self, stage: str) -> None:
        """Checks that the data fit, and hands them to the losses.

        Raises:
            UserError: the data have other classes, or images that a network does not take.
        """
        data = getattr(self.trainer, "datamodule", None)
        known = getattr(data, "num_classes", 0)
        if known and known != self.num_classes:
            raise UserError(
                f"the data have {known} classes, the student {self.num_classes}",
                fix=f"give --model.num_classes {known}",
            )
        if stage != "fit":
            return
        check_strategy(self.objective, self.trainer.strategy)
        # every run has a frozen teacher, and nobody can act on this
        warnings.filterwarnings("ignore", "Found .* module.s. in eval mode")
        self.objective.set_labels(data)
        said = []
        for which, network in (("student", self.student), ("teacher", self.teacher)):
            if network is not None and (size := getattr(data, "image_size", None)):
                said.append(check_size(which, network, size, named=which in self.hparams))
        if len(said) == 2:
            self.objective.rehearse(*said)
        cache = self.hparams["teacher_cache"]
        if self.teacher is not None and cache not in (None, "memory") and not Path(cache).is_file():
            TeacherCache.open(cache, self.teacher, data)  # tells it before a teacher is trained

    def on_fit_start(self) -> None:
        """Reads the weights that training starts from, and makes the teacher fast.

        Not earlier: only now it is known whether the run goes on, with its weights in place.

        Raises:
            UserError: a file is missing or of another network, or features cannot be cached.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        self.cache, self.quick = None, []
        if not self.trainer.ckpt_path:
            check_files(self.hparams)
        load_start(self, "student", self.student)
        if self.teacher is None:
            return
        trained = load_start(self, "teacher", self.teacher)
        warn_of_teacher(self.teacher, self.student, data, trained=trained)
        self.objective.set_margins(self.teacher, data)
        self.cache = self._cached_teacher(data)
        if self.cache is None:
            self.quick = [self._quick_teacher()]

    def _cached_teacher(self, data: Any) -> TeacherCache | None:
        cache, parts = self.hparams["teacher_cache"], self.objective.teacher_parts
        if cache is None or not self.objective.choices:
            return None
        assert self.teacher is not None
        if data is None:
            what = "teacher_cache finds features by the images of a data module, and there is none"
            raise UserError(what, fix="leave teacher_cache out, or train on a data module")
        if cache != "memory":
            return TeacherCache.open(cache, self.teacher, data, needs=parts)
        if getattr(data, "deterministic", False):
            return TeacherCache.compute(self.teacher, data, keep=parts)
        log.info("images are augmented: the teacher sees every one, teacher_cache has no use")
        return None

    def _quick_teacher(self) -> Any:
        assert self.teacher is not None
        teacher = fold(self.teacher) if self.hparams["fold_teacher"] else self.teacher
        return CompiledNetwork(teacher) if self.hparams["compile_teacher"] else teacher

    # -- training ------------------------------------------------------------------------------

    def taps_of(self, network: Network | CompiledNetwork, pixels: Tensor) -> Taps:
        """All that a network says, or its logits alone where nothing else is compared."""
        if self.objective.needs_taps:
            return network.taps(pixels)
        return Taps(logits=network(pixels))

    @torch.no_grad()
    def teacher_taps(self, batch: Any) -> Taps | None:
        """What the teacher says about a batch, computed or from the cache."""
        if self.teacher is None or not self.objective.choices:
            return None
        if self.cache is not None and batch.index is None:
            what = "cached features are found by the image's index, which the loader does not give"
            raise UserError(what, fix="give it (images, labels, index), or leave teacher_cache out")
        if self.cache is not None:
            return self.cache.rows(batch.index)
        teacher = (self.quick or [self.teacher])[0]
        precision = self.hparams["teacher_precision"]
        with autocast(self.device, precision) if precision else nullcontext():
            return self.taps_of(teacher, batch.image)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The weighted sum of all terms.

        Raises:
            UserError: features or terms that are NaN or infinite.
        """
        batch = as_batch(batch)
        teacher = self.teacher_taps(batch)
        reads = self.objective.reads_student(self.current_epoch)
        student = self.taps_of(self.student, batch.image) if reads else Taps()
        facts = {"label": batch.label, "index": batch.index}
        facts = {key: value for key, value in facts.items() if value is not None}
        with naming_terms(self.teacher, teacher, batch):
            terms = self.objective(student, teacher, facts, self.current_epoch)
        loss = torch.stack(list(terms.values())).sum()
        if student.logits is not None and not self.objective.reads_logits:
            loss = loss + 0 * student.logits.sum()  # DDP wants a gradient for every weight
        check_finite(terms, student, self.teacher, teacher, batch)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})
        if self.global_step % 100 == 0 and reads:
            self.log_dict(warn_of_dead_channels(self, student, teacher))
        return loss

    def on_train_start(self) -> None:
        """A resumed epoch does not start again: what learns in it is settled here."""
        self.objective.freeze(self.current_epoch)

    def on_train_epoch_start(self) -> None:
        """After the preparation the optimiser begins anew, as a second run would."""
        self.objective.freeze(self.current_epoch)
        if self.current_epoch == self.objective.init_epochs > 0:
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    def configure_optimizers(self) -> Any:
        """The optimiser and the learning rate of every step.

        Raises:
            UserError: numbers out of range, or training without an end.
        """
        given, init_epochs = self.hparams, self.objective.init_epochs
        lr = given["lr"] * (self.trainer.world_size if given["scale_lr"] else 1)
        decay_all = given["paper_decay"]
        groups = parameter_groups(self._parts(), lr, given["weight_decay"], decay_all=decay_all)
        optimizer = make_optimizer(
            groups, given["optimizer"], lr, given["momentum"], given["nesterov"]
        )
        steps, per_epoch = self._steps()
        self.objective.task_epochs = steps / per_epoch - init_epochs
        epochs = self.trainer.max_epochs
        if epochs is not None and 0 < epochs <= init_epochs:
            what = "all %d epochs prepare the task, which is never trained; take more of them"
            log.warning(what, epochs)
        schedule = make_schedule(
            optimizer,
            given["schedule"],
            steps=steps,
            per_epoch=per_epoch,
            milestones=given["milestones"],
            warmup=given["warmup"],
            init_epochs=init_epochs,
            init_factor=(given["init_lr"] or given["lr"]) / given["lr"],
        )
        plan = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": plan}

    def _steps(self) -> tuple[int, int]:
        """Optimiser steps of the whole run, and of an epoch."""
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            what = "the learning rate follows the length of the run, which has no end"
            raise UserError(what, fix="give --trainer.max_epochs or --trainer.max_steps")
        batches = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        per_epoch = math.ceil(batches) if math.isfinite(batches) else steps
        return max(1, int(steps)), max(1, int(per_epoch))

    def _parts(self) -> list[tuple[nn.Module, float]]:
        """Modules that learn, and the factors of their learning rates."""
        fast = self.hparams["fast_head"]
        adaptors = FAST if fast else self.hparams["adaptor_factor"]
        backbone = getattr(self.net, "backbone", None)
        if fast and isinstance(backbone, nn.Module):  # what is in two parts belongs to the first
            return [(backbone, 1.0), (self.net, FAST), (self.objective, adaptors)]
        return [(self.net, 1.0), (self.objective, adaptors)]

    # -- evaluation ----------------------------------------------------------------------------

    def _make_metrics(self) -> None:
        if self.dense:
            self.score: Any = SegmentationMetrics(self.num_classes, IGNORE)
            self.teacher_score: Any = SegmentationMetrics(self.num_classes, IGNORE)
            return
        top5 = min(5, self.num_classes)
        self.score = MulticlassAccuracy(self.num_classes, average="micro", ignore_index=-1)
        self.score5 = MulticlassAccuracy(
            self.num_classes, average="micro", top_k=top5, ignore_index=-1
        )
        self.teacher_score = MulticlassAccuracy(self.num_classes, average="micro", ignore_index=-1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Scores of the student; once in a run those of the teacher beside them."""
        batch = as_batch(batch)
        self._measure(batch, "val")
        if self._scores_teacher():
            assert self.teacher is not None
            self.teacher_score.update(self.teacher(batch.image), batch.label)

    def _scores_teacher(self) -> bool:
        """Whether the teacher is still to be measured, and can be."""
        fits = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        return fits and self.comparable and not self.teacher_scored

    def on_validation_epoch_end(self) -> None:
        """Tells the score of masks; once in a run warns of a teacher that has nothing to teach."""
        self._judge_teacher()
        self._log_masks("val")

    def on_test_epoch_end(self) -> None:
        """Tells the score of masks."""
        self._log_masks("test")

    def on_fit_end(self) -> None:
        """Says what the student started from."""
        self._tell_start("fit")

    def on_test_end(self) -> None:
        """Says what the student started from."""
        self._tell_start("test")

    def _tell_start(self, stage: str) -> None:
        given = self.hparams
        start = given["student_ckpt"] or f"{given['student_init']} weights"
        start = start.replace("scratch", "random") if "student" in given else "its module's weights"
        rank_zero_info(f"{stage}: the student {self.student.name} started from {start}")

    def _log_masks(self, split: str) -> None:
        if self.dense:
            found = {f"{split}/{name}": value for name, value in self.score.compute().items()}
            self.log_dict(found, prog_bar=True)
            self.score.reset()

    def _judge_teacher(self) -> None:
        if not self._scores_teacher():
            return
        self.teacher_scored = True
        teacher, student = _main(self.teacher_score.compute()), _main(self.score.compute())
        self.teacher_score.reset()
        self.log("val/teacher", teacher)
        metric, chance = ("mIoU", 0.0) if self.dense else ("accuracy", 1.0 / self.num_classes)
        warn_of_score(metric, teacher, student, chance)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Scores of the student."""
        self._measure(as_batch(batch), "test")

    def _measure(self, batch: Any, split: str) -> None:
        logits = self.student(batch.image)
        if self.dense:
            self.score.update(logits, batch.label)
            return
        self.score(logits, batch.label)
        self.score5(logits, batch.label)
        self.log(f"{split}/top1", self.score, prog_bar=True)
        self.log(f"{split}/top5", self.score5)

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """One row for each image: index or file, label and score; of masks the share of classes."""
        batch = as_batch(batch)
        files = getattr(getattr(self.trainer, "datamodule", None), "predict_files", ())
        before = self.predicted if batch_idx else 0
        self.predicted = before + len(batch.image)
        numbers = range(before, self.predicted) if batch.index is None else batch.index.tolist()
        images = [str(files[n]) if files else n for n in numbers]
        score, label = self.student(batch.image).softmax(1).max(1)
        if self.dense:
            shares = [torch.bincount(mask.flatten(), minlength=self.num_classes) for mask in label]
            return [
                {"image": image, **{f"class_{k}": n for k, n in enumerate(share.tolist())}}
                for image, share in zip(images, shares, strict=True)
            ]
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", ())
        rows = zip(images, label.tolist(), score.tolist(), strict=True)
        return [
            {"image": image, "label": k, **({"class": names[k]} if names else {}), "score": p}
            for image, k, p in rows
        ]


def _modules(**networks: object) -> list[str]:
    """Names of the arguments that are modules, which a checkpoint cannot keep as arguments."""
    return [name for name, given in networks.items() if isinstance(given, nn.Module)]


def _main(score: Any) -> float:
    return float(score["miou"] if isinstance(score, Mapping) else score)
