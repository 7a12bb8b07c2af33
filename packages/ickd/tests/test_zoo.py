"""The 22 CIFAR networks against the published key lists, the counts, the reference arrays and text.

The reference arrays hold three families. The other four are written out a second time at the end
of this file, on functions of torch and the keys of a state dict.
"""

import inspect
import zlib

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ickd import zoo
from ickd.model.cost import count_macs
from ickd.model.mobilenet_v2 import InvertedResidual
from ickd.model.resnet import BasicBlock, ResNet
from ickd.model.resnet50 import Bottleneck
from ickd.model.shufflenet_v1 import ShuffleNetV1, ShuffleUnit, shuffle_channels
from ickd.model.shufflenet_v2 import BasicBlock as V2Block
from ickd.model.shufflenet_v2 import ShuffleNetV2
from ickd.model.vgg import VGG
from ickd.model.wide_resnet import PreactBlock, WideResNet
from tenfold.distillation import Taps
from tenfold.errors import UserError

THIN = ((16, 32), (16, 32), (32, 16), (64, 8))
X4 = ((32, 32), (64, 32), (128, 16), (256, 8))
WIDE = ((16, 32), (32, 32), (64, 16), (128, 8))
VGGS = ((64, 32), (128, 16), (256, 8), (512, 4), (512, 4))
# name: parameters, million multiply-adds, (channels, side) of F_0 .., ICKD tap, pooled, accuracy
TABLE = {
    "resnet8": (83_892, 12.5, THIN, (64, 8), 64, None),
    "resnet14": (181_108, 26.7, THIN, (64, 8), 64, None),
    "resnet20": (278_324, 40.8, THIN, (64, 8), 64, 69.06),
    "resnet32": (472_756, 69.1, THIN, (64, 8), 64, 71.14),
    "resnet44": (667_188, 97.4, THIN, (64, 8), 64, None),
    "resnet56": (861_620, 125.8, THIN, (64, 8), 64, 72.34),
    "resnet110": (1_736_564, 253.2, THIN, (64, 8), 64, 74.31),
    "resnet8x4": (1_233_540, 177.1, X4, (256, 8), 256, 72.50),
    "resnet32x4": (7_433_860, 1083.0, X4, (256, 8), 256, 79.42),
    "ResNet50": (
        *(23_705_252, 1298.0),
        *(((64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)), (2048, 4), 2048, 79.34),
    ),
    "wrn_16_1": (180_916, 26.7, THIN, (64, 8), 64, None),
    "wrn_16_2": (703_284, 101.1, WIDE, (128, 8), 128, 73.26),
    "wrn_40_1": (569_780, 83.3, THIN, (64, 8), 64, 71.98),
    "wrn_40_2": (2_255_156, 327.6, WIDE, (128, 8), 128, 75.61),
    "vgg8": (3_965_028, 96.2, VGGS, (512, 4), 512, 70.36),
    "vgg11": (9_277_284, 209.4, VGGS, (512, 4), 512, None),
    "vgg13": (9_462_180, 284.9, VGGS, (512, 4), 512, 74.64),
    "vgg16": (14_774_436, 398.2, VGGS, (512, 4), 512, None),
    "vgg19": (20_086_692, 511.4, VGGS, (512, 4), 512, None),
    "MobileNetV2": (
        *(812_836, 6.5, ((16, 16), (12, 16), (16, 8), (48, 4), (160, 2)), (1280, 2)),
        *(1280, 64.60),
    ),
    "ShuffleV1": (
        *(949_258, 38.7, ((24, 32), (240, 16), (480, 8), (960, 4)), (960, 4)),
        *(960, 70.50),
    ),
    "ShuffleV2": (
        *(1_355_528, 44.5, ((24, 32), (116, 16), (232, 8), (464, 4)), (1024, 4)),
        *(1024, 71.82),
    ),
}
FAMILIES = ["resnet8x4", "ResNet50", "wrn_16_2", "vgg13", "MobileNetV2", "ShuffleV1", "ShuffleV2"]


def meta(name, **kwargs):
    """A network without memory: for names, shapes and counts."""
    with torch.device("meta"):
        return zoo.create(name, **kwargs)


