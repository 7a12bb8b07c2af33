"""Contrastive pre-training and fine-tuning of the two towers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from filip_vl.data import PairBatch, positives
from filip_vl.hub import is_model_folder
from filip_vl.losses import CommType, Distributed, FilipLoss, Sides, TextBase
from filip_vl.model import CONFIGS, FilipConfig, FilipModel, FilipOutput, TokenBatch
from filip_vl.optim import (
    OptimizerName,
    clip_each_gradient,
    is_exempt,
    is_vector,
    make_optimizer,
    parameter_groups,
    peak_lr,
    warmup_cosine,
)
from filip_vl.retrieval import TokenSet, retrieval_metrics, retrieval_ranks
from filip_vl.skips import REMEDY, StopOnSkips, scaler_of
from filip_vl.tokenizers import from_json, other_layout
from tenfold.checkpoint import load_state, strip_prefix
from tenfold.contrastive.late import Impl
from tenfold.contrastive.selection import kept_count
from tenfold.distributed import gather, ranks
from tenfold.errors import UserError
from tenfold.training import LAST

_Found = tuple[TokenSet, TokenSet, Tensor, Tensor]
"""Tokens of images and of captions, and the image that each belongs to."""

log = logging.getLogger(__name__)

Decay = Literal["paper", "matrices"]

_FEW_TOKENS = 8  # a selection below which the paper's rule was seen to fail
_LOOK = 100  # steps between looks at whether tokens are finite
_PATIENCE = 1000  # steps with the temperature at its bound


class FilipModule(LightningModule):
    """FILIP, or CLIP where the model is a pooled one, on pairs of `FilipDataModule`.

    >>> module = FilipModule("filip_tiny", lr=2e-3)
    >>> Trainer(max_steps=600).fit(module, datamodule=FilipDataModule())
    """

    def __init__(
        self,
        model: str = "filip_tiny",
        fields: dict[str, Any] | None = None,
        *,
        token_fraction: float = 1.0,
        select_sides: Sides = "both",
        select_text_base: TextBase = "padded",
        distributed: Distributed = "rowblock",
        comm_dtype: CommType = "float16",
        label_smoothing: float = 0.0,
        skip_tol: float = 0.0,
        impl: Impl = "auto",
        optimizer: OptimizerName = "adamw",
        lr: float | None = None,
        base_lr: float | None = None,
        betas: Sequence[float] | None = None,
        eps: float | None = None,
        weight_decay: float = 0.05,
        decay: Decay = "paper",
        warmup: int = 50,
        start_lr: float = 0.0,
        clip_each: float | None = None,
        tower_batch: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Builds the towers; a vocabulary that is learned from captions fits them in `setup`.

        Args:
            model: a name of `filip_vl.CONFIGS` for random weights, a model folder, or a published
                checkpoint of CLIP or of DeCLIP's FILIP.
            fields: of the configuration that differ, such as embed_dim, image_size, include_cls.
            token_fraction: see `filip_vl.losses.FilipLoss`, as the seven that follow.
            select_sides: see there.
            select_text_base: see there.
            distributed: see there.
            comm_dtype: see there.
            label_smoothing: see there.
            skip_tol: see there.
            impl: see there.
            optimizer: "lamb" or "adamw".
            lr: the highest learning rate; 2e-3 if neither is given.
            base_lr: instead of `lr`, that of a batch of 512: it grows with the root of the batch.
            betas: of the optimiser, its own if left out.
            eps: likewise.
            weight_decay: of weights.
            decay: what decays: all but biases, norms, embeddings and the temperature ("paper"), or
                all matrices.
            warmup: steps in which the learning rate grows; a cosine to 0 follows.
            start_lr: rate before the growth, in highest ones.
            clip_each: largest norm of each tensor's gradient; no clipping if left out.
            tower_batch: pairs that are encoded at a time; the loss sees the whole batch all the
                same, and each part is encoded again in the backward pass.
            gradient_checkpointing: keep only the inputs of blocks for the backward pass.

        Raises:
            UserError: an unknown model, a file that cannot be read, or numbers out of range.
        """
        super().__init__()
        self.save_hyperparameters()
        if lr is not None and base_lr is not None:
            raise UserError("lr and base_lr are two ways to say the same", fix="give one of them")
        if tower_batch is not None and tower_batch < 1:
            raise UserError(f"tower_batch must be 1 or more, got {tower_batch}")
        try:
            self.model = _open(model, fields or {})
            self.loss = FilipLoss(
                token_fraction,
                select_sides,
                select_text_base,
                distributed,
                comm_dtype,
                label_smoothing,
                skip_tol,
                impl,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        self.model.gradient_checkpointing = gradient_checkpointing
        self.held = 0
        self._found: list[_Found] = []

    # -- what fits ---------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Fits the vocabulary to that of the data; tells of settings that will not do well.

        Raises:
            UserError: the data's ids or images are not the model's.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not self._may_be_restored(stage):
            self._take_of_data()
        self._check_sizes(data)
        if stage == "fit":
            self._warn_of_few_tokens()

    def _check_sizes(self, data: Any) -> None:
        context, size = self.model.config.context_length, self.model.config.image_size
        wrong = {}
        if getattr(data, "context_length", context) > context:
            what = f"captions of up to {data.context_length} ids do not fit a context of {context}"
            wrong[what] = f"--data.context_length {context}"
        if getattr(data, "image_size", size) != size:
            what = f"images of {data.image_size} pixels, and a model of {size}"
            wrong[what] = f"--data.image_size {size}"
        if wrong:
            raise UserError("; ".join(wrong), fix="give " + " ".join(wrong.values()))

    def _may_be_restored(self, stage: str) -> bool:
        """Whether a vocabulary need not be learned, as a checkpoint may bring one after setup."""
        data: Any = getattr(self.trainer, "datamodule", None)
        open_yet = self.model.tokenizer is None and getattr(data, "learns", False)
        # sharded strategies, which restore late, need the embedding in its size before
        return (
            open_yet and stage != "fit" and not self.trainer.strategy.restore_checkpoint_after_setup
        )

    def _take_of_data(self) -> None:
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            self._take(tokenizer)

    def _take(self, tokenizer: Any) -> None:
        config = self.model.config
        same = (tokenizer.vocab_size, tokenizer.end_id) == (config.vocab_size, config.end)
        if not same and self.hparams["model"] not in CONFIGS:
            what = f"the data have {tokenizer.vocab_size} ids, the model {config.vocab_size}"
            fix = f"give --data.tokenizer {self.hparams['model']}, or the merges of its vocabulary"
            if layout := other_layout(tokenizer, config.vocab_size):
                fix = f"{layout[1]}: --data.tokenizer_layout {layout[0]}"
            raise UserError(what, fix=fix)
        self.model.set_vocabulary(tokenizer)

    def _warn_of_few_tokens(self) -> None:
        fraction, config = self.hparams["token_fraction"], self.model.config
        if fraction == 1 or config.pooled:
            return
        kept = [kept_count(fraction, n) for n in (config.image_tokens, config.context_length)]
        if min(kept) < _FEW_TOKENS:
            what = "token_fraction %g keeps %d image tokens and %d words, too few for objects"
            log.warning(what, fraction, *kept)

    # -- training ----------------------------------------------------------------------------

    def forward(self, batch: PairBatch) -> FilipOutput:
        """Tokens of a batch's images and captions, and the logarithm of 1 / temperature."""
        size = self.hparams["tower_batch"]
        if size is None or not self.training or len(batch) <= size:
            return self.model(batch.image, batch.ids)
        image = _in_parts(self.model.encode_image, batch.image, size)
        text = _in_parts(self.model.encode_text, batch.ids, size)
        return FilipOutput(image, text, self.model.log_scale())

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """The contrastive loss of a batch.

        Raises:
            UserError: the loss is not finite, where no scaler skips the step.
            NotFiniteError: tokens that are not finite, looked at every 100 steps.
        """
        look = self.global_step % _LOOK == 0 and not self._scaled()
        self.model.check_finite = True if look else None  # which looks in evaluation
        image, text, log_scale = self(batch)
        masks = image.mask, self._nominal(text.mask)
        loss = self.loss(image.tokens, text.tokens, log_scale, *masks, self._targets(batch))
        if not (self._scaled() or loss.detach().isfinite()):
            raise UserError("the loss is not finite", fix=REMEDY)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/temperature", 1 / log_scale.detach().exp())
        return loss

    def _nominal(self, mask: Tensor) -> Tensor:
        """The words' mask as long as the context, of whose length a share of them is taken."""
        config = self.model.config
        return mask if config.pooled else F.pad(mask, (0, config.context_length - mask.shape[1]))

    def _targets(self, batch: PairBatch) -> Tensor | None:
        """Right pairs among the texts of all processes, where more than one may be right."""
        if batch.targets is None or ranks()[1] == 1 or self.hparams["distributed"] == "none":
            return batch.targets
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        whole = gather(batch.text_id), gather(batch.image_id)
        return positives(data.hparams["multi_positive"], batch.text_id, batch.image_id, *whole)

    def _scaled(self) -> bool:
        """Whether a scaler skips steps that are not finite, as in float16."""
        return scaler_of(self.trainer) is not None

    def configure_callbacks(self) -> list[Callback]:
        """Of a float16 run, what ends it where step after step is skipped."""
        return [StopOnSkips()] if self._scaled() else []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Shortens gradients, one by one."""
        if self.hparams["clip_each"] is not None:
            clip_each_gradient(self.model.parameters(), self.hparams["clip_each"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keeps the temperature in its bounds, and tells where it stays at one."""
        before = self.model.logit_scale.detach().clone()
        self.model.clamp_logit_scale()
        self.held = 0 if torch.equal(before, self.model.logit_scale.detach()) else self.held + 1
        if self.held == _PATIENCE:
            what = "the temperature was at its bound, %.4g, for %d steps"
            log.warning(what, 1 / self.model.scale().item(), _PATIENCE)

    def configure_optimizers(self) -> Any:
        """LAMB or AdamW with warm-up and cosine, step by step."""
        given = self.hparams
        exempt = is_exempt if given["decay"] == "paper" else is_vector
        groups = parameter_groups(self.model, given["weight_decay"], exempt=exempt)
        lr = 2e-3 if given["lr"] is None else given["lr"]
        if given["base_lr"] is not None:
            lr = peak_lr(given["base_lr"], self._total_batch())
        betas = None if given["betas"] is None else tuple(given["betas"])
        optimizer = make_optimizer(given["optimizer"], groups, lr, betas=betas, eps=given["eps"])
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("a cosine needs the end of the run", fix="give max_epochs or max_steps")
        steps = max(1, int(steps))
        warmup = min(given["warmup"], steps - 1)  # of a run that is shorter
        schedule = warmup_cosine(optimizer, steps=steps, warmup=warmup, start=given["start_lr"])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _total_batch(self) -> int:
        data: Any = getattr(self.trainer, "datamodule", None)
        size = getattr(data, "batch_size", None)
        if size is None:
            raise UserError("base_lr grows with the batch, whose size is not known", fix="give lr")
        return size * self.trainer.world_size * self.trainer.accumulate_grad_batches

    # -- evaluation --------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Takes the data's vocabulary where no checkpoint has brought one."""
        if self.model.tokenizer is None:
            self._take_of_data()

    on_test_start = on_predict_start = on_validation_start

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Gathers tokens; the retrieval is scored at the end."""
        self._encode(batch)

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """As in validation."""
        self._encode(batch)

    def on_validation_epoch_end(self) -> None:
        """Retrieval both ways among all images and captions of the split."""
        self._score("val")

    def on_test_epoch_end(self) -> None:
        """Likewise."""
        self._score("test")

    def _encode(self, batch: PairBatch) -> None:
        image, text = self.model.encode_image(batch.image), self.model.encode_text(batch.ids)
        groups = batch.image_id.cpu(), batch.caption_image_id.cpu()
        self._found.append((TokenSet([image]), TokenSet([text]), *groups))

    def _score(self, split: str) -> None:
        found, self._found = _of_all_ranks(self._found), []
        if not found:
            return
        images, texts = TokenSet([]), TokenSet([])
        for image, text, _, _ in found:
            images.rows += image.rows
            texts.rows += text.rows
        image_groups = torch.cat([groups for _, _, groups, _ in found])
        text_groups = torch.cat([groups for _, _, _, groups in found])
        ranks = retrieval_ranks(images, texts, text_groups, image_groups, device=self.device)
        self.log_dict({f"{split}/{name}": x for name, x in retrieval_metrics(ranks).items()})

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One row for each image: its place, first caption, how well they fit, or an error."""
        image, text = self.model.encode_image(batch.image), self.model.encode_text(batch.ids)
        v, t = image.normalized(), text.normalized()
        rows = []
        for row, first in enumerate(batch.first.tolist()):
            there = first < len(batch.rows) and int(batch.rows[first]) == row
            fits: dict[str, Any] = {"caption": "", "s_i2t": "", "s_t2i": ""}
            if there:
                words = t[first][text.mask[first]]
                s = v[row][image.mask[row]] @ words.T
                fits = {
                    "caption": batch.captions[first],
                    "s_i2t": float(s.amax(1).mean()),
                    "s_t2i": float(s.amax(0).mean()),
                }
            fits |= {"s_i2t": "", "s_t2i": ""} if batch.errors[row] else {}
            rows.append({"image": int(batch.index[row]), **fits, "error": batch.errors[row]})
        return rows

    # -- checkpoints -------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what it takes to open the model again: configuration and tokenizer."""
        kept: dict[str, Any] = {"config": self.model.config.to_dict()}
        if self.model.tokenizer is not None:
            kept["tokenizer"] = self.model.tokenizer.to_json()
        checkpoint["filip_vl"] = kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes room for the checkpoint's vocabulary."""
        kept = checkpoint.get("filip_vl", {}).get("tokenizer")
        if kept is not None:
            self.model.set_vocabulary(from_json(kept))


def _in_parts(encode: Callable[[Any], TokenBatch], inputs: Tensor, size: int) -> TokenBatch:
    """Tokens of a batch, whose graph is not kept but built again part by part."""

    def tokens(part: Tensor) -> tuple[Tensor, Tensor]:
        found = encode(part)
        return found.tokens, found.mask

    parts: list[Any] = [checkpoint(tokens, x, use_reentrant=False) for x in inputs.split(size)]
    tokens_of, masks = zip(*parts, strict=True)
    return TokenBatch(torch.cat(tokens_of), torch.cat(masks))


def _of_all_ranks(found: list[_Found]) -> list[_Found]:
    """What all processes gathered, rank by rank."""
    everything: list[Any] = [found] * ranks()[1]
    if len(everything) > 1:
        dist.all_gather_object(everything, found)
    return [part for rank in everything for part in rank]


def load_model(path: str | Path) -> FilipModel:
    """The model of a run, a checkpoint, a model folder or a published CLIP, in eval mode.

    Args:
        path: folder or file.

    Raises:
        UserError: there is nothing of the kind.
    """
    path = Path(path)
    if path.is_dir() and (path / LAST).is_file():
        path /= LAST
    if is_model_folder(path):
        return FilipModel.from_pretrained(path)
    if path.suffix != ".ckpt":
        return FilipModel.from_clip(path).eval()
    raw = load_state(path)
    if "filip_vl" not in raw:
        raise UserError("not a checkpoint of filip-vl", where=str(path))
    kept = raw["filip_vl"]
    model = FilipModel(FilipConfig.from_dict(kept["config"]))
    model.load_state_dict(strip_prefix(raw["state_dict"], "model."))
    if "tokenizer" in kept:
        model.tokenizer = from_json(kept["tokenizer"])
    return model.eval()


def _open(name: str, fields: dict[str, Any]) -> FilipModel:
    if name in CONFIGS:
        return FilipModel.from_config(name, **fields)
    path = Path(name)
    if not path.exists():
        fix = f"name a folder, a file or one of {', '.join(CONFIGS)}"
        raise UserError(f"no such model: {name}", where="--model.model", fix=fix)
    if path.name == LAST or (path / LAST).is_file():
        fix = "write its model folder first: filip-vl export RUN --format safetensors --out FOLDER"
        raise UserError(f"a run, no model folder: {name}", where="--model.model", fix=fix)
    if is_model_folder(path):
        if others := sorted(fields.keys() - {"image_size"}):
            what = f"a model folder has its fields already: {', '.join(others)}"
            raise UserError(what, where="--model.fields", fix="leave out all but image_size")
        return FilipModel.from_pretrained(path, image_size=fields.get("image_size")).train()
    return FilipModel.from_clip(path, **fields)
