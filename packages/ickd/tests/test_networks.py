"""Networks by name: what they see, what they tell, and where their weights come from."""

import copy
import json
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from huggingface_hub.errors import LocalEntryNotFoundError
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ickd import zoo
from ickd.compiling import CompiledNetwork
from ickd.hub import from_pretrained, save_pretrained
from ickd.model.deeplab import create_deeplab
from ickd.model.embedded import EMBEDDED
from ickd.module import Distiller, load_student
from ickd.networks import (
    CIFAR100_MEAN,
    CIFAR100_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Input,
    Network,
    load_pretrained,
    load_weights,
    open_network,
)
from ickd.synthetic import BLOBS_MEAN, BLOBS_STD, GRATINGS_MEAN, GRATINGS_STD
from tenfold.errors import UserError
from tenfold.training import LAST

GRATINGS = Input((GRATINGS_MEAN,) * 3, (GRATINGS_STD,) * 3)
BLOBS = Input((BLOBS_MEAN,) * 3, (BLOBS_STD,) * 3)
IMAGENET = Input(IMAGENET_MEAN, IMAGENET_STD)
KINDS = {
    "zoo:resnet8": Input(CIFAR100_MEAN, CIFAR100_STD),
    "embedded:gratings-student": GRATINGS,
    "embedded:blobs-teacher": BLOBS,
    "deeplab:mobilenet_v2": IMAGENET,
    "timm:test_resnet": Input((0.5,) * 3, (0.5,) * 3, 160),
    "timm:mobilenetv3_small_050.lamb_in1k": Input(IMAGENET_MEAN, IMAGENET_STD, 224),
    "torchvision:mobilenet_v3_small": IMAGENET,
    "torchvision:shufflenet_v2_x0_5.IMAGENET1K_V1": IMAGENET,
    "python:mine:build": IMAGENET,
}

MINE = """
from torch import nn

def build(width=4, num_classes=2):
    layers = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, num_classes))

def wrong():
    return "a network"

def failing():
    return undefined
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """A module of the person's own, importable as `mine`."""
    folder = tmp_path / "importable"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(folder)
    yield
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)


