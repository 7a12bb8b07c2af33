"""Features of a teacher in a file: the same rows, and of nothing else."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file

from ickd import cache as cache_module
from ickd.cache import TeacherCache
from ickd.data import ImageData, SegmentationData
from ickd.module import Distiller, Objective, parse_losses
from ickd.module.objective import Pair
from ickd.networks import Network, open_network
from tenfold.distillation import Taps, available_losses
from tenfold.errors import UserError
from tenfold.runs import make_trainer


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
    with pytest.raises(UserError, match=r"no field features, maps\.x: choose from logits, pooled"):
        TeacherCache.compute(teacher, data, keep=["maps.x", "features", "maps"])
    with pytest.raises(
        UserError, match=r"gives no last, preacts\.4: it gives logits, .*preacts\.3"
    ):
        TeacherCache.compute(teacher, data, keep=["last", "preacts.4", "maps"])


def test_single_maps_keep_their_places(teacher):
    data = generated()
    cache = TeacherCache.compute(teacher, data, keep=["maps.2", "preacts.1", "preacts.3"])
    assert set(cache.tensors) == {"maps.2", "preacts.1", "preacts.3"}
    [batch] = generated(eval_batch_size=20).still_loader()
    rows, whole = cache.rows(batch.index), teacher.taps(batch.image)
    assert [tuple(f.shape) for f in rows.maps[:2]] == [(20, 0, 0, 0)] * 2
    assert [len(f.flatten()) > 0 for f in rows.preacts] == [False, True, False, True]
    for ours, theirs in [(rows.maps, whole.maps), (rows.preacts, whole.preacts)]:
        for f_s, f_t in zip(ours, theirs, strict=False):
            if f_s.numel():
                torch.testing.assert_close(f_s, f_t, rtol=1e-5, atol=1e-5)
    assert rows.signal("hint") is rows.maps[2]


def test_large_features_are_told_before_they_are_computed(teacher, monkeypatch, caplog):
    data = generated()  # 20 images of 12 x 16 x 16 numbers
    with caplog.at_level("INFO", "lightning.pytorch"):
        TeacherCache.compute(teacher, data, keep=["maps.0"])
        assert caplog.text == ""
        monkeypatch.setattr(cache_module, "_LARGE", 20 * 12 * 16 * 16 * 4 - 1)
        cache = TeacherCache.compute(teacher, data, keep=["maps.0"])
    assert cache.size == 20 * 12 * 16 * 16 * 4
    assert caplog.text.count("features of 20 images will take 0.0 GiB: maps.0") == 1


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
        ({"image_size": 24}, "size or crop"),
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
    other = "another data set or transform, by its"
    with pytest.raises(UserError, match=f"{other} size or crop"):
        TeacherCache.open(path, teacher, of_folder(folder, image_size=20))
    with pytest.raises(UserError, match=f"{other} source"):
        TeacherCache.open(path, teacher, generated(train_size=6))
    second = folder / "train" / "bee" / "1.png"
    content, times = second.read_bytes(), second.stat()
    picture(99).save(second)
    with pytest.raises(UserError, match=f"{other} images"):
        TeacherCache.open(path, teacher, of_folder(folder))
    second.write_bytes(content)
    os.utime(second, ns=(times.st_atime_ns, times.st_mtime_ns))
    TeacherCache.open(path, teacher, of_folder(folder))
    second.rename(folder / "train" / "ant" / "9.png")
    with pytest.raises(UserError, match=f"{other} labels"):
        TeacherCache.open(path, teacher, of_folder(folder))
    (folder / "train" / "ant" / "9.png").unlink()
    with pytest.raises(UserError, match=f"{other} items"):
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


# ---------------------------------------------------------------------------- where they lie


def test_features_on_cuda_take_a_quarter_of_what_is_free(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {cuda: (4000, 9000)}[device])
    assert cache_module.fits(999, cuda)
    assert not cache_module.fits(1000, cuda)
    assert not cache_module.fits(1, torch.device("cpu"))


def test_features_move_to_the_images_once(teacher, monkeypatch):
    cache, asked = TeacherCache.compute(teacher, generated()), []
    total, index = cache.size, torch.tensor([3, 1])

    def fits(size: int, device: torch.device) -> bool:
        asked.append((size, device.type))
        return device.type == "meta"  # a device that every machine has

    monkeypatch.setattr(cache_module, "fits", fits)
    for _ in range(2):
        cache.rows(index)
    assert {value.device.type for value in cache.tensors.values()} == {"cpu"}
    for _ in range(2):
        rows = cache.rows(index.to("meta"))
    assert {value.device.type for value in cache.tensors.values()} == {"meta"}
    assert rows.pooled is not None
    assert (rows.pooled.device.type, tuple(rows.pooled.shape)) == ("meta", (2, 48))
    assert asked == [(total, "cpu"), (total, "meta")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fit", [True, False])
def test_rows_on_cuda(teacher, monkeypatch, fit):
    cache, index = TeacherCache.compute(teacher, generated()), torch.tensor([3, 1, 19])
    wanted = cache.rows(index)
    monkeypatch.setattr(cache_module, "fits", lambda *_: fit)
    rows = cache.rows(index.cuda())
    assert next(iter(cache.tensors.values())).is_cuda is fit
    for ours, theirs in zip(rows.maps, wanted.maps, strict=True):
        assert ours.is_cuda
        assert torch.equal(ours.cpu(), theirs)


# ---------------------------------------------------------------------------- what losses read


STUDENT, TEACHER = "embedded:gratings-student", "embedded:gratings-teacher"
READ = {
    "kd": {"logits"},
    "soft_target": {"logits"},
    "rkd": {"pooled"},
    "crd": {"pooled"},
    "ickd": {"maps.3"},
    "sp": {"maps.3"},
    "ft": {"maps.3"},
    "fitnet": {"maps.2"},
    "at": {"maps.1", "maps.2", "maps.3"},
    "fsp": {"maps.0", "maps.1", "maps.2", "maps.3"},
    "ofd": {"preacts.1", "preacts.2", "preacts.3"},
    "reviewkd": {"preacts.1", "preacts.2", "preacts.3", "pooled"},
}


def an_objective(losses: object, pairs: Sequence[Pair] = (), **options: object) -> Objective:
    torch.manual_seed(1)
    networks = [
        open_network(name, taps=[pair[n] for pair in pairs])
        for n, name in enumerate((STUDENT, TEACHER))
    ]
    taps = [network.eval().taps(network.example(2)) for network in networks]
    return Objective(parse_losses(losses), *taps, pairs=pairs, **options)


@pytest.mark.parametrize("name", available_losses())
def test_a_loss_finds_all_that_it_reads_in_the_cache(name, teacher):
    """The same value from the cache of its own parts as from all that the teacher says."""
    options = {"crd": {"n_data": 20, "negatives": 4}, "ickd_grid": {"grid": [2, 2]}}
    objective = an_objective({name: options.get(name, {})}, init_epochs=1).eval()
    objective.set_labels(generated())
    data = generated(eval_batch_size=20)
    cache = TeacherCache.compute(teacher, data, keep=objective.teacher_parts)
    assert set(cache.tensors) == set(objective.teacher_parts)
    assert set(cache.tensors) == READ.get(name, set(cache.tensors))
    [batch] = data.still_loader()
    student = open_network(STUDENT).eval().taps(batch.image)
    facts = {"label": batch.label, "index": batch.index}
    found = []
    for taps in (teacher.taps(batch.image), cache.rows(batch.index)):
        torch.manual_seed(2)
        terms = [objective(student, taps, facts, epoch) for epoch in (0, 1)]
        found.append([{key: value.item() for key, value in each.items()} for each in terms])
    assert found[0] == found[1]


def test_pairs_are_read_where_they_are():
    pairs = [Pair("stages.0", "stages.1"), Pair("stages.1", "stages.3")]
    assert an_objective("ickd", pairs).teacher_parts == ("maps.0", "maps.1")
    assert an_objective("kd+rkd", pairs).teacher_parts == ("logits", "pooled")
    assert an_objective("none").teacher_parts == ()


SMALL = {"train_size": 32, "val_size": 8, "test_size": 8, "batch_size": 16}


def new_module(cache: str | None, losses: str = "ickd+kd") -> Distiller:
    """The same networks every time."""
    torch.manual_seed(0)
    options = {"num_classes": 3, "lr": 0.02, "schedule": "constant", "teacher_cache": cache}
    return Distiller(STUDENT, TEACHER, losses=losses, **options)


def trained(folder: Path, cache: str | None, losses: str = "ickd+kd") -> Distiller:
    module = new_module(cache, losses)
    options = {"accelerator": "cpu", "progress": False, "logger": False, "limit_val_batches": 0}
    trainer = make_trainer(folder, epochs=2, default_root_dir=folder, **options)
    trainer.fit(module, datamodule=ImageData(**SMALL))
    return module


def test_training_reads_the_same_from_a_small_cache(tmp_path):
    """Bit by bit what comes of a file with everything, and nearly what comes of the network."""
    file = tmp_path / "all.safetensors"
    TeacherCache.compute(new_module(None).teacher, generated(**SMALL)).write(file)
    memory, whole, none = (
        trained(tmp_path / str(n), cache) for n, cache in enumerate(("memory", str(file), None))
    )
    assert set(memory.cache.tensors) == {"logits", "maps.3"}
    assert whole.cache.tensors.keys() == memory.cache.tensors.keys()  # no more is read of the file
    assert len(load_file(file)) == 1 + 1 + 4 + 4
    ours, theirs, live = (m.student.state_dict() for m in (memory, whole, none))
    for key, value in ours.items():
        assert torch.equal(value, theirs[key])
        torch.testing.assert_close(value, live[key], rtol=1e-4, atol=1e-4)


def test_without_losses_nothing_is_cached(tmp_path):
    assert trained(tmp_path, "memory", "none").cache is None


def test_a_file_without_what_the_losses_read(tmp_path):
    file = tmp_path / "some.safetensors"
    keep = ["logits", "maps.2"]
    TeacherCache.compute(new_module(None).teacher, generated(**SMALL), keep=keep).write(file)
    with pytest.raises(
        UserError, match=r"without maps\.3, which the losses compare.*--keep logits,maps\.3"
    ):
        trained(tmp_path, str(file))
    assert trained(tmp_path, str(file), "kd+fitnet").cache is not None
