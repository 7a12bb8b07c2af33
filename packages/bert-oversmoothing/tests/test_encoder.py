"""The small encoder against transformers' BERT, loops over models, and measured similarities."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from bert_oversmoothing.encoder import (
    Encoder,
    EncoderConfig,
    clip_per_model,
    probe_config,
    stack,
    unstack,
)
from bert_oversmoothing.synthetic import probe_task

SMALL = EncoderConfig(vocab_size=11, max_tokens=9, width=16, heads=4, ff_width=24, layers=3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy(config: EncoderConfig, seed: int = 0) -> Encoder:
    """In float64, with gains, offsets and biases that are none of the start's ones and zeros."""
    encoder = Encoder(config, generator=seeded(seed)).double()
    generator = seeded(seed + 100)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).double()
    return encoder


def batch(seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(11, (4, 8), generator=seeded(seed))
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[1, 5:] = mask[2, :3] = False
    return ids, mask


def close(found, wanted, tolerance=1e-10) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def as_bert(encoder: Encoder) -> BertModel:
    config = encoder.config
    bert = BertModel(
        BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.ff_width,
            max_position_embeddings=config.max_tokens,
            type_vocab_size=1,
            pad_token_id=None,  # else the word 0 gets no gradient
            attn_implementation="eager",
        ),
        add_pooling_layer=False,
    )
    names = {
        "value": "attention.self.value",
        "output": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm2": "output.LayerNorm",
    }
    state = {"embeddings.token_type_embeddings.weight": torch.zeros(1, config.width)}
    for key, value in encoder.state_dict().items():
        if key in ("word", "position"):
            state[f"embeddings.{key}_embeddings.weight"] = value
        elif key.startswith("norm."):
            state[f"embeddings.LayerNorm.{key[5:]}"] = value
        else:
            _, index, name, kind = key.split(".")
            prefix = f"encoder.layer.{index}"
            if name == "query_key":
                query, key_ = value.chunk(2)
                state[f"{prefix}.attention.self.query.{kind}"] = query
                state[f"{prefix}.attention.self.key.{kind}"] = key_
            else:
                state[f"{prefix}.{names[name]}.{kind}"] = value
    bert.double().eval().load_state_dict(state)
    return bert


def test_it_is_bert_with_the_same_weights():
    encoder, (ids, mask) = noisy(SMALL), batch()
    bert, inputs = as_bert(encoder), []
    for layer in bert.encoder.layer:
        for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
            norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    wanted = bert(ids, mask.long(), output_hidden_states=True, output_attentions=True)
    found = encoder(ids, mask, output_attentions=True, output_norm_inputs=True)
    assert len(found.hidden_states) == SMALL.layers + 1
    for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True):
        close(a, b)
    for a, b in zip(found.attentions, wanted.attentions, strict=True):
        close(a, b)
    for a, b in zip([x for pair in found.norm_inputs for x in pair], inputs, strict=True):
        close(a, b)
    found.hidden_states[-1].sum(-1).pow(3).sum().backward()
    wanted.hidden_states[-1].sum(-1).pow(3).sum().backward()
    close(encoder.word.grad, bert.embeddings.word_embeddings.weight.grad, 1e-8)
    close(encoder.blocks[1].down.weight.grad, bert.encoder.layer[1].output.dense.weight.grad, 1e-8)


def test_only_what_is_asked_for_is_kept():
    output = noisy(SMALL)(batch()[0])
    assert output.attentions is None
    assert output.norm_inputs is None


@pytest.mark.parametrize("share", ["none", "first"])
def test_padding_on_either_side_changes_no_token(share):
    encoder = noisy(dataclasses.replace(SMALL, share_attention=share))
    with torch.no_grad():
        encoder.position.zero_()  # left padding moves the tokens
    ids, mask = batch()
    found = encoder(ids, mask).hidden_states
    for row in range(4):
        alone = encoder(ids[row, mask[row]][None]).hidden_states
        for a, b in zip(found, alone, strict=True):
            close(a[row, mask[row]], b[0])


