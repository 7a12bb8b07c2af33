"""Networks of timm: exact at the full route, pruned by hand at the others; what is refused."""

import copy
import itertools
import math
import shlex

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import SelectAdaptivePool2d
from timm.models import register_model
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import ds_net_plus
from ds_net_plus.checkpoint import STUDENT, Saved, load_net, write_checkpoint
from ds_net_plus.cli import app
from ds_net_plus.convert import from_timm, load_timm, relative_deviation, timm_deviation, timm_vit
from ds_net_plus.convert import timm_resnet as resnet_parts
from ds_net_plus.convert.importance import Readers, taylor_scores
from ds_net_plus.data import write_cifar10
from ds_net_plus.model import DSResNet, DSViT, check_statistics, create_model
from tenfold.errors import UserError

FRONT, DEPTH, HEADS, HEAD_DIM = 1, 4, 3, 16
FEATURES, HIDDEN = HEADS * HEAD_DIM, 96
CHANNELS, DEPTHS = (32, 40, 48, 64), (2, 1, 2, 1)
RHOS = (0.5, 0.75, 1.0)


def randomize(model, seed=0):
    """Random weights, affine pairs and statistics, so that every part of the function shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.2 if parameter.ndim < 2 else 0.3 if parameter.ndim == 3 else 1.3
        nn.init.normal_(parameter, 0, scale / math.sqrt(max(parameter[0].numel(), 1)), generator)
    for layer in model.modules():
        if isinstance(layer, nn.LayerNorm | nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator)
            nn.init.normal_(layer.bias, 0, 0.2, generator)
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            layer.num_batches_tracked.fill_(7)
    return model.eval()


def tiny_vit(**overrides):
    arguments = {
        "img_size": 32, "patch_size": 8, "embed_dim": FEATURES, "depth": DEPTH,
        "num_heads": HEADS, "mlp_ratio": HIDDEN / FEATURES, "num_classes": 10,
    }  # fmt: skip
    return randomize(VisionTransformer(**{**arguments, **overrides}))


def tiny_resnet(**overrides):
    arguments = {"block": Bottleneck, "layers": DEPTHS, "num_classes": 10, "channels": CHANNELS}
    return randomize(ResNet(**{**arguments, **overrides}))


@register_model
def vit_tiny_of_tests(pretrained=False, num_classes=10, **kwargs):
    if pretrained:
        raise OSError("the hub is down\nfor maintenance")
    return tiny_vit(num_classes=num_classes)


@register_model
def resnet_tiny_of_tests(pretrained=False, num_classes=10, **kwargs):
    return tiny_resnet(num_classes=num_classes)


def images_for(model, count=3):
    side = 32 if isinstance(model, VisionTransformer) else 64
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((count, 3, side, side), generator=generator)
    return x.to(next(model.parameters()))


@torch.no_grad()
def assert_close(actual, expected):
    limit = 1e-12 if expected.dtype == torch.float64 else 1e-5
    assert actual.dtype == expected.dtype
    assert relative_deviation(actual, expected) < limit


def sliced_linear(layer, rows=None, columns=None):
    weight, bias = layer.weight.detach(), layer.bias.detach()
    if rows is not None:
        weight, bias = weight[rows], bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    plain = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    plain.weight.data, plain.bias.data = weight.clone(), bias.clone()
    return plain


def keep_best(scores, count):
    """Positions of the highest scores, in their old order."""
    order = sorted(range(len(scores)), key=lambda i: -float(scores[i]))
    return sorted(order[:count])


def head_scores(attn):
    q, k, v = attn.qkv.weight.detach().reshape(3, HEADS, HEAD_DIM, -1)
    columns = attn.proj.weight.detach().reshape(-1, HEADS, HEAD_DIM)
    return [
        torch.cat([q[h], k[h], v[h]]).abs().mean() + columns[:, h].abs().mean()
        for h in range(HEADS)
    ]


def unit_scores(mlp):
    fc1, fc2 = mlp.fc1.weight.detach().abs(), mlp.fc2.weight.detach().abs()
    return [fc1[u].mean() * fc2[:, u].mean() for u in range(HIDDEN)]


def prune_vit(model, heads, hidden, blocks, behind=FRONT):
    """timm's network with fewer heads, units and blocks behind the front."""
    plain = copy.deepcopy(model)
    plain.blocks = nn.Sequential(*list(plain.blocks)[: behind + blocks])
    for block in list(plain.blocks)[behind:]:
        attn, mlp = block.attn, block.mlp
        kept = [
            h * HEAD_DIM + c for h in keep_best(head_scores(attn), heads) for c in range(HEAD_DIM)
        ]
        rows = [part * FEATURES + c for part in range(3) for c in kept]
        attn.num_heads, attn.attn_dim = heads, heads * HEAD_DIM
        attn.qkv, attn.proj = sliced_linear(attn.qkv, rows), sliced_linear(attn.proj, None, kept)
        units = keep_best(unit_scores(mlp), hidden)
        mlp.fc1, mlp.fc2 = sliced_linear(mlp.fc1, units), sliced_linear(mlp.fc2, None, units)
    return plain


