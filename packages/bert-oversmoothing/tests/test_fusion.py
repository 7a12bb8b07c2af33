"""Fusion heads against loops in float64, and the layers that a group names."""

import copy
import math
import weakref
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bert_oversmoothing.fusion import (
    Fused,
    FusionStream,
    LayerFusion,
    fusion_parameter_groups,
    parse_layers,
)
from tenfold.errors import UserError

TEXTS, TOKENS, WIDTH, LAYERS = 2, 3, 4, 5

# every kind that has something to compute, with each of its options
FUSIONS: dict[str, dict[str, Any]] = {
    "concat": {"kind": "concat"},
    "max": {"kind": "max"},
    "mean": {"kind": "mean"},
    "scalar mix": {"kind": "scalar_mix"},
    "gate": {"kind": "gate"},
    "gate, shared": {"kind": "gate", "gate_shared": True},
    "gate, sigmoid": {"kind": "gate", "gate_kind": "sigmoid"},
    "gate, sigmoid, shared": {"kind": "gate", "gate_kind": "sigmoid", "gate_shared": True},
    "gate, channel": {"kind": "gate", "gate_kind": "channel"},
    "gate, channel, shared": {"kind": "gate", "gate_kind": "channel", "gate_shared": True},
}
READERS = {"last": {"kind": "last"}, "best layer": {"kind": "best_layer(1)"}}
every_fusion = pytest.mark.parametrize("options", FUSIONS.values(), ids=FUSIONS)
every_kind = pytest.mark.parametrize(
    "options", [*FUSIONS.values(), *READERS.values()], ids=[*FUSIONS, *READERS]
)
both_inits = pytest.mark.parametrize("init", ["random", "identity"])


def fusion_of(**options: Any) -> LayerFusion:
    torch.manual_seed(0)
    return LayerFusion(**{"width": WIDTH, "num_layers": LAYERS, **options})


def trained(**options: Any) -> LayerFusion:
    """A fusion whose parameters are all away from their start."""
    fusion = fusion_of(**options)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter += torch.randn_like(parameter)
    return fusion


def states(*shape: int, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = shape or (TEXTS, TOKENS, WIDTH)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(layers)]


def without_gradients(fusion: LayerFusion, *given: Any, **options: Any) -> Fused:
    with torch.no_grad():
        return fusion(*given, **options)


# ------------------------------------------------------------------------------- loops in float64


