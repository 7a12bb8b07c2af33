"""The Distiller in whole runs: what stays frozen, where weights come from, every kind of pair."""

import json
import logging
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ickd.cache import TeacherCache
from ickd.cli import app
from ickd.compiling import CompiledNetwork
from ickd.data import ImageData, SegmentationData, write_parquet
from ickd.metrics import class_iou, confusion_matrix
from ickd.module import Distiller, fit_recipe, load_student, starting
from ickd.networks import Network, open_network
from ickd.synthetic import bound_gratings, grating_class_names
from tenfold.comparing import differences
from tenfold.errors import UserError
from tenfold.runs import make_trainer
from tenfold.testing import CPU, SendSignal
from tenfold.training import LAST, Interrupted

STUDENT, TEACHER = "embedded:gratings-student", "embedded:gratings-teacher"


def images(**options: object) -> ImageData:
    small = {"batch_size": 16, "train_size": 32, "teacher_size": 32, "val_size": 8, "test_size": 8}
    return ImageData(**{**small, **options})


def distiller(
    student: str | nn.Module = STUDENT, teacher: str | nn.Module | None = TEACHER, **options
) -> Distiller:
    torch.manual_seed(0)
    usual = {"losses": "ickd+kd", "num_classes": 3, "lr": 0.02, "schedule": "constant"}
    return Distiller(student, teacher, **{**usual, **options})


def trainer(folder: Path, *callbacks: Callback, epochs: int = 1, **options: object):
    usual = {"accelerator": "cpu", "progress": False, "logger": False, "limit_val_batches": 0}
    usual["default_root_dir"] = folder
    return make_trainer(folder, epochs=epochs, callbacks=callbacks, **{**usual, **options})


def fit(module: Distiller, folder: Path, *callbacks: Callback, data=None, ckpt=None, **options):
    made = trainer(folder, *callbacks, **options)
    made.fit(module, datamodule=data or images(), ckpt_path=ckpt)
    return made


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(ours: nn.Module, theirs: dict[str, Tensor]) -> bool:
    return differences(ours.state_dict(), theirs) == ""


def trained_file(folder: Path, network: str, seed: int = 5, **options: object) -> tuple[Path, dict]:
    """A file of random weights, as if they were trained."""
    torch.manual_seed(seed)
    net = open_network(network, **options).net
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)  # statistics that are no new network's
    torch.save(net.state_dict(), folder / "weights.pth")
    return folder / "weights.pth", net.state_dict()


# ---- the teacher is frozen


class Modes(Callback):
    """Whether anything of the teacher is ever in training mode, or has a gradient."""

    def __init__(self) -> None:
        self.training: set[bool] = set()
        self.gradients = 0

    def on_after_backward(self, trainer, pl_module):
        self.training |= {module.training for module in pl_module.teacher.modules()}
        self.gradients += sum(p.grad is not None for p in pl_module.teacher.parameters())
        assert pl_module.student.training


@pytest.mark.parametrize("losses", ["ickd+kd", "at+rkd+vid", "fitnet+reviewkd+ofd"])
def test_the_teacher_does_not_change(tmp_path, losses):
    module, modes = distiller(losses=losses), Modes()
    before, student = weights(module.teacher), weights(module.student)
    fit(module, tmp_path, modes, limit_val_batches=1)
    assert same(module.teacher, before)  # statistics of its batch norms too
    assert modes.training == {False}
    assert modes.gradients == 0
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert not same(module.student, student)
    means = [key for key in student if "running_mean" in key]
    assert means
    assert all(not torch.equal(module.student.state_dict()[k], student[k]) for k in means)


def test_train_leaves_the_teacher_in_eval_mode():
    module = distiller()
    for mode in (True, False, True):
        module.train(mode)
        assert module.student.training is mode
        assert not any(part.training for part in module.teacher.modules())