def prune_features(model, kept):
    """The blocks of timm's network behind the front, norm and head, on these features alone."""
    plain = copy.deepcopy(model)
    for block in list(plain.blocks)[FRONT:]:
        attn, mlp = block.attn, block.mlp
        attn.qkv, attn.proj = sliced_linear(attn.qkv, None, kept), sliced_linear(attn.proj, kept)
        mlp.fc1, mlp.fc2 = sliced_linear(mlp.fc1, None, kept), sliced_linear(mlp.fc2, kept)
    for norm in (n for n in plain.modules() if isinstance(n, nn.LayerNorm)):
        if not any(norm in (b.norm1, b.norm2) for b in list(plain.blocks)[:FRONT]):
            norm.weight.data, norm.bias.data = norm.weight[kept], norm.bias[kept]
            norm.normalized_shape = (len(kept),)
    plain.head = sliced_linear(plain.head, None, kept)
    return plain


# -- the full route ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (tiny_vit, {"importance": "none"}),
        (tiny_vit, {"front_blocks": 0, "sort_embedding": True}),
        (tiny_vit, {"front_blocks": 3}),
        (tiny_resnet, {}),
        (tiny_resnet, {"importance": "none", "rhos": RHOS}),
        (tiny_resnet, {"gates": 1}),
        (tiny_resnet, {"gates": 1, "rhos": RHOS, "squeeze_ratio": 0.5, "gate_outputs": 2}),
    ],
)
def test_the_full_route_is_the_original(build, options, dtype):
    model = build().to(dtype)
    before = copy.deepcopy(model.state_dict())
    net = from_timm(model, **options)
    x = images_for(model)
    assert_close(net(x, route=net.num_routes - 1), model(x))
    assert_close(net(x, route="largest"), model(x))
    assert_close(net.materialize(net.num_routes - 1)(x), model(x))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():  # nothing is shared
        for parameter in net.parameters():
            parameter.zero_()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
def test_the_network_can_be_written_and_built_again(build, tmp_path):
    net = from_timm(build())
    assert isinstance(net, DSViT if build is tiny_vit else DSResNet)
    assert not net.training
    assert net.gate_trained is False
    with pytest.raises(UserError, match="train-gate"):
        net(images_for(build()))
    create_model(net.name, **net.config).load_state_dict(net.state_dict())
    write_checkpoint(tmp_path / "a.ckpt", Saved({}, {STUDENT: net}))
    found = load_net(tmp_path / "a.ckpt")
    assert (found.name, found.config, found.gate_trained) == (net.name, net.config, False)
    x = images_for(build())
    assert torch.equal(found(x, route=0), net(x, route=0))


@pytest.mark.parametrize("name", ["deit_small_patch16_224", "resnet50"])
def test_at_true_size(name):
    model = load_timm(name, pretrained=False)
    net = from_timm(model)
    assert timm_deviation(net, model, images=1) < 1e-5
    assert net.active_params(3) == sum(p.numel() for p in model.parameters())
    assert net.name == {"resnet50": "ds_resnet50"}.get(name, "ds_vit_small")
    costs = [route.madds / 1e9 for route in net.routes]
    spec = {"resnet50": (0.379, 1.127, 2.364, 4.089)}  # a full front of DeiT: 0.38 G more
    assert costs == pytest.approx(spec.get(name, (1.883, 2.707, 3.531, 4.599)), rel=1e-3)


