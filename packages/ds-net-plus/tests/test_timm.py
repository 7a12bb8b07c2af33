"""The networks in timm's registry: its factory, features, classifier and training tools."""

from itertools import pairwise

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_layer_decay

from ds_net_plus.checkpoint import Saved, write_checkpoint
from ds_net_plus.model import MODELS, DSConvNet, DynamicNet, create_model
from ds_net_plus.synthetic import MEAN, STD
from tenfold.errors import UserError

SMALL = ("ds_cnn_tiny", "ds_mbnet_cifar", "ds_resnet_cifar", "ds_vit_cifar")


def close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def inputs(net, batch=3):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, net.in_channels, net.image_size, net.image_size)
    return torch.randn(shape, generator=generator)


def use_every_route(net, monkeypatch):
    """Gates that take turns."""

    def decide(gate_logits, *_):
        return torch.arange(len(gate_logits)) % net.gate_outputs

    monkeypatch.setattr(net, "decide", decide)


def test_the_registry_lists_every_name():
    assert set(timm.list_models("ds_*")) == set(MODELS)
    assert not timm.list_models("ds_*", pretrained=True)


@pytest.mark.parametrize("name", MODELS)
def test_every_name_builds(name):
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=7)
    assert isinstance(net, DynamicNet)
    assert (net.name, net.num_classes, net.config["num_classes"]) == (name, 7, 7)
    assert net.default_route == net.num_routes - 1
    size = (net.in_chans, net.image_size, net.image_size)
    config = resolve_data_config({}, model=net)
    assert config["input_size"] == size
    assert config["interpolation"] == "bicubic"
    assert len(config["mean"]) == len(config["std"]) == net.in_chans
    net.get_submodule(net.pretrained_cfg["first_conv"])
    assert net.get_submodule(net.pretrained_cfg["classifier"]) is net.get_classifier()
    assert net.feature_info[-1]["num_chs"] == net.num_features == net.head_hidden_size
    logits = net.eval()(torch.empty(2, *size, device="meta"))
    assert logits.shape == (2, 7)


def test_how_images_reach_the_networks():
    names = ("ds_mbnet", "ds_vit_small", "ds_cnn_cifar", "ds_cnn_tiny")
    known = {name: timm.models.get_pretrained_cfg(name) for name in names}
    assert [known[name].crop_pct for name in names] == [0.875, 0.9, 1.0, 1.0]
    assert known["ds_mbnet"].mean == timm.data.IMAGENET_DEFAULT_MEAN
    assert (known["ds_cnn_tiny"].mean, known["ds_cnn_tiny"].std) == ((MEAN,), (STD,))
    with torch.device("meta"):
        grey = timm.create_model("ds_vit_tiny", in_chans=1, img_size=(96, 96))
        assert timm.create_model("ds_mbnet").pretrained_cfg["pool_size"] == (7, 7)
    config = resolve_data_config({}, model=grey)
    assert (config["input_size"], config["mean"]) == ((1, 96, 96), (MEAN,))
    assert grey.pretrained_cfg["pool_size"] is None


def test_final_features_and_head_are_the_network(net, images, monkeypatch):
    for route in (0, net.num_routes - 1, "largest"):
        net.default_route = route
        features = net.forward_features(images)
        assert net.num_features in features.shape
        close(net.forward_head(features), net(images))
        assert net.forward_head(features, pre_logits=True).shape == (9, net.num_features)
    net.default_route, net.gate_trained = None, True
    use_every_route(net, monkeypatch)
    output = net(images)
    assert len(output.routes.unique()) == net.gate_outputs
    close(net.forward_head(net.forward_features(images)), output.logits)


