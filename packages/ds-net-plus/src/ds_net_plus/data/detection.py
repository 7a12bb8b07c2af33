"""The Lightning datamodule for images with boxes: PASCAL VOC, and generated scenes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ds_net_plus.data.module import GENERATED, TEST_SEED, TRAIN_SEED, VAL_SEED
from ds_net_plus.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ds_net_plus.data.voc import (
    TEST_SETS,
    TRAIN_SETS,
    VOC_CLASSES,
    VOCEntry,
    read_annotation,
    read_voc,
)
from ds_net_plus.metrics import Truth
from ds_net_plus.scenes import SCENE_CLASSES, glyph_scene
from tenfold.data import DataModule, Draw, Subset, as_draw
from tenfold.errors import UserError
from tenfold.images import image_files, read_image
from tenfold.training import item_rng

BOX_AUGMENTATIONS = ("none", "light", "ssd")
_SMALLEST = 32  # pixels a side: the deepest map of a detector has one pixel for 32


class DetectionBatch(NamedTuple):
    """Images of one size, and lists of what is on each; boxes are pixels of these images.

    Attributes:
        image: normalised pixels.
        boxes: (x0, y0, x1, y1) of every object.
        labels: its class, from 0.
        difficult: whether it is left out of the evaluation.
        index: position in the split.
        size: height and width of the images before they were resized.
    """

    image: Float[Tensor, "batch colours height width"]
    boxes: list[Float[Tensor, "objects 4"]]
    labels: list[Int[Tensor, " objects"]]
    difficult: list[Bool[Tensor, " objects"]]
    index: Int[Tensor, " batch"]  # pyright: ignore[reportIncompatibleMethodOverride]
    size: Int[Tensor, "batch 2"]

    def truths(self, original: bool = True) -> list[Truth]:
        """The objects of every image, in pixels of the image as it was on disk if `original`."""
        scales = self.scales() if original else torch.ones_like(self.scales())
        return [
            Truth(boxes * scale, labels, difficult)
            for boxes, labels, difficult, scale in zip(
                self.boxes, self.labels, self.difficult, scales, strict=True
            )
        ]

    def scales(self) -> Float[Tensor, "batch 4"]:
        """What takes boxes of the resized images to the originals."""
        height, width = self.image.shape[-2:]
        side = self.size.new_tensor([width, height])
        scale = self.size.flip(1) / side
        return torch.cat([scale, scale], 1).to(self.image.dtype)


def collate_boxes(items: list[dict[str, Any]]) -> DetectionBatch:
    """Stacks the images, keeps what is on them in lists."""
    return DetectionBatch(
        torch.stack([item["image"] for item in items]),
        [item["boxes"] for item in items],
        [item["labels"] for item in items],
        [item["difficult"] for item in items],
        torch.tensor([item["index"] for item in items]),
        torch.tensor([item["size"] for item in items]),
    )


def box_transform(augment: str, size: int) -> v2.Compose:
    """What happens to images and boxes; "none" is that of evaluation.

    "light" flips; "ssd" is the recipe of SSD: photometric distortion, zooming out to up to four
    times the side over the mean colour, a crop that keeps a minimum IoU with an object, a flip.

    Args:
        augment: one of `BOX_AUGMENTATIONS`.
        size: side of the result in pixels; the ratio of the sides is not kept, as in SSD.

    Raises:
        UserError: an unknown augmentation.
    """
    if augment not in BOX_AUGMENTATIONS:
        known = ", ".join(BOX_AUGMENTATIONS)
        raise UserError(f"augment must be one of {known}, got {augment!r}")
    steps: list[Any] = []
    if augment == "ssd":
        fill = [round(255 * mean) for mean in IMAGENET_MEAN]
        steps += [
            v2.RandomPhotometricDistort(),
            v2.RandomZoomOut(fill={tv_tensors.Image: fill, "others": 0}),
            v2.RandomIoUCrop(),
        ]
    if augment != "none":
        steps.append(v2.RandomHorizontalFlip())
    steps.append(v2.Resize((size, size), antialias=True))
    if augment == "ssd":  # a crop leaves empty boxes behind
        steps.append(v2.SanitizeBoundingBoxes(labels_getter=_beside_boxes))
    scale = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return v2.Compose([*steps, scale, v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD))])


def _beside_boxes(sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What goes when a box goes; a function with a name, since it is sent to the workers."""
    return sample["labels"], sample["difficult"]


