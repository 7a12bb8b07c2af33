"""Exported files answer as the sliced network does, for every route and batch size."""

import json

import pytest
import torch

from ds_net_plus import export
from ds_net_plus.export import Exported, export_routes, load_exported, read_manifest
from ds_net_plus.model import DSConvNet
from tenfold.errors import UserError

FORMATS = ("torch", "onnx", "exported-program")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Largest deviation relative to the largest entry."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def pictures(net, count):
    generator = torch.Generator().manual_seed(count)
    shape = (count, net.in_channels, net.image_size, net.image_size)
    return torch.randn(shape, generator=generator)


@pytest.fixture(scope="module")
def cnn(randomize):
    return randomize(
        DSConvNet(
            front_widths=(4,),
            stage_widths=((3, 8), (5, 9)),
            depths=(1, 2),
            gate_outputs=2,
            image_size=16,
        )
    )


@pytest.fixture(scope="module")
def mbnet(tiny_mbnet, randomize):
    return randomize(
        tiny_mbnet(
            stage_widths=((8, 16), (12, 20)),
            depths=(1, 2),
            strides=(1, 2),
            gate_stage=1,
            gate_outputs=2,
            image_size=32,
        )
    )


SMALL_RESNET = {
    "depths": (1, 1),
    "base_widths": (32, 64),
    "rhos": (0.5, 1.0),
    "gates": 2,
    "gate_outputs": 2,
    "stem_width": 32,
}


@pytest.fixture(scope="module")
def resnet(families, randomize):
    return randomize(families["resnet"](**SMALL_RESNET))


@pytest.fixture(scope="module")
def in_block(families, randomize):
    return randomize(families["resnet-in-block"](**SMALL_RESNET))


@pytest.fixture(scope="module")
def vit(families, randomize):
    return randomize(families["vit"](routes=((16, 1, 1, 1), (40, 2, 4, 2)), gate_outputs=2))


ROUTES = {
    "cnn": [0, 1],
    "mbnet": [1, "largest"],
    "resnet": [0, 1],
    "in_block": [0, 1],
    "vit": [0, 1],
}


WITHOUT_ONNX = {"in_block"}  # its layers are those of "resnet", and ONNX takes a second a part


@pytest.fixture(scope="module", params=list(ROUTES))
def exported(request, tmp_path_factory):
    """A network with two routes, some of its routes, its front and their rests in all formats."""
    net, routes = request.getfixturevalue(request.param), ROUTES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    formats = [f for f in FORMATS if f != "onnx" or request.param not in WITHOUT_ONNX]
    done = export_routes(net, folder, routes, formats, preprocessing={"mean": [0.5]})
    return net, routes, folder, done


def test_every_part_comes_in_every_format(exported):
    net, routes, folder, done = exported
    parts = [f"route_{k}" for k in routes] + ["front"]
    if net.num_gates == 1:
        parts += [f"rest_{k}" for k in routes if k != "largest"]
    else:
        parts += ["enter_0_0", "enter_0_1", "stage_0_0", "stage_0_1"]
        parts += [f"enter_1_{before}_{k}" for before in (0, 1) for k in (0, 1)]
        parts += ["stage_1_0", "stage_1_1"]
    formats = list(dict.fromkeys(item.format for item in done))
    assert formats in (list(FORMATS), ["torch", "exported-program"])
    assert [(item.part, item.format) for item in done] == [(p, f) for p in parts for f in formats]
    assert all(item.path.is_file() and item.path.parent == folder for item in done)
    assert all(item.deviation <= 1e-5 and len(item.batches) == 2 for item in done)