def pixels(batch: int = 2, size: int = 32, colours: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(batch, colours, size, size, generator=generator)


def lively(network: Network) -> Network:
    """Statistics and affine parameters that no fresh batch norm has; in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.running_var):
                value.data = 0.5 + torch.rand(value.shape, generator=generator)
            for value in (module.bias, module.running_mean):
                value.data = 0.2 * torch.randn(value.shape, generator=generator)
    return network.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# ----------------------------------------------------------------------------------- by name


@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind_opens(name):
    network = open_network(name, num_classes=5)
    expected = KINDS[name]
    assert network.name == name
    assert network.expects.size == expected.size
    assert network.expects.mean == pytest.approx(expected.mean)
    assert network.expects.std == pytest.approx(expected.std)
    assert network.options == {"num_classes": 5}
    x = network.eval().example(2)
    assert x.shape[:2] == (2, 3)
    taps = network.taps(x)
    assert taps.logits is not None
    assert taps.logits.shape[:2] == (2, 5)
    assert torch.equal(taps.logits, network(x))
    assert taps.maps
    assert all(f.ndim == 4 and len(f) == 2 for f in taps.maps)
    if name.startswith(("timm", "torchvision", "python")):
        assert len(network.tap_names) == len(taps.maps)
    else:
        assert network.tap_names == ()


def test_networks_keep_their_own_number_of_classes():
    for name, classes in (("zoo:resnet8", 100), ("embedded:blobs-student", 6)):
        assert open_network(name).taps(pixels(2, 24)).logits.shape[1] == classes


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {}, r"no network is called 'resnet20': write zoo:NAME, embedded:NAME,"),
        ("zoo:", {}, r"no network is called 'zoo:'"),
        ("caffe:resnet", {}, r"no network is called 'caffe:resnet'"),
        ("zoo:resnet9", {}, "called 'resnet9': choose resnet"),
        ("embedded:gratings", {}, "no embedded network 'gratings': there are gratings-teacher"),
        ("deeplab:resnet34", {}, "choose resnet18, resnet101, mobilenet_v2"),
        (
            "timm:resnt18",
            {},
            r"timm has no model 'resnt18' that classifies images: did you mean resnet18",
        ),
        (
            "timm:@@",
            {},
            r"timm has no model '@@' that classifies images: timm's list_models\(\) has them",
        ),
        ("timm:resnet18.nobody", {}, "timm cannot build 'resnet18.nobody'"),
        ("torchvision:resnet81", {}, r"no model 'resnet81' that .*: did you mean resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", {}, "torchvision has no model 'fasterrcnn"),
        ("torchvision:resnet18.V3", {}, "no weights 'V3' of resnet18: there are IMAGENET1K_V1"),
        ("zoo:resnet8", {"num_classes": 0}, r"num_classes must be 1 or more, got 0 \(zoo:resnet8"),
        ("timm:test_resnet", {"num_classes": -2}, "num_classes must be 1 or more"),
        ("zoo:resnet8", {"width": 2}, "cannot build zoo:resnet8: .*'width'.*its options"),
        ("timm:test_resnet", {"widht": 2}, "cannot build timm:test_resnet: .*widht"),
        ("torchvision:squeezenet1_1", {"depth": 2}, "cannot build torchvision:squeeze.*: .*depth"),
        ("embedded:blobs-student", {"depth": 2}, "cannot build embedded:blobs-student"),
        ("python:nowhere:build", {}, r"no such function: No module named 'nowhere'"),
        ("python:mine:absent", {}, r"no such function: .*'absent' \(mine:absent\): write python:"),
        ("python:mine", {}, "no such function"),
        ("python::build", {}, "no such function"),
        ("python:mine:wrong", {}, r"mine:wrong made a str, not a torch\.nn\.Module"),
        ("python:mine:build", {"depth": 2}, "cannot build python:mine:build: .*depth"),
        ("zoo:resnet8", {"taps": ["layer4"]}, "no module 'layer4' to tap: .*layer1"),
        ("zoo:resnet8", {"mean": (0.5,)}, "mean and std of zoo:resnet8 must be as long"),
        ("zoo:resnet8", {"std": (0.5, 0.0, 0.5)}, "std above 0"),
        ("zoo:resnet8", {"mean": (), "std": ()}, "mean and std of zoo:resnet8"),
        ("torchvision:squeezenet1_1", {"image_size": 4}, r"does not take images \(1, 3, 4, 4\)"),
    ],
)
def test_names_and_options_that_do_not_exist(name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        open_network(name, **options).taps(pixels())
    assert "\n" not in str(caught.value)


def test_a_function_of_ones_own_fails_in_its_own_words():
    with pytest.raises(NameError, match="undefined"):
        open_network("python:mine:failing")
    made = open_network("python:mine:build", num_classes=7, width=6)
    assert made.options == {"num_classes": 7, "width": 6}
    assert made.net[0].out_channels == 6


def test_a_module_of_timm_tells_its_size():
    net = timm.create_model("test_vit", num_classes=3, depth=1)
    network = Network(net)
    assert (network.name, network.example_size) == ("VisionTransformer", 160)
    assert network.tap_names == ("norm:tokens=1",)
    small = open_network("timm:test_vit", img_size=64, depth=1)
    assert small.expects.size == 64
    assert small.taps(pixels(2, 32)).maps[0].shape == (2, 64, 4, 4)
    grey = open_network("timm:test_resnet", in_chans=1, num_classes=2)
    assert grey.expects == Input((0.5,), (0.5,), 160)
    assert grey.eval()(pixels(2, 160, 1)).shape == (2, 2)


def test_auxiliary_classifiers_are_left_out():
    with torch.device("meta"):
        network = open_network("torchvision:googlenet", num_classes=4, taps=["inception5b"])
    assert network.train()(pixels(2, 64).to("meta")).shape == (2, 4)
    assert network.net.transform_input


# ------------------------------------------------------------------------ what a network sees


def test_pixels_are_normalised():
    network = lively(open_network("zoo:resnet8"))
    x = pixels()
    by_hand = torch.stack([(x[:, c] - CIFAR100_MEAN[c]) / CIFAR100_STD[c] for c in range(3)], dim=1)
    torch.testing.assert_close(network.prepare(x), by_hand)
    assert torch.equal(network(x), network.net(network.prepare(x)))
    own = open_network("zoo:resnet8", mean=(0.1, 0.2, 0.3), std=(1, 2, 4))
    expected = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [[[1.0]], [[2]], [[4]]]
    )
    torch.testing.assert_close(own.prepare(x), expected)


def test_only_networks_with_a_size_resize():
    plain, sized = open_network("zoo:resnet8"), open_network("zoo:resnet8", image_size=16)
    assert plain.prepare(pixels(2, 40)).shape == (2, 3, 40, 40)
    assert torch.equal(sized.prepare(pixels(2, 16)), plain.prepare(pixels(2, 16)))
    x = pixels(2, 32)
    # a triangle over two old pixels on each side: 1/8, 3/8, 3/8, 1/8 inside the picture
    kernel = torch.tensor([1.0, 3, 3, 1]) / 8
    halved = F.conv2d(
        x.flatten(0, 1)[:, None], kernel.outer(kernel)[None, None], stride=2, padding=1
    )
    halved = halved.view(2, 3, 16, 16)
    resized = sized.prepare(x) * sized.get_buffer("std") + sized.get_buffer("mean")
    torch.testing.assert_close(resized[..., 1:-1, 1:-1], halved[..., 1:-1, 1:-1])
    wide = torch.rand(1, 3, 20, 48)
    assert sized.prepare(wide).shape == (1, 3, 16, 16)


def test_two_networks_see_the_same_pixels_differently():
    teacher, student = open_network("timm:test_resnet"), open_network("zoo:resnet8")
    x = pixels()
    assert teacher.prepare(x).shape == (2, 3, 160, 160)
    assert student.prepare(x).shape == (2, 3, 32, 32)
    # what is normalised is no part of the weights
    assert not [key for key in student.state_dict() if not key.startswith("net.")]


@pytest.mark.parametrize("shape", [(24, 24), (20, 48)])
def test_logits_of_pixels_have_the_size_of_the_pixels(shape, monkeypatch):
    network = lively(open_network("embedded:blobs-student", image_size=32))
    x = torch.rand(2, 3, *shape)
    inside = network.net(network.prepare(x))
    assert inside.shape == (2, 6, 32, 32)
    wanted = F.interpolate(inside, shape, mode="bilinear", align_corners=True)
    corners = torch.tensor([0, -1])
    assert torch.equal(wanted[..., corners, :][..., corners], inside[..., corners, :][..., corners])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for each in (network, CompiledNetwork(network)):
        taps = each.taps(x)
        assert torch.equal(taps.logits, wanted)
        assert torch.equal(each(x), wanted)
        assert [m.shape[2] for m in taps.maps] == [32, 16, 16]  # features stay as they are


def test_segmenters_at_their_own_resolutions_learn_from_each_other():
    module = Distiller(
        "embedded:blobs-student",
        "embedded:blobs-teacher",
        losses={"kd": 1.0, "ickd": 1.0},
        student_options={"image_size": 32},
        teacher_options={"image_size": 48},
    )
    before = copy.deepcopy(module.student.state_dict())
    masks = torch.arange(2 * 24 * 24).view(2, 24, 24) % 6
    loader = DataLoader(TensorDataset(pixels(2, 24), masks), batch_size=2)
    trainer = Trainer(
        accelerator="cpu", fast_dev_run=True, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert 0 <= trainer.callback_metrics["val/miou"] <= 1
    after = module.student.state_dict()
    assert any(not torch.equal(value, after[key]) for key, value in before.items())


# ----------------------------------------------------------------------- what a network tells


def test_own_taps_and_named_ones():
    own = lively(open_network("zoo:resnet8", num_classes=10))
    named = open_network("zoo:resnet8", num_classes=10, taps=["layer1", "layer2", "layer3"])
    named.load_state_dict(own.state_dict())
    x = pixels()
    a, b = own.taps(x), named.eval().taps(x)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.pooled, b.pooled)
    assert len(a.maps) == 4
    assert len(b.maps) == 3
    assert a.preacts
    assert not b.preacts
    for ours, theirs in zip(a.signal("stages"), b.signal("stages"), strict=True):
        assert torch.equal(ours, theirs)
    assert named.options == {"taps": ["layer1", "layer2", "layer3"], "num_classes": 10}
    assert named.tap_names == ("layer1", "layer2", "layer3")
    assert (own.tap_names, a.stem, b.stem) == ((), True, False)


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("timm:test_resnet", "fc"),
        ("timm:test_convnext", "head.fc"),
        ("timm:test_vit", "head"),
        ("timm:mobilenetv3_small_050", "classifier"),
        ("torchvision:mobilenet_v3_small", "classifier.3"),
        ("torchvision:shufflenet_v2_x0_5", "fc"),
        ("python:mine:build", "5"),
    ],
)
def test_the_pooled_vector_is_what_the_classifier_reads(name, classifier):
    size = {} if name == "timm:test_vit" else {"image_size": 64}
    network = lively(open_network(name, num_classes=6, **size))
    layer = network.net.get_submodule(classifier)
    taps = network.taps(pixels(2, 64))
    assert taps.pooled.shape == (2, layer.in_features)
    torch.testing.assert_close(layer(taps.pooled), taps.logits)
    assert not layer._forward_pre_hooks
    again = copy.deepcopy(network).taps(pixels(2, 64))  # a copy watches its own classifier
    assert torch.equal(again.pooled, taps.pooled)
    if name == "torchvision:shufflenet_v2_x0_5":
        torch.testing.assert_close(taps.pooled, taps.maps[-1].mean((2, 3)))


def test_without_a_linear_classifier_the_last_map_is_averaged():
    network = open_network("torchvision:squeezenet1_1", num_classes=4).eval()
    taps = network.taps(pixels(2, 64))
    torch.testing.assert_close(taps.pooled, taps.maps[-1].mean((2, 3)))
    assert network.tap_names[-1] == "features"


def test_taps_keep_modes_statistics_and_the_graph():
    network = open_network("timm:test_resnet", num_classes=3, image_size=32)
    assert network.training
    before = copy.deepcopy(network.state_dict())
    fresh = timm.create_model("test_resnet", num_classes=3).state_dict()
    for key, value in before.items():  # looking for taps has moved no statistics
        if "running" in key or "num_batches" in key:
            assert torch.equal(value, fresh[key.removeprefix("net.")])
    network.taps(pixels()).maps[-1].sum().backward()
    assert network.net.conv1[0].weight.grad.abs().max() > 0
    assert int(network.net.bn1.num_batches_tracked) == 1
    assert not [m for m in network.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_tap_that_fails_leaves_no_hook():
    network = open_network("timm:test_resnet", taps=["fc"], image_size=32)
    with pytest.raises(UserError, match=r"tap 'fc' gives \(2, 1000\), not a map"):
        network.taps(pixels())
    assert not [m for m in network.modules() if m._forward_hooks or m._forward_pre_hooks]


class Odd(nn.Module):
    """A module that does not run, and outputs of any kind."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.conv, self.idle = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.wrap = wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("wrap", "tap", "message"),
    [
        (lambda x: x, "idle", "tap 'idle' of Odd does not run with the network: see ickd taps"),
        (lambda x: {"out": x}, "conv", "Odd returns a dict, not logits: wrap the network so"),
        (lambda x: (x, x), "conv", "Odd returns a tuple, not logits: wrap the network so"),
    ],
)
def test_networks_that_do_something_else(wrap, tap, message):
    network = Network(Odd(wrap), tap_names=[tap])
    for run in (network.taps, lambda _: Distiller(network, num_classes=4)):
        with pytest.raises(UserError, match=message) as caught:
            run(pixels())
        assert "\n" not in str(caught.value)
    if tap == "conv":
        with pytest.raises(UserError, match=message):
            network(pixels())
    assert not [m for m in network.modules() if m._forward_hooks or m._forward_pre_hooks]


