"""Sliceable self-attention against timm's, a float64 reference and its own slices."""

import pytest
import torch
from timm.layers import Attention
from torch import Tensor

from tenfold.attention import (
    SelfAttention,
    from_head_major,
    slice_linear,
    to_head_major,
)
from tenfold.errors import UserError

FEATURES, HEADS, DIM = 24, 3, 8


def layer(seed: int = 0) -> SelfAttention:
    torch.manual_seed(seed)
    return SelfAttention(FEATURES, HEADS, DIM).double()


def tokens(width: int = FEATURES) -> Tensor:
    return torch.randn(2, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(attention: SelfAttention, x: Tensor, heads: int) -> Tensor:
    """One head at a time, every number from its definition."""
    width, outputs = x.shape[-1], []
    for h in range(heads):
        start = h * 3 * attention.head_dim
        q, k, v = (
            x @ attention.qkv.weight[rows, :width].T + attention.qkv.bias[rows]
            for rows in (
                slice(start + j * attention.head_dim, start + (j + 1) * attention.head_dim)
                for j in range(3)
            )
        )
        scores = (q @ k.transpose(1, 2)) * attention.head_dim**-0.5
        outputs.append(scores.softmax(-1) @ v)
    inner = torch.cat(outputs, -1)
    weight = attention.proj.weight[:width, : inner.shape[-1]]
    return inner @ weight.T + attention.proj.bias[:width]


@pytest.mark.parametrize("width", [24, 16, 5])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_every_slice_is_its_definition(width, heads):
    attention, x = layer(), tokens(width)
    expected = by_hand(attention, x, heads)
    torch.testing.assert_close(attention(x, heads), expected)
    for share in (False, True):
        plain = attention.materialize(width, heads, share)
        torch.testing.assert_close(plain(x), expected)
        shared = plain.qkv.weight.data_ptr() == attention.qkv.weight.data_ptr()
        assert shared is share


def test_head_major_weights_of_timm_give_timms_attention():
    torch.manual_seed(0)
    theirs, ours = Attention(FEATURES, HEADS, qkv_bias=True).double().eval(), layer()
    with torch.no_grad():
        ours.qkv.weight.copy_(to_head_major(theirs.qkv.weight, HEADS))
        ours.qkv.bias.copy_(to_head_major(theirs.qkv.bias, HEADS))
    ours.proj.load_state_dict(theirs.proj.state_dict())
    torch.testing.assert_close(ours(tokens()), theirs(tokens()))
    back = from_head_major(ours.qkv.weight, HEADS)
    assert torch.equal(back, theirs.qkv.weight)


def test_heads_of_timm_alone_are_prefixes_here():
    """Two of three heads, cut out of timm's weights by hand."""
    torch.manual_seed(0)
    theirs, ours = Attention(FEATURES, HEADS, qkv_bias=True).double(), layer()
    with torch.no_grad():
        ours.qkv.weight.copy_(to_head_major(theirs.qkv.weight, HEADS))
        ours.qkv.bias.copy_(to_head_major(theirs.qkv.bias, HEADS))
    ours.proj.load_state_dict(theirs.proj.state_dict())
    x = tokens()
    q, k, v = theirs.qkv(x).view(2, 5, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)[:, :, :2]
    inner = ((q @ k.transpose(-2, -1)) * DIM**-0.5).softmax(-1) @ v
    inner = inner.transpose(1, 2).flatten(2)
    expected = inner @ theirs.proj.weight[:, : 2 * DIM].T + theirs.proj.bias
    torch.testing.assert_close(ours(x, heads=2), expected)


def test_a_head_gate_of_ones_and_zeros_switches_heads():
    attention, x = layer(), tokens()
    gate = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]).double()
    masked = attention(x, head_gate=gate)
    torch.testing.assert_close(masked[:1], attention(x[:1], heads=2))
    torch.testing.assert_close(masked[1:], attention(x[1:], heads=1))


def test_a_mask_hides_tokens():
    attention, x = layer(), tokens()
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    mask[..., 3:] = False
    torch.testing.assert_close(attention(x, mask=mask)[:, :3], attention(x[:, :3]))


def test_gradients_are_those_of_finite_differences():
    attention, x = layer(), tokens(16).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: attention(x, heads=2), x)


def test_a_cut_linear_layer_shares_or_copies():
    linear = torch.nn.Linear(6, 4)
    shared, copied = slice_linear(linear, 3, 2, share_storage=True), slice_linear(linear, 3, 2)
    x = torch.randn(5, 3)
    assert torch.equal(shared(x), copied(x))
    with torch.no_grad():
        linear.weight.mul_(2)
    assert not torch.equal(shared(x), copied(x))


@pytest.mark.parametrize("heads", [0, 4, -1])
def test_heads_that_are_not_stored(heads):
    with pytest.raises(UserError, match="heads of 3 stored ones"):
        layer()(tokens(), heads)
    with pytest.raises(UserError, match="attention needs"):
        SelfAttention(0, 1)