def by_hand(fusion: LayerFusion, layers: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """F and the weights, one number at a time."""
    p = {name: x.detach().tolist() for name, x in fusion.state_dict().items()}
    h = [layer.tolist() for layer in layers]
    k, d = len(h), fusion.width
    fused = torch.zeros(len(h[0]), len(h[0][0]), d, dtype=torch.float64)
    weights = torch.zeros(*fused.shape, k, dtype=torch.float64)
    for b in range(fused.shape[0]):
        for n in range(fused.shape[1]):
            for j in range(d):
                values = [h[i][b][n][j] for i in range(k)]
                shares = shares_by_hand(fusion, p, [h[i][b][n] for i in range(k)], j)
                if fusion.kind == "concat":
                    long = [x for i in range(k) for x in h[i][b][n]]
                    value = sum(w * x for w, x in zip(p["weight"][j], long, strict=True))
                    value += p["bias"][j]
                elif fusion.kind == "max":
                    value = max(values)
                else:
                    value = sum(w * x for w, x in zip(shares, values, strict=True))
                value *= p.get("gamma", 1.0)
                if "alpha" in p:
                    value = values[-1] + p["alpha"] * (value - values[-1])
                fused[b, n, j] = value
                weights[b, n, j] = torch.tensor(shares, dtype=torch.float64)
    if fusion.kind == "scalar_mix":
        return fused, weights[0, 0, 0]
    if fusion.kind != "gate":
        return fused, None
    return fused, weights if fusion.gate_kind == "channel" else weights[:, :, 0]


def shares_by_hand(
    fusion: LayerFusion, p: dict[str, Any], token: list[list[float]], j: int
) -> list[float]:
    """The weights of the layers for channel j of one token, its states in all layers given."""
    k = len(token)
    if fusion.kind == "scalar_mix":
        logits = p["mix"]
    elif fusion.kind == "gate":
        logits = []
        for i, x in enumerate(token):
            row = 0 if fusion.gate_shared else i
            w, c = p["gate.weight"][row], p["gate.bias"][row]
            if fusion.gate_kind == "channel":
                w, c = w[j], c[j]
            logits.append(c + sum(a * b for a, b in zip(w, x, strict=True)))
        if fusion.gate_kind == "sigmoid":
            return [1 / (1 + math.exp(-a)) for a in logits]
    else:
        logits = [0.0] * k
    total = sum(math.exp(a) for a in logits)
    return [math.exp(a) / total for a in logits]


@every_fusion
@both_inits
@pytest.mark.parametrize("gradients", [True, False], ids=["plain", "streaming"])
def test_loops(options, init, gradients):
    fusion = trained(**options, init=init).double()
    layers = states(dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        found = fusion(layers)
    fused, weights = by_hand(fusion, layers)
    torch.testing.assert_close(found.hidden.detach(), fused, atol=1e-12, rtol=1e-12)
    if weights is None:
        assert found.weights is None
    else:
        torch.testing.assert_close(found.weights.detach(), weights, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("gradients", [True, False])
def test_one_layer_is_read_as_it_is(gradients):
    layers = states()
    with torch.set_grad_enabled(gradients):
        assert fusion_of(kind="last")(layers).hidden is layers[-1]
        assert fusion_of(kind="best_layer(1)")(layers).hidden is layers[1]
        named = fusion_of(kind="best_layer(9)", layers=(0, 3, 6, 9, 12))
        assert named(layers).hidden is layers[3]


def test_a_fusion_of_one_layer():
    (layer,) = states(layers=1)
    for kind in ("max", "mean", "gate", "scalar_mix", "last"):
        fusion = fusion_of(kind=kind, num_layers=1)
        torch.testing.assert_close(fusion([layer]).hidden, layer)
        torch.testing.assert_close(without_gradients(fusion, [layer]).hidden, layer)


# ---------------------------------------------------------------------------- parameters and names


@pytest.mark.parametrize(
    ("layers", "width", "concat", "gate"),
    [
        (13, 768, 7_668_480, 9_997),
        (25, 1024, 26_215_424, 25_625),
        (13, 256, 852_224, 3_341),
        (13, 384, 1_917_312, 5_005),
    ],
)
def test_numbers_of_parameters(layers, width, concat, gate):
    wanted = {
        "concat": concat,
        "gate": gate,
        "gate, sigmoid": gate,
        "gate, shared": width + 1,
        "gate, channel": layers * width * (width + 1),
        "scalar mix": layers + 1,
        "max": 0,
        "mean": 0,
        "last": 0,
        "best layer": 0,
    }
    for name, number in wanted.items():
        for init, more in (("random", 0), ("identity", name not in ("concat", *READERS))):
            with torch.device("meta"):
                options: dict[str, Any] = {**FUSIONS, **READERS}[name]
                fusion = LayerFusion(**options, width=width, num_layers=layers, init=init)
            assert sum(p.numel() for p in fusion.parameters()) == number + more, name


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("concat", {"weight": (WIDTH, LAYERS * WIDTH), "bias": (WIDTH,)}),
        ("gate", {"gate.weight": (LAYERS, WIDTH), "gate.bias": (LAYERS,)}),
        ("gate, shared", {"gate.weight": (1, WIDTH), "gate.bias": (1,)}),
        ("gate, channel", {"gate.weight": (LAYERS, WIDTH, WIDTH), "gate.bias": (LAYERS, WIDTH)}),
        ("scalar mix", {"mix": (LAYERS,), "gamma": ()}),
        ("max", {}),
        ("mean", {}),
        ("last", {}),
        ("best layer", {}),
    ],
)
def test_names_in_the_state_dict(name, shapes):
    options: dict[str, Any] = {**FUSIONS, **READERS}[name]
    norm = nn.LayerNorm(WIDTH)
    for init, more in (("random", {}), ("identity", {"alpha": ()})):
        fusion = fusion_of(**options, init=init, norm_each=norm)
        wanted = shapes if name in ("concat", *READERS) else shapes | more
        assert {k: tuple(x.shape) for k, x in fusion.state_dict().items()} == wanted
        assert not [*fusion.buffers()]


def test_concat_is_layer_major():
    fusion = fusion_of(kind="concat")
    layers = states()
    with torch.no_grad():
        fusion.weight.zero_()
        fusion.weight[:, WIDTH : 2 * WIDTH] = 2 * torch.eye(WIDTH)
    torch.testing.assert_close(fusion(layers).hidden, 2 * layers[1])


# -------------------------------------------------------------------------------------- first step


@every_fusion
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", [True, False], ids=["plain", "streaming"])
def test_identity_is_the_last_layer_to_the_bit(options, dtype, gradients):
    fusion = fusion_of(**options, init="identity", width=48, num_layers=13).to(dtype)
    # late layers larger, as in a pre-norm encoder: a sum would round the last one away
    layers = [h * 1.7**i for i, h in enumerate(states(3, 7, 48, layers=13, dtype=dtype))]
    with torch.set_grad_enabled(gradients):
        found = fusion(layers)
    assert found.hidden.dtype == dtype
    assert torch.equal(found.hidden, layers[-1])
    assert fusion.is_identity()


@every_fusion
@pytest.mark.parametrize("gradients", [True, False], ids=["plain", "streaming"])
def test_identity_of_states_whose_difference_overflows(options, gradients):
    fusion = fusion_of(**options, init="identity", num_layers=2).half()
    high = torch.full((1, 2, WIDTH), 40_000.0, dtype=torch.float16)
    for layers in ([high, -high], [-high, high]):
        with torch.set_grad_enabled(gradients):
            assert torch.equal(fusion(layers).hidden, layers[-1])


@every_fusion
def test_identity_passes_the_gradient_to_the_last_layer_alone(options):
    layers = [h.requires_grad_() for h in states()]
    outside = torch.randn(TEXTS, TOKENS, WIDTH)
    fusion_of(**options, init="identity")(layers).hidden.backward(outside)
    assert torch.equal(layers[-1].grad, outside)
    assert not any(h.grad.any() for h in layers[:-1])


@every_fusion
def test_a_step_leaves_the_identity(options):
    fusion = fusion_of(**options, init="identity")
    layers, target = states(), torch.randn(TEXTS, TOKENS, WIDTH)
    optimizer = torch.optim.AdamW(fusion_parameter_groups(fusion, lr=1e-3))
    for _ in range(2):
        optimizer.zero_grad()
        (fusion(layers).hidden - target).square().mean().backward()
        optimizer.step()
    assert not fusion.is_identity()
    # Adam's first steps are as long as its rate; the gate has gradients once alpha is not 0.
    if fusion.alpha is not None:
        assert abs(fusion.alpha.item()) == pytest.approx(2e-3, rel=0.1)
        assert all(p.grad.any() for p in fusion.parameters())


def test_autocast_keeps_the_identity():
    layers = states(2, 5, 16)
    for options in FUSIONS.values():
        if options["kind"] == "concat":
            continue  # is a product, which autocast rounds
        fusion = fusion_of(**options, width=16, init="identity")
        for enabled in (True, False):
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(enabled):
                assert torch.equal(fusion(layers).hidden, layers[-1])


@every_fusion
def test_layers_of_several_precisions(options):
    # as under autocast, where a norm gives float32 and a product bfloat16
    fusion = trained(**options, width=16)
    layers = [h.bfloat16() if i in (0, 3) else h for i, h in enumerate(states(2, 5, 16))]
    wanted = fusion([h.float() for h in layers]).hidden.detach()
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(enabled):
            found = fusion(layers).hidden
        assert found.dtype == torch.float32
        difference = (found.detach() - wanted).abs().max().item()
        assert difference <= 2e-2 * wanted.abs().max().item()


def test_random_start():
    concat = fusion_of(kind="concat", width=64, num_layers=13)
    assert concat.weight.std().item() == pytest.approx((13 * 64) ** -0.5, rel=0.02)
    assert not concat.bias.any()
    for init in ("random", "identity"):
        gate = fusion_of(kind="gate", width=512, num_layers=13, init=init).gate
        assert gate.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(gate.weight.mean().item()) < 0.001
        assert not gate.bias.any()
        mix = fusion_of(kind="scalar_mix", init=init)
        assert not mix.mix.any()
        assert mix.gamma.item() == 1
    layers = states()
    mean = torch.stack(layers).mean(0)
    torch.testing.assert_close(fusion_of(kind="scalar_mix")(layers).hidden, mean)
    assert (fusion_of(kind="gate")(layers).hidden - mean).abs().max() < 0.2


@every_fusion
@both_inits
def test_parameters_are_set_anew(options, init):
    fusion = trained(**options, init=init)
    torch.manual_seed(0)
    fusion.reset_parameters()
    for name, value in fusion_of(**options, init=init).state_dict().items():
        assert torch.equal(fusion.state_dict()[name], value), name


def test_what_is_the_identity():
    assert fusion_of(kind="last").is_identity()
    assert not fusion_of(kind="best_layer(1)").is_identity()
    assert fusion_of(kind="best_layer(4)").is_identity()
    for options in FUSIONS.values():
        assert not fusion_of(**options).is_identity()
    for place in ((0, 0), (1, -1)):
        concat = fusion_of(kind="concat", init="identity")
        concat.weight.data[place] += 1e-6
        assert not concat.is_identity()
    concat = fusion_of(kind="concat", init="identity")
    concat.bias.data[1] = 1e-6
    assert not concat.is_identity()


# -------------------------------------------------------------------------------------- gradients


@every_fusion
def test_gradients(options):
    fusion = trained(**options, init="identity").double()
    names = [name for name, _ in fusion.named_parameters()]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, values[LAYERS:], strict=True))
        found = torch.func.functional_call(fusion, parameters, (values[:LAYERS],))
        return tuple(x for x in found if x is not None)

    layers = [h[:1, :2].clone().requires_grad_() for h in states(dtype=torch.float64)]
    assert torch.autograd.gradcheck(run, (*layers, *fusion.parameters()))


