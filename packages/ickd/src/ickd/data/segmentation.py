"""The Lightning datamodule for segmentation: PASCAL VOC, and generated images of textured blobs."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import default_collate

from ickd.data.segmentation_transforms import EvalTransform, Pair, TrainTransform
from ickd.data.voc import VOC_CLASSES, SegmentationEntry, check_entries, read_pair, read_voc
from ickd.metrics import IGNORE
from ickd.synthetic import BLOB_CLASSES, BLOBS_SIZE, textured_blobs
from tenfold.data import DataModule, Draw, Loader, TensorItems, as_draw
from tenfold.errors import UserError
from tenfold.images import image_files, read_image
from tenfold.training import item_rng

SOURCES = ("generated", "voc")
_BLOB_SEEDS = {"student": 1, "teacher": 2, "val": 3, "test": 4}
"""Of the generated images: no set shares one with another."""

_SMALLEST = 8  # pixels a side

PairTransform = Callable[..., Pair]


class SegmentationBatch(NamedTuple):
    """A batch of images with a label for every pixel.

    Attributes:
        image: pixels in 0..1, not normalised: every network has its own normalisation.
        label: classes, 255 where a pixel does not count; of another size than the image if the
            evaluation is at the original resolution.
        index: position in the split.
    """

    image: Float[Tensor, "batch 3 height width"]
    label: Int[Tensor, "batch high wide"]
    index: Int[Tensor, " batch"]  # pyright: ignore[reportIncompatibleMethodOverride]


def collate_pairs(items: list[Any]) -> SegmentationBatch:
    """Stack items.

    Raises:
        UserError: images or labels of different sizes.
    """
    for part in ("image", "label"):
        sizes = sorted({tuple(getattr(item, part).shape[-2:]) for item in items})
        if len(sizes) > 1:
            what = f"the {part}s of one batch have different sizes, {sizes[0]} and {sizes[1]}"
            raise UserError(what, fix="evaluate them one by one, --data.eval_batch_size 1")
    return SegmentationBatch(*default_collate([tuple(item) for item in items]))


class _VOCItems:
    """Images and labels from files; the transform's randomness is drawn by (seed, epoch, index)."""

    def __init__(
        self,
        entries: Sequence[SegmentationEntry],
        transform: PairTransform,
        num_classes: int,
        seed: int,
    ) -> None:
        self.entries, self.transform = entries, transform
        self.num_classes, self.seed = num_classes, seed

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: Draw | int) -> Any:
        draw = as_draw(key)
        image, label = read_pair(self.entries[draw.index], self.num_classes)
        with item_rng(self.seed, *draw):
            pair = self.transform(image, label)
        return _Item(pair.image, pair.label, draw.index)


class _Item(NamedTuple):
    """One item; `collate_pairs` makes it a batch."""

    image: Tensor
    label: Tensor
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


class _UnlabelledItems:
    """Images without labels, for predict: every pixel is one that does not count."""

    def __init__(self, files: Sequence[Path], transform: PairTransform) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Draw | int) -> Any:
        index = as_draw(key).index
        image = read_image(self.files[index])
        label = np.full((image.height, image.width), IGNORE, np.uint8)
        return _Item(*self.transform(image, label), index)


