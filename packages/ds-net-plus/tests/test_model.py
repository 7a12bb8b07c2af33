"""Networks: the spec's integers, and sliced = masked = materialised = grouped."""

import subprocess
import sys

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ds_net_plus.layers import PlainGate, TokenGate
from ds_net_plus.model import (
    DSConvNet,
    DSMobileNet,
    DSViT,
    check_statistics,
    choose_routes,
    count_madds,
    create_model,
    run_grouped,
)
from tenfold.errors import UserError

MBNET_MADDS = (
    132_890_144, 152_917_184, 175_151_968, 199_594_496, 226_244_768, 255_102_784, 286_168_544,
    319_442_048, 354_923_296, 392_612_288, 432_509_024, 474_613_504, 518_925_728, 565_445_696,
)  # fmt: skip
MBNET_PARAMS = (
    2.660, 2.935, 3.224, 3.528, 3.846, 4.178, 4.524,
    4.885, 5.260, 5.650, 6.054, 6.472, 6.904, 7.351,
)  # fmt: skip


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Largest deviation relative to the largest entry."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(scope="module")
def mbnet() -> DSMobileNet:
    with torch.device("meta"):
        net = create_model("ds_mbnet")
    assert isinstance(net, DSMobileNet)
    return net


def test_mbnet_costs_are_the_published_integers(mbnet):
    assert tuple(route.madds for route in mbnet.routes) == MBNET_MADDS
    assert tuple(round(route.params / 1e6, 3) for route in mbnet.routes) == MBNET_PARAMS
    assert count_madds(mbnet, "largest") == 819_883_136
    assert round(mbnet.active_params("largest") / 1e6, 3) == 7.676
    assert mbnet.routes[13].widths == (640, 1152)


def test_mbnet_state_dict_is_the_official_one(mbnet):
    assert len(mbnet.state_dict()) == 838
    assert len(list(mbnet.parameters())) == 136
    assert sum(p.numel() for p in mbnet.parameters()) == 7_676_204
    assert sum(b.numel() for b in mbnet.buffers()) == 229_930
    shapes = {k: tuple(v.shape) for k, v in mbnet.state_dict().items()}
    assert shapes["blocks.3.first_block.gate.gate.0.weight"] == (4, 66, 1, 1)
    assert shapes["blocks.3.residual_blocks.4.bn2.aux_bn.13.weight"] == (640,)
    assert shapes["blocks.4.first_block.gate.conv_reduce.weight"] == (160, 640, 1, 1)
    assert shapes["conv_stem.weight"] == (24, 3, 3, 3)


def test_tiny_cnn_costs_are_those_of_the_spec():
    assert [round(r.madds / 1e6, 3) for r in create_model("ds_cnn_tiny").routes] == [
        0.246, 0.429, 0.716, 1.107,
    ]  # fmt: skip
    widths = ((24, 48, 72, 96), (48, 96, 144, 192))
    wide = create_model("ds_cnn_wide", stage_widths=widths, image_size=64)
    assert round(wide.routes[-1].madds / 1e6, 1) == 55.5


def test_params_of_a_route_are_those_of_its_plain_network(tiny_mbnet):
    net = tiny_mbnet().eval()
    for route in (0, 5, "largest"):
        plain = net.materialize(route)
        head = sum(p.numel() for p in net.gate_parameters())
        # folding turns scale and shift of every norm into one bias
        folded = sum(m.bias.numel() for m in plain.modules() if isinstance(m, torch.nn.Conv2d))
        total = sum(p.numel() for p in plain.parameters())
        assert total + folded - head == net.active_params(route)