def test_a_given_teacher_is_frozen_and_that_is_told_once(caplog):
    teacher = open_network(TEACHER).net.train()
    with caplog.at_level(logging.INFO):
        module = distiller(teacher=teacher)
        module.train()
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    told = [r.message for r in caplog.records if "frozen" in r.message]
    assert told == ["the teacher GratingsNet is frozen and in eval mode from here on"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        distiller(teacher=teacher)  # as it should be by now
        distiller()
    assert not caplog.records


# ---- normalisation and resolution


def seen(network: Network) -> list[Tensor]:
    """What the network behind normalisation and resizing is given."""
    found: list[Tensor] = []
    network.net.register_forward_pre_hook(lambda _, given: found.append(given[0].detach()))
    return found


def test_each_network_has_its_own_normalisation_and_resolution(tmp_path):
    module = distiller(
        "timm:test_resnet",
        "timm:test_efficientnet",
        losses="ickd",
        student_options={"image_size": 24, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]},
        teacher_options={"image_size": 40},
    )
    data = images(batch_size=8, train_size=8)
    ours, theirs = seen(module.student), seen(module.teacher)
    fit(module, tmp_path, data=data)
    [batch] = data.train_dataloader()
    for found, size, mean, std in (
        (ours[-1], 24, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)),
        (theirs[-1], 40, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ):
        larger = F.interpolate(batch.image, (size, size), mode="bilinear", antialias=True)
        colours = [(larger[:, k] - mean[k]) / std[k] for k in range(3)]
        torch.testing.assert_close(found, torch.stack(colours, 1), rtol=1e-5, atol=1e-6)


def run_fit(folder: Path, *argv: str) -> int:
    return app.main(
        [
            "fit",
            f"--trainer.default_root_dir={folder}",
            "--trainer.max_epochs=1",
            *CPU,
            *("--data.train_size=16", "--data.val_size=8", "--data.batch_size=8"),
            *argv,
        ]
    )


def test_timm_teacher_and_student_from_the_command_line(tmp_path, caplog, capsys, recwarn):
    """Names alone: the demo's recipe for its own teacher does not get in the way."""
    status = run_fit(
        tmp_path / "run",
        *("--teacher", "timm:resnet18", "--student", "timm:mobilenetv3_small_050"),
        *("--model.teacher_options", '{"image_size": 40}'),
        *("--model.student_options", '{"image_size": 32}'),
    )
    assert status == 0, capsys.readouterr().err
    raw = torch.load(tmp_path / "run" / LAST, weights_only=False)
    assert raw["hyper_parameters"]["teacher"] == "timm:resnet18"
    assert not (tmp_path / "run/teacher").exists()
    assert "the teacher timm:resnet18 has random weights" in caplog.text
    assert not [w for w in recwarn if "eval mode" in str(w.message)]
    student = load_student(tmp_path / "run")
    assert student.name == "timm:mobilenetv3_small_050"
    assert student(torch.rand(2, 3, 16, 16)).shape == (2, 3)


def test_a_teacher_of_other_classes_and_augmented_images_from_the_command_line(tmp_path, capsys):
    made = bound_gratings(16, 1)
    write_parquet({"train": made, "test": made}, tmp_path / "images", grating_class_names())
    status = run_fit(
        tmp_path / "run",
        *("--teacher", "timm:test_resnet", "--student", "timm:test_efficientnet"),
        *("--model.teacher_options", '{"image_size": 32, "num_classes": 1000}'),
        *("--model.student_options", '{"image_size": 32}', "--losses", '{"ickd": 2.5}'),
        *("--data.source=parquet", f"--data.root={tmp_path / 'images'}", "--data.image_size=16"),
        "--data.augment=cifar",
    )
    assert status == 0, capsys.readouterr().err


def test_a_transformer_teaches_by_its_tokens(tmp_path):
    """Four patches of 64 channels, the class token dropped, against 4x4 maps of 48."""
    size = {"img_size": 32, "image_size": 32}
    module = distiller(
        teacher="timm:test_vit",
        losses="ickd",
        pairs=[("stages.2", "blocks.1:tokens=1", 0.5), ("stages.3", "norm:tokens=1", 1.0)],
        teacher_options=size,
    )
    taps = module.teacher.taps(torch.rand(2, 3, 16, 16))
    assert [tuple(m.shape) for m in taps.maps] == [(2, 64, 2, 2)] * 2
    with torch.no_grad():
        tokens = module.teacher.net.forward_features(module.teacher.prepare(torch.ones(1, 3, 9, 9)))
    maps = module.teacher.taps(torch.ones(1, 3, 9, 9)).maps[-1]
    torch.testing.assert_close(maps[0].flatten(1).T, tokens[0, 1:])
    before = weights(module.student)
    fit(module, tmp_path)
    assert not same(module.student, before)
    with pytest.raises(UserError, match=r"write blocks.1:tokens=1"):
        distiller(
            teacher="timm:test_vit", pairs=[("stages.3", "blocks.1", 1.0)], teacher_options=size
        )