def hashed(key, shape):
    """The closed-form weights of the reference arrays, see the README beside them."""
    mask = np.uint64(0xFFFFFFFF)
    x = np.arange(int(np.prod(shape)), dtype=np.uint64)
    x = (x * np.uint64(2654435761) + np.uint64(zlib.crc32(key.encode()))) & mask
    for _ in range(2):
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x45D9F3B)) & mask
    u = (x ^ (x >> np.uint64(16))) / 2.0**32
    s = 2 * u - 1
    if key == "input":
        values = 2 * s
    elif key.endswith("num_batches_tracked"):
        values = 0 * s
    elif len(shape) == 4:
        values = s * np.sqrt(3) * np.sqrt(2 / np.prod(shape[1:]))
    elif len(shape) == 2:
        values = s * np.sqrt(3 / shape[1])
    elif key.endswith("running_var"):
        values = 0.8 + 0.4 * u
    elif key.endswith("weight"):
        values = 0.6 + 0.2 * u
    else:
        values = 0.1 * s
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def fill(net):
    """Hash weights, so that batch norms and biases do something."""
    net.load_state_dict({k: hashed(k, tuple(v.shape)) for k, v in net.state_dict().items()})
    return net.eval()


def small(name):
    """A network of the family that is quick to run and to trace: two units a stage at most."""
    net = zoo.create({"vgg13": "vgg8"}.get(name, name))
    units = (BasicBlock, Bottleneck, InvertedResidual, PreactBlock, ShuffleUnit, V2Block)
    for stage in list(net.modules()):
        if isinstance(stage, nn.Sequential) and len(stage) > 2 and isinstance(stage[1], units):
            del stage[1 : len(stage) - 1]
    return net


def images(batch=2, side=32):
    return hashed("input", (batch, 3, side, side))


def assert_close(found, wanted, rtol=1e-5):
    """Relative to the largest entry."""
    wanted = torch.as_tensor(wanted)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= rtol * wanted.abs().max()


# -- against the published lists and numbers -----------------------------------------------------