def test_default_routes_are_those_of_the_spec():
    def shares(features, heads):
        routes = timm_vit.default_routes(timm_vit.Sizes(features, heads, 4 * features, 12), 10)
        assert {tuple(route[::3]) for route in routes} == {(features, 10)}
        return [tuple(route[1:3]) for route in routes]

    assert shares(384, 6) == [(2, 1), (3, 2), (4, 3), (6, 4)]
    assert shares(768, 12) == [(4, 1), (6, 2), (9, 3), (12, 4)]
    assert shares(192, 3) == [(1, 2), (2, 2), (2, 3), (3, 4)]
    assert shares(1024, 16) == [(5, 1), (8, 2), (12, 3), (16, 4)]
    assert shares(64, 1) == [(1, 1), (1, 2), (1, 3), (1, 4)]


# -- narrower routes ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "routes",
    [
        None,
        [(48, 1, 0.5, 1), (48, 2, 1, 2), (48, 3, 2, 3)],
        [(48, 3, 2, blocks) for blocks in (1, 2, 3)],
    ],
)
@torch.no_grad()
def test_routes_of_a_vit_are_hand_pruned_networks(routes, dtype):
    model = tiny_vit().to(dtype)
    net = from_timm(model, routes=routes, front_blocks=FRONT)
    assert net.gate_outputs == len(net.routes)
    x = images_for(model)
    for route in net.routes:
        _, heads, hidden, blocks = route.widths
        pruned = prune_vit(model, heads, hidden, blocks)
        assert_close(net(x, route=route.index), pruned(x))
        if routes is None and route.index < 3:
            assert relative_deviation(net(x, route=route.index), model(x)) > 1e-2


def test_routes_of_fewer_features_keep_those_of_the_largest_norms():
    model = tiny_vit().double()
    routes = [(16, 3, 6, 3), (40, 3, 2.4, 3), (48, 3, 2, 3)]
    net = from_timm(model, routes=routes, front_blocks=FRONT, sort_embedding=True)
    norms = [norm for block in model.blocks for norm in (block.norm1, block.norm2)] + [model.norm]
    scores = [sum(float(norm.weight[c].detach().abs()) for norm in norms) for c in range(FEATURES)]
    x = images_for(model)
    tokens = model._pos_embed(model.patch_embed(x))
    for block in list(model.blocks)[:FRONT]:
        tokens = block(tokens)
    for k, (features, *_) in enumerate(routes):
        kept = keep_best(scores, features)
        y = tokens[..., kept]
        plain = prune_features(model, kept)
        for block in list(plain.blocks)[FRONT:]:
            y = block(y)
        assert_close(net(x, route=k), plain.head(plain.norm(y)[:, 0]))


def fused(conv, norm):
    return fuse_conv_bn_eval(conv, norm).weight.detach().abs()


def rows(weight):
    return torch.stack([row.mean() for row in weight])


def columns(weight):
    return torch.stack([weight[:, c].mean() for c in range(weight.shape[1])])


def stage_scores(model, s):
    """Stage outputs: all that writes them times all that reads them."""
    blocks = list(model.get_submodule(f"layer{s}"))
    writers = [fused(*blocks[0].downsample), *(fused(b.conv3, b.bn3) for b in blocks)]
    readers = [fused(b.conv1, b.bn1) for b in blocks[1:]]
    if s < 4:
        following = model.get_submodule(f"layer{s + 1}.0")
        readers += [fused(following.conv1, following.bn1), fused(*following.downsample)]
    else:
        readers.append(model.fc.weight.detach().abs())
    mean_row = sum(map(rows, writers)) / len(writers)
    return mean_row * sum(map(columns, readers)) / len(readers)


def sliced_conv(conv, out, in_):
    plain = nn.Conv2d(len(in_), len(out), conv.kernel_size, conv.stride, conv.padding, bias=False)
    plain.weight.data = conv.weight.detach()[out][:, in_].clone()
    return plain


def sliced_norm(norm, kept):
    plain = nn.BatchNorm2d(len(kept)).eval().to(norm.weight)
    plain.load_state_dict({k: v[kept] if v.ndim else v for k, v in norm.state_dict().items()})
    return plain