# -------------------------------------------------------------------------------- fingerprint


def test_a_fingerprint_is_of_name_input_taps_and_weights():
    network = lively(open_network("timm:test_resnet", num_classes=3))
    first = network.fingerprint()
    assert first == network.fingerprint() == copy.deepcopy(network).fingerprint()
    assert first == network.train().fingerprint() == network.eval().fingerprint()
    assert first == network.requires_grad_(False).fingerprint()
    assert first == network.to(memory_format=torch.channels_last).fingerprint()
    others = [
        Network(network.net, "timm:resnet19", network.expects, network.tap_names),
        Network(network.net, network.name, network.expects, network.tap_names[:-1]),
        Network(network.net, network.name, Input((0.4,) * 3, (0.5,) * 3, 160), network.tap_names),
        Network(network.net, network.name, Input((0.5,) * 3, (0.5,) * 3, 128), network.tap_names),
    ]
    weight, buffer = copy.deepcopy(network), copy.deepcopy(network)
    weight.net.fc.weight.data[1, 2] += 1e-6
    buffer.net.bn1.running_var[0] *= 1.001
    prints = [first, *(other.fingerprint() for other in (*others, weight, buffer))]
    assert len({*prints}) == len(prints)
    assert copy.deepcopy(network).bfloat16().fingerprint() != first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_fingerprint_does_not_know_the_device():
    network = open_network("zoo:resnet8")
    first = network.fingerprint()
    assert network.cuda().fingerprint() == first


