"""The Lightning datamodule for images to classify: generated, from disk, or without labels."""

import zlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import default_collate

from ickd.data.contents import content_hash
from ickd.data.offenders import Offenders
from ickd.data.pixels import Batch, PixelItems, Pixels
from ickd.data.transforms import (
    eval_transform,
    padding,
    pixel_transform,
    statistics,
    train_transform,
)
from ickd.synthetic import GRATINGS_SIZE, GratingClasses, bound_gratings, grating_class_names
from tenfold.data import DataModule, EpochSampler, Loader, Subset, TensorSubset
from tenfold.errors import UserError
from tenfold.images import (
    SOURCES,
    ImageItems,
    Split,
    Splits,
    image_files,
    read_image,
    read_parquet,
)

GENERATED, UNLABELLED = "generated", "images"
CIFAR = ("cifar10", "cifar100")

_SEEDS = {"student": 1, "teacher": 2, "val": 3, "test": 4}
"""Of the generated images: no set shares one with another."""

_TEACHER_SIZES = {"fine16": 4000}
_TEACHER_SIZE = 5000  # of the other tasks
_SMALLEST = 8  # pixels a side
_UNCROPPED = 64  # pixels a side up to which evaluation takes the whole image
_DECODED_AT_ONCE = 256


def collate_items(items: list[Any]) -> Batch:
    """Stacks items."""
    return Batch(*default_collate([tuple(item) for item in items]))


def balanced(order: Sequence[int], labels: Sequence[int], count: int) -> list[int]:
    """The first `count` rows if every class has its turn before any comes again.

    A smaller count gives a part of what a larger one gives.

    Args:
        order: rows, shuffled.
        labels: class of every row.
        count: rows to take.
    """
    seen: Counter[int] = Counter()
    turn: dict[int, int] = {}
    for row in order:
        turn[row] = seen[labels[row]]
        seen[labels[row]] += 1
    return sorted(order, key=turn.__getitem__)[:count]


