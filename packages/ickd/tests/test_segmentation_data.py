"""VOC and SBD on disk, what happens to images and labels, and the datamodule."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from ickd.data import segmentation_transforms as transforms
from ickd.data.segmentation import SegmentationBatch, SegmentationData, collate_pairs
from ickd.data.segmentation_transforms import EvalTransform, Pair, TrainTransform, resize_short
from ickd.data.voc import (
    VOC_CLASSES,
    SegmentationEntry,
    check_entries,
    read_label,
    read_pair,
    read_voc,
    voc_palette,
    write_voc,
)
from ickd.synthetic import BLOB_CLASSES, textured_blobs
from tenfold.data import Draw
from tenfold.errors import UserError

VOC = Path("VOCdevkit/VOC2012")
SBD = Path("benchmark_RELEASE/dataset")


def label_of(seed: int, height: int = 12, width: int = 16) -> np.ndarray:
    label = np.random.default_rng(seed).integers(0, 21, (height, width)).astype(np.uint8)
    label[0] = 255
    return label


def add_voc(root: Path, split: str, names: dict[str, np.ndarray]) -> None:
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / VOC / part).mkdir(parents=True, exist_ok=True)
    (root / VOC / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    for name, label in names.items():
        Image.new("RGB", label.shape[::-1]).save(root / VOC / "JPEGImages" / f"{name}.jpg")
        picture = Image.fromarray(label)
        picture.putpalette(voc_palette())
        picture.save(root / VOC / "SegmentationClass" / f"{name}.png")


def add_sbd(root: Path, split: str, names: dict[str, np.ndarray]) -> None:
    for part in ("img", "cls"):
        (root / SBD / part).mkdir(parents=True, exist_ok=True)
    (root / SBD / f"{split}.txt").write_text("\n".join(names) + "\n")
    for name, label in names.items():
        Image.new("RGB", label.shape[::-1]).save(root / SBD / "img" / f"{name}.jpg")
        content = {"Segmentation": label, "CategoriesPresent": np.unique(label)}
        savemat(root / SBD / "cls" / f"{name}.mat", {"GTcls": content})


@pytest.fixture
def tree(tmp_path) -> Path:
    """VOC: train a b, val v w. SBD: train a (other label) c v, val d w e."""
    add_voc(tmp_path, "train", {"a": label_of(1), "b": label_of(2)})
    add_voc(tmp_path, "val", {"v": label_of(3), "w": label_of(4)})
    add_sbd(tmp_path, "train", {"a": label_of(11), "c": label_of(12), "v": label_of(13)})
    add_sbd(tmp_path, "val", {n: label_of(20 + i) for i, n in enumerate("dwe")})
    return tmp_path


def voc_data(root: Path, **options) -> SegmentationData:
    arguments = {"base_size": 16, "batch_size": 2, **options}
    return SegmentationData(source="voc", root=str(root), **arguments)


# --------------------------------------------------------------------------------- files on disk


def test_the_palette_is_voc_s():
    colours = np.array(voc_palette()).reshape(256, 3).tolist()
    known = {0: [0, 0, 0], 1: [128, 0, 0], 2: [0, 128, 0], 3: [128, 128, 0], 8: [64, 0, 0]}
    known |= {15: [192, 128, 128], 20: [0, 64, 128], 255: [224, 224, 192]}
    assert {k: colours[k] for k in known} == known
    assert len(VOC_CLASSES) == 21


def test_training_images_are_the_union_without_val(tree):
    entries = read_voc(tree, "train")
    assert [e.image.stem for e in entries] == ["a", "b", "c", "d", "e"]
    assert [e.label.suffix for e in entries] == [".png", ".png", ".mat", ".mat", ".mat"]
    # an image of both has VOC's label
    np.testing.assert_array_equal(read_label(entries[0].label, 21), label_of(1))
    np.testing.assert_array_equal(read_label(entries[3].label, 21), label_of(20))
    assert [e.image.stem for e in read_voc(tree, "val")] == ["v", "w"]
    assert [e.image.stem for e in read_voc(tree, "train", sbd=False)] == ["a", "b"]
    assert read_voc(tree / "VOCdevkit", "train") == entries


def test_generated_data_is_read_back_equal(tmp_path):
    blobs = textured_blobs(5, seed=3)
    labels = blobs.label.clone()
    labels[0, :3] = 255
    write_voc(blobs.image, labels, tmp_path, "train")
    write_voc(blobs.image[:2], labels[:2], tmp_path, "val")
    entries = read_voc(tmp_path, "train")
    assert len(entries) == 5
    assert len(read_voc(tmp_path, "val")) == 2
    with Image.open(entries[1].label) as picture:
        assert picture.mode == "P"
    for entry, image, label in zip(entries, blobs.image, labels, strict=True):
        pixels, classes = read_pair(entry, 6)
        np.testing.assert_array_equal(np.asarray(pixels), image.permute(1, 2, 0))
        np.testing.assert_array_equal(classes, label)
    options = {"class_names": list(BLOB_CLASSES), "base_size": 24}
    data = voc_data(tmp_path, eval_batch_size=2, **options)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert torch.equal(batch.image, blobs.image[:2].float() / 255)
    assert torch.equal(batch.label, labels[:2])
    assert batch.index.tolist() == [0, 1]


# ------------------------------------------------------------------------------------- bad input


def test_an_incomplete_tree_is_told_with_the_one_expected(tmp_path):
    with pytest.raises(UserError, match=r"no VOCdevkit/VOC2012/Im.*expected .*benchmark_RELEASE"):
        read_voc(tmp_path, "train")
    add_voc(tmp_path, "train", {"a": label_of(1)})
    add_voc(tmp_path, "val", {"v": label_of(1)})
    with pytest.raises(UserError, match=r"no benchmark_RELEASE/dataset/train\.txt"):
        read_voc(tmp_path, "train", sbd=True)
    listing = tmp_path / VOC / "ImageSets/Segmentation/train.txt"
    listing.write_text("\n\n")
    with pytest.raises(UserError, match=r"train\.txt names no image"):
        read_voc(tmp_path, "train")
    listing.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a list of images"):
        read_voc(tmp_path, "train")


def test_lists_that_name_absent_files(tree):
    listing = tree / VOC / "ImageSets/Segmentation/train.txt"
    listing.write_text("a\nnot_there\n")
    (tree / SBD / "cls" / "d.mat").unlink()
    with pytest.raises(UserError, match=r"^3 listed files are not there: .*not_there\.jpg") as told:
        read_voc(tree, "train")
    assert all(name in str(told.value) for name in ("not_there.png", "d.mat"))
    listing.write_text("a\n" + "\n".join(f"x{i}" for i in range(20)))
    with pytest.raises(UserError, match=r"^41 listed files") as told:
        read_voc(tree, "train")
    assert str(told.value).count(".jpg") + str(told.value).count(".png") == 10


def break_files(tree: Path) -> None:
    colours = tree / VOC / "SegmentationClass"
    Image.new("RGB", (16, 12)).save(colours / "a.png")
    Image.fromarray(np.full((12, 16), 21, np.uint8)).save(colours / "b.png")
    savemat(tree / SBD / "cls" / "c.mat", {"GTcls": {"Boundaries": label_of(1)}})
    savemat(tree / SBD / "cls" / "d.mat", {"other": 1})
    Image.new("RGB", (9, 9)).save(tree / SBD / "img" / "e.jpg")
    add_sbd(tree, "val", {n: label_of(30) for n in "defgh"})
    savemat(tree / SBD / "cls" / "d.mat", {"other": 1})
    Image.new("RGB", (9, 9)).save(tree / SBD / "img" / "e.jpg")
    (tree / SBD / "cls" / "f.mat").write_bytes(b"damaged")
    image = tree / SBD / "img" / "g.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(image)
    image.write_bytes(image.read_bytes()[:2000])


REASONS = (
    r"the label has colours \(mode RGB\) instead of classes \(.*a\.png\)",
    r"labels 21 are none of the 21 classes, nor 255 \(.*b\.png\)",
    r"not a label of SBD, .*it holds GTcls \(.*c\.mat\)",
    r"not a label of SBD, .*it holds other \(.*d\.mat\)",
    r"the label has 16x12 pixels, its image 9x9 \(.*e\.mat\)",
    r"cannot read the label: .* \(.*f\.mat\)",
    r"cannot read the image: .* \(.*g\.jpg\)",
)


def test_all_that_is_wrong_is_told_at_once(tree):
    break_files(tree)
    data = voc_data(tree)
    with pytest.raises(UserError, match=r"^7 unusable of 8 items: " + "; ".join(REASONS)):
        data.setup("fit")
    data.setup("validate")  # whose files are whole


def test_each_file_tells_what_is_wrong_with_it(tree):
    break_files(tree)
    for entry, reason in zip(read_voc(tree, "train"), REASONS, strict=False):
        with pytest.raises(UserError, match=reason):
            read_pair(entry, 21)


def test_at_most_ten_offenders_are_named(tmp_path):
    add_voc(tmp_path, "train", {f"n{i:02}": np.full((3, 3), 9, np.uint8) for i in range(14)})
    with pytest.raises(UserError, match=r"^the first 10 unusable of 14 items") as told:
        check_entries(read_voc(tmp_path, "train"), num_classes=9)
    assert str(told.value).count(".png") == 10
    check_entries(read_voc(tmp_path, "train"), num_classes=10)


def test_unusable_items_are_left_out_on_demand(tree):
    break_files(tree)
    data = voc_data(tree, on_bad_item="skip", workers=0)
    data.setup("fit")  # nothing is decoded in advance
    batches = list(data.train_dataloader())
    assert [len(b.image) for b in batches] == [2, 2, 2, 2]
    assert set(data.bad_items["train"].reasons) == set(range(7))
    assert {int(i) for b in batches for i in b.index} == {7}
    stop = voc_data(tree, verify=False)
    stop.setup("fit")
    with pytest.raises(UserError, match=r"item \d of train cannot be used"):
        list(stop.train_dataloader())


def test_other_arrays_in_a_matlab_file(tmp_path):
    for array in (np.zeros((2, 3, 4)), np.full((2, 2), 300), np.zeros((2, 2))):
        savemat(tmp_path / "x.mat", {"GTcls": {"Segmentation": array}})
        with pytest.raises(UserError, match="not a class for every pixel"):
            read_label(tmp_path / "x.mat", 21)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "coco"}, "source must be one of generated, voc, got 'coco'"),
        ({"source": "voc"}, "source voc needs a folder"),
        ({"class_names": ["a", "b"]}, "classes of their own"),
        ({"source": "voc", "root": "x", "class_names": ["a"]}, "1 classes"),
        ({"eval_size": "full"}, "eval_size must be resized or original, got 'full'"),
        ({"part": "nobody"}, "part must be student or teacher"),
        ({"base_size": 4}, "base_size must be at least 8"),
        ({"crop_size": 4}, "crop_size must be at least 8"),
        ({"val_size": 0}, "val_size must be at least 1, got 0"),
        ({"train_size": 0}, "train_size must be at least 1"),
        ({"teacher_size": -1}, "teacher_size must be at least 1"),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(UserError, match=message):
        SegmentationData(**options)


# ------------------------------------------------------------------------------------ transforms


def halves(height: int = 40, width: int = 60) -> tuple[Image.Image, np.ndarray]:
    """Class 1, black, on the left and class 2, white, on the right."""
    label = np.ones((height, width), np.uint8)
    label[:, width // 3 :] = 2
    return Image.fromarray(np.where(label == 2, 255, 0).astype(np.uint8)).convert("RGB"), label


def training_pairs(count: int, transform: TrainTransform, *pair) -> list[Pair]:
    random.seed(0)
    return [transform(*pair) for _ in range(count)]


def test_image_and_label_move_together():
    flipped = 0
    for image, label in training_pairs(60, TrainTransform(32, 40), *halves()):
        assert image.shape == (3, 40, 40)
        assert label.shape == (40, 40)
        assert image.dtype == torch.float32
        assert label.dtype == torch.int64
        known = label != 255
        # away from where labels meet, here or outside the crop: resizing and blur reach across
        edge = torch.ones_like(known)
        edge[7:-7, 7:-7] = False
        change = (label[:, 1:] != label[:, :-1]).any(0).nonzero().flatten().tolist()
        for column in change:
            edge[:, max(0, column - 7) : column + 8] = True
        rows = (label[1:] != label[:-1]).any(1).nonzero().flatten().tolist()
        for row in rows:
            edge[max(0, row - 7) : row + 8] = True
        inside = known & ~edge
        wanted = (label == 2).float()
        assert torch.equal(image[:, inside], wanted[inside].expand(3, -1))
        flipped += int(label[0, 0] == 2)
    assert 0 < flipped < 60


def test_scales_crops_flips_and_blurs(monkeypatch):
    shorts: list[int] = []
    flips: list[object] = []
    radii: list[float] = []

    def watch_resize(image, short, *resample):
        shorts.append(short)
        return resize_short(image, short, *resample)

    def watch_blur(radius):
        radii.append(radius)
        return transforms_blur(radius)

    transforms_blur = transforms.ImageFilter.GaussianBlur
    mirror = transforms.ImageOps.mirror
    monkeypatch.setattr(transforms, "resize_short", watch_resize)
    monkeypatch.setattr(transforms.ImageFilter, "GaussianBlur", watch_blur)
    monkeypatch.setattr(transforms.ImageOps, "mirror", lambda x: (flips.append(x), mirror(x))[1])
    training_pairs(400, TrainTransform(32, 16), *halves())
    assert shorts[::2] == shorts[1::2]  # image and label
    assert (min(shorts), max(shorts)) == (16, 64)
    assert abs(np.mean(shorts) - 40) < 3  # uniform: 40 ± 14 / √400 · 4
    assert abs(len(flips) / 2 - 200) < 40
    assert abs(len(radii) - 200) < 40
    assert 0 <= min(radii) < 0.05
    assert 0.95 < max(radii) < 1
    assert abs(np.mean(radii) - 0.5) < 0.1


@pytest.mark.parametrize(("compat", "fill"), [(False, 255), (True, 0)])
def test_padding_is_black_and_not_learned(compat, fill):
    image, label = Image.new("RGB", (16, 16), (200, 200, 200)), np.full((16, 16), 3, np.uint8)
    transform = TrainTransform(32, 64, reference_compat=compat)
    padded = 0
    for pixels, classes in training_pairs(30, transform, image, label):
        side = int((classes[0] == 3).sum())
        outside = torch.ones(64, 64, dtype=torch.bool)
        outside[:side, :side] = False
        assert bool((classes[outside] == fill).all())
        assert bool((classes[~outside] == 3).all())
        far = outside.clone()
        far[: side + 5, : side + 5] = False  # the blur is the last step
        assert bool((pixels[:, far] == 0).all())
        padded += int(outside.any())
    assert padded > 20


def test_evaluation_resizes_the_short_side():
    image, label = halves(375, 500)
    pixels, classes = EvalTransform(513)(image, label)
    assert pixels.shape[1:] == classes.shape == (513, 684)
    wanted = np.asarray(image.resize((684, 513), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(pixels, np.moveaxis(wanted, 2, 0).astype(np.float32) / 255)
    nearest = [int((i + 0.5) * 500 / 684) for i in range(684)]
    np.testing.assert_array_equal(classes[0], label[0, nearest])
    pixels, classes = EvalTransform(513, resize_label=False)(image, label)
    assert pixels.shape == (3, 513, 684)
    np.testing.assert_array_equal(classes, label)


def test_the_long_side_is_rounded_down():
    for size, wanted in (
        ((500, 375), (684, 513)),
        ((375, 500), (513, 684)),
        ((500, 333), (770, 513)),
    ):
        assert resize_short(Image.new("L", size), 513).size == wanted
    square = Image.new("L", (30, 30))
    assert resize_short(square, 30) is square


# ------------------------------------------------------------------------------------ datamodule


def test_an_item_depends_on_its_key_alone(tree):
    first, again = voc_data(tree), voc_data(tree)
    first.setup("fit")
    again.setup("fit")
    a = first.train_dataset()[Draw(3, 2)]
    for index in (0, 1, 2):
        again.train_dataset()[Draw(1, index)]
    b = again.train_dataset()[Draw(3, 2)]
    assert all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True)
    )
    other = [again.train_dataset()[Draw(epoch, 2)].label for epoch in range(6)]
    assert len({tuple(label.flatten().tolist()) for label in other}) > 1
    seeded = voc_data(tree, seed=1)
    seeded.setup("fit")
    labels = [[d.train_dataset()[Draw(e, 2)].label for e in range(6)] for d in (again, seeded)]
    assert any(not torch.equal(x, y) for x, y in zip(*labels, strict=True))


def test_batches_from_disk(tree):
    data = voc_data(tree, crop_size=24)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 2  # of five items, the rest of the epoch's permutation is left out
    for batch in batches:
        assert isinstance(batch, SegmentationBatch)
        assert batch.image.shape == (2, 3, 24, 24)
        assert batch.label.shape == (2, 24, 24)
    for batch in data.val_dataloader():
        assert batch.image.shape == (1, 3, 16, 21)
        assert batch.label.shape == (1, 16, 21)
    assert [b.index.tolist() for b in data.still_loader()] == [[i] for i in range(5)]
    original = voc_data(tree, eval_size="original")
    original.setup("test")
    for batch, seed in zip(original.test_dataloader(), (3, 4), strict=True):
        assert batch.image.shape == (1, 3, 16, 21)
        np.testing.assert_array_equal(batch.label[0], label_of(seed))
    assert data.num_classes == 21
    assert not data.deterministic
    assert data.fingerprint() != data_without_sbd(tree).fingerprint()


def data_without_sbd(tree: Path) -> SegmentationData:
    data = voc_data(tree, crop_size=24, sbd=False)
    data.setup("fit")
    return data


def test_images_of_different_sizes_do_not_share_a_batch():
    class Item(SegmentationBatch):
        pass

    items = [Item(torch.zeros(3, 8, w), torch.zeros(8, w).long(), torch.tensor(0)) for w in (8, 9)]
    with pytest.raises(UserError, match=r"\(8, 8\) and \(8, 9\).*eval_batch_size 1"):
        collate_pairs(items)


def test_generated_images():
    data = SegmentationData(val_size=7, test_size=9, batch_size=16)
    data.setup()
    assert (data.num_classes, data.class_names) == (6, BLOB_CLASSES)
    assert data.deterministic
    sizes = [len(d) for d in (data.train_dataset(), data.val_dataset(), data.test_dataset())]
    assert sizes == [100, 7, 9]
    batches = list(data.train_dataloader())
    assert len(batches) == 6
    assert batches[0].image.shape == (16, 3, 24, 24)
    assert batches[0].label.shape == (16, 24, 24)
    (still,) = data.still_loader()
    assert still.index.tolist() == list(range(100))
    assert 0 <= float(still.image.min()) < float(still.image.max()) <= 1
    rows = {int(i): image for b in batches for i, image in zip(b.index, b.image, strict=True)}
    assert all(torch.equal(still.image[i], image) for i, image in rows.items())


def test_generated_sets_are_disjoint_and_reproducible():
    def sets(part: str) -> SegmentationData:
        data = SegmentationData(
            part=part, train_size=3, teacher_size=4, val_size=3, test_size=3, seed=len(part)
        )
        data.setup()
        return data

    student, again, teacher = sets("student"), sets("student"), sets("teacher")
    parts = [student.train_dataset(), teacher.train_dataset(), student.val_dataset()]
    images = [image for part in [*parts, student.test_dataset()] for image in part.fields.image]
    assert len({tuple(image.flatten().tolist()) for image in images}) == 3 + 4 + 3 + 3
    for name in ("train_dataset", "val_dataset", "test_dataset"):
        mine, other = getattr(student, name)().fields, getattr(again, name)().fields
        assert torch.equal(mine.image, other.image)
        assert torch.equal(mine.label, other.label)
    assert torch.equal(student.val_dataset().fields.image, teacher.val_dataset().fields.image)
    assert student.fingerprint() == again.fingerprint() != teacher.fingerprint()
    assert SegmentationData().hparams["teacher_size"] == 1500


def test_predicting_a_folder(tmp_path):
    for name, size in (("b.png", (30, 20)), ("a.jpg", (20, 30))):
        Image.new("RGB", size, (9, 9, 9)).save(tmp_path / name)
    data = SegmentationData(
        source="voc", base_size=16, eval_size="original", predict_root=str(tmp_path)
    )
    data.setup("predict")
    first, second = data.predict_dataloader()
    assert [p.name for p in data.predict_files] == ["a.jpg", "b.png"]
    assert first.image.shape == (1, 3, 24, 16)
    assert first.label.shape == (1, 30, 20)  # the size on disk
    assert second.image.shape == (1, 3, 16, 24)
    assert bool((second.label == 255).all())
    with pytest.raises(UserError, match="no such folder of images"):
        SegmentationData(predict_root=str(tmp_path / "none")).predict_dataloader()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image in the folder"):
        SegmentationData(predict_root=str(tmp_path / "empty")).predict_dataloader()


def test_an_entry_names_its_files(tree):
    entry = read_voc(tree, "val")[0]
    assert entry == SegmentationEntry(
        tree / VOC / "JPEGImages/v.jpg", tree / VOC / "SegmentationClass/v.png"
    )