# ----------------------------------------------------------------------------- weights of files


def saved_run(folder: Path, **arguments: object) -> tuple[Distiller, Path]:
    """A checkpoint as a trainer writes it."""
    module = Distiller(**arguments)
    lively(module.student)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / LAST)
    return module, folder / LAST


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return saved_run(
        folder,
        student="embedded:gratings-student",
        teacher="embedded:gratings-teacher",
        losses={"ickd": 4.0, "kd": 1.0},
        num_classes=3,
    )


def test_weights_of_a_run(run):
    module, path = run
    for source in (path, str(path.parent)):
        network = open_network("embedded:gratings-student", num_classes=3)
        assert load_weights(network, source) == ["the student of a run of ickd"]
        assert same(network.net, module.student.net)


def test_weights_of_a_published_checkpoint(tmp_path):
    net = lively(Network(zoo.create("resnet8", 10))).net
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"epoch": 240, "model": state, "best_acc": 71.5}, tmp_path / "ckpt_epoch_240.pth")
    network = open_network("zoo:resnet8", num_classes=10)
    notes = load_weights(network, tmp_path / "ckpt_epoch_240.pth")
    assert same(network.net, net)
    assert any("71.5" in note for note in notes)


def test_weights_alone_and_of_a_whole_network(tmp_path):
    network = lively(open_network("python:mine:build"))
    for name, state in (("net.pt", network.net), ("network.pt", network)):
        torch.save(state.state_dict(), tmp_path / name)
        fresh = open_network("python:mine:build")
        assert load_weights(fresh, tmp_path / name) == []
        assert same(fresh.net, network.net)


