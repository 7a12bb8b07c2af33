"""The Lightning datamodule for images of every source."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from ds_net_plus.data.transforms import (
    Transform,
    eval_transform,
    normalisation,
    train_transform,
)
from ds_net_plus.synthetic import CLASS_NAMES, Glyphs, glyph_mix
from tenfold.data import DataModule, Loader, Subset, TensorItems, TensorSubset
from tenfold.errors import UserError
from tenfold.images import SOURCES, ImageItems, Split, image_files, read_parquet

GENERATED = "generated"
TRAIN_SEED, VAL_SEED, TEST_SEED = 0, 77, 99
_SMALLEST = 8  # pixels a side: below, neither a glyph nor a strided network has room


class Batch(NamedTuple):
    """A batch of images.

    Attributes:
        image: normalised pixels.
        label: classes, -1 where there are none.
        index: position in the split.
        hard: the generator's difficulty flag, None for photographs.
        other: a second view of the same images, where two were asked for.
    """

    image: Float[Tensor, "batch colours height width"]
    label: Int[Tensor, " batch"]
    index: Int[Tensor, " batch"]  # pyright: ignore[reportIncompatibleMethodOverride]
    hard: Bool[Tensor, " batch"] | None = None
    other: Float[Tensor, "batch colours height width"] | None = None


def _to_batch(items: list[Any]) -> Batch:
    image, *fields = default_collate([tuple(item) for item in items])
    if isinstance(image, Tensor):
        return Batch(image, *fields)
    image, other = image
    return Batch(image, *fields, other=other)


class TwoViews:
    """A transform applied twice, each time with its own randomness."""

    def __init__(self, transform: Transform) -> None:
        """Takes the transform of one view."""
        self.transform = transform

    def __call__(self, image: Image.Image) -> tuple[Any, Any]:
        """Two views of an image."""
        return self.transform(image), self.transform(image)


class ImageData(DataModule):
    """Training, validation, test and prediction images of one source."""

    collate = staticmethod(_to_batch)

    def __init__(
        self,
        source: str = GENERATED,
        root: str | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        augment: str = "none",
        views: Literal[1, 2] = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop_pct: float = 0.875,
        train_size: int = 8000,
        val_size: int = 2000,
        test_size: int = 4000,
        gate_split: float = 0.0,
        val_split: float = 0.0,
        train_on: Literal["train", "gate"] = "train",
        image_column: str = "image",
        label_column: str = "label",
        predict_root: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = 256,
        workers: int = 0,
        seed: int = 0,
        on_bad_item: Literal["raise", "skip"] = "raise",
    ) -> None:
        """Nothing is read before `setup`.

        Args:
            source: "generated" (glyph-mix), "imagenet", "imagefolder", "cifar10", "cifar100" or
                "parquet".
            root: folder of a source on disk; predict alone needs none.
            image_size: side in pixels; 32 for generated and CIFAR images, else 224.
            channels: 1 (grey) or 3; 1 for generated images, else 3.
            augment: of training images: "none", "light", "rand-m7", "imagenet" or "deit".
            views: of every training image; multi-view consistency needs 2.
            mean: of each colour of pixels in 0..1, for the normalisation; ImageNet's if left out.
            std: of each colour, likewise.
            crop_pct: share of the resized image's side that evaluation's centre crop keeps (0.9 for
                DeiT weights); small images are not cropped.
            train_size: generated training images.
            val_size: generated validation images.
            test_size: generated test images.
            gate_split: share of the training images kept for Stage II.
            val_split: share of the training images kept for validation and budgets, unless the
                source has both a validation and a test split; without it the test images serve.
            train_on: "train", or "gate": the images of `gate_split` (all where it is 0).
            image_column: of parquet files.
            label_column: of parquet files.
            predict_root: folder of images for predict.
            batch_size: training images in a step, on each rank.
            eval_batch_size: images in a batch elsewhere.
            workers: loading processes.
            seed: of order, augmentation and splits.
            on_bad_item: "raise", or "skip" unreadable images and count them.

        Raises:
            UserError: an option that does not exist.
        """
        super().__init__(batch_size, eval_batch_size, workers, seed, on_bad_item)
        self.save_hyperparameters(logger=False)  # the module's own seed may be another
        self.predict_files: list[Path] = []
        if source != GENERATED and source not in SOURCES:
            known = ", ".join([GENERATED, *SOURCES])
            raise UserError(f"source must be one of {known}, got {source!r}")
        if source != GENERATED and root is None and predict_root is None:
            raise UserError(f"source {source} needs a folder", fix="give --data.root DIR")
        if min(gate_split, val_split) < 0 or gate_split + val_split >= 1:
            raise UserError("gate_split and val_split must be shares that leave training images")
        small = source in (GENERATED, "cifar10", "cifar100")
        self.source, self.augment = source, augment
        self.image_size = (32 if small else 224) if image_size is None else image_size
        self.channels = (1 if source == GENERATED else 3) if channels is None else channels
        self._check_sizes(train_size, val_size, test_size)
        usual_mean, usual_std = normalisation(self.channels)
        self.mean = usual_mean if mean is None else tuple(mean)
        self.std = usual_std if std is None else tuple(std)
        if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0:
            raise UserError(
                f"mean {list(self.mean)} and std {list(self.std)} must have a number for each of "
                f"{self.channels} colours, std above 0"
            )
        self.train_transform = train_transform(augment, self.image_size, self.mean, self.std)
        if views == 2:
            if augment == "none":
                raise UserError("two views need an augmentation", fix="give --data.augment light")
            self.train_transform = TwoViews(self.train_transform)
        if not 0 < crop_pct <= 1:
            raise UserError(f"crop_pct must be above 0 and at most 1, got {crop_pct}")
        crop = crop_pct if not small and self.image_size > 64 else None
        self.eval_transform = eval_transform(self.image_size, self.mean, self.std, crop)
        self.class_names: tuple[str, ...] = ()
        self._glyphs: dict[str, TensorItems] = {}
        self._splits: dict[str, Split] = {}

    def _check_sizes(self, *counts: int) -> None:
        if self.image_size < _SMALLEST:
            raise UserError(f"image_size must be at least {_SMALLEST}, got {self.image_size}")
        if self.channels not in (1, 3):
            raise UserError(f"channels must be 1 (grey) or 3 (colour), got {self.channels}")
        if min(counts) < 1:
            raise UserError("train_size, val_size and test_size must be at least 1")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def deterministic(self) -> bool:
        """Whether a training image looks the same in every epoch."""
        return self.augment == "none"

    def setup(self, stage: str | None = None) -> None:
        """Reads the index of the source, or draws the generated images.

        Args:
            stage: fit, validate, test or predict; the last reads nothing where a folder is named.

        Raises:
            UserError: the source is missing, damaged, or not what it should be.
        """
        alone = stage == "predict" and self.hparams["predict_root"] is not None
        if self.class_names or alone:
            return
        if self.source == GENERATED:
            self._setup_generated()
            return
        root = Path(str(self.hparams["root"]))
        if self.source == "parquet":
            columns = self.hparams["image_column"], self.hparams["label_column"]
            self._splits = read_parquet(root, *columns)
        else:
            self._splits = SOURCES[self.source](root)
        self.class_names = self._splits["train"].names

    def _setup_generated(self) -> None:
        if self.augment not in ("none",):
            raise UserError("generated images are not augmented", fix="use --data.augment none")
        if self.channels != 1:
            raise UserError("generated images are grey", fix="leave --data.channels out")
        self.class_names = CLASS_NAMES
        for split, seed in (("train", TRAIN_SEED), ("val", VAL_SEED), ("test", TEST_SEED)):
            count = self.hparams[f"{split}_size"]
            glyphs: Glyphs = glyph_mix(count, seed, size=self.image_size)
            fields = Batch(glyphs.image, glyphs.label, torch.arange(count), glyphs.hard)
            self._glyphs[split] = TensorItems(fields)

    def _items(self, split: str, transform: Transform) -> Any:
        """A whole split of the source."""
        if self.source == GENERATED:
            return self._glyphs[split]
        part = self._splits[split]
        return ImageItems(part.sources, transform, part.labels, self.seed)

    @property
    def _val_split(self) -> float:
        """Share to set aside: none where a split on disk is for it, and another one for tests."""
        both = {"val", "test"} <= set(self._splits)
        return 0.0 if both else self.hparams["val_split"]

    def _parts(self) -> dict[str, list[int]]:
        """Positions of the training split that go to training, gate and validation."""
        size = len(self._items("train", self.eval_transform))
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(size, generator=generator).tolist()
        shares = {"gate_split": self.hparams["gate_split"], "val_split": self._val_split}
        gate, val = (round(share * size) for share in shares.values())
        for (name, share), count in zip(shares.items(), (gate, val), strict=True):
            if share and not count:
                raise UserError(f"{name} {share} of {size} training images is less than one")
        return {
            "gate": sorted(order[:gate]),
            "val": sorted(order[gate : gate + val]),
            "train": sorted(order[gate + val :]),
        }

    def train_dataset(self) -> Any:
        """Augmented training images, without those kept for other ends; or Stage II's."""
        chosen = self._gate_part() if self.hparams["train_on"] == "gate" else "train"
        return self._part(chosen, self.train_transform)

    def gate_dataset(self) -> Any:
        """Images for Stage II, not augmented: those kept for it, else the training images."""
        return self._part(self._gate_part(), self.eval_transform)

    def _gate_part(self) -> str:
        return "gate" if self.hparams["gate_split"] else "train"

    def _part(self, name: str, transform: Transform) -> Any:
        items = self._items("train", transform)
        parts = self._parts()
        if len(parts[name]) == len(items):
            return items
        return (TensorSubset if self._glyphs else Subset)(items, parts[name])

    def val_dataset(self) -> Any:
        """Validation images, see `val_split`."""
        own = self._glyphs or self._splits
        if self._val_split:
            return self._part("val", self.eval_transform)
        return self._items("val" if "val" in own else "test", self.eval_transform)

    def test_dataset(self) -> Any:
        """Test images; the validation split where the source has no other (ImageNet)."""
        own = self._glyphs or self._splits
        return self._items("test" if "test" in own else "val", self.eval_transform)

    def predict_dataset(self) -> Any:
        """The images of `predict_root`, else the test images."""
        root = self.hparams["predict_root"]
        if root is None:
            return self.test_dataset()
        self.predict_files = image_files(Path(root))
        if not self.predict_files:
            raise UserError("no image in the folder", where=str(root))
        return ImageItems(self.predict_files, self.eval_transform, seed=self.seed)

    def gate_loader(self) -> Loader:
        """`gate_dataset` in order."""
        return self._loader("gate", self.gate_dataset(), self.eval_batch_size)

    def calibration_loader(self) -> Loader:
        """`val_dataset` in order."""
        return self._loader("calibration", self.val_dataset(), self.eval_batch_size)

    def test_loader(self) -> Loader:
        """`test_dataset` in order."""
        return self._loader("test", self.test_dataset(), self.eval_batch_size)