def test_the_maximum_has_a_second_derivative():
    fusion = fusion_of(kind="max").double()
    layers = [h[:1, :1].clone().requires_grad_() for h in states(dtype=torch.float64)]
    assert torch.autograd.gradgradcheck(lambda *h: fusion([x * x for x in h]).hidden, layers)


def test_of_equal_layers_one_has_the_gradient():
    layers = [torch.ones(1, 1, 2, requires_grad=True) for _ in range(3)]
    fusion_of(kind="max", width=2, num_layers=3)(layers).hidden.sum().backward()
    assert torch.equal(sum(h.grad for h in layers), torch.ones(1, 1, 2))


def test_frozen_layers_need_no_gradient():
    layers = states()
    layers[2].requires_grad_()
    fusion_of(kind="max")(layers).hidden.sum().backward()
    largest = torch.stack(layers).argmax(0) == 2
    assert torch.equal(layers[2].grad, largest.float())


def test_the_maximum_keeps_a_byte_an_element():
    kept: list[Tensor] = []
    layers = [h.requires_grad_() for h in states(4, 8, 16, layers=13)]
    fusion = fusion_of(kind="max", width=16, num_layers=13)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fusion(layers)
    assert sum(x.nbytes for x in kept) == layers[0].numel()


def test_a_gate_keeps_no_copy_of_a_layer():
    kept: list[Tensor] = []
    layers = [h.requires_grad_() for h in states(4, 8, 64, layers=13, dtype=torch.bfloat16)]
    fusion = fusion_of(kind="gate", width=64, num_layers=13).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fusion(layers)
    own = {h.untyped_storage().data_ptr() for h in layers}
    others = [x.numel() for x in kept if x.untyped_storage().data_ptr() not in own]
    assert max(others) < layers[0].numel()


