"""The towers: sizes, masks, initial values, and what must not change the tokens."""

import functools
import math
from dataclasses import replace

import jaxtyping
import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from filip_vl.model import (
    CONFIGS,
    FilipConfig,
    FilipModel,
    TokenBatch,
    TokenLearner,
    crop_to_longest,
    first_end,
    get_config,
    interpolate_positions,
)
from filip_vl.tokenizers import Encoded
from tenfold.errors import UserError

TINY = replace(CONFIGS["filip_tiny"], image_size=16, vision_width=32, text_width=32, embed_dim=16)
START, END = 25, 26


def tiny(seed: int = 0, **overrides) -> FilipModel:
    """In eval mode, with every parameter random: zero biases and unit norms hide faults."""
    torch.manual_seed(seed)
    model = FilipModel(replace(TINY, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images(count: int = 3, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def captions(*lengths: int, context: int = 24) -> Tensor:
    """Ids of captions of these lengths, start and end included; words may have id 0."""
    ids = torch.zeros(len(lengths), context, dtype=torch.int64)
    generator = torch.Generator().manual_seed(2)
    for row, length in enumerate(lengths):
        ids[row, 0], ids[row, length - 1] = START, END
        ids[row, 1 : length - 1] = torch.randint(0, 25, (length - 2,), generator=generator)
    return ids


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("name", "total", "image", "text"),
    [
        ("filip_base_patch32_224", 150.95e6, 87.65e6, 63.30e6),
        ("filip_base_patch16_224", 149.29e6, None, None),
        ("filip_large_patch14_224", 426.70e6, 303.44e6, 123.26e6),
        ("filip_large_patch14_392", 427.24e6, None, None),
        ("filip_tiny", 222e3, None, None),
        ("clip_tiny", 235e3, None, None),
    ],
)
def test_parameters_of_the_papers_models(name, total, image, text):
    model = on_meta(CONFIGS[name])
    unit = 1e4 if total > 1e6 else 1e3

    def count(module: torch.nn.Module) -> float:
        return round(sum(p.numel() for p in module.parameters()) / unit) * unit

    assert count(model) == pytest.approx(total)
    if image is not None:
        assert count(model.visual) == pytest.approx(image)
        assert count(model) - count(model.visual) == pytest.approx(text)


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("filip_base_patch32_224", 4.41, 2.98),
        ("filip_base_patch16_224", 17.56, None),  # the same text tower
        ("filip_large_patch14_224", 81.0, 6.65),
        ("filip_large_patch14_392", 267.8, None),
    ],
)
def test_multiply_adds_of_the_papers_towers(name, image, text):
    """The paper counts the towers without the projection of their tokens."""
    config = CONFIGS[name]
    pixels = torch.zeros(1, 3, config.image_size, config.image_size, device="meta")
    found = giga_macs(config, config.vision_layers, lambda model: model.encode_image(pixels))
    found -= (config.grid**2 + 1) * config.vision_width * config.embed_dim / 1e9
    assert round(found, 2 if image < 50 else 1) == image
    if text is not None:
        ids = torch.zeros(1, 77, dtype=torch.int64, device="meta")
        found = giga_macs(config, config.text_layers, lambda model: model.encode_text(ids))
        assert round(found - 77 * config.text_width * config.embed_dim / 1e9, 2) == text


def giga_macs(config: FilipConfig, layers: int, call) -> float:
    """Counted for one block and for two: all of a tower are alike."""
    counts = []
    for depth in (1, 2):
        with FlopCounterMode(display=False) as counter:
            call(on_meta(replace(config, vision_layers=depth, text_layers=depth)))
        counts.append(counter.get_total_flops() / 2e9)
    one, two = counts
    return one + (two - one) * (layers - 1)


@functools.cache
def on_meta(config: FilipConfig) -> FilipModel:
    with torch.device("meta"):
        return FilipModel(config)