def test_weights_of_a_model_folder(tmp_path):
    network = lively(open_network("zoo:resnet8", num_classes=10))
    save_pretrained(network, tmp_path)
    fresh = open_network("zoo:resnet8", num_classes=10)
    load_weights(fresh, tmp_path)
    assert same(fresh.net, network.net)


def test_weights_of_another_network_list_their_keys(run, tmp_path):
    _, path = run
    other = open_network("embedded:gratings-teacher", num_classes=3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UserError) as caught:
        load_weights(other, path)
    line = str(caught.value)
    assert "the weights are not of embedded:gratings-teacher" in line
    assert "missing (stages.1.body.conv1.0.weight" in line
    assert "unexpected (stages.1.body.0.weight" in line
    assert line.endswith("the file seems to be of embedded:gratings-student")
    assert str(path) in line
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in before.items())
    classes = open_network("embedded:gratings-student", num_classes=16)
    with pytest.raises(UserError, match=r"2 misshapen \(fc\.weight: \(3, 48\) instead of \(16, 48"):
        load_weights(classes, path)
    torch.save({"conv.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="the file seems to be of an unknown network"):
        load_weights(classes, tmp_path / "other.pt")


def test_files_that_cannot_be_read(tmp_path):
    network = open_network("embedded:gratings-student")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_weights(network, tmp_path / "absent.pt")
    with pytest.raises(UserError, match=rf"no such checkpoint .*{LAST}"):
        load_weights(network, tmp_path)
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(UserError, match="cut short"):
        load_weights(network, tmp_path / "torn.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(UserError, match="no weights"):
        load_weights(network, tmp_path / "empty.pt")


# -------------------------------------------------------------------------- students of runs


def test_a_student_is_taken_out_of_its_run(run):
    module, path = run
    for source in (path, str(path.parent)):
        student = load_student(source)
        assert same(student.net, module.student.net)
        assert (student.name, student.options) == ("embedded:gratings-student", {"num_classes": 3})
        assert not student.training
    x = pixels(2, 16)
    assert torch.equal(student(x), module.student(x))


def test_a_student_keeps_its_options_and_taps(tmp_path):
    module, path = saved_run(
        tmp_path,
        student="timm:test_resnet",
        teacher="timm:test_resnet",
        pairs=[("layer3", "layer3", 1.0), ("layer4", "layer4", 0.5)],
        losses={"ickd": 2.5},
        num_classes=4,
        student_options={"image_size": 32, "mean": [0.1, 0.2, 0.3]},
        teacher_options={"image_size": 32},
    )
    student = load_student(path)
    assert student.tap_names == ("layer3", "layer4")
    assert student.expects == Input((0.1, 0.2, 0.3), (0.5, 0.5, 0.5), 32)
    assert same(student.net, module.student.net)
    assert torch.equal(student(pixels()), module.student(pixels()))


def test_runs_without_a_student_to_take(tmp_path):
    _, path = saved_run(tmp_path, student=zoo.create("resnet8", 3), num_classes=3)
    with pytest.raises(UserError, match=r"was a module, which has no name.*load_from_checkpoint"):
        load_student(path)
    torch.save(zoo.create("resnet8").state_dict(), tmp_path / "bare.pt")
    with pytest.raises(UserError, match=r"no checkpoint of ickd fit \(.*bare\.pt\)"):
        load_student(tmp_path / "bare.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_student(tmp_path / "nowhere")
    raw = torch.load(path, weights_only=False)
    raw["hyper_parameters"]["student"] = "zoo:resnet14"
    torch.save(raw, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"the weights are not of zoo:resnet14: .*missing \(layer1"):
        load_student(tmp_path / "other.ckpt")


# ----------------------------------------------------------------------------- published weights

OFFLINE = URLError("[Errno -2] Name or service not known\nand more lines")


@pytest.fixture
def published(monkeypatch):
    """torchvision's downloads replaced: weights by the name of their file, and what was asked."""
    files, asked = {}, []

    def fetch(url: str, **options: object) -> dict[str, Tensor]:
        name = url.rpartition("/")[2].partition("-")[0]
        asked.append(url.rpartition("/")[2])
        assert options == {"progress": False, "check_hash": True}
        if name not in files:
            raise OFFLINE
        return files[name].state_dict()

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fetch)
    return files, asked


def test_pretrained_weights_of_torchvision(published):
    files, asked = published
    source = torchvision.models.shufflenet_v2_x0_5()
    files["shufflenetv2_x0.5"] = lively(Network(source, tap_names=["conv5"])).net
    network = open_network("torchvision:shufflenet_v2_x0_5", image_size=64)
    load_pretrained(network)
    assert same(network.net, source)
    name = "torchvision:shufflenet_v2_x0_5.IMAGENET1K_V1"
    few = open_network(name, num_classes=4, image_size=64)
    own = few.net.fc.weight.detach().clone()
    load_pretrained(few)
    assert torch.equal(few.net.fc.weight, own)
    assert torch.equal(few.net.conv5[1].running_var, source.conv5[1].running_var)
    assert asked == ["shufflenetv2_x0.5-f707e7126e.pth"] * 2
    other = open_network("torchvision:shufflenet_v2_x0_5", image_size=64)
    other.net.conv1[0] = nn.Conv2d(3, 24, 5, stride=2, padding=2, bias=False)
    with pytest.raises(UserError, match=r"do not fit its options: 1 misshapen \(conv1\.0\.weight"):
        load_pretrained(other)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("torchvision:resnet50", "resnet50-0676ba61.pth"),
        ("torchvision:resnet50.IMAGENET1K_V2", "resnet50-11ad3fa6.pth"),
        ("deeplab:resnet101", "resnet101-63fe2227.pth"),
    ],
)
def test_which_of_the_published_weights_are_taken(name, file, published):
    with torch.device("meta"):
        network = open_network(name, taps=["layer4"] if name.startswith("torch") else ())
    with pytest.raises(UserError, match=r"no pretrained weights: .*Name or service"):
        load_pretrained(network)
    assert published[1] == [file]


def test_pretrained_weights_of_timm(monkeypatch):
    made = lively(open_network("timm:test_resnet")).net
    asked = []

    def create(name: str, **options: object) -> nn.Module:
        asked.append((name, options))
        return made

    network = open_network("timm:test_resnet", num_classes=4)
    monkeypatch.setattr(timm, "create_model", create)
    own = network.net.fc.weight.detach().clone()
    load_pretrained(network)
    assert asked == [("test_resnet", {"pretrained": True, "num_classes": None})]
    assert torch.equal(network.net.fc.weight, own)
    assert torch.equal(network.net.bn1.running_var, made.bn1.running_var)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
def test_pretrained_backbones_of_deeplab(backbone, published):
    files, asked = published
    source = torchvision.models.get_model(backbone, weights=None)
    files[backbone] = lively(Network(source, tap_names=["x"])).net
    network = open_network(f"deeplab:{backbone}", num_classes=3)
    heads = [copy.deepcopy(part.state_dict()) for part in (network.net.aspp, network.net.decoder)]
    load_pretrained(network)
    assert len(asked) == 1
    first = next(iter(source.state_dict().values()))
    assert torch.equal(next(iter(network.net.backbone.state_dict().values())), first)
    for part, before in zip((network.net.aspp, network.net.decoder), heads, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in part.state_dict().items())
    expected = create_deeplab(backbone, 3).backbone.state_dict()
    fresh = network.net.backbone.state_dict()
    assert not any(torch.equal(fresh[k], expected[k]) for k in expected if "running_var" in k)


@pytest.mark.parametrize(
    "name", ["torchvision:squeezenet1_1", "deeplab:mobilenet_v2", "timm:test_resnet"]
)
def test_without_a_connection(name, published, monkeypatch):
    network = open_network(name)

    def offline(*_: object, **__: object) -> nn.Module:
        raise LocalEntryNotFoundError("cannot find the file in the cache.\nCheck the connection.")

    monkeypatch.setattr(timm, "create_model", offline)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match="no pretrained weights: ") as caught:
        load_pretrained(network)
    line = str(caught.value)
    assert line.endswith(f"({name}): check the connection, or give a file of weights instead")
    assert "more lines" not in line
    assert len(line) < 200
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["zoo:resnet8", "embedded:blobs-student", "python:mine:build"])
def test_nobody_publishes_these(name):
    with pytest.raises(UserError, match=f"nobody publishes weights of {name}: give a file"):
        load_pretrained(open_network(name))


