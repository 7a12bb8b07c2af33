"""What goes wrong in training: one line that says what, where and how to mend it (section 11).

What readers of data and files do with bad input is in their own tests, frozen teachers are in
test_distiller, decay of norms and biases in test_optimisation.
"""

import argparse
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ickd.cache import TeacherCache
from ickd.data import ImageData, write_parquet
from ickd.module import Distiller
from ickd.module.checks import warn_of_dead_channels, warn_of_score, warn_of_teacher
from ickd.networks import open_network
from ickd.synthetic import bound_gratings, grating_class_names
from tenfold.distillation import Taps
from tenfold.errors import UserError
from tenfold.runs import make_trainer
from tenfold.training import LAST

STUDENT, TEACHER = "embedded:gratings-student", "embedded:gratings-teacher"


def distiller(
    student: str | nn.Module = STUDENT, teacher: str | nn.Module | None = TEACHER, **more
):
    torch.manual_seed(0)
    usual = {"losses": "ickd+kd", "num_classes": 3, "lr": 0.01, "schedule": "constant"}
    return Distiller(student, teacher, **{**usual, **more})


def images(**options: object) -> ImageData:
    return ImageData(
        **{"batch_size": 8, "train_size": 16, "val_size": 24, "test_size": 8, **options}
    )


def fit(module: Distiller, folder: Path, data: object = None, *, ckpt=None, **options: object):
    usual = {"epochs": 1, "accelerator": "cpu", "progress": False, "logger": False}
    usual |= {"limit_val_batches": 0, "default_root_dir": folder}
    trainer = make_trainer(folder, **{**usual, **options})
    if isinstance(data, DataLoader):
        trainer.fit(module, data, ckpt_path=ckpt)
    else:
        trainer.fit(module, datamodule=data or images(), ckpt_path=ckpt)
    return trainer


class Net(nn.Module):
    """Two maps of half and a quarter of the size, `late` going through anything more."""

    def __init__(self, width: int = 4, late: int = 8, *more: nn.Module, classes: int = 3) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(width, late, 3, 2, 1), nn.ReLU(), *more)
        self.head = nn.Linear(late, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(x)).mean((2, 3)))


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


PAIRS = [("early", "early", 1.0), ("late", "late", 1.0)]


# ---- taps


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("stage.3", "stages.3", 1.0), r"GratingsNet has no module 'stage.3' to tap: .*stages.3"),
        (("stages.3", "stages.9", 1.0), r"no module 'stages.9' to tap: the closest are stages"),
        (("fc", "stages.3", 1.0), r"tap 'fc' gives \(2, 3\), not a map"),
    ],
)
def test_taps_that_are_no_maps(pair, message):
    with pytest.raises(UserError, match=message):
        distiller(pairs=[pair])


