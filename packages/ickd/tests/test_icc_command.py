"""The figures of `ickd icc` on files of images against numpy, and what it says of bad input."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from ickd.commands.icc import icc
from ickd.data import ImageData, SegmentationData
from ickd.module import Distiller
from ickd.networks import open_network
from ickd.synthetic import bound_gratings
from tenfold.cli import Command, run_function
from tenfold.errors import UserError

TEACHER, STUDENT = "embedded:gratings-teacher", "embedded:gratings-student"
COUNT = 12
command = importlib.import_module("ickd.commands.icc")  # the package's icc is the function


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for n, image in enumerate(bound_gratings(COUNT, seed=5).image):
        place = folder / f"class{n % 2}"  # folders in folders are searched
        place.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{n:02}.png")
    return folder


def checkpoint(path: Path, name: str, seed: int) -> str:
    """A checkpoint as `ickd fit` writes it, of random weights."""
    torch.manual_seed(seed)
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    trainer.strategy.connect(Distiller(name))
    trainer.save_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("networks")
    kinds = {"teacher": TEACHER, "student": STUDENT, "plain": STUDENT}
    return [
        checkpoint(folder / f"{name}.ckpt", kind, seed)
        for seed, (name, kind) in enumerate(kinds.items())
    ]


def maps_of(path: str, name: str, images: Path, stage: int = -1) -> torch.Tensor:
    """The maps of all images in the order of the files, without the command."""
    files = sorted(images.rglob("*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in files])
    network = open_network(name).eval()
    state = torch.load(path, weights_only=True)["state_dict"]
    network.net.load_state_dict(
        {k[12:]: v for k, v in state.items() if k.startswith("student.net.")}
    )
    with torch.no_grad():
        return network.taps(pixels.permute(0, 3, 1, 2).float() / 255).maps[stage]


def rows(maps: torch.Tensor) -> np.ndarray:
    """(pixels of all images, channels), in float64."""
    return maps.double().permute(0, 2, 3, 1).flatten(0, 2).numpy()


def lifted(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Our maps of every other image, brought to their channels by what fits on the rest."""
    small = torch.nn.functional.adaptive_avg_pool2d(ours[::2], theirs.shape[2:])
    one = np.ones((len(rows(small)), 1))
    fit, *_ = np.linalg.lstsq(np.hstack([rows(small), one]), rows(theirs[::2]), rcond=None)
    maps = torch.einsum("bchw,cd->bdhw", ours[1::2].double(), torch.from_numpy(fit[:-1]))
    return maps + torch.from_numpy(fit[-1]).view(-1, 1, 1)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean over images and channels of the squared distance of both correlations' unit rows.

    Where a channel of theirs is dead there is none.
    """
    units = []
    for maps in (ours, theirs):
        f = maps.double().flatten(2).numpy()
        g = f @ f.transpose(0, 2, 1)
        units.append(g / np.linalg.norm(g, axis=2, keepdims=True).clip(1e-12))
    alive = units[1].any(2)
    return float((((units[0] - units[1]) ** 2).sum(2) * alive).mean())


def effective_rank(maps: torch.Tensor) -> float:
    share = np.linalg.svd(rows(maps) - rows(maps).mean(0), compute_uv=False)
    share = share[share > 1e-9 * share.max()] / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def homology_ratio(maps: torch.Tensor) -> float:
    table = np.corrcoef(rows(maps), rowvar=False)
    return float((np.abs(table) > 0.5)[np.triu_indices(len(table), 1)].mean())


def read(folder: Path) -> dict:
    return json.loads((folder / "icc.json").read_text())


def test_three_networks_give_the_figures_of_held_out_images(networks, images, tmp_path, capsys):
    teacher, student, plain = networks
    icc(
        model=teacher, other=student, plain=plain, images=images, out=tmp_path, batch=4, grid=[2, 2]
    )
    found = read(tmp_path)
    assert found["images"] == COUNT // 2
    names = [(entry["title"], entry["network"]) for entry in found["networks"]]
    roles = ("Teacher", "Distilled student", "Plain student")
    assert names == list(zip(roles, (TEACHER, STUDENT, STUDENT), strict=True))
    theirs = maps_of(teacher, TEACHER, images)
    for entry, path in zip(found["networks"][1:], networks[1:], strict=True):
        ours = maps_of(path, STUDENT, images)
        brought = lifted(ours, theirs)
        assert entry["icc_distance"] == pytest.approx(distance(brought, theirs[1::2]), rel=1e-3)
        assert entry["effective_rank"] == pytest.approx(effective_rank(ours[1::2]), rel=1e-4)
        assert entry["homology_ratio"] == pytest.approx(homology_ratio(ours[1::2]), abs=2e-3)
        dead = (ours[1::2].flatten(2) == 0).all(2).double().mean()
        assert entry["dead_channels"] == pytest.approx(float(dead))
        for high, wide in np.ndindex(2, 2):
            part = np.s_[:, :, 2 * high : 2 * high + 2, 2 * wide : 2 * wide + 2]
            wanted = distance(brought[part], theirs[1::2][part])
            assert entry["cell_distances"][high][wide] == pytest.approx(wanted, rel=1e-3)
        assert sum(entry["singular_values"]) == pytest.approx(1)
    assert found["networks"][0]["icc_distance"] is None
    printed = capsys.readouterr().out
    assert f"{found['networks'][1]['icc_distance']:.3f}" in printed
    assert "96 pixels for a map from 48 channels are few" in printed
    assert f"{found['networks'][1]['icc_distance']:.3f} (unreliable)" in printed
    assert [entry["reliable"] for entry in found["networks"]] == [None, False, False]
    assert "6 images at 16x16 pixels (their own size); the students' maps" in printed
    for name in ("icc.png", "icc_cells.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"


@pytest.mark.usefixtures("unsaved_pictures")
def test_one_network_by_name_and_at_another_tap(networks, images, tmp_path, capsys):
    icc(model=TEACHER, images=images, out=tmp_path, num_classes=5, limit=5)
    assert "random weights" in capsys.readouterr().out
    (entry,) = read(tmp_path)["networks"]
    assert (read(tmp_path)["images"], entry["channels"]) == (5, 48)
    assert entry["title"] == TEACHER
    icc(model=networks[0], images=images, out=tmp_path, tap="stages.2", names=["Mine"])
    (entry,) = read(tmp_path)["networks"]
    assert (entry["title"], entry["tap"], entry["channels"]) == ("Mine", "stages.2", 24)
    want = effective_rank(maps_of(networks[0], TEACHER, images, stage=2))
    assert entry["effective_rank"] == pytest.approx(want, rel=1e-4)
    assert not (tmp_path / "icc_cells.png").exists()


@pytest.mark.usefixtures("unsaved_pictures")
def test_student_and_teacher_have_taps_of_their_own(networks, images, tmp_path):
    teacher, student, _ = networks
    taps = {"tap": "stages.3", "student_tap": "stages.1"}
    icc(model=teacher, other=student, images=images, out=tmp_path, **taps)
    ours, theirs = maps_of(student, STUDENT, images, 1), maps_of(teacher, TEACHER, images)
    want = distance(lifted(ours, theirs), theirs[1::2])  # the fit averages 8x8 down to 4x4
    entry = read(tmp_path)["networks"][1]
    assert entry["channels"] == 12
    assert entry["icc_distance"] == pytest.approx(want, rel=1e-3)


@pytest.mark.usefixtures("unsaved_pictures")
def test_a_fit_on_enough_pixels_is_reliable(networks, images, tmp_path, capsys):
    """At 40 pixels a side the last map has 10x10: 600 of six images are over 10 a channel."""
    icc(model=networks[0], other=networks[1], images=images, out=tmp_path, image_size=40)
    assert [entry["reliable"] for entry in read(tmp_path)["networks"]] == [None, True]
    printed = capsys.readouterr().out
    assert "unreliable" not in printed
    assert "6 images at 40x40 pixels (as given)" in printed


@pytest.mark.usefixtures("unsaved_pictures")
@pytest.mark.parametrize(
    ("data", "size"),
    [
        (ImageData(), 16),
        (ImageData("cifar100", "."), 32),
        (ImageData("imagefolder", ".", image_size=20), 20),
        (SegmentationData(), 24),
        (SegmentationData("voc", ".", base_size=33), 33),
    ],
)
def test_images_have_the_size_that_a_run_was_trained_on(tmp_path, capsys, data, size):
    path = checkpoint(tmp_path / "run.ckpt", STUDENT, 0)
    content = torch.load(path, weights_only=False)
    content["datamodule_hyper_parameters"] = dict(data.hparams)
    torch.save(content, path)
    Image.new("RGB", (50, 40), "red").save(tmp_path / "one.png")
    icc(model=TEACHER, other=path, images=tmp_path, out=tmp_path / "out")
    assert read(tmp_path / "out")["image_size"] == [size, size]
    assert f"{size}x{size} pixels (as {path} was trained)" in capsys.readouterr().out


@pytest.mark.usefixtures("unsaved_pictures")
def test_earlier_figures_are_kept_unless_their_folder_is_named(
    images, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for count, folder in enumerate(("icc", "icc-2", "icc-3"), start=1):
        icc(model=TEACHER, images=images, limit=count)
        assert [read(Path(f))["images"] for f in ("icc", folder)] == [1, count]
    assert "replaced" not in capsys.readouterr().out
    icc(model=TEACHER, images=images, limit=5, out=Path("icc-2"))
    assert "replaced icc-2/icc.png, icc-2/icc.json" in capsys.readouterr().out
    assert read(Path("icc-2"))["images"] == 5


@pytest.mark.usefixtures("unsaved_pictures")
def test_the_limit_is_spread_over_the_folder(images, tmp_path, monkeypatch):
    read_files, reading = [], command.read_image
    monkeypatch.setattr(command, "read_image", lambda p: read_files.append(p) or reading(p))
    icc(model=TEACHER, images=images, out=tmp_path, limit=4)
    assert {path.parent.name for path in read_files} == {"class0", "class1"}
    assert len(read_files) == 4


@pytest.mark.usefixtures("unsaved_pictures")
def test_a_single_image_is_told(networks, images, tmp_path, capsys):
    icc(model=networks[0], other=networks[1], images=images, out=tmp_path, limit=1)
    assert "a single image" in capsys.readouterr().out
    assert read(tmp_path)["images"] == 1


@pytest.mark.usefixtures("unsaved_pictures")
def test_images_of_different_size_are_cut_to_one(images, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.new("RGB", (20, 30), "red").save(folder / "a.png")
    Image.new("L", (16, 16), 128).save(folder / "b.png")
    with pytest.raises(UserError, match=r"16x16 pixels, where other images have 30x20 .*b.png"):
        icc(model=TEACHER, images=folder, out=tmp_path / "out")
    icc(model=TEACHER, images=folder, out=tmp_path / "out", image_size=16)
    assert read(tmp_path / "out")["images"] == 2


@pytest.mark.usefixtures("unsaved_pictures")
def test_unreadable_images_stop_or_are_skipped(networks, images, tmp_path, capsys):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for n, path in enumerate(sorted(images.rglob("*.png"))[:5]):
        (folder / f"{n}.png").write_bytes(path.read_bytes()[: 60 if n == 2 else None])
    with pytest.raises(UserError, match=r"2\.png.*--on-error skip"):
        icc(model=TEACHER, images=folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    icc(
        model=networks[0],
        other=networks[1],
        images=folder,
        out=tmp_path / "out",
        on_error="skip",
    )
    assert f"skipped {folder / '2.png'}" in capsys.readouterr().out
    for path in folder.iterdir():
        path.write_bytes(b"nothing")
    for other in (None, networks[1]):
        with pytest.raises(UserError, match="no readable image"):
            icc(model=networks[0], other=other, images=folder, out=tmp_path, on_error="skip")


def test_bad_input_is_told_in_a_line(networks, images, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    wrong = [
        ({"images": empty}, r"no image in the folder .*empty"),
        ({"images": tmp_path / "absent"}, "no such folder"),
        ({"model": "timm:resnet1800"}, "no model 'resnet1800'"),
        ({"model": "nothing.ckpt"}, "no network and no file"),
        ({"tap": "stages.9"}, "no module 'stages.9' to tap.*stages"),
        ({"tap": "fc"}, r"gives \(12, 3\), not a map"),
        ({"limit": 0}, "--limit must be 1"),
        ({"on_error": "maybe"}, "fail or skip"),
        ({"grid": [2, 2]}, "--other"),
        ({"grid": [2], "other": networks[1]}, r"rows and columns"),
        ({"grid": [9, 2], "other": networks[1]}, "at most 8"),
        ({"grid": [8, 8], "other": networks[1]}, "8x8 cells does not fit a map of 4x4"),
        ({"plain": networks[1]}, "--plain is the third"),
        ({"names": ["a", "b"]}, "2 for 1 networks"),
        ({"model": "torchvision:squeezenet1_1", "image_size": 8}, "images of 3x8x8.*--image-size"),
    ]
    for changes, line in wrong:
        with pytest.raises(UserError, match=line):
            icc(**{"model": networks[0], "images": images, "out": tmp_path / "out", **changes})
    assert not (tmp_path / "out").exists()


def test_features_that_are_not_finite_name_the_image(images, tmp_path):
    path = Path(checkpoint(tmp_path / "bad.ckpt", STUDENT, 0))
    content = torch.load(path, weights_only=False)
    content["state_dict"]["student.net.stages.3.body.1.bias"].fill_(float("nan"))
    torch.save(content, path)
    with pytest.raises(UserError, match=r"NaN or infinite features .*00\.png"):
        icc(model=str(path), images=images, out=tmp_path / "out")


def test_the_signature_is_the_command_line(networks, images, tmp_path, capsys):
    line_of = Command("ickd.commands.icc:icc", "")
    options = {"model": networks[0], "other": networks[1], "images": images, "out": tmp_path}
    line = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert run_function("ickd icc", line_of, [*line, "--grid", "[2,2]", "--names", "[A,B]"]) == 0
    assert [entry["title"] for entry in read(tmp_path)["networks"]] == ["A", "B"]
    assert "icc_cells.png" in capsys.readouterr().out