# -------------------------------------------------------------------------------------- streaming


@every_kind
@both_inits
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)], ids=["fp32", "bf16"]
)
def test_streaming_is_the_plain_form(options, init, dtype, tolerance):
    fusion = trained(**options, init=init, width=32, num_layers=13).to(dtype)
    layers = states(3, 9, 32, layers=13, dtype=dtype)
    plain, streamed = fusion(layers), without_gradients(fusion, layers)
    assert not streamed.hidden.requires_grad
    scale = plain.hidden.abs().max().item()
    difference = (streamed.hidden.float() - plain.hidden.float()).abs().max().item()
    assert difference <= tolerance * max(scale, 1)
    assert streamed.hidden.dtype == plain.hidden.dtype == dtype
    assert (streamed.weights is None) == (plain.weights is None)
    if plain.weights is not None:
        torch.testing.assert_close(streamed.weights, plain.weights.detach())


def test_large_logits_do_not_overflow():
    fusion = fusion_of(kind="gate")
    with torch.no_grad():
        fusion.gate.bias.copy_(torch.tensor([-1e4, 1e4, 0.0, 1e4, -1e4]))
    layers = states()
    wanted = (layers[1] + layers[3]) / 2
    fusion.gate.weight.data.zero_()
    torch.testing.assert_close(fusion(layers).hidden.detach(), wanted)
    torch.testing.assert_close(without_gradients(fusion, layers).hidden, wanted)