def test_a_tap_that_is_no_tensor():
    class Pair(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    net = Pair(4, 8)
    net.late = nn.Sequential(net.late, Do(lambda x: (x, x)), Do(lambda both: both[0]))
    with pytest.raises(UserError, match=r"tap 'late.1' gives a tuple, not a tensor"):
        distiller(net, pairs=[("late.1", "stages.3", 1.0)])


# ---- shapes


def test_channels_that_differ_without_an_embedding():
    with pytest.raises(UserError, match=r"student's 8 channels cannot be .* the teacher's 12"):
        distiller(Net(4, 8), Net(4, 12), pairs=PAIRS[1:], losses={"ickd": {"embed": False}})


def test_a_grid_finer_than_the_map(tmp_path):
    module = distiller(losses={"ickd": {"grid": [5, 2]}})
    with pytest.raises(UserError, match="grid of 5x2 cells does not fit a map of 4x4"):
        fit(module, tmp_path)


def padded(x: Tensor) -> Tensor:
    return torch.cat([x, x[:1]])


def test_a_teacher_that_pads_the_batch():
    with pytest.raises(
        UserError, match=r"shape \(2, 3\) and the teacher \(3, 3\) for the same batch"
    ):
        distiller(Net(), Net(4, 8, Do(padded)), losses="kd")
    inside = Net(4, 8, Do(padded), Do(lambda x: x[:-1]))
    message = r"different batches: student \(2, 8, 16, 16\), teacher \(3, 8, 16, 16\)"
    with pytest.raises(UserError, match=message):
        distiller(Net(), inside, pairs=[("late", "late.2", 1.0)], losses="ickd")


def test_a_map_without_pixels():
    empty = Net(4, 8, Do(lambda x: x[..., :0]))
    with pytest.raises(
        UserError, match=r"without entries: student \(2, 8, 16, 16\), teacher \(2, "
    ):
        distiller(Net(), empty, pairs=PAIRS[1:], losses="ickd")


@pytest.mark.parametrize("name", ["ickd", "mse", "at", "fitnet", "nst"])
def test_maps_of_other_sizes_are_compared(tmp_path, name):
    """ICC matrices have no size; where pixels are compared, the larger map is averaged down."""
    larger = Net(6, 12, nn.Upsample(scale_factor=3))
    module = distiller(Net(), larger, pairs=PAIRS[1:], losses={name: 1.0})
    fit(module, tmp_path)
    pixels = torch.rand(2, 3, 16, 16)
    taps = [net.eval().taps(pixels) for net in (module.student, module.teacher)]
    assert [t.maps[-1].shape[-1] for t in taps] == [4, 12]
    assert torch.isfinite(module.objective(*taps, {"label": torch.tensor([0, 1])})[name])


def test_fsp_needs_equal_widths(tmp_path):
    module = distiller(Net(4, 8), Net(4, 12), pairs=PAIRS, losses="fsp", init_epochs=1)
    with pytest.raises(
        UserError, match=r"channels.*student \(2, 8, 4, 4\), teacher \(2, 12, 4, 4\)"
    ):
        fit(module, tmp_path, epochs=2)


def test_images_too_small_for_a_network(tmp_path):
    named = {"teacher": "torchvision:squeezenet1_1", "pairs": [("stages.3", "features", 1.0)]}
    message = r"the teacher torchvision:squeezenet1_1 does not take images of 16x16: "
    with pytest.raises(
        UserError, match=message + r".*--model.teacher_options '{\"image_size\": 224}'"
    ):
        fit(distiller(**named, losses="ickd"), tmp_path)
    fit(distiller(**named, losses="ickd", teacher_options={"image_size": 64}), tmp_path)
    own = Net(4, 8, nn.AvgPool2d(16))
    message = r"the student Net does not take images of 16x16: .*expects=Input\(size=64\)"
    with pytest.raises(UserError, match=message):
        fit(distiller(own, None, losses=None), tmp_path)


def test_one_image_of_one_pixel(tmp_path):
    pixel = nn.AdaptiveAvgPool2d(1)
    module = distiller(Net(4, 8, pixel), Net(4, 8, pixel), pairs=PAIRS[1:], losses="ickd")
    with pytest.raises(UserError, match=r"single image of a single pixel.*two or more images"):
        fit(module, tmp_path, images(batch_size=1))
    fit(module, tmp_path, images(batch_size=2))


# ---- classes


@pytest.mark.parametrize("losses", ["kd", "ickd+dkd", "at+dist"])
def test_logits_of_other_classes_cannot_be_compared(losses):
    name = losses.split("+")[-1]
    message = f"{name} compares logits, but the student has 3 classes and the teacher 7"
    with pytest.raises(UserError, match=message):
        distiller(losses=losses, teacher_options={"num_classes": 7})


@pytest.mark.parametrize("teacher", ["named", "module"])
def test_features_of_other_classes_can(tmp_path, teacher, caplog):
    """And no score is told of a teacher whose classes are others."""
    options = {"teacher_options": {"num_classes": 7}}
    if teacher == "module":
        options = {"teacher": Net(6, 12, classes=7), "pairs": [("stages.3", "late", 1.0)]}
    module = distiller(losses="ickd+at" if teacher == "named" else "ickd", **options)
    trainer = fit(module, tmp_path, limit_val_batches=None)
    assert "val/top1" in trainer.callback_metrics
    assert "val/teacher" not in trainer.callback_metrics
    assert "chance" not in caplog.text


def test_labels_where_a_loss_needs_them(tmp_path):
    data = TensorDataset(torch.rand(8, 3, 16, 16), torch.full((8,), -1))
    with pytest.raises(UserError, match=r"an image has no label.*choose kd"):
        fit(distiller(losses="dkd"), tmp_path, DataLoader(data, batch_size=8))


# ---- a teacher that has nothing to teach


class Oracle(nn.Module):
    """Knows the validation images, and is wrong about the first few of them.

    Args:
        wrong: of 24 images.
    """

    def __init__(self, wrong: int) -> None:
        super().__init__()
        made = bound_gratings(24, 3)
        self.register_buffer("known", made.image.float().flatten(1) / 255)
        told = torch.where(torch.arange(24) < wrong, (made.label + 1) % 3, made.label)
        self.register_buffer("told", F.one_hot(told, 3).float())
        self.map = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        small = F.interpolate(x, (16, 16)).flatten(1)
        return self.told[torch.cdist(small, self.known).argmin(1)] + 0 * self.map(x).mean()


def judged(folder: Path, student: int, teacher: int, **options: object) -> Distiller:
    """A run of two epochs with two validations, of networks with so many mistakes."""
    module = distiller(Oracle(student), Oracle(teacher), losses="kd", num_classes=None)
    fit(module, folder, epochs=2, limit_val_batches=None, **options)
    return module


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.name.startswith("ickd")]


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (10, 4, None),
        (4, 10, "the teacher (accuracy 0.583) is not better than the student (0.833): untrained,"),
        (4, 4, "the teacher (accuracy 0.833) is not better than the student (0.833): untrained,"),
        (0, 16, "the teacher is at chance (accuracy 0.333): untrained, or wrong"),
        (20, 16, "the teacher is at chance (accuracy 0.333): untrained, or wrong"),
    ],
)
def test_a_teacher_is_judged_once(tmp_path, caplog, student, teacher, message):
    judged(tmp_path, student, teacher)
    told = warnings_of(caplog)
    assert len(told) == (message is not None)
    assert all(line.startswith(message) for line in told)