def test_adaptors_fit_the_sizes_that_both_see():
    """ImageNet's network on images of 32 pixels ends in one pixel, not in 7x7 as on its own."""
    module = distiller("zoo:resnet8", "torchvision:resnet18", losses={"fitnet": 1.0})
    pixels = torch.rand(2, 3, 32, 32)
    taps = module.student.eval().taps(pixels), module.teacher.taps(pixels)
    terms = module.objective(*taps, {"label": torch.tensor([0, 1])})
    assert torch.isfinite(terms["fitnet"])
    shapes = [t.signal("hint").shape[2:] for t in taps]
    kernel = module.objective.losses["fitnet"].regressor.conv.weight.shape[2:]
    assert tuple(kernel) == tuple(1 + a - b for a, b in zip(*shapes, strict=True))


# ---- modules of one's own


class Own(nn.Module):
    """A network that this package knows nothing about."""

    def __init__(self, width: int, classes: int = 3) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(x)).mean((2, 3)))


PAIRS = [("early", "early", 0.5), ("late", "late", 1.0)]


def test_modules_of_ones_own_are_tapped_by_name(tmp_path):
    torch.manual_seed(0)
    student, teacher = Own(4), Own(6)
    module = distiller(student, teacher, pairs=PAIRS, losses={"ickd": 1.0, "fitnet": 1.0})
    assert module.net is student
    before = weights(student)
    fit(module, tmp_path)
    assert not same(student, before)
    raw = torch.load(tmp_path / LAST, weights_only=False)
    assert not {"student", "teacher"} & raw["hyper_parameters"].keys()
    loaded = Distiller.load_from_checkpoint(tmp_path / LAST, student=Own(4), teacher=Own(6))
    assert same(loaded, weights(module))
    with pytest.raises(UserError, match="its student was a module"):
        load_student(tmp_path)


def test_without_pairs_a_modules_stages_are_found():
    module = distiller(Own(4), Own(6), losses={"ickd": 1.0})
    assert module.student.tap_names == ("early", "late")


def test_pairs_rename_the_taps_of_a_network_that_has_some():
    teacher = Network(Own(6), "mine", tap_names=("early",))
    module = distiller(Own(4), teacher, pairs=[("late", "late", 1.0)], losses="ickd")
    assert module.teacher.tap_names == ("late",)
    assert module.teacher.name == "mine"


@pytest.mark.parametrize("kind", ["tuple", "dict", "named"])
def test_loaders_of_ones_own(tmp_path, kind):
    """(images, labels) of a plain loader train like the data module's batches."""
    made = bound_gratings(16, 1)
    pixels = made.image.float() / 255
    [ours] = images(batch_size=16, train_size=16).train_dataloader()
    order = ours.index

    def collate(items: Sequence[tuple[Tensor, ...]]) -> object:
        image, label = (torch.stack(column) for column in zip(*items, strict=True))
        return {"image": image, "label": label} if kind == "dict" else (image, label)

    dataset = TensorDataset(pixels[order], made.label[order])
    loader = DataLoader(dataset, batch_size=16, collate_fn=None if kind == "tuple" else collate)
    module, wanted = distiller(), distiller()
    trainer(tmp_path / "loader").fit(module, loader)
    fit(wanted, tmp_path / "data", data=images(batch_size=16, train_size=16))
    assert differences(module.state_dict(), wanted.state_dict(), 1e-4) == ""  # another order


def test_images_without_labels_distil(tmp_path):
    """A loader of images alone, no label, and no index; predictions are numbered."""
    pixels = bound_gratings(24, 1).image.float() / 255
    loader = DataLoader(pixels, batch_size=16)
    module = distiller()
    before = weights(module.student)
    made = trainer(tmp_path)
    made.fit(module, loader)
    assert not same(module.student, before)
    batches = made.predict(module, loader)
    assert [row["image"] for rows in batches for row in rows] == list(range(24))


