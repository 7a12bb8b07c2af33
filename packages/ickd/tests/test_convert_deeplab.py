"""Published segmentation checkpoints become plain state dicts of our DeepLabs."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from ickd.convert.deeplab import convert_deeplab
from ickd.model.deeplab import create_deeplab, with_duplicates
from tenfold.checkpoint import load_state
from tenfold.errors import UserError


@pytest.fixture(scope="module")
def mobilenet() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return create_deeplab("mobilenet_v2", num_classes=7).state_dict()


def embedding() -> dict[str, Tensor]:
    return {
        "embed_s.conv2d.weight": torch.randn(6, 4, 1, 1),
        "embed_s.l2norm.weight": torch.ones(6),
        "embed_t.conv2d.weight": torch.randn(6, 4, 1, 1),
    }


def test_a_published_mobilenet_from_a_file(mobilenet, tmp_path):
    layers = embedding()
    state = {f"module.{k}": v for k, v in (with_duplicates(mobilenet) | layers).items()}
    torch.save({"epoch": 49, "state_dict": state, "best_pred": 0.7279}, tmp_path / "m.pth.tar")
    found = convert_deeplab(load_state(tmp_path / "m.pth.tar"))
    assert found.network == "deeplab:mobilenet_v2"
    assert list(found.state) == list(mobilenet)
    assert all(torch.equal(found.state[k], v) for k, v in mobilenet.items())
    assert len(found.dropped) == 306 + 3
    assert found.embedding.keys() == layers.keys()
    assert all(torch.equal(found.embedding[k], v) for k, v in layers.items())
    notes = "\n".join(found.notes)
    for part in (
        "mobilenet_v2, 7 classes",
        "epoch 49",
        "mIoU 0.7279",
        "306 tensors were listed twice",
        "embed_s and embed_t served the training alone",
    ):
        assert part in notes
    fresh = create_deeplab("mobilenet_v2", num_classes=7)
    fresh.load_state_dict(found.state)  # strictly
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.network = "deeplab:resnet18"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet101"])
def test_resnets_and_bare_state_dicts(backbone):
    with torch.device("meta"):
        state = create_deeplab(backbone).state_dict()
    # neither order nor counters matter
    given = {k: v for k, v in reversed(state.items()) if not k.endswith("num_batches_tracked")}
    found = convert_deeplab(given)
    assert found.network == f"deeplab:{backbone}"
    assert list(found.state) == list(state)
    assert (found.dropped, found.embedding) == ([], {})
    assert found.notes == [f"DeepLabV3+ with {backbone}, 21 classes"]


@pytest.mark.parametrize("kind", [torch.tensor, np.float32, np.float64])
def test_figures_saved_as_tensors_or_numpy_s(mobilenet, kind):
    raw = {"epoch": kind(3), "state_dict": mobilenet, "best_pred": kind(0.5)}
    assert "saved after epoch 3" in convert_deeplab(raw).notes
    assert "best validation mIoU 0.5000, says the file" in convert_deeplab(raw).notes


def test_duplicates_that_differ_are_refused(mobilenet):
    doubled = with_duplicates(mobilenet)
    doubled["backbone.low_level_features.0.1.bias"] = torch.ones(32)
    with pytest.raises(UserError, match=r"listed twice with other values, first backbone\.low"):
        convert_deeplab({"state_dict": doubled})


def test_what_is_no_deeplab_of_ours(mobilenet):
    with pytest.raises(UserError, match=r"not a DeepLab: no decoder.last_conv.8.weight \(keys: fc"):
        convert_deeplab({"state_dict": {"fc.weight": torch.zeros(2, 2)}})
    with pytest.raises(UserError, match="no weights under state_dict"):
        convert_deeplab({"epoch": 3})
    heads = {k: v for k, v in mobilenet.items() if not k.startswith("backbone.")}
    xception = {**heads, "backbone.block1.rep.0.weight": torch.zeros(1)}
    with pytest.raises(UserError, match="with another backbone: DeepLabs with resnet18"):
        convert_deeplab(xception)
    with torch.device("meta"):
        resnet50 = {**create_deeplab("resnet101").state_dict()}
    for key in [k for k in resnet50 if k.startswith("backbone.layer3.22.")]:
        del resnet50[key]
    with pytest.raises(UserError, match="with another backbone"):
        convert_deeplab(resnet50)


def test_missing_unexpected_and_misshapen_keys_are_listed(mobilenet):
    broken = {**mobilenet, "decoder.extra.weight": torch.zeros(1)}
    del broken["aspp.bn1.bias"]
    broken["aspp.bn1.weight"] = torch.zeros(3)
    with pytest.raises(UserError) as told:
        convert_deeplab(broken)
    for part in ("1 missing (aspp.bn1.bias)", "1 unexpected (decoder.extra.weight)", "(3,)"):
        assert part in str(told.value)