def test_a_sanity_check_is_no_validation(tmp_path, caplog, monkeypatch):
    """It sees a few images only, before the student has learned anything."""
    monkeypatch.setattr(Distiller, "_judge_teacher", judge := Judge(Distiller._judge_teacher))
    judged(tmp_path, 10, 4, num_sanity_val_steps=1)
    assert judge.scored == [False, True, True]
    assert warnings_of(caplog) == []


class Judge:
    """Whether the teacher had been scored after each validation."""

    def __init__(self, original: Callable[[Distiller], None]) -> None:
        self.original, self.scored = original, []

    def __get__(self, module: Distiller, _: type) -> Callable[[], None]:
        def judge() -> None:
            self.original(module)
            self.scored.append(module.teacher_scored)

        return judge


@pytest.mark.parametrize(
    ("teacher", "chance", "at_chance"),
    [
        (0.011, 0.01, True),  # of 100 classes
        (0.02, 0.01, False),
        (0.55, 0.5, True),  # of two
        (0.65, 0.5, False),
        (0.02, 0.0, False),  # of masks, where nobody knows it
    ],
)
def test_where_chance_ends(caplog, teacher, chance, at_chance):
    warn_of_score("accuracy", teacher, 0.0, chance)
    assert ("at chance" in caplog.text) is at_chance


# ---- a teacher without weights, or with another normalisation


RANDOM = "the teacher embedded:gratings-teacher has random weights"


def test_a_random_teacher_is_told_once(tmp_path, caplog):
    fit(distiller(), tmp_path, epochs=2)
    assert [line[: len(RANDOM)] for line in warnings_of(caplog)] == [RANDOM]