# ------------------------------------------------------------------------------ model folders


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("zoo:wrn_16_1", {"num_classes": 10}),
        ("embedded:blobs-student", {}),
        ("deeplab:mobilenet_v2", {"num_classes": 3, "output_stride": 8}),
        ("timm:test_resnet", {"num_classes": 5, "taps": ["layer3", "layer4"], "image_size": 48}),
        ("torchvision:squeezenet1_1.IMAGENET1K_V1", {"mean": (0.5, 0.4, 0.3), "image_size": 64}),
        ("python:mine:build", {"width": 6}),
    ],
)
def test_a_model_folder_round_trips(name, options, tmp_path):
    network = lively(open_network(name, **options))
    save_pretrained(network, tmp_path / "folder")
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config == {
        "network": name,
        "options": {k: v for k, v in options.items() if k not in ("mean", "image_size")},
        "expects": json.loads(json.dumps(network.expects._asdict())),
    }
    again = from_pretrained(tmp_path / "folder")
    assert same(again, network)
    assert (again.name, again.expects, again.options) == (name, network.expects, network.options)
    assert again.tap_names == network.tap_names
    assert again.fingerprint() == network.fingerprint()
    assert not again.training
    x = pixels(2, 32)
    assert torch.equal(again(x), network(x))


def test_a_student_becomes_a_model_folder(run, tmp_path):
    module, path = run
    save_pretrained(load_student(path), tmp_path)
    assert same(from_pretrained(str(tmp_path)).net, module.student.net)