def test_names_are_those_of_the_table():
    assert zoo.names() == list(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_keys_order_and_shapes_are_those_of_the_released_checkpoints(name, reference):
    with np.load(reference / "zoo_state_dict_keys.npz") as arrays:
        keys, shapes = arrays[f"{name}.keys"], arrays[f"{name}.shapes"]
    state = meta(name).state_dict()
    assert list(state) == [str(key) for key in keys]
    wanted = [tuple(int(n) for n in shape if n) for shape in shapes]
    assert [tuple(tensor.shape) for tensor in state.values()] == wanted


@pytest.mark.parametrize("name", TABLE)
def test_counts_and_features_are_those_of_the_table(name):
    parameters, mega_macs, maps, last, pooled, top1 = TABLE[name]
    net = meta(name)
    known = zoo.info(name)
    assert sum(p.numel() for p in net.parameters()) == known.parameters == parameters
    assert count_macs(net, 32) == known.macs
    assert round(known.macs / 1e6, 1) == mega_macs
    assert known.top1 == top1

    taps = net.eval().taps(torch.zeros(2, 3, 32, 32, device="meta"))
    assert [tuple(m.shape) for m in taps.maps] == [(2, c, s, s) for c, s in maps]
    assert [m.shape for m in taps.preacts] == [m.shape for m in taps.maps]
    assert taps.signal("last").shape == (2, last[0], last[1], last[1])
    assert taps.pooled.shape == (2, pooled)
    assert taps.logits.shape == (2, 100)
    assert net.tap_width == known.tap_width == last[0]
    assert net.tap_channels[: len(maps)] == tuple(c for c, _ in maps)
    assert len(net.tap_names) == len(net.tap_channels) == len(maps) + (taps.last is not None)


@pytest.mark.parametrize("name", ["resnet20", "wrn_40_1", "vgg11"])
def test_reference_arrays(name, reference):
    arrays = np.load(reference / f"zoo_{name}.npz")
    net = fill(zoo.create(name))
    with torch.no_grad():
        taps = net.taps(images())
        assert torch.equal(net(images()), taps.logits)
    assert_close(taps.logits, arrays["logits"])
    assert_close(taps.pooled, arrays["pooled"])
    assert_close(taps.signal("last"), arrays["ickd_tap"])
    features, preacts = [*taps.maps, taps.pooled], [*taps.preacts, taps.pooled]
    assert len(features) == arrays["n_feats"]
    shapes = [tuple(int(n) for n in shape if n) for shape in arrays["feat_shapes"]]
    assert [tuple(f.shape[1:]) for f in features] == shapes
    means = torch.stack([f.double().mean() for f in features])
    assert_close(means, arrays["feat_mean"])
    assert_close(torch.stack([f.double().abs().mean() for f in features]), arrays["feat_absmean"])
    means = torch.stack([f.double().mean() for f in preacts])
    assert_close(means, arrays["preact_feat_mean"])
    assert zoo.info(name).parameters == arrays["n_params"]
    assert zoo.info(name).macs == arrays["macs"]


# -- taps and hooks ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_hooks_on_tap_names_give_the_taps(name, training):
    net = fill(small(name)).train(training)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    seen = {}
    handles = [
        net.get_submodule(n).register_forward_hook(lambda _, __, y, n=n: seen.__setitem__(n, y))
        for n in net.tap_names
    ]
    with torch.no_grad():
        logits = net(images(2, 16))
        moved = {k: v.clone() for k, v in net.state_dict().items()}
        for handle in handles:
            handle.remove()
        net.load_state_dict(start)
        taps = net.taps(images(2, 16))
    wanted = [*taps.maps] + ([] if taps.last is None else [taps.last])
    assert len(wanted) == len(net.tap_names)
    for tap, tensor in zip(net.tap_names, wanted, strict=True):
        assert torch.equal(seen[tap], tensor)  # no later module has written into it
    assert torch.equal(seen[net.tap_names[-1]], taps.signal("last"))
    assert torch.equal(logits, taps.logits)
    # every batch norm ran exactly once: the running statistics moved as in a forward pass
    after = net.state_dict()
    assert all(torch.equal(after[k], moved[k]) for k in moved)
    assert any(not torch.equal(after[k], start[k]) for k in start) == training


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_before_their_activation(name):
    net = fill(small(name))
    with torch.no_grad():
        taps = net.taps(images(2, 16))
    assert torch.equal(taps.preacts[0], taps.maps[0])  # F_0 is never replaced
    for before, after in zip(taps.preacts[1:], taps.maps[1:], strict=True):
        if name == "MobileNetV2":
            assert torch.equal(before, after)
            assert before.min() < 0
        elif name == "wrn_16_2":
            assert not torch.equal(before, after)
            assert before.min() < 0
            assert after.min() < 0
        elif name == "ShuffleV2":  # the sum is not shuffled, the map is
            order = permutation(before.shape[1], 2)
            assert torch.equal(before.relu()[:, order], after)
        else:
            assert torch.equal(before.relu(), after)
            assert before.min() < 0
    if name == "wrn_16_2":
        assert torch.equal(taps.preacts[-1].relu(), taps.last)


def test_wide_resnet_preacts_are_the_next_batch_norm():
    net = fill(zoo.create("wrn_16_2"))
    with torch.no_grad():
        taps = net.taps(images())
        norms = (net.block2.layer[0].bn1, net.block3.layer[0].bn1, net.bn1)
        for before, raw, norm in zip(taps.preacts[1:], taps.maps[1:], norms, strict=True):
            assert_close(before, norm(raw), 1e-6)


# -- training, initialisation, deployment --------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_every_weight_in_training(name):
    torch.manual_seed(0)
    net = small(name).train()
    taps = net.taps(torch.randn(4, 3, 32, 32))
    features = sum(m.square().mean() for m in (*taps.maps, *taps.preacts, taps.signal("last")))
    (F.cross_entropy(taps.logits, torch.tensor([0, 1, 5, 6])) + features).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if parameter.ndim > 1:
            assert parameter.grad.any(), key


KAIMING = ["resnet32", "resnet8x4", "ResNet50", "wrn_16_2", "vgg13", "MobileNetV2"]


@pytest.mark.parametrize("name", KAIMING)
def test_convolutions_start_kaiming_normal_over_fan_out(name):
    torch.manual_seed(0)
    net = zoo.create(name)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        if isinstance(module, nn.Conv2d):
            weight = module.weight
            std = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            spread = 5 / (2 * weight.numel()) ** 0.5  # five standard errors of an estimated std
            assert weight.std().item() == pytest.approx(std, rel=spread)
            assert abs(weight.mean()) < 5 * std / weight.numel() ** 0.5
            if weight.numel() > 1000:
                assert weight.abs().max() > 2.5 * std  # a uniform one would end at 1.73
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize(
    ("name", "std"),
    # that of a wide ResNet is as torch makes it, uniform up to 1 / √width
    [("vgg8", 0.01), ("MobileNetV2", 0.01), ("wrn_16_2", (1 / (3 * 128)) ** 0.5)],
)
def test_classifiers_start_without_a_bias(name, std):
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        (linear,) = (m for m in zoo.create(name).modules() if isinstance(m, nn.Linear))
        assert not linear.bias.any()
        found.append(linear.weight)
    assert torch.stack(found).std().item() == pytest.approx(std, rel=0.02)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ["wrn_16_2", "MobileNetV2", "ShuffleV2"])
