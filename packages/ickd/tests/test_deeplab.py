"""DeepLabV3+: published keys and costs, torchvision's trunks as peers, heads computed by hand."""

import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ickd.model.deeplab import (
    DeepLab,
    create_deeplab,
    drop_duplicates,
    load_backbone,
    load_deeplab,
    with_duplicates,
)
from ickd.model.deeplab.head import ASPP, Decoder, resize
from ickd.model.deeplab.mobilenet_v2 import InvertedResidual, MobileNetV2
from ickd.model.deeplab.resnet import resnet18, resnet101
from tenfold.errors import UserError

NAMES = ("resnet18", "resnet101", "mobilenet_v2")


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms that are no identity: weights, biases and running statistics drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor, low, high in (
                    (norm.weight, 0.6, 1.0),
                    (norm.bias, -0.3, 0.3),
                    (norm.running_mean, -0.2, 0.2),
                    (norm.running_var, 0.8, 1.2),
                ):
                    assert tensor is not None
                    tensor.uniform_(low, high, generator=generator)
    return module.eval()


def pixels(batch: int = 2, side: int = 65, seed: int = 3) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def nets() -> dict[str, DeepLab]:
    torch.manual_seed(0)
    small = {name: create_deeplab(name, num_classes=5) for name in ("resnet18", "mobilenet_v2")}
    for net in small.values():
        randomised(net)
    return small


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    """Equal relative to the largest entry."""
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max() / wanted.abs().max()) < tolerance


# ------------------------------------------------------------------------------ keys and costs


def shape(tensor: Tensor) -> tuple[int, ...]:
    return (*tensor.shape, *([0] * (4 - tensor.ndim)))


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_the_published_ones_in_their_order(name, reference):
    stored = np.load(reference / "deeplab_state_dict_keys.npz")
    key = name.removesuffix("_v2")
    with torch.device("meta"):
        state = create_deeplab(name).state_dict()
    if name == "mobilenet_v2":
        assert len(state) == 362  # 668 keys, of which 306 are duplicates
        state = with_duplicates(state)
    assert list(state) == stored[f"{key}.keys"].tolist()
    assert [shape(t) for t in state.values()] == [tuple(s) for s in stored[f"{key}.shapes"]]


@pytest.mark.parametrize(
    ("name", "parameters", "giga_macs"),
    [
        ("resnet101", 59_344_309, 92.8),
        ("resnet18", 16_608_181, 42.7),
        ("mobilenet_v2", 5_816_053, 27.1),
    ],
)
def test_costs_are_those_of_the_paper_s_networks(name, parameters, giga_macs):
    with torch.device("meta"):
        net, images = create_deeplab(name).eval(), torch.zeros(1, 3, 513, 513)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        logits = net(images)
    assert logits.shape == (1, 21, 513, 513)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert round(counter.get_total_flops() / 2e9, 1) == giga_macs


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", (64, 128, 256, 512)),
        ("resnet101", (256, 512, 1024, 2048)),
        ("mobilenet_v2", (144, 192, 576, 320)),
    ],
)
def test_six_taps_and_their_strides(name, channels):
    with torch.device("meta"):
        net, images = create_deeplab(name).eval(), torch.zeros(1, 3, 513, 513)
    taps = net.taps(images)
    assert [m.shape[1] for m in taps.maps] == [*channels, 256, 256] == list(net.tap_channels)
    assert [m.shape[2] for m in taps.maps] == [129, 65, 33, 33, 33, 129]
    assert taps.last is taps.maps[-1]
    assert all(a is b for a, b in zip(taps.maps, taps.preacts, strict=True))
    assert taps.logits is not None
    assert taps.logits.shape == (1, 21, 513, 513)


