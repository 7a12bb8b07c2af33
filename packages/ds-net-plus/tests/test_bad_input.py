"""Bad input and failure modes, for every family: each ends in one clear line, or is told."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ds_net_plus.checkpoint import (
    DATA,
    STUDENT,
    Saved,
    load_into,
    load_net,
    net_metadata,
    save_net,
    write_checkpoint,
)
from ds_net_plus.cli import app
from ds_net_plus.data import Batch, ImageData
from ds_net_plus.evaluate import collect, sweep
from ds_net_plus.layers import DSBlock, DSGroupNorm, MultiHeadGate, SwitchableBN
from ds_net_plus.model import (
    Detector,
    DSConvNet,
    DynamicNet,
    check_statistics,
    choose_routes,
    create_model,
    tau_for_budget,
    with_space,
)
from ds_net_plus.model.arguments import plain_arguments
from ds_net_plus.module import DetectionModule, GateModule, SupernetModule
from ds_net_plus.module.supernet import check_teacher, external_teacher
from ds_net_plus.recalibration import recalibrate
from ds_net_plus.runner import DynamicRunner
from ds_net_plus.train import train_gate
from tenfold.checkpoint import load_state
from tenfold.errors import UserError
from tenfold.runs import make_trainer
from tenfold.testing import CPU, quiet_trainer
from tenfold.training import LAST

SEVERAL = ("resnet", "resnet-in-block")


def batch_of(image: torch.Tensor, first: int = 0) -> Batch:
    index = torch.arange(first, first + len(image))
    return Batch(image, torch.zeros(len(image), dtype=torch.int64), index)


def batches_of(images: torch.Tensor) -> list[Batch]:
    return [batch_of(part, 4 * n) for n, part in enumerate(images.split(4))]


def run(*argv: object) -> int:
    return app.main([str(word) for word in argv])


def maps_of(net: DynamicNet, x: torch.Tensor, route: object = None) -> torch.Tensor:
    """The coarsest feature map."""
    return net.features(x, route, levels=[max(net.map_channels())]).maps[0]


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


# ------------------------------------------------------------------- routes, widths, construction


def test_routes_out_of_range_list_what_exists(net, images):
    gates = net.num_gates
    paths = [(0,) * (gates + 1), (net.num_routes,) * gates, (-1,) * gates, ()]
    for wrong in (*paths, net.num_routes, -1, "2", "wide"):
        for ask in (net, lambda x, route: maps_of(net, x, route)):
            with pytest.raises(UserError, match=r"does not exist: choose 0 \(widths .* M MAdds\)"):
                ask(images, route=wrong)
    if gates > 1:
        with pytest.raises(UserError, match=f"an index for each of the {gates} gates"):
            net(images, route=(0,) * (gates - 1))


def test_routing_spaces_out_of_range_list_what_exists(net):
    for wrong in ([0, net.num_routes], [-1, 0], [1, 0], [1, 1]):
        with pytest.raises(UserError, match=r"ascending.*choose from 0 \(widths .* M MAdds\)"):
            with_space(net, wrong)
    for few in ([], [0]):
        with pytest.raises(UserError, match="two or more"):
            with_space(net, few)


CNN, RESNET, VIT = "cnn", "resnet", "vit"
IMPOSSIBLE = [
    (CNN, {"stage_widths": ()}, "stages must"),
    (CNN, {"stage_widths": ((), ())}, "non-empty"),
    (CNN, {"stage_widths": ((8, 4), (4, 8))}, "ascending"),
    (CNN, {"stage_widths": ((0, 4), (4, 8))}, "positive"),
    (CNN, {"stage_widths": ((4, 8), (4, 8))}, "4 outputs, the network 2 routes"),
    (CNN, {"front_widths": (-3, 8)}, "whole numbers of 1 or more"),
    (CNN, {"dropout": 2}, "share"),
    ("mbnet", {"strides": (0, 1, 1, 1, 1)}, "strides must be"),
    ("mbnet", {"squeeze_ratio": 0.001}, "leaves nothing"),
    ("mbnet", {"gate_stage": -1}, "gate_stage"),
    (RESNET, {"group_size": 48}, r"\[32\] are not multiples of the group size 48"),
    (RESNET, {"group_size": 24, "stem_width": 48}, "not multiples of the group size 24"),
    (RESNET, {"stem_width": 20}, r"\[20\] are not multiples of the group size 16"),
    (RESNET, {"rhos": (1.0, 0.5, 0.75, 0.25)}, "ascending"),
    (RESNET, {"rhos": (1.0,)}, "two rhos"),
    (RESNET, {"rhos": (float("nan"), 1.0)}, "rhos must be a list of numbers"),
    (RESNET, {"gates": 2}, "gates must be 1"),
    (RESNET, {"squeeze_ratio": -1}, "above 0"),
    (RESNET, {"gates": 1, "front_rho": 0}, "front_rho must be a number above 0"),
    (VIT, {"routes": ((24, 2, 1, 1), (24, 1, 2, 1))}, "not nested"),
    (VIT, {"routes": ((24, 1, 1, 2), (24, 1, 2, 1))}, "not nested"),
    (VIT, {"routes": ((24, 1, 1, 1), (24, 1, 1, 1))}, "not nested"),
    (VIT, {"routes": ((24, 0, 1, 1), (24, 1, 2, 1))}, "start at 1"),
    (VIT, {"routes": ((24, 1, 1, 1),)}, "two or more"),
    (VIT, {"routes": ((24, 1, 1), (24, 1, 2))}, "features, heads, MLP ratio and blocks"),
    (VIT, {"routes": ((24, 1.5, 1, 1), (24, 2, 2, 1))}, "whole numbers"),
    (VIT, {"front": (24, 0, 2)}, "cannot be built"),
    (VIT, {"front": (24, 1)}, "front must be features"),
    (VIT, {"image_size": 18}, "multiple of 4"),
    (VIT, {"patch_size": 0}, "patch_size must be"),
]


@pytest.mark.parametrize(("family", "arguments", "message"), IMPOSSIBLE)
def test_impossible_widths_are_refused_at_construction(families, family, arguments, message):
    with pytest.raises(UserError, match=message):
        families[family](**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": -1},
        {"in_channels": 0},
        {"image_size": -4},
        {"gate_outputs": 1},
        {"gate_outputs": 99},
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_every_family(families, arguments):
    for build in families.values():
        with pytest.raises(UserError, match=next(iter(arguments))):
            build(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"stage_widths": (4, 8)},
            r"list of lists of numbers, got \[4, 8\]",
        ),
        ({"depths": 3}, "depths must be a list of numbers, got 3"),
        ({"num_classes": "ten"}, "num_classes must be a whole number of 0 or more, got 'ten'"),
        ({"num_classes": True}, "whole number"),
        ({"image_size": 32.5}, "whole number"),
        ({"drop_path": None}, "share"),
        ({"front_widths": [8, 4.5]}, "whole numbers"),
    ],
)
def test_arguments_of_another_kind_are_named(arguments, message):
    """As they come from a command line or a file."""
    with pytest.raises(UserError, match=message):
        plain_arguments(arguments)
    assert plain_arguments({"routes": ((1, 2), (3, 4)), "depths": range(1, 3)}) == {
        "routes": [[1, 2], [3, 4]],
        "depths": [1, 2],
    }


def test_layers_refuse_more_than_they_store():
    block = DSBlock(features=16, heads=2, hidden=32, head_dim=8)
    with pytest.raises(UserError, match="3 heads of 2 stored ones"):
        block(torch.zeros(1, 4, 16), heads=3, hidden=32)
    with pytest.raises(UserError, match="3 heads of 2 stored ones"):
        block.materialize(16, 3, 32)
    with pytest.raises(UserError, match=r"\[8\] are not multiples of the group size 16"):
        DSGroupNorm((8, 16))
    with pytest.raises(UserError, match="leaves nothing of 3 channels"):
        MultiHeadGate(3, 4)


# -------------------------------------------------------------------------- gates and statistics


@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize("family", SEVERAL)
def test_one_untrained_gate_of_several_is_enough_to_refuse(
    families, randomize, images_of, family, gate
):
    net = randomize(families[family]())
    net.gate_heads()[gate].data.zero_()
    for ask in (net, lambda x: maps_of(net, x), lambda x: DynamicRunner(net)(x)):
        with pytest.raises(UserError, match=r"not been trained: run train-gate.*static --route"):
            ask(images_of(net))
    assert net(images_of(net), route=0).shape == (9, 7)


def test_every_verb_refuses_an_untrained_gate_and_unmeasured_statistics(
    families, randomize, tmp_path, capsys
):
    for family, message in (("resnet", "train-gate"), ("cnn", "recalibrate")):
        net = randomize(families[family](num_classes=10, in_channels=1, image_size=16))
        net.gate_trained = True
        if family == "resnet":
            net.gate_heads()[1].data.zero_()
        else:
            net.stages[1][0].bn.aux_bn[0].reset_running_stats()
        sizes = {"image_size": 16, "train_size": 8, "val_size": 8, "test_size": 8}
        write_checkpoint(tmp_path / "a.ckpt", Saved({DATA: sizes}, {STUDENT: net}))
        place = ["--trainer.default_root_dir", tmp_path / "run", *CPU]
        for verb in ("validate", "test", "predict"):
            assert run(verb, "--ckpt", tmp_path / "a.ckpt", *place) == 2
            assert message in last_line(capsys)


def test_a_mark_of_the_checkpoint_refuses_dynamic_inference(net, images, tmp_path):
    for mark in (False, None, True):
        net.gate_trained = mark
        save_net(tmp_path, net)
        loaded = load_net(tmp_path)
        if mark is False:
            with pytest.raises(UserError, match="train-gate"):
                loaded(images)
        else:  # a bare state dict does not tell
            assert loaded(images).logits.isfinite().all()


def test_statistics_that_were_never_measured(net):
    norms = [layer for layer in net.modules() if isinstance(layer, SwitchableBN)]
    check_statistics(net, [*range(net.num_routes), "largest"])
    if norms:
        last = norms[-1].aux_bn[0]
        last.reset_running_stats()
        with pytest.raises(UserError, match=r"of route 0 .* never measured: run recalibrate"):
            check_statistics(net, [0])
        check_statistics(net, [net.num_routes - 1])
        with pytest.raises(UserError, match="never measured"):
            DynamicRunner(net)


# ------------------------------------------------------------------------------------ checkpoints


def test_checkpoints_of_another_family_tell_what_differs(net, families, tmp_path):
    save_net(tmp_path, net)
    for build in families.values():
        other = build()
        if type(other) is type(net):
            continue
        line = rf"arch {net.name} instead of {other.name}; \d+ missing .*; \d+ unexpected"
        with pytest.raises(UserError, match=line):
            load_into(other, tmp_path)


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("resnet", {"norm": "bn"}, r"norm None instead of bn; \d+ missing"),
        ("resnet", {"gate_position": "in_block"}, "gate_position stage instead of in_block"),
        ("vit", {"front_blocks": 2}, r"front_blocks 1 instead of 2; 12 missing"),
        ("vit", {"image_size": 20}, r"1 misshapen \(embedding.positions"),
    ],
)
def test_other_arguments_are_listed_on_every_way_in(families, tmp_path, family, arguments, message):
    net, other = families[family](), families[family](**arguments)
    save_net(tmp_path, net)
    with pytest.raises(UserError, match=message):
        load_into(other, tmp_path)
    module = GateModule(arch=other.name, net=other.config)
    state = {f"{STUDENT}.{key}": value for key, value in net.state_dict().items()}
    with pytest.raises(UserError, match=message):  # as the trainer loads a checkpoint
        module.on_load_checkpoint({"ds_net_plus": net_metadata(net), "state_dict": state})


def test_arguments_that_change_no_weight_may_differ(families, tmp_path):
    save_net(tmp_path, families["vit"]())
    load_into(families["vit"](strict=True, drop_path=0.5), tmp_path)


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_another_routing_space_is_refused(families, randomize, tmp_path, family):
    trained = randomize(families[family](gate_outputs=2))
    trained.routing_space, trained.gate_trained = (1, 2), True
    save_net(tmp_path, trained)
    with pytest.raises(UserError, match=r"for routing space \[1, 2\], not \[0, 3\]"):
        load_into(families[family](gate_outputs=2), tmp_path)


def test_a_gate_file_is_no_supernet(families):
    net = DSConvNet()
    state = {f"{STUDENT}.{key}": value for key, value in net.state_dict().items()}
    file = {"ds_net_plus": net_metadata(net), "state_dict": state}
    with pytest.raises(UserError, match=r"no moving average.*GateModule"):
        SupernetModule().on_load_checkpoint(file)


def test_official_files_with_the_average_alone(tiny_mbnet, randomize, tmp_path):
    average = randomize(tiny_mbnet()).state_dict()
    content = {"state_dict": None, "state_dict_ema": {f"module.{k}": v for k, v in average.items()}}
    torch.save(content, tmp_path / "o.pth.tar")
    net = load_net(tmp_path / "o.pth.tar")
    assert all(torch.equal(value, average[key]) for key, value in net.state_dict().items())


# ------------------------------------------------------------------------- images on the disk


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of every odd kind of image, and one of which three of four are broken."""
    odd, broken = tmp_path_factory.mktemp("odd"), tmp_path_factory.mktemp("broken")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    whole = Image.fromarray(pixels)
    for mode, name in (("L", "0.png"), ("LA", "1.png"), ("RGBA", "2.png"), ("CMYK", "3.tif")):
        whole.convert(mode).save(odd / name)
    Image.fromarray(np.full((32, 32), 32896, np.uint16)).save(odd / "4.png")
    whole.crop((0, 0, 9, 7)).save(odd / "5.png")
    whole.crop((0, 0, 1, 1)).save(odd / "6.png")
    whole.save(broken / "0.png")
    (broken / "1.png").write_bytes((broken / "0.png").read_bytes()[:200])
    (broken / "2.png").write_bytes(b"")
    (broken / "3.jpg").write_text("no image")
    return odd, broken