class ImageData(DataModule):
    """Training, validation, test and prediction images; pixels are in 0..1 and not normalised."""

    collate = staticmethod(collate_items)

    def __init__(
        self,
        source: str = GENERATED,
        root: str | None = None,
        image_size: int | None = None,
        augment: str = "none",
        crop_pct: float = 0.875,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: GratingClasses = "coarse3",
        part: Literal["student", "teacher"] = "student",
        train_size: int = 800,
        teacher_size: int | None = None,
        val_size: int = 500,
        test_size: int = 2000,
        subset: int | None = None,
        val_split: float = 0.0,
        eval_source: str | None = None,
        eval_root: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        in_memory: bool = False,
        predict_root: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = 256,
        workers: int = 0,
        seed: int = 0,
        on_bad_item: Literal["raise", "skip"] = "raise",
    ) -> None:
        """Nothing is read before `setup`.

        Args:
            source: "generated" (bound-gratings), "imagenet", "imagefolder", "cifar10", "cifar100",
                "parquet", or "images": all that lie below `root`, without labels.
            root: folder of a source on disk; predict alone needs none.
            image_size: side in pixels; 16 for generated images, 32 for CIFAR, else 224.
            augment: of training images: "none", "cifar" (shifted crop and flip) or "imagenet"
                (random resized crop and flip); generated images take none.
            crop_pct: share of the resized image's side that evaluation's centre crop keeps; images
                of up to 64 pixels are not cropped.
            mean: of each colour of the source, to compare with what networks expect: nothing is
                normalised here. CIFAR's and the generator's own, else ImageNet's.
            std: likewise.
            classes: generated task: "coarse3", "coarse2" (24 types that share a few labels) or
                "fine16" (16 types).
            part: whose generated training images, the "student"'s or the "teacher"'s; no image is
                in both.
            train_size: generated training images of the student.
            teacher_size: generated training images of the teacher; 5,000, or 4,000 for fine16.
            val_size: generated validation images.
            test_size: generated test images.
            subset: learn from so many training images, as many of each class as can be; drawn by
                `seed`, and a smaller subset is a part of a larger one.
            val_split: share of the training images kept for validation, unless the source has both
                a validation and a test split; without it the test images serve.
            eval_source: where validation and test images come from, if not from `source`; images
                without labels have none of their own.
            eval_root: folder of `eval_source`.
            image_column: of parquet files.
            label_column: of parquet files.
            in_memory: decode images once and keep them, 3 bytes a pixel: many times faster where
                images are small. CIFAR's own files are always kept. Not with augment imagenet.
            predict_root: folder of images for predict.
            batch_size: training images in a step, on each rank.
            eval_batch_size: images in a batch elsewhere.
            workers: loading processes; images in memory are fastest with 0.
            seed: of order, augmentation, subset and splits; generated images are the same for all.
            on_bad_item: "raise", which names up to ten unreadable images, or "skip" and count them.

        Raises:
            UserError: an option that does not exist, or options that do not go together.
        """
        super().__init__(batch_size, eval_batch_size, workers, seed, on_bad_item)
        self.save_hyperparameters(logger=False)  # the module's own seed may be another
        self.source, self.augment = source, augment
        self.class_names: tuple[str, ...] = ()
        self.predict_files: list[Path] = []
        self._splits: Splits = {}
        self._pixels: dict[str, Pixels] = {}
        usual_size = GRATINGS_SIZE if source == GENERATED else 32 if source in CIFAR else 224
        self.image_size = usual_size if image_size is None else image_size
        usual_mean, usual_std = statistics(source)
        self.mean = usual_mean if mean is None else tuple(mean)
        self.std = usual_std if std is None else tuple(std)
        self._check_sources()
        self._check_numbers()
        self.crop = crop_pct if self.image_size > _UNCROPPED and source not in CIFAR else None
        self.train_transform = train_transform(augment, self.image_size, self.crop)
        self.eval_transform = eval_transform(self.image_size, self.crop)

    def _check_sources(self) -> None:
        given, source = self.hparams, self.source
        known = (GENERATED, *SOURCES, UNLABELLED)
        if source not in known:
            raise UserError(f"source must be one of {', '.join(known)}, got {source!r}")
        if source != GENERATED and given["root"] is None and given["predict_root"] is None:
            raise UserError(f"source {source} needs a folder", fix="give --data.root DIR")
        if source == GENERATED and self.augment != "none":
            what = "generated images are not augmented: a flipped one is of another class"
            raise UserError(what, fix="use --data.augment none")
        if given["in_memory"] and self.augment == "imagenet":
            what = "augment imagenet needs whole images, in_memory keeps them resized"
            raise UserError(what, fix="leave one of them out")
        other = given["eval_source"]
        if (other is None) != (given["eval_root"] is None):
            raise UserError("eval_source and eval_root go together: give both or none")
        if other is not None and other not in SOURCES:
            raise UserError(f"eval_source must be one of {', '.join(SOURCES)}, got {other!r}")
        if other is not None and source == GENERATED:
            raise UserError("generated images have validation and test images of their own")
        if source == UNLABELLED and given["val_split"]:
            what = "images without labels cannot validate"
            raise UserError(what, fix="give --data.eval_source and --data.eval_root")

    def _check_numbers(self) -> None:
        given = self.hparams
        if self.image_size < _SMALLEST:
            raise UserError(f"image_size must be at least {_SMALLEST}, got {self.image_size}")
        if not 0 < given["crop_pct"] <= 1:
            raise UserError(f"crop_pct must be above 0 and at most 1, got {given['crop_pct']}")
        if not 0 <= given["val_split"] < 1:
            raise UserError("val_split must be a share that leaves training images")
        for name in ("train_size", "teacher_size", "val_size", "test_size", "subset"):
            if given[name] is not None and given[name] < 1:
                raise UserError(f"{name} must be at least 1, got {given[name]}")
        if not len(self.mean) == len(self.std) == 3 or min(self.std) <= 0:
            raise UserError(
                f"mean {list(self.mean)} and std {list(self.std)} must have a number for each of "
                "3 colours, std above 0"
            )

    # -- what there is -------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where nothing has labels."""
        return len(self.class_names)

    @property
    def deterministic(self) -> bool:
        """Whether a training image looks the same in every epoch."""
        return self.augment == "none"

    def setup(self, stage: str | None = None) -> None:
        """Reads the index of the source; images are read, or drawn, when they are wanted.

        Args:
            stage: fit, validate, test or predict; the last reads nothing where a folder is named.

        Raises:
            UserError: the source is missing, damaged, or not what it should be.
        """
        alone = stage == "predict" and self.hparams["predict_root"] is not None
        if self._splits or alone:
            return
        if self.source == GENERATED:
            self.class_names = grating_class_names(self.hparams["classes"])
            return
        splits = self._read(self.source, self.hparams["root"])
        if self.hparams["eval_source"] is not None:
            others = self._read(self.hparams["eval_source"], self.hparams["eval_root"])
            _check_names(splits["train"].names, others["train"].names)
            splits = others | {"train": splits["train"]}
        self.class_names = next((part.names for part in splits.values() if part.names), ())
        self._splits = splits

    def _read(self, source: str, root: str) -> Splits:
        if source == UNLABELLED:
            files = image_files(Path(root))
            if not files:
                raise UserError("no image in the folder", where=root)
            return {"train": Split(files, None, ())}
        if source == "parquet":
            columns = self.hparams["image_column"], self.hparams["label_column"]
            return read_parquet(Path(root), *columns)
        return SOURCES[source](Path(root))

    def train_labels(self) -> Int[Tensor, " items"]:
        """The class of every image of the whole training split, by its index; -1 without labels."""
        if self.source == GENERATED:
            return self._in_memory("train").label
        part = self._splits["train"]
        return torch.full((len(part.sources),), -1) if part.labels is None else _tensor(part.labels)

    def fingerprint(self) -> dict[str, Any]:
        """What the training images are, in plain values: cached features belong to it.

        All labels and all images count, see `content_hash`, whether they are decoded in advance or
        not.

        Raises:
            UserError: a file is missing.
        """
        labels = self.train_labels()
        generated = self.source == GENERATED
        images = [self._in_memory("train").image] if generated else self._splits["train"].sources
        return {
            "source": self.source,
            "classes": self.class_names,
            "items": len(labels),
            "labels": zlib.crc32(labels.numpy().tobytes()),
            "size or crop": (self.image_size, self.crop),
            "images": content_hash(images, self.hparams["root"] or "."),
        }

    # -- items ---------------------------------------------------------------------------------

    @property
    def _keeps_pixels(self) -> bool:
        """Whether a split is decoded once and kept."""
        plain = self.source in CIFAR and self.image_size == 32 and self.augment != "imagenet"
        return self.source == GENERATED or plain or self.hparams["in_memory"]

    def _items(self, split: str, augmented: bool = False) -> Any:
        """A whole split, augmented as in training if wished."""
        if self._keeps_pixels:
            crops = augmented and self.augment == "cifar"
            pad = padding(self.image_size) if crops else 0
            return PixelItems(self._in_memory(split), pad, self.seed)
        part = self._splits[split]
        transform = self.train_transform if augmented else self.eval_transform
        return ImageItems(part.sources, transform, part.labels, self.seed)

    def _in_memory(self, split: str) -> Pixels:
        if split not in self._pixels:
            generated = self.source == GENERATED
            self._pixels[split] = self._draw(split) if generated else self._decode(split)
        return self._pixels[split]

    def _draw(self, split: str) -> Pixels:
        """Generated images."""
        given = self.hparams
        name = given["part"] if split == "train" else split
        counts = {
            "student": given["train_size"],
            "teacher": given["teacher_size"] or _TEACHER_SIZES.get(given["classes"], _TEACHER_SIZE),
            "val": given["val_size"],
            "test": given["test_size"],
        }
        made = bound_gratings(
            counts[name], _SEEDS[name], classes=given["classes"], size=self.image_size
        )
        return Pixels(made.image, made.label, torch.arange(counts[name]))

    def _decode(self, split: str) -> Pixels:
        """Images from disk, read by a loader: its workers help, and it settles what is unreadable.

        Raises:
            UserError: an image is unreadable, or all are.
        """
        part, size = self._splits[split], self.image_size
        first = part.sources[0] if len(part.sources) else None
        if isinstance(first, np.ndarray) and first.shape == (size, size, 3):
            image = torch.from_numpy(np.stack(part.sources)).permute(0, 3, 1, 2).contiguous()
            return Pixels(image, _tensor(part.labels or ()), torch.arange(len(image)))
        items = ImageItems(part.sources, pixel_transform(size, self.crop), part.labels)
        batches = [*self._loader(f"{split} images", items, _DECODED_AT_ONCE)]
        if not batches:
            raise UserError(f"no image of {split} is usable", where=str(self.hparams["root"]))
        return Pixels(*(torch.cat(field) for field in zip(*batches, strict=True)))

    def _loader(
        self, split: str, dataset: Any, batch_size: int, sampler: EpochSampler | None = None
    ) -> Loader:
        """A loader that names up to ten unreadable images at once, where they are not skipped."""
        loader = super()._loader(split, dataset, batch_size, sampler)
        whole = dataset.dataset if isinstance(dataset, Subset) else dataset
        if self.on_bad_item == "raise" and isinstance(whole, ImageItems):
            rows = dataset.indices if isinstance(dataset, Subset) else range(len(whole))
            read = partial(_read_row, whole.sources, rows)  # no closure: it goes to the workers
            self.bad_items[split] = loader.items.bad = Offenders(split, read, len(rows))
        return loader

    # -- splits --------------------------------------------------------------------------------

    @property
    def _names(self) -> set[str]:
        return {"train", "val", "test"} if self.source == GENERATED else set(self._splits)

    @property
    def _val_split(self) -> float:
        """Share to set aside: none where a split of the source is for it, and another for tests."""
        return 0.0 if {"val", "test"} <= self._names else self.hparams["val_split"]

    def _rows(self) -> tuple[list[int], list[int]]:
        """Rows of the training split: those to learn from, and those kept for validation."""
        if self._keeps_pixels:
            labels = self._in_memory("train").label.tolist()
        else:
            labels = self.train_labels().tolist()
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(labels), generator=generator).tolist()
        held = round(self._val_split * len(order))
        if self._val_split and not held:
            share = f"val_split {self._val_split} of {len(order)} training images"
            raise UserError(f"{share} is less than one")
        kept, subset = order[held:], self.hparams["subset"]
        if subset is not None:
            if subset > len(kept):
                raise UserError(f"a subset of {subset} is more than the {len(kept)} images there")
            kept = balanced(kept, labels, subset)
        return sorted(kept), sorted(order[:held])

    def _part(self, rows: list[int], augmented: bool = False) -> Any:
        items = self._items("train", augmented)
        if len(rows) == len(items):
            return items
        return (TensorSubset if self._keeps_pixels else Subset)(items, rows)

    def train_dataset(self) -> Any:
        """Augmented training images: without those kept for validation, or a subset of them."""
        return self._part(self._rows()[0], augmented=True)

    def still_loader(self) -> Loader:
        """The whole training split in order and not augmented, for what is kept by index.

        Raises:
            UserError: unreadable images are to be skipped, so that rows would move up.
        """
        if self.on_bad_item == "skip":
            what = "what is kept by index needs every training image"
            raise UserError(what, fix="use --data.on_bad_item raise")
        return self._loader("still", self._items("train"), self.eval_batch_size)

    def val_dataset(self) -> Any:
        """Validation images, see `val_split`; None where only unlabelled images are there."""
        if self._val_split:
            return self._part(self._rows()[1])
        return self._first("val", "test")

    def test_dataset(self) -> Any:
        """Test images; the validation split where there is no other (ImageNet)."""
        return self._first("test", "val")

    def _first(self, *names: str) -> Any:
        there = [name for name in names if name in self._names]
        return self._items(there[0]) if there else None

    def predict_dataset(self) -> Any:
        """The images of `predict_root`, else the test images."""
        root = self.hparams["predict_root"]
        if root is None:
            return self.test_dataset()
        self.predict_files = image_files(Path(root))
        if not self.predict_files:
            raise UserError("no image in the folder", where=str(root))
        return ImageItems(self.predict_files, self.eval_transform, seed=self.seed)


def _read_row(sources: Sequence[Any], rows: Sequence[int], number: int) -> None:
    read_image(sources[rows[number]])


def _tensor(labels: Sequence[int]) -> Int[Tensor, " items"]:
    return torch.tensor(list(labels), dtype=torch.int64)


def _check_names(ours: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Refuses to evaluate on other classes, or on the same in another order."""
    if not ours or ours == others:
        return
    differing = sorted(set(ours) ^ set(others))[:5]
    what = f"classes of source and eval_source differ: {', '.join(differing) or 'their order'}"
    raise UserError(what, fix="evaluate on images of the same classes")