FAMILIES_WITH_COUNTS = [
    "resnet",
    "resnet-bn",
    "resnet-in-block",
    "resnet-one-in-block",
    "vit",
    "vit-depth",
]
RESNET = {  # route: GMAdds, parameters in M (spec, section 4.2)
    (0, 0, 0, 0): (0.379, 2.00), (1, 1, 1, 1): (1.127, 6.93),
    (2, 2, 2, 2): (2.364, 14.78), (3, 3, 3, 3): (4.089, 25.56),
    (0, 0, 0, 3): (0.985, None), (1, 1, 1, 3): (1.633, None),
    (1, 1, 3, 3): (2.731, None), (3, 3, 3, 0): (3.368, None),
}  # fmt: skip
# model: GMACs of each route, and what the late embedding adds to them at most (section 4.3)
VIT = {
    "ds_vit_tiny": ((0.612, 0.759, 0.904, 1.196), 0),
    "ds_vit_small": ((1.504, 2.329, 3.153, 4.220), 0),
    "ds_vit_small_embed": ((1.254, 1.981, 2.902, 4.017), 0.03),
    "ds_vit_small_depth": ((2.329, 3.085, 3.842, 4.599), 0),
    "ds_vit_base": ((5.642, 8.840, 12.475, 16.110), 0),
}


def test_resnet50_costs_are_those_of_the_spec():
    with torch.device("meta"):
        net = create_model("ds_resnet50")
    for path, (gmadds, millions) in RESNET.items():
        assert net.madds(path) / 1e9 == pytest.approx(gmadds, rel=1e-3)
        if millions is not None:
            assert round(net.active_params(path) / 1e6, 2) == millions
    stages = [
        net.madds(tuple(3 if s == g else 0 for s in range(4))) - net.madds(0) for g in range(4)
    ]
    assert net.madds(3) > net.madds(0) + sum(stages)  # neighbours share a width on either side
    plain = timm.create_model("resnet50")
    assert net.active_params(3) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("name", VIT)
def test_vit_costs_are_those_of_the_spec(name):
    with torch.device("meta"):
        net = create_model(name)
    costs, late = VIT[name]
    front, last = net.front_widths.features, net.block_widths(3).features
    for route, cost in zip(net.routes, costs, strict=True):
        added = max(route.widths[0] - front, 0) * 768 * 196 / 1e9
        assert added <= late
        assert route.madds / 1e9 == pytest.approx(cost + added, rel=1e-3)
    if late:
        assert max(last - front, 0) * 768 * 196 / 1e9 == pytest.approx(late, abs=0.002)


def test_the_widest_depth_route_is_deit_small():
    with torch.device("meta"):
        net = create_model("ds_vit_small_depth")
    plain = timm.create_model("deit_small_patch16_224")
    assert net.active_params(3) == sum(p.numel() for p in plain.parameters())


def test_sliced_kernels_are_the_centres_of_larger_ones(tiny_mbnet, randomize):
    """A network of 3x3 kernels, cut out of the sliced one's weights by hand."""
    sliced = randomize(tiny_mbnet(kernel_size=5, route_kernels=(3,) * 14))
    small = tiny_mbnet().eval()
    state = {
        k: v[:, :, 1:-1, 1:-1] if "conv_dw" in k or k == "conv_stem.weight" else v
        for k, v in sliced.state_dict().items()
    }
    small.load_state_dict(state)
    x = torch.randn(3, 3, 64, 64)
    for route in (0, 7, 13):
        close(sliced(x, route=route), small(x, route=route))
        assert sliced.madds(route) == small.madds(route)
        assert sliced.active_params(route) == small.active_params(route)
    assert sliced.madds("largest") > small.madds("largest")
    for kernels in ((3,) * 13, (5, *(3,) * 13), (2,) * 14, (7,) * 14):
        with pytest.raises(UserError, match="14 ascending kernels in the centre of 5 x 5"):
            tiny_mbnet(kernel_size=5, route_kernels=kernels)


@pytest.mark.parametrize("family", FAMILIES_WITH_COUNTS)
def test_params_of_a_route_are_those_of_its_unfolded_plain_network(families, family):
    net = families[family]().eval()
    for route in paths(net):
        plain = net.materialize(route, fold_bn=False)
        gates = [m for m in plain.modules() if isinstance(m, PlainGate | TokenGate)]
        total = sum(p.numel() for p in plain.parameters())
        total -= sum(p.numel() for gate in gates for p in gate.parameters())
        assert total == net.active_params(route)