@pytest.fixture
def checkpoint(families, randomize, tmp_path) -> Callable[[str], Path]:
    """Writes the checkpoint of a family with a trained gate, to name on a command line."""

    def make(family: str) -> Path:
        net = randomize(families[family]())
        net.gate_trained = True
        data = {"source": "imagefolder", "image_size": net.image_size, "channels": net.in_channels}
        path = tmp_path / f"{family}.ckpt"
        write_checkpoint(path, Saved({DATA: {**data, "predict_root": "."}}, {STUDENT: net}))
        return path

    return make


@pytest.fixture
def detector(tmp_path) -> Path:
    """The checkpoint of a detector."""
    net = {"in_channels": 3, "front_widths": [8, 12], "image_size": 64}
    options = {"levels": [4, 8], "extras": 1, "width": 32, "scales": [0.2, 0.3, 0.5, 0.7]}
    module = DetectionModule("ds_cnn_tiny", net, num_classes=10, gate="value", **options)
    recalibrate(module.net, [torch.randn(8, 3, 64, 64)])
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "detector.ckpt")
    raw = load_state(tmp_path / "detector.ckpt")
    raw["tenfold_classes"] = {
        "model": "ds_net_plus.module.DetectionModule",
        "data": "ds_net_plus.data.VOCData",
    }
    raw[DATA] = {"image_size": 64}
    torch.save(raw, tmp_path / "detector.ckpt")
    return tmp_path / "detector.ckpt"


