"""The Lightning datamodule: pairs of image and caption, generated or from any format on disk."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from filip_vl.data.bad_items import PairBadItems
from filip_vl.data.batches import (
    DrawCaption,
    MultiPositive,
    PairBatch,
    PairCollate,
    PairItems,
    PredictItems,
    all_captions,
)
from filip_vl.data.memory import pairs_in_memory
from filip_vl.data.pairs import Pairs, check_worded, drop_blank, merge_images, unroll
from filip_vl.data.shapes import CONTEXT_LENGTH, shape_pairs, shape_vocabulary
from filip_vl.data.shards import count_samples
from filip_vl.data.sources import (
    FILE_SOURCES,
    Location,
    SplitName,
    find_files,
    read_any,
    read_split,
)
from filip_vl.data.streaming import SAMPLE_BUFFER, ShardStream
from filip_vl.data.tokenizing import WORD, open_tokenizer
from filip_vl.data.transforms import CROP_SCALE, Augmentation, eval_transform, train_transform
from filip_vl.synthetic import SIZE, TEST_PAIRS, TEST_SEED, TRAIN_PAIRS, TRAIN_SEED
from filip_vl.tokenizers import Tokenizer, from_json
from filip_vl.tokenizers.bpe import Layout
from tenfold.data import BadItem, DataModule, EpochSampler, Loader
from tenfold.errors import UserError

log = logging.getLogger(__name__)

SHAPES, GENERATED, MEMORY = "shapes", "generated", "memory"
SOURCES = (SHAPES, *FILE_SOURCES, MEMORY)

CaptionUse = Literal["draw", "all"]
"""Whether an epoch meets one caption of every image, or every caption once."""

VAL_SEED = TEST_SEED + 1
"""Of the generated validation scenes."""

_FEW = 8  # pairs in a batch, below which the contrastive loss learns little
_LOOKED_FOR = 10  # images that are looked for before training begins


class FilipDataModule(DataModule):
    """Training, validation, test and prediction pairs; batches are `PairBatch`."""

    def __init__(
        self,
        source: str = SHAPES,
        root: str | None = None,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        separator: str | None = None,
        tokenizer: str | Tokenizer = WORD,
        tokenizer_layout: Layout = "clip",
        max_vocab: int = 8192,
        context_length: int | None = None,
        image_size: int | None = None,
        augment: Augmentation | None = None,
        crop_scale: Sequence[float] = CROP_SCALE,
        captions: CaptionUse = "draw",
        multi_positive: MultiPositive = "none",
        strict: bool = False,
        train_size: int | None = None,
        val_size: int = TEST_PAIRS,
        test_size: int = TEST_PAIRS,
        shuffle_buffer: int = SAMPLE_BUFFER[0],
        max_pixels: int | None = None,
        max_bad_fraction: float = 0.01,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        workers: int = 0,
        seed: int = 0,
        on_bad_item: Literal["raise", "skip"] = "skip",
        pin_memory: bool | None = None,
    ) -> None:
        """Nothing is read before `setup`.

        Args:
            source: "shapes" (generated; also called "generated"), "csv" (any table), "jsonl",
                "karpathy", "webdataset", "parquet" or "imagefolder"; `from_pairs` makes "memory".
            root: folder that names of files and images start from. A missing one prints what is
                expected in it.
            train: file, files (wild cards; for shards brace ranges too) or folder of the training
                pairs, from the root or else the current folder; the usual names of the format in
                the root if left out.
            val: likewise, to validate; the test pairs serve if there are none.
            test: likewise, to test; the validation pairs serve if there are none.
            predict: folder of images, or a file of any format, for predict.
            image_column: of tables, JSON lines and Parquet files; each format's usual name if left
                out (filepath, filename, image).
            caption_column: likewise (title, caption, caption).
            separator: of tables; a tab, or a comma where the header has no tab, if left out.
            tokenizer: "word" (learned from the training captions), the path of CLIP's merges, of
                a Hugging Face or model folder, or a tokenizer.
            tokenizer_layout: "declip" for the ids of DeCLIP's checkpoints.
            max_vocab: ids that "word" may have.
            context_length: ids of the longest caption, start and end included; longer ones are cut
                and counted. 77 if left out, 24 for shapes.
            image_size: side of the images; 224 if left out, 48 for shapes.
            augment: "paper", "mindformers", "crop" or "none"; "paper" if left out, "none" for
                shapes, whose captions name colours.
            crop_scale: smallest and largest share of the area that a training crop keeps.
            captions: "draw" meets every image once an epoch with one of its captions, each as
                likely as the others; "all" meets every caption once.
            multi_positive: pairs of a training batch that count as right besides an image's own:
                "text" with the same caption, "image" of the same image, "both", or "none".
            strict: refuse an empty caption in training instead of dropping it.
            train_size: generated training scenes (4,000 if left out); of shards the samples in an
                epoch, which are counted if left out.
            val_size: generated validation scenes.
            test_size: generated test scenes.
            shuffle_buffer: samples of shards that are mixed in the memory of a loading process.
            max_pixels: larger images are unusable; PIL's limit of 179 million if left out.
            max_bad_fraction: share of a split that may be unusable before the run stops.
            batch_size: training pairs in a step, on each rank.
            eval_batch_size: images in a batch elsewhere.
            workers: loading processes; generated pairs are fastest with 0.
            seed: of order, augmentation and drawn captions; set s of shapes trains with s.
            on_bad_item: "skip" counts unreadable images and reports them, "raise" stops.
            pin_memory: page-locked batches; if left out, when training runs on CUDA.

        Raises:
            UserError: an option that does not exist, or options that do not go together.
        """
        super().__init__(batch_size, eval_batch_size, workers, seed, on_bad_item, pin_memory)
        ignored = [] if isinstance(tokenizer, str) else ["tokenizer"]
        self.save_hyperparameters(ignore=ignored, logger=False)
        self.source = SHAPES if source == GENERATED else source
        shapes = self.source == SHAPES
        self.image_size = image_size or (SIZE if shapes else 224)
        self.context_length = context_length or (CONTEXT_LENGTH if shapes else 77)
        augment = augment or ("none" if shapes else "paper")
        self.train_transform = train_transform(self.image_size, augment, crop_scale)
        self.eval_transform = eval_transform(self.image_size)
        self.truncated = 0
        """Captions so far that were longer than `context_length`."""
        self.duplicates = 0
        """Captions so far that were in their training batch before."""
        self._named_tokenizer = tokenizer
        self._tokenizer = None if isinstance(tokenizer, str) else tokenizer
        self._pairs: dict[str, Pairs | None] = {}
        self._check()

    @classmethod
    def from_pairs(
        cls,
        train: Sequence[tuple[Any, str | Sequence[str]]],
        val: Sequence[tuple[Any, str | Sequence[str]]] | None = None,
        test: Sequence[tuple[Any, str | Sequence[str]]] | None = None,
        **options: Any,
    ) -> "FilipDataModule":
        """Pairs that are in memory.

        >>> data = FilipDataModule.from_pairs([(picture, "a red ring")], image_size=224)

        Args:
            train: (image, caption or captions), see `pairs_in_memory`.
            val: likewise.
            test: likewise.
            **options: of the class, besides those of files.
        """
        data = cls(MEMORY, **options)
        for split, pairs in (("train", train), ("val", val), ("test", test)):
            name = f"pair of {split}"
            data._pairs[split] = None if pairs is None else pairs_in_memory(pairs, name)
        return data

    def _check(self) -> None:
        given = self.hparams
        if self.source not in SOURCES:
            raise UserError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        if given["captions"] not in get_args(CaptionUse):
            raise UserError(f"captions must be draw or all, got {given['captions']!r}")
        if given["captions"] == "all" and self.source == "webdataset":
            what = "shards are read in one go, which meets one caption of every sample"
            raise UserError(what, fix="use --data.captions draw")
        if given["train_size"] is not None and self.source not in (SHAPES, "webdataset"):
            raise UserError("train_size is for generated pairs and shards alone")
        if not 0 <= given["max_bad_fraction"] <= 1:
            raise UserError(f"max_bad_fraction {given['max_bad_fraction']} is no share, 0 to 1")
        sizes = {name: given[name] for name in ("train_size", "val_size", "test_size")}
        sizes |= {"image_size": self.image_size, "shuffle_buffer": given["shuffle_buffer"]}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise UserError(f"{name} must be at least 1, got {size}")
        if self.context_length < 2:
            raise UserError(f"context_length {self.context_length} has no room for start and end")

    @property
    def _only_predict(self) -> bool:
        return self.hparams["predict"] is not None

    # -- what there is -------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the captions; learned, or read, when it is first asked for."""
        if self._tokenizer is None:
            assert isinstance(self._named_tokenizer, str)
            layout, size = self.hparams["tokenizer_layout"], self.hparams["max_vocab"]
            self._tokenizer = open_tokenizer(self._named_tokenizer, self._texts, layout, size)
        return self._tokenizer

    @property
    def learns(self) -> bool:
        """Whether the tokenizer is still to be learned from the training captions."""
        return self._tokenizer is None and self._named_tokenizer == WORD

    def _texts(self) -> Iterable[str]:
        """What a vocabulary is learned from."""
        if self.source == SHAPES:
            return shape_vocabulary()
        pairs = self._wanted("train")
        check_worded(pairs, "train")
        return pairs.texts()

    def pairs(self, split: str) -> Pairs | None:
        """The pairs of "train", "val", "test" or "predict" as they are; None if there are none.

        Raises:
            UserError: they are missing or damaged.
        """
        if split not in self._pairs:
            self._pairs[split] = self._read(split)
        return self._pairs[split]

    def _read(self, split: str) -> Pairs | None:
        given = self.hparams
        if split == "predict":
            return None if given["predict"] is None else read_any(given["predict"])
        if self.source == SHAPES:
            seed, size = {
                "train": (TRAIN_SEED + self.seed, given["train_size"] or TRAIN_PAIRS),
                "val": (VAL_SEED, given["val_size"]),
                "test": (TEST_SEED, given["test_size"]),
            }[split]
            return shape_pairs(seed, size)
        if self.source == MEMORY:
            return None
        name: SplitName = next(each for each in get_args(SplitName) if each == split)
        pairs = read_split(self._location, name, given[split])
        if pairs is not None:
            _look_for(pairs)
        return pairs

    @property
    def _location(self) -> Location:
        given = self.hparams
        root = None if given["root"] is None else Path(given["root"])
        columns = given["image_column"], given["caption_column"]
        return Location(self.source, root, *columns, given["separator"])

    def _wanted(self, split: str) -> Pairs:
        pairs = self.pairs(split)
        if pairs is None:
            raise UserError(f"this data has no {split} split")
        return pairs

    def setup(self, stage: str | None = None) -> None:
        """Reads the lists of what a stage needs; images are read, or drawn, when they are wanted.

        Args:
            stage: fit, validate, test or predict.

        Raises:
            UserError: the source is missing, damaged, or not what it should be.
        """
        given = self.hparams
        on_disk = self.source in FILE_SOURCES
        if on_disk and given["root"] is None and given["train"] is None and not self._only_predict:
            raise UserError(f"source {self.source} needs a folder", fix="give --data.root DIR")
        if stage in (None, "fit") and self.source != "webdataset":
            self._wanted("train")
        if stage in (None, "fit", "validate"):
            self._first("val", "test")
        if stage == "test":
            self._first("test", "val")
        if stage == "predict" and not self._only_predict:
            log.info("no --data.predict: the test images are predicted")
            self._first("test", "val")
        elif stage == "predict":
            self._wanted("predict")

    def _first(self, *splits: str) -> Pairs | None:
        """The first of some splits that is there."""
        return next((pairs for split in splits if (pairs := self.pairs(split)) is not None), None)

    # -- items ---------------------------------------------------------------------------------

    def train_dataset(self) -> Any:
        """Augmented training pairs; of shards a stream."""
        given = self.hparams
        if self.source == "webdataset":
            return self._stream()
        pairs = drop_blank(self._wanted("train"), "train", given["strict"])
        if given["captions"] == "all":
            pairs = unroll(merge_images(pairs))
        return self._train_items(pairs)

    def _train_items(self, pairs: Pairs) -> PairItems:
        draw = DrawCaption(self.seed)
        return PairItems(pairs, self.train_transform, draw, self.seed, self.hparams["max_pixels"])

    def _stream(self) -> ShardStream:
        given, trainer = self.hparams, self.trainer
        shards = find_files(self._location, "train", given["train"])
        sizes = None if given["train_size"] else count_samples(shards)
        most = given["shuffle_buffer"]
        return ShardStream(
            shards,
            sizes,
            given["train_size"] or sum(sizes or ()),
            self._train_items(Pairs([], [], [])).item,
            seed=self.seed,
            batch_size=self.batch_size,
            streams=max(1, self.workers),
            ranks=trainer.world_size if trainer else 1,
            buffer=(most, min(most, SAMPLE_BUFFER[1])),
        )

    def _still(self, pairs: Pairs | None, kind: type[PairItems] = PairItems) -> PairItems | None:
        """Items of evaluation: every image once, with all its captions."""
        if pairs is None:
            return None
        most = self.hparams["max_pixels"]
        return kind(
            merge_images(pairs), self.eval_transform, all_captions, self.seed, max_pixels=most
        )

    def val_dataset(self) -> PairItems | None:
        """Validation images, each with all its captions; the test images if there are no others."""
        return self._still(self._first("val", "test"))

    def test_dataset(self) -> PairItems | None:
        """Test images, each with all its captions; the validation images if there are no others."""
        return self._still(self._first("test", "val"))

    def predict_dataset(self) -> PairItems | None:
        """Images to predict, with what captions they have; the test images if none are named.

        One that cannot be used keeps its place, see `PredictItems`, unless it stops the run.
        """
        pairs = self.pairs("predict") if self._only_predict else self._first("test", "val")
        return self._still(pairs, PredictItems if self.on_bad_item == "skip" else PairItems)

    def train_dataloader(self) -> Loader:
        """Shuffled, see `tenfold.data.DataModule`; warns where a batch is too small to contrast."""
        loader = super().train_dataloader()
        assert isinstance(loader.sampler, EpochSampler)
        size = min(self.batch_size, len(loader.sampler))
        if size < _FEW:
            log.warning("%d pairs in a batch contrast little: use %d or more", size, _FEW)
        return loader

    def _loader(
        self, split: str, dataset: Any, batch_size: int, sampler: EpochSampler | None = None
    ) -> Loader:
        given, training = self.hparams, sampler is not None
        positive = given["multi_positive"] if training else "none"
        self.collate = PairCollate(self.tokenizer, self.context_length, positive)
        streamed = isinstance(dataset, ShardStream)
        if streamed and sampler is not None:  # the stream shuffles
            ranks, rank = sampler.num_replicas, sampler.rank
            sampler = EpochSampler(len(dataset), replicas=ranks, rank=rank, shuffle=False)
        loader = super()._loader(split, dataset, batch_size, sampler)
        if streamed:
            loader.grid = {"streams": dataset.streams}
        most = 1.0 if split == "predict" else given["max_bad_fraction"]
        self.bad_items[split] = loader.items.bad = PairBadItems(
            split, len(dataset), skip=loader.items.bad.skip, strict=given["strict"], most=most
        )
        return loader

    # -- what happened -------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Counts captions that were cut, and in training those that are there twice."""
        if isinstance(batch, PairBatch):
            if any(batch.errors):
                told = zip(batch.index.tolist(), batch.errors, strict=True)
                self.bad_items["predict"].add([BadItem(n, why, "") for n, why in told if why])
            if batch.truncated and not self.truncated:
                log.warning(
                    "captions longer than %d tokens are cut; their number is told at the end",
                    self.context_length,
                )
            self.truncated += batch.truncated
            if self.trainer is not None and self.trainer.training:
                self.duplicates += batch.duplicates
        return batch

    def teardown(self, stage: str) -> None:
        """Reports what was skipped, cut, or there twice in a batch."""
        super().teardown(stage)
        if self.truncated:
            log.warning("%d captions were cut at %d tokens", self.truncated, self.context_length)
        if self.duplicates:
            fix = "" if self.hparams["multi_positive"] != "none" else "; see multi_positive"
            log.warning("%d captions were in their batch twice%s", self.duplicates, fix)

    def state_dict(self) -> dict[str, Any]:
        """The tokenizer: a vocabulary that was learned belongs to the weights."""
        return {"tokenizer": self.tokenizer.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the tokenizer of the checkpoint in the place of one that would be learned."""
        if self._named_tokenizer == WORD:
            self._tokenizer = from_json(state_dict["tokenizer"])


def _look_for(pairs: Pairs) -> None:
    """Looks whether the images are where their list says, before a run begins without any.

    Raises:
        UserError: none of the first is there.
    """
    first = [pairs.images[n] for n in range(min(_LOOKED_FOR, len(pairs)))]
    if first and all(isinstance(image, str) and not os.path.exists(image) for image in first):
        fix = "give the folder that their names start from as --data.root"
        raise UserError("the images are not where their list says", where=str(first[0]), fix=fix)