class _BoxItems:
    """Images with boxes; the transform's randomness is drawn by (seed, epoch, index)."""

    def __init__(
        self, entries: Any, names: Sequence[str], transform: v2.Compose, seed: int, train: bool
    ) -> None:
        self.entries, self.names, self.transform, self.seed = entries, names, transform, seed
        self.train = train  # without objects that nobody can be expected to find

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: Draw | int) -> dict[str, Any]:
        draw = as_draw(key)
        image, truth = self.load(draw.index)
        size = tuple(image.shape[-2:])
        if self.train:
            truth = Truth(*(field[~truth.difficult] for field in truth))
        boxes = tv_tensors.BoundingBoxes(truth.boxes, format="XYXY", canvas_size=size)  # pyright: ignore[reportCallIssue, reportArgumentType]
        sample = {"image": tv_tensors.Image(image), "boxes": boxes}
        sample |= {"labels": truth.labels, "difficult": truth.difficult}
        with item_rng(self.seed, *draw):
            sample = self.transform(sample)
        plain = {k: v.as_subclass(Tensor) for k, v in sample.items()}
        return {**plain, "index": draw.index, "size": size}

    def load(self, index: int) -> tuple[Tensor, Truth]:
        """Pixels (3, H, W) uint8 and objects."""
        entry = self.entries[index]
        path = entry.image if isinstance(entry, VOCEntry) else entry
        picture = read_image(path)
        if isinstance(entry, VOCEntry):
            truth = read_annotation(entry.annotation, self.names, picture.size)
        else:
            truth = Truth(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).bool())
        return v2.functional.pil_to_tensor(picture), truth