def assert_counted(told: str) -> None:
    assert "3 of 4 items of predict were skipped" in told
    for name in ("1.png", "2.png", "3.jpg"):
        assert name in told


@pytest.mark.parametrize("family", ["mbnet", "resnet", "vit"])
def test_explain_and_predict_take_every_image_and_count_the_broken(
    checkpoint, pictures, tmp_path, capsys, caplog, family
):
    (odd, broken), ckpt, out = pictures, checkpoint(family), tmp_path / "out"
    rows = out / "routes.csv", tmp_path / "predict" / "predictions.csv"
    explain = ["explain", "--ckpt", ckpt, "--device", "cpu", "--out", out, "--images"]
    place = ["--trainer.default_root_dir", tmp_path, "--route", "0", *CPU]
    predict = ["predict", "--ckpt", ckpt, *place, "--data.predict_root"]
    for command, table in zip((explain, predict), rows, strict=True):
        assert run(*command, odd) == 0
        assert len(table.read_text().splitlines()) == 8
        assert run(*command, broken) == 2
        assert "image file is truncated" in (line := last_line(capsys))
        assert "1.png" in line
    for command, table, skip in zip(
        (explain, predict), rows, (["--on-error", "skip"], ["--data.on_bad_item=skip"]), strict=True
    ):
        caplog.clear()
        assert run(*command, broken, *skip) == 0
        assert len(table.read_text().splitlines()) == 2
        assert_counted(caplog.text)