@every_kind
def test_layers_may_be_overwritten_and_lie_anyhow(options):
    fusion = trained(**options, init="identity")
    layers = states()
    wanted = without_gradients(fusion, layers).hidden
    stream, buffer = fusion.stream(), torch.empty(TOKENS, TEXTS, WIDTH).transpose(0, 1)
    for hidden in layers[:-1]:
        stream.add(buffer.copy_(hidden) if options["kind"] != "best_layer(1)" else hidden)
    stream.add(layers[-1].transpose(0, 1).contiguous().transpose(0, 1))
    torch.testing.assert_close(stream.result().hidden, wanted)


def held_bytes(stream: FusionStream) -> int:
    """Bytes of the tensors that a stream holds, in lists too."""
    held = [x if isinstance(x, list) else [x] for n, x in vars(stream).items() if n != "_fusion"]
    return sum(x.nbytes for some in held for x in some if isinstance(x, Tensor))


@every_kind
def test_no_layer_is_kept(options):
    fusion = fusion_of(**options, width=64, num_layers=13)
    stream = fusion.stream(need_weights=False)
    alive: list[weakref.ref[Tensor]] = []
    held: list[int] = []
    for _ in range(13):
        hidden = torch.randn(4, 8, 64)
        alive.append(weakref.ref(hidden))
        stream.add(hidden)
        layer = hidden.nbytes
        del hidden
        assert sum(ref() is not None for ref in alive) <= 1
        held.append(held_bytes(stream))
    # the last layer and the total; by channel, the largest logits and the sum of the shares too
    sums = 13 * 4 * 4  # of each layer and text, as float32
    assert held[-1] <= (4 if "channel" in options.values() else 2.1) * layer + sums
    if fusion.position is None:
        assert held[-2] == held[1]
    assert stream.result().weights is None


# ---------------------------------------------------------------------------- masks, norms, weights


def padded(fusion: LayerFusion, gradients: bool, mask: Tensor | None) -> Fused:
    with torch.set_grad_enabled(gradients):
        return fusion(states(), mask)