def prune_resnet(model, mids):
    """timm's network with these middle widths in its stages, and four times as many outputs."""
    plain = copy.deepcopy(model)
    inputs = list(range(64))
    for s, mid in enumerate(mids, 1):
        outputs = keep_best(stage_scores(model, s), 4 * mid)
        for old, new in zip(
            model.get_submodule(f"layer{s}"), plain.get_submodule(f"layer{s}"), strict=True
        ):
            first = rows(fused(old.conv1, old.bn1)) * columns(fused(old.conv2, old.bn2))
            second = rows(fused(old.conv2, old.bn2)) * columns(fused(old.conv3, old.bn3))
            first, second = keep_best(first, mid), keep_best(second, mid)
            for i, (into, outof) in enumerate(
                ((inputs, first), (first, second), (second, outputs)), 1
            ):
                setattr(new, f"conv{i}", sliced_conv(getattr(old, f"conv{i}"), outof, into))
                setattr(new, f"bn{i}", sliced_norm(getattr(old, f"bn{i}"), outof))
            if old.downsample is not None:
                conv, norm = old.downsample
                new.downsample = nn.Sequential(
                    sliced_conv(conv, outputs, inputs), sliced_norm(norm, outputs)
                )
            inputs = outputs
    plain.fc = sliced_linear(plain.fc, None, inputs)
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gates", [1, 4])
def test_routes_of_a_resnet_are_hand_pruned_networks(gates, dtype):
    model = tiny_resnet().to(dtype)
    net = from_timm(model, gates=gates, rhos=RHOS)
    check_statistics(net, [0, 1, 2])
    x = images_for(model)
    paths = [0, 1, 2] if gates == 1 else [0, 1, (2, 0, 1, 0), (0, 2, 1, 2), (1, 1, 2, 0)]
    for path in paths:
        mids = net.route_widths(path)
        pruned = prune_resnet(model, (CHANNELS[0], *mids) if gates == 1 else mids)
        assert_close(net(x, route=path), pruned(x))


# -- importance --------------------------------------------------------------------------------


def test_any_order_of_the_units_is_the_same_function():
    generator = torch.Generator().manual_seed(3)
    for build, family in ((tiny_vit, timm_vit), (tiny_resnet, resnet_parts)):
        model = build().double()
        orders = {
            key: torch.randperm(len(scores), generator=generator)
            for key, scores in family.magnitude_scores(model).items()
        }
        if family is timm_vit:
            orders["embedding"] = torch.randperm(FEATURES, generator=generator)
        state, other = family.reordered(model, orders), copy.deepcopy(model)
        other.load_state_dict(state)
        moved = [k for k, v in model.state_dict().items() if not torch.equal(v, state[k])]
        assert len(moved) > 0.8 * sum("num_batches" not in key for key in state)
        assert_close(other(images_for(model)), model(images_for(model)))


def readers_by_hand(model):
    """Name of a group: (weights that read it, inputs of a unit)."""
    if isinstance(model, VisionTransformer):
        return {
            key: value
            for j, block in enumerate(model.blocks)
            for key, value in (
                (f"blocks.{j}.attn", ([block.attn.proj.weight], HEAD_DIM)),
                (f"blocks.{j}.mlp", ([block.mlp.fc2.weight], 1)),
            )
        }
    found = {}
    for s in range(1, 5):
        blocks = list(model.get_submodule(f"layer{s}"))
        behind = [block.conv1.weight for block in blocks[1:]]
        if s < 4:
            following = model.get_submodule(f"layer{s + 1}.0")
            behind += [following.conv1.weight, following.downsample[0].weight]
        else:
            behind.append(model.fc.weight)
        found[f"layer{s}"] = (behind, 1)
        for j, block in enumerate(blocks):
            found[f"layer{s}.{j}.conv1"] = ([block.conv2.weight], 1)
            found[f"layer{s}.{j}.conv2"] = ([block.conv3.weight], 1)
    return found


