"""Hooks on any network, and the names that are worth one."""

import copy
from collections import OrderedDict
from itertools import pairwise

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from ickd.taps import TapPoint, find_module, suggest, tap, tap_points, tokens_to_map
from tenfold.errors import UserError


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Net(nn.Module):
    """A stem, a block that runs twice, a pooled vector and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.block = Block(6)
        self.again = self.block
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.tokens = nn.Identity()
        self.swapped = nn.Identity()
        self.both = Both()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        x = self.again(x)
        self.tokens(torch.cat([x.new_zeros(len(x), 1, 6), x.flatten(2).mT], 1))
        self.swapped(x.permute(0, 2, 3, 1))
        self.both(x)
        return self.fc(self.pool(x).flatten(1))


class Both(nn.Module):
    """Gives a tuple, or a dict."""

    as_dict = False

    def forward(self, x: Tensor) -> object:
        return OrderedDict(out=x) if self.as_dict else (x, x.mean())


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def images(batch: int = 2, size: int = 8) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------- the hooks


def test_a_tap_reads_what_modules_give(net):
    x = images()
    expected = net(x)
    with tap(net, ["stem", "block.norm"]) as features:
        assert features == {}
        logits = net(x)
    assert torch.equal(logits, expected)
    assert list(features) == ["stem", "block.norm"]
    stem = net.stem(x)
    assert torch.equal(features["stem"], stem)
    # the block runs twice, its last output stays
    assert torch.equal(features["block.norm"], net.block.norm(net.block.conv(net.block(stem))))
    features.clear()
    net(x)
    assert features == {}


def test_every_pass_fills_anew_and_keeps_the_graph(net):
    with tap(net, ["stem"]) as features:
        net(images())
        first = features["stem"]
        net(images() + 1)
        assert not torch.equal(features["stem"], first)
    first.sum().backward()
    assert net.stem.weight.grad is not None
    assert net.stem.weight.grad.abs().max() > 0


def test_a_tap_leaves_nothing_behind(net):
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    with tap(net, ["stem", "block", "block.conv"]):
        assert hooks(net) == 3
    assert hooks(net) == 0
    with pytest.raises(ZeroDivisionError), tap(net, ["stem"]):
        raise ZeroDivisionError
    assert hooks(net) == 0
    with pytest.raises(UserError), tap(net, ["stem", "blok"]):
        pass
    assert hooks(net) == 0
    with pytest.raises(UserError), tap(net, ["stem", "fc"]):
        net(images())
    assert hooks(net) == 0
    assert modes == [m.training for m in net.modules()]
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())


def test_taps_inside_taps_see_the_same(net):
    with tap(net, ["stem"]) as outer:
        with tap(net, ["stem", "block"]) as inner:
            net(images())
        assert inner["stem"] is outer["stem"]
        assert hooks(net) == 1


def test_a_module_has_all_its_names(net):
    assert find_module(net, "again") is net.block
    with tap(net, ["again", "block"]) as features:
        net(images())
    assert torch.equal(features["again"], features["block"])


def test_an_overwritten_output_is_seen_as_overwritten():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    with tap(net, ["0"]) as features:
        out = net(images())
    assert torch.equal(features["0"], out)


# ----------------------------------------------------------------------- what is tapped there


def test_tokens_become_maps(net):
    x = images(2, 8)
    with tap(net, ["tokens:tokens=1", "block"]) as features:
        net(x)
    assert torch.equal(features["tokens:tokens=1"], features["block"])
    with tap(net, ["tokens:tokens"]) as features:
        net(x)
    assert features["tokens:tokens"].shape == (2, 6, 1, 17)  # 17 is no square


def test_tokens_to_map_keeps_order():
    tokens = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    made = tokens_to_map(tokens, drop=1)
    assert made.shape == (2, 3, 2, 2)
    assert torch.equal(made[1, :, 0, 1], tokens[1, 2])
    assert torch.equal(tokens_to_map(tokens)[0, :, 0, 4], tokens[0, 4])
    with pytest.raises(UserError, match="all of 5 tokens are dropped: drop less than 5"):
        tokens_to_map(tokens, drop=5)


def test_maps_whose_channels_come_last(net):
    with tap(net, ["swapped:nhwc", "block"]) as features:
        net(images())
    assert torch.equal(features["swapped:nhwc"], features["block"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fc", r"tap 'fc' gives \(2, 3\), not a map .*: tap a module in front of the pooling"),
        ("tokens", r"gives \(2, 17, 6\), not a map .*write tokens:tokens=1 \(one is dropped\)"),
        ("tokens:nhwc", r"gives \(2, 17, 6\), not a map .*write tokens:tokens=1"),
        ("block:tokens=1", r"gives \(2, 6, 4, 4\), not tokens .*: .* write block alone"),
        ("both", "tap 'both' gives a tuple, not a tensor: tap a module inside"),
    ],
)
def test_outputs_that_are_no_maps(net, name, message):
    with pytest.raises(UserError, match=message), tap(net, [name]):
        net(images())


def test_a_dict_is_named_too(net):
    net.both.as_dict = True
    with pytest.raises(UserError, match="'both' gives a OrderedDict"), tap(net, ["both"]):
        net(images())


@pytest.mark.parametrize("suffix", ["token=1", "tokens=x", "nchw", "tokens=-1"])
def test_unknown_suffixes(net, suffix):
    with pytest.raises(UserError, match=f"'stem:{suffix}' has an unknown suffix"):
        tap(net, [f"stem:{suffix}"]).__enter__()


def test_missing_names_tell_the_closest(net):
    with pytest.raises(UserError, match=r"Net has no module 'blok\.conv' to tap: .*block\.conv"):
        find_module(net, "blok.conv")
    with pytest.raises(UserError, match=r"no module '' to tap.*stem, block, block\.conv"):
        find_module(net, "")
    with pytest.raises(UserError, match=r"'@@@@@'.*ickd taps lists all"):
        find_module(net, "@@@@@")
    resnet = models.resnet18()
    with pytest.raises(UserError, match="'layer5' to tap: the closest are layer4"):
        find_module(resnet, "layer5:nhwc")


# -------------------------------------------------------------------------------- the listing


def test_points_are_all_modules_with_what_they_give(net):
    points = {point.name: point for point in tap_points(net, images(2))}
    # in the order in which they finish, the shared block once
    order = ["stem", "block.conv", "block.norm", "block"]
    order += ["tokens:tokens=0", "swapped:nhwc", "both", "pool", "fc"]
    assert list(points) == order
    assert points["stem"] == TapPoint("stem", "Conv2d", (6, 4, 4), 3 * 6 * 9 + 6, True)
    assert points["block"] == TapPoint("block", "Block", (6, 4, 4), 6 * 6 * 9 + 6 + 12, True)
    assert points["swapped:nhwc"].shape == (4, 4, 6)
    assert points["tokens:tokens=0"].shape == (17, 6)
    assert points["both"] == TapPoint("both", "Both", None, 0, False)
    assert points["pool"] == TapPoint("pool", "AdaptiveAvgPool2d", (6, 1, 1), 0, False)
    assert points["fc"] == TapPoint("fc", "Linear", (3,), 21, False)


@pytest.mark.parametrize("training", [False, True])
def test_listing_and_suggesting_leave_a_network_alone(net, training):
    net.train(training)
    net.block.norm.eval()  # a mixture, as a partly frozen student has
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    tap_points(net, images())
    suggest(net, images())
    assert hooks(net) == 0
    assert modes == [m.training for m in net.modules()]
    after = net.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in state.items())
    with pytest.raises(RuntimeError, match="channels"):
        tap_points(net, torch.zeros(2, 5, 8, 8))
    assert hooks(net) == 0
    assert modes == [m.training for m in net.modules()]


def test_the_last_map_of_every_resolution():
    net = nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()),
            down=nn.Conv2d(4, 6, 3, stride=2, padding=1),
            act=nn.ReLU(),
            blocks=nn.Sequential(Block(6), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU()),
            pool=nn.AdaptiveAvgPool2d(3),  # as in a VGG: no map of the images any more
            flat=nn.Flatten(),
        )
    )
    assert suggest(net, images(1, 16)) == (["stem", "blocks.0", "blocks"], "blocks")
    # a network of a single pixel in the end
    assert suggest(net, images(1, 4)) == (["stem", "blocks.0"], "blocks.0")


def test_the_inside_of_blocks_is_suggested_where_nothing_else_is():
    net = nn.Sequential(OrderedDict(a=nn.Sequential(OrderedDict(b=nn.Sequential()))))
    net.a.b.append(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten()))
    assert suggest(net, images(1, 4)) == (["a.b.0.1"], "a.b.0.1")


def test_nothing_to_suggest():
    with pytest.raises(UserError, match="no module of Sequential gives a map"):
        suggest(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), images())


def taps_of(model: nn.Module, names: list[str], size: int) -> dict[str, tuple[int, ...]]:
    """Shapes behind suggested names, read through `tap`."""
    with torch.no_grad(), tap(model, names) as features:
        model.eval()(images(2, size))
    return {name: tuple(feature.shape) for name, feature in features.items()}


SMALL_SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}


def small_swin() -> nn.Module:
    window, depths, heads = [2, 2], list(SMALL_SWIN["depths"]), list(SMALL_SWIN["num_heads"])
    return models.SwinTransformer([4, 4], 24, depths, heads, window)


def small_convnext() -> nn.Module:
    widths = (8, 16, 24, 32, None)
    pairs = pairwise(widths)
    return models.ConvNeXt([models.convnext.CNBlockConfig(*pair, 1) for pair in pairs])


KNOWN = {
    "resnet18": (models.resnet18, "layer4", [(64, 32), (64, 16), (128, 8), (256, 4), (512, 2)]),
    "convnext": (small_convnext, "features", [(8, 16), (16, 8), (24, 4), (32, 2)]),
    "squeezenet": (
        models.squeezenet1_1,
        "features",
        [(64, 31), (128, 15), (256, 7), (512, 3)],
    ),
    "densenet": (
        lambda: models.DenseNet(8, (2, 2, 2, 2), 16),
        "features",
        [(16, 32), (32, 16), (32, 8), (32, 4), (32, 2)],
    ),
    "swin": (small_swin, "permute", [(24, 16), (48, 8), (96, 4), (192, 2)]),
    "timm:resnet18": ({}, "layer4", [(64, 32), (64, 16), (128, 8), (256, 4), (512, 2)]),
    "timm:mobilenetv3_small_050": (
        {},
        "blocks",
        [(16, 32), (8, 16), (16, 8), (24, 4), (288, 2)],
    ),
    "timm:test_convnext": ({}, "norm_pre", [(24, 16), (32, 8), (48, 4), (64, 2)]),
    "timm:test_efficientnet": ({}, "bn2", [(16, 32), (24, 16), (32, 8), (48, 4), (256, 2)]),
    "timm:swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 2, **SMALL_SWIN},
        "norm:nhwc",
        [(24, 16), (48, 8), (96, 4), (192, 2)],
    ),
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_suggestions_on_known_networks(name):
    make, last, expected = KNOWN[name]
    if name.startswith("timm:"):
        net = timm.create_model(name.removeprefix("timm:"), pretrained=False, **make)
    else:
        net = make()
    stages, found = suggest(net, images(1, 64))
    assert found == last == stages[-1]
    with torch.no_grad(), tap(net.eval(), stages) as features:
        net(images(2, 64))
    shapes = [tuple(features[stage].shape) for stage in stages]
    assert shapes == [(2, channels, side, side) for channels, side in expected]


@pytest.mark.parametrize("make", ["timm", "torchvision"])
def test_the_class_token_is_dropped(make):
    if make == "timm":
        net = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, pretrained=False)
        norm = net.norm
    else:
        net = models.VisionTransformer(64, 16, 2, 3, 192, 384)
        norm = net.encoder
    stages, last = suggest(net.eval(), images(1, 64))
    assert stages == [last] == ["norm:tokens=1" if make == "timm" else "encoder:tokens=1"]
    given = []
    norm.register_forward_hook(lambda _, __, output: given.append(output))
    with torch.no_grad(), tap(net, stages) as features:
        net(images(2, 64))
    assert given[0].shape == (2, 1 + 16, 192)
    assert torch.equal(features[last].flatten(2), given[0][:, 1:].mT)
    assert features[last].shape == (2, 192, 4, 4)


def test_a_distilled_transformer_has_two_such_tokens():
    net = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, pretrained=False)
    assert suggest(net, images(1, 224))[1] == "norm:tokens=2"


def test_images_that_are_no_squares():
    net = timm.create_model("test_convnext", pretrained=False)
    x = torch.zeros(1, 3, 96, 64)
    assert suggest(net, x) == (["stages.0", "stages.1", "stages.2", "norm_pre"], "norm_pre")
    shapes = {point.name: point.shape for point in tap_points(net, x)}
    assert shapes["stages.1"] == (32, 12, 8)
    stages = suggest(small_swin(), x)[0]
    assert stages == ["features.1:nhwc", "features.3:nhwc", "features.5:nhwc", "permute"]