@pytest.mark.parametrize("format", FORMATS)
def test_files_equal_the_sliced_network(exported, format):
    net, routes, folder, done = exported
    if format not in {item.format for item in done}:
        pytest.skip("not exported in this format")
    front = load_exported(folder, "front", format)
    wholes = {route: load_exported(folder, route, format) for route in routes}
    singles = routes if net.num_gates == 1 else []
    rests = {k: load_exported(folder, f"rest_{k}", format) for k in singles if k != "largest"}
    for count in (1, 4, 7):
        x = pictures(net, count)
        features, logits = front(x)
        sliced = net.front(x)
        close(features, sliced.features)
        close(logits, net.gate_logits(sliced.gate_input))
        for route, whole in wholes.items():
            close(whole(x), net(x, route=route))
        for route, rest in rests.items():
            close(rest(features), net(x, route=route))


@pytest.mark.parametrize("exported", ["cnn"], indirect=True)
def test_dynamic_inference_from_the_files_alone(exported):
    net, _, folder, _ = exported
    manifest = read_manifest(folder)
    front = load_exported(folder, "front", "onnx")
    space = manifest["gate"]["routing_space"]
    rests = {route: load_exported(folder, f"rest_{route}", "exported-program") for route in space}
    costs = [manifest["space_madds"][str(route)] for route in space]
    x = pictures(net, 9)
    features, scores = front(x)
    price = torch.tensor([cost / costs[-1] for cost in costs])
    used = set()
    for tau in (-50.0, 0.0, 0.3, 50.0):
        choice = (scores - tau * price).argmax(1)
        expected = net(x, tau=tau)
        assert torch.tensor(space)[choice].tolist() == expected.routes[:, 0].tolist()
        used |= set(choice.tolist())
        for i, j in enumerate(choice.tolist()):
            close(rests[space[j]](features[i : i + 1]), expected.logits[i : i + 1])
    assert used == {0, 1}


@pytest.mark.parametrize("exported", ["resnet", "in_block"], indirect=True)
@pytest.mark.parametrize("format", FORMATS)
def test_dynamic_inference_of_two_gates_from_the_files_alone(exported, format):
    net, _, folder, done = exported
    if format not in {item.format for item in done}:
        pytest.skip("not exported in this format")
    x, seen = pictures(net, 3), set()
    for path in ((0, 0), (0, 1), (1, 0), (1, 1)):
        features, scores = load_exported(folder, "front", format)(x)
        noise = torch.nn.functional.one_hot(torch.tensor([path] * 3), 2) * 1e6
        expected = net(x, noise=noise)
        close(scores, net.gate_logits(net.front(x).gate_input))
        first, second = path
        features = load_exported(folder, f"enter_0_{first}", format)(features)
        features, scores = load_exported(folder, f"stage_0_{first}", format)(features)
        sliced = net.stage(net.enter(net.front(x).features, 0, first), 0, first)
        close(scores, net.gate_logits(sliced.gate_input, 1))
        features = load_exported(folder, f"enter_1_{first}_{second}", format)(features)
        close(load_exported(folder, f"stage_1_{second}", format)(features), expected.logits)
        seen |= set(map(tuple, expected.routes.tolist()))
    assert len(seen) == 4


@pytest.mark.parametrize("exported", ["mbnet"], indirect=True)
def test_the_manifest(exported):
    net, _, folder, _ = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["arch"] == net.name
    assert manifest["config"] == net.config
    assert manifest["gate"]["gate_score"] == "logit"
    assert manifest["image"]["preprocessing"] == {"mean": [0.5]}
    entry = {part["name"]: part for part in manifest["parts"]}
    assert entry["route_1"]["madds"] == net.routes[1].madds
    assert entry["rest_1"]["widths"] == list(net.routes[1].widths)
    assert entry["route_largest"]["params"] == net.active_params("largest")
    assert entry["front"]["outputs"] == ["features", "gate_logits"]
    assert entry["front"]["files"]["onnx"] == "front.onnx"