def test_detect_takes_every_image_and_counts_the_broken(
    detector, pictures, tmp_path, capsys, caplog
):
    (odd, broken), out = pictures, tmp_path / "out"
    command = ["detect", "--ckpt", detector, "--route", "0", "--device", "cpu", "--out", out]
    assert run(*command, "--images", odd) == 0
    table = (out / "boxes.csv").read_text()
    assert all(f"{n}." in table for n in range(7))
    assert run(*command, "--images", broken) == 2
    assert "--on-error skip" in last_line(capsys)
    assert run(*command, "--images", broken, "--on-error", "skip") == 0
    assert_counted(caplog.text)
    place = ["--trainer.default_root_dir", tmp_path, "--route", "0", *CPU]
    predict = ["predict", "--ckpt", detector, *place, "--data.predict_root", broken]
    assert run(*predict) == 2
    assert "on_bad_item skip" in last_line(capsys)
    caplog.clear()
    assert run(*predict, "--data.on_bad_item", "skip") == 0
    assert_counted(caplog.text)


def test_careless_commands_end_in_one_line(checkpoint, detector, pictures, tmp_path, capsys):
    (odd, _), ckpt, resnet = pictures, checkpoint("vit"), checkpoint("resnet")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "picture.yaml").write_bytes((odd / "0.png").read_bytes())
    explain = ["explain", "--ckpt", ckpt, "--device", "cpu", "--images"]
    for command, message in (
        ([*explain, odd / "0.png"], "no such folder of images"),
        ([*explain, empty], "no image in the folder"),
        ([*explain, odd, "--on-error", "maybe"], "'fail' or 'skip'"),
        ([*explain, odd, "--tau", "nan"], "--tau"),
        ([*explain, odd, "--budget", "0.5"], "calibrate-budget"),
        (["explain", "--ckpt", odd / "0.png", "--images", odd], "no checkpoint"),
        (["explain", "--ckpt", detector, "--images", odd], "of a detector"),
        (["profile", "--ckpt", detector], "use detect, test or predict"),
        (["profile", "--ckpt", odd], "config.json is missing"),
        (["profile", "--config", tmp_path / "picture.yaml"], "not a text file"),
        (["fit", "--config", tmp_path / "picture.yaml"], "not a YAML file"),
        (["fit", "--config", tmp_path / "picture.yaml", *CPU], "not a YAML file"),
        (["detect", "--ckpt", ckpt], "no detector"),
        (["benchmark", "--ckpt", ckpt, "--mix", "nan,1,0,0"], "shares that sum to 1"),
        (["calibrate-budget", "--ckpt", ckpt, "--target-ms", "1", "--batch", "0"], "--batch"),
        (["recalibrate", "--ckpt", ckpt, "--out", odd], "a folder, not a file"),
        (["train-gate", "--ckpt", ckpt, "--out", odd], "a folder, not a file"),
        (["train-gate", "--ckpt", ckpt, "--data.views", "7"], "--data.views"),
        (["train-gate", "--ckpt", ckpt, "--data.colour", "red"], "'colour' is not accepted"),
        (["demo", "--recipe", "scenes", "--out", tmp_path / "demo"], "not of Stage I"),
        (["test", "--ckpt", resnet, "--route", "0,1", *CPU], "an index for each of the 3 gates"),
        (["test", "--ckpt", resnet, "--route", "0,1,9", *CPU], "does not exist"),
        (["predict", "--ckpt", ckpt, "--data.predict_root", odd / "0.png", *CPU], "no such folder"),
    ):
        assert run(*command) == 2, command
        assert message in (line := last_line(capsys)), (command, line)
        assert line.startswith("error: ")