def test_a_text_of_padding_alone_stays_finite():
    ids, mask = batch()
    mask[3] = False
    encoder = noisy(SMALL)
    state = encoder(ids, mask).hidden_states[-1]
    state.sum().backward()
    assert state.isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_shared_attention_is_that_of_the_first_block():
    config = dataclasses.replace(SMALL, share_attention="first")
    encoder, own, (ids, mask) = noisy(config), noisy(SMALL), batch()
    names = {k for k in encoder.state_dict() if "query_key" in k}
    assert names == {"blocks.0.query_key.weight", "blocks.0.query_key.bias"}
    found = encoder(ids, mask, output_attentions=True)
    own.load_state_dict({**own.state_dict(), **encoder.state_dict()})
    wanted = own(ids, mask, output_attentions=True)
    close(found.attentions[0], wanted.attentions[0])
    close(found.hidden_states[1], wanted.hidden_states[1])
    for attention in found.attentions[1:]:
        assert torch.equal(attention, found.attentions[0])
    block, hidden = encoder.blocks[1], found.hidden_states[1]
    mixed = torch.zeros_like(hidden)
    for head in range(4):
        part = slice(4 * head, 4 * head + 4)
        value = hidden @ block.value.weight[part].T + block.value.bias[part]
        mixed += found.attentions[0][:, head] @ value @ block.output.weight[:, part].T
    attended = hidden + mixed + block.output.bias
    middle = F.layer_norm(attended, (16,), block.norm1.weight, block.norm1.bias, 1e-12)
    close(
        found.hidden_states[2],
        block.norm2(middle + block.down(F.gelu(block.up(middle)))),
    )


def test_deepnorm_scales_residuals_and_start():
    config = dataclasses.replace(SMALL, deepnorm=True)
    alpha, beta = 6**0.25, 24**-0.25
    plain, deep = Encoder(SMALL, generator=seeded(1)), Encoder(config, generator=seeded(1))
    for (name, a), b in zip(plain.named_parameters(), deep.parameters(), strict=True):
        smaller = any(part in name for part in ("value.w", "output.w", "up.w", "down.w"))
        close(b, a * beta if smaller else a, 1e-6)
    encoder = noisy(config)
    output = encoder(batch()[0], output_attentions=True, output_norm_inputs=True)
    block, hidden, given = encoder.blocks[0], output.hidden_states[0], output.norm_inputs[0]
    value = block.value(hidden).unflatten(-1, (4, 4)).transpose(1, 2)
    branch = block.output((output.attentions[0] @ value).transpose(1, 2).flatten(2))
    close(given.attention, alpha * hidden + branch)
    middle = block.norm1(given.attention)
    close(given.feed_forward, alpha * middle + block.down(F.gelu(block.up(middle))))


def test_the_start_has_the_deviations_of_the_configuration():
    config = EncoderConfig(vocab_size=400, max_tokens=300, std=0.1, position_std=0.5)
    encoder = Encoder(config, generator=seeded(3))
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            wanted = 0.5 if name == "position" else 0.1
            assert parameter.std().item() == pytest.approx(wanted, rel=0.1)
            assert abs(parameter.mean().item()) < 0.1 * wanted
    again = Encoder(config, generator=seeded(3))
    assert all(map(torch.equal, encoder.state_dict().values(), again.state_dict().values()))