@pytest.mark.parametrize("source", ["file", "recipe", "module", "a run that goes on", "none"])
def test_others_are_not(tmp_path, caplog, source):
    options = {
        "file": {"teacher_ckpt": str(tmp_path / "teacher.pth")},
        "recipe": {"teacher_recipe": "demo-teacher"},
        "module": {"teacher": open_network(TEACHER).net},
        "none": {"teacher": None, "losses": None},
    }
    torch.save(open_network(TEACHER).net.state_dict(), tmp_path / "teacher.pth")
    module = distiller(**options.get(source, {}))
    data = images(teacher_size=64)
    fit(module, tmp_path / "run", data)
    if source == "a run that goes on":
        caplog.clear()
        fit(distiller(), tmp_path / "run", data, ckpt=tmp_path / "run" / LAST, epochs=2)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, False),
        ({"mean": [0.5, 0.5, 0.45]}, True),
        ({"std": [0.25, 0.5, 0.5]}, True),
        ({"std": [0.50001, 0.5, 0.5]}, False),
    ],
)
def test_which_teachers_normalise_unlike_the_data(caplog, changes, told):
    half = [0.5, 0.5, 0.5]
    teacher, data = open_network(TEACHER, mean=half, std=half), {"mean": half, "std": half}
    warn_of_teacher(teacher, teacher, images(**{**data, **changes}), trained=True)
    assert len(warnings_of(caplog)) == told


def test_a_teacher_that_normalises_unlike_the_data_is_told(tmp_path, caplog):
    torch.save(open_network("timm:test_resnet").net.state_dict(), tmp_path / "teacher.pth")
    module = distiller(
        teacher="timm:test_resnet",
        teacher_options={"image_size": 32, "num_classes": 1000},
        teacher_ckpt=str(tmp_path / "teacher.pth"),
        losses="ickd",
    )
    data = images(mean=[0.5, 0.5, 0.45], std=[0.5, 0.5, 0.5])
    fit(module, tmp_path / "run", data, epochs=2, limit_train_batches=1)
    (line,) = warnings_of(caplog)
    assert "timm:test_resnet normalises by mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5)" in line
    assert f"the data's are {data.mean} and {data.std}" in line


# ---- dead channels


def half_dead(dead: int, of: int = 8) -> Net:
    """Whose last map has channels that are zero everywhere."""
    net = Net(4, of)
    conv = net.late[0]
    with torch.no_grad():
        conv.weight[:dead], conv.bias[:dead] = 0, -1
        conv.weight[dead:].abs_()
        conv.bias[dead:] = 0.1
    return net


@pytest.mark.parametrize(
    ("student", "teacher", "told"),
    [
        (6, 2, ["75 % of the student's channels are dead"]),
        (4, 4, []),  # half of them, not more
        (0, 7, ["88 % of the teacher's channels are dead"]),
    ],
)
def test_dead_channels_are_logged_and_told_once(tmp_path, caplog, student, teacher, told):
    module = distiller(
        half_dead(student),
        half_dead(teacher),
        pairs=PAIRS[1:],
        losses={"ickd": {"embed": False}},
        num_classes=None,
    )
    trainer = fit(module, tmp_path)
    assert float(trainer.callback_metrics["train/dead_student"]) == student / 8
    assert float(trainer.callback_metrics["train/dead_teacher"]) == teacher / 8
    assert warnings_of(caplog) == told
    pixels = torch.rand(4, 3, 16, 16)
    warn_of_dead_channels(module, module.student.taps(pixels), module.teacher.taps(pixels))
    assert warnings_of(caplog) == told


def test_looking_for_dead_channels_changes_nothing():
    """The embedding is run in eval mode for it, and stays in the mode that it was in."""
    module = distiller()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    taps = [net.taps(torch.rand(4, 3, 16, 16)) for net in (module.student.eval(), module.teacher)]
    warn_of_dead_channels(module, *taps)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    embedding = module.objective.losses["ickd"].embed_s
    assert all(part.training for part in embedding.modules())