def test_weights_that_are_not_finite_are_named(checkpoint, tmp_path, capsys):
    ckpt = checkpoint("resnet")
    raw = load_state(ckpt)
    raw["state_dict"]["net.classifier.bias"][0] = float("nan")
    torch.save(raw, ckpt)
    for command in (["explain", "--images", "."], ["export", "--out", tmp_path / "out"]):
        assert run(*command, "--ckpt", ckpt) == 2
        assert "1 tensors are not finite, the first is classifier.bias" in last_line(capsys)


# ----------------------------------------------------------------------- image sizes of a ViT


@pytest.mark.parametrize("size", [18, 20, 3])
def test_other_image_sizes_resample_the_positions_of_a_vit_or_are_refused(
    families, randomize, size
):
    torch.manual_seed(0)
    plain = families["vit"]()
    strict = families["vit"](strict=True)
    strict.load_state_dict(randomize(plain).state_dict())
    x = torch.randn(3, 3, size, size)
    with pytest.warns(UserWarning, match=f"images of {size} pixels a side.* resampled"):
        expected = plain(x)
    assert expected.logits.isfinite().all()
    with pytest.warns(UserWarning, match="resampled"):
        actual = DynamicRunner(plain)(x)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)
    strict.eval()
    for ask in (strict, lambda x: strict(x, route=3), DynamicRunner(strict)):
        with pytest.raises(UserError, match="position table is for 16: resize the images to 16"):
            ask(x)
    assert torch.equal(strict(x.new_ones(1, 3, 16, 16), route=3).isfinite(), torch.ones(1, 7) > 0)


@pytest.mark.parametrize("family", ["vit", "vit-depth"])
def test_images_of_a_vit_must_be_square(families, randomize, family):
    net = randomize(families[family]())
    for ask in (net, DynamicRunner(net)):
        with pytest.raises(UserError, match="images of 16 x 12 pixels: crop or resize"):
            ask(torch.zeros(1, 3, 16, 12))


def test_strict_on_the_command_line(checkpoint, pictures, tmp_path, capsys):
    place = ["--trainer.default_root_dir", tmp_path, "--data.image_size", "18", *CPU]
    command = ["predict", "--ckpt", checkpoint("vit"), "--data.predict_root", pictures[0], *place]
    assert run(*command, "--model.net.strict", "true") == 2
    assert "resize the images to 16 pixels" in last_line(capsys)
    with pytest.warns(UserWarning, match="resampled"):
        assert run(*command) == 0


# ------------------------------------------------------------- empty batches, empty groups, N=1


