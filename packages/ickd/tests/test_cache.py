"""Features of a teacher in a file: the same rows, and of nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from ickd.cache import TeacherCache
from ickd.data import ImageData, SegmentationData
from ickd.networks import Network, open_network
from tenfold.distillation import Taps
from tenfold.errors import UserError


def generated(**options: object) -> ImageData:
    data = ImageData(**{"train_size": 20, "eval_batch_size": 8, "batch_size": 8, **options})
    data.setup()
    return data


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six training images of two classes."""
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(3):
                picture(10 * label + n).save(tmp_path / split / name / f"{n}.png")
    return tmp_path


def of_folder(root: Path, **options: object) -> ImageData:
    data = ImageData("imagefolder", str(root), **{"image_size": 16, "batch_size": 4, **options})
    data.setup()
    return data


@pytest.fixture(scope="module")
def teacher() -> Network:
    torch.manual_seed(0)
    network = open_network("embedded:gratings-teacher").train()
    with torch.no_grad():  # statistics that are not the first ones
        network(torch.rand(16, 3, 16, 16))
    return network.requires_grad_(False)


def assert_same(ours: Taps, theirs: Taps, tolerance: float = 0.0) -> None:
    """Every part of two taps."""
    assert len(ours.maps) == len(theirs.maps)
    assert len(ours.preacts) == len(theirs.preacts)
    assert ours.stem == theirs.stem
    pairs = [*zip(ours.maps, theirs.maps, strict=True)]
    pairs += zip(ours.preacts, theirs.preacts, strict=True)
    pairs += [(getattr(ours, name), getattr(theirs, name)) for name in ("logits", "pooled", "last")]
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def batches(data: ImageData) -> list:
    """Those of training: shuffled."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    return list(loader)


# ------------------------------------------------------------------------------------ the rows


def test_rows_are_what_the_teacher_says(teacher):
    data = generated()
    cache = TeacherCache.compute(teacher, data)
    assert len(cache) == 20
    assert not teacher.training
    seen = []
    for batch in batches(data):
        # convolutions of other batches add in another order
        assert_same(cache.rows(batch.index), teacher.taps(batch.image), tolerance=1e-5)
        seen += batch.index.tolist()
    assert len({*seen}) == 16 == len(seen)  # the last batch is not full
    assert sorted(seen) != seen


def test_rows_in_the_order_of_the_loader_are_bit_equal(teacher):
    data = generated()
    cache = TeacherCache.compute(teacher, data)
    for batch in data.still_loader():
        assert_same(cache.rows(batch.index), teacher.taps(batch.image))


def test_a_subset_reads_the_rows_of_the_whole_split(teacher):
    data = generated(subset=6)
    cache = TeacherCache.compute(teacher, data)
    assert len(cache) == 20
    for batch in batches(data):
        assert_same(cache.rows(batch.index), teacher.taps(batch.image), tolerance=1e-5)


def test_images_of_a_folder(teacher, folder):
    data = of_folder(folder)
    cache = TeacherCache.compute(teacher, data)
    assert len(cache) == 6
    for batch in batches(data):
        assert_same(cache.rows(batch.index), teacher.taps(batch.image), tolerance=1e-5)


def test_the_map_before_its_activation_is_kept_for_segmentation():
    data = SegmentationData(train_size=3, val_size=2, test_size=2, batch_size=2)
    data.setup()
    network = open_network("embedded:blobs-student").eval()
    cache = TeacherCache.compute(network, data)
    (batch,) = list(data.still_loader())
    rows = cache.rows(batch.index)
    assert_same(rows, network.taps(batch.image))
    assert rows.last is not None
    assert rows.last.min() < 0


def test_a_network_without_a_stem_is_remembered(tmp_path):
    data = generated(train_size=4)
    network = open_network("timm:test_resnet", taps=["layer3", "layer4"], image_size=32).eval()
    cache = TeacherCache.compute(network, data)
    cache.write(tmp_path / "cache.safetensors")
    again = TeacherCache.open(tmp_path / "cache.safetensors", network, data)
    rows = again.rows(torch.arange(4))
    assert not rows.stem
    assert len(rows.signal("stages")) == 2


def test_parts_may_be_left_out(teacher):
    data = generated()
    cache = TeacherCache.compute(teacher, data, keep=["logits", "maps"])
    rows = cache.rows(torch.tensor([3, 1]))
    assert [len(rows.maps), len(rows.preacts), rows.pooled] == [4, 0, None]
    assert set(cache.tensors) == {"logits", "maps.0", "maps.1", "maps.2", "maps.3"}
    with pytest.raises(UserError, match="the network gives no pooled"):
        rows.signal("pooled")
    with pytest.raises(UserError, match=r"no field features, hints: choose from logits, pooled"):
        TeacherCache.compute(teacher, data, keep=["hints", "features", "maps"])


def test_more_than_ten_maps_keep_their_order():
    tensors = {f"maps.{n}": torch.full((2, 1, 1, 1), float(n)) for n in reversed(range(12))}
    maps = TeacherCache(tensors, {}).rows(torch.tensor([1])).maps
    assert [f.item() for f in maps] == list(range(12))


# ------------------------------------------------------------------------------------ the file


def test_a_file_gives_the_same_rows(teacher, tmp_path):
    data = generated()
    cache = TeacherCache.compute(teacher, data)
    path = tmp_path / "new" / "folder" / "cache.safetensors"
    cache.write(path)
    again = TeacherCache.open(path, teacher, data)
    assert (len(again), again.belongs) == (20, cache.belongs)
    index = torch.tensor([19, 0, 7])
    assert_same(again.rows(index), cache.rows(index))
    assert [p.name for p in path.parent.iterdir()] == ["cache.safetensors"]


@pytest.fixture
def written(teacher, tmp_path) -> Path:
    path = tmp_path / "cache.safetensors"
    TeacherCache.compute(teacher, generated(train_size=4), keep=["logits"]).write(path)
    return path


@pytest.mark.parametrize("change", ["weight", "statistics", "name", "normalisation", "taps"])
def test_another_teacher_is_refused(change, teacher, written):
    data = generated(train_size=4)
    other = open_network("embedded:gratings-teacher")
    other.load_state_dict(teacher.state_dict())
    TeacherCache.open(written, other, data)
    if change == "weight":
        other.net.fc.bias.data[0] += 1e-3
    elif change == "statistics":
        other.net.state_dict()["stages.0.body.1.running_mean"].add_(1e-3)
    elif change == "name":
        other = Network(other.net, "another", other.expects)
    elif change == "normalisation":
        other = Network(other.net, other.name, other.expects._replace(mean=(0.4,) * 3))
    else:
        other = Network(other.net, other.name, other.expects, ["stages.3"])
    with pytest.raises(UserError) as caught:
        TeacherCache.open(written, other, data)
    line = str(caught.value)
    assert line.startswith(f"the cached features are of another teacher ({written})")
    assert line.endswith("make them anew with ickd cache-teacher")


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"train_size": 5}, "items"),
        ({"part": "teacher", "teacher_size": 4}, "labels"),
        ({"classes": "fine16"}, "classes"),
        ({"image_size": 24}, "pixels"),
    ],
)
def test_other_data_are_refused_by_what_differs(options, fact, teacher, written):
    data = generated(**{"train_size": 4, **options})
    with pytest.raises(UserError, match=f"of another data set or transform, by its {fact}"):
        TeacherCache.open(written, teacher, data)


def test_other_files_and_transforms_are_refused(teacher, folder):
    path = folder / "cache.safetensors"
    TeacherCache.compute(teacher, of_folder(folder), keep=["logits"]).write(path)
    TeacherCache.open(path, teacher, of_folder(folder, batch_size=2, seed=4, subset=3))
    with pytest.raises(UserError, match="another data set or transform, by its pixels"):
        TeacherCache.open(path, teacher, of_folder(folder, image_size=20))
    with pytest.raises(UserError, match="another data set or transform, by its source"):
        TeacherCache.open(path, teacher, generated(train_size=6))
    picture(99).save(folder / "train" / "bee" / "1.png")
    with pytest.raises(UserError, match="another data set or transform, by its pixels"):
        TeacherCache.open(path, teacher, of_folder(folder))
    picture(11).save(folder / "train" / "bee" / "1.png")
    TeacherCache.open(path, teacher, of_folder(folder))
    (folder / "train" / "bee" / "2.png").rename(folder / "train" / "bee" / "3.png")
    TeacherCache.open(path, teacher, of_folder(folder))  # the same images in the same order
    (folder / "train" / "bee" / "3.png").unlink()
    with pytest.raises(UserError, match="another data set or transform, by its items"):
        TeacherCache.open(path, teacher, of_folder(folder))


def test_images_that_change_in_every_epoch_are_refused(teacher, folder):
    path = folder / "cache.safetensors"
    TeacherCache.compute(teacher, of_folder(folder), keep=["logits"]).write(path)
    augmented = of_folder(folder, augment="cifar")
    message = "only of images that always look the same: use --data.augment none"
    with pytest.raises(UserError, match=message):
        TeacherCache.compute(teacher, augmented)
    with pytest.raises(UserError, match=message):
        TeacherCache.open(path, teacher, augmented)
    for data in (None, torch.utils.data.TensorDataset(torch.zeros(2))):
        with pytest.raises(UserError, match=r"that tells what its images are: use ickd's ImageD"):
            TeacherCache.compute(teacher, data)


def test_files_that_are_no_cache(teacher, written, tmp_path):
    data = generated(train_size=4)

    def complaint(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            TeacherCache.open(path, teacher, data)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "no such file of cached features" in complaint(tmp_path / "absent.safetensors")
    assert "make it with ickd cache-teacher" in complaint(tmp_path)
    content = written.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for damaged in (content[:-8], content[:30], b"", b"\xff" * 64, b"{}" * 20):
        bad.write_bytes(damaged)
        assert "damaged, or no file of cached features" in complaint(bad)
    # weights of a network, and a note that is no JSON
    for metadata in (None, {"format": "pt"}, {"belongs": "{"}):
        safetensors.torch.save_file({"weight": torch.ones(2)}, bad, metadata)
        assert "damaged, or no file of cached features" in complaint(bad)
    safetensors.torch.save_file({"logits": torch.ones(4, 3)}, bad, {"belongs": json.dumps({})})
    assert "of another teacher" in complaint(bad)


def test_a_file_is_written_whole_or_not_at_all(teacher, written, monkeypatch):
    before = written.read_bytes()
    cache = TeacherCache({"logits": torch.ones(3, 2)}, {})

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        cache.write(written)
    assert written.read_bytes() == before
    assert [p.name for p in written.parent.iterdir()] == [written.name]
