"""Attention against timm's and torch's, float64 references and its own slices."""

import pytest
import torch
from timm.layers import Attention
from torch import Tensor

from tenfold.attention import (
    FusedAttention,
    SelfAttention,
    Transformer,
    TransformerBlock,
    from_head_major,
    quick_gelu,
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


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """In double precision, with every parameter random: zero biases and unit norms hide faults."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.data = 0.3 * noise + (parameter.ndim == 1)
    return module


def causal_mask(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_is_torchs_multi_head_attention(causal):
    ours, x = filled(FusedAttention(FEATURES, HEADS)), tokens()
    theirs = torch.nn.MultiheadAttention(FEATURES, HEADS, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())  # the same names
    expected, weights = theirs(
        x, x, x, attn_mask=causal_mask(5) if causal else None, average_attn_weights=False
    )
    torch.testing.assert_close(ours(x, causal), expected)
    torch.testing.assert_close(ours.weights(x, causal), weights)


def block_by_hand(block: TransformerBlock, x: Tensor, causal: bool, phi) -> Tensor:
    """The block from its definition, head by head."""

    def norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * layer.weight + layer.bias

    normed, heads = norm(x, block.ln_1), []
    rows = block.attn.in_proj_weight.view(3, HEADS, DIM, FEATURES)
    biases = block.attn.in_proj_bias.view(3, HEADS, DIM)
    for h in range(HEADS):
        q, k, v = (normed @ rows[part, h].T + biases[part, h] for part in range(3))
        scores = q @ k.transpose(1, 2) / DIM**0.5
        if causal:
            scores = scores - 1e9 * causal_mask(x.shape[1])
        heads.append(scores.softmax(-1) @ v)
    out = block.attn.out_proj
    x = x + torch.cat(heads, -1) @ out.weight.T + out.bias
    inner = phi(norm(x, block.ln_2) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias)
    return x + inner @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("activation", "phi"),
    [
        ("quick_gelu", lambda x: x / (1 + (-1.702 * x).exp())),
        ("gelu", lambda x: x * (1 + (x / 2**0.5).erf()) / 2),
    ],
)
def test_a_transformer_is_its_blocks_definition(causal, activation, phi):
    transformer, x = filled(Transformer(FEATURES, 2, HEADS, activation)), tokens()
    expected = x
    for block in transformer.resblocks:
        expected = block_by_hand(block, expected, causal, phi)
    torch.testing.assert_close(transformer(x, causal), expected)


def test_a_block_is_torchs_pre_norm_encoder_layer():
    ours, x = filled(TransformerBlock(FEATURES, HEADS, "gelu")), tokens()
    theirs = torch.nn.TransformerEncoderLayer(
        FEATURES, HEADS, 4 * FEATURES, 0.0, "gelu", batch_first=True, norm_first=True
    ).double()
    names = {"ln_1": "norm1", "attn": "self_attn", "ln_2": "norm2"}
    names |= {"mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    state = {}
    for key, value in ours.state_dict().items():
        name = next(name for name in names if key.startswith(f"{name}."))
        state[names[name] + key.removeprefix(name)] = value
    theirs.load_state_dict(state)
    expected = theirs(x, src_mask=causal_mask(5))
    torch.testing.assert_close(ours(x, causal=True), expected)


def test_a_causal_token_does_not_see_those_after_it():
    transformer, x = filled(Transformer(FEATURES, 2, HEADS)), tokens()
    whole = transformer(x, causal=True)
    torch.testing.assert_close(transformer(x[:, :3], causal=True), whole[:, :3])
    assert not torch.allclose(transformer(x[:, :3]), transformer(x)[:, :3])


def test_checkpointing_changes_memory_and_not_the_gradient():
    transformer, x = filled(Transformer(FEATURES, 3, HEADS)), tokens()
    kept = {}
    for checkpointing in (False, True):
        sizes: list[int] = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        transformer.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            y = transformer(x, causal=True, checkpointing=checkpointing)
        y.square().sum().backward()
        kept[checkpointing] = [p.grad.clone() for p in transformer.parameters()], sum(sizes)
    (plain, memory), (saved, less) = kept[False], kept[True]
    torch.testing.assert_close(saved, plain)
    assert less < memory / 10


def test_initial_values_are_clips():
    torch.manual_seed(0)
    width, layers = 128, 3
    for block in Transformer(width, layers, 2).resblocks:
        for weight, std in (
            (block.attn.in_proj_weight, width**-0.5),
            (block.attn.out_proj.weight, width**-0.5 * (2 * layers) ** -0.5),
            (block.mlp.c_fc.weight, (2 * width) ** -0.5),
            (block.mlp.c_proj.weight, width**-0.5 * (2 * layers) ** -0.5),
        ):
            assert weight.std().item() == pytest.approx(std, rel=0.03)
            assert abs(weight.mean().item()) < 0.03 * std
        assert not block.attn.in_proj_bias.any()
        assert not block.attn.out_proj.bias.any()
        assert block.mlp.c_fc.bias.abs().max().item() == pytest.approx(width**-0.5, rel=0.05)


def test_names_of_a_transformer_are_clips():
    keys = Transformer(8, 1, 2).state_dict().keys()
    inside = [key.removeprefix("resblocks.0.") for key in keys]
    assert inside == [
        *("ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias"),
        *("attn.out_proj.weight", "attn.out_proj.bias", "ln_2.weight", "ln_2.bias"),
        *("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    ]


def test_quick_gelu_stays_finite_where_its_exponential_does_not():
    x = torch.tensor([-1e4, 0.0, 1e4])
    torch.testing.assert_close(quick_gelu(x), torch.tensor([0.0, 0.0, 1e4]))


def test_transformers_that_cannot_be():
    with pytest.raises(ValueError, match="3 heads do not divide a width of 8"):
        Transformer(8, 1, 3)
    with pytest.raises(ValueError, match="'relu' is none of quick_gelu, gelu"):
        TransformerBlock(8, 2, "relu")