def test_key_names_and_shapes_are_clips():
    shapes = {key: tuple(value.shape) for key, value in on_meta(FilipConfig()).state_dict().items()}
    expected = {
        "visual.conv1.weight": (768, 3, 32, 32),
        "visual.class_embedding": (768,),
        "visual.positional_embedding": (50, 768),
        "visual.proj": (768, 256),
        "token_embedding.weight": (49408, 512),
        "positional_embedding": (77, 512),
        "text_projection": (512, 256),
        "logit_scale": (),
    }
    for name, width in (("visual.ln_pre", 768), ("visual.ln_post", 768), ("ln_final", 512)):
        expected |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for tower, w in (("visual.transformer", 768), ("transformer", 512)):
        for i in range(12):
            block = f"{tower}.resblocks.{i}"
            expected |= {
                **{f"{block}.ln_{n}.{kind}": (w,) for n in "12" for kind in ("weight", "bias")},
                f"{block}.attn.in_proj_weight": (3 * w, w),
                f"{block}.attn.in_proj_bias": (3 * w,),
                f"{block}.attn.out_proj.weight": (w, w),
                f"{block}.attn.out_proj.bias": (w,),
                f"{block}.mlp.c_fc.weight": (4 * w, w),
                f"{block}.mlp.c_fc.bias": (4 * w,),
                f"{block}.mlp.c_proj.weight": (w, 4 * w),
                f"{block}.mlp.c_proj.bias": (w,),
            }
    assert shapes == expected


def test_initial_values():
    torch.manual_seed(0)
    config = FilipConfig(
        vision_width=128, vision_layers=1, vision_heads=2, patch_size=16, text_width=256,
        text_layers=1, text_heads=4, vocab_size=500, embed_dim=256,
    )  # fmt: skip
    model = FilipModel(config)
    for value, std in (
        (model.token_embedding.weight, 0.02),
        (model.positional_embedding, 0.01),
        (model.text_projection, 256**-0.5),
        (model.visual.positional_embedding, 128**-0.5),
        (model.visual.proj, 128**-0.5),
    ):
        assert value.std().item() == pytest.approx(std, rel=0.03)
    assert model.visual.class_embedding.std().item() == pytest.approx(128**-0.5, rel=0.2)
    for norm in (model.ln_final, model.visual.ln_pre, model.visual.ln_post):
        assert (norm.weight == 1).all()
        assert not norm.bias.any()
    assert model.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
    assert model.scale().item() == pytest.approx(1 / 0.07)


# ----------------------------------------------------------------------------------------- tokens


def test_tokens_of_images():
    model, pixels = tiny(), images()
    batch = model.encode_image(pixels)
    assert batch.tokens.shape == (3, 4, 16)
    assert batch.grid == (2, 2)
    assert batch.mask.all()
    with_class = tiny(include_cls=True).encode_image(pixels)
    torch.testing.assert_close(with_class.tokens[:, 1:], batch.tokens)
    torch.testing.assert_close(with_class.tokens[:, :1], model.image_vectors(pixels).tokens)


def test_patches_are_in_rows():
    """Without attention and positions a token depends on its own patch alone."""
    model, pixels = tiny(), images(1)
    with torch.no_grad():
        model.visual.positional_embedding.zero_()
        for block in model.visual.transformer.resblocks:
            block.attn.out_proj.weight.zero_()
    before = model.encode_image(pixels).tokens
    pixels[..., :8, 8:] = 0  # above, on the right
    changed = (model.encode_image(pixels).tokens != before).any(-1)
    assert changed.tolist() == [[False, True, False, False]]


def test_captions_count_from_start_to_first_end():
    ids = captions(8, 2, 5, 24)
    ids[2, 3] = END  # and another end behind it
    batch = tiny().encode_text(ids)
    assert batch.tokens.shape == (4, 24, 16)
    assert batch.mask.sum(1).tolist() == [8, 2, 4, 24]
    assert batch.mask[0].tolist() == [True] * 8 + [False] * 16
    assert batch.grid is None
    assert batch.strings is None


def test_id_zero_is_a_token():
    """Row 2 of the reference ids has a `!` of id 0 inside a word."""
    ids = torch.tensor([[START, 0, 0, 5, END, 0, 0, 0]])
    assert tiny().encode_text(ids).mask.tolist() == [[True] * 5 + [False] * 3]
    assert first_end(ids, END).tolist() == [4]


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_start_and_end_may_be_masked(bos, eos):
    ids = captions(8, 3)
    plain, batch = tiny().encode_text(ids), tiny(drop_bos=bos, drop_eos=eos).encode_text(ids)
    torch.testing.assert_close(batch.tokens, plain.tokens)
    expected = plain.mask.clone()
    expected[:, 0] &= not bos
    expected[[0, 1], [7, 2]] &= not eos
    assert torch.equal(batch.mask, expected)