class _SceneItems(_BoxItems):
    """Generated scenes; `entries` is the range of their numbers."""

    def __init__(self, split_seed: int, size: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.split_seed, self.size = split_seed, size

    def load(self, index: int) -> tuple[Tensor, Truth]:
        """Draws the scene."""
        scene = glyph_scene(self.entries[index], self.split_seed, self.size)
        return scene.image, Truth(scene.boxes, scene.labels, scene.difficult)


class VOCData(DataModule):
    """Training, validation, test and prediction images with their boxes."""

    collate = staticmethod(collate_boxes)

    def __init__(
        self,
        source: str = GENERATED,
        root: str | None = None,
        train_sets: list[str] = list(TRAIN_SETS),  # noqa: B006 (a default to read, never changed)
        test_sets: list[str] = list(TEST_SETS),  # noqa: B006
        class_names: list[str] | None = None,
        image_size: int | None = None,
        augment: str = "none",
        train_size: int = 800,
        val_size: int = 100,
        test_size: int = 200,
        val_split: float = 0.0,
        predict_root: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        workers: int = 0,
        seed: int = 0,
        on_bad_item: Literal["raise", "skip"] = "raise",
    ) -> None:
        """Nothing is read before `setup`.

        Args:
            source: "generated" (scenes of glyphs) or "voc".
            root: folder that holds VOCdevkit; predict alone needs none.
            train_sets: year and split of each part of the training set.
            test_sets: likewise of the test set.
            class_names: of other data in VOC's layout; VOC's twenty, or the scenes' own.
            image_size: side in pixels to which images are resized; 300 for VOC, 128 for scenes.
            augment: of training images: "none", "light" or "ssd".
            train_size: generated training scenes.
            val_size: generated validation scenes.
            test_size: generated test scenes.
            val_split: share of VOC's training images kept for validation; without it the test
                images serve.
            predict_root: folder of images for predict.
            batch_size: training images in a step, on each rank.
            eval_batch_size: images in a batch elsewhere.
            workers: loading processes.
            seed: of order, augmentation and splits.
            on_bad_item: "raise", or "skip" unusable images and annotations and count them.

        Raises:
            UserError: an option that does not exist.
        """
        super().__init__(batch_size, eval_batch_size, workers, seed, on_bad_item)
        self.save_hyperparameters(logger=False)  # the module's own seed may be another
        if source not in (GENERATED, "voc"):
            raise UserError(f"source must be one of {GENERATED}, voc, got {source!r}")
        if source == "voc" and root is None and predict_root is None:
            raise UserError("source voc needs a folder", fix="give --data.root DIR")
        if not 0 <= val_split < 1:
            raise UserError("val_split must be a share that leaves training images")
        if min(train_size, val_size, test_size) < 1:
            raise UserError("train_size, val_size and test_size must be at least 1")
        self.source = source
        self.image_size = image_size or (300 if source == "voc" else 128)
        if self.image_size < _SMALLEST:
            raise UserError(f"image_size must be at least {_SMALLEST}, got {self.image_size}")
        self.class_names = tuple(class_names or (VOC_CLASSES if source == "voc" else SCENE_CLASSES))
        self.channels, self.mean, self.std = 3, IMAGENET_MEAN, IMAGENET_STD
        self.train_transform = box_transform(augment, self.image_size)
        self.eval_transform = box_transform("none", self.image_size)
        self.predict_files: list[Path] = []
        self._entries: dict[str, list[VOCEntry]] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        """Reads the lists of the sets that are needed.

        Args:
            stage: fit, validate, test or predict; the last reads nothing where a folder is named.

        Raises:
            UserError: the source is missing or half unpacked.
        """
        alone = stage == "predict" and self.hparams["predict_root"] is not None
        if self.source == GENERATED or alone:
            return
        root = Path(str(self.hparams["root"]))
        wanted = ("train", "test") if stage in (None, "fit", "validate") else ("test",)
        for split in wanted:
            if split not in self._entries:
                self._entries[split] = read_voc(root, self.hparams[f"{split}_sets"])

    def _items(self, split: str, augmented: bool = False) -> Any:
        """A whole split of the source."""
        transform = self.train_transform if augmented else self.eval_transform
        if self.source == GENERATED:
            seed = {"train": TRAIN_SEED, "val": VAL_SEED, "test": TEST_SEED}[split]
            entries = range(self.hparams[f"{split}_size"])
            common = (entries, self.class_names, transform, self.seed, augmented)
            return _SceneItems(seed, self.image_size, *common)
        return _BoxItems(self._entries[split], self.class_names, transform, self.seed, augmented)

    def _part(self, name: str, augmented: bool = False) -> Any:
        """The share of the training split that is kept for validation, or the rest."""
        items = self._items("train", augmented)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(items), generator=generator).tolist()
        kept = round(self.hparams["val_split"] * len(items))
        return Subset(items, sorted(order[:kept] if name == "val" else order[kept:]))

    def train_dataset(self) -> Any:
        """Augmented training images, without difficult objects."""
        if self.source == GENERATED or not self.hparams["val_split"]:
            return self._items("train", augmented=True)
        return self._part("train", augmented=True)

    def val_dataset(self) -> Any:
        """Validation images, see `val_split`."""
        if self.source == GENERATED:
            return self._items("val")
        return self._part("val") if self.hparams["val_split"] else self._items("test")

    def test_dataset(self) -> Any:
        """Test images."""
        return self._items("test")

    def predict_dataset(self) -> Any:
        """The images of `predict_root`, else the test images."""
        root = self.hparams["predict_root"]
        if root is None:
            return self.test_dataset()
        self.predict_files = image_files(Path(root))
        if not self.predict_files:
            raise UserError("no image in the folder", where=str(root))
        return _BoxItems(
            self.predict_files, self.class_names, self.eval_transform, self.seed, train=False
        )