def slow_taylor(model, x, labels):
    """|sum of w dL/dw| over the weights that read a unit, image by image."""
    groups, totals = readers_by_hand(model), {}
    for image, label in zip(x.split(1), labels.split(1), strict=True):
        model.zero_grad()
        F.cross_entropy(model(image), label).backward()
        for key, (weights, channels) in groups.items():
            effect = sum((w * w.grad).transpose(0, 1).flatten(1).sum(1) for w in weights)
            totals[key] = totals.get(key, 0) + effect.reshape(-1, channels).sum(1).abs().detach()
    model.zero_grad()
    return totals


@pytest.mark.parametrize("build", [tiny_vit, tiny_resnet])
def test_taylor_importance_equals_a_slow_reference(build):
    model = build().double()
    x, labels = images_for(model, 5), torch.tensor([3, 1, 4, 1, 5])
    expected = slow_taylor(model, x, labels)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    family = timm_vit if build is tiny_vit else resnet_parts
    batches = [(x[:2], labels[:2]), (x[2:], labels[2:], "more")]
    with torch.no_grad():
        scores = taylor_scores(model.train(), family.readers(model), batches)
    assert model.training
    model.eval()
    assert scores.keys() == expected.keys()
    for key, score in scores.items():
        torch.testing.assert_close(score, expected[key], rtol=1e-9, atol=1e-12)

    net = from_timm(model, importance="taylor", images=batches)
    assert_close(net(x, route=net.num_routes - 1), model(x))
    if isinstance(net, DSViT):
        order = expected["blocks.2.mlp"].argsort(descending=True)
        assert torch.equal(net.blocks[0].fc1.weight, model.blocks[2].mlp.fc1.weight[order])
    else:
        order = expected["layer3.1.conv2"].argsort(descending=True)
        mean = model.get_submodule("layer3.1.bn2").running_mean[order]
        assert torch.equal(net.stages[2][1].bn2.aux_bn[-1].running_mean, mean)


def test_taylor_importance_is_the_effect_of_weakening_a_unit():
    model = tiny_vit().double()
    x, labels = images_for(model, 1), torch.tensor([2])
    scores = taylor_scores(model, timm_vit.readers(model), [(x, labels)])

    def loss_at(key, unit, factor):
        other = copy.deepcopy(model)
        (weight,), channels = readers_by_hand(other)[key]
        weight.data[:, unit * channels : (unit + 1) * channels] *= factor
        return F.cross_entropy(other(x), labels)

    for key, unit in itertools.product(("blocks.1.attn", "blocks.3.mlp"), (0, 2)):
        slope = (loss_at(key, unit, 1 + 1e-5) - loss_at(key, unit, 1 - 1e-5)) / 2e-5
        assert float(scores[key][unit]) == pytest.approx(abs(float(slope)), rel=1e-5)


def test_no_more_than_a_thousand_images_are_read():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x, read = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)), []

    def endless():
        while True:
            read.append(len(x))
            yield x, torch.zeros(len(x), dtype=torch.int64)

    readers = {"units": Readers((model[2],))}
    scores = taylor_scores(model, readers, endless())
    assert len(read) == 4
    again = taylor_scores(model, readers, [(x.repeat(4, 1)[:1000], torch.zeros(1000).long())])
    torch.testing.assert_close(scores["units"], again["units"])


# -- what is refused ---------------------------------------------------------------------------


def with_layer(model, name, layer):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return model


