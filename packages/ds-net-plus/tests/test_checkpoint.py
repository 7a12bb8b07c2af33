"""Checkpoints of every kind are read, written for Lightning, and refused when they do not fit."""

import argparse
import json

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from ds_net_plus.checkpoint import (
    META,
    Saved,
    check_same_network,
    from_pretrained,
    load_into,
    load_net,
    net_metadata,
    read_checkpoint,
    save_net,
    save_pretrained,
    write_checkpoint,
)
from ds_net_plus.data import Batch
from ds_net_plus.model import DSConvNet
from ds_net_plus.module import GateModule, SupernetModule
from tenfold.errors import UserError

SMALL = {
    "front_widths": [4, 4],
    "stage_widths": [[3, 5, 8], [4, 6, 9]],
    "depths": [1, 2],
    "gate_outputs": 3,
    "num_classes": 5,
    "image_size": 16,
}


def trainer(**options):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def batch():
    images = torch.randn((6, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(6) % 5, torch.arange(6), None)


def loader():
    return DataLoader([batch()], batch_size=None, collate_fn=lambda item: item)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def small(randomize):
    net = randomize(DSConvNet(**SMALL))
    net.gate_trained = True
    net.gate_score = "probability"
    net.routing_space = (0, 1, 2)
    net.budgets = [(0.0, 5e4), (0.25, 4e4)]
    return net


@pytest.fixture(scope="module")
def stage1_file(tmp_path_factory):
    """A checkpoint as the trainer writes it after one step."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("stage1") / "last.ckpt"
    fit = trainer(max_epochs=1)
    fit.fit(SupernetModule(net=SMALL, warmup=0, cooldown=0), loader())
    fit.save_checkpoint(path)
    return path


def test_a_stage1_file(stage1_file):
    raw = torch.load(stage1_file, weights_only=True)
    saved = read_checkpoint(stage1_file)
    assert set(saved.nets) == {"net", "teacher"}
    assert saved.evaluated is saved.nets["teacher"]
    for name, net in saved.nets.items():
        assert not net.training
        expected = {key: raw["state_dict"][f"{name}.{key}"] for key in net.state_dict()}
        assert same(net.state_dict(), expected)
    assert not same(saved.nets["net"].state_dict(), saved.nets["teacher"].state_dict())
    assert same(load_net(stage1_file).state_dict(), saved.nets["teacher"].state_dict())
    assert same(load_net(stage1_file, "student").state_dict(), saved.nets["net"].state_dict())


def test_the_untrained_gate_of_stage1_is_refused(stage1_file):
    net = load_net(stage1_file)
    torch.nn.init.ones_(net.gate_parameters()[-1])
    with pytest.raises(UserError, match="train-gate"):
        net(torch.zeros(1, 1, 16, 16))
    net(torch.zeros(1, 1, 16, 16), route=1)


def test_rewriting_keeps_the_rest_of_a_lightning_file(stage1_file, tmp_path):
    before = torch.load(stage1_file, weights_only=True)
    saved = read_checkpoint(stage1_file)
    with torch.no_grad():
        saved.nets["net"].classifier.bias.fill_(3.0)
    saved.evaluated.budgets = [(0.5, 1e4)]
    path = tmp_path / "new" / "recalibrated.ckpt"
    write_checkpoint(path, saved)
    after = torch.load(path, weights_only=True)
    assert list(after) == list(before)
    changed = {"state_dict", "hyper_parameters", META}
    for key in before.keys() - changed:
        assert str(after[key]) == str(before[key])
    assert after["optimizer_states"][0]["state"]
    assert after["hyper_parameters"] | {"net": 0} == before["hyper_parameters"] | {"net": 0}
    assert after["state_dict"].keys() == before["state_dict"].keys()
    assert (after["state_dict"]["net.classifier.bias"] == 3).all()
    assert after[META]["gate"]["budgets"] == [[0.5, 1e4]]
    assert [p.name for p in path.parent.iterdir()] == ["recalibrated.ckpt"]
    fit = trainer(max_epochs=2)
    fit.fit(SupernetModule(net=SMALL, warmup=0, cooldown=0), loader(), ckpt_path=path)
    assert fit.global_step == 2


def test_new_files_suit_both_modules(small, tmp_path, randomize):
    teacher = randomize(DSConvNet(**SMALL), 5)
    teacher.load_gate_state(small.gate_state())
    write_checkpoint(tmp_path / "stage1.ckpt", Saved({}, {"net": small, "teacher": teacher}))
    write_checkpoint(tmp_path / "gate.ckpt", Saved({}, {"net": small}))
    module = SupernetModule.load_from_checkpoint(tmp_path / "stage1.ckpt")
    assert same(module.net.state_dict(), small.state_dict())
    assert same(module.teacher.state_dict(), teacher.state_dict())
    gate = GateModule.load_from_checkpoint(tmp_path / "gate.ckpt")
    assert same(gate.net.state_dict(), small.state_dict())
    assert gate.net.gate_state() == small.gate_state()
    images = batch().image
    assert torch.equal(gate.eval()(images).logits, small(images).logits)


def test_the_trainer_tests_a_written_file(small, tmp_path):
    path = tmp_path / "gate.ckpt"
    write_checkpoint(path, Saved({}, {"net": small}))
    module = GateModule(net=SMALL, gate_loss="value")
    (result,) = trainer().test(module, loader(), ckpt_path=path, verbose=False)
    output = small(batch().image)
    assert result["test/madds"] == pytest.approx(output.madds.double().mean().item())
    top1 = (output.logits.argmax(1) == batch().label).double().mean().item()
    assert result["test/top1"] == pytest.approx(top1)


def test_a_gate_file_round_trips(small, tmp_path):
    write_checkpoint(tmp_path / "gate.ckpt", Saved({}, {"net": small}))
    saved = read_checkpoint(tmp_path / "gate.ckpt")
    assert set(saved.nets) == {"net"}
    assert saved.evaluated is saved.nets["net"]
    assert saved.evaluated.gate_state() == small.gate_state()
    assert same(saved.evaluated.state_dict(), small.state_dict())


def test_model_folders(net, images, tmp_path):
    save_net(tmp_path / "a", net)
    save_pretrained(net, tmp_path / "b")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["arch"] == net.name
    assert config["config"] == net.config
    for loaded in (load_net(tmp_path / "a"), from_pretrained(tmp_path / "b")):
        assert same(loaded.state_dict(), net.state_dict())
        assert torch.equal(loaded(images, route="largest"), net(images, route="largest"))


def test_official_files(tiny_mbnet, randomize, tmp_path):
    weights, average = (randomize(tiny_mbnet(), seed) for seed in (1, 2))
    path = tmp_path / "official.pth.tar"
    content = {
        "state_dict": {f"module.{k}": v for k, v in weights.state_dict().items()},
        "state_dict_ema": average.state_dict(),
        "args": argparse.Namespace(train_mode="all"),
        "epoch": 3,
    }
    torch.save(content, path)
    saved = read_checkpoint(path)
    assert same(saved.nets["net"].state_dict(), weights.state_dict())
    assert same(saved.evaluated.state_dict(), average.state_dict())
    assert saved.evaluated.gate_trained is False
    assert any("state_dict_ema" in line for line in saved.notes)
    write_checkpoint(tmp_path / "ours.ckpt", saved)
    ours = read_checkpoint(tmp_path / "ours.ckpt")
    assert same(ours.evaluated.state_dict(), average.state_dict())
    assert ours.evaluated.gate_trained is False
    assert "args" not in ours.raw
    SupernetModule.load_from_checkpoint(tmp_path / "ours.ckpt")


def test_loading_into_a_network(small, tmp_path):
    save_net(tmp_path, small)
    target = DSConvNet(**SMALL, dropout=0.5)
    assert load_into(target, tmp_path) is target
    assert same(target.state_dict(), small.state_dict())
    assert target.gate_state() == small.gate_state()


def test_another_network_is_refused_with_what_differs(small, tmp_path, tiny_mbnet):
    save_net(tmp_path, small)
    other = DSConvNet(**{**SMALL, "depths": [1, 1], "num_classes": 4})
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_into(other, tmp_path)
    line = str(error.value)
    assert "num_classes 5 instead of 4" in line
    assert "depths [1, 2] instead of [1, 1]" in line
    assert "12 unexpected (stages.1.1.conv.weight" in line
    assert "2 misshapen" in line
    assert same(other.state_dict(), before)
    with pytest.raises(UserError, match=r"arch ds_cnn_tiny instead of ds_mbnet; \d+ missing"):
        load_into(tiny_mbnet(), tmp_path)
    strides = tiny_mbnet(strides=(1, 1, 2, 2, 2))
    with pytest.raises(UserError, match="strides"):
        check_same_network(tiny_mbnet(), net_metadata(strides), strides.state_dict())


def test_another_routing_space_is_refused(randomize, tmp_path, tiny_mbnet):
    trained, target = randomize(tiny_mbnet()), tiny_mbnet()
    trained.routing_space, trained.gate_trained = (0, 1, 2, 3), True
    save_net(tmp_path, trained)
    with pytest.raises(UserError, match=r"\[0, 1, 2, 3\], not \[0, 4, 8, 13\]"):
        load_into(target, tmp_path)
    trained.gate_trained = False  # an untrained gate stands for no space
    save_net(tmp_path, trained)
    load_into(target, tmp_path)


def test_bad_files(small, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "absent.ckpt")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match="'ema' or 'student'"):
        load_net(tmp_path, "best")
    path = tmp_path / "file.ckpt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.0.0"}, path)
    with pytest.raises(UserError, match="another program"):
        read_checkpoint(path)
    torch.save({"state_dict": DSConvNet().state_dict()}, path)
    with pytest.raises(UserError, match=r"no DS-MBNet.*file\.ckpt"):
        read_checkpoint(path)


def test_bad_metadata(small, tmp_path):
    path = tmp_path / "file.ckpt"
    write_checkpoint(path, Saved({}, {"net": small}))
    raw = torch.load(path, weights_only=True)
    for change, message in (
        ({META: {"arch": "ds_cnn_tiny"}}, "config, gate missing"),
        ({META: {**raw[META], "arch": "resnet"}}, "no model is called 'resnet'"),
        ({META: {**raw[META], "gate": {}}}, "gate metadata are damaged"),
        ({"state_dict": {}}, r"do not fit the network.*missing"),
    ):
        torch.save({**raw, **change}, path)
        with pytest.raises(UserError, match=message):
            read_checkpoint(path)
