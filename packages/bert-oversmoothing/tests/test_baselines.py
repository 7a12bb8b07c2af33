"""Blocks with a remedy against the authors' arrays, slow float64 loops, and transformers' ViT."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from bert_oversmoothing.baselines import (
    BLOCKS,
    AttnScale,
    FeatScale,
    NeuTRENO,
    TokenSimilarityLoss,
    VisionTransformer,
    attn_scale,
)

WIDTH, HEADS = 16, 4


def noisy(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter normal noise, so that none is without effect; in float64."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return module


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)


def close(found, wanted, tolerance=1e-10) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


# --------------------------------------------------------------------------- a slow reference


def normed(row, norm):
    mean = sum(row) / len(row)
    var = sum((x - mean) ** 2 for x in row) / len(row)
    pairs = zip(norm.weight.tolist(), norm.bias.tolist(), strict=True)
    return [
        g * (x - mean) / math.sqrt(var + norm.eps) + b for x, (g, b) in zip(row, pairs, strict=True)
    ]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def mapped(row, linear):
    pairs = zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)
    return [dot(weights, row) + b for weights, b in pairs]


def slow_attention(rows, block, sharpen=0.0, first=None, alpha=0.6):
    """One text, token by token: what attention adds, and the values (head, token, channel)."""
    n, e = len(rows), WIDTH // HEADS
    qkv = [mapped(normed(row, block.norm1), block.attn.qkv) for row in rows]
    q, k, v = (
        [[qkv[i][s * WIDTH + h * e : s * WIDTH + (h + 1) * e] for i in range(n)] for h in range(4)]
        for s in range(3)
    )
    mixed = [[0.0] * WIDTH for _ in rows]
    for h in range(HEADS):
        for i in range(n):
            logits = [dot(q[h][i], k[h][j]) / math.sqrt(e) for j in range(n)]
            total = sum(math.exp(x) for x in logits)
            for j in range(n):
                weight = math.exp(logits[j]) / total
                if sharpen:
                    weight = 1 / n + (1 + sharpen[h]) * (weight - 1 / n)
                for c in range(e):
                    mixed[i][h * e + c] += weight * v[h][j][c]
            if first is not None:
                for c in range(e):
                    mixed[i][h * e + c] += alpha * (first[h][i][c] - v[h][i][c])
    return [mapped(row, block.attn.proj) for row in mixed], v


def slow_rest(rows, branch, block):
    """The residual and the MLP."""
    found = []
    for row, more in zip(rows, branch, strict=True):
        middle = [x + y for x, y in zip(row, more, strict=True)]
        hidden = mapped(normed(middle, block.norm2), block.mlp.fc1)
        hidden = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in hidden]
        found.append([x + y for x, y in zip(middle, mapped(hidden, block.mlp.fc2), strict=True)])
    return torch.tensor(found, dtype=torch.float64)


# ------------------------------------------------------------------------------------- blocks


def test_attnscale_is_the_reference_block_with_its_gradients(reference):
    arrays = {k: torch.from_numpy(v) for k, v in np.load(reference / "attnscale_block.npz").items()}
    block = AttnScale(WIDTH, HEADS, 2).eval()
    state = {k.removeprefix("param."): v for k, v in arrays.items() if k.startswith("param.")}
    block.load_state_dict(state)
    given = arrays["input"].clone().requires_grad_()
    output = block(given).hidden
    close(output, arrays["output"], 1e-5)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = {"input": given.grad, **{k: p.grad for k, p in block.named_parameters()}}
    assert {f"grad.{k}" for k in found} == {k for k in arrays if k.startswith("grad.")}
    for name, gradient in found.items():
        wanted = arrays[f"grad.{name}"]
        close(gradient, wanted, 1e-5 * max(1.0, wanted.abs().max().item()))


def test_attnscale_by_loops():
    block, hidden = noisy(AttnScale(WIDTH, HEADS, 2)), tokens(1, 5)
    rows = hidden[0].tolist()
    branch, _ = slow_attention(rows, block, sharpen=block.attn.lamb.tolist())
    close(block(hidden).hidden[0], slow_rest(rows, branch, block))


@pytest.mark.parametrize(("double", "factor"), [(False, 1), (True, 2)])
def test_featscale_by_loops(double, factor):
    block, hidden = noisy(FeatScale(WIDTH, HEADS, 2, double=double)), tokens(1, 5)
    rows = hidden[0].tolist()
    branch, _ = slow_attention(rows, block)
    lamb1, lamb2 = block.lamb1.tolist(), block.lamb2.tolist()
    scaled = []
    for row in branch:
        means = [sum(other[c] for other in branch) / len(branch) for c in range(WIDTH)]
        scaled.append(
            [
                row[c] + factor * (lamb1[c] * means[c] + lamb2[c] * (row[c] - means[c]))
                for c in range(WIDTH)
            ]
        )
    close(block(hidden).hidden[0], slow_rest(rows, scaled, block))


def test_neutreno_by_loops():
    first, second, hidden = (
        noisy(NeuTRENO(WIDTH, HEADS, 2)),
        noisy(NeuTRENO(WIDTH, HEADS, 2), 5),
        tokens(1, 5),
    )
    rows = hidden[0].tolist()
    branch, values = slow_attention(rows, first)
    middle = slow_rest(rows, branch, first)
    found = first(hidden)
    close(found.hidden[0], middle)
    branch, _ = slow_attention(middle.tolist(), second, first=values)
    wanted = slow_rest(middle.tolist(), branch, second)
    close(second(found.hidden, None, found.value).hidden[0], wanted)


@pytest.mark.parametrize("kind", BLOCKS)
def test_padding_on_either_side_changes_no_token(kind):
    block = noisy(BLOCKS[kind](WIDTH, HEADS, 2))
    first = noisy(BLOCKS[kind](WIDTH, HEADS, 2), 5)
    padded = 100 * tokens(3, 7)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, :4] = mask[1, 2:] = mask[2] = True
    real = tokens(3, 7, seed=2)
    padded[mask] = real[mask]
    middle = first(padded, mask)
    found = block(middle.hidden, mask, middle.value).hidden
    for row in range(3):
        alone = first(real[row, mask[row]][None])
        wanted = block(alone.hidden, None, alone.value).hidden[0]
        close(found[row, mask[row]], wanted, 1e-9)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_mask_may_be_that_of_a_tokenizer(kind):
    block, hidden = noisy(BLOCKS[kind](WIDTH, HEADS, 2)), tokens(2, 7)
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    assert torch.equal(block(hidden, mask.long()).hidden, block(hidden, mask).hidden)
    loss = TokenSimilarityLoss(1.3)
    assert loss(hidden, mask.long()).item() == loss(hidden, mask).item() > 0


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_text_of_padding_alone_stays_finite(kind):
    block = noisy(BLOCKS[kind](WIDTH, HEADS, 2))
    hidden = tokens(2, 4).requires_grad_()
    mask = torch.tensor([[True] * 4, [False] * 4])
    output, _ = block(hidden, mask)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())


def test_rows_of_attnscale_sum_to_one_and_padded_keys_stay_at_zero():
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    logits = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    attention = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    found = attn_scale(attention, torch.tensor([0.0, 1.5, -1.0], dtype=torch.float64), mask)
    close(found.sum(-1), torch.ones(2, 3, 6, dtype=torch.float64))
    assert (found[1, ..., 2:] == 0).all()
    close(found[:, 0], attention[:, 0])  # 0 changes nothing
    close(found[1, 2, :, :2], torch.full((6, 2), 0.5, dtype=torch.float64))  # the mean alone


def test_remedies_begin_as_the_plain_block():
    hidden = tokens(2, 5)
    plain = noisy(BLOCKS["none"](WIDTH, HEADS))
    for kind in ("attnscale", "featscale"):
        block = BLOCKS[kind](WIDTH, HEADS).double()
        left = block.load_state_dict(plain.state_dict(), strict=False)
        assert not left.unexpected_keys
        assert set(left.missing_keys) <= {"attn.lamb", "lamb1", "lamb2"}
        close(block(hidden).hidden, plain(hidden).hidden)


def test_sizes_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="no multiple of 3 heads"):
        AttnScale(16, 3)
    with pytest.raises(ValueError, match="do not divide into patches"):
        VisionTransformer(image_size=20)
    with pytest.raises(ValueError, match="remedy must be one of"):
        # the unchecked constructor: the shape checker of the tests would come first
        VisionTransformer.__init__.__wrapped__(VisionTransformer.__new__(VisionTransformer), "more")


# ------------------------------------------------------------------------- vision transformer

SMALL = {
    "image_size": 12,
    "patch_size": 4,
    "classes": 5,
    "width": WIDTH,
    "depth": 3,
    "heads": HEADS,
}


def to_hf(state):
    """Keys of transformers' ViT, whose queries, keys and values are maps of their own."""
    found = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
    }
    names = {
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    inner = {
        "norm1": "layernorm_before",
        "attn.proj": "attention.o_proj",
        "norm2": "layernorm_after",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module in names:
            found[f"{names[module]}.{kind}"] = value
        elif module.startswith("blocks."):
            _, index, module = module.split(".", 2)
            prefix = f"vit.layers.{index}"
            if module == "attn.qkv":
                for name, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{prefix}.attention.{name}_proj.{kind}"] = part
            else:
                found[f"{prefix}.{inner[module]}.{kind}"] = value
    return found


def test_the_vision_transformer_is_that_of_transformers():
    model = noisy(VisionTransformer("none", mlp_ratio=2, **SMALL))
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        image_size=12,
        patch_size=4,
        layer_norm_eps=1e-6,
        num_labels=5,
    )
    peer = ViTForImageClassification(config).double().eval()
    peer.load_state_dict(to_hf(model.state_dict()))
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        wanted = peer(images, output_hidden_states=True)
        close(model(images), wanted.logits)
        for found, state in zip(model.hidden_states(images), wanted.hidden_states, strict=True):
            close(found, state)


@pytest.mark.parametrize("kind", ["attnscale", "featscale", "neutreno"])
def test_the_vision_transformer_is_its_blocks(kind):
    model = noisy(VisionTransformer(kind, **SMALL))
    states = model.hidden_states(torch.randn(2, 3, 12, 12, dtype=torch.float64))
    first = model.blocks[0](states[0])
    close(first.hidden, states[1])
    given = first.value if kind == "neutreno" else None
    for block, before, after in zip(model.blocks[1:], states[1:], states[2:], strict=False):
        close(block(before, None, given).hidden, after)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize(
    ("kind", "more"), [("none", 0), ("attnscale", 6), ("featscale", 2 * 384), ("neutreno", 0)]
)
def test_the_authors_small_size_has_the_parameters_of_deit(kind, more):
    with torch.device("meta"):
        model = VisionTransformer(kind)
    # DeiT-small's published 22,050,664, and the remedy's in each of 12 blocks
    assert sum(p.numel() for p in model.parameters()) == 22_050_664 + 12 * more


# --------------------------------------------------------------------------------- regulariser


def slow_similarity(texts, margin):
    means = []
    for rows in texts:
        if len(rows) < 2:
            continue
        costs = [
            max(0.0, margin - 1 + F.cosine_similarity(a, b, dim=0).item())
            for i, a in enumerate(rows)
            for j, b in enumerate(rows)
            if i != j
        ]
        means.append(sum(costs) / len(costs))
    return sum(means) / len(means)


@pytest.mark.parametrize("margin", [0.5, 1.3])
def test_token_similarity_by_loops(margin):
    hidden = tokens(4, 6) + 0.5
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0] = mask[1, 2:5] = mask[2, :1] = True  # the third has one token, the fourth none
    wanted = slow_similarity([h[m] for h, m in zip(hidden, mask, strict=True)], margin)
    hidden[~mask] = torch.nan
    hidden.requires_grad_()
    loss = TokenSimilarityLoss(margin, weight=2.0)(hidden, mask)
    assert loss.item() == pytest.approx(2 * wanted, abs=1e-12)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[~mask] == 0).all()


def test_token_similarity_at_its_ends():
    mask = torch.ones(1, 3, dtype=torch.bool)
    same, apart = torch.ones(1, 3, 4), torch.eye(4)[None, :3]
    assert TokenSimilarityLoss()(same, mask).item() == pytest.approx(0.5)
    assert TokenSimilarityLoss()(apart, mask).item() == 0
    assert TokenSimilarityLoss()(same, ~mask).item() == 0
    found = TokenSimilarityLoss()(same.bfloat16(), mask)
    assert found.dtype == torch.float32
    with pytest.raises(ValueError, match="a margin in"):
        TokenSimilarityLoss(3.0)
    with pytest.raises(ValueError, match="a weight of at least 0"):
        TokenSimilarityLoss(weight=-1.0)


def test_token_similarity_has_the_gradient_of_its_loss():
    hidden = tokens(2, 4).requires_grad_()
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    assert torch.autograd.gradcheck(lambda x: TokenSimilarityLoss(1.0)(x, mask), (hidden,))