class SegmentationData(DataModule):
    """Training, validation, test and prediction images with labels for every pixel."""

    collate = staticmethod(collate_pairs)
    ignore_index = IGNORE

    def __init__(
        self,
        source: str = "generated",
        root: str | None = None,
        sbd: bool | None = None,
        class_names: list[str] | None = None,
        base_size: int | None = None,
        crop_size: int | None = None,
        eval_size: str = "resized",
        reference_compat: bool = False,
        verify: bool = True,
        part: str = "student",
        train_size: int = 100,
        teacher_size: int = 1500,
        val_size: int = 200,
        test_size: int = 500,
        predict_root: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        workers: int = 0,
        seed: int = 0,
        on_bad_item: Literal["raise", "skip"] = "raise",
    ) -> None:
        """Nothing is read before `setup`.

        Args:
            source: "generated" (textured-blobs, 24 x 24 pixels) or "voc" (PASCAL VOC 2012, or other
                data in its layout; its val images serve for validation and test).
            root: folder that holds VOCdevkit, and benchmark_RELEASE for SBD.
            sbd: whether SBD's images are added to VOC's training images; if they are there, unless
                told otherwise.
            class_names: of other data in VOC's layout, in the order of the labels.
            base_size: short side in pixels to which VOC's images are resized, 0.5 to 2 times as
                much in training; 513.
            crop_size: side of a training crop; as `base_size`.
            eval_size: "resized" evaluates on labels of the network's resolution, as the published
                program does; "original" on those on disk.
            reference_compat: label the padding of training crops 0 (background) instead of 255, as
                the published program does.
            verify: decode all images and labels before the first epoch; not with on_bad_item skip.
            part: whose generated training images, the "student"'s or the "teacher"'s, which has
                seen more; no image is in both.
            train_size: generated training images of the student.
            teacher_size: generated training images of the teacher.
            val_size: generated validation images.
            test_size: generated test images.
            predict_root: folder of images for predict.
            batch_size: training images in a step, on each rank.
            eval_batch_size: images in a batch elsewhere; 1 for VOC, whose images differ in size,
                100 for generated images.
            workers: loading processes.
            seed: of order and augmentation; generated images are the same for all.
            on_bad_item: "raise", or "skip" unusable images and labels and count them.

        Raises:
            UserError: an option that does not exist.
        """
        if source not in SOURCES:
            raise UserError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
        usual = 1 if source == "voc" or predict_root else 100
        super().__init__(batch_size, eval_batch_size or usual, workers, seed, on_bad_item)
        self.save_hyperparameters(logger=False)  # the module's own seed may be another
        self.source = source
        self.class_names = tuple(class_names or (VOC_CLASSES if source == "voc" else BLOB_CLASSES))
        self.predict_files: list[Path] = []
        self._entries: dict[str, list[SegmentationEntry]] = {}
        self._blobs: dict[str, TensorItems] = {}
        self._check_options()
        base = base_size or (BLOBS_SIZE if source == "generated" else 513)
        crop = crop_size or base
        self.train_transform = TrainTransform(base, crop, reference_compat=reference_compat)
        self.eval_transform = EvalTransform(base, resize_label=eval_size == "resized")

    def _check_options(self) -> None:
        given = self.hparams
        if self.source == "voc" and given["root"] is None and given["predict_root"] is None:
            raise UserError("source voc needs a folder", fix="give --data.root DIR")
        if self.source == "generated" and given["class_names"] is not None:
            raise UserError("generated images have classes of their own", fix="drop class_names")
        if not 2 <= len(self.class_names) <= IGNORE:
            raise UserError(f"{len(self.class_names)} classes; there must be 2 to {IGNORE}")
        known = {"eval_size": ("resized", "original"), "part": ("student", "teacher")}
        for name, values in known.items():
            if given[name] not in values:
                raise UserError(f"{name} must be {' or '.join(values)}, got {given[name]!r}")
        for name in ("base_size", "crop_size"):
            if given[name] is not None and given[name] < _SMALLEST:
                raise UserError(f"{name} must be at least {_SMALLEST}, got {given[name]}")
        for name in ("train_size", "teacher_size", "val_size", "test_size"):
            if given[name] < 1:
                raise UserError(f"{name} must be at least 1, got {given[name]}")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def deterministic(self) -> bool:
        """Whether a training image looks the same in every epoch."""
        return self.source == "generated"

    def setup(self, stage: str | None = None) -> None:
        """Read VOC's lists, and look at all of its files (see `verify`); or draw the blobs.

        Args:
            stage: fit, validate, test or predict; the last reads nothing where a folder is named.

        Raises:
            UserError: the source is missing or half unpacked, or files are unusable (up to ten are
                named).
        """
        if stage == "predict" and self.hparams["predict_root"] is not None:
            return
        if self.source == "generated":
            self._draw_blobs()
            return
        root = Path(str(self.hparams["root"]))
        wanted: tuple[Literal["train", "val"], ...] = ("val",)
        if stage in (None, "fit"):
            wanted = ("train", "val")
        for split in wanted:
            if split not in self._entries:
                entries = read_voc(root, split, self.hparams["sbd"])
                if self._verifies:
                    check_entries(entries, self.num_classes)
                self._entries[split] = entries

    @property
    def _verifies(self) -> bool:
        first = self.trainer is None or self.trainer.global_rank == 0
        return first and self.hparams["verify"] and self.on_bad_item == "raise"

    def _draw_blobs(self) -> None:
        given = self.hparams
        learner: str = given["part"]
        counts = {
            learner: given["train_size" if learner == "student" else "teacher_size"],
            "val": given["val_size"],
            "test": given["test_size"],
        }
        for name, count in counts.items():
            split = "train" if name == learner else name
            if split not in self._blobs:
                blobs = textured_blobs(count, _BLOB_SEEDS[name])
                pixels = blobs.image.float() / 255
                fields = SegmentationBatch(pixels, blobs.label, torch.arange(count))
                self._blobs[split] = TensorItems(fields)

    def _items(self, split: Literal["train", "val", "test"], transform: PairTransform) -> Any:
        if self.source == "generated":
            return self._blobs[split]
        entries = self._entries["train" if split == "train" else "val"]
        return _VOCItems(entries, transform, self.num_classes, self.seed)

    def train_dataset(self) -> Any:
        """Augmented crops of VOC's training images; generated images as they are."""
        return self._items("train", self.train_transform)

    def still_loader(self) -> Loader:
        """The training images in order and not augmented."""
        items = self._items("train", self.eval_transform)
        return self._loader("still", items, self.eval_batch_size)

    def fingerprint(self) -> dict[str, Any]:
        """What the training images are, in plain values: cached features belong to it."""
        facts: dict[str, Any] = {"source": self.source, "classes": self.class_names}
        if self.source == "generated":
            pixels = self._blobs["train"].fields.image
            return facts | {"items": len(pixels), "pixels": zlib.crc32(pixels.numpy().tobytes())}
        sizes = (self.train_transform.base_size, self.train_transform.crop_size)
        names = "".join(f"{entry.image.name}\n" for entry in self._entries["train"])
        return facts | {"sizes": sizes, "items": zlib.crc32(names.encode())}

    def val_dataset(self) -> Any:
        """Validation images, whole."""
        return self._items("val", self.eval_transform)

    def test_dataset(self) -> Any:
        """Test images, whole; VOC's test labels are not public: its validation images."""
        return self._items("test", self.eval_transform)

    def predict_dataset(self) -> Any:
        """The images of `predict_root`, without labels; else the test images."""
        root = self.hparams["predict_root"]
        if root is None:
            return self.test_dataset()
        self.predict_files = image_files(Path(root))
        if not self.predict_files:
            raise UserError("no image in the folder", where=str(root))
        return _UnlabelledItems(self.predict_files, self.eval_transform)