def test_strong_maps_in_half_precision_are_not_dead():
    """Squares of such sums do not fit into float16, so that all would look dead."""
    module = distiller(losses={"ickd": {"embed": False}})
    strong = torch.full((2, 48, 4, 4), 200.0, dtype=torch.float16)
    with torch.autocast("cpu", torch.float16):
        found = warn_of_dead_channels(module, Taps(maps=(strong,)), Taps(maps=(strong,)))
    assert {key: float(value) for key, value in found.items()} == {
        "train/dead_student": 0.0,
        "train/dead_teacher": 0.0,
    }


# ---- half precision


def icc_by_hand(student: Tensor, teacher: Tensor) -> float:
    """Section 3.1 in float64: squared distance of normalised rows, over C and B.

    Rows of zeros stay zero; where the teacher's is one, it does not count.
    """
    total = 0.0
    for s, t in zip(student.double().flatten(2), teacher.double().flatten(2), strict=True):
        for i in range(len(t)):
            ours, theirs = s @ s[i], t @ t[i]
            if theirs.any():
                ours = ours / ours.norm() if ours.any() else ours
                total += float((ours - theirs / theirs.norm()).square().sum()) / len(t)
    return total / len(student)


@pytest.mark.parametrize("form", ["direct", "low_memory"])
def test_sums_of_products_do_not_overflow_in_float16(form):
    """p·a² is 16 · 300² = 1.4 million here, float16 ends at 65504."""
    module = distiller(losses={"ickd": {"embed": False, "form": form, "weight": 1.0}})
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        (300 * torch.rand(2, 48, 4, 4, generator=generator)).half() for _ in range(2)
    )
    assert float(student.square().sum((2, 3)).max()) == math.inf
    logits = torch.zeros(2, 3)
    with torch.autocast("cpu", torch.float16):
        terms = module.objective(
            Taps((student,), None, logits),
            Taps((teacher,), None, logits),
            {"label": torch.zeros(2).long()},
        )
    assert terms["ickd"].dtype == torch.float32
    assert float(terms["ickd"]) == pytest.approx(icc_by_hand(student, teacher), rel=1e-5)


def test_a_step_in_bfloat16_takes_the_losses_in_full(tmp_path):
    """Its networks are rounded, its losses are those of the rounded maps to float32's last bits."""
    module = distiller(losses={"ickd": {"embed": False, "weight": 1.0}, "kd": 1.0})
    seen: dict[str, list] = {"ickd": [], "kd": []}
    for name, rows in seen.items():
        module.objective.losses[name].register_forward_hook(
            lambda _, given, out, rows=rows: rows.append((*given, out))
        )
    fit(module, tmp_path, precision="bf16-mixed", limit_train_batches=1)
    *_, (student, teacher, found) = seen["ickd"]  # of the step, behind a rehearsal
    assert student.dtype == teacher.dtype == torch.bfloat16
    assert found.item() == pytest.approx(icc_by_hand(student.detach(), teacher), rel=1e-5)
    *_, (ours, theirs, found) = seen["kd"]
    s, t = (z.detach().double().numpy() / 4 for z in (ours, theirs))
    log_s, log_t = (z - np.log(np.exp(z).sum(1, keepdims=True)) for z in (s, t))
    wanted = 16 * (np.exp(log_t) * (log_t - log_s)).sum(1).mean()
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_a_step_in_bfloat16_is_close_to_one_in_float32(tmp_path):
    changes = []
    for precision in ("32-true", "bf16-mixed"):
        module = distiller(losses="ickd+kd+at", lr=0.05)
        before = module.student.net.stages[3].body[0].weight.detach().clone()
        fit(module, tmp_path / precision, precision=precision, limit_train_batches=1)
        changes.append((module.student.net.stages[3].body[0].weight.detach() - before).flatten())
    exact, rough = changes
    assert float(F.cosine_similarity(exact, rough, 0)) > 0.99
    assert float(rough.norm() / exact.norm()) == pytest.approx(1, abs=0.05)


# ---- numbers that are none