def test_a_loader_of_something_else_is_told(tmp_path):
    loader = DataLoader([{"pixels": torch.rand(3, 16, 16)}] * 4)
    with pytest.raises(UserError, match="a dict without images"):
        trainer(tmp_path).fit(distiller(), loader)


# ---- where weights come from


def test_weights_are_read_when_a_run_begins_and_not_before(tmp_path):
    module = distiller(teacher_ckpt=str(tmp_path / "weights.pth"))
    path, state = trained_file(tmp_path, TEACHER)
    fit(module, tmp_path / "run")
    assert same(module.teacher.net, state)
    student = weights(module.student)
    path.unlink()
    again = distiller(teacher_ckpt=str(path))
    fit(again, tmp_path / "run", ckpt=tmp_path / "run" / LAST, epochs=2)  # goes on without it
    assert same(again.teacher.net, state)
    assert not same(again.student, student)
    with pytest.raises(UserError, match="no such checkpoint"):
        fit(distiller(teacher_ckpt=str(path)), tmp_path / "other")


def test_a_run_says_what_its_student_started_from(tmp_path, monkeypatch):
    path, _ = trained_file(tmp_path, STUDENT)
    told: list[str] = []
    monkeypatch.setattr("ickd.module.distiller.rank_zero_info", told.append)
    for folder, given in ("file", {"student_ckpt": str(path)}), ("random", {}):
        fit(distiller(**given), tmp_path / folder, limit_train_batches=1)
    starts = [str(path), "random weights"]
    assert told == [f"fit: the student {STUDENT} started from {start}" for start in starts]


def test_the_student_starts_from_its_file(tmp_path):
    path, state = trained_file(tmp_path, STUDENT)
    module = distiller(student_ckpt=str(path), lr=1e-12, weight_decay=0.0)
    fit(module, tmp_path / "run")
    kernels = {key: value for key, value in state.items() if value.ndim == 4}
    found = {key: module.net.state_dict()[key] for key in kernels}
    assert differences(found, kernels, 1e-6) == ""


def test_weights_of_another_network_are_refused(tmp_path):
    path, _ = trained_file(tmp_path, STUDENT)
    with pytest.raises(UserError, match=f"not of {TEACHER}"):
        fit(distiller(teacher_ckpt=str(path)), tmp_path / "run")


def test_nobody_publishes_weights_of_the_embedded_networks(tmp_path):
    with pytest.raises(UserError, match=f"nobody publishes weights of {STUDENT}"):
        fit(distiller(student_init="pretrained"), tmp_path)


def test_published_weights_out_of_reach_are_told_in_a_line(tmp_path, monkeypatch):
    from torchvision.models import _api

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("<urlopen error Name or service not known>")

    monkeypatch.setattr(_api, "load_state_dict_from_url", unreachable)
    module = distiller("torchvision:mobilenet_v3_small", None, losses=None)
    module.hparams["student_init"] = "pretrained"
    way = r"--model\.student_ckpt FILE or --model\.student_init scratch"
    with pytest.raises(UserError, match=rf"no pretrained weights: .*not known.*{way}"):
        fit(module, tmp_path)
    path, state = trained_file(tmp_path, "torchvision:mobilenet_v3_small", num_classes=3)
    module.hparams["student_ckpt"] = str(path)  # a file needs no download
    fit(module, tmp_path, limit_train_batches=0)
    assert same(module.student.net, state)