BAD_MODELS = {
    "another family": (lambda: nn.Linear(2, 2), "a Linear cannot be converted.*deit_small"),
    "distilled": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224"),
        "the network is a VisionTransformerDistilled, not a VisionTransformer",
    ),
    "layer scale": (
        lambda: tiny_vit(init_values=0.1),
        "blocks.0.ls1 is one LayerScale too many; .* and 6 more",
    ),
    "qk norm": (lambda: tiny_vit(qk_norm=True), "blocks.0.attn.q_norm is one LayerNorm"),
    "parallel blocks": (
        lambda: tiny_vit(block_fn=ParallelScalingBlock),
        "blocks.0 is a ParallelScalingBlock, not a Block",
    ),
    "another embedding": (
        lambda: with_layer(tiny_vit(), "patch_embed.proj", nn.Identity()),
        "patch_embed.proj is missing",
    ),
    "registers": (lambda: tiny_vit(reg_tokens=2), "reg_token is one Parameter too many"),
    "no class token": (
        lambda: tiny_vit(class_token=False, global_pool="avg"),
        "its pooling is 'avg', not 'token'; fc_norm is one LayerNorm too many",
    ),
    "average": (lambda: tiny_vit(global_pool="avg", fc_norm=False), "pooling is 'avg'"),
    "positions": (lambda: tiny_vit(pos_embed="none"), "pos_embed is missing"),
    "class token without position": (
        lambda: tiny_vit(no_embed_class=True),
        r"pos_embed has \(1, 16, 48\), not \(1, 17, 48\)",
    ),
    "another epsilon": (
        lambda: tiny_vit(norm_layer=lambda n, **k: nn.LayerNorm(n, 1e-5)),
        "blocks.0.norm1 has eps=1e-05, not eps=1e-06",
    ),
    "another activation": (
        lambda: tiny_vit(act_layer=nn.SiLU), "blocks.0.mlp.act is a SiLU, not a GELU"
    ),
    "no bias": (lambda: tiny_vit(qkv_bias=False), "blocks.0.attn.qkv has bias=False"),
    "units": (lambda: tiny_vit(mlp_ratio=1.75), "its 84 hidden units are no multiple of 8"),
    "headless": (lambda: tiny_vit(num_classes=0), "it has no classifier"),
    "oblong": (lambda: tiny_vit(img_size=(32, 40)), "no squares"),
    "basic blocks": (
        lambda: timm.create_model("resnet18"), "layer1.0 is a BasicBlock, not a Bottleneck"
    ),
    "groups": (lambda: tiny_resnet(cardinality=4), r"layer1.0.conv2 has groups=4"),
    "wide": (lambda: tiny_resnet(base_width=128), r"layer1.0.conv3 has 128, not 256"),
    "deep stem": (lambda: tiny_resnet(stem_type="deep"), "conv1 is a Sequential, not a Conv2d"),
    "averaged projection": (
        lambda: tiny_resnet(avg_down=True), "layer1.0.downsample.1 is a Conv2d, not a BatchNorm2d"
    ),
    "dilated": (lambda: tiny_resnet(output_stride=16), r"layer4.0.conv2 has .*stride=\(1, 1\)"),
    "attention": (
        lambda: tiny_resnet(block_args={"attn_layer": "se"}), "layer1.0.se is one SEModule"
    ),
    "antialiased": (lambda: tiny_resnet(aa_layer=nn.AvgPool2d), "maxpool is a AvgPool2d"),
    "group norm": (
        lambda: with_layer(tiny_resnet(), "layer2.0.bn2", nn.GroupNorm(4, 40)),
        "layer2.0.bn2 is a GroupNorm, not a BatchNorm2d",
    ),
    "odd widths": (lambda: tiny_resnet(channels=(32, 36, 48, 64)), "no multiples of 8"),
    "no projection": (
        lambda: tiny_resnet(channels=(16, 40, 48, 64)),
        "a stage begins without a projection",
    ),
    "pool": (
        lambda: with_layer(tiny_resnet(), "global_pool", SelectAdaptivePool2d(1, "max", True)),
        "global_pool.pool is a AdaptiveMaxPool2d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_other_networks_are_refused_by_what_does_not_fit(case):
    build, message = BAD_MODELS[case]
    with pytest.raises(UserError, match=message) as caught:
        from_timm(build())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_is_silent_in_eval_mode_fits():
    drops = {"drop_rate": 0.2, "drop_path_rate": 0.2}
    model = tiny_vit(**drops, proj_drop_rate=0.1, attn_drop_rate=0.1, patch_drop_rate=0.1)
    assert_close(from_timm(model)(images_for(model), route=3), model(images_for(model)))
    model = tiny_resnet(**drops, drop_block_rate=0.1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.01
    assert_close(from_timm(model)(images_for(model), route=3), model(images_for(model)))


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (tiny_vit, {"routes": [(48, 1, 1, 2), (48, 4, 2, 2)]}, "goes beyond .*48, 3, 2, 2"),
        (tiny_vit, {"routes": [(48, 1, 1, 2), (48, 3, 4, 2)]}, "goes beyond"),
        (tiny_vit, {"routes": [(48, 1, 1, 2), (48, 3, 2, 3)]}, "goes beyond"),
        (tiny_vit, {"routes": [(48, 1, 1, 2), (64, 3, 2, 2)]}, "goes beyond"),
        (tiny_vit, {"routes": [(48, 1, 1, 2), (48, 2, 2, 2)]}, "is less than the whole"),
        (tiny_vit, {"routes": [(48, 3, 1, 2), (48, 2, 2, 2)]}, "not nested"),
        (tiny_vit, {"routes": [(48, 3, 1)]}, "two or more lists"),
        (tiny_vit, {"routes": []}, "two or more lists"),
        (tiny_vit, {"front_blocks": 4}, "front_blocks must be 0 to 3, got 4"),
        (tiny_vit, {"front_blocks": -1}, "front_blocks must be 0 to 3"),
        (tiny_vit, {"rhos": (0.5, 1)}, "rhos is no option of this family: .*routes"),
        (tiny_vit, {"gates": 1}, "gates is no option"),
        (tiny_vit, {"num_classes": 5}, "num_classes cannot be changed"),
        (tiny_vit, {"dropuot": 0.5}, "dropuot"),
        (tiny_resnet, {"routes": [(48, 3, 2, 2)]}, "routes is no option.*rhos, gates"),
        (tiny_resnet, {"sort_embedding": True}, "sort_embedding is no option"),
        (tiny_resnet, {"attention": "sigmoid"}, "attention cannot be changed"),
        (tiny_resnet, {"gate_position": "in_block"}, "gate_position cannot be changed"),
        (tiny_resnet, {"rhos": (0.5, 0.75)}, "must end with 1"),
        (tiny_resnet, {"rhos": (0.5, 1, 2)}, "must end with 1"),
        (tiny_resnet, {"rhos": (1.0,)}, "two rhos or more"),
        (tiny_resnet, {"gates": 3}, "gates must be 1, 4"),
        (tiny_vit, {"importance": "best"}, "'best'.*magnitude, taylor, none"),
        (tiny_vit, {"importance": "taylor"}, "taylor' without images"),
        (tiny_vit, {"images": []}, "magnitude' with images"),
        (tiny_vit, {"importance": "taylor", "images": []}, "at least one batch"),
        (
            tiny_vit,
            {"importance": "taylor", "images": [(torch.zeros(1, 3, 32, 32), torch.tensor([10]))]},
            "label 10 is none of the 10 classes",
        ),
    ],
)
def test_bad_options(build, options, message):
    with pytest.raises(UserError, match=message):
        from_timm(build(), **options)


