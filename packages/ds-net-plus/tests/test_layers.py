"""Sliceable layers against the official program's numbers and float64 references."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_net_plus.layers import (
    DSConv2d,
    DSDepthwiseConv2d,
    DSDepthwiseSeparable,
    DSGroupNorm,
    DSInvertedResidual,
    DSLayerNorm,
    DSLinear,
    MultiHeadGate,
    SwitchableBN,
    apply_channel_mask,
    channel_mask,
    init_official,
    make_divisible,
)
from tenfold.errors import UserError

REFERENCE = Path(__file__).parent / "reference"


def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def state(group: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in group.items() if k.startswith(prefix)}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Largest deviation relative to the largest entry."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(scope="module")
def ops() -> dict[str, torch.Tensor]:
    return arrays("slice_ops")


@pytest.mark.parametrize("i", range(3))
def test_convolutions_equal_the_official_program(ops, i):
    conv, pw = DSConv2d(8, 12, 3, stride=2, bias=True), DSConv2d(8, 12)
    conv.load_state_dict({"weight": ops["conv_w"], "bias": ops["conv_b"]})
    pw.load_state_dict({"weight": ops["pw_w"]})
    for j, out in enumerate((6, 9, 12)):
        close(conv(ops[f"conv_x{i}"], out), ops[f"conv_y_in{i}_out{j}"])
        close(pw(ops[f"pw_x{i}"], out), ops[f"pw_y_in{i}_out{j}"])
        plain = conv.materialize((4, 6, 8)[i], out)
        close(plain(ops[f"conv_x{i}"]), ops[f"conv_y_in{i}_out{j}"])
        assert plain.weight.is_contiguous()


@pytest.mark.parametrize("i", range(3))
def test_depthwise_and_linear_equal_the_official_program(ops, i):
    dw, linear = DSDepthwiseConv2d(8, 5, bias=True), DSLinear(8, 5)
    dw.load_state_dict({"weight": ops["dw_w"], "bias": ops["dw_b"]})
    linear.load_state_dict({"weight": ops["lin_w"], "bias": ops["lin_b"]})
    width = (4, 6, 8)[i]
    close(dw(ops[f"dw_x{i}"]), ops[f"dw_y{i}"])
    close(dw.materialize(width)(ops[f"dw_x{i}"]), ops[f"dw_y{i}"])
    close(linear(ops[f"lin_x{i}"]), ops[f"lin_y{i}"])
    close(linear.materialize(width)(ops[f"lin_x{i}"]), ops[f"lin_y{i}"])


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_channel_mask_equals_the_official_program(ops, kind):
    mask = channel_mask(ops[f"mask_{kind}"], (6, 9, 12))
    close(apply_channel_mask(ops["mask_x"], mask), ops[f"mask_y_{kind}"])


def test_switchable_bn_equals_the_official_program():
    ref = arrays("batchnorm")
    bn = SwitchableBN((4, 6, 8))
    bn.load_state_dict(state(ref, "sd0/"))
    bn.eval()
    for i in range(3):
        close(bn(ref[f"x{i}"]), ref[f"eval_y{i}"])
        close(bn.materialize((4, 6, 8)[i])(ref[f"x{i}"]), ref[f"eval_y{i}"])
    bn.train()
    for i in range(3):
        close(bn(ref[f"x{i}"]), ref[f"train_y{i}"])
    after = bn.state_dict()
    for key, value in state(ref, "sd1/").items():
        if value.dtype == torch.int64:
            assert torch.equal(after[key], value), key
        else:
            close(after[key], value)


def test_masked_bn_equals_sliced_bn_for_a_one_hot_gate():
    bn = SwitchableBN((4, 6, 8))
    for layer in bn.aux_bn:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 1.5)
    torch.nn.init.uniform_(bn.aux_bn[-1].weight, 0.5, 1.5)
    torch.nn.init.normal_(bn.aux_bn[-1].bias)
    bn.eval()
    x = torch.randn(3, 8, 5, 5)
    y = bn.masked(x, torch.eye(3), (4, 6, 8))
    for n, width in enumerate((4, 6, 8)):
        close(y[n : n + 1, :width], bn(x[n : n + 1, :width]), 1e-6)
        assert not y[n, width:].any()


def test_masked_bn_gradient_is_that_of_finite_differences():
    bn = SwitchableBN((2, 3)).double().eval()
    for layer in bn.aux_bn:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    gate = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: bn.masked(x, g, (2, 3)), gate)


@pytest.mark.parametrize("i", range(3))
def test_separable_block_equals_the_official_program(i):
    ref = arrays("blocks")
    block = DSDepthwiseSeparable((8, 12, 16), (12, 16, 20, 24), stride=2, gate_outputs=4)
    block.load_state_dict(state(ref, "ds/"))
    block.eval()
    for j, out in enumerate((12, 16, 20, 24)):
        expected = ref[f"ds_y_in{i}_out{j}"]
        close(block(ref[f"ds_x{i}"], out), expected)
        close(block.materialize((8, 12, 16)[i], out)(ref[f"ds_x{i}"]), expected)


@pytest.mark.parametrize("i", range(3))
def test_inverted_residual_equals_the_official_program(i):
    ref = arrays("blocks")
    block = DSInvertedResidual((8, 12, 16), (8, 12, 16), expansion=3, residual=True)
    block.load_state_dict(state(ref, "ir/"))
    assert block.middle == (24, 40, 48)
    close(block.eval()(ref[f"ir_x{i}"], (8, 12, 16)[i]), ref[f"ir_y{i}"])


def test_a_wider_layer_is_the_narrower_one_plus_a_residual():
    conv = DSConv2d(8, 6, 3).double()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    tail = torch.nn.functional.conv2d(x[:, 5:], conv.weight[:, 5:], padding=1)
    close(conv(x), conv(x[:, :5]) + tail, 1e-12)


def test_tanh1p_attention_starts_as_the_identity():
    torch.manual_seed(0)  # of its two hidden channels one must live
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(MultiHeadGate(8, attention="tanh1p")(x), x)
    block = DSDepthwiseSeparable((8,), (8,), attention="tanh1p")
    init_official(block)  # draws every convolution, the attention's too
    assert not torch.equal(block.gate(x), x)
    block.gate.reset_attention()
    assert torch.equal(block.gate(x), x)


def test_a_fresh_residual_block_is_the_identity():
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(DSInvertedResidual((4, 8), (4, 8), residual=True)(x, 8), x)


@pytest.mark.parametrize(
    ("conv", "sizes"),
    [(DSConv2d(6, 8, 5), (8,)), (DSDepthwiseConv2d(6, 5, stride=2), ())],
)
def test_an_inner_kernel_is_the_kernel_with_its_rim_at_zero(conv, sizes):
    x = torch.randn(2, 4, 9, 9)
    for kernel in (3, 1):
        rim = torch.zeros_like(conv.weight)
        edge = (5 - kernel) // 2
        rim[:, :, edge:-edge, edge:-edge] = 1
        whole = copy.deepcopy(conv)
        whole.weight.data *= rim
        close(conv(x, *sizes, kernel=kernel), whole(x, *sizes))
        plain = conv.materialize(4, *sizes, kernel=kernel)
        assert plain.kernel_size == (kernel, kernel)
        close(plain(x), whole(x, *sizes))
    with pytest.raises(UserError, match=r"kernel 2 is not the centre of 5, choose of \[1, 3, 5\]"):
        conv(x, *sizes, kernel=2)


def test_group_norm_of_fixed_group_size_commutes_with_slicing():
    norm = DSGroupNorm((16, 32, 64)).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 64, 5, 5, dtype=torch.float64)
    for width in norm.widths:
        groups = x[:, :width].reshape(3, width // 16, -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, correction=0, keepdim=True)
        expected = ((groups - mean) / (var + 1e-5).sqrt()).reshape(3, width, 5, 5)
        scale, shift = norm.weight[:width, None, None], norm.bias[:width, None, None]
        close(norm(x[:, :width]), expected * scale + shift, 1e-12)
        close(norm(x[:, :width]), norm(x)[:, :width], 1e-12)
        close(norm.materialize(width).double()(x[:, :width]), norm(x)[:, :width], 1e-6)
    with pytest.raises(UserError, match=r"\[24\] are not multiples of the group size 16"):
        DSGroupNorm((16, 24))


def test_layer_norm_takes_statistics_of_the_active_features():
    norm = DSLayerNorm(12).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    expected = (x - mean) / (var + 1e-6).sqrt() * norm.weight[:8] + norm.bias[:8]
    close(norm(x), expected, 1e-12)
    close(norm.materialize(8).double()(x), expected, 1e-6)


@given(st.floats(1, 4000))
@settings(max_examples=200, deadline=None)
def test_make_divisible_is_a_multiple_of_eight_and_close(channels):
    rounded = make_divisible(channels)
    assert rounded % 8 == 0
    assert rounded >= 0.9 * channels
    assert rounded <= max(8, channels + 8)


@pytest.mark.parametrize("widths", [(), (4, 4), (8, 4), (0, 4), (-2, 3)])
def test_bad_width_lists_are_named(widths):
    with pytest.raises(UserError, match="ascending"):
        SwitchableBN(widths)


def test_residual_needs_equal_lists():
    with pytest.raises(UserError, match="residual"):
        DSInvertedResidual((8,), (8,), stride=2, residual=True)


def test_unknown_width_is_named():
    with pytest.raises(UserError, match="width 5"):
        SwitchableBN((4, 6))(torch.zeros(1, 5, 2, 2))
