"""Fine-tuning, and training from scratch, of an encoder with fusion."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from bert_oversmoothing.baselines import TokenSimilarityLoss
from bert_oversmoothing.diagnostics import TokenCosine
from bert_oversmoothing.fusion.heads import GateKind
from bert_oversmoothing.metrics import SquadMetric
from bert_oversmoothing.model import FusionOutput
from bert_oversmoothing.module.building import build_net, load_weights
from bert_oversmoothing.module.opening import KEPT, is_run, load_tokenizer
from bert_oversmoothing.module.optimisation import (
    Schedule,
    check_numbers,
    linear_schedule,
)
from bert_oversmoothing.module.rows import Row, answer_rows, label_rows, token_rows, word_rows
from bert_oversmoothing.module.tokenizers import tokenizer_files, tokenizer_from
from tenfold.checkpoint import atomic_file
from tenfold.distributed import ranks
from tenfold.errors import UserError

Task = Literal["classification", "choice", "qa", "tokens", "image", "mlm"]

IGNORED = -100
"""Label of a token that has none."""
LOOKS = 8
"""Batches of a validation whose token similarity is measured, which takes all layers in memory."""

_TOKEN_TASKS = ("tokens", "mlm")
_LABELS = ("labels", "start_positions", "end_positions")

Batch = Mapping[str, Tensor]


class FusionModule(LightningModule):
    """An encoder whose task head reads a fusion of all layers, on `OversmoothingData`.

    >>> module = FusionModule(weights="google-bert/bert-base-uncased", fusion="gate")
    >>> data = OversmoothingData("sst2", "SST-2", tokenizer="google-bert/bert-base-uncased")
    >>> Trainer(max_epochs=3, gradient_clip_val=1.0).fit(module, datamodule=data)
    """

    null_threshold: Tensor

    def __init__(
        self,
        backbone: str | dict[str, Any] | None = None,
        weights: str | None = None,
        *,
        task: Task = "classification",
        num_labels: int = 2,
        fusion: str = "gate",
        layers: str | list[int] = "all",
        include_embeddings: bool = True,
        gate_kind: GateKind = "softmax",
        gate_shared: bool = False,
        norm_each: Literal["auto", "none"] = "auto",
        init: Literal["auto", "identity", "random"] = "auto",
        dropout: float | None = None,
        lr: float = 2e-5,
        fusion_lr: float | None = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        schedule: Schedule = "linear",
        regulariser: float = 0.0,
        margin: float = 0.5,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Builds the network with random weights; those of `weights` are read in `setup`.

        Args:
            backbone: a name of `bert_oversmoothing.model.BACKBONES`, the fields of a configuration
                of transformers with its model_type, or a folder or hub id whose configuration
                alone is read. If left out that of `weights`, and without weights BERT-base.
            weights: folder or hub id of a plain model, or of one with fusion, or a run of fit, such
                as of pre-training; the fusion is then that of the run, unless it is "last".
            task: what the head does.
            num_labels: classes; 1 is a regression, 2 are the ends of an answer ("qa"), and of a
                choice 1 for each.
            fusion: "concat", "max", "mean", "gate", "scalar_mix", "last" or "best_layer(i)".
            layers: that are fused: "all", "last:k", "every:k" or numbers.
            include_embeddings: whether layer 0 may be among them.
            gate_kind: "softmax" over the layers, "sigmoid", or "channel".
            gate_shared: one gate for all layers.
            norm_each: "auto" applies the final norm of a pre-norm encoder to every layer before
                the fusion, "none" does not.
            init: "identity" starts as the plain encoder; "auto" does with weights, and is "random"
                without.
            dropout: all rates of the encoder and of the head; its configuration's if left out.
            lr: highest learning rate of the encoder and the head.
            fusion_lr: of the fusion; `lr` if None.
            weight_decay: of all but biases, norms and the scalars of the fusion.
            warmup: share of the steps in which the rates grow.
            schedule: "linear" down to 0 behind it, or "constant".
            regulariser: weight of the token similarity of the last layer in the loss.
            margin: of that regulariser; cosines above 1 - margin cost.
            gradient_checkpointing: compute blocks again in the backward pass.

        Raises:
            UserError: no such model or option, or a number out of range.
        """
        super().__init__()
        self.save_hyperparameters()
        given: Any = self.hparams
        check_numbers(given)
        self.net = build_net(given)
        if gradient_checkpointing:
            self.net.gradient_checkpointing_enable()
        self.regulariser = TokenSimilarityLoss(margin, regulariser) if regulariser else None
        self.cosine_last, self.cosine_fused = TokenCosine(), TokenCosine()
        self.metric: Any = None
        # of SQuAD 2: odds above which a question has no answer, as they were best in validation;
        # infinite before there was one
        self.register_buffer("null_threshold", torch.tensor(torch.inf))
        # in a tuple, which a module does not search for modules
        self._last_block = (self.net.encoder.blocks[-1].state,)
        self._kept: dict[str, Any] | None = None
        self._texts: list[dict[str, str]] = []
        self._starts = weights is not None

    # -- what fits -----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Names the tokenizer of the weights to data without one; a checkpoint brings its own."""
        data, weights = self._data(), self.hparams["weights"]
        if data is not None and weights is not None:
            data.name_tokenizer(load_tokenizer(weights) if is_run(weights) else weights)

    def on_fit_start(self) -> None:
        """Reads the weights that the run starts from, and checks that the data fit.

        Not earlier: by now a checkpoint has brought its weights, vocabulary and classes.

        Raises:
            UserError: no such weights, those of another network, or data of another task,
                vocabulary or number of labels.
        """
        if self._starts:
            load_weights(self.net, self.hparams["weights"])
            if ranks()[1] > 1:  # a head that is not stored is random
                for tensor in self.net.state_dict().values():
                    dist.broadcast(tensor, 0)
        self._starts = False
        if (data := self._data()) is not None:
            self._check_data(data)

    def on_validation_start(self) -> None:
        """Likewise, where nothing is trained."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.on_fit_start()

    on_test_start = on_predict_start = on_validation_start

    def _data(self) -> Any:
        return getattr(self._trainer, "datamodule", None)

    def _check_data(self, data: Any) -> None:
        mine: Any = self.hparams
        theirs: dict[str, Any] = {"task": getattr(data, "task", mine["task"])}
        if theirs["task"] in ("classification", "tokens", "image"):
            theirs["num_labels"] = getattr(data, "num_labels", mine["num_labels"])
        others = {name: value for name, value in theirs.items() if value != mine[name]}
        if others:  # told all at once, or the next run would stop at the next one
            name, value = next(iter(others.items()))
            what = f"the data have {name} {value}, the model {mine[name]}"
            fix = " ".join(f"--model.{name} {value}" for name, value in others.items())
            raise UserError(what, fix=f"give {fix}")
        words = len(getattr(data, "tokenizer", None) or ())
        rows = getattr(self.net.get_input_embeddings(), "num_embeddings", words)
        if words > rows:
            what = f"the tokenizer has {words} ids, the model {rows}"
            fix = "give --data.tokenizer the folder or hub id of the weights, or, from scratch, "
            raise UserError(what, fix=f"{fix}--model.backbone.vocab_size {words}")

    # -- training ------------------------------------------------------------------------------

    def forward(self, batch: Batch, **options: Any) -> FusionOutput:
        """The output of the network for a batch, with or without its labels."""
        return self.net(**{name: x for name, x in batch.items() if name != "index"}, **options)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the task, and of the regulariser where there is one."""
        with self._last_states() as last:
            loss = self._task_loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        if self.regulariser is not None:
            cost = self.regulariser(last[-1], token_mask(batch, last[-1]))
            self.log("train/similarity_loss", cost)
            loss = loss + cost
        return loss

    def _task_loss(self, batch: Batch) -> Tensor:
        """That of transformers; where tokens have labels, the mean over those of all ranks."""
        if self.hparams["task"] not in _TOKEN_TASKS:
            loss = self(batch).loss
            assert loss is not None
            return loss
        labels = batch["labels"]
        logits = self(without_labels(batch)).logits
        assert logits is not None
        total = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        # DDP takes the mean over ranks, which may have drawn different numbers of tokens
        counted = (labels != IGNORED).sum().to(total)
        if ranks()[1] > 1:
            dist.all_reduce(counted)
        return total * ranks()[1] / counted.clamp(min=1)

    @contextmanager
    def _last_states(self) -> Iterator[list[Tensor]]:
        """H_L of the forward pass inside, behind all others where blocks share their module."""
        states: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            states[:] = [output[0] if isinstance(output, tuple) else output]

        hook = self._last_block[0].register_forward_hook(keep)
        try:
            yield states
        finally:
            hook.remove()

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and linear decay, step by step.

        Raises:
            UserError: a run without an end.
        """
        given = self.hparams
        apart = given["lr"] if given["fusion_lr"] is None else given["fusion_lr"]
        groups = self.net.parameter_groups(given["lr"], apart, given["weight_decay"])
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("the decay needs an end", fix="give --trainer.max_epochs or max_steps")
        shape = {"warmup": given["warmup"], "schedule": given["schedule"]}
        rate = linear_schedule(optimizer, steps=max(1, int(steps)), **shape)
        return [optimizer], [{"scheduler": rate, "interval": "step"}]

    # -- evaluation ----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Metrics of the data."""
        self._start("val")

    def on_test_epoch_start(self) -> None:
        """Likewise."""
        self._start("test")

    def on_predict_epoch_start(self) -> None:
        """Likewise, for the answers of questions, and the texts that rows are named by."""
        self._start("predict")
        texts = getattr(self._data(), "texts", None)
        self._texts = texts("predict") if texts else []

    def _start(self, split: str) -> None:
        data = self._data()
        if data is None:
            raise UserError("figures are those of a data module, and there is none")
        self.metric = data.metric(split).to(self.device)
        tuned = bool(self.null_threshold.isfinite())
        if split != "val" and tuned and isinstance(self.metric, SquadMetric):
            self.metric.null_threshold = float(self.null_threshold)
        self.cosine_last.reset()
        self.cosine_fused.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Figures of the task; token similarity on the first batches."""
        self._measure(batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Figures of the task; token similarity on the first batches."""
        self._measure(batch, batch_idx)

    def _measure(self, batch: Batch, batch_idx: int) -> None:
        with self._last_states() as last:
            output = self(without_labels(batch), output_hidden_states=batch_idx < LOOKS)
        self.metric.update(output, batch)
        if batch_idx < LOOKS:
            mask = token_mask(batch, last[-1])
            self.cosine_last.update(last[-1], mask)
            self.cosine_fused.update(output.fused_state, mask)

    def on_validation_epoch_end(self) -> None:
        """Logs the means."""
        self._log_figures("val")

    def on_test_epoch_end(self) -> None:
        """Likewise."""
        self._log_figures("test")

    def _log_figures(self, split: str) -> None:
        figures = self.metric.compute()
        metrics = {"cosine_last": self.cosine_last, "cosine_fused": self.cosine_fused}
        cosines = {name: metric.compute().cosine.mean for name, metric in metrics.items()}
        for name, value in {**figures, **cosines}.items():
            self.log(f"{split}/{name}", float(value), prog_bar=name == "score")
        trains = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if trains and "best_f1_thresh" in figures:
            self.null_threshold.fill_(figures["best_f1_thresh"])

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Row]:
        """Rows of a batch: see `bert_oversmoothing.module.rows`."""
        output = self(without_labels(batch))
        task, index = self.hparams["task"], batch["index"].tolist()
        data = self._data()
        names = getattr(data, "label_names", None) or ()
        if task == "qa":
            here = SquadMetric(self.metric.passages, self.metric.version)
            here.null_threshold = self.metric.null_threshold
            for metric in (here, self.metric):
                metric.update(output, batch)
            return answer_rows(here.predictions())
        assert output.logits is not None
        if task == "mlm":
            words = data.tokenizer.convert_ids_to_tokens
            return word_rows(output.logits, index, batch, data.tokenizer.mask_token_id, words)
        if task == "tokens":
            return token_rows(output.logits, index, batch["attention_mask"], names)
        rows = label_rows(output.logits, index, names, choices=task == "choice")
        if not self._texts:
            return rows
        return [{"index": i, **self._texts[i], **row} for i, row in zip(index, rows, strict=True)]

    def on_predict_epoch_end(self) -> None:
        """Writes answers.json, the best of all windows of a question, as SQuAD's program reads it.

        predictions.csv has a row for what each batch knows of a question.
        """
        if self.hparams["task"] != "qa":
            return
        with self.metric.sync_context():
            answers = {answer.id: answer.text for answer in self.metric.predictions()}
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir) / "predict"
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / "answers.json") as file:
                file.write(json.dumps(answers, ensure_ascii=False, indent=1).encode())
            rank_zero_info(f"wrote {folder / 'answers.json'}")

    # -- checkpoints ---------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what it takes to open the model again: configuration and tokenizer."""
        tokenizer = getattr(self._data(), "tokenizer", None)
        if self._kept is None and tokenizer is not None:
            self._kept = tokenizer_files(tokenizer)
        checkpoint[KEPT] = {"config": self.net.config.to_dict()}
        if self._kept is not None:
            checkpoint[KEPT]["tokenizer"] = self._kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the tokenizer, which is also that of the data; no other weights are read."""
        self._starts = False
        self._kept = checkpoint.get(KEPT, {}).get("tokenizer")
        data = self._data()
        if self._kept is not None and data is not None:
            data.tokenizer = tokenizer_from(self._kept)


def without_labels(batch: Batch) -> dict[str, Tensor]:
    """A batch of which a model computes no loss: labels of a test may be unknown, as -1."""
    return {name: x for name, x in batch.items() if name not in _LABELS}


def token_mask(batch: Batch, states: Tensor) -> Tensor:
    """True at the real tokens of (texts, tokens, width); choices are texts of their own."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return mask.flatten(0, -2).bool()