def test_features_of_a_route_have_its_own_widths(net, images, monkeypatch):
    use_every_route(net, monkeypatch)
    for route in (0, net.num_routes - 1, "largest", None):
        net.default_route, net.gate_trained = route, True
        info = net.feature_info
        channels = [level["num_chs"] for level in info]
        strides = [level["reduction"] for level in info]
        final, maps = net.forward_intermediates(images)
        assert [m.shape[1] for m in maps] == channels
        assert [images.shape[-1] // m.shape[-1] for m in maps] == strides
        expected = net.features(images, levels=strides).maps
        for narrow, wide in zip(maps, expected, strict=True):
            close(narrow, wide[:, : narrow.shape[1]])
            assert not wide[:, narrow.shape[1] :].any()
        close(final, net.forward_features(images))


@pytest.mark.parametrize("name", SMALL)
def test_features_only(name):
    wide = timm.create_model(name, features_only=True)
    narrow = timm.create_model(name, features_only=True, route=0, out_indices=(-1,))
    x = inputs(wide.model)
    for extractor in (wide, narrow):
        maps = extractor.eval()(x)
        assert [m.shape[1] for m in maps] == extractor.feature_info.channels()
        sides = [x.shape[-1] // stride for stride in extractor.feature_info.reduction()]
        assert [m.shape[-1] for m in maps] == sides
        assert not any("classifier" in key for key in extractor.state_dict())
    strides = wide.feature_info.reduction()
    assert all(fine < coarse for fine, coarse in pairwise(strides))
    assert narrow.feature_info.reduction() == strides[-1:]
    if name != "ds_vit_cifar":
        assert narrow.feature_info.channels()[0] < wide.feature_info.channels()[-1]


def test_dynamic_features_only():
    extractor = timm.create_model("ds_resnet_cifar", features_only=True, route="dynamic").eval()
    for head in extractor.model.gate_heads():
        torch.nn.init.normal_(head)
    maps = extractor(inputs(extractor.model, 8))
    assert [m.shape[1] for m in maps] == extractor.feature_info.channels() == [128, 256, 512]
    with pytest.raises(UserError, match=r"\(0, 7\).*choose from 0 to 2, of stride 1, 2, 4"):
        timm.create_model("ds_resnet_cifar", features_only=True, out_indices=(0, 7))


def test_routes():
    def make(route):
        return timm.create_model("ds_resnet_cifar", route=route).default_route

    assert [make(r) for r in (0, "largest", "dynamic", (0, 1, 3))] == [
        0,
        "largest",
        None,
        (0, 1, 3),
    ]
    with pytest.raises(UserError, match="route 9 does not exist"):
        make(9)


def test_arguments_of_timm():
    net = timm.create_model("ds_mbnet_cifar", in_chans=1, img_size=64, drop_rate=0.5)
    assert (net.in_channels, net.image_size, net.dropout) == (1, 64, 0.5)
    net = timm.create_model("ds_vit_cifar", drop_path_rate=0.3, drop_rate=0.0, global_pool="token")
    assert net.drop_path == 0.3
    assert timm.create_model("ds_cnn_tiny", gate_outputs=2, dtype=torch.float64).gate_outputs == 2
    for name, option, message in (
        ("ds_vit_cifar", {"drop_rate": 0.1}, "no drop_rate"),
        ("ds_mbnet_cifar", {"drop_path_rate": 0.1}, "no drop_path_rate"),
        ("ds_mbnet_cifar", {"global_pool": "max"}, "the pool is 'avg'"),
        ("ds_mbnet_cifar", {"img_size": (32, 48)}, "not square"),
        ("ds_mbnet_cifar", {"bn_eps": 1e-3}, "bn_eps"),
        ("ds_mbnet", {"pretrained": True}, 'no released weights of ds_mbnet.*"local-dir:FOLDER"'),
    ):
        with pytest.raises(UserError, match=message):
            timm.create_model(name, **option)


@pytest.mark.parametrize("name", SMALL)
def test_another_classifier_is_saved_with_the_network(name, tmp_path):
    net = timm.create_model(name).eval()
    net.budgets = [(0.0, 1e6)]
    net.reset_classifier(5)
    net.save_pretrained(tmp_path)
    loaded = DynamicNet.from_pretrained(tmp_path)
    x = inputs(net)
    assert loaded.num_classes == loaded.get_classifier().out_features == 5
    assert loaded.budgets == []
    assert torch.equal(loaded(x, route=0), net(x, route=0))
    assert net.madds(0) == loaded.madds(0)


@pytest.mark.parametrize("name", SMALL)
def test_without_classes_a_network_gives_features(name, tmp_path):
    net = timm.create_model(name, num_classes=0, route=0).eval()
    x = inputs(net)
    assert net(x).shape == (3, net.num_features)
    close(net(x), net.forward_head(net.forward_features(x), pre_logits=True))
    close(net.materialize(0)(x), net(x))
    net.default_route = None
    for head in net.gate_heads():
        torch.nn.init.normal_(head)
    assert net(x).logits.shape == (3, net.num_features)
    net.save_pretrained(tmp_path)
    assert torch.equal(DynamicNet.from_pretrained(tmp_path)(x, route=1), net(x, route=1))
    net.reset_classifier(4)
    assert net(x, route=0).shape == (3, 4)
    with pytest.raises(UserError, match="0 or more"):
        net.reset_classifier(-1)


@pytest.mark.parametrize("name", SMALL)
def test_a_step_of_training_with_timm(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=4, route="largest")
    net.set_grad_checkpointing(False)
    x, labels = inputs(net, 8), torch.arange(8) % 4
    optimizer = create_optimizer_v2(net, opt="adamw", lr=3e-4, weight_decay=0.05, layer_decay=0.7)
    loss_function = LabelSmoothingCrossEntropy()
    losses = []
    for _ in range(4):
        loss = loss_function(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match="checkpointing"):
        net.set_grad_checkpointing()


@pytest.mark.parametrize("name", SMALL)
def test_layer_decay_grows_from_the_classifier_to_the_stem(name):
    with torch.device("meta"):
        net = timm.create_model(name)
    groups = param_groups_layer_decay(net, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(net.parameters()))
    named = {key: scale[id(p)] for key, p in net.named_parameters()}
    first = next(iter(named))
    assert named["classifier.weight"] == 1
    assert named[first] == min(named.values()) < 1
    blocks = "blocks" if hasattr(net, "blocks") else "stages"
    depth = [named[key] for key in named if key.startswith(f"{blocks}.") and "gate" not in key]
    assert all(low <= high for low, high in pairwise(depth))
    assert len(set(depth)) > 2


def test_checkpoints_of_both_stages_load_by_path(randomize, tmp_path):
    weights, average = randomize(DSConvNet(), 1), randomize(DSConvNet(), 2)
    x = inputs(weights)
    write_checkpoint(tmp_path / "supernet.ckpt", Saved({}, {"net": weights, "teacher": average}))
    write_checkpoint(tmp_path / "gate.ckpt", Saved({}, {"net": weights}))
    weights.save_pretrained(tmp_path / "folder")
    for file, expected in (
        ("supernet.ckpt", average),
        ("gate.ckpt", weights),
        ("folder/model.safetensors", weights),
    ):
        net = timm.create_model("ds_cnn_tiny", checkpoint_path=str(tmp_path / file)).eval()
        assert torch.equal(net(x), expected(x, route=3))


def test_a_folder_is_a_pretrained_model_of_timm(randomize, tmp_path):
    saved = randomize(create_model("ds_mbnet_cifar", gate_outputs=3))
    saved.routing_space, saved.gate_trained, saved.budgets = (1, 5, 13), True, [(0.5, 2e6)]
    saved.save_pretrained(tmp_path)
    name, x = f"local-dir:{tmp_path}", inputs(saved)
    net = timm.create_model(name, pretrained=True, route="dynamic").eval()
    assert net.gate_state() == saved.gate_state()
    assert torch.equal(net(x).logits, saved(x).logits)
    finer = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1).eval()
    assert finer.conv_stem.weight.shape[1] == finer.in_channels == 1
    assert torch.equal(finer.conv_stem.weight, saved.conv_stem.weight.sum(1, keepdim=True))
    assert finer(x[:, :1]).shape == (3, 3)
    assert timm.create_model(name).gate_trained is None
    extractor = timm.create_model(name, pretrained=True, features_only=True, route=2).eval()
    close(extractor(x)[-1], saved.features(x, 2, levels=[8]).maps[0][:, :800])