def test_export(name):
    net = fill(small(name))
    x = images(2, 16)
    with torch.no_grad():
        assert_close(torch.export.export(net, (x,)).module()(x), net(x), 1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_channels_last(name):
    net = fill(small(name))
    x = images(2, 16)
    with torch.no_grad():
        wanted = net(x)
        net = net.to(memory_format=torch.channels_last)
        assert_close(net(x.to(memory_format=torch.channels_last)), wanted)


@pytest.mark.parametrize("name", ["wrn_16_2", "vgg13", "ShuffleV2"])
def test_compile_breaks_no_graph(name, monkeypatch):
    # dynamo cannot trace the checks of shapes that these tests switch on
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(Taps, "__init__", inspect.unwrap(Taps.__init__))
    net = fill(small(name))
    x = images(2, 16)
    with torch.no_grad():
        wanted = net.taps(x)
        found = torch.compile(net.taps, backend="eager", fullgraph=True)(x)
    assert_close(found.logits, wanted.logits, 1e-6)
    for one, other in zip(found.maps + found.preacts, wanted.maps + wanted.preacts, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_image_sizes(name):
    net = meta(name).eval()
    for size in ((64, 64), (16, 16), (24, 40)):
        taps = net.taps(torch.zeros(2, 3, *size, device="meta"))
        assert taps.logits.shape == (2, 100)
        assert taps.maps[0].shape[2:] == tuple(
            n // (2 if name == "MobileNetV2" else 1) for n in size
        )


def test_vgg_pools_a_fourth_time_on_images_of_64_pixels_alone():
    net = meta("vgg8").eval()
    sides = {}
    for side in (32, 48, 64, 96):
        maps = net.taps(torch.zeros(1, 3, side, side, device="meta")).maps
        sides[side] = [m.shape[-1] for m in maps]
    assert sides[32] == [32, 16, 8, 4, 4]
    assert sides[64] == [64, 32, 16, 8, 4]
    assert sides[48] == [48, 24, 12, 6, 6]
    assert sides[96] == [96, 48, 24, 12, 12]


def test_images_that_vanish_in_a_vgg_are_refused():
    net = zoo.create("vgg8").eval()
    assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 100)
    for run in (net, net.taps):
        with pytest.raises(UserError, match="8 pixels a side or more"):
            run(torch.zeros(1, 3, 32, 7))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_number_of_classes_changes_the_classifier_alone(name):
    ours, theirs = meta(name, num_classes=3).state_dict(), meta(name).state_dict()
    different = [k for k in theirs if ours[k].shape != theirs[k].shape]
    assert list(ours) == list(theirs)
    assert different == list(theirs)[-2:]
    assert meta(name, num_classes=3).num_classes == 3


# -- the registry --------------------------------------------------------------------------------


def test_unknown_names_get_the_closest_ones():
    for wrong, right in (("resnet-20", "resnet20"), ("mobilenetv2", "MobileNetV2")):
        for call in (zoo.create, zoo.info):
            with pytest.raises(UserError, match=f"{wrong}.*choose.*{right}"):
                call(wrong)
    with pytest.raises(UserError, match=r"resnet8, .*ShuffleV2"):
        zoo.create("bert")


def test_a_classifier_needs_classes():
    with pytest.raises(UserError, match="at least one class"):
        zoo.create("resnet8", num_classes=0)


def test_impossible_depths_and_sizes():
    for build, argument in ((ResNet, 18), (ResNet, 2), (WideResNet, 18), (VGG, 12)):
        with pytest.raises(ValueError, match="depth"):
            build(argument)
    with pytest.raises(ValueError, match="size"):
        ShuffleNetV2(size=3)


@pytest.mark.parametrize(("size", "widths"), [(0.5, (48, 96, 192)), (2, (224, 488, 976))])
def test_sizes_of_shufflenet_v2(size, widths):
    with torch.device("meta"):
        net = ShuffleNetV2(size=size)
    taps = net.eval().taps(torch.zeros(1, 3, 32, 32, device="meta"))
    assert tuple(m.shape[1] for m in taps.maps[1:]) == widths
    assert net.tap_width == (1024 if size < 2 else 2048)


# -- cost ----------------------------------------------------------------------------------------


def test_macs_by_hand():
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),  # 5 x 8 pixels: 40 * 6 * 2 * 9
        nn.BatchNorm2d(6),
        nn.Flatten(2),
        nn.Linear(40, 7),  # on each of 6 rows
    )
    net[1].eval()
    statistics = net[1].running_mean.clone()
    assert count_macs(net, (10, 16), channels=4) == 40 * 6 * 2 * 9 + 6 * 40 * 7
    assert [m.training for m in net] == [True, False, True, True]  # left as it was
    assert torch.equal(net[1].running_mean, statistics)
    assert not net[0]._forward_hooks


