"""Every source from files made here, every kind of bad file, and determinism."""

import io
import os
import pickle
from pathlib import Path

import datasets
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


def test_cifar100_planes_are_red_green_blue_in_rows(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072) % 251
    for name in ("train", "test"):
        content = {
            b"data": pixels.astype(np.uint8), b"fine_labels": [3, 99], b"coarse_labels": [0, 1]
        }  # fmt: skip
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {b"fine_label_names": [b"%d" % k for k in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    data = ImageData(source="cifar100", root=str(tmp_path))
    data.setup()
    [batch] = data.test_loader()
    assert batch.label.tolist() == [3, 99]
    green = float(batch.image[1, 1, 5, 7] * 0.224 + 0.456) * 255
    assert green == pytest.approx(pixels[1, 1024 + 5 * 32 + 7], abs=1e-3)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    write_cifar10(tmp_path, train=5, test=2)

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(UserError, match="no place in a data file"):
        ImageData(source="cifar10", root=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch", b"no pickle at all", "not a CIFAR pickle"),
        ("test_batch", pickle.dumps([1, 2]), "not a CIFAR pickle"),
        ("test_batch", pickle.dumps({b"labels": [1]}), "no entry data"),
        ("test_batch", pickle.dumps({b"data": b"x", b"labels": [1]}), "not the pixels"),
        (
            "data_batch_2",
            pickle.dumps({b"data": np.zeros((3, 3072), np.uint8), b"labels": [1, 2]}),
            "3 images but 2 labels",
        ),
        ("batches.meta", pickle.dumps({b"num_vis": 3072}), "no entry label_names"),
    ],
)
def test_damaged_cifar_files_are_named(tmp_path, name, content, message):
    write_cifar10(tmp_path, train=5, test=2)
    (tmp_path / "cifar-10-batches-py" / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        ImageData(source="cifar10", root=str(tmp_path)).setup()
    assert name in str(caught.value)


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


def test_missing_and_half_unpacked_roots_show_the_tree(tmp_path, folders):
    for source in ("imagenet", "imagefolder", "cifar10", "cifar100", "parquet"):
        with pytest.raises(UserError, match="expected"):
            ImageData(source=source, root=str(tmp_path / "nowhere")).setup()
    write_cifar10(tmp_path, train=5, test=2)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(UserError, match="data_batch_3 missing"):
        ImageData(source="cifar10", root=str(tmp_path)).setup()
    (folders / "validation" / "cat").mkdir()
    with pytest.raises(UserError, match="differ: cat"):
        folder_data(folders).setup()


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


def write_table(file: Path, labels: list, names: list[str] | None = None) -> None:
    """A parquet file with a picture for each label, whose column may know the class names."""
    buffer = io.BytesIO()
    photo(0).save(buffer, "PNG")
    pictures = [{"bytes": buffer.getvalue(), "path": None}] * len(labels)
    table = datasets.Dataset.from_dict({"image": pictures, "label": labels})
    if names:
        table = table.cast_column("label", datasets.ClassLabel(names=names))
    table.to_parquet(str(file))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, -1], [0, 1], "label -1 of image 1"),
        ([0, 1], [0, 2], r"label 2 of image 1 lies outside 0\.\.1"),
        (["cat", "dog"], ["cat"], "label 'cat' of image 0 is no class number"),
        ([0, None], [0], "label None of image 1 is no class number"),
    ],
)
def test_labels_that_are_no_classes_of_training_are_named(tmp_path, train, test, message):
    write_table(tmp_path / "train.parquet", train)
    write_table(tmp_path / "test.parquet", test)
    with pytest.raises(UserError, match=message):
        ImageData(source="parquet", root=str(tmp_path)).setup()


def test_class_names_of_parquet_files_decide_what_a_label_means(tmp_path):
    write_table(tmp_path / "train.parquet", [0, 1], ["ant", "bee"])
    write_table(tmp_path / "test.parquet", [0, 1, 1], ["bee", "ant"])
    data = ImageData(source="parquet", root=str(tmp_path), image_size=32)
    data.setup()
    [batch] = data.test_loader()
    assert data.class_names == ("ant", "bee")
    assert batch.label.tolist() == [1, 0, 0]
    write_table(tmp_path / "test.parquet", [0], ["bee", "cow"])
    with pytest.raises(UserError, match="differ: ant, cow"):
        ImageData(source="parquet", root=str(tmp_path)).setup()


def test_what_is_no_parquet_or_has_no_images_is_named(tmp_path):
    for name in ("train", "test"):
        write_table(tmp_path / f"{name}.parquet", [0, 1])
    for options, message in (
        ({"label_column": "kind"}, "column kind missing"),
        ({"image_column": "label"}, "holds no images"),
    ):
        with pytest.raises(UserError, match=message):
            ImageData(source="parquet", root=str(tmp_path), **options).setup()
    (tmp_path / "test.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"not a parquet file.*test\.parquet"):
        ImageData(source="parquet", root=str(tmp_path)).setup()


def test_hidden_folders_are_no_classes(folders):
    (folders / "train" / ".thumbnails").mkdir()
    data = folder_data(folders)
    data.setup()
    assert data.class_names == ("ant", "bee")


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