@pytest.mark.parametrize("gradients", [True, False], ids=["plain", "streaming"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_has_no_weight(gradients, dtype):
    real = torch.tensor([[True, True, False], [False, True, True]])
    for name in ("gate", "gate, sigmoid", "gate, channel", "scalar mix", "concat"):
        fusion = trained(**FUSIONS[name])
        whole, masked = padded(fusion, gradients, None), padded(fusion, gradients, real.to(dtype))
        assert torch.equal(whole.hidden, masked.hidden)
        if FUSIONS[name]["kind"] != "gate":
            continue
        assert torch.equal(masked.weights[real], whole.weights[real])
        assert not masked.weights[~real].any()


def test_weights_are_left_out():
    for options in FUSIONS.values():
        fusion = trained(**options)
        whole = fusion(states())
        assert fusion(states(), need_weights=False).weights is None
        bare = without_gradients(fusion, states(), need_weights=False)
        assert bare.weights is None
        torch.testing.assert_close(bare.hidden, whole.hidden.detach())


@every_kind
@pytest.mark.parametrize("gradients", [True, False], ids=["plain", "streaming"])
def test_each_layer_is_normed(options, gradients):
    norm = nn.LayerNorm(WIDTH)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layers = [3 * h + 1 for h in states()]
    bare, normed = trained(**options), trained(**options, norm_each=norm)
    with torch.set_grad_enabled(gradients):
        wanted = bare([norm(h) for h in layers]).hidden
        assert torch.equal(normed(layers).hidden, wanted)
        if options["kind"] != "best_layer(1)":
            start = fusion_of(**options, init="identity", norm_each=norm)
            assert torch.equal(start(layers).hidden, norm(layers[-1]))


def test_a_copy_norms_by_the_copy_of_the_norm():
    model = nn.ModuleDict({"norm": nn.LayerNorm(WIDTH)})
    model["fusion"] = fusion_of(kind="mean", norm_each=model["norm"])
    copied = copy.deepcopy(model)
    nn.init.zeros_(copied["norm"].weight)
    assert not copied["fusion"](states()).hidden.any()
    assert model["fusion"](states()).hidden.any()
    assert {name.split(".")[0] for name in model.state_dict()} == {"norm"}


def test_one_layer_is_normed_alone():
    seen: list[Tensor] = []
    fusion = fusion_of(kind="last", norm_each=lambda h: seen.append(h) or h)
    layers = states()
    fusion(layers)
    assert [h is layers[-1] for h in seen] == [True]


# -------------------------------------------------------------------------------------- bad numbers


@every_kind
@pytest.mark.parametrize("gradients", [True, False], ids=["plain", "streaming"])
def test_numbers_that_are_none(options, gradients):
    numbers = (0, 2, 4, 6, 8)
    options = options | ({"kind": "best_layer(2)"} if "best" in options["kind"] else {})
    fusion = fusion_of(**options, init="identity", layers=numbers)
    for value, (i, layer) in product((math.nan, math.inf, -math.inf), enumerate(numbers)):
        layers = states()
        layers[i][1, 2, 3] = value
        with torch.set_grad_enabled(gradients):
            if fusion.position not in (None, i):
                assert fusion(layers).hidden.isfinite().all()
                continue
            with pytest.raises(
                UserError, match=f"layer {layer} holds NaN, infinity or .* in text 1"
            ):
                fusion(layers)


def test_a_gate_of_zeros_sees_numbers_that_are_none():
    fusion = fusion_of(kind="gate", init="identity")
    with torch.no_grad():
        fusion.gate.weight.zero_()
        for value, layer in product((math.nan, math.inf, -math.inf), range(LAYERS)):
            layers = states()
            layers[layer][1, 2, 3] = value
            with pytest.raises(UserError, match=f"layer {layer} holds NaN, .* in text 1"):
                fusion(layers)


def test_shapes_alone():
    with torch.device("meta"):
        fusion = LayerFusion("gate", WIDTH, LAYERS, init="identity")
    found = fusion([h.to("meta") for h in states()])
    assert found.hidden.shape == (TEXTS, TOKENS, WIDTH)
    assert found.weights.shape == (TEXTS, TOKENS, LAYERS)


def test_large_numbers_are_numbers():
    for options in FUSIONS.values():
        fusion = fusion_of(**options, init="identity").half()
        layers = states(dtype=torch.float16)
        layers[-1][0, 0, :2] = torch.tensor([65504.0, -65504.0])
        assert torch.equal(without_gradients(fusion, layers).hidden, layers[-1])


# ------------------------------------------------------------------------------------- optimiser


def test_groups_for_the_optimiser():
    wanted = {
        "concat": ({"weight"}, {"bias"}),
        "gate": ({"gate.weight"}, {"gate.bias", "alpha"}),
        "gate, channel": ({"gate.weight"}, {"gate.bias", "alpha"}),
        "scalar mix": (set(), {"mix", "gamma", "alpha"}),
        "max": (set(), {"alpha"}),
    }
    for name, (decayed, free) in wanted.items():
        fusion = fusion_of(**FUSIONS[name], init="identity")
        names = {id(p): n for n, p in fusion.named_parameters()}
        found: dict[float, set[str]] = {0.01: set(), 0.0: set()}
        for group in fusion_parameter_groups(fusion):
            assert group["lr"] == 1e-3
            assert group["params"]
            found[group["weight_decay"]] |= {names[id(p)] for p in group["params"]}
        assert found == {0.01: decayed, 0.0: free}
    assert fusion_parameter_groups(fusion_of(kind="last")) == []
    whole = fusion_parameter_groups(fusion_of(kind="concat"), lr=2e-5, weight_decay=0.0)
    assert sum(len(group["params"]) for group in whole) == 2


@pytest.mark.parametrize("lr", [0.0, -1e-3, math.nan, math.inf])
def test_rates_out_of_range(lr):
    with pytest.raises(UserError, match="fusion_lr is out of range"):
        fusion_parameter_groups(fusion_of(kind="max"), lr=lr)
    with pytest.raises(UserError, match="weight_decay is out of range"):
        fusion_parameter_groups(fusion_of(kind="max"), weight_decay=-0.1)


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sum"}, "unknown fusion: 'sum'.*last, concat, max, mean, gate, scalar_mix or"),
        ({"kind": "best_layer"}, "unknown fusion"),
        ({"kind": "best_layer(5)"}, r"best_layer\(5\) is not among the layers.*0, 1, 2, 3, 4"),
        ({"kind": "best_layer(-1)"}, "unknown fusion"),
        ({"kind": "max", "width": 0}, "width must be 1 or more, got 0"),
        ({"kind": "max", "num_layers": 0}, "num_layers must be 1 or more, got 0"),
        ({"kind": "max", "layers": (0, 1)}, "2 layers are named, num_layers is 5"),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(UserError, match=message):
        fusion_of(**options)


@pytest.mark.parametrize("gradients", [True, False], ids=["plain", "streaming"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[:-1], "4 layers are given, the fusion has 5"),
        (lambda h: [], "0 layers are given, the fusion has 5"),
        (lambda h: [*h, h[0]], "more than the 5 layers of the fusion"),
        (lambda h: [*h[:3], h[3][:, :2], h[4]], r"states change shape at layer 3: \(2, 3, 4\) to"),
        (lambda h: [*h[:3], h[3][..., :2], h[4]], r"layer 3 has states of shape \(2, 3, 2\)"),
        (lambda h: [x[0] for x in h], r"layer 0 has states of shape \(3, 4\)"),
    ],
)
def test_layers_that_do_not_fit(gradients, change, message):
    with torch.set_grad_enabled(gradients), pytest.raises(UserError, match=message):
        fusion_of(kind="mean")(change(states()))


def test_a_mask_that_does_not_fit():
    mask = torch.ones(TEXTS, TOKENS + 1, dtype=torch.bool)
    with pytest.raises(UserError, match=r"a mask of shape \(2, 4\) for states of \(2, 3, 4\)"):
        fusion_of(kind="gate")(states(), mask)


# ------------------------------------------------------------------------------- groups of layers


@pytest.mark.parametrize(
    ("layers", "embeddings", "wanted"),
    [
        ("all", True, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)),
        ("all", False, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)),
        ("last:1", True, (12,)),
        ("last:4", True, (9, 10, 11, 12)),
        ("last:13", True, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)),
        ("every:1", False, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)),
        ("every:4", True, (0, 4, 8, 12)),
        ("every:4", False, (4, 8, 12)),
        ("every:5", True, (2, 7, 12)),
        ("every:12", True, (0, 12)),
        ([12, 0, 6], True, (0, 6, 12)),
        ((3,), False, (3,)),
    ],
)
def test_groups_of_layers(layers, embeddings, wanted):
    assert parse_layers(layers, 12, embeddings) == wanted