def test_empty_batches_work_everywhere(net, images):
    none = images[:0]
    for output in (net(none), DynamicRunner(net)(none)):
        assert output.logits.shape == (0, net.num_classes)
        assert output.routes.shape == (0, net.num_gates)
        assert output.madds.shape == (0,)
    for route in (0, "largest"):
        assert net(none, route=route).shape == (0, net.num_classes)
    assert maps_of(net, none).shape == (0, *maps_of(net, images).shape[1:])
    assert collect(net, [batch_of(none), batch_of(images)]).logits.shape[0] == 9
    for measure in (lambda b: collect(net, b), lambda b: sweep(net, b, [0.0])):
        with pytest.raises(UserError, match="no images"):
            measure([batch_of(none)])


def test_a_detector_takes_an_empty_batch(randomize):
    net = randomize(DSConvNet(in_channels=3, image_size=64))
    detector = Detector(net, 3, levels=[4, 8], extras=1, width=32, scales=[0.2, 0.3, 0.5, 0.7])
    for route in (None, 0):
        found = detector.eval()(torch.zeros(0, 3, 64, 64), route=route)
        assert found.results == []
        assert found.madds.shape == (0,)


def test_routes_that_get_no_image_leave_the_others_alone(net, images):
    noise = torch.zeros(9, net.num_gates, net.gate_outputs)
    noise[:, :, 1] = 1e6
    noise[0, :, 3] = 1e7  # routes 0 and 2 of the space get none
    output = net(images, noise=noise if net.num_gates > 1 else noise[:, 0])
    assert set(output.routes.flatten().tolist()) == {net.routing_space[1], net.routing_space[3]}
    alone = net(images[1:], route=net.routing_space[1])
    scale = float(alone.abs().max())
    torch.testing.assert_close(output.logits[1:], alone, rtol=0, atol=1e-5 * scale)


def test_one_image_works_in_eval_mode_and_batch_norm_says_what_training_needs(families):
    net = DSConvNet()
    for use in (
        lambda: net.train()(torch.zeros(1, 1, 32, 32), route=0),
        lambda: recalibrate(net, [torch.zeros(1, 1, 32, 32)]),
    ):
        with pytest.raises(UserError, match=r"cannot learn from one image.*batch_size"):
            use()
    assert net.eval()(torch.zeros(1, 1, 32, 32), route=0).shape == (1, 10)
    for name in ("resnet", "vit"):  # norms without statistics
        net = families[name]().train()
        assert net(torch.zeros(1, 3, net.image_size, net.image_size), route=0).shape == (1, 7)


# ------------------------------------------------------------------------------- not finite


def test_images_that_are_not_finite_are_named_everywhere(net, images):
    runner = DynamicRunner(net)
    for value in (float("nan"), float("inf"), float("-inf")):
        images[7, 0, 5, 5] = value
        for ask in (net, runner, lambda x: maps_of(net, x)):
            with pytest.raises(UserError, match="image 7 of the batch"):
                ask(images)
        with pytest.raises(UserError, match="image 3 of the batch"):
            list(runner.map(images.split(4)))
        for measure in (lambda b: collect(net, b), lambda b: sweep(net, b, [0.0, 1.0])):
            with pytest.raises(UserError, match=r"not finite \(image 7\)"):
                measure(batches_of(images))


@pytest.mark.parametrize("family", SEVERAL)
def test_logits_of_a_later_gate_that_are_not_finite_are_named(
    families, randomize, images_of, family
):
    net = randomize(families[family]())
    x = images_of(net)
    routes = net(x).routes
    net.gates[2].conv_reduce.bias.data.fill_(float("nan"))
    for ask in (net, DynamicRunner(net)):
        with pytest.raises(UserError, match=r"gate's logits are not finite \(image 0 of"):
            ask(x)
    assert len(routes) == 9


class Images(ImageData):
    """Given images, of which some are not finite, for every verb."""

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__(batch_size=4, eval_batch_size=4)
        self.batch = Batch(image, torch.zeros(len(image), dtype=torch.int64), torch.arange(9))
        self.channels, self.predict_files = image.shape[1], []

    def setup(self, stage: str | None = None) -> None:
        pass

    def test_dataset(self):
        from tenfold.data import TensorItems

        return TensorItems(self.batch)

    def predict_dataset(self):
        self.predict_files = [Path(f"{n}.png") for n in range(9)]
        return self.test_dataset()