def test_bad_sizes_are_told():
    with pytest.raises(ValueError, match="a width that the heads divide"):
        EncoderConfig(width=30)
    wrong = EncoderConfig()
    object.__setattr__(wrong, "share_attention", "last")  # else the checker of types comes first
    with pytest.raises(ValueError, match="share_attention must be one of"):
        wrong.__post_init__()
    with pytest.raises(ValueError, match="10 tokens, and only 9 positions"):
        Encoder(SMALL)(torch.zeros(1, 10, dtype=torch.long))
    with pytest.raises(ValueError, match="texts of 3 models for 2"):
        Encoder(SMALL, models=2)(torch.zeros(3, 1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one model"):
        Encoder(SMALL, models=0)
    with pytest.raises(ValueError, match="can be stacked"):
        stack([])
    with pytest.raises(ValueError, match="cannot be unstacked"):
        unstack(Encoder(SMALL))


# ------------------------------------------------------------------------------ several models


@pytest.mark.parametrize("share", ["none", "first"])
@pytest.mark.parametrize("same_texts", [True, False])
def test_several_models_are_each_alone(share, same_texts):
    config = dataclasses.replace(SMALL, share_attention=share)
    singles = [noisy(config, seed) for seed in range(3)]
    several = stack(singles)
    ids, mask = batch()
    if not same_texts:
        ids, mask = torch.stack([ids, ids + 1 - ids // 10, 10 - ids]), mask.expand(3, -1, -1)
    found = several(ids, mask, output_attentions=True, output_norm_inputs=True)
    found.hidden_states[-1].sum(-1).pow(3).sum().backward()
    for index, single in enumerate(singles):
        own, real = (ids, mask) if same_texts else (ids[index], mask[index])
        wanted = single(own, real, output_attentions=True, output_norm_inputs=True)
        for name in ("hidden_states", "attentions"):
            for a, b in zip(getattr(found, name), getattr(wanted, name), strict=True):
                close(a[index], b)
        for pair, other in zip(found.norm_inputs, wanted.norm_inputs, strict=True):
            for a, b in zip(pair, other, strict=True):
                close(a[index], b)
        wanted.hidden_states[-1].sum(-1).pow(3).sum().backward()
        for a, b in zip(several.parameters(), single.parameters(), strict=True):
            close(a.grad[index], b.grad, 1e-8)


def test_training_several_models_is_training_each():
    singles = [noisy(SMALL, seed) for seed in range(3)]
    several = stack(singles)
    optimiser = torch.optim.AdamW(several.parameters(), 1e-2, weight_decay=0.1)
    others = [torch.optim.AdamW(s.parameters(), 1e-2, weight_decay=0.1) for s in singles]
    for step in range(3):
        ids, mask = batch(step)
        several(ids, mask).hidden_states[-1][..., 0].square().sum().backward()
        norms = clip_per_model(several.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        for norm, single, other in zip(norms, singles, others, strict=True):
            single(ids, mask).hidden_states[-1][..., 0].square().sum().backward()
            wanted = torch.nn.utils.clip_grad_norm_(single.parameters(), 1.0)
            close(norm, wanted)
            other.step()
            other.zero_grad()
    for single, found in zip(singles, unstack(several), strict=True):
        for a, b in zip(found.parameters(), single.parameters(), strict=True):
            close(a, b, 1e-9)


def test_clipping_one_model_leaves_the_others():
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    scalar = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([[3.0, 0.0, 0.0], [0.3, 0.0, 0.0]])
    scalar.grad = torch.tensor([4.0, 0.4])
    norms = clip_per_model([weight, scalar, torch.nn.Parameter(torch.zeros(2))], 1.0)
    close(norms, torch.tensor([5.0, 0.5]), 1e-6)
    close(weight.grad[:, 0], torch.tensor([0.6, 0.3]), 1e-6)
    close(scalar.grad, torch.tensor([0.8, 0.4]), 1e-6)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        clip_per_model([torch.nn.Parameter(torch.zeros(2))], 1.0)


# ------------------------------------------------------------------------------- over-smoothing


@pytest.mark.parametrize(
    ("std", "wanted", "tolerance"),
    [
        (0.05, (0.01, 0.02, 0.02, 0.02), 0.03),
        (0.1, (0.01, 0.14, 0.39, 0.73), 0.15),  # eight seeds spread by up to 0.12
        (0.15, (0.01, 0.68, 0.98, 1.0), 0.1),
        (0.2, (0.01, 0.95, 1.0, 1.0), 0.03),
    ],
)
def test_untrained_encoders_smooth_as_measured(std, wanted, tolerance):
    """The similarities of the frozen probe at layers 0, 4, 8 and 12."""
    ids = probe_task(0)[1].ids[:20]
    found = []
    for seed in range(4):
        with torch.no_grad():
            states = Encoder(probe_config(std), generator=seeded(seed))(ids).hidden_states
        for state in states[::4]:
            unit = F.normalize(state, dim=-1)
            found.append(((unit @ unit.mT).sum((1, 2)) - 24).mean() / (24 * 23))
    close(torch.stack(found).view(4, 4).mean(0), torch.tensor(wanted), tolerance)
