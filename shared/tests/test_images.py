"""Images in every mode and from every source; released layouts, and every kind of bad file."""

import io
import os
import pickle
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from tenfold.data import Draw
from tenfold.errors import UserError
from tenfold.images import (
    SOURCES,
    ImageItems,
    Split,
    image_files,
    read_cifar10,
    read_cifar100,
    read_folders,
    read_image,
    read_parquet,
    write_parquet,
)


def photo(seed: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (36, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """One picture in every mode that files come in, and files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    image = Image.fromarray(grey)
    for mode in ("L", "RGB", "RGBA", "P", "1", "LA"):
        image.convert(mode).save(folder / f"{mode}.png")
    image.convert("CMYK").save(folder / "CMYK.jpg", quality=100)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "I16.png")
    (folder / "empty.png").touch()
    whole = (folder / "RGB.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    return folder


def test_large_images_are_refused_before_they_are_decoded(pictures, monkeypatch):
    with pytest.raises(
        UserError, match="its 8x8 pixels are above the limit max_pixels 63"
    ) as error:
        read_image(pictures / "RGB.png", max_pixels=63)
    assert str(pictures / "RGB.png") in str(error.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match="decompression bomb"):
        read_image(pictures / "RGB.png")
    assert read_image(pictures / "RGB.png", max_pixels=64).size == (8, 8)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("name", ["L.png", "RGB.png", "RGBA.png", "P.png", "LA.png", "I16.png"])
def test_every_mode_becomes_rgb(pictures, name):
    image = read_image(pictures / name)
    wanted = np.arange(64).reshape(8, 8, 1).repeat(3, 2) * 4
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), wanted)


def test_lossy_modes_and_other_sources(pictures):
    assert read_image(pictures / "CMYK.jpg").mode == read_image(pictures / "1.png").mode == "RGB"
    whole = (pictures / "RGB.png").read_bytes()
    wanted = read_image(pictures / "RGB.png")
    for source in (whole, {"bytes": whole, "path": "x"}, Image.open(io.BytesIO(whole))):
        assert read_image(source) == wanted
    assert read_image({"bytes": None, "path": str(pictures / "RGB.png")}) == wanted


@pytest.mark.parametrize("name", ["empty.png", "truncated.png", "text.png", "missing.png"])
def test_what_is_no_image_is_named(pictures, name):
    with pytest.raises(UserError, match=name) as caught:
        read_image(pictures / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="image in memory"):
        read_image(b"")


def test_image_items_draw_by_their_key(pictures):
    def transform(image):
        x = torch.from_numpy(np.array(image)).float()
        return x + random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002

    sources = [pictures / "L.png", pictures / "RGB.png", pictures / "P.png"]
    items = ImageItems(sources, transform, labels=[5, 6, 7], seed=4)
    item = items[Draw(2, 1)]
    assert (item.label, item.index) == (6, 1)
    assert torch.equal(item.image, items[Draw(2, 1)].image)
    assert torch.equal(items[1].image, items[Draw(0, 1)].image)
    assert not torch.equal(item.image, items[Draw(3, 1)].image)
    assert not torch.equal(item.image, items[Draw(2, 2)].image)
    batch = default_collate([items[i] for i in range(3)])
    assert batch.image.shape == (3, 8, 8, 3)
    assert batch.label.tolist() == [5, 6, 7]
    assert ImageItems(sources, transform)[0].label == -1


def test_arrays_are_images(pictures):
    pixels = np.asarray(read_image(pictures / "RGB.png"))
    assert np.array_equal(np.asarray(read_image(pixels)), pixels)
    assert np.array_equal(np.asarray(read_image(pixels[..., 0])), pixels)


# ---- layouts on disk


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
def cifar10(tmp_path) -> Path:
    """cifar-10-batches-py with two images in a file; pixels and labels say which."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for number, name in enumerate(files):
        data = np.full((2, 3072), 10 * number, np.uint8) + np.arange(2, dtype=np.uint8)[:, None]
        content = {b"batch_label": b"some", b"labels": [number, 9], b"data": data}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {b"label_names": [b"class %d" % k for k in range(10)], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return tmp_path


def test_folders_are_classes(folders):
    (folders / "train" / ".thumbnails").mkdir()  # an editor's, no class
    splits = read_folders(folders)
    assert splits.keys() == {"train", "val"}
    for split, name in (("train", "train"), ("val", "validation")):
        assert splits[split].names == ("ant", "bee")
        assert splits[split].labels == [0, 0, 0, 1, 1, 1]
        files = [folders / name / kind / f"{n}.png" for kind in ("ant", "bee") for n in range(3)]
        assert splits[split].sources == files
    (folders / "validation").rename(folders / "test")
    assert read_folders(folders).keys() == {"train", "test"}
    (folders / "test" / "cat").mkdir()
    with pytest.raises(UserError, match="class folders of train and test differ: cat"):
        read_folders(folders)


def test_images_are_found_at_any_depth(folders):
    (folders / "notes.txt").touch()
    (folders / "train" / "ant" / "deep").mkdir()
    photo(1).save(folders / "train" / "ant" / "deep" / "A.JPG")
    found = image_files(folders)
    assert len(found) == 13
    assert found == sorted(found)
    with pytest.raises(UserError, match="no such folder of images"):
        image_files(folders / "nowhere")


@pytest.mark.parametrize("keys", ["bytes", "str"])
def test_cifar10_batches_follow_each_other(cifar10, keys):
    if keys == "str":
        for path in (cifar10 / "cifar-10-batches-py").iterdir():
            content = pickle.loads(path.read_bytes(), encoding="bytes")
            text = {k.decode(): v for k, v in content.items()}
            path.write_bytes(pickle.dumps(text, protocol=4))
    splits = read_cifar10(cifar10)
    assert read_cifar10(cifar10 / "cifar-10-batches-py")["test"].labels == splits["test"].labels
    assert splits["train"].labels == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert splits["test"].labels == [5, 9]
    assert splits["train"].names == tuple(f"class {k}" for k in range(10))
    values = [{int(value) for value in np.unique(image)} for image in splits["train"].sources]
    assert values == [{v} for v in (0, 1, 10, 11, 20, 21, 30, 31, 40, 41)]


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
    test = read_cifar100(tmp_path)["test"]
    assert test.labels == [3, 99]
    planes = np.stack([np.asarray(read_image(source)) for source in test.sources])
    for plane in range(3):
        wanted = pixels[:, 1024 * plane : 1024 * (plane + 1)].reshape(2, 32, 32)
        assert np.array_equal(planes[..., plane], wanted)


def test_a_pickle_that_would_run_code_is_refused(cifar10):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    file = cifar10 / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(UserError, match="no place in a data file"):
        read_cifar10(cifar10)


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
        (
            "data_batch_1",
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 10]}),
            r"label 10 of image 1 lies outside 0\.\.9",
        ),
        ("batches.meta", pickle.dumps({b"num_vis": 3072}), "no entry label_names"),
    ],
)
def test_damaged_cifar_files_are_named(cifar10, name, content, message):
    (cifar10 / "cifar-10-batches-py" / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_cifar10(cifar10)
    assert name in str(caught.value) or "image 1" in str(caught.value)


def test_missing_and_half_unpacked_roots_show_the_tree(tmp_path, cifar10):
    for source, read in SOURCES.items():
        with pytest.raises(UserError, match="expected") as caught:
            read(tmp_path / "nowhere")
        assert ("get " in str(caught.value) or "ask " in str(caught.value)) == (
            source in ("imagenet", "cifar10", "cifar100")
        )
    (cifar10 / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(UserError, match="data_batch_3 missing"):
        read_cifar10(cifar10)


def test_a_split_without_images_shows_the_tree(folders):
    for file in (folders / "validation").rglob("*.png"):
        file.unlink()
    with pytest.raises(UserError, match="no image in validation"):
        read_folders(folders)


# ---- parquet


def write_table(file: Path, labels: list, names: list[str] | None = None) -> None:
    """A parquet file with a picture for each label, whose column may know the class names."""
    buffer = io.BytesIO()
    photo(0).save(buffer, "PNG")
    pictures = [{"bytes": buffer.getvalue(), "path": None}] * len(labels)
    table = datasets.Dataset.from_dict({"image": pictures, "label": labels})
    if names:
        table = table.cast_column("label", datasets.ClassLabel(names=names))
    table.to_parquet(str(file))


def test_what_is_written_as_parquet_is_read_back(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 7, 3), dtype=np.uint8)
    grey = pixels[..., 0]
    write_parquet(tmp_path / "new" / "train.parquet", pixels, [0, 2, 1, 0, 2], "abc")
    write_parquet(tmp_path / "new" / "test.parquet", grey, [1] * 5, "abc", hard=[True] * 5)
    splits = read_parquet(tmp_path / "new")
    assert splits["train"].labels == [0, 2, 1, 0, 2]
    assert splits["train"].names == ("a", "b", "c")
    for split, wanted in (("train", pixels), ("test", grey[..., None].repeat(3, 3))):
        found = [np.asarray(read_image(source)) for source in splits[split].sources]
        assert np.array_equal(np.stack(found), wanted)
    file = str(tmp_path / "new" / "test.parquet")
    table = datasets.load_dataset("parquet", data_files=file, split="train")
    assert table.column_names == ["image", "label", "hard"]
    assert isinstance(table.features["image"], datasets.Image)
    assert table[0]["hard"] is True


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
        read_parquet(tmp_path)


def test_class_names_of_parquet_files_decide_what_a_label_means(tmp_path):
    write_table(tmp_path / "train.parquet", [0, 1], ["ant", "bee"])
    write_table(tmp_path / "test.parquet", [0, 1, 1], ["bee", "ant"])
    splits = read_parquet(tmp_path)
    assert splits["train"].names == splits["test"].names == ("ant", "bee")
    assert splits["test"].labels == [1, 0, 0]
    write_table(tmp_path / "test.parquet", [0], ["bee", "cow"])
    with pytest.raises(UserError, match="differ: ant, cow"):
        read_parquet(tmp_path)


def test_what_is_no_parquet_or_has_no_images_is_named(tmp_path):
    for name in ("train", "test"):
        write_table(tmp_path / f"{name}.parquet", [0, 1])
    with pytest.raises(UserError, match="column kind missing; there are image, label"):
        read_parquet(tmp_path, label="kind")
    with pytest.raises(UserError, match="holds no images"):
        read_parquet(tmp_path, image="label")
    (tmp_path / "test.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"not a parquet file.*test\.parquet"):
        read_parquet(tmp_path)


def test_a_split_may_have_no_labels():
    split = Split([photo(0), photo(1)], None, ())
    items = ImageItems(split.sources, np.asarray, split.labels)
    assert [items[0].label, items[1].label] == [-1, -1]
