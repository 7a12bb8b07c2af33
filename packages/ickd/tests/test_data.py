"""Images of every source, in batches that are functions of their keys; every kind of bad input."""

import hashlib
import itertools
import os
import pickle
import shutil
import tempfile
from argparse import ArgumentError
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image, ImageOps
from torch import Tensor

from ickd.data import Batch, ImageData, offenders, write_parquet
from ickd.data import module as data_module
from ickd.data.contents import content_hash
from ickd.data.module import balanced
from ickd.data.pixels import PixelItems, Pixels, crop_and_flip, draw_crops
from ickd.module import fit_recipe
from ickd.synthetic import bound_gratings, grating_class_names
from tenfold.data import Draw
from tenfold.errors import UserError
from tenfold.training import mix


def photo(seed: int, size: tuple[int, int] = (40, 36), mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(seed)
    image = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    return image.convert(mode)


def pixels_of(image: Image.Image) -> Tensor:
    """(3, H, W) in 0..255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def eight_bits(image: Tensor) -> Tensor:
    """0..255 of pixels in 0..1, which must be whole numbers of 255ths."""
    scaled = image.double() * 255
    assert (scaled - scaled.round()).abs().max() < 1e-4
    return scaled.round().to(torch.uint8)


@pytest.fixture
def folders(tmp_path) -> Path:
    """train and validation with two classes of three pictures."""
    for split in ("train", "validation"):
        for label, name in enumerate(("ant", "bee")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for n in range(3):
                photo(10 * label + n).save(folder / f"{n}.png")
    return tmp_path


@pytest.fixture
def cifar100(tmp_path) -> Path:
    """cifar-100-python with 60 training and 10 test images of five classes."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 10)):
        data = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {b"data": data, b"fine_labels": [n % 5 for n in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {b"fine_label_names": [b"class %d" % k for k in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    return tmp_path


def planes(root: Path, split: str) -> Tensor:
    """(N, 3, 32, 32) of the pickle itself."""
    content = pickle.loads((root / "cifar-100-python" / split).read_bytes(), encoding="bytes")
    return torch.from_numpy(content[b"data"].reshape(-1, 3, 32, 32))


def made(source: str, root: Path | None = None, **options: object) -> ImageData:
    arguments = {"source": source, "root": None if root is None else str(root), "batch_size": 4}
    data = ImageData(**{**arguments, **options})
    data.setup()
    return data


def folder_data(root: Path, **options: object) -> ImageData:
    return made("imagefolder", root, **{"image_size": 32, **options})


def joined(batches: object) -> Batch:
    return Batch(*(torch.cat(field) for field in zip(*batches, strict=True)))


def epoch_of(data: ImageData, epoch: int = 0) -> Batch:
    """A training epoch, by index."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batch = joined(loader)
    loader.close()
    return Batch(*(field[batch.index.argsort()] for field in batch))


# ---- generated


def test_generated_batches_are_the_generators_own():
    data = made("generated", train_size=12, val_size=5, test_size=7)
    wanted = bound_gratings(7, 4)
    test = joined(data.test_dataloader())
    assert torch.equal(eight_bits(test.image), wanted.image)
    assert torch.equal(test.label, wanted.label)
    assert test.index.tolist() == list(range(7))
    train = epoch_of(data)
    assert train.index.tolist() == list(range(12))
    assert torch.equal(eight_bits(train.image), bound_gratings(12, 1).image)
    assert len(joined(data.val_dataloader()).label) == 5
    assert data.class_names == grating_class_names("coarse3")
    assert (data.num_classes, data.deterministic, data.image_size) == (3, True, 16)


def test_no_two_generated_sets_share_a_seed(monkeypatch):
    drawn = {}

    def recorded(count, seed, **options):
        drawn[seed] = [*drawn.get(seed, []), count]
        return bound_gratings(3, seed, **options)

    monkeypatch.setattr(data_module, "bound_gratings", recorded)
    monkeypatch.setattr(data_module.torch, "arange", lambda count: torch.zeros(3).long())
    for options in ({}, {"part": "teacher"}, {"part": "teacher", "classes": "fine16"}):
        data = made("generated", **options)
        for split in (data.train_dataset(), data.val_dataset(), data.test_dataset()):
            assert len(split) == 3
    assert sorted(drawn.values()) == [[500] * 3, [800], [2000] * 3, [5000, 4000]]


def test_the_classes_of_the_generated_task():
    for classes, number in (("coarse3", 3), ("coarse2", 2), ("fine16", 16)):
        data = made("generated", classes=classes, train_size=3, test_size=40)
        assert data.num_classes == number
        assert torch.equal(data.train_labels(), bound_gratings(3, 1, classes=classes).label)


# ---- CIFAR


def test_cifar_pixels_come_as_they_are(cifar100):
    data = made("cifar100", cifar100)
    test = joined(data.test_dataloader())
    assert torch.equal(eight_bits(test.image), planes(cifar100, "test"))
    assert float(test.image.min()) >= 0
    assert float(test.image.max()) == 1
    assert test.label.tolist() == [n % 5 for n in range(10)]
    assert torch.equal(eight_bits(epoch_of(data).image), planes(cifar100, "train"))
    assert data.num_classes == 100


@pytest.mark.parametrize("batch_size", [4, 12])
def test_crops_and_flips_are_those_of_their_keys(cifar100, batch_size):
    """Against PIL, image by image; neither batch nor place in it matters."""
    batch = epoch_of(made("cifar100", cifar100, augment="cifar", seed=5, batch_size=batch_size), 3)
    originals, crops = planes(cifar100, "train"), []
    for position, image in zip(batch.index.tolist(), eight_bits(batch.image), strict=True):
        (top,), (left,), (flip,) = draw_crops([mix(5, 3, position)], 4)
        padded = ImageOps.expand(
            Image.fromarray(originals[position].permute(1, 2, 0).numpy()), border=4, fill=0
        )
        wanted = padded.crop((int(left), int(top), int(left) + 32, int(top) + 32))
        wanted = ImageOps.mirror(wanted) if flip else wanted
        assert torch.equal(image, pixels_of(wanted))
        crops.append((int(top), int(left), int(flip)))
    assert len(set(crops)) > 40


def test_workers_and_epochs(cifar100):
    def read(workers: int, epoch: int) -> Tensor:
        return epoch_of(made("cifar100", cifar100, augment="cifar", workers=workers), epoch).image

    torch.manual_seed(1)
    first = read(0, 2)
    torch.manual_seed(2)
    assert torch.equal(first, read(0, 2))
    assert torch.equal(first, read(2, 2))
    assert not torch.equal(first, read(0, 3))


def test_every_crop_is_as_likely_as_any_other():
    numbers = [mix(0, epoch, index) for epoch in range(5) for index in range(1620)]
    top, left, flip = draw_crops(numbers, 4)
    counts = torch.bincount((top * 9 + left) * 2 + flip, minlength=162).double()
    expected = len(numbers) / 162
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == 162
    assert abs(chi2 - 161) < 4 * (2 * 161) ** 0.5  # four standard deviations of chi-square


def test_one_pixel_moves_to_where_the_crop_says():
    image = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    image[:, :, 2, 5] = 9
    top, left, flip = (torch.tensor(x) for x in ([2, 0, 4], [2, 1, 2], [0, 0, 1]))
    moved = crop_and_flip(image, top, left, flip, 2)
    places = [tuple(one[0].nonzero()[0].tolist()) for one in moved]
    assert places == [(2, 5), (4, 6), (0, 2)]  # unmoved; down 2, right 1; up 2, mirrored
    assert int(moved.count_nonzero()) == 9


def test_cifar_at_another_size_is_resized(cifar100):
    data = made("cifar100", cifar100, image_size=48)
    first = Image.fromarray(planes(cifar100, "test")[0].permute(1, 2, 0).numpy())
    image = joined(data.test_dataloader()).image
    assert image.shape == (10, 3, 48, 48)
    assert torch.equal(eight_bits(image[0]), pixels_of(first.resize((48, 48), Image.BILINEAR)))
    assert epoch_of(made("cifar100", cifar100, image_size=48, augment="imagenet")).image.shape == (
        60, 3, 48, 48,
    )  # fmt: skip


# ---- photographs


def test_image_folders(folders):
    data = folder_data(folders)
    assert data.class_names == ("ant", "bee")
    [batch] = data.test_dataloader()
    assert batch.label.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.index.tolist() == list(range(6))
    wanted = photo(11).resize((32, 32), Image.Resampling.BILINEAR)
    assert torch.equal(eight_bits(batch.image[4]), pixels_of(wanted))


def test_evaluation_crops_the_centre(folders):
    """Short side to 256, centre 224, as a photograph is usually measured."""
    photo(1, (400, 300)).save(folders / "validation" / "ant" / "0.png")
    data = made("imagenet", folders)
    image = next(iter(data.val_dataloader())).image[0]
    resized = photo(1, (400, 300)).resize((341, 256), Image.Resampling.BILINEAR)
    assert torch.equal(eight_bits(image), pixels_of(resized.crop((58, 16, 282, 240))))
    whole = made("imagenet", folders, crop_pct=1.0, image_size=100)
    resized = photo(1, (400, 300)).resize((133, 100), Image.Resampling.BILINEAR)
    image = next(iter(whole.val_dataloader())).image[0]
    assert torch.equal(eight_bits(image), pixels_of(resized.crop((16, 0, 116, 100))))


@pytest.mark.parametrize("augment", ["cifar", "imagenet"])
def test_augmented_photographs_depend_on_their_key_alone(folders, augment):
    def read(workers: int, epoch: int) -> Batch:
        options = {"augment": augment, "workers": workers, "batch_size": 3}
        return epoch_of(folder_data(folders, **options), epoch)

    first = read(0, 3)
    assert torch.equal(first.image, read(0, 3).image)
    assert not torch.equal(first.image, read(0, 4).image)
    if augment == "cifar":
        assert torch.equal(first.image, read(2, 3).image)
    items = folder_data(folders, augment=augment).train_dataset()
    assert torch.equal(items[Draw(3, 2)].image, first.image[2])
    assert 0 <= float(first.image.min()) <= float(first.image.max()) <= 1


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_augmented_photograph_is_a_window_on_the_padded_one(folders, in_memory):
    options = {"augment": "cifar", "image_size": 16, "batch_size": 6, "in_memory": in_memory}
    data = folder_data(folders, **options)
    still = eight_bits(joined(data.still_loader()).image)
    for position, image in enumerate(eight_bits(epoch_of(data, 1).image)):
        padded = torch.zeros(3, 20, 20, dtype=torch.uint8)
        padded[:, 2:18, 2:18] = still[position]
        windows = [
            padded[:, y : y + 16, x : x + 16] for y, x in itertools.product(range(5), repeat=2)
        ]
        assert any(torch.equal(image, w) or torch.equal(image, w.flip(2)) for w in windows)


def test_random_parts_of_a_photograph(folders):
    """Bright left half, dark right half: parts differ, and some are mirrored."""
    halves = Image.new("RGB", (60, 40))
    halves.paste((255, 255, 255), (0, 0, 30, 40))
    for file in (folders / "train").rglob("*.png"):
        halves.save(file)
    data = folder_data(folders, augment="imagenet")
    images = torch.cat([epoch_of(data, epoch).image[:, 0] for epoch in range(10)])
    brighter_left = images[:, :, 0].mean(1) > images[:, :, -1].mean(1)
    brighter_right = images[:, :, 0].mean(1) < images[:, :, -1].mean(1)
    assert int(brighter_left.sum()) > 8
    assert int(brighter_right.sum()) > 8
    assert images.mean((1, 2)).std() > 0.1


@pytest.mark.parametrize(("size", "workers"), [(24, 2), (80, 0)])
def test_images_in_memory_are_those_of_the_files(folders, size, workers):
    """Bit for bit, also where the centre is cropped, and whoever decodes them."""
    files = folder_data(folders, image_size=size)
    memory = folder_data(folders, image_size=size, in_memory=True, workers=workers)
    for split in ("test_dataloader", "still_loader"):
        ours, theirs = (joined(getattr(data, split)()) for data in (memory, files))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert isinstance(memory.test_dataset(), PixelItems)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1"])
def test_every_colour_mode_becomes_rgb(folders, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    (folders / "validation" / "ant" / "0.png").unlink()
    photo(5, (32, 32), mode).save(folders / "validation" / "ant" / f"0.{suffix}")
    [batch] = folder_data(folders).test_dataloader()
    wanted = pixels_of(photo(5, (32, 32), mode).convert("RGB"))
    assert torch.equal(eight_bits(batch.image[0]), wanted)


# ---- parquet


@pytest.mark.parametrize("in_memory", [False, True])
def test_generated_images_survive_parquet_bit_by_bit(tmp_path, in_memory):
    splits = {"train": bound_gratings(9, 1), "test": bound_gratings(5, 4)}
    write_parquet(splits, tmp_path / "new", grating_class_names())
    data = made("parquet", tmp_path / "new", image_size=16, batch_size=3, in_memory=in_memory)
    direct = made("generated", train_size=9, test_size=5, batch_size=3)
    assert data.class_names == direct.class_names
    for ours, theirs in (
        (epoch_of(data), epoch_of(direct)),
        (joined(data.test_dataloader()), joined(direct.test_dataloader())),
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.skipif("TENFOLD_DATA" not in os.environ, reason="TENFOLD_DATA is not set")
def test_real_cifar10_in_parquet():
    root = Path(os.environ["TENFOLD_DATA"]) / "cifar10"
    data = made("parquet", root, image_size=32, augment="cifar", subset=50, batch_size=50)
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    assert len(data.train_labels()) == 20_000
    assert len(data.test_dataset()) == 10_000
    batch = epoch_of(data)
    assert batch.label.bincount().tolist() == [5] * 10
    assert torch.equal(batch.label, data.train_labels()[batch.index])
    assert 0.3 < float(batch.image.mean()) < 0.6


# ---- parts of the training split


def test_a_subset_has_as_many_of_each_class_as_can_be(cifar100):
    def chosen(count: int, seed: int = 0, **options: object) -> Batch:
        return epoch_of(made("cifar100", cifar100, subset=count, seed=seed, **options))

    some = chosen(12)
    assert sorted(some.label.bincount().tolist()) == [2, 2, 2, 3, 3]
    assert torch.equal(eight_bits(some.image), planes(cifar100, "train")[some.index])
    assert set(some.index.tolist()) < set(chosen(20).index.tolist())
    assert some.index.tolist() != chosen(12, seed=1).index.tolist()
    assert len(chosen(60).index) == 60
    with pytest.raises(UserError, match="a subset of 61 is more than the 60 images there"):
        chosen(61)
    with pytest.raises(UserError, match="more than the 54 images there"):
        chosen(55, val_split=0.1)


def test_a_class_that_runs_out_leaves_its_turns_to_the_others():
    labels = [0, 0, 0, 0, 1, 2, 2]
    taken = balanced([6, 3, 4, 0, 2, 5, 1], labels, 6)
    assert sorted(labels[row] for row in taken) == [0, 0, 0, 1, 2, 2]
    assert taken[:3] == [6, 3, 4]


@pytest.mark.parametrize("size", [32, 33])
def test_validation_images_are_kept_out_of_training(cifar100, size):
    data = made("cifar100", cifar100, val_split=0.1, subset=20, image_size=size)
    held = joined(data.val_dataloader())
    trained = epoch_of(data)
    assert len(held.index) == 6
    assert len(trained.index) == 20
    assert not set(held.index.tolist()) & set(trained.index.tolist())
    labels = data.train_labels()
    for batch in (held, trained):
        assert torch.equal(batch.label, labels[batch.index])
    with pytest.raises(UserError, match="60 training images is less than one"):
        made("cifar100", cifar100, val_split=0.001).train_dataset()


def test_a_validation_folder_beside_a_test_folder_is_used(folders):
    (folders / "test").mkdir()
    for name in ("ant", "bee"):
        (folders / "test" / name).mkdir()
        photo(99).save(folders / "test" / name / "0.png")
    data = folder_data(folders, val_split=0.4)
    sizes = [len(d) for d in (data.train_dataset(), data.val_dataset(), data.test_dataset())]
    assert sizes == [6, 6, 2]


def test_the_still_loader_has_the_whole_training_split_in_order(cifar100):
    data = made("cifar100", cifar100, augment="cifar", val_split=0.2, subset=10)
    batch = joined(data.still_loader())
    assert batch.index.tolist() == list(range(60))
    assert torch.equal(eight_bits(batch.image), planes(cifar100, "train"))
    assert torch.equal(batch.label, data.train_labels())
    assert not data.deterministic
    with pytest.raises(UserError, match="needs every training image"):
        made("cifar100", cifar100, on_bad_item="skip").still_loader()


def test_a_fingerprint_tells_other_training_images(folders, tmp_path_factory):
    def told(root: Path = folders, **options: object) -> dict:
        return folder_data(root, **options).fingerprint()

    first = told()
    assert first == told(in_memory=True) == told(batch_size=2, seed=3, subset=2)
    assert first != told(image_size=33)
    assert told(image_size=65) != told(image_size=65, crop_pct=0.9)
    copy = shutil.copytree(folders, tmp_path_factory.mktemp("elsewhere") / "copy")
    assert first == told(copy)  # files keep their times
    photo(77).save(folders / "validation" / "ant" / "0.png")
    assert first == told()
    photo(77).save(folders / "train" / "ant" / "0.png")
    assert first["images"] != told()["images"]
    (folders / "train" / "ant" / "1.png").rename(folders / "train" / "bee" / "00.png")
    assert first["labels"] != told()["labels"]
    generated = [made("generated", part=part, teacher_size=800) for part in ("student", "teacher")]
    assert generated[0].fingerprint()["images"] != generated[1].fingerprint()["images"]


def test_every_image_counts_in_a_fingerprint(tmp_path):
    """Of many images too, in each kind of source; the same again of the same images."""
    pixels = np.random.default_rng(0).integers(0, 256, (600, 3, 32, 32), dtype=np.uint8)
    labels = torch.arange(600) % 2
    changed, one = pixels.copy(), pixels.copy()
    changed[1::2] = 255 - changed[1::2]
    one[17, 2, 31, 31] ^= 1

    def of_cifar(images: np.ndarray) -> str:
        folder = tmp_path / "cifar-100-python"
        folder.mkdir(exist_ok=True)
        content = {b"data": images.reshape(600, -1), b"fine_labels": labels.tolist()}
        for split in ("train", "test"):
            (folder / split).write_bytes(pickle.dumps(content, protocol=2))
        (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"a", b"b"]}))
        return made("cifar100", tmp_path).fingerprint()["images"]

    def of_parquet(images: np.ndarray) -> str:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        splits = dict.fromkeys(("train", "test"), (torch.from_numpy(images[:20]), labels[:20]))
        write_parquet(splits, folder, ("a", "b"))
        return made("parquet", folder, image_size=32).fingerprint()["images"]

    for told in (of_cifar, of_parquet):
        assert len({told(images) for images in (pixels, changed, one)}) == 3
        assert told(pixels) == told(pixels.copy())
    rows = pixels.transpose(0, 2, 3, 1)
    assert of_cifar(pixels) == hashlib.sha256(rows.tobytes()).hexdigest()[:16]


def test_a_fingerprint_of_files_knows_size_time_and_place(tmp_path):
    def told() -> str:
        return content_hash([file, {"bytes": None, "path": str(other)}], tmp_path)

    def write(path: Path, content: bytes = b"1234", nanoseconds: int = 10**9) -> None:
        path.write_bytes(content)
        os.utime(path, ns=(0, nanoseconds))

    file, other = tmp_path / "a.png", tmp_path / "b.png"
    write(file)
    write(other)
    first = told()
    facts = b"a.png\x004\x001000000000\nb.png\x004\x001000000000\n"
    assert first == hashlib.sha256(facts).hexdigest()[:16]
    write(other, nanoseconds=10**9 + 1000)
    assert told() != first
    write(other, b"12345")
    assert told() != first
    write(other)
    assert told() == first
    other.unlink()
    with pytest.raises(UserError, match=r"cannot read the image: No such file .*b\.png"):
        told()


# ---- without labels


def test_images_without_labels(folders):
    photo(3).save(folders / "loose.png")
    data = made("images", folders, image_size=32, batch_size=13)
    batch = epoch_of(data)
    assert batch.image.shape == (13, 3, 32, 32)
    assert batch.label.tolist() == data.train_labels().tolist() == [-1] * 13
    assert (data.num_classes, data.class_names) == (0, ())
    assert len(epoch_of(made("images", folders, image_size=32, subset=5)).index) == 4
    for loader in (data.val_dataloader, data.test_dataloader):
        with pytest.raises(UserError, match="this data has no"):
            loader()
    with pytest.raises(UserError, match="without labels cannot validate"):
        made("images", folders, val_split=0.1)
    (folders / "empty").mkdir()
    with pytest.raises(UserError, match="no image in the folder"):
        made("images", folders / "empty")


@pytest.mark.parametrize("in_memory", [False, True])
def test_another_source_can_validate(folders, tmp_path_factory, in_memory):
    loose = tmp_path_factory.mktemp("loose")
    photo(3).save(loose / "a.png")
    other = {"eval_source": "imagefolder", "eval_root": str(folders), "in_memory": in_memory}
    data = made("images", loose, image_size=32, **other)
    assert data.class_names == ("ant", "bee")
    assert data.train_labels().tolist() == [-1]
    wanted = joined(folder_data(folders).val_dataloader())
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert all(torch.equal(a, b) for a, b in zip(joined(loader), wanted, strict=True))
    assert len(made("imagefolder", folders, **other).train_dataset()) == 6
    for split in ("train", "test"):
        table = {split: bound_gratings(6, 1)}
        write_parquet(table, loose, ("bee", "ant", "cow"))
    with pytest.raises(UserError, match="source and eval_source differ: cow"):
        made("parquet", loose, **other)


def test_the_same_classes_in_another_order_are_refused(folders, tmp_path_factory):
    tables = tmp_path_factory.mktemp("tables")
    table = bound_gratings(6, 1, classes="coarse2")
    write_parquet({"train": table, "test": table}, tables, ("bee", "ant"))
    with pytest.raises(UserError, match="source and eval_source differ: their order"):
        made("parquet", tables, eval_source="imagefolder", eval_root=str(folders))


# ---- bad input


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_unreadable_images_are_named_or_counted(folders, damage, in_memory, caplog):
    for split in ("train", "validation"):
        file = folders / split / "bee" / "1.png"
        whole = file.read_bytes()
        file.write_bytes({"empty": b"", "truncated": whole[:200], "text": b"no image"}[damage])
    data = folder_data(folders, in_memory=in_memory, batch_size=6)
    with pytest.raises(UserError, match=r"bee.1\.png"):
        list(data.test_dataloader())
    with pytest.raises(UserError, match=r"bee.1\.png"):
        epoch_of(data)
    data = folder_data(folders, on_bad_item="skip", in_memory=in_memory, batch_size=5)
    [batch] = data.test_dataloader()
    assert batch.index.tolist() == [0, 1, 2, 3, 5]
    assert "1 of 6 items" in caplog.text
    batch = next(iter(data.train_dataloader()))
    assert 4 not in batch.index.tolist()
    assert torch.equal(batch.label, data.train_labels()[batch.index])


def truncate(*files: Path) -> None:
    for file in files:
        file.write_bytes(file.read_bytes()[:200])


@pytest.mark.parametrize(("in_memory", "workers"), [(False, 0), (False, 2), (True, 0)])
def test_all_unreadable_images_are_named_at_once(folders, in_memory, workers):
    bad = ["ant/2.png", "bee/0.png", "bee/1.png"]
    truncate(*(folders / "train" / name for name in bad))
    data = folder_data(folders, in_memory=in_memory, workers=workers, batch_size=2)
    with pytest.raises(UserError, match=r"^3 unusable of 6 items: cannot read the") as told:
        list(data.train_dataloader())
    line = str(told.value)
    assert all(name in line for name in bad)
    assert line.count(".png") == 3
    assert line.endswith("leave such items out with --data.on_bad_item skip")
    assert len(joined(data.test_dataloader()).label) == 6


def test_at_most_ten_unreadable_images_are_named(folders):
    for n in range(100, 112):
        (folders / "train" / "ant" / f"{n}.png").write_bytes(b"no image")
    data = folder_data(folders, batch_size=18)
    with pytest.raises(UserError, match=r"^the first 10 unusable of 18 items: ") as told:
        list(data.train_dataloader())
    assert str(told.value).count(".png") == 10


def test_only_images_that_are_used_are_looked_at(folders):
    data = folder_data(folders, subset=3, batch_size=1)
    kept = data.train_dataset().indices
    files = sorted((folders / "train").rglob("*.png"))
    truncate(*files)
    with pytest.raises(UserError, match=r"^3 unusable of 3 items: ") as told:
        list(data.train_dataloader())
    assert all((str(file) in str(told.value)) is (n in kept) for n, file in enumerate(files))


def test_looking_for_unreadable_images_has_an_end(folders, monkeypatch):
    monkeypatch.setattr(offenders, "_LONGEST", -1.0)
    truncate(folders / "train" / "bee" / "2.png", folders / "train" / "bee" / "1.png")
    items = "1 unusable of 6 items, of which 1 were read: cannot read the image"
    with pytest.raises(UserError, match=f"^{items}"):
        list(folder_data(folders, batch_size=1).train_dataloader())


def test_a_split_of_which_nothing_can_be_read(folders):
    for file in (folders / "train").rglob("*.png"):
        file.write_bytes(b"")
    data = folder_data(folders, on_bad_item="skip", in_memory=True)
    with pytest.raises(UserError, match="no image of train is usable"):
        data.train_dataset()


def test_missing_and_half_unpacked_roots_show_the_tree(tmp_path, cifar100, folders):
    for source in ("imagenet", "imagefolder", "cifar10", "cifar100", "parquet"):
        with pytest.raises(UserError, match="expected") as caught:
            made(source, tmp_path / "nowhere")
        assert str(tmp_path / "nowhere") in str(caught.value)
    with pytest.raises(UserError, match="no such folder of images"):
        made("images", tmp_path / "nowhere")
    (cifar100 / "cifar-100-python" / "meta").unlink()
    with pytest.raises(UserError, match="meta missing"):
        made("cifar100", cifar100)
    (folders / "validation" / "cat").mkdir()
    with pytest.raises(UserError, match="differ: cat"):
        folder_data(folders)


def test_labels_out_of_range_are_named(tmp_path):
    images = bound_gratings(4, 1).image
    for name, labels in (("train", [0, 1, 1, 0]), ("test", [0, 1, 2, 0])):
        write_parquet({name: (images, torch.tensor(labels))}, tmp_path, ("a", "b", "c"))
    assert made("parquet", tmp_path, image_size=16).num_classes == 3
    content = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1, 100]}
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test"):
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(content))
    meta = {b"fine_label_names": [b"%d" % k for k in range(100)]}
    (tmp_path / "cifar-100-python" / "meta").write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match=r"label 100 of image 1 lies outside 0\.\.99"):
        made("cifar100", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "mnist"}, "source must be one of generated, imagenet, .*images, got 'mnist'"),
        ({"source": "cifar10"}, r"source cifar10 needs a folder: give --data\.root DIR"),
        ({"augment": "cifar"}, "generated images are not augmented"),
        ({"source": "cifar10", "root": ".", "augment": "mixup"}, "none, cifar, imagenet"),
        ({"source": "cifar10", "root": ".", "augment": "imagenet", "in_memory": True}, "whole"),
        ({"image_size": 4}, "image_size must be at least 8, got 4"),
        ({"crop_pct": 0}, "crop_pct must be above 0"),
        ({"val_split": 1.0}, "share that leaves training images"),
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"teacher_size": 0}, "teacher_size must be at least 1"),
        ({"test_size": -1}, "test_size must be at least 1"),
        ({"subset": 0}, "subset must be at least 1"),
        ({"mean": [0.5], "std": [1, 1, 1]}, "a number for each of 3 colours"),
        ({"std": [1, 1, 0]}, "std above 0"),
        ({"eval_source": "cifar10"}, "eval_source and eval_root go together"),
        ({"source": "images", "root": ".", "eval_root": "."}, "go together"),
        ({"eval_source": "cifar10", "eval_root": "."}, "have validation and test images"),
        (
            {"source": "images", "root": ".", "eval_source": "generated", "eval_root": "."},
            "eval_source must be one of imagenet",
        ),
        ({"batch_size": 0}, "at least one item"),
    ],
)
def test_bad_options_are_told_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        ImageData(**options)
    assert "\n" not in str(caught.value)


def test_predict_reads_a_folder_of_ones_own(folders):
    data = ImageData("imagenet", image_size=32, predict_root=str(folders / "train"))
    data.setup("predict")
    [batch] = data.predict_dataloader()
    assert batch.image.shape == (6, 3, 32, 32)
    assert batch.label.tolist() == [-1] * 6
    assert [file.name for file in data.predict_files[:3]] == ["0.png", "1.png", "2.png"]
    assert len(joined(folder_data(folders).predict_dataloader()).label) == 6
    with pytest.raises(UserError, match="no such folder"):
        folder_data(folders, predict_root="nowhere").predict_dataset()
    (folders / "none").mkdir()
    with pytest.raises(UserError, match="no image in the folder"):
        folder_data(folders, predict_root=str(folders / "none")).predict_dataset()


# ---- facts and options


def test_statistics_of_the_sources(folders):
    for source, mean, std in (
        ("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("images", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ):
        data = ImageData(source, root=".")
        assert (data.mean, data.std) == (mean, std)
    assert ImageData("parquet", root=".", mean=[0.1, 0.2, 0.3]).mean == (0.1, 0.2, 0.3)
    data = made("generated")
    pixels = joined(data.still_loader()).image
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(data.mean, abs=0.01)
    values = (pixels - 0.5) / torch.tensor(data.std).view(3, 1, 1)
    assert 0.5 < float(values.std()) < 2  # of the order of the generator's own values


@pytest.mark.parametrize("recipe", ["cifar10-cpu", "cifar10-cpu-teacher"])
def test_the_recipes_data_and_networks_agree_on_the_normalisation(recipe, tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
    splits = dict.fromkeys(("train", "test"), (torch.from_numpy(noise), torch.arange(64) % 10))
    write_parquet(splits, tmp_path / "images", [str(k) for k in range(10)])
    options = {"epochs": 1, "progress": False, "accelerator": "cpu"}
    data = {"root": str(tmp_path / "images"), "batch_size": 32}
    module, images = fit_recipe(recipe, tmp_path / "run", data=data, **options)
    assert "normalises by" not in caplog.text
    for network in (module.student, module.teacher):
        assert network is None or (images.mean, images.std) == network.expects[:2]


def test_the_command_line_knows_the_options():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageData, "data")
    words = ["--data.classes=fine16", "--data.part=teacher", "--data.subset=5"]
    data = parser.instantiate(parser.parse_args([*words, "--data.mean=[0,0,0]"])).data
    assert data.hparams["subset"] == 5
    assert data.mean == (0, 0, 0)
    for word in ("classes=fine9", "part=both"):
        with pytest.raises(ArgumentError, match=word.partition("=")[0]):
            parser.parse_args([f"--data.{word}"])


def test_pixel_items_give_single_items_too():
    image = torch.arange(2 * 3 * 64, dtype=torch.uint8).reshape(2, 3, 8, 8)
    items = PixelItems(Pixels(image, torch.tensor([4, 5]), torch.tensor([7, 9])), pad=1, seed=2)
    one, batch = items[Draw(3, 1)], items.__getitems__([Draw(3, 0), Draw(3, 1)])
    assert torch.equal(one.image, batch.image[1])
    assert (int(one.label), int(one.index)) == (5, 9)