def test_an_output_stride_of_8_doubles_the_last_maps():
    for name in NAMES:
        with torch.device("meta"):
            net = create_deeplab(name, output_stride=8).eval()
            maps = net.taps(torch.zeros(1, 3, 513, 513)).maps
        assert maps[3].shape[2] == maps[4].shape[2] == 65
    with torch.device("meta"):
        deep, mobile = resnet101(8), MobileNetV2(8)
    assert [b.conv2.dilation[0] for b in deep.layer3] == [2] * 23
    assert [b.conv2.dilation[0] for b in deep.layer4] == [4, 8, 16]
    assert [conv.dilation[0] for conv in depthwise(mobile)] == [1] * 10 + [2] * 6 + [4]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_random_weights_are_those_of_the_published_program(name):
    """By outputs in a ResNet, by inputs in a MobileNet and in the heads."""
    for seed in range(2):
        torch.manual_seed(seed)
        net = create_deeplab(name)
        for key, conv in net.named_modules():
            if not isinstance(conv, nn.Conv2d):
                continue
            by_outputs = name == "resnet18" and key.startswith("backbone.")
            width = conv.out_channels if by_outputs else conv.in_channels // conv.groups
            std = (2 / (width * conv.kernel_size[0] ** 2)) ** 0.5
            spread = 5 / (2 * conv.weight.numel()) ** 0.5  # five standard errors of a deviation
            assert conv.weight.std().item() == pytest.approx(std, rel=spread), key


def test_names_and_strides_that_do_not_exist():
    with pytest.raises(UserError, match=r"no backbone called 'vgg'.*resnet18, resnet101, mobile"):
        create_deeplab("vgg")
    with pytest.raises(ValueError, match="8 or 16, got 32"):
        create_deeplab("resnet18", output_stride=32)
    with torch.device("meta"):
        assert create_deeplab("mobilenet").backbone_name == "mobilenet_v2"


# ------------------------------------------------------------------------------------ backbones


def dilate(conv: nn.Conv2d, dilation: int) -> None:
    conv.dilation, conv.padding = (dilation, dilation), (dilation, dilation)


def peer_resnet(ours: nn.Module, name: str) -> nn.Module:
    """torchvision's network with our weights; the last stage's strides and dilations set here."""
    peer = getattr(torchvision.models, name)(weights=None)
    report = peer.load_state_dict(ours.state_dict(), strict=False)
    assert report.missing_keys == ["fc.weight", "fc.bias"]
    assert not report.unexpected_keys
    for index, block in enumerate(peer.layer4):
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    dilate(conv, 2 * 2**index if name == "resnet101" else 2)
    return peer.eval()


@pytest.mark.parametrize(("name", "build"), [("resnet18", resnet18), ("resnet101", resnet101)])
@torch.no_grad()
def test_resnet_is_torchvision_s_with_its_last_relu_one_step_later(name, build):
    torch.manual_seed(1)
    ours = randomised(build())
    peer = peer_resnet(ours, name)
    found = ours(pixels(1))
    x = peer.maxpool(peer.relu(peer.bn1(peer.conv1(pixels(1)))))
    for stage, before in zip(
        (peer.layer1, peer.layer2, peer.layer3, peer.layer4), found.distilled, strict=True
    ):
        x = stage(x)
        assert_close(F.relu(before), x)
        assert float(before.min()) < 0
    assert_close(found.deep, x)
    assert_close(found.low, F.relu(found.distilled[0]), 1e-9)


def test_multi_grid_is_resnet_101_s_alone():
    with torch.device("meta"):
        deep, shallow = resnet101(), resnet18()
    assert [b.conv2.dilation[0] for b in deep.layer4] == [2, 4, 8]
    assert [b.conv2.stride[0] for b in deep.layer4] == [1, 1, 1]
    assert [b.conv2.stride[0] for b in deep.layer3][:2] == [2, 1]
    assert {c.dilation[0] for b in shallow.layer4 for c in (b.conv1, b.conv2)} == {2}
    for net in (deep, shallow):
        early = [m for s in (net.layer1, net.layer2, net.layer3) for m in s.modules()]
        assert {m.dilation[0] for m in early if isinstance(m, nn.Conv2d)} == {1}