def test_published_weights_fill_all_but_another_classifier(tmp_path, monkeypatch):
    import timm

    torch.manual_seed(9)
    published, build = timm.create_model("test_resnet").state_dict(), timm.create_model

    def create(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        net = build(name, **options)
        if pretrained:
            net.load_state_dict(published)
        return net

    monkeypatch.setattr(timm, "create_model", create)
    options = {"student_options": {"image_size": 32}, "losses": None, "lr": 1e-12}
    module = distiller("timm:test_resnet", None, student_init="pretrained", **options)
    head = module.net.fc.weight.clone()
    fit(module, tmp_path, limit_train_batches=1)
    kernel = "layer3.0.conv1.weight"
    torch.testing.assert_close(module.net.state_dict()[kernel], published[kernel])
    torch.testing.assert_close(module.net.fc.weight.detach(), head.detach())


# ---- a teacher's own recipe


def test_the_teacher_is_trained_first_and_found_again(tmp_path, monkeypatch):
    options = {"teacher_recipe": "demo-teacher"}
    module = distiller(**options)
    fit(module, tmp_path)
    own = load_student(tmp_path / "teacher")
    assert own.name == TEACHER
    assert same(module.teacher, weights(own))
    raw = torch.load(tmp_path / "teacher" / LAST, weights_only=False)
    assert raw["epoch"] == 10
    assert raw["datamodule_hyper_parameters"]["teacher_size"] == 32  # the run's own
    assert raw["datamodule_hyper_parameters"]["part"] == "teacher"
    written = (tmp_path / "teacher" / LAST).stat().st_mtime_ns
    (tmp_path / LAST).unlink()
    again = distiller(**options)
    fit(again, tmp_path)
    assert (tmp_path / "teacher" / LAST).stat().st_mtime_ns == written
    assert differences(again.state_dict(), module.state_dict()) == ""

    def not_again(*_: object, **__: object) -> None:
        raise AssertionError("a run that goes on has its teacher in its checkpoint")

    monkeypatch.setattr(starting, "fit_teacher", not_again)
    fit(distiller(**options), tmp_path, ckpt=tmp_path / LAST, epochs=2)


def test_the_teacher_is_trained_for_the_same_classes(tmp_path):
    module = distiller(teacher_recipe="demo-teacher", num_classes=16)
    fit(module, tmp_path, data=images(classes="fine16", teacher_size=64))
    assert load_student(tmp_path / "teacher")(torch.rand(1, 3, 16, 16)).shape == (1, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"teacher": "zoo:resnet8", "teacher_options": {"image_size": 32}},
        {"teacher": Own(4)},
    ],
    ids=["another network", "a module"],
)
def test_a_recipe_of_another_teacher_is_left_out(tmp_path, options):
    module = distiller(teacher_recipe="demo-teacher", **options)
    before = weights(module.teacher)
    fit(module, tmp_path)
    assert same(module.teacher, before)
    assert not (tmp_path / "teacher").exists()


def test_a_file_comes_before_the_recipe(tmp_path):
    path, state = trained_file(tmp_path, TEACHER)
    module = distiller(teacher_recipe="demo-teacher", teacher_ckpt=str(path))
    fit(module, tmp_path / "run")
    assert same(module.teacher.net, state)
    assert not (tmp_path / "run/teacher").exists()


# ---- a teacher made faster


LOSSES = {"ickd": 4.0, "kd": 1.0, "at": 10.0, "rkd": 0.1, "ofd": 1e-3}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Tensor]:
    """Weights after two epochs with the teacher run on every batch."""
    module = distiller(losses=LOSSES)
    fit(module, tmp_path_factory.mktemp("plain"), epochs=2)
    return weights(module)


def test_features_in_memory_give_the_same_student(tmp_path, plain):
    module = distiller(losses=LOSSES, teacher_cache="memory")
    runs: list[Tensor] = []
    fit(module, tmp_path, Counter(module.teacher, runs), epochs=2)
    assert differences(module.state_dict(), plain, 1e-4) == ""
    assert runs == []
    assert len(module.cache) == 32


class Counter(Callback):
    """Counts passes of a network in training steps."""

    def __init__(self, network: Network, runs: list) -> None:
        self.network, self.runs = network, runs

    def on_train_start(self, trainer, pl_module):
        self.network.register_forward_hook(lambda *_: self.runs.append(1))
        self.network.net.register_forward_hook(lambda *_: self.runs.append(1))


def test_features_of_a_file_give_the_same_student(tmp_path, plain):
    teacher, data = distiller(losses=LOSSES).teacher, images()
    data.setup()
    TeacherCache.compute(teacher, data).write(tmp_path / "cache.safetensors")
    module = distiller(losses=LOSSES, teacher_cache=str(tmp_path / "cache.safetensors"))
    fit(module, tmp_path / "run", epochs=2)
    assert differences(module.state_dict(), plain, 1e-4) == ""