def test_gates_in_front_of_some_stages(families, randomize, images_of):
    """Two gates of three stages; the first stage then is part of the front."""
    net = randomize(families["resnet"](gates=(1, 2)))
    assert (net.num_gates, net.segments) == (2, [[1], [2]])
    assert [len(widths) for widths in net.mid_widths] == [1, 4, 4]
    x = images_of(net)
    output = net(x, noise=scattering_noise(net, x))
    for n, path in enumerate(output.routes.tolist()):
        close(output.logits[n : n + 1], net(x[n : n + 1], route=tuple(path)))
    alone = randomize(families["resnet"](gates=(0,)))
    assert (alone.num_gates, alone.segments) == (1, [[0, 1, 2]])
    for gates in (2, (), (2, 1), (0, 3), (-1,)):
        with pytest.raises(UserError, match="gates must be 1, 3"):
            families["resnet"](gates=gates)


TRACED = """
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from ds_net_plus.model.grouping import choose_routes

scores, madds = torch.tensor([[0.1, 0.9], [0.8, 0.2]]), (3, 7)
with FakeTensorMode() as mode:  # as tracers see the network
    assert isinstance(choose_routes(mode.from_tensor(scores), madds, 0.1), FakeTensor)
assert choose_routes(scores, madds, 0.1).tolist() == [1, 0]
"""


def test_a_decision_that_was_traced_leaves_no_trace():
    """In a process of its own: tracing starts threads, and other tests fork."""
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plain_parts_leave_their_input_alone(net, images):
    x = net.materialize_front()(images)[0]
    for gate in range(net.num_gates):
        entered = net.materialize_enter(gate, 3 if gate else None, 3)(x)
        before = entered.clone()
        outputs = net.materialize_stage(gate, 3)(entered)
        assert torch.equal(entered, before)
        x = outputs[0] if isinstance(outputs, tuple) else outputs


@pytest.mark.parametrize("family", FAMILIES_WITH_COUNTS)
def test_costs_are_what_a_counter_sees(families, family):
    """PyTorch's own counter, two operations a multiplication, on the plain networks."""
    net = families[family]().eval()
    x = torch.zeros(1, net.in_channels, net.image_size, net.image_size)
    for route in paths(net):
        plain = net.materialize(route)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            plain(x)
        gates = [m for m in plain.modules() if isinstance(m, PlainGate | TokenGate)]
        linear = [m for gate in gates for m in gate.modules() if isinstance(m, torch.nn.Linear)]
        counted = counter.get_total_flops() // 2 - sum(m.weight.numel() for m in linear)
        assert counted == net.madds(route)


def paths(net) -> list:
    """Every route and, with several gates, some mixed paths that use every pair of widths."""
    mixed = []
    if net.num_gates > 1:
        mixed = [
            tuple((start + step * gate) % net.num_routes for gate in range(net.num_gates))
            for start in range(net.num_routes)
            for step in range(1, net.num_routes)
        ]
    return [*range(net.num_routes), *mixed, "largest"]


def test_every_route_equals_its_plain_network(net, images):
    for route in paths(net):
        close(net.materialize(route)(images), net(images, route=route))


def test_plain_networks_that_share_storage_equal_their_copies(net, images):
    features = net.materialize_front()(images)[0]
    for route in range(net.num_routes):
        shared = net.materialize_rest(route, share_storage=True)
        close(shared(features), net.materialize_rest(route)(features))
    linear = [m for m in shared.modules() if isinstance(m, torch.nn.Linear)][-1]
    assert linear.weight.data_ptr() == net.classifier.weight.data_ptr()