@pytest.mark.parametrize("padding", [0, 7, START])
def test_padding_and_cropping_change_no_token(padding):
    model, ids = tiny(), captions(8, 2, 11)
    whole = model.encode_text(ids)
    ids = torch.where(whole.mask, ids, padding)
    cropped = crop_to_longest(ids, END)
    assert cropped.shape == (3, 16)
    assert crop_to_longest(ids, END, multiple=1).shape == (3, 11)
    batch = model.encode_text(cropped)
    assert torch.equal(batch.mask, whole.mask[:, :16])
    torch.testing.assert_close(
        batch.tokens[batch.mask], whole.tokens[whole.mask], rtol=1e-5, atol=1e-6
    )


def test_a_pooled_model_has_one_token_each():
    """CLIP's vectors: the class token, and the first end (not the last)."""
    ids = captions(8, 2, 5)
    ids[2, 9] = END
    tokens, pooled = tiny(include_cls=True), tiny(pooled=True)
    output = pooled(images(), ids)
    torch.testing.assert_close(
        output.image.tokens[:, 0], tokens.encode_image(images()).tokens[:, 0]
    )
    torch.testing.assert_close(
        output.text.tokens[:, 0], tokens.encode_text(ids).tokens[[0, 1, 2], [7, 1, 4]]
    )
    assert output.image.mask.shape == output.text.mask.shape == (3, 1)
    assert output.image.mask.all()
    assert output.text.mask.all()
    # its patches can be looked at all the same
    torch.testing.assert_close(
        pooled.image_tokens(images()).tokens, tokens.encode_image(images()).tokens[:, 1:]
    )


def test_normalised_tokens():
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1e-4, 0.0]]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    expected = torch.tensor([[[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]])
    torch.testing.assert_close(TokenBatch(tokens, mask).normalized(), expected)
    half = TokenBatch(tokens.half(), mask).normalized()  # 1e-12 is 0 in this precision
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=1e-3, atol=1e-3)


def test_gradients_reach_every_parameter():
    model = tiny(learned_tokens=2, proj_bias=True).train()
    output = model(images(), captions(8, 2, 5))
    loss = output.image.normalized().sum() + output.text.normalized()[output.text.mask].sum()
    (loss * output.logit_scale).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    gradient = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing = True
    output = model(images(), captions(8, 2, 5))
    loss = output.image.normalized().sum() + output.text.normalized()[output.text.mask].sum()
    (loss * output.logit_scale).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], gradient)


def test_the_temperature_is_bounded():
    model = tiny()
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    assert model.scale().item() == pytest.approx(100)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    model.scale().backward()
    assert model.logit_scale.grad.item() == pytest.approx(100)  # it can come back
    low = tiny(min_log_scale=3.0, max_log_scale=6.0)
    assert low.scale().item() == pytest.approx(math.exp(3))


def test_attention_of_the_last_block():
    """Its rows are distributions, and with them the block gives what the tower gives."""
    model, pixels = tiny(), images()
    attention = model.visual.last_attention(pixels)
    assert attention.shape == (3, 4, 5, 5)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 4, 5))
    kept: list[Tensor] = []
    last = model.visual.transformer.resblocks[-1]
    last.attn.register_forward_hook(lambda _, args, out: kept.extend((args[0], out)))
    model.visual(pixels)
    x, expected = kept
    values = torch.nn.functional.linear(
        x, last.attn.in_proj_weight[64:], last.attn.in_proj_bias[64:]
    )
    mixed = attention @ values.unflatten(-1, (4, 8)).transpose(1, 2)
    torch.testing.assert_close(last.attn.out_proj(mixed.transpose(1, 2).flatten(2)), expected)


def test_learned_tokens_are_weighted_means():
    torch.manual_seed(0)
    learner = TokenLearner(16, 3).double()
    tokens = torch.randn(2, 5, 16, dtype=torch.float64)
    keys = ["norm.weight", "norm.bias", "attntion_maps.0.weight", "attntion_maps.1.weight"]
    assert list(learner.state_dict()) == [*keys, "feat_conv.weight"]

    def grouped(weight: Tensor, vector: Tensor) -> Tensor:
        return torch.cat([weight[2 * g : 2 * g + 2, :, 0, 0] @ vector[2 * g : 2 * g + 2]
                          for g in range(8)])  # fmt: skip

    first, second = (layer.weight for layer in learner.attntion_maps)
    for tokens_of_image, learned in zip(tokens, learner(tokens), strict=True):
        maps, values = [], []
        for token in tokens_of_image:
            centred = token - token.mean()
            normed = centred / (centred.square().mean() + 1e-7).sqrt()
            maps.append(second[:, :, 0, 0] @ grouped(first, normed))
            values.append(grouped(learner.feat_conv.weight, token))
        weights = torch.stack(maps).exp()
        expected = (weights / weights.sum(0)).T @ torch.stack(values)
        torch.testing.assert_close(learned, expected)