def test_cached_stages_of_masks_are_those_of_the_network(tmp_path):
    options = {"losses": {"ickd": {"grid": [3, 3]}, "at": 10.0}, "num_classes": None}
    data = {"train_size": 16, "val_size": 4, "test_size": 4, "batch_size": 8}
    found = []
    for cache in (None, "memory"):
        module = distiller(
            "embedded:blobs-student", "embedded:blobs-teacher", teacher_cache=cache, **options
        )
        fit(module, tmp_path / str(cache), data=SegmentationData(**data))
        found.append(weights(module))
    assert differences(*found, 1e-4) == ""


def test_a_folded_teacher_says_nearly_the_same(tmp_path, plain):
    module = distiller(losses=LOSSES, fold_teacher=True)
    fit(module, tmp_path, epochs=2)
    [folded] = module.quick
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert module.state_dict().keys() == plain.keys()  # no second teacher in checkpoints
    assert differences(module.state_dict(), plain, 1e-3) == ""


def test_a_compiled_teacher_says_the_same(tmp_path, plain, monkeypatch):
    eager = partial(CompiledNetwork, backend="eager")  # the usual one takes long to import
    monkeypatch.setattr("ickd.module.distiller.CompiledNetwork", eager)
    module = distiller(losses=LOSSES, compile_teacher=True)
    with torch.compiler.set_stance("force_eager"):  # test_compiling.py compiles
        fit(module, tmp_path, epochs=2)
    assert isinstance(module.quick[0], CompiledNetwork)
    assert module.state_dict().keys() == plain.keys()
    assert differences(module.state_dict(), plain, 1e-6) == ""


@pytest.mark.parametrize(
    ("asked", "beside", "expected"),
    [("bf16", "32-true", torch.bfloat16), ("fp32", "bf16-mixed", torch.float32)],
)
def test_the_teacher_runs_in_a_precision_of_its_own(tmp_path, asked, beside, expected):
    module, seen = distiller(teacher_precision=asked), []
    for which in (module.teacher, module.student):
        convolution = next(m for m in which.modules() if isinstance(m, nn.Conv2d))
        convolution.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    fit(module, tmp_path, limit_train_batches=1, precision=beside)
    other = torch.float32 if beside == "32-true" else torch.bfloat16
    assert seen[-2:] == [expected, other]  # those of the step; before it, examples


def test_augmented_images_are_shown_to_the_teacher(tmp_path, caplog):
    made = bound_gratings(16, 1)
    write_parquet({"train": made, "test": made}, tmp_path, grating_class_names())
    options = {"source": "parquet", "root": str(tmp_path), "image_size": 16, "augment": "cifar"}
    module = distiller(teacher_cache="memory")
    with caplog.at_level(logging.INFO):
        fit(module, tmp_path / "run", data=images(**options))
    assert module.cache is None
    assert "images are augmented: the teacher sees every one" in caplog.text


def test_a_cache_needs_to_know_the_images(tmp_path):
    loader = DataLoader(TensorDataset(torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])))
    with pytest.raises(UserError, match=r"there is none.*leave teacher_cache out"):
        trainer(tmp_path).fit(distiller(teacher_cache="memory"), loader)


# ---- contrastive representation distillation


CRD = {"crd": {"weight": 0.8, "n_data": 32, "negatives": 6, "dim": 8}}


def test_labels_and_indices_reach_crd(tmp_path):
    module, data = distiller(losses=CRD), images()
    rows: list[Tensor] = []
    loss = module.objective.losses["crd"]
    loss.register_forward_pre_hook(lambda _, given: rows.append(given[2].clone()))
    start = loss.contrast.memory_v1.clone()
    fit(module, tmp_path, data=data, limit_train_batches=1)
    _, index = rows  # of the step, behind a rehearsal
    [batch, _] = images_of(data)
    assert torch.equal(index, batch.index)
    changed = (loss.contrast.memory_v1 != start).any(1).nonzero().flatten()
    assert torch.equal(changed, index.sort().values)
    labels = data.train_labels()
    negatives = loss.sampler(torch.arange(32)).long()
    assert bool((labels[negatives] != labels[:, None]).all())