def test_masked_equals_sliced(net, images):
    space = net.routing_space
    features = net.front(images).features
    choice = torch.stack(
        [(torch.arange(len(images)) + g * 3 // 2) % len(space) for g in range(net.num_gates)], 1
    )
    if not net.maskable:
        with pytest.raises(UserError, match="mask estimator needs gates in front"):
            net.masked_stage(features, 0, torch.eye(4)[choice[:, 0]], space)
        return
    for gate in range(net.num_gates):
        features = net.masked_stage(features, gate, torch.eye(4)[choice[:, gate]], space).features
    for n, path in enumerate(choice.tolist()):
        route = tuple(space[j] for j in path) if net.num_gates > 1 else space[path[0]]
        close(features[n : n + 1], net(images[n : n + 1], route=route))


def scattering_noise(net, images) -> torch.Tensor:
    """Noise that sends images to all routes, whatever the gates say."""
    noise = torch.zeros(len(images), net.num_gates, net.gate_outputs)
    for n in range(len(images)):
        for gate in range(net.num_gates):
            noise[n, gate, (n + n * gate // 2) % net.gate_outputs] = 1e6
    return noise if net.num_gates > 1 else noise[:, 0]


def test_grouped_equals_one_image_at_a_time(net, images):
    noise = scattering_noise(net, images)
    output = net(images, noise=noise)
    assert output.logits.shape == (len(images), net.num_classes)
    assert output.routes.shape == (len(images), net.num_gates)
    assert output.routes.dtype == output.madds.dtype == torch.int64
    assert len(output.routes.unique()) == net.gate_outputs
    for n in range(len(images)):
        alone = net(images[n : n + 1], noise=noise[n : n + 1])
        assert torch.equal(alone.routes[0], output.routes[n])
        close(output.logits[n : n + 1], alone.logits)
        path = tuple(output.routes[n].tolist())
        route = path if net.num_gates > 1 else path[0]
        close(alone.logits, net(images[n : n + 1], route=route))
        assert int(output.madds[n]) == count_madds(net, route, images.shape[-1])


def test_an_empty_batch_works(net, images):
    output = net(images[:0])
    assert output.logits.shape == (0, net.num_classes)
    assert output.routes.shape == (0, net.num_gates)


def test_noise_decides_where_it_is_large(net, images):
    noise = torch.zeros(len(images), net.num_gates, net.gate_outputs)
    noise[..., 2] = 1e6
    noise = noise if net.num_gates > 1 else noise[:, 0]
    assert net(images, noise=noise).routes.unique().tolist() == [net.routing_space[2]]


def test_feature_maps_of_a_group_are_those_of_its_route(net, images):
    levels = sorted(net.map_channels())
    dynamic = net.features(images, levels=levels)
    assert torch.equal(dynamic.routes, net(images).routes)
    for n in range(len(images)):
        path = tuple(dynamic.routes[n].tolist())
        route = path if net.num_gates > 1 else path[0]
        static = net.features(images[n : n + 1], route, levels)
        for level, width, one, all_ in zip(
            levels, net.feature_channels(levels), static.maps, dynamic.maps, strict=True
        ):
            side = images.shape[-1] // level
            assert one.shape == (1, width, side, side)
            close(all_[n : n + 1], one)
    with pytest.raises(UserError, match="choose levels from"):
        net.features(images, 0, levels=[3])


def test_the_last_feature_map_leads_to_the_logits(net, images):
    level = max(net.map_channels())
    for route in paths(net):
        x = net.features(images, route, [level]).maps[0]
        head = net.classifier.materialize(x.shape[1])
        if isinstance(net, DSViT):  # its classifier reads the class token instead
            continue
        close(head(x.mean((2, 3))), net(images, route=route))


def test_tau_moves_the_decision_to_cheaper_routes(net, images):
    means = [net(images, tau=tau).madds.double().mean() for tau in (-1e6, 0.0, 1e6)]
    assert means[0] == count_madds(net, net.routing_space[-1])
    assert means[2] == count_madds(net, net.routing_space[0])
    assert means[0] >= means[1] >= means[2]


@given(choice=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
@settings(max_examples=50, deadline=None)
def test_grouping_keeps_the_order_for_any_mix(choice):
    """Two gates: each image's features collect the routes, its own logits decide."""
    space = (2, 3, 5, 7)
    number = torch.arange(len(choice), dtype=torch.float32)[:, None]
    wanted = torch.tensor(choice, dtype=torch.int64).view(-1, 2)
    calls = []

    def decide(logits, gate):
        assert logits[:, 0].tolist() == list(range(len(choice)))  # the images' own, in order
        return wanted[:, gate]

    def enter(x, gate, before, route):
        calls.append(("enter", gate, before, route))
        assert x.shape[1] == (1 if before is None else 3)
        return torch.cat([x, x.new_full((len(x), 1), before or 0)], 1)

    def stage(x, gate, route, index):
        calls.append(("stage", gate, route))
        assert x[:, 0].tolist() == index.tolist()
        assert len(x) > 0
        return torch.cat([x, x.new_full((len(x), 1), route)], 1), x[:, :1]

    result, positions = run_grouped(number, number, space, 2, decide, enter, stage)
    assert torch.equal(positions, wanted)
    assert len(calls) == len(set(calls))  # once for each pair, once for each route
    for n, (first, second) in enumerate(choice):
        assert result[n].tolist() == [n, 0, space[first], space[first], space[second]]


def test_choose_routes_by_hand():
    scores = torch.tensor([[0.5, 0.6, 0.9], [0.8, 0.8, 0.8]])
    assert choose_routes(scores, [1, 2, 4]).tolist() == [2, 0]
    assert choose_routes(scores, [1, 2, 4], tau=1.0).tolist() == [0, 0]  # .25, .1, -.1
    assert choose_routes(scores, [1, 2, 4], tau=0.3).tolist() == [2, 0]  # .425, .45, .6


def test_bad_routes_and_spaces_list_what_exists(net, images):
    with pytest.raises(UserError, match=r"0 \(widths .*MAdds\)"):
        net(images, route=99)
    for space in ([0], [0, 0, 1, 2], [3, 2, 1, 0], [-1, 0, 1, 2], [0, 1, 2, 99]):
        with pytest.raises(UserError, match="ascending"):
            net.routing_space = space
    with pytest.raises(UserError, match="outputs"):
        net.routing_space = [0, 1, 2]


def test_untrained_gates_refuse_dynamic_inference(randomize):
    images = torch.zeros(2, 1, 32, 32)
    with pytest.raises(UserError, match="train-gate"):
        DSConvNet().eval()(images)
    net = randomize(DSConvNet())
    net.gate_trained = False
    with pytest.raises(UserError, match="train-gate"):
        net(images)
    net.gate_trained = None
    assert net(images).logits.shape == (2, 10)


def test_images_that_are_not_finite_are_named(net, images):
    images[3, 0, 5, 5] = float("nan")
    with pytest.raises(UserError, match="image 3"):
        net(images)


def test_unmeasured_statistics_are_noticed(randomize):
    net = DSConvNet()
    with pytest.raises(UserError, match="recalibrate"):
        check_statistics(net, [0])
    check_statistics(randomize(net), [0, 1, 2, 3, "largest"])


def test_gate_state_survives_a_round_trip(net, tiny_mbnet):
    net.gate_trained, net.gate_score, net.budgets = True, "probability", [(0.1, 5.0)]
    state = net.gate_state()
    other = create_model("ds_cnn_tiny") if isinstance(net, DSConvNet) else tiny_mbnet()
    other.load_gate_state(state)
    assert other.gate_state() == state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage_widths": ((4, 8), (4, 8)), "depths": (1,), "strides": (1, 2)}, "equally long"),
        ({"gate_stage": 7}, "gate_stage 7"),
        ({"stem_widths": ()}, "stem widths"),
        ({"stem_widths": (8, 8)}, "ascending"),
        ({"depths": (1, 2, 2, 0, 2)}, "block"),
    ],
)
def test_impossible_layouts_are_refused_at_construction(arguments, message, tiny_mbnet):
    with pytest.raises(UserError, match=message):
        tiny_mbnet(**arguments)


def test_unknown_models_and_arguments_are_named():
    with pytest.raises(UserError, match="ds_mbnet"):
        create_model("resnet")
    with pytest.raises(UserError, match="colour"):
        create_model("ds_cnn_tiny", colour=3)