@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_each_kth_layer(blocks, k, embeddings):
    k = min(k, blocks)
    found = parse_layers(f"every:{k}", blocks, embeddings)
    first = 0 if embeddings else 1
    assert found == tuple(i for i in range(first, blocks + 1) if (blocks - i) % k == 0)
    assert parse_layers(found, blocks, embeddings, init="identity") == found


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(parse_layers, "last:14", 12), "'last:14' is out of range.*k is 1 to 13"),
        (partial(parse_layers, "last:13", 12, False), "k is 1 to 12"),
        (partial(parse_layers, "last:0", 12), "'last:0' is out of range"),
        (partial(parse_layers, "every:13", 12), "'every:13' is out of range.*k is 1 to 12"),
        (partial(parse_layers, "every:0", 12), "'every:0' is out of range"),
        (partial(parse_layers, "every", 12), "no such group of layers: 'every'"),
        (partial(parse_layers, "last:-1", 12), "no such group of layers"),
        (partial(parse_layers, "last:x", 12), "no such group of layers"),
        (partial(parse_layers, "first:2", 12), "choose all, last:k, every:k or numbers"),
        (partial(parse_layers, "", 12), "no such group of layers: ''"),
        (partial(parse_layers, [], 12), "no layers to fuse"),
        (partial(parse_layers, [3, 13], 12), "no such layers: 13.*choose 0 to 12"),
        (partial(parse_layers, [-1], 12), "no such layers: -1"),
        (partial(parse_layers, [0, 12], 12, False), "choose 1 to 12.*the embeddings, is left out"),
        (partial(parse_layers, [4, 12, 4], 12), "layers given twice: 4"),
        (partial(parse_layers, [0, 6], 12, init="identity"), "starts as layer 12, which is not"),
        (partial(parse_layers, "all", 0), "an encoder of 0 blocks"),
    ],
)
def test_layers_that_do_not_exist(call: Callable[[], Any], message):
    with pytest.raises(UserError, match=message):
        call()