def test_weights_that_are_not_finite():
    model = tiny_vit()
    model.blocks[1].mlp.fc1.bias.data[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        from_timm(model)


def test_names_and_files(tmp_path):
    with pytest.raises(UserError, match="no model 'resnet55': did you mean resnet50"):
        from_timm("resnet55")
    with pytest.raises(UserError, match=r"Invalid pretrained tag \(mine\)"):
        from_timm("resnet50.mine")
    line = r"cannot be fetched \(the hub is down\): give a file: --source timm:vit_tiny_of_tests"
    with pytest.raises(UserError, match=line):
        from_timm("vit_tiny_of_tests")

    model = randomize(tiny_resnet(num_classes=7), seed=5)
    state = {f"module.{k}": v for k, v in model.state_dict().items() if "num_batches" not in k}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pth")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    for file in ("a.pth", "a.safetensors"):
        net = ds_net_plus.from_timm("resnet_tiny_of_tests", weights=tmp_path / file)
        assert net.num_classes == 7
        assert_close(net(images_for(model), route=3), model(images_for(model)))
    del state["module.layer2.0.bn1.weight"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"not those of resnet_tiny.*1 missing \(layer2.0.bn1"):
        from_timm("resnet_tiny_of_tests", weights=tmp_path / "b.pth")
    with pytest.raises(UserError, match="no such checkpoint"):
        from_timm("resnet_tiny_of_tests", weights=tmp_path / "absent.pth")


# -- the command -------------------------------------------------------------------------------


def run(*argv):
    return app.main([str(word) for word in argv])


def printed_commands(text):
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("ds-net-plus ")]