def loud(value: float) -> Do:
    """Breaks the maps of images with a very bright pixel."""

    def broken(x: Tensor) -> Tensor:
        return torch.where(x.amax((1, 2, 3), keepdim=True) > 100, value, x)

    return Do(broken)


def loader(loud_image: int | None, shift: int = 40) -> DataLoader:
    pixels = bound_gratings(8, 1).image.float() / 255
    if loud_image is not None:
        pixels[loud_image] = 1e4
    index = torch.arange(8) + shift
    return DataLoader(TensorDataset(pixels, torch.arange(8) % 3, index), batch_size=4)


@pytest.mark.parametrize("form", ["direct", "low_memory"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_teacher_is_told_by_layer_and_image(tmp_path, form, value):
    """Even where the loss would mask the image as one whose channels are all dead."""
    module = distiller(
        Net(),
        Net(6, 64, loud(value)),
        pairs=PAIRS[1:],
        losses={"ickd": {"form": form}},
    )
    message = r"the teacher's late is NaN or infinite for image 46 \(Net\)"
    with pytest.raises(UserError, match=message):
        fit(module, tmp_path, loader(6))
    fit(module, tmp_path / "sound", loader(None))


def test_broken_logits_are_told_too(tmp_path):
    teacher = Net()
    teacher.head = nn.Sequential(teacher.head, Do(lambda z: z / 0))
    with pytest.raises(UserError, match="the teacher's logits is NaN or infinite for image 40"):
        fit(distiller(Net(), teacher, losses="kd", num_classes=None), tmp_path, loader(None))


def test_the_first_broken_layer_of_a_named_network_is_told(tmp_path):
    module = distiller()
    module.teacher.net.stages[2].body.conv1[0].weight.data.fill_(math.nan)
    with pytest.raises(
        UserError, match=r"the teacher's stages.2 is NaN .* for image \d+ \(embedded"
    ):
        fit(module, tmp_path)


def test_a_broken_student_is_told_with_all_terms(tmp_path):
    module = distiller(losses="kd+ickd")
    module.student.net.stages[3].body[0].weight.data[0] = math.nan
    with pytest.raises(UserError) as told:
        fit(module, tmp_path)
    assert told.value.what.startswith(
        "the student's loss or output is NaN or infinite: ce nan, kd nan"
    )
    assert "ickd " in told.value.what
    assert "teacher" not in str(told.value)


def test_a_broken_student_is_told_where_a_loss_masks_it(tmp_path):
    module = distiller(losses={"ickd": {"form": "low_memory"}}, ce_weight=0.0)
    module.student.net.stages[3].body[0].weight.data[0] = math.nan
    with pytest.raises(UserError, match="student's loss or output is NaN or infinite: ickd"):
        fit(module, tmp_path)


# ---- indices


def test_crd_without_indices(tmp_path):
    losses = {"crd": {"n_data": 8, "labels": [n % 3 for n in range(8)], "negatives": 2}}
    data = TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 3)
    with pytest.raises(UserError, match=r'crd needs to know which training items .*"index"'):
        fit(distiller(losses=losses), tmp_path, DataLoader(data, batch_size=4))
    fit(distiller(losses=losses), tmp_path, loader(None, shift=0))


def test_crd_with_another_number_of_images(tmp_path):
    with pytest.raises(UserError, match="crd has 16 labels for 99 items"):
        fit(distiller(losses={"crd": {"n_data": 99}}), tmp_path)


def test_a_cache_without_indices(tmp_path):
    module = distiller(teacher_cache="memory")
    module.cache = TeacherCache({"logits": torch.zeros(8, 3)}, {})
    with pytest.raises(
        UserError, match="found by the image's index, which the loader does not give"
    ):
        module.teacher_taps(type("Batch", (), {"index": None})())


# ---- cached features


@pytest.fixture
def gratings(tmp_path) -> Path:
    made = bound_gratings(16, 1)
    write_parquet({"train": made, "test": made}, tmp_path / "gratings", grating_class_names())
    return tmp_path / "gratings"


def from_disk(root: Path, **options: object) -> ImageData:
    return images(**{"source": "parquet", "root": str(root), "image_size": 16, **options})


def test_cached_features_belong_to_a_teacher_a_data_set_and_a_transform(tmp_path, gratings):
    data, file = from_disk(gratings), str(tmp_path / "cache.safetensors")
    data.setup()
    TeacherCache.compute(distiller().teacher, data).write(Path(file))
    fit(distiller(teacher_cache=file), tmp_path / "run", from_disk(gratings))

    other = distiller(teacher_cache=file)
    other.teacher.net.fc.bias.data[0] += 1e-3
    with pytest.raises(UserError, match=r"of another teacher .*cache.safetensors.*cache-teacher"):
        fit(other, tmp_path / "other", from_disk(gratings))
    other = distiller(teacher_cache=file, teacher_options={"mean": [0.1] * 3})
    with pytest.raises(UserError, match="of another teacher"):
        fit(other, tmp_path / "other", from_disk(gratings))
    for changed in (from_disk(gratings, image_size=20), images(train_size=17), images()):
        with pytest.raises(UserError, match="of another data set or transform"):
            fit(distiller(teacher_cache=file), tmp_path / "other", changed)


def test_cached_features_that_are_damaged_or_not_there(tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(UserError, match="damaged"):
        fit(distiller(teacher_cache=str(tmp_path / "torn.safetensors")), tmp_path)
    missing = str(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="no such file of cached features"):
        fit(distiller(teacher_cache=missing, teacher_recipe="demo-teacher"), tmp_path)
    assert not (tmp_path / "teacher").exists()  # told before a teacher is trained


def test_augmented_images_cannot_be_cached_in_a_file(gratings):
    data = from_disk(gratings, augment="cifar")
    data.setup()
    with pytest.raises(UserError, match=r"always look the same.*--data.augment none"):
        TeacherCache.compute(distiller().teacher, data)


# ---- checkpoints


@pytest.mark.parametrize("prefix", ["", "module.", "student_model.", "module.student_model."])
def test_prefixes_of_weights_are_stripped(tmp_path, prefix):
    state = open_network(TEACHER).net.state_dict()
    content = {"state_dict": {f"{prefix}{key}": value for key, value in state.items()}}
    torch.save({**content, "args": argparse.Namespace(lr=0.1)}, tmp_path / "teacher.pth")
    module = distiller(teacher_ckpt=str(tmp_path / "teacher.pth"))
    fit(module, tmp_path / "run", limit_train_batches=1)
    found = module.teacher.net.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_missing_and_unexpected_keys_are_listed(tmp_path):
    state = open_network(TEACHER).net.state_dict()
    state["fc.scale"] = state.pop("fc.bias")
    torch.save(state, tmp_path / "teacher.pth")
    with pytest.raises(UserError, match=r"not of embedded:gratings-teacher: .*fc\.bias.*fc\.scale"):
        fit(distiller(teacher_ckpt=str(tmp_path / "teacher.pth")), tmp_path / "run")


class Malicious:
    def __reduce__(self) -> tuple:
        return (print, ("code was run",))


def test_pickles_that_run_code_are_refused(tmp_path, capsys):
    (tmp_path / "teacher.pth").write_bytes(pickle.dumps({"state_dict": Malicious()}))
    torch.save({"state_dict": Malicious()}, tmp_path / "zipped.pth")
    for name in ("teacher.pth", "zipped.pth"):
        with pytest.raises(UserError, match=name):
            fit(distiller(teacher_ckpt=str(tmp_path / name)), tmp_path / "run")
    assert "code was run" not in capsys.readouterr().out


# ---- quiet where nothing is wrong


def test_a_sound_run_says_nothing(tmp_path, caplog, recwarn):
    """Trained teacher, usual normalisation, living channels."""
    with caplog.at_level(logging.WARNING):
        module = distiller(teacher_recipe="demo-teacher", teacher_cache="memory")
        fit(module, tmp_path, images(teacher_size=64))
    assert warnings_of(caplog) == []
    assert [str(w.message) for w in recwarn if "eval mode" in str(w.message)] == []
