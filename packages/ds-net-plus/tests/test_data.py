"""Every source from files made here, every kind of bad file, and determinism."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ds_net_plus.data import ImageData, write_cifar10, write_parquet
from ds_net_plus.data.writers import to_uint8
from ds_net_plus.synthetic import MEAN, STD, glyph_mix
from tenfold.data import Draw
from tenfold.errors import UserError


def photo(seed: int, size: tuple[int, int] = (40, 36), mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(seed)
    image = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    return image.convert(mode)


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


def folder_data(root: Path, **options: object) -> ImageData:
    arguments = {"source": "imagefolder", "root": str(root), "image_size": 32, "batch_size": 4}
    return ImageData(**{**arguments, **options})


def test_generated_batches_are_the_generators_own():
    data = ImageData(train_size=20, val_size=6, test_size=7, batch_size=5)
    data.setup()
    [batch] = data.test_loader()
    glyphs = glyph_mix(7, 99)
    assert torch.equal(batch.image, glyphs.image)
    assert torch.equal(batch.label, glyphs.label)
    assert torch.equal(batch.hard, glyphs.hard)
    epoch = [batch.index for batch in data.train_dataloader()]
    assert sorted(torch.cat(epoch).tolist()) == list(range(20))
    assert data.num_classes == 10


def test_gate_and_validation_parts_are_kept_out_of_training():
    data = ImageData(train_size=100, val_size=5, test_size=5, gate_split=0.2, val_split=0.1)
    data.setup()
    parts = [
        torch.cat([batch.index for batch in loader]).tolist()
        for loader in (data.gate_loader(), data.calibration_loader())
    ]
    train = {data.train_dataset().indices[i] for i in range(len(data.train_dataset()))}
    assert [len(parts[0]), len(parts[1]), len(train)] == [20, 10, 70]
    assert sorted([*parts[0], *parts[1], *train]) == list(range(100))
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.image, data._glyphs["train"].fields.image[batch.index])
    gate = ImageData(**{**data.hparams, "train_on": "gate"})
    gate.setup()
    assert gate.train_dataset().indices == parts[0]


def test_image_folders(folders):
    data = folder_data(folders)
    data.setup()
    assert data.class_names == ("ant", "bee")
    [batch] = data.test_loader()
    assert batch.image.shape == (6, 3, 32, 32)
    assert batch.label.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.hard is None


def test_evaluation_normalises_with_the_imagenet_statistics(folders):
    Image.new("RGB", (32, 32), (255, 0, 128)).save(folders / "validation" / "ant" / "0.png")
    data = folder_data(folders)
    data.setup()
    pixel = next(iter(data.test_loader())).image[0, :, 16, 16]
    expected = (np.array([255, 0, 128]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.allclose(pixel.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("augment", ["light", "rand-m7", "imagenet"])
def test_augmentation_depends_on_seed_epoch_and_index_alone(folders, augment):
    def read(workers: int, epoch: int) -> torch.Tensor:
        data = folder_data(folders, augment=augment, workers=workers, batch_size=6)
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        [batch] = loader
        return batch.image[batch.index.argsort()]

    torch.manual_seed(1)
    first = read(0, 3)
    torch.manual_seed(2)
    assert torch.equal(first, read(0, 3))
    assert not torch.equal(first, read(0, 4))
    if augment == "light":
        assert torch.equal(first, read(2, 3))
    data = folder_data(folders, augment=augment)
    data.setup()
    items = data.train_dataset()
    assert torch.equal(items[Draw(3, 2)].image, first[2])


def test_parquet_round_trip_equals_the_generator_within_eight_bits(tmp_path):
    write_parquet(tmp_path, train=12, test=6, size=32)
    data = ImageData(source="parquet", root=str(tmp_path), image_size=32, channels=1)
    data.setup()
    [batch] = data.test_loader()
    glyphs = glyph_mix(6, 99)
    wanted = (glyphs.image * STD + MEAN).clamp(0, 1)
    assert (batch.image * STD + MEAN - wanted).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(batch.label, glyphs.label)
    assert data.class_names == tuple(f"glyph {c}" for c in range(10))


@pytest.mark.parametrize("keys", ["bytes", "str"])
def test_cifar10_layout_round_trip(tmp_path, keys):
    write_cifar10(tmp_path, train=11, test=4)
    folder = tmp_path / "cifar-10-batches-py"
    if keys == "str":
        for path in folder.iterdir():
            content = pickle.loads(path.read_bytes(), encoding="bytes")
            text = {k.decode(): v for k, v in content.items()}
            path.write_bytes(pickle.dumps(text, protocol=4))
    data = ImageData(source="cifar10", root=str(tmp_path))
    data.setup()
    [batch] = data.test_loader()
    glyphs = glyph_mix(4, 99)
    assert torch.equal(batch.label, glyphs.label)
    red = (batch.image[:, 0] * 0.229 + 0.485) * 255
    assert np.allclose(red.numpy(), to_uint8(glyphs.image), atol=1e-3)
    assert len(data.train_dataset()) == 11


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1"])
def test_every_colour_mode_becomes_rgb(folders, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    (folders / "validation" / "ant" / "0.png").unlink()
    photo(5, mode=mode).save(folders / "validation" / "ant" / f"0.{suffix}")
    data = folder_data(folders)
    data.setup()
    [batch] = data.test_loader()
    expected = photo(5, mode=mode).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    pixels = batch.image[0] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = pixels + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    assert np.allclose(pixels.permute(1, 2, 0).numpy() * 255, np.asarray(expected), atol=1e-3)


def test_sixteen_bits_are_scaled_not_clipped(folders):
    file = folders / "validation" / "ant" / "0.png"
    Image.fromarray(np.full((32, 32), 32896, np.uint16)).save(file)
    data = folder_data(folders)
    data.setup()
    pixel = next(iter(data.test_loader())).image[0, 0, 3, 3]
    assert float(pixel * 0.229 + 0.485) == pytest.approx(128 / 255, abs=1e-5)


def test_images_smaller_than_the_network_are_enlarged(folders):
    photo(5, size=(9, 7)).save(folders / "validation" / "ant" / "0.png")
    data = folder_data(folders)
    data.setup()
    assert next(iter(data.test_loader())).image.shape == (6, 3, 32, 32)


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_unreadable_images_are_named_or_counted(folders, damage, caplog):
    file = folders / "validation" / "bee" / "1.png"
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "truncated": whole[:200], "text": b"no image"}[damage])
    data = folder_data(folders)
    data.setup()
    with pytest.raises(UserError, match=r"bee.1\.png"):
        list(data.test_loader())
    data = folder_data(folders, on_bad_item="skip")
    data.setup()
    [batch] = data.test_loader()
    assert batch.index.tolist() == [0, 1, 2, 3, 5]
    assert "1 of 6 items" in caplog.text


def test_bad_options_and_labels_are_named(tmp_path):
    for options, message in (
        ({"source": "mnist"}, "generated, imagenet"),
        ({"source": "cifar10"}, "--data.root"),
        ({"augment": "mixup"}, "light"),
        ({"gate_split": 0.7, "val_split": 0.4}, "shares"),
    ):
        with pytest.raises(UserError, match=message):
            ImageData(**options)
    with pytest.raises(UserError, match="not augmented"):
        ImageData(augment="light").setup()
    for options, message in (
        ({"image_size": 4}, "image_size must be at least 8"),
        ({"channels": 2}, "channels must be 1"),
        ({"test_size": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            ImageData(**options)


@pytest.mark.parametrize("augment", ["none", "light", "rand-m7"])
def test_photographs_in_grey(folders, augment):
    data = folder_data(folders, channels=1, augment=augment)
    data.setup()
    assert next(iter(data.train_dataloader())).image.shape == (4, 1, 32, 32)


def test_predict_reads_a_folder_of_ones_own(folders):
    data = folder_data(folders, predict_root=str(folders / "train"))
    data.setup()
    [batch] = data.predict_dataloader()
    assert len(batch.image) == 6
    assert data.predict_files[0].name == "0.png"
    with pytest.raises(UserError, match="no such folder"):
        folder_data(folders, predict_root="nowhere").predict_dataset()


def test_predict_needs_no_data_set_beside_the_folder(folders):
    data = ImageData("imagenet", image_size=32, predict_root=str(folders / "train"))
    data.setup("predict")
    [batch] = data.predict_dataloader()
    assert batch.image.shape == (6, 3, 32, 32)
    with pytest.raises(UserError, match=r"--data.root"):
        ImageData("imagenet")


@pytest.mark.skipif("TENFOLD_DATA" not in os.environ, reason="TENFOLD_DATA is not set")
def test_real_cifar10_in_parquet():
    root = Path(os.environ["TENFOLD_DATA"]) / "cifar10"
    data = ImageData(source="parquet", root=str(root), image_size=32, augment="light")
    data.setup()
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    assert len(data.train_dataset()) == 20_000
    assert len(data.test_dataset()) == 10_000
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (128, 3, 32, 32)
    assert float(batch.image.abs().max()) < 4


def test_a_validation_folder_beside_a_test_folder_is_used(tmp_path):
    for split, count in (("train", 20), ("val", 3), ("test", 4)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{n}.png")
    options = {"source": "imagefolder", "root": str(tmp_path), "image_size": 8, "val_split": 0.1}
    data = ImageData(**options)
    data.setup()
    assert [len(d) for d in (data.train_dataset(), data.val_dataset(), data.test_dataset())] == [
        40, 6, 8,
    ]  # fmt: skip
    for path in sorted((tmp_path / "test").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "test").rmdir()
    data = ImageData(**options)  # the validation split is for tests now
    data.setup()
    assert [len(d) for d in (data.train_dataset(), data.val_dataset(), data.test_dataset())] == [
        36, 4, 6,
    ]  # fmt: skip