def test_macs_of_other_libraries_networks():
    import timm
    import torchvision

    with torch.device("meta"):
        net = torchvision.models.resnet18()
        assert count_macs(net, 224) == count_macs(timm.create_model("resnet18"), 224)
    convs = 112**2 * 64 * 3 * 49 + 4 * 56**2 * 64 * 64 * 9
    for side, width in ((28, 128), (14, 256), (7, 512)):
        convs += side**2 * width * (width // 2 * 9 + 3 * width * 9 + width // 2)
    assert count_macs(net, 224) == convs + 512 * 1000


# -- the families that the arrays do not cover, written a second time ----------------------------


def permutation(channels, groups):
    """Where each channel comes from in a shuffle: (i-th of group g) goes to place i·groups + g."""
    size = channels // groups
    order = [0] * channels
    for g in range(groups):
        for i in range(size):
            order[i * groups + g] = g * size + i
    return order


def test_channel_shuffle_is_the_permutation():
    x = torch.arange(12.0).view(1, 12, 1, 1)
    assert shuffle_channels(x, 3).flatten().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    for groups in (1, 2, 3):
        assert torch.equal(shuffle_channels(x, groups), x[:, permutation(12, groups)])


class Text:
    """Runs convolutions and batch norms of a state dict, in float64."""

    def __init__(self, net):
        self.state = {k: v.double() for k, v in net.state_dict().items()}

    def conv(self, x, key, stride=1, groups=1):
        weight = self.state[f"{key}.weight"]
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)

    def bn(self, x, key):
        mean, var, weight, bias = (
            self.state[f"{key}.{part}"].view(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def cbn(self, x, prefix, n, stride=1, groups=1):
        return self.bn(self.conv(x, f"{prefix}conv{n}", stride, groups), f"{prefix}bn{n}")

    def linear(self, x, key):
        return x @ self.state[f"{key}.weight"].T + self.state[f"{key}.bias"]


def resnet50(text, x):
    x = text.cbn(x, "", 1).relu()
    maps, preacts = [x], [x]
    for stage, (blocks, stride) in enumerate(zip((3, 4, 6, 3), (1, 2, 2, 2), strict=True), 1):
        for i in range(blocks):
            unit, step = f"layer{stage}.{i}.", stride if i == 0 else 1
            y = text.cbn(x, unit, 1).relu()
            y = text.cbn(y, unit, 2, step).relu()
            y = text.cbn(y, unit, 3)
            if i == 0:
                x = text.bn(text.conv(x, f"{unit}shortcut.0", step), f"{unit}shortcut.1")
            before = y + x
            x = before.relu()
        maps.append(x)
        preacts.append(before)
    pooled = x.mean((2, 3))
    return maps, preacts, x, pooled, text.linear(pooled, "linear")


def mobilenet(text, x):
    x = text.bn(text.conv(x, "conv1.0", 2), "conv1.1").relu()
    maps = [x]
    stages = ((1, 1), (2, 1), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))
    for stage, (repeats, stride) in enumerate(stages):
        for i in range(repeats):
            unit, step = f"blocks.{stage}.{i}.conv.", stride if i == 0 else 1
            y = text.bn(text.conv(x, f"{unit}0"), f"{unit}1").relu()
            y = text.bn(text.conv(y, f"{unit}3", step, y.shape[1]), f"{unit}4").relu()
            y = text.bn(text.conv(y, f"{unit}6"), f"{unit}7")
            x = x + y if step == 1 and x.shape == y.shape else y
        if stage in (1, 2, 4, 6):
            maps.append(x)
    last = text.bn(text.conv(x, "conv2.0"), "conv2.1").relu()
    pooled = last.mean((2, 3))
    return maps, maps, last, pooled, text.linear(pooled, "classifier.0")


def shuffle_v1(text, x):
    x = text.cbn(x, "", 1).relu()
    maps, preacts = [x], [x]
    for stage, blocks in enumerate((4, 8, 4), 1):
        for i in range(blocks):
            unit = f"layer{stage}.{i}."
            groups = 1 if x.shape[1] == 24 else 3
            y = text.cbn(x, unit, 1, groups=groups).relu()
            y = y[:, permutation(y.shape[1], groups)]
            y = text.cbn(y, unit, 2, 2 if i == 0 else 1, y.shape[1]).relu()
            y = text.cbn(y, unit, 3, groups=3)
            if i == 0:  # zeros of the border count in the mean
                ring = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2).mean((-1, -2))
                before = torch.cat([y, ring], 1)
            else:
                before = y + x
            x = before.relu()
        maps.append(x)
        preacts.append(before)
    pooled = x.mean((2, 3))
    return maps, preacts, x, pooled, text.linear(pooled, "linear")


