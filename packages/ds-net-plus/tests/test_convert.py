"""The official checkpoint: which weights, which network, which gate mark; and bad files."""

import argparse
import os

import pytest
import torch

from ds_net_plus.convert import convert_official, infer_config, parity_check, relative_deviation
from ds_net_plus.model import DSConvNet, DSMobileNet
from tenfold.checkpoint import load_state
from tenfold.errors import UserError


class Code:
    """Unpickling it would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def pair(tiny_mbnet, randomize):
    """Weights and moving average; the untrained gate is the same in both."""
    weights, average = (randomize(tiny_mbnet(), seed) for seed in (1, 2))
    average.gate_parameters()[0].data.copy_(weights.gate_parameters()[0].data)
    return weights, average


@pytest.fixture
def official(pair):
    """What the official program saves, parallel training included."""
    weights, average = (
        {f"module.{key}": value.clone() for key, value in net.state_dict().items()} for net in pair
    )
    return {
        "epoch": 149,
        "arch": "slimmable_mbnet_v1_bn_uniform",
        "state_dict": weights,
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []},
        "args": argparse.Namespace(train_mode="all", gate_train=False, lr=0.08),
        "version": 2,
        "state_dict_ema": average,
        "metric": 70.25,
        "amp": {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 3}},
    }


def save(content, folder):
    path = folder / "DS_MBNet.pth.tar"
    torch.save(content, path)
    return path


def assert_same_weights(net, expected):
    found, wanted = net.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(("which", "used"), [("ema", "state_dict_ema"), ("model", "state_dict")])
def test_each_state_dict_loads_strictly(official, pair, tmp_path, which, used):
    net, report = convert_official(save(official, tmp_path), which)
    assert isinstance(net, DSMobileNet)
    assert not net.training
    assert report.used == used
    assert set(report.others) == {"state_dict", "state_dict_ema"} - {used}
    assert_same_weights(net, pair[which == "ema"])
    assert (report.epoch, report.metric, report.keys.fits) == (149, 70.25, True)
    assert report.entries == len(pair[0].state_dict())
    text = "\n".join(report.lines())
    assert f"weights: {used}, {report.entries} entries" in text
    assert "0 missing, 0 unexpected, 0 of another shape" in text
    assert "epoch 149, metric 70.25" in text


def test_a_file_with_the_average_alone(official, pair, tmp_path):
    del official["state_dict"]
    for which in ("ema", "model"):
        net, report = convert_official(save(official, tmp_path), which)
        assert report.used == "state_dict_ema"
        assert report.others == ()
        assert_same_weights(net, pair[1])


def test_the_network_is_read_off_the_shapes(tiny_mbnet):
    unusual = {
        "num_classes": 7,
        "stem_widths": [12, 20, 28],
        "stage_widths": [[8], [10, 11], [5, 9, 13], [6, 7, 30]],
        "depths": [2, 1, 3, 1],
        "strides": [1, 2, 2, 2],
        "kernel_size": 5,
        "gate_stage": 2,
        "gate_outputs": 3,
        "squeeze_ratio": 0.5,
        "in_channels": 1,
    }
    other = {**unusual, "squeeze_ratio": 0.3}
    for net in (DSMobileNet(**unusual), DSMobileNet(**other), tiny_mbnet()):
        inferred = infer_config(net.state_dict())
        ratio = inferred["squeeze_ratio"]
        assert {**inferred, "squeeze_ratio": 0} == {
            **{key: net.config[key] for key in inferred},
            "squeeze_ratio": 0,
        }
        assert ratio == pytest.approx(net.config["squeeze_ratio"], abs=0.03)
        DSMobileNet(**inferred).load_state_dict(net.state_dict())


def test_the_released_network_is_the_default_one():
    with torch.device("meta"):
        net = DSMobileNet()
    inferred = infer_config(net.state_dict())
    assert inferred == {key: net.config[key] for key in inferred}


def test_what_no_shape_shows_can_be_told(official, tmp_path):
    net, report = convert_official(save(official, tmp_path), stem_stride=1, image_size=32)
    assert (net.config["stem_stride"], net.image_size) == (1, 32)
    assert "strides [1, 2, 2, 2, 2]" in "\n".join(report.lines())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"train_mode": "all", "gate_train": False}, False),
        ({"train_mode": "gate", "gate_train": True}, True),
        ({"gate_train": True}, True),
        ({}, False),
    ],
)
def test_the_training_options_mark_the_gate(official, tmp_path, options, expected):
    official["args"] = argparse.Namespace(**options)
    net, report = convert_official(save(official, tmp_path))
    assert net.gate_trained is report.gate_trained is expected
    told, _ = convert_official(save(official, tmp_path), gate_trained=not expected)
    assert told.gate_trained is (not expected)


def test_a_gate_that_moved_was_trained(official, tmp_path):
    del official["args"]
    assert convert_official(save(official, tmp_path))[0].gate_trained is False
    key = "module.blocks.3.first_block.gate.gate.0.weight"
    official["state_dict_ema"][key] += 0.01
    assert convert_official(save(official, tmp_path))[0].gate_trained is True
    del official["state_dict"]
    assert convert_official(save(official, tmp_path))[0].gate_trained is False


def test_a_bare_state_dict_may_run_dynamically(pair, tmp_path):
    net, report = convert_official(save(pair[0].state_dict(), tmp_path))
    assert net.gate_trained is None
    assert "bare state dict" in report.lines()[0]
    net.check_gate()
    with pytest.raises(UserError, match="train-gate"):
        convert_official(pair[0].state_dict(), gate_trained=False)[0].check_gate()


def test_parity(pair):
    assert 0 < parity_check(pair[0]) < 1e-5
    pair[0].train()
    assert parity_check(pair[0], routes=[3], size=32) < 1e-5
    assert pair[0].training
    pair[0].eval()


def test_relative_deviation():
    expected = torch.tensor([1.0, -4.0])
    assert relative_deviation(expected + torch.tensor([0.0, 1.0]), expected) == 0.25
    assert relative_deviation(torch.full((2,), torch.nan), expected) == float("inf")
    assert relative_deviation(expected[:1], expected) == float("inf")
    assert relative_deviation(torch.zeros(2), torch.zeros(2)) == 0


def test_other_networks_are_told_apart(official, tmp_path):
    for state in (DSConvNet().state_dict(), torch.nn.Conv2d(3, 4, 1).state_dict()):
        with pytest.raises(UserError, match=r"no DS-MBNet.*\d+ missing.*\d+ unexpected"):
            convert_official(save({"state_dict": state}, tmp_path))
    del official["state_dict_ema"]["module.blocks.2.first_block.conv_dw.weight"]
    official["state_dict_ema"]["module.extra"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"1 missing .*conv_dw.*1 unexpected \(extra\)"):
        convert_official(save(official, tmp_path))


def test_damaged_weights(official, tmp_path):
    official["state_dict_ema"]["module.classifier.bias"][3] = torch.inf
    with pytest.raises(UserError, match=r"1 tensors are not finite.*classifier\.bias"):
        convert_official(save(official, tmp_path))
    path = save(official, tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cut short"):
        convert_official(path)
    with pytest.raises(UserError, match="no such checkpoint"):
        convert_official(tmp_path / "absent.pth.tar")
    with pytest.raises(UserError, match="'ema' or 'model'"):
        convert_official(official, "best")


def test_code_in_a_file_does_not_run(official, tmp_path):
    official["args"] = Code(tmp_path / "made")
    with pytest.raises(UserError, match="would run code"):
        convert_official(save(official, tmp_path))
    assert not (tmp_path / "made").exists()


def test_loading_needs_no_allowance_beyond_the_namespace(official, tmp_path):
    raw = load_state(save(official, tmp_path))
    assert raw["args"] == official["args"]