@pytest.mark.parametrize("family", ["cnn", "resnet", "vit"])
@pytest.mark.parametrize("route", ["dynamic", "1"])
def test_test_and_predict_name_an_image_that_is_not_finite(
    families, randomize, images_of, tmp_path, family, route
):
    net = randomize(families[family]())
    module = GateModule(net.name, net.config, route=route)
    module.net.load_state_dict(net.state_dict())
    x = images_of(net)
    x[6, 0, 5, 5] = float("nan")
    for verb, name in (("test", "image 6"), ("predict", r"image 6\.png")):
        with pytest.raises(UserError, match=rf"not finite \({name}\)"):
            getattr(quiet_trainer(tmp_path), verb)(module, datamodule=Images(x))


def test_a_detector_names_an_image_that_is_not_finite(randomize):
    net = randomize(DSConvNet(in_channels=3, image_size=64))
    detector = Detector(net, 3, levels=[4, 8], extras=1, width=32, scales=[0.2, 0.3, 0.5, 0.7])
    x = torch.randn(3, 3, 64, 64)
    x[2, 0, 0, 0] = float("nan")
    for route in (None, 0):
        with pytest.raises(UserError, match=r"not finite \(image 2 of the batch\)"):
            detector.eval()(x, route=route)


def test_bright_images_in_half_precision_are_finite(net):
    """Their sum is not, in float16."""
    runner = DynamicRunner(net)
    x = torch.full((2, net.in_channels, net.image_size, net.image_size), 200.0)
    runner.dtype = torch.float16
    runner.front = lambda x: (x.float(), torch.zeros(len(x), net.gate_outputs))
    assert runner._launch(x).choice.tolist() == [0, 0]


TINY = {"stage_widths": [[4, 8], [4, 8]], "depths": [1, 1], "gate_outputs": 2, "image_size": 16}


def test_training_stops_after_bad_steps_and_keeps_the_last_good_state(tmp_path):
    data = ImageData(image_size=16, train_size=96, val_size=16, test_size=16, batch_size=4)
    torch.manual_seed(0)
    module = SupernetModule(net=TINY, lr=0.05, warmup=0, cooldown=0, schedule="step")
    step = module.training_step

    def poisoned(batch: Batch, batch_idx: int) -> torch.Tensor:
        image = batch.image * float("nan") if module.current_epoch else batch.image
        return step(batch._replace(image=image), batch_idx)

    module.training_step = poisoned
    with pytest.raises(UserError, match="NaN or infinite from step") as caught:
        make_trainer(tmp_path, epochs=3, progress=False).fit(module, datamodule=data)
    assert str(tmp_path / LAST) in str(caught.value)
    kept = load_state(tmp_path / LAST)
    assert kept["global_step"] == 24  # the end of the first epoch; then ten bad steps
    assert module.global_step == 24 + 10
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_a_teacher_that_diverges_ends_training(tmp_path):
    data = ImageData(image_size=16, train_size=64, val_size=16, test_size=16, batch_size=4)
    module = SupernetModule(net=TINY, warmup=0, cooldown=0, schedule="step")
    module.teacher.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN or infinite"):
        make_trainer(tmp_path, epochs=1, progress=False).fit(module, datamodule=data)


# -------------------------------------------------------------- collapse, budgets, teachers


def test_each_gate_that_collapses_is_told(families, randomize, images_of, caplog):
    net = families["resnet"]()
    module = GateModule(net.name, net.config, gate_loss="sgs")
    module._counts += torch.tensor([[100, 0, 0, 0], [25, 25, 25, 25], [0, 0, 999, 1]])
    with caplog.at_level(logging.WARNING):
        module.on_train_epoch_end()
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in told] == [
        "gate collapse of gate 0",
        "gate collapse of gate 2",
    ]
    assert "chosen [0, 0, 999, 1] times" in told[1]
    for hint in ("SGS", "--lambda-cplx", "tau"):
        assert hint in told[1]
    assert not module._counts.any()


def test_decisions_are_counted_gate_by_gate(families, randomize, images_of):
    net = randomize(families["resnet"]())
    module = GateModule(net.name, net.config, gate_loss="sgs")
    module.net.load_state_dict(net.state_dict())
    module.log = lambda *_, **__: None
    module.training_step(batch_of(images_of(net)), 0)
    assert module._counts.sum(1).tolist() == [9, 9, 9]
    first = net.gate_logits(net.front(images_of(net)).gate_input).argmax(1).bincount(minlength=4)
    assert torch.equal(module._counts[0], first)


def test_budgets_outside_the_feasible_range_tell_it(net):
    widest = net.madds(net.routing_space[-1])
    net.budgets = [(0.0, 0.9 * widest), (0.5, 0.4 * widest)]
    assert tau_for_budget(net, 0.9) == 0.0
    for wrong in (0.39, 1.01, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"not feasible: choose 0\.400 to 1"):
            tau_for_budget(net, wrong)
    with pytest.raises(UserError, match="tau must be a finite number, got nan"):
        choose_routes(torch.zeros(2, 4), net.space_madds(), float("nan"))