def test_learned_tokens_load_under_the_names_of_mindspore():
    theirs = {
        "norm.gamma": torch.rand(16),
        "norm.beta": torch.rand(16),
        "attntion_maps.0.weight": torch.rand(16, 2, 1, 1),
        "attntion_maps.1.weight": torch.rand(3, 16, 1, 1),
        "feat_conv.weight": torch.rand(16, 2, 1, 1),
    }
    model = tiny(learned_tokens=3)
    others = {key: x for key, x in model.state_dict().items() if "token_learner" not in key}
    model.load_state_dict(others | {f"visual.token_learner.{key}": x for key, x in theirs.items()})
    loaded = model.visual.token_learner.state_dict()
    for found, expected in zip(loaded.values(), theirs.values(), strict=True):
        assert torch.equal(found, expected)


def test_learned_tokens_of_a_model():
    batch = tiny(learned_tokens=3).encode_image(images())
    assert batch.tokens.shape == (3, 3, 16)
    assert batch.grid is None
    with torch.device("meta"):
        wukong = FilipModel(get_config("wukong_large_patch14", vision_layers=1, text_layers=1))
        pixels, ids = torch.zeros(1, 3, 224, 224), torch.zeros(1, 32, dtype=torch.int64)
        output = wukong(pixels, ids)
    assert output.image.tokens.shape == (1, 24, 256)
    assert output.text.tokens.shape == (1, 32, 256)


# ------------------------------------------------------------------------------------ other sizes


def test_other_sizes_interpolate_the_positions():
    model = tiny()
    with pytest.warns(UserWarning, match="a grid of 3x2 patches instead of the trained 2x2"):
        batch = model.encode_image(images(2, 24, 16))
    assert batch.tokens.shape == (2, 6, 16)
    assert batch.grid == (3, 2)
    with pytest.warns(UserWarning, match="3x3"):
        expected = model.encode_image(images(2, 24, 24)).tokens
    model.set_image_size(24)
    assert model.config.image_size == 24
    torch.testing.assert_close(model.encode_image(images(2, 24, 24)).tokens, expected)


@pytest.mark.filterwarnings("error")
def test_the_trained_size_warns_of_nothing():
    tiny().encode_image(images())


@pytest.mark.parametrize("new", [(7, 5), (3, 3), (4, 9)])
def test_interpolated_positions_are_timms(new):
    positions = torch.randn(1 + 25, 8, generator=torch.Generator().manual_seed(0))
    found = interpolate_positions(positions, (5, 5), new)
    expected = resample_abs_pos_embed(positions[None], new, (5, 5), antialias=False)
    torch.testing.assert_close(found[None], expected)
    assert torch.equal(found[0], positions[0])


def test_interpolated_positions_keep_their_precision():
    third = torch.full((1 + 4, 1), 1 / 3, dtype=torch.float64)  # as is any mean of thirds
    assert (interpolate_positions(third, (2, 2), (3, 5)) - 1 / 3).abs().max() < 1e-15


@pytest.mark.parametrize(
    ("height", "width", "nearest"),
    [(18, 16, "16 or 24 and 16"), (16, 31, "16 and 24 or 32"), (5, 16, "8 and 16")],
)
def test_sizes_that_are_no_multiple_of_the_patch(height, width, nearest):
    with pytest.raises(ValueError, match=f"patches of 8: .* are {nearest}$"):
        tiny().encode_image(images(1, height, width))


# --------------------------------------------------------------------------------------- bad input


def test_captions_without_an_end_are_named():
    ids = captions(8, 2, 5, 4)
    ids[1, 1] = ids[3, 3] = 3
    with pytest.raises(ValueError, match=r"without an end token \(id 26\): rows 1, 3$"):
        tiny().encode_text(ids)
    with pytest.raises(ValueError, match="rows 1, 3"):
        crop_to_longest(ids, END)


def test_captions_longer_than_the_context():
    with pytest.raises(ValueError, match="captions of 25 ids are longer than the context of 24"):
        tiny().encode_text(captions(8, context=25))