@pytest.mark.parametrize("family", ["cnn", "mbnet"])
def test_all_routes_as_weights(family, tiny_mbnet, randomize, tmp_path):
    if family == "cnn":
        net = randomize(DSConvNet())
    else:
        widths = ((8, 16), (12, 20, 24, 28, 31), (9, 11, 13, 17, 19))
        net = randomize(
            tiny_mbnet(stage_widths=widths, depths=(1, 2, 2), strides=(1, 2, 2), gate_stage=1)
        )
    done = export_routes(net, tmp_path, formats=["torch"])
    assert len(done) == 2 * net.num_routes + 1
    x = pictures(net, 3)
    for route in range(net.num_routes):
        module = load_exported(tmp_path, route)
        assert isinstance(module, torch.nn.Module)
        close(module(x), net(x, route=route))


@pytest.mark.parametrize(
    ("formats", "options"),
    [
        (["torch"], {"fold_bn": False}),
        (["torch", "exported-program"], {"channels_last": True}),
        (["torch", "exported-program"], {"batch": 3, "image_size": 24}),
    ],
)
def test_options(mbnet, tmp_path, formats, options):
    export_routes(mbnet, tmp_path, 1, formats, **options)
    size = options.get("image_size", mbnet.image_size)
    x = torch.randn(3, 3, size, size)
    for name in formats:
        close(load_exported(tmp_path, 1, name)(x), mbnet(x, route=1))
    module = load_exported(tmp_path, 1)
    norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert bool(norms) is not options.get("fold_bn", True)
    weight = module.front[0].conv.weight
    layout = torch.channels_last if "channels_last" in options else torch.contiguous_format
    assert weight.is_contiguous(memory_format=layout)
    if "batch" in options:
        program = load_exported(tmp_path, 1, "exported-program")
        with pytest.raises((RuntimeError, AssertionError)):
            program(x[:2])


def test_the_network_is_left_alone(cnn, tmp_path):
    net = DSConvNet(**cnn.config)
    net.load_state_dict(cnn.state_dict())
    net.double().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    export_routes(net, tmp_path, [0], ["torch"])
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_failed_comparison_raises_and_leaves_no_manifest(cnn, tmp_path, monkeypatch):
    export_routes(cnn, tmp_path, [0], ["torch"])
    honest = export._save

    def corrupt(module, *rest):
        module.get_parameter("front.layers.0.conv.bias").data += 1e-3
        honest(module, *rest)

    monkeypatch.setattr(export, "_save", corrupt)
    with pytest.raises(RuntimeError, match=r"route_0\.safetensors differs"):
        export_routes(cnn, tmp_path, [0], ["torch"])
    with pytest.raises(UserError, match="no finished export"):
        load_exported(tmp_path, 0)


def test_bad_input(cnn, tmp_path, monkeypatch):
    def refused(match, *arguments, **options):
        with pytest.raises(UserError, match=match):
            export_routes(cnn, tmp_path / "new", *arguments, **options)

    refused("route 2 does not exist", [0, 2])
    refused("route 'widest' does not exist", "widest")
    refused("no routes", [])
    refused("unknown export format 'tflite'", [0], ["torch", "tflite"])
    refused("unknown export format none", [0], [])
    refused("batch must be", [0], ["torch"], batch=0)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        refused(r"needs onnx, onnxscript, onnxruntime.*ds-net-plus\[export\]", [0], ["onnx"])
    with pytest.raises(UserError, match="recalibrate"):
        export_routes(DSConvNet(), tmp_path / "new", [0], ["torch"])
    assert not (tmp_path / "new").exists()
    export_routes(cnn, tmp_path, [0], ["torch"])
    with pytest.raises(UserError, match="no onnx file of route_0"):
        load_exported(tmp_path, 0, "onnx")
    with pytest.raises(UserError, match="no torch file of rest_1"):
        load_exported(tmp_path, "rest_1")


def test_an_exported_file_prints_as_one_line(tmp_path):
    item = Exported("route_1", "onnx", tmp_path / "route_1.onnx", 2.04e-7, (1, 3))
    assert str(item) == f"{tmp_path / 'route_1.onnx'}: differs by 2.0e-07 at batch sizes 1, 3"
