"""The Lightning datamodule: generated, from released files, from Hugging Face datasets, or own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from bert_oversmoothing.data.buckets import BucketSampler
from bert_oversmoothing.data.features import ChoiceItems, Encoder, PadCollate, TextItems
from bert_oversmoothing.data.generated import TRAIN_ITEMS, Form, OddRunItems, label_names
from bert_oversmoothing.data.glue import TASKS
from bert_oversmoothing.data.masking import Masking
from bert_oversmoothing.data.records import Example, Question
from bert_oversmoothing.data.sources import GENERATED, SOURCES, TSV, task_of
from bert_oversmoothing.data.splits import Splits
from bert_oversmoothing.data.tokenizing import (
    WORD,
    frequent_words,
    odd_run_tokenizer,
    open_tokenizer,
    word_tokenizer,
)
from bert_oversmoothing.data.windows import WindowItems, Windows, cut_windows
from bert_oversmoothing.metrics import (
    ChoiceMetric,
    GlueMetric,
    MaskedWordsMetric,
    Passages,
    SquadMetric,
    TaskMetric,
)
from bert_oversmoothing.synthetic import CHOICES, VALIDATION_ITEMS, OddRun
from tenfold.data import BadItem, DataModule, EpochSampler, Loader
from tenfold.errors import UserError

log = logging.getLogger(__name__)

_LENGTHS = {"qa": 384}
_LENGTH = 128  # of the other tasks
_LEAST = 8  # tokens of an item


class OversmoothingData(DataModule):
    """Training, validation, test and prediction batches, as models of transformers take them."""

    def __init__(
        self,
        source: str = GENERATED,
        root: str | None = None,
        hub: str | None = None,
        form: Form = "qa",
        task: Literal["classification", "choice", "qa", "mlm"] | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        stride: int = 128,
        hidden_share: float = 0.15,
        null_threshold: float = 0.0,
        categories: int = 4,
        words: int = 4,
        context: int = 12,
        train_size: int | None = None,
        val_size: int | None = None,
        predict_root: str | None = None,
        bucket: int = 0,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        workers: int = 0,
        seed: int = 0,
        on_bad_item: Literal["raise", "skip"] = "raise",
        pin_memory: bool | None = None,
    ) -> None:
        """Nothing is read before `setup`.

        Args:
            source: "generated" (odd run); "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli",
                "rte", "wnli"; "swag"; "squad1", "squad2"; "tsv" (`sentence TAB label` without a
                header); or "text" (sentences whose hidden words are to be found).
            root: folder of the released files, or of what Hugging Face datasets saved, as a
                DatasetDict or as Parquet files.
            hub: name of the data on the Hugging Face hub, such as "nyu-mll/glue", in the place of
                `root`.
            form: of generated items: "qa", "parity" of the run's length, category of the word
                "after" the run, or "choice".
            task: what is asked; the source's own if left out. "mlm" hides words of the texts of
                GLUE and "tsv" too.
            tokenizer: folder or hub id; "word" learns the words that come twice in the training
                texts. Generated items have their own.
            max_length: tokens of the longest item; 384 for questions, else 128.
            stride: tokens that two windows of one context share.
            hidden_share: of the tokens, with task "mlm".
            null_threshold: of SQuAD 2.0; how much more than the best answer "no answer" must score.
            categories: of generated words.
            words: of each category.
            context: words of a generated context.
            train_size: learn from so many records, drawn by `seed`; generated, the items of an
                epoch (4,800).
            val_size: validate on so many, always the same; generated, 384.
            predict_root: file of one's own to predict: texts as .txt, .tsv or .jsonl, choices as
                .csv or .jsonl, questions as .json or .jsonl.
            bucket: so many training batches are sorted by length together, which saves padding; 0
                for none.
            batch_size: training items in a step, on each rank.
            eval_batch_size: in a batch elsewhere.
            workers: loading processes.
            seed: of order, hidden words, drawn records and generated training items.
            on_bad_item: "raise" stops at a record that cannot be used, "skip" leaves it out and
                counts it.
            pin_memory: page-locked batches; if left out, when training runs on CUDA.

        Raises:
            UserError: an option that does not exist, or options that do not go together.
        """
        super().__init__(batch_size, eval_batch_size, workers, seed, on_bad_item, pin_memory)
        ignored = [] if tokenizer is None or isinstance(tokenizer, str) else ["tokenizer"]
        self.save_hyperparameters(ignore=ignored, logger=False)
        self.source = source
        self._check()
        self.odd_run = OddRun(categories, words, context)
        self.task: str = task or task_of(source, form)
        """"classification", "choice", "qa" or "mlm"."""
        self.max_length = max_length or _LENGTHS.get(self.task, _LENGTH)
        self._named_tokenizer = tokenizer
        self._tokenizer = None if isinstance(tokenizer, str) else tokenizer
        self.splits = Splits(source, self.task, self.hparams, seed, on_bad_item == "skip")
        """The records before they are tokenised."""
        self._windows: dict[str, Windows] = {}

    def _check(self) -> None:
        given = self.hparams
        if self.source not in SOURCES:
            raise UserError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        own = task_of(self.source, given["form"])
        texts = self.source in (*TASKS, TSV)
        if given["task"] not in (None, own) and not (texts and given["task"] == "mlm"):
            what = f"task {given['task']!r} is none of source {self.source}: it is {own}"
            raise UserError(what, fix="leave it out; mlm hides words of the texts of GLUE and tsv")
        least = {"max_length": _LEAST, "stride": 0, "bucket": 0, "train_size": 1, "val_size": 1}
        least |= {"categories": 2, "words": 1, "context": 4}
        for name, smallest in least.items():
            if given[name] is not None and given[name] < smallest:
                raise UserError(f"{name} must be at least {smallest}, got {given[name]}")

    # -- what there is -------------------------------------------------------------------------

    @property
    def regression(self) -> bool:
        """Whether labels are scores."""
        return self.source == "stsb" and self.task != "mlm"

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, by their numbers; none where there are no classes.

        Raises:
            UserError: plain texts without a file.
        """
        if self.task != "classification":
            return ()
        if self.source == GENERATED:
            return label_names(self.odd_run, self.hparams["form"])
        if self.source in TASKS:
            return TASKS[self.source].names
        return self.splits.labels

    @property
    def num_labels(self) -> int:
        """Outputs of a head: the classes, 1 for a score or a choice, 2 for the ends of an answer.

        Of hidden words it says nothing: 2, as configurations of transformers have it.
        """
        if self.regression or self.task == "choice":
            return 1
        return len(self.label_names) or 2

    @property
    def tokenizer(self) -> Any:
        """Read, or learned, when it is first asked for; None if none is named.

        It may be set, as by a module that brings its own.
        """
        if self._tokenizer is None and self.source == GENERATED:
            self._tokenizer = odd_run_tokenizer(self.odd_run)
        elif self._tokenizer is None and self._named_tokenizer == WORD:
            self._tokenizer = word_tokenizer(frequent_words(self._texts()))
        elif self._tokenizer is None and self._named_tokenizer is not None:
            self._tokenizer = open_tokenizer(self._named_tokenizer)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer, self._windows = tokenizer, {}

    def name_tokenizer(self, tokenizer: Any) -> None:
        """Gives a tokenizer where none is named.

        Args:
            tokenizer: itself, or folder or hub id, read when it is first asked for.
        """
        if self._named_tokenizer is None and self.source != GENERATED:
            self._named_tokenizer = tokenizer
            self._tokenizer = self._tokenizer if isinstance(tokenizer, str) else tokenizer

    def _texts(self) -> Iterable[str]:
        """What words are learned from."""
        for record in self.splits.drawn("train"):
            if not isinstance(record, Example):
                raise UserError("words are learned from texts alone", fix="give --data.tokenizer")
            yield record.text
            yield record.pair or ""

    def _needed_tokenizer(self) -> Any:
        tokenizer = self.tokenizer
        if tokenizer is None:
            fix = "give --data.tokenizer a folder or hub id; `word` learns one"
            raise UserError(f"source {self.source} needs a tokenizer", fix=fix)
        most = tokenizer.model_max_length
        if self.max_length > most:
            raise UserError(f"max_length {self.max_length} is more than the {most} of the model")
        return tokenizer

    def split_of(self, stage: str) -> str:
        """The split that a stage reads.

        A test split without labels is not tested but predicted; the validation split serves.

        Args:
            stage: "train", "val", "test" or "predict".
        """
        if stage == "predict" and self.hparams["predict_root"] is not None:
            return "predict"
        if stage in ("train", "val") or self.source == GENERATED:
            return "test" if stage == "predict" else stage
        there = self.splits.records("test") is not None
        return "test" if there and (stage == "predict" or self.splits.labelled("test")) else "val"

    def setup(self, stage: str | None = None) -> None:
        """Reads the records of what a stage needs; they are tokenised when they are wanted.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            UserError: the source is missing, damaged, or not what it should be.
        """
        own = self.hparams["predict_root"] is not None
        if self.source == GENERATED and not (stage == "predict" and own):
            return
        if stage in (None, "fit"):
            self.splits.drawn("train")
        if stage in (None, "fit", "validate"):
            self.splits.validated()
        if stage in ("test", "predict"):
            split = self.split_of(stage)
            if split == "val":
                log.info("no test split to %s: that of validation serves", stage)
            self.splits.drawn(split)

    # -- items ---------------------------------------------------------------------------------

    def train_dataset(self) -> Any:
        """Items to learn from."""
        return self._items("train")

    def val_dataset(self) -> Any:
        """Items to validate on, None if there are none."""
        return self._evaluated("val")

    def test_dataset(self) -> Any:
        """Labelled test items; the validation items if there are no others."""
        return self._evaluated("test")

    def predict_dataset(self) -> Any:
        """Items of one's own file; without one those of the test, or of the validation."""
        return self._evaluated("predict")

    def _evaluated(self, stage: str) -> Any:
        split = self.split_of(stage)
        if self.source != GENERATED and split == "val" and self.splits.records("val") is None:
            return None
        return self._items(split)

    def _items(self, split: str) -> Any:
        given = self.hparams
        if self.source == GENERATED and split != "predict":
            sizes = {"train": given["train_size"] or TRAIN_ITEMS}
            size = sizes.get(split, given["val_size"] or VALIDATION_ITEMS)
            return OddRunItems(self.odd_run, given["form"], split, size, self.seed)
        if self.task == "qa":
            return WindowItems(self._cut(split))
        encoder = Encoder(self._needed_tokenizer(), self.max_length)
        records = self.splits.drawn(split)
        if self.task == "choice":
            return ChoiceItems(records, encoder)
        masking = None
        if self.task == "mlm":
            masking = Masking(self.tokenizer, self.seed, given["hidden_share"])
        return TextItems(records, encoder, self.regression, masking)

    def _cut(self, split: str) -> Windows:
        if split not in self._windows:
            questions: Sequence[Question] = self.splits.drawn(split)
            lengths = self.max_length, self.hparams["stride"]
            tokenizer, kept = self._needed_tokenizer(), split != "train"
            self._windows[split] = windows = cut_windows(questions, tokenizer, *lengths, kept)
            self.splits.settle(split, windows.broken)
            if not windows.questions:
                raise UserError(f"no question of {split} can be used")
        return self._windows[split]

    def _loader(
        self, split: str, dataset: Any, batch_size: int, sampler: EpochSampler | None = None
    ) -> Loader:
        generated, bucket = isinstance(dataset, OddRunItems), self.hparams["bucket"]
        if not generated:
            self.collate = PadCollate(self._needed_tokenizer())
        if sampler is not None and bucket and not generated:
            ranks = {"replicas": sampler.num_replicas, "rank": sampler.rank, "seed": self.seed}
            sampler = BucketSampler(dataset.lengths(), batch_size=batch_size, pool=bucket, **ranks)
        loader = super()._loader(split, dataset, batch_size, sampler)
        if sampler is not None:
            loader.grid = {"bucket": bucket}
        name = self.split_of(split)
        windows = self._windows.get(name)
        known = self.splits.settle(name, windows.broken if windows else {})
        loader.items.bad.size += len(known.reasons)
        loader.items.bad.add([BadItem(n, why, "") for n, why in known.reasons.items()])
        return loader

    # -- figures -------------------------------------------------------------------------------

    def metric(self, split: str = "val") -> Any:
        """A fresh metric, with update(outputs, batch) and compute(), for a split.

        Args:
            split: "train", "val", "test" or "predict".

        Raises:
            UserError: there is no such split.
        """
        name = self.split_of(split)
        if self.task == "qa":
            version = "2.0" if self.source == "squad2" else "1.1"
            threshold = self.hparams["null_threshold"]
            return SquadMetric(self.answers(split), version, null_threshold=threshold)
        if self.task == "mlm":
            return MaskedWordsMetric(len(self._needed_tokenizer()))
        if self.task == "choice":
            return ChoiceMetric(CHOICES)
        if self.source not in TASKS:
            return TaskMetric(("accuracy",), self.num_labels)
        mismatched = None
        if self.source == "mnli" and name in ("val", "test"):
            mismatched = torch.tensor([each.mismatched for each in self.splits.drawn(name)])
        return GlueMetric(self.source, mismatched)

    def answers(self, split: str = "val") -> Passages:
        """Questions, contexts, accepted answers and windows of a split, numbered as `index` is.

        Args:
            split: "val", "test" or "predict"; of "train" there are no offsets.

        Raises:
            UserError: the task has no questions.
        """
        if self.task != "qa":
            raise UserError(f"source {self.source} asks no questions")
        name = self.split_of(split)
        if self.source == GENERATED and name != "predict":
            return self._items(name).passages()
        return self._cut(name).passages()

    def texts(self, split: str = "predict") -> list[dict[str, str]]:
        """What the items of a split are named by, as `index` is: see `Splits.texts`."""
        return self.splits.texts(self.split_of(split))

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A vocabulary that was learned, and classes that were found: they belong to weights."""
        state: dict[str, Any] = {}
        if self._named_tokenizer == WORD:
            ids: dict[str, int] = self.tokenizer.get_vocab()
            state["words"] = sorted(ids, key=ids.__getitem__)
        if self.source == TSV and self.task == "classification":
            state["labels"] = list(self.label_names)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what a checkpoint knows in the place of what would be learned.

        Raises:
            UserError: the classes of these data are others.
        """
        if self._named_tokenizer == WORD and "words" in state_dict:
            self.tokenizer = word_tokenizer(state_dict["words"])
        if "labels" in state_dict:
            self.splits.expect_labels(state_dict["labels"])