def test_tokens_that_are_not_finite_are_named():
    model, pixels, ids = tiny(), images(), captions(8, 2, 5)
    pixels[1, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="image tower: 4 of the tokens in row 1"):
        model.encode_image(pixels)
    with torch.no_grad():
        model.token_embedding.weight[3] = math.inf
    ids[0, 1:7], ids[2, 1:4] = 4, 3
    with pytest.raises(FloatingPointError, match=r"text tower: 5 .* row 2 .* \(1 of 3 rows"):
        model.encode_text(ids)
    model.train()
    assert model.encode_image(pixels).tokens.isnan().any()
    model.check_finite = True
    with pytest.raises(FloatingPointError, match="image tower"):
        model.encode_image(pixels)
    model.eval().check_finite = False
    model.encode_image(pixels)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": 50}, "image_size 50 is no multiple of patch_size 8"),
        ({"vision_heads": 3}, "3 heads do not divide"),
        ({"text_layers": 0}, "text_layers must be at least 1"),
        ({"end_id": 27}, "end_id 27 is not one of 27 ids"),
        ({"learned_tokens": 8, "include_cls": True}, "no include_cls"),
        ({"learned_tokens": 8, "embed_dim": 12}, "groups of a TokenLearner do not divide 12"),
        ({"width": 8}, "no such field of a configuration: width"),
    ],
)
def test_configurations_that_cannot_be(overrides, message):
    with pytest.raises(ValueError, match=message):
        FilipModel(get_config("filip_tiny", **overrides))


def test_an_unknown_configuration_and_activation(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match="no configuration is called 'filip_huge': choose filip_b"):
        get_config("filip_huge")
    with pytest.raises(ValueError, match="act must be one of quick_gelu, gelu: 'relu'"):
        FilipConfig.from_dict({"act": "relu"})


# --------------------------------------------------------------------------- captions as they are


class Letters:
    """A tokenizer of letters: an id is a letter's place in the alphabet, from 0."""

    vocab_size, start_id, end_id, pad_id, truncated = 27, START, END, 0, 0

    def clean(self, text):
        return text

    def encode(self, texts, context_length=77):
        ids = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            row_ids = [START, *(ord(c) - ord("a") for c in text[: context_length - 2]), END]
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
        return Encoded(ids, (ids == END).int().argmax(1) + 1)

    def decode(self, ids):
        return "".join(chr(i + ord("a")) for i in ids if i < START)

    def tokens(self, text, context_length=77):
        return ["<", *text[: context_length - 2], ">"]

    def spans(self, text, context_length=77):
        return [None, *((i, i + 1) for i in range(len(text))), None]

    def to_json(self):
        return "{}"


def test_captions_as_strings():
    model = tiny()
    with pytest.raises(ValueError, match="captions need a tokenizer"):
        model.encode_text(["abc"])
    model.tokenizer = Letters()
    batch = model.encode_text(["abc", "a" * 30, ""])
    assert batch.mask.sum(1).tolist() == [5, 24, 2]
    assert [len(strings) for strings in batch.strings] == [5, 24, 2]
    assert batch.strings[0] == ["<", "a", "b", "c", ">"]
    short = model.encode_text(["abc"])
    assert short.tokens.shape == (1, 8, 16)
    torch.testing.assert_close(short.tokens[0, :5], batch.tokens[0, :5])
    model = tiny(pooled=True)
    model.tokenizer = Letters()
    assert model.encode_text(["abc", ""]).tokens.shape == (2, 1, 16)


def test_a_tokenizer_brings_its_vocabulary():
    model = FilipModel.from_config("filip_tiny", tokenizer=Letters())
    assert model.config.vocab_size == 27
    with pytest.raises(UserError, match=r"the tokenizer has 27 ids, the network 28.*declip"):
        FilipModel.from_config("filip_tiny", tokenizer=Letters(), vocab_size=28)
    with pytest.raises(UserError, match="end with id 26 for the tokenizer, with 3 for"):
        tiny(end_id=3).tokenizer = Letters()


# ------------------------------------------------------------------------- other ways of running


def test_bf16_autocast():
    model, pixels, ids = tiny(), images(), captions(8, 2, 5)
    plain = model(pixels, ids)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels, ids)
    for batch, expected in ((output.image, plain.image), (output.text, plain.text)):
        cosine = (batch.normalized() * expected.normalized()).sum(-1)[batch.mask]
        assert cosine.min() > 0.999


def test_one_graph_for_the_compiler(monkeypatch):
    # dynamo cannot trace the checks of shapes that these tests switch on
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    model, pixels, ids = tiny(vision_layers=1, text_layers=1), images(), captions(8, 2, 5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found, expected = compiled(pixels, ids), model(pixels, ids)
    torch.testing.assert_close(found.image.tokens, expected.image.tokens)
    torch.testing.assert_close(found.text.tokens, expected.text.tokens)
    assert torch.equal(found.text.mask, expected.text.mask)