def shuffle_v2(text, x):
    x = text.cbn(x, "", 1).relu()
    maps, preacts = [x], [x]
    for stage, blocks in enumerate((3, 7, 3), 1):
        unit = f"layer{stage}.0."
        left = text.cbn(x, unit, 1, 2, x.shape[1])
        left = text.cbn(left, unit, 2).relu()
        right = text.cbn(x, unit, 3).relu()
        right = text.cbn(right, unit, 4, 2, right.shape[1])
        right = text.cbn(right, unit, 5).relu()
        x = torch.cat([left, right], 1)
        x = x[:, permutation(x.shape[1], 2)]
        for i in range(1, blocks + 1):
            unit = f"layer{stage}.{i}."
            kept, y = x.chunk(2, 1)
            y = text.cbn(y, unit, 1).relu()
            y = text.cbn(y, unit, 2, groups=y.shape[1])
            y = text.cbn(y, unit, 3)
            before = torch.cat([kept, y], 1)
            x = torch.cat([kept, y.relu()], 1)[:, permutation(before.shape[1], 2)]
        maps.append(x)
        preacts.append(before)
    last = text.cbn(x, "", 2).relu()
    pooled = last.mean((2, 3))
    return maps, preacts, last, pooled, text.linear(pooled, "linear")


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("ResNet50", resnet50),
        ("MobileNetV2", mobilenet),
        ("ShuffleV1", shuffle_v1),
        ("ShuffleV2", shuffle_v2),
    ],
)
def test_a_second_writing_of_the_text(name, second):
    net = fill(zoo.create(name)).double()
    x = images(2, 16).double()
    maps, preacts, last, pooled, logits = second(Text(net), x)
    with torch.no_grad():
        taps = net.taps(x)
    for found, wanted in zip(taps.maps, maps, strict=True):
        assert_close(found, wanted, 1e-11)
    for found, wanted in zip(taps.preacts, preacts, strict=True):
        assert_close(found, wanted, 1e-11)
    assert_close(taps.signal("last"), last, 1e-11)
    assert_close(taps.pooled, pooled, 1e-11)
    assert_close(taps.logits, logits, 1e-11)


def test_the_first_shuffle_unit_is_narrower_inside_and_not_shuffled():
    with torch.device("meta"):
        unit = ShuffleNetV1().layer1[0]
    assert unit.conv1.out_channels == 54  # a quarter of 240 − 24
    assert (unit.groups, unit.conv1.groups, unit.conv3.groups) == (1, 1, 3)