def depthwise(net: MobileNetV2) -> list[nn.Conv2d]:
    return [m for m in net.features.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]


def test_mobilenet_strides_dilations_and_relu6():
    with torch.device("meta"):
        net = MobileNetV2()
    first_of_stage = {2: 2, 4: 2, 7: 2}
    assert [c.stride[0] for c in depthwise(net)] == [first_of_stage.get(i, 1) for i in range(1, 18)]
    assert [c.dilation[0] for c in depthwise(net)] == [1] * 16 + [2]
    assert {c.padding for c in depthwise(net)} == {(0, 0)}
    activations = [m for m in net.modules() if type(m).__name__.startswith("ReLU")]
    assert len(activations) == 1 + 1 + 2 * 16
    assert all(isinstance(m, nn.ReLU6) for m in activations)


@torch.no_grad()
def test_mobilenet_is_torchvision_s_where_padding_stays_zero(tmp_path):
    # norms of the expand convolutions that take the padding's zeros below 0, which ReLU6 cuts off
    torch.manual_seed(2)
    peer = randomised(torchvision.models.mobilenet_v2(weights=None))
    for block in peer.features[2:18]:
        norm = block.conv[0][1]
        norm.running_mean.zero_()
        norm.bias.copy_(-norm.bias.abs())
    peer.features[14].conv[1][0].stride = (1, 1)
    dilate(peer.features[17].conv[1][0], 2)
    torch.save(peer.state_dict(), tmp_path / "mobilenet_v2.pth")
    ours = create_deeplab("mobilenet_v2").eval()
    load_backbone(ours, tmp_path / "mobilenet_v2.pth")
    x = 20 * pixels(1)  # large enough for ReLU6 to cut
    found = ours.backbone(x)
    outputs = [x := block(x) for block in peer.features[:18]]
    assert float(outputs[0].max()) == 6
    assert_close(found.low, outputs[3])
    assert_close(found.deep, outputs[17])
    assert found.distilled[3] is found.deep
    for index, expanded in zip((4, 7, 14), found.distilled[:3], strict=True):
        conv, norm, _ = peer.features[index].conv[0]
        assert_close(expanded, norm(conv(outputs[index - 1])))


def slow_block(block: InvertedResidual, x: np.ndarray, dilation: int) -> np.ndarray:
    """One image through an inverted residual of stride 1, with loops; x (channels, h, w)."""
    weights = [m.weight.detach().numpy() for m in block.conv if isinstance(m, nn.Conv2d)]
    norms = [m for m in block.conv if isinstance(m, nn.BatchNorm2d)]

    def norm(y: np.ndarray, index: int) -> np.ndarray:
        m = norms[index]
        mean, var = m.running_mean.numpy(), m.running_var.numpy()
        scale = m.weight.detach().numpy() / np.sqrt(var + m.eps)
        return (y - mean[:, None, None]) * scale[:, None, None] + m.bias.detach().numpy()[
            :, None, None
        ]

    height, width = x.shape[1:]
    padded = np.zeros((len(x), height + 2 * dilation, width + 2 * dilation))
    padded[:, dilation:-dilation, dilation:-dilation] = x
    inner = norm(np.einsum("oc,chw->ohw", weights[0][:, :, 0, 0], padded), 0).clip(0, 6)
    out = np.zeros((len(inner), height, width))
    for row in range(height):
        for column in range(width):
            for i in range(3):
                for j in range(3):
                    part = inner[:, row + i * dilation, column + j * dilation]
                    out[:, row, column] += weights[1][:, 0, i, j] * part
    out = norm(out, 1).clip(0, 6)
    return x + norm(np.einsum("oc,chw->ohw", weights[2][:, :, 0, 0], out), 2)


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_block_expands_its_padding_too(dilation):
    torch.manual_seed(3)
    block = randomised(InvertedResidual(3, 3, 1, dilation, 6).double())
    x = 8 * torch.randn(1, 3, 6, 5, dtype=torch.float64)
    wanted = slow_block(block, x[0].numpy(), dilation)
    with torch.no_grad():
        found, expanded = block.with_expansion(x)
        assert torch.equal(block(x), found)
        np.testing.assert_allclose(found[0], wanted, rtol=1e-10, atol=1e-12)
        # the tap: what the expand layers say about the input without its padding
        np.testing.assert_allclose(expanded, block.conv[1](block.conv[0](x)), rtol=1e-12)
        plain = block.conv[:3](x)  # padded afterwards, as torchvision does: another function
        late = block.conv[3:](F.pad(plain, [dilation] * 4)) + x
        assert float((late - found).abs().max()) > 1e-3


