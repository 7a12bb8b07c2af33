"""Distiller: one student, at most one teacher, cross-entropy and any distillation losses."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from ickd.cache import TeacherCache
from ickd.folding import fold
from ickd.metrics import SegmentationMetrics
from ickd.module.checks import (
    check_classes,
    check_finite_terms,
    naming_terms,
    warn_of_dead_channels,
    warn_of_teacher,
)
from ickd.module.fitting import fit_recipe
from ickd.module.objective import IGNORE, Objective, Pair, parse_losses
from ickd.module.optimisation import (
    FAST,
    OptimizerName,
    ScheduleName,
    make_optimizer,
    make_schedule,
    parameter_groups,
)
from ickd.networks import Network, load_pretrained, load_weights, open_network
from tenfold.device import channels_last as to_channels_last
from tenfold.distillation import Taps
from tenfold.errors import UserError
from tenfold.training import LAST

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
        ce_weight: float = 1.0,
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
        init_lr: float = 0.05,
        fast_head: bool = False,
        adaptor_factor: float = 1.0,
        channels_last: bool = False,
        fold_teacher: bool = False,
    ) -> None:
        """Builds both networks; files and published weights are read when training begins.

        Args:
            student: a network by name ("kind:name", see ickd.networks), or a module; its weights
                go on training.
            teacher: likewise; frozen and in eval mode. None trains the student alone.
            pairs: (tap of the student, tap of the teacher, weight), shallow to deep; if left out,
                what both networks offer.
            losses: weights by name, {"ickd": 2.5, "kd": 1}, with options {"dkd": {"weight": 1,
                "warmup": 20, "beta": 6}}, or names alone, "kd+ickd".
            num_classes: of both classifiers; those of the named networks if left out.
            ce_weight: factor of the cross-entropy; 0 needs no labels.
            student_init: "pretrained" starts from the weights that timm or torchvision publish.
            student_ckpt: file of weights to start from.
            teacher_init: as `student_init`.
            teacher_ckpt: file with the teacher's weights: a run of ickd, or a published one.
            teacher_recipe: trains the teacher by this recipe first, in a folder of the run, where
                there is no file of it.
            teacher_cache: file of `cache-teacher`, read instead of running the teacher; "memory"
                computes it when training begins.
            student_options: further arguments of `open_network`, such as mean, std, image_size.
            teacher_options: likewise.
            optimizer: "sgd" or "adamw".
            lr: highest learning rate.
            weight_decay: of weights.
            momentum: of SGD.
            nesterov: of SGD.
            schedule: "constant", "multistep", "cosine", "poly" or "onecycle".
            milestones: of "multistep": epochs after which the rate falls to a tenth.
            warmup: share of the steps in which the rate grows.
            paper_decay: let norms and biases decay too, as the papers' programs do.
            init_epochs: epochs in front in which ab, fsp or ft prepare the student or an adaptor.
            init_lr: learning rate of these epochs.
            fast_head: ten times the rate for a segmentation network's head and for adaptors.
            adaptor_factor: learning rate of adaptors, in those of the student.
            channels_last: order of convolutions' memory, usually faster.
            fold_teacher: run the teacher with its batch norms folded into its convolutions; its
                features then differ in their last bits.

        Raises:
            UserError: an unknown network, loss, option or tap, or what cannot go together.
        """
        super().__init__()
        self.save_hyperparameters(ignore=_modules(student=student, teacher=teacher))
        if student_init not in ("scratch", "pretrained"):
            raise UserError(f"student_init must be scratch or pretrained, got {student_init!r}")
        self.pairs = [Pair(*pair) for pair in pairs or ()]
        names = [[pair.student for pair in self.pairs], [pair.teacher for pair in self.pairs]]
        self.student = _network(student, num_classes, names[0], student_options)
        self.teacher = (
            None if teacher is None else _network(teacher, num_classes, names[1], teacher_options)
        )
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval()
        choices = parse_losses(losses)
        ours = _example_taps(self.student)
        theirs = None if self.teacher is None else _example_taps(self.teacher)
        check_classes(choices, ours, theirs)
        self.objective = Objective(choices, ours, theirs, ce_weight, self.pairs, init_epochs)
        assert ours.logits is not None
        self.num_classes, self.dense = ours.logits.shape[1], ours.logits.ndim == 4
        self.cache: TeacherCache | None = None
        self.folded: list[Network] = []  # a list: no second teacher in the state dict
        if self.hparams["channels_last"]:
            to_channels_last(self.student)
        self.teacher_scored = False
        self.told: set[str] = set()
        self._make_metrics()

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
        """Loads the weights that training starts from, and checks that the data fit.

        Raises:
            UserError: a file is missing or of another network, or the data have other classes.
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
        self._load("student", self.student)
        if self.teacher is not None:
            self._load("teacher", self.teacher)
            warn_of_teacher(self.teacher, self.student, self.hparams, data)
        self.objective.set_labels(data)

    def _load(self, which: str, network: Network) -> None:
        if self.trainer.ckpt_path:  # a run that goes on has its weights in its checkpoint
            return
        if self.hparams[f"{which}_init"] == "pretrained":
            load_pretrained(network)
        path = self.hparams[f"{which}_ckpt"]
        if path is None and which == "teacher" and self.hparams["teacher_recipe"]:
            path = self._train_teacher()
        if path is not None:
            for note in load_weights(network, path):
                log.info("%s: %s", path, note)

    def _train_teacher(self) -> Path:
        """The checkpoint of the teacher's own recipe, on data of the same kind as this run's."""
        folder = Path(self.trainer.default_root_dir) / "teacher"
        if self.trainer.is_global_zero:
            same = {"classes", "teacher_size", "test_size", "val_size"}
            given = getattr(getattr(self.trainer, "datamodule", None), "hparams", {})
            changes = {key: value for key, value in given.items() if key in same}
            log.info(
                "the teacher is trained first, by the recipe %s", self.hparams["teacher_recipe"]
            )
            fit_recipe(self.hparams["teacher_recipe"], folder, data=changes)
        self.trainer.strategy.barrier()
        return folder / LAST

    def on_fit_start(self) -> None:
        """Makes the teacher fast, from a cache or folded: its weights are in place now."""
        if self.teacher is None:
            return
        cache, data = self.hparams["teacher_cache"], getattr(self.trainer, "datamodule", None)
        self.objective.set_margins(self.teacher, data)
        if cache == "memory":
            self.cache = TeacherCache.compute(self.teacher, data)
        elif cache is not None:
            self.cache = TeacherCache.open(cache, self.teacher, data)
        elif self.hparams["fold_teacher"]:
            self.folded = [fold(self.teacher)]

    # -- training ------------------------------------------------------------------------------

    def taps_of(self, network: Network, pixels: Tensor) -> Taps:
        """All that a network says, or its logits alone where nothing else is compared."""
        if self.objective.needs_taps:
            return network.taps(pixels)
        return Taps(logits=network(pixels))

    @torch.no_grad()
    def teacher_taps(self, batch: Any) -> Taps | None:
        """What the teacher says about a batch, computed or from the cache."""
        if self.teacher is None or not self.objective.choices:
            return None
        if self.cache is not None:
            return self.cache.rows(batch.index)
        return self.taps_of((self.folded or [self.teacher])[0], batch.image)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The weighted sum of all terms.

        Raises:
            UserError: features or terms that are NaN or infinite.
        """
        teacher = self.teacher_taps(batch)
        student = self.taps_of(self.student, batch.image)
        facts = {"label": batch.label, "index": batch.index}
        with naming_terms(self.teacher, teacher, batch):
            terms = self.objective(student, teacher, facts, self.current_epoch)
        loss = torch.stack(list(terms.values())).sum()
        check_finite_terms(loss, terms, self.teacher, teacher, batch)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})
        if self.global_step % 100 == 0:
            self.log_dict(warn_of_dead_channels(self, student, teacher))
        return loss

    def on_train_epoch_start(self) -> None:
        """After the preparation the optimiser begins anew, as a second run would."""
        if self.current_epoch == self.objective.init_epochs > 0:
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    def configure_optimizers(self) -> Any:
        """The optimiser and the learning rate of every step."""
        arguments = self.hparams
        groups = parameter_groups(
            self._parts(),
            arguments["lr"],
            arguments["weight_decay"],
            decay_all=arguments["paper_decay"],
        )
        optimizer = make_optimizer(
            groups,
            arguments["optimizer"],
            arguments["lr"],
            arguments["momentum"],
            arguments["nesterov"],
        )
        schedule = make_schedule(
            optimizer,
            arguments["schedule"],
            steps=max(1, int(self.trainer.estimated_stepping_batches)),
            epochs=self.trainer.max_epochs or 1,
            milestones=arguments["milestones"],
            warmup=arguments["warmup"],
            init_epochs=arguments["init_epochs"],
            init_factor=arguments["init_lr"] / arguments["lr"],
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _parts(self) -> list[tuple[nn.Module, float]]:
        """Modules that learn, and the factors of their learning rates."""
        fast = self.hparams["fast_head"]
        adaptors = FAST if fast else self.hparams["adaptor_factor"]
        backbone = getattr(self.net, "backbone", None)
        if not fast or backbone is None:
            return [(self.net, 1.0), (self.objective, adaptors)]
        heads = [part for part in self.net.children() if part is not backbone]
        return [(backbone, 1.0), *((head, FAST) for head in heads), (self.objective, adaptors)]

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
        self._measure(batch, "val")
        if self.trainer.state.fn == TrainerFn.FITTING and self._scores_teacher():
            assert self.teacher is not None
            self.teacher_score.update(self.teacher(batch.image), batch.label)

    def _scores_teacher(self) -> bool:
        """Whether the teacher is still to be measured, and can be."""
        if self.teacher is None or self.teacher_scored:
            return False
        return self.teacher_score.num_classes == self._teacher_classes()

    def _teacher_classes(self) -> int:
        assert self.teacher is not None
        return int(getattr(self.teacher.net, "num_classes", self.num_classes))

    def on_validation_epoch_end(self) -> None:
        """Warns of a teacher that has nothing to teach."""
        if self.trainer.state.fn != TrainerFn.FITTING or not self._scores_teacher():
            return
        self.teacher_scored = True
        teacher, student = _main(self.teacher_score.compute()), _main(self.score.compute())
        self.teacher_score.reset()
        self.log("val/teacher", teacher)
        chance = 1.0 / self.num_classes
        name = "mIoU" if self.dense else "accuracy"
        reasons = "wrong checkpoint, normalisation or order of classes?"
        if not self.dense and teacher < 1.5 * chance:
            log.warning("the teacher is at chance (%s %.3f): %s", name, teacher, reasons)
        elif teacher <= student:
            log.warning(
                "the teacher (%s %.3f) is not better than the student (%.3f): %s",
                name,
                teacher,
                student,
                reasons,
            )

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Scores of the student."""
        self._measure(batch, "test")

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
        files = getattr(self.trainer.datamodule, "predict_files", ())  # pyright: ignore[reportAttributeAccessIssue]
        images = [str(files[n]) if files else n for n in batch.index.tolist()]
        score, label = self.student(batch.image).softmax(1).max(1)
        if self.dense:
            shares = [torch.bincount(mask.flatten(), minlength=self.num_classes) for mask in label]
            return [
                {"image": image, **{f"class_{k}": n for k, n in enumerate(share.tolist())}}
                for image, share in zip(images, shares, strict=True)
            ]
        rows = zip(images, label.tolist(), score.tolist(), strict=True)
        return [{"image": image, "label": k, "score": p} for image, k, p in rows]


def _modules(**networks: object) -> list[str]:
    """Names of the arguments that are modules, which a checkpoint cannot keep as arguments."""
    return [name for name, given in networks.items() if isinstance(given, nn.Module)]


def _network(
    given: str | nn.Module,
    num_classes: int | None,
    taps: Sequence[str],
    options: Mapping[str, Any] | None,
) -> Network:
    if isinstance(given, Network):
        return given
    if isinstance(given, nn.Module):
        return Network(given, tap_names=taps)
    chosen = {"num_classes": num_classes, "taps": taps, **(options or {})}
    return open_network(given, **chosen)


@torch.no_grad()
def _example_taps(network: Network) -> Taps:
    """Taps of two empty images, for shapes alone; modes and statistics stay as they are."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    taps = network.taps(network.example(2))
    for module, training in modes:
        module.training = training
    return taps


def _main(score: Any) -> float:
    return float(score["miou"] if isinstance(score, Mapping) else score)