def test_the_command_and_the_steps_that_it_suggests(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "cifar", train=64, test=32, train_seed=0, test_seed=1)
    source = ["--source", "timm:resnet_tiny_of_tests", "--pretrained", "false"]
    assert run("convert-checkpoint", *source, "--rhos", "0.5,1", "--gates", "1") == 0
    told = capsys.readouterr().out
    assert "network: ds_resnet50_bn from resnet_tiny_of_tests, 10 classes" in told
    assert "route 1: widths 40/48/64, " in told
    assert "parity: the full route differs from timm's by " in told
    name, ckpt = "resnet_tiny_of_tests-converted", tmp_path / "resnet_tiny_of_tests-converted.ckpt"
    net = load_net(ckpt)
    assert (net.config["gates"], net.config["rhos"]) == (1, [0.5, 1.0])

    recalibrate, fit = printed_commands(told)
    data = ["--data.source", "cifar10", "--data.image_size", "32"]
    small = [word.replace("DIR", "cifar") for word in recalibrate]
    assert run(*small, *data, "--batches", "2", "--device", "cpu") == 0
    fixed = load_net(tmp_path / f"{name}-recalibrated.ckpt")
    low, high = fixed.stages[2][0].bn1.aux_bn
    assert not torch.equal(low.running_mean, net.stages[2][0].bn1.aux_bn[0].running_mean)
    assert torch.equal(high.running_mean, net.stages[2][0].bn1.aux_bn[1].running_mean)
    small = [
        word.replace("DIR", "cifar").replace("imagenet-resnet50", "cifar10-cpu") for word in fit
    ]
    options = [
        *data[:2], "--data.batch_size", "32", "--data.workers", "0", "--data.train_size", "64",
        "--model.warmup", "0", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", tmp_path / "run",
    ]  # fmt: skip
    assert run(*small, *options) == 0
    assert load_net(tmp_path / "run" / "last.ckpt").config == net.config


def test_the_command_on_a_file_and_taylor_importance(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = randomize(tiny_vit(), seed=9)
    torch.save({"model": model.state_dict()}, tmp_path / "vit.pth")
    write_cifar10(tmp_path / "cifar", train=32, test=8, train_seed=0, test_seed=1)
    routes = "[[48,1,1,3],[48,3,2,3]]"
    given = ["--source", f"timm:vit_tiny_of_tests:{tmp_path / 'vit.pth'}", "--routes", routes]
    given += ["--front-blocks", "1", "--out", tmp_path / "a.ckpt", "--importance", "taylor"]
    data = [
        "--data.source",
        "cifar10",
        "--data.root",
        tmp_path / "cifar",
        "--data.image_size",
        "32",
    ]
    assert run("convert-checkpoint", *given, *data) == 0
    told = capsys.readouterr().out
    assert "fetching" not in told
    (fit,) = printed_commands(told)
    assert fit[fit.index("--model.init_from") + 1] == str(tmp_path / "a.ckpt")
    net = load_net(tmp_path / "a.ckpt")
    assert net.config["routes"] == [[48, 1, 1, 3], [48, 3, 2, 3]]
    assert_close(net(images_for(model), route=1), model(images_for(model)))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["timm:vit_tiny_of_tests"], "cannot be fetched (the hub is down): give a file"),
        (["timm:resnet18", "--pretrained", "false"], "layer1.0 is a BasicBlock"),
        (["timm:vit_tiny_of_tests:none.pth"], "no such checkpoint"),
        (["timm:vit_tiny_of_tests", "--pretrained", "false", "--rhos", "a"], "--rhos must be"),
        (["timm:vit_tiny_of_tests", "--pretrained", "false", "--gates", "4"], "no option of"),
        (["timm:"], "timm has no model ''"),
        (["file.pth.tar", "--gates", "4"], "--gates is for networks of timm"),
    ],
)
def test_bad_input_to_the_command_is_one_line(options, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("convert-checkpoint", "--source", *options) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_another_answer_than_timm_s_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ds_net_plus.commands.pretrained.timm_deviation", lambda *_: 2e-4)
    source = ["--source", "timm:vit_tiny_of_tests", "--pretrained", "false"]
    assert run("convert-checkpoint", *source) == 1
    assert "differs from timm's by 2.0e-04" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
