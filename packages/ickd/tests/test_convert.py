"""Published checkpoints in each program's format, made from random networks; and bad files."""

import argparse
import os

import pytest
import timm
import torch
import torchvision

from ickd import zoo
from ickd.convert import UNKNOWN, convert_checkpoint
from ickd.convert.common import Converted
from tenfold.distillation import ICCLoss
from tenfold.errors import UserError

NAMES = ["resnet8x4", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"]


class Code:
    """Unpickling it would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def save(content, folder, name="ckpt.pth"):
    path = folder / name
    torch.save(content, path)
    return path


def randomised(net):
    """Running statistics that no fresh network has."""
    generator = torch.Generator().manual_seed(0)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
        else:
            tensor.fill_(7)
    return net


def prefixed(state, prefix="module."):
    return {prefix + key: tensor for key, tensor in state.items()}


def optimizer_of(net):
    """State of an SGD with momentum after a step."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def assert_weights(found, state):
    assert list(found) == list(state)
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.fixture(scope="module")
def resnet8():
    return randomised(zoo.create("resnet8"))


@pytest.fixture(scope="module")
def resnet18():
    return randomised(torchvision.models.resnet18())


# -- CIFAR ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["auto", "repdistiller"])
@pytest.mark.parametrize("key", ["accuracy", "best_acc"])
def test_repdistiller_epoch_file(resnet8, tmp_path, source, key):
    content = {
        "epoch": 240,
        "model": resnet8.state_dict(),
        key: torch.tensor(61.25),
        "optimizer": optimizer_of(resnet8),
    }
    found = convert_checkpoint(save(content, tmp_path), source)
    assert isinstance(found, Converted)
    assert found.network == "zoo:resnet8"
    assert_weights(found.state, resnet8.state_dict())
    assert found.notes[:2] == ["resnet8, 100 classes", "saved after epoch 240"]
    assert "top-1 61.25, says the file" in found.notes[2]
    assert (found.dropped, found.embedding) == ([], {})


def test_repdistiller_last_file_with_its_options(resnet8, tmp_path):
    options = argparse.Namespace(model_s="resnet8", model_t="resnet56", trial="1", r=1.0)
    path = save({"opt": options, "model": resnet8.state_dict()}, tmp_path)
    found = convert_checkpoint(path)
    assert found.network == "zoo:resnet8"
    assert found.notes == ["resnet8, 100 classes"]
    options.model_s = "resnet14"
    found = convert_checkpoint(save({"opt": options, "model": resnet8.state_dict()}, tmp_path))
    assert "options speak of resnet14, but the weights are of resnet8" in found.notes[-1]


@pytest.mark.parametrize("source", ["auto", "mdistiller"])
def test_mdistiller_file_of_parallel_training(resnet8, tmp_path, source):
    found = convert_checkpoint(
        save({"model": prefixed(resnet8.state_dict())}, tmp_path, "student_best"), source
    )
    assert found.network == "zoo:resnet8"
    assert_weights(found.state, resnet8.state_dict())


def test_the_student_of_a_whole_distiller(resnet8, tmp_path):
    beside = prefixed(zoo.create("resnet14").state_dict(), "module.teacher.")
    content = {"model": prefixed(resnet8.state_dict(), "module.student.") | beside, "best_acc": 6.5}
    found = convert_checkpoint(save(content, tmp_path))
    assert found.network == "zoo:resnet8"
    assert_weights(found.state, resnet8.state_dict())
    assert found.dropped == [key.removeprefix("module.") for key in beside]
    assert f"{len(beside)} tensors beside" in found.notes[-1]


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_told_by_keys_and_shapes(name, tmp_path):
    net = zoo.create(name, num_classes=11)
    state = dict(reversed(list(net.state_dict().items())))  # their order does not matter
    found = convert_checkpoint(save(state, tmp_path))
    assert found.network == f"zoo:{name}"
    assert found.notes == [f"{name}, 11 classes"]
    assert_weights(found.state, net.state_dict())


def test_every_network_of_the_zoo_is_told_apart():
    from ickd.convert.cifar import match_cifar

    for name in zoo.names():
        with torch.device("meta"):
            state = zoo.create(name, 10).state_dict()
        match = match_cifar(state)
        assert (match.name, match.classes, match.report.fits) == (name, 10, True)


def test_counters_that_old_files_lack_are_added(resnet8, tmp_path):
    state = resnet8.state_dict()
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    found = convert_checkpoint(save({"model": old, "accuracy": 50.0}, tmp_path))
    assert list(found.state) == list(state)
    zoo.create("resnet8").load_state_dict(found.state)
    assert f"{len(state) - len(old)} counters" in found.notes[-1]
    assert all(not found.state[key] for key in state.keys() - old.keys())


# -- ImageNet ------------------------------------------------------------------------------------


def torchdistill(model):
    return {
        "model": model,
        "optimizer": {"state": {}, "param_groups": [{"lr": 2e-4}]},
        "best_value": 72.19,
        "lr_scheduler": {"last_epoch": 99},
        "config": {"models": {"student_model": {"name": "resnet18"}}},
        "args": argparse.Namespace(config="resnet18.yaml", adjust_lr=True),
    }


@pytest.mark.parametrize("source", ["auto", "torchdistill"])
def test_torchdistill_file(resnet18, tmp_path, source):
    content = torchdistill(prefixed(resnet18.state_dict()))
    found = convert_checkpoint(save(content, tmp_path), source)
    assert found.network == "torchvision:resnet18"
    assert_weights(found.state, resnet18.state_dict())
    assert found.notes == ["resnet18, 1000 classes", "best validation value 72.19, says the file"]
    assert (found.dropped, found.embedding) == ([], {})


def test_timm_has_the_same_keys_and_gives_the_same_logits(resnet18, tmp_path):
    torch.manual_seed(0)
    ours = torchvision.models.resnet18(num_classes=5).eval()
    found = convert_checkpoint(save(torchdistill(ours.state_dict()), tmp_path))
    theirs = timm.create_model("resnet18", num_classes=5).eval()
    assert list(theirs.state_dict()) == list(found.state)
    theirs.load_state_dict(found.state)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outer", ["", "module."])
def test_the_wrapper_with_its_embedding(resnet18, tmp_path, outer):
    loss = ICCLoss(512, 512)
    embedding = {
        f"embed_dict.embed1.{key.removeprefix('embed_s.')}": tensor
        for key, tensor in loss.state_dict().items()
        if key.startswith("embed_s.")
    }
    assert len(embedding) == 6
    wrapped = prefixed(resnet18.state_dict(), "student_model.") | embedding
    for content in (torchdistill(prefixed(wrapped, outer)), prefixed(wrapped, outer)):
        found = convert_checkpoint(save(content, tmp_path))
        assert found.network == "torchvision:resnet18"
        assert_weights(found.state, resnet18.state_dict())
        assert found.dropped == list(embedding)
        assert "not part of the network" in found.notes[-1]
        for key, tensor in embedding.items():
            ours = key.replace("embed_dict.embed1.", "embed_s.")
            assert torch.equal(found.embedding[ours], tensor)
        assert not ICCLoss(512, 512).load_state_dict(found.embedding, strict=False).unexpected_keys


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101"])
def test_teachers_of_imagenet_are_told_apart(name):
    from ickd.convert.imagenet import match_imagenet

    with torch.device("meta"):
        match = match_imagenet(timm.create_model(name, num_classes=20).state_dict())
    assert (match.name, match.classes, match.report.fits) == (name, 20, True)


# -- other files -----------------------------------------------------------------------------------


def test_segmentation_files_go_to_their_own_reader(tmp_path, monkeypatch):
    from ickd.convert import deeplab

    seen = []
    answer = Converted("deeplab:resnet18", {}, [], [], {})
    monkeypatch.setattr(deeplab, "convert_deeplab", lambda raw: seen.append(raw) or answer)
    weights = {"module.aspp.conv1.weight": torch.zeros(2, 2, 1, 1)}
    contents = ({"epoch": 9, "state_dict": weights, "best_pred": 0.7}, weights)
    for content in contents:
        assert convert_checkpoint(save(content, tmp_path)) is answer
    assert convert_checkpoint(save(contents[0], tmp_path), "deeplab") is answer
    assert len(seen) == 3


def test_the_student_of_a_run_of_ickd(resnet8, tmp_path):
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.5",
        "state_dict": prefixed(resnet8.state_dict(), "student.net.")
        | {"teacher.net.conv1.weight": torch.zeros(1)},
        "hyper_parameters": {"student": "zoo:resnet8", "lr": 0.1},
    }
    found = convert_checkpoint(save(content, tmp_path, "last.ckpt"))
    assert found.network == "zoo:resnet8"
    assert_weights(found.state, resnet8.state_dict())
    assert found.dropped == ["teacher.net.conv1.weight"]
    del content["hyper_parameters"]
    assert convert_checkpoint(save(content, tmp_path, "last.ckpt")).network == UNKNOWN