def test_networks_that_no_folder_can_build_again(tmp_path):
    network = Network(zoo.create("resnet8"))
    with pytest.raises(UserError, match=r"ResNet was made around a module.*python:package"):
        save_pretrained(network, tmp_path / "a")
    network = open_network("python:mine:build")
    network.options["norm"] = nn.BatchNorm2d
    with pytest.raises(UserError, match=r"options of python:mine:build are no plain values"):
        save_pretrained(network, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_wrong_folders(tmp_path):
    with pytest.raises(UserError, match=r"no such model folder .*: give a folder or user/name"):
        from_pretrained(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        from_pretrained(tmp_path)
    network = open_network("zoo:resnet8", num_classes=10)
    save_pretrained(network, tmp_path)
    with pytest.raises(UserError, match=r"a file, no model folder .*: read it with load_weights"):
        from_pretrained(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong, message in (
        ({"architecture": "resnet50"}, r"not of ickd: it needs network, options and expects"),
        (config | {"network": "zoo:resnet9"}, "called 'resnet9'"),
        (config | {"options": {"num_classes": 9}}, r"not of zoo:resnet8: 2 misshapen \(fc"),
        (config | {"network": "zoo:resnet14"}, r"not of zoo:resnet14: \d+ missing \(layer1"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=message):
            from_pretrained(tmp_path)


def test_a_repository_on_the_hub(tmp_path, monkeypatch):
    network = lively(open_network("zoo:resnet8", num_classes=10))
    save_pretrained(network, tmp_path)
    asked = []

    def snapshot(name: str, **options: object) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert same(from_pretrained("user/my-student", revision="v1", token="secret"), network)
    assert asked == [
        (
            "user/my-student",
            {
                "allow_patterns": ["config.json", "model.safetensors"],
                "revision": "v1",
                "token": "secret",
                "cache_dir": None,
            },
        )
    ]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing in the repository"):
        from_pretrained("user/my-student")


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("no file in the cache.\nCheck."), OSError(), ValueError("no")],
)
def test_a_hub_that_gives_nothing(error, monkeypatch):
    def snapshot(name: str, **_: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(UserError, match="the Hub gave none: ") as caught:
        from_pretrained("user/absent")
    assert str(caught.value).startswith("no such model folder, and the Hub gave none: ")
    assert "Check." not in str(caught.value)
    assert "(user/absent): check the name and the network" in str(caught.value)


def test_the_embedded_networks_are_all_there():
    assert [open_network(f"embedded:{name}").name for name in EMBEDDED] == [
        "embedded:gratings-teacher",
        "embedded:gratings-student",
        "embedded:blobs-teacher",
        "embedded:blobs-student",
    ]