@pytest.mark.parametrize("family", ["resnet", "vit", "cnn"])
def test_targets_outside_the_feasible_range_tell_it(
    families, randomize, images_of, family, tmp_path, capsys
):
    net = randomize(families[family](num_classes=10, in_channels=1, image_size=16))
    net.gate_trained = True
    sizes = {"image_size": 16, "train_size": 8, "val_size": 8, "test_size": 8}
    write_checkpoint(tmp_path / "a.ckpt", Saved({DATA: sizes}, {STUDENT: net}))
    command = ["calibrate-budget", "--ckpt", tmp_path / "a.ckpt", "--device", "cpu"]
    low, high = (f"{net.madds(k, 16):g}" for k in (0, net.num_routes - 1))
    if net.num_gates > 1:  # a price may not bring all of them to an end
        low, high = r"[\d.e+]+", r"[\d.e+]+"
    for target in (["--target-madds", "1"], ["--target-saving", "0.5"]):
        assert run(*command, *target) == 2
        line = last_line(capsys)
        assert "lies outside" in line
        assert re.search(rf"choose a target from {low} to {high}$", line), line
    search = ["search-routes", "--ckpt", tmp_path / "a.ckpt", "--budget", "1e9", "--device", "cpu"]
    if run(*search) == 2:  # a random network may have one Pareto route only
        assert re.search("choose from|only one route", last_line(capsys))


def test_paths_that_differ_between_ranks_are_found():
    module = SupernetModule(net=TINY, check_ranks=True)
    paths = ((0, 1, 2), (3, 3, 3))
    module.all_gather = lambda routes: torch.stack([routes, routes])
    module._check_ranks(paths)
    module.all_gather = lambda routes: torch.stack([routes, routes.flip(0)])
    with pytest.raises(RuntimeError, match="different routes"):
        module._check_ranks(paths)


def test_odd_teachers_are_told(tmp_path):
    net = create_model("ds_cnn_tiny", in_channels=3)
    (tmp_path / "notes.txt").write_text("no weights")
    for name, message in (
        ("resnet10t", "timm:NAME"),
        ("hub:resnet10t", "timm:NAME"),
        ("timm:", "timm:NAME"),
        ("timm:nosuch", "Unknown model"),
        (f"timm:resnet10t:{tmp_path / 'none.pth'}", "no such checkpoint"),
        (f"timm:resnet10t:{tmp_path / 'notes.txt'}", r"notes\.txt"),
    ):
        with pytest.raises(UserError, match=message):
            external_teacher(name, net)


def test_a_teacher_for_images_of_another_size_is_refused():
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    check_teacher(vit, torch.zeros(2, 3, 224, 224), "timm:a")
    with pytest.raises(UserError, match=r"does not take images of 32 x 32 pixels \(timm:a\)"):
        check_teacher(vit, torch.zeros(2, 3, 32, 32), "timm:a")


# -------------------------------------------------------------------------------- data sets


def test_a_missing_validation_folder_tells_the_tree(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "train" / "cat" / "0.png")
    data = ImageData(source="imagefolder", root=str(tmp_path), image_size=32)
    with pytest.raises(UserError, match=r"val folders are not there.*expected.*validation/"):
        data.setup()
    for name in ("validation", "val"):
        (tmp_path / name / "cat").mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name / "cat" / "0.png")
        data = ImageData(source="imagefolder", root=str(tmp_path), image_size=32)
        data.setup()
        assert [source.parts[-3] for source in data._splits["val"].sources] == [name]


def test_two_views_need_an_augmentation():
    with pytest.raises(UserError, match="two views need an augmentation"):
        ImageData(views=2)


def test_shares_that_leave_no_image_are_told():
    data = ImageData(train_size=64, val_size=8, test_size=8, gate_split=0.001)
    data.setup()
    with pytest.raises(UserError, match=r"gate_split 0\.001 of 64 training images is less"):
        data.gate_dataset()


def test_a_collapsed_gate_of_several_is_told_in_training(
    families, randomize, images_of, tmp_path, caplog
):
    net = randomize(families["resnet"](num_classes=10, in_channels=1, image_size=16))
    data = ImageData(image_size=16, train_size=16, val_size=8, test_size=8, batch_size=8)
    data.setup()
    options = {"gate_loss": "sgs", "sgs": "none", "lambda_ce": 0.0, "lambda_cplx": 100.0, "lr": 1.0}
    with caplog.at_level(logging.WARNING):
        train_gate(net, data, tmp_path, steps=12, progress=False, **options)
    assert "gate collapse of gate" in caplog.text