def images_of(data: ImageData) -> list:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    return list(loader)


@pytest.mark.parametrize("cut", [(0, 0), (1, 0)])
def test_a_run_with_crd_resumes_to_the_same_bits(tmp_path, cut):
    whole = distiller(losses=CRD)
    fit(whole, tmp_path / "whole", epochs=2)
    with pytest.raises(Interrupted):
        fit(distiller(losses=CRD), tmp_path / "cut", SendSignal(signal.SIGINT, *cut), epochs=2)
    module = distiller(losses=CRD)
    fit(module, tmp_path / "cut", ckpt=tmp_path / "cut" / LAST, epochs=2)
    assert differences(module.state_dict(), whole.state_dict()) == ""


# ---- masks


def test_masks_are_measured_over_all_images(tmp_path):
    data = SegmentationData(train_size=8, val_size=6, test_size=5, batch_size=8, eval_batch_size=4)
    module = distiller(
        "embedded:blobs-student",
        "embedded:blobs-teacher",
        losses={"ickd": {"weight": 2.0, "grid": [6, 6]}},
        num_classes=None,
    )
    made = fit(module, tmp_path, data=data, epochs=2, limit_val_batches=None)
    [results] = made.test(module, datamodule=data, verbose=False)
    [validated] = made.validate(module, datamodule=data, verbose=False)
    for found, split, loader in (
        (results, "test", data.test_dataloader()),
        (validated, "val", data.val_dataloader()),
    ):
        total = torch.zeros(6, 6, dtype=torch.int64)
        with torch.no_grad():
            for batch in loader:
                predicted = module.student.eval()(batch.image).argmax(1)
                total += confusion_matrix(predicted, batch.label, 6)
        assert found[f"{split}/miou"] == pytest.approx(float(class_iou(total).nanmean()), rel=1e-6)
        hits = float(total.diagonal().sum() / total.sum())
        assert found[f"{split}/pixel_accuracy"] == pytest.approx(hits, rel=1e-6)
        assert {f"{split}/class_accuracy", f"{split}/fwiou"} <= found.keys()


# ---- runs from Python are quiet


def test_runs_by_a_recipe_do_not_complain_of_modules_in_eval_mode(tmp_path, recwarn):
    small = {"train_size": 32, "teacher_size": 32, "val_size": 8, "test_size": 8}
    module, data = fit_recipe("demo", tmp_path, data=small, epochs=1, progress=False)
    assert len(data.train_dataset()) == 32
    assert not module.training
    assert [str(w.message) for w in recwarn if "eval mode" in str(w.message)] == []


def test_runs_of_a_plain_trainer_do_not_either(tmp_path, recwarn):
    fit(distiller(), tmp_path)
    assert [str(w.message) for w in recwarn if "eval mode" in str(w.message)] == []


def test_a_recipe_takes_changes_and_finished_runs_are_only_read(tmp_path):
    small = {"train_size": 16, "val_size": 8, "test_size": 8, "batch_size": 8}
    change = {"teacher": None, "teacher_cache": None, "losses": None, "lr": 1e-3}
    options = {"model": change, "data": small, "epochs": 1, "seed": 3, "progress": False}
    module, data = fit_recipe("demo", tmp_path, **options)
    assert module.hparams["lr"] == 1e-3
    assert (data.seed, data.batch_size) == (3, 8)
    written = (tmp_path / LAST).stat().st_mtime_ns
    again, _ = fit_recipe("demo", tmp_path, **options)
    assert (tmp_path / LAST).stat().st_mtime_ns == written
    assert same(again, weights(module))
    with pytest.raises(UserError, match=r"other settings \(lr 0.001 -> 0.01\)"):
        fit_recipe("demo", tmp_path, **{**options, "model": {**change, "lr": 1e-2}})


def test_hyperparameters_are_plain_values(tmp_path):
    """So that a checkpoint is read without running code."""
    fit(distiller(pairs=[("stages.3", "stages.3", 1.0)], losses="ickd"), tmp_path)
    raw = torch.load(tmp_path / LAST, weights_only=True)
    given = raw["hyper_parameters"]
    assert json.loads(json.dumps(given, default=list))["pairs"] == [["stages.3", "stages.3", 1.0]]