def test_other_weights_are_taken_as_they_are(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    for content in (net.state_dict(), {"model": prefixed(net.state_dict())}):
        found = convert_checkpoint(save(content, tmp_path))
        assert found.network == UNKNOWN
        assert_weights(found.state, net.state_dict())


# -- bad files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["repdistiller", "mdistiller", "torchdistill", "deeplab"])
def test_an_unknown_network_is_refused_in_one_line(tmp_path, source):
    state = {"stem.weight": torch.zeros(3, 3, 3, 3), "head.weight": torch.zeros(5, 3)}
    path = save({"model": state}, tmp_path)
    with pytest.raises(UserError) as caught:
        convert_checkpoint(path, source)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    if source != "deeplab":
        assert "missing" in str(caught.value)
        assert "2 unexpected (stem.weight, head.weight)" in str(caught.value)


def test_missing_unexpected_and_misshapen_keys_are_listed(resnet8, tmp_path):
    state = dict(resnet8.state_dict())
    state["extra.weight"] = state.pop("layer2.0.conv2.weight")
    state["bn1.bias"] = torch.zeros(17)
    for content in ({"model": state, "accuracy": 60.0}, {"model": state, "best_acc": 60.0}):
        with pytest.raises(UserError) as caught:
            convert_checkpoint(save(content, tmp_path))
        line = str(caught.value)
        assert "the closest is resnet8" in line
        assert "1 missing (layer2.0.conv2.weight)" in line
        assert "1 unexpected (extra.weight)" in line
        assert "1 misshapen (bn1.bias: (17,) instead of (16,))" in line


def test_a_file_that_would_run_code_is_refused(resnet8, tmp_path):
    folder = tmp_path / "made"
    content = {"model": resnet8.state_dict(), "accuracy": 60.0, "opt": Code(folder)}
    with pytest.raises(UserError, match="would run code"):
        convert_checkpoint(save(content, tmp_path))
    assert not folder.exists()


def test_a_pickled_network_is_refused(resnet8, tmp_path):
    with pytest.raises(UserError, match="would run code"):
        convert_checkpoint(save({"model": resnet8}, tmp_path))


def test_damaged_files(resnet8, tmp_path):
    path = save({"model": resnet8.state_dict(), "accuracy": 60.0}, tmp_path)
    content = path.read_bytes()
    for end in (0, 100, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=r"ckpt\.pth"):
            convert_checkpoint(path)
    with pytest.raises(UserError, match="no such checkpoint"):
        convert_checkpoint(tmp_path / "absent.pth")


def test_numbers_that_are_not_finite(resnet8, tmp_path):
    state = {k: v.clone() for k, v in resnet8.state_dict().items()}
    state["fc.bias"][3] = float("nan")
    with pytest.raises(UserError, match=r"fc\.bias holds numbers that are not finite"):
        convert_checkpoint(save({"model": state, "accuracy": 1.0}, tmp_path))


def test_two_networks_under_one_key(resnet8, tmp_path):
    state = resnet8.state_dict()
    with pytest.raises(UserError, match="two networks"):
        convert_checkpoint(save({"model": state | prefixed(state), "accuracy": 1.0}, tmp_path))


def test_a_file_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"no weights.*epoch"):
        convert_checkpoint(save({"epoch": 3, "opt": argparse.Namespace()}, tmp_path))


def test_an_unknown_program(tmp_path):
    with pytest.raises(UserError, match=r"no program is called 'timm'.*repdistiller"):
        convert_checkpoint(tmp_path / "any.pth", "timm")