# ---------------------------------------------------------------------------------------- heads


def relu_norm(y: np.ndarray, norm: nn.BatchNorm2d) -> np.ndarray:
    """Batch norm in eval mode and ReLU of (batch, channels, ...)."""
    at = (slice(None), None, None)
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    y = (y - norm.running_mean.numpy()[at]) * scale.detach().numpy()[at]
    return np.maximum(y + norm.bias.detach().numpy()[at], 0)


def slow_atrous(x: np.ndarray, weight: np.ndarray, dilation: int) -> np.ndarray:
    """A 3x3 convolution whose taps are `dilation` apart: sum over the pixels that are there."""
    batch, _, height, width = x.shape
    out = np.zeros((batch, len(weight), height, width))
    for row in range(height):
        for column in range(width):
            for i in range(3):
                for j in range(3):
                    r, c = row + (i - 1) * dilation, column + (j - 1) * dilation
                    if 0 <= r < height and 0 <= c < width:
                        out[:, :, row, column] += x[:, :, r, c] @ weight[:, :, i, j].T
    return out


def slow_resize(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, corners kept: pixel i of n lies at i (old - 1) / (n - 1)."""

    def weights(new: int, old: int) -> np.ndarray:
        matrix = np.zeros((new, old))
        for i in range(new):
            at = i * (old - 1) / (new - 1)
            low = min(int(at), old - 2) if old > 1 else 0
            matrix[i, low] += 1 - (at - low)
            if old > 1:
                matrix[i, low + 1] += at - low
        return matrix

    rows, columns = weights(height, x.shape[2]), weights(width, x.shape[3])
    return np.einsum("ah,bchw,dw->bcad", rows, x, columns)


def test_aspp_by_hand():
    torch.manual_seed(4)
    aspp = randomised(ASPP(3).double())
    x = torch.randn(2, 3, 15, 14, dtype=torch.float64)
    parts = [
        relu_norm(
            np.einsum("oc,bchw->bohw", aspp.aspp1.atrous_conv.weight.detach()[:, :, 0, 0], x),
            aspp.aspp1.bn,
        )
    ]
    for branch, dilation in ((aspp.aspp2, 6), (aspp.aspp3, 12), (aspp.aspp4, 18)):
        weight = branch.atrous_conv.weight.detach().numpy()
        parts.append(relu_norm(slow_atrous(x.numpy(), weight, dilation), branch.bn))
        with torch.no_grad():
            np.testing.assert_allclose(branch(x), parts[-1], rtol=1e-10, atol=1e-12)
    mean = x.numpy().mean((2, 3), keepdims=True)
    weight = aspp.global_avg_pool[1].weight.detach().numpy()[:, :, 0, 0]
    pooled = relu_norm(np.einsum("oc,bchw->bohw", weight, mean), aspp.global_avg_pool[2])
    parts.append(np.broadcast_to(pooled, parts[0].shape))
    weight = aspp.conv1.weight.detach().numpy()[:, :, 0, 0]
    wanted = relu_norm(np.einsum("oc,bchw->bohw", weight, np.concatenate(parts, 1)), aspp.bn1)
    with torch.no_grad():
        np.testing.assert_allclose(aspp(x), wanted, rtol=1e-10, atol=1e-12)
        assert torch.equal(F.relu(aspp.project(x)), aspp(x))


def test_decoder_by_hand():
    torch.manual_seed(5)
    decoder = randomised(Decoder(4, 3).double())
    deep = torch.randn(2, 256, 3, 2, dtype=torch.float64)
    low = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    reduce = decoder.conv1.weight.detach().numpy()[:, :, 0, 0]
    reduced = relu_norm(np.einsum("oc,bchw->bohw", reduce, low), decoder.bn1)
    x = np.concatenate([slow_resize(deep.numpy(), 7, 6), reduced], 1)
    layers = decoder.last_conv
    x = relu_norm(slow_atrous(x, layers[0].weight.detach().numpy(), 1), layers[1])
    x = relu_norm(slow_atrous(x, layers[4].weight.detach().numpy(), 1), layers[5])
    classify = layers[8].weight.detach().numpy()[:, :, 0, 0]
    bias = layers[8].bias.detach().numpy()
    wanted = np.einsum("oc,bchw->bohw", classify, x) + bias[:, None, None]
    with torch.no_grad():
        np.testing.assert_allclose(decoder(deep, low), wanted, rtol=1e-9, atol=1e-11)
        logits, tap = decoder.with_tap(deep, low)
        assert torch.equal(logits, decoder(deep, low))
        np.testing.assert_allclose(F.relu(tap), x, rtol=1e-9, atol=1e-11)
        assert float(tap.min()) < 0


def test_dropouts_stand_where_they_should():
    with torch.device("meta"):
        net = create_deeplab("resnet18")
    dropouts = {n: m.p for n, m in net.named_modules() if isinstance(m, nn.Dropout)}
    assert dropouts == {
        "aspp.dropout": 0.5,
        "decoder.last_conv.3": 0.5,
        "decoder.last_conv.7": 0.1,
    }


# -------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@torch.no_grad()
def test_taps_are_the_forward_pass_and_the_modules_outputs(name, nets):
    net, x = nets[name], pixels()
    seen: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(n).register_forward_hook(lambda _, __, y, n=n: seen.update({n: y}))
        for n in net.tap_names
    ]
    logits = net(x)
    hooked = dict(seen)
    for hook in hooks:
        hook.remove()
    taps = net.taps(x)
    assert torch.equal(taps.logits, logits)
    for key, tensor in zip(net.tap_names, taps.maps, strict=True):
        margin = (hooked[key].shape[2] - tensor.shape[2]) // 2
        assert margin == (name == "mobilenet_v2" and key.endswith("conv.1"))
        inside = hooked[key][:, :, margin:][:, :, : tensor.shape[2]]
        assert torch.equal(inside[..., margin:][..., : tensor.shape[3]], tensor)
        assert float(tensor.min()) < 0  # before its ReLU


@torch.no_grad()
def test_parts_follow_each_other(nets):
    for net in nets.values():
        features = net.backbone(pixels())
        logits = net.decoder(net.aspp(features.deep), features.low)
        assert logits.shape == (2, 5, 17, 17)
        wanted = torch.from_numpy(slow_resize(logits.double().numpy(), 65, 65)).float()
        assert_close(net(pixels()), wanted, 1e-5)


def test_every_size_of_image(nets):
    with torch.no_grad():
        for size in ((65, 80), (33, 47)):
            assert nets["mobilenet_v2"](torch.zeros(1, 3, *size)).shape == (1, 5, *size)


def test_resize_to_one_pixel_s_value():
    x = torch.tensor([[[[2.5]]]])
    assert torch.equal(resize(x, (3, 4)), torch.full((1, 1, 3, 4), 2.5))


def test_training_needs_two_images_and_reaches_every_parameter():
    torch.manual_seed(6)
    net = create_deeplab("mobilenet_v2", num_classes=5).train()
    with pytest.raises(UserError, match="batch of one image"):
        net(pixels(1, 33))
    tapped = net.backbone.features[4].conv[1]
    tapped.reset_running_stats()
    taps = net.taps(pixels(2, 33))
    assert taps.logits is not None
    assert int(tapped.num_batches_tracked) == 1  # statistics move once in a step
    taps.logits.square().mean().backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    for module in net.modules():  # frozen statistics have no need of a second image
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert net(pixels(1, 33)).shape == (1, 5, 33, 33)


# -------------------------------------------------------------------------------------- weights


def test_duplicates_are_dropped_if_they_agree(nets):
    net = nets["mobilenet_v2"]
    state = net.state_dict()
    doubled = with_duplicates(state)
    assert len(doubled) == 668
    kept, dropped = drop_duplicates(doubled)
    assert list(kept) == list(state)
    assert len(dropped) == 306
    assert all("_level_features." in key for key in dropped)
    assert drop_duplicates(state) == (state, [])
    key = "backbone.high_level_features.9.conv.3.weight"
    doubled[key] = doubled[key] + 1e-3
    with pytest.raises(UserError, match=rf"1 tensors are listed twice.*{re.escape(key)}"):
        drop_duplicates(doubled)


def test_both_kinds_of_files_load(nets):
    net = nets["mobilenet_v2"]
    state = net.state_dict()
    doubled = with_duplicates(state)
    halves = {k: v for k, v in doubled.items() if not k.startswith("backbone.features.")}
    for given in (state, doubled, halves):
        other = create_deeplab("mobilenet_v2", num_classes=5).eval()
        load_deeplab(other, given)
        assert all(
            torch.equal(a, b)
            for a, b in zip(other.state_dict().values(), state.values(), strict=True)
        )
    with pytest.raises(UserError, match=r"do not fit this DeepLab: .*missing"):
        load_deeplab(nets["resnet18"], doubled)
    with pytest.raises(UserError, match=r"misshapen \(decoder.last_conv.8.weight: \(5, 256"):
        load_deeplab(create_deeplab("mobilenet_v2", num_classes=6), state)


def trunk(state: dict[str, Tensor], end: str) -> list[Tensor]:
    """The tensors before a key's beginning, without counters, in their order."""
    keys = list(state)
    stop = next(i for i, key in enumerate(keys) if key.startswith(end))
    return [state[key] for key in keys[:stop] if not key.endswith("tracked")]


@pytest.mark.parametrize(
    ("backbone", "peer", "end"),
    [
        ("resnet18", lambda: torchvision.models.resnet18(weights=None), "fc."),
        ("resnet18", lambda: timm.create_model("resnet18"), "fc."),
        ("mobilenet_v2", lambda: torchvision.models.mobilenet_v2(weights=None), "features.18."),
        ("mobilenet_v2", lambda: timm.create_model("mobilenetv2_100"), "conv_head."),
    ],
)
def test_imagenet_weights_reach_the_backbone_in_order(backbone, peer, end, tmp_path):
    torch.manual_seed(7)
    source = randomised(peer()).state_dict()
    # torch 0.4 and older, of which torchvision's first files are, had no such counters
    old = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "weights.pth")
    net = create_deeplab(backbone)
    heads = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("backbone.")}
    load_backbone(net, tmp_path / "weights.pth")
    found = [v for k, v in net.backbone.state_dict().items() if not k.endswith("tracked")]
    wanted = trunk(source, end)
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(net.state_dict()[k], v) for k, v in heads.items())
    first = next(net.backbone.parameters())
    first.data.zero_()
    load_backbone(net, source)
    assert torch.equal(first, wanted[0])


def test_another_network_s_weights_are_refused(tmp_path):
    state = timm.create_model("resnet26").state_dict()
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"not the weights of a resnet18: .*other\.pth"):
        load_backbone(create_deeplab("resnet18"), tmp_path / "other.pth")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_backbone(create_deeplab("resnet18"), tmp_path / "absent.pth")
