import pytest
import torch
import transformers as hf
from torch import nn

from bert_oversmoothing.families import FAMILIES, read_encoder
from tenfold.errors import UserError

POST = {
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "electra",
    "deberta",
    "deberta-v2",
    "albert",
    "distilbert",
    "mpnet",
}
VARIANTS = ("albert-groups", "deberta-v2-conv", "dinov2-swiglu", "beit-plain")


def calls(model, modules, batch):
    """The (inputs, output) of each call of the modules in one forward pass."""
    seen = {module: [] for module in modules}
    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, output: seen[module].append(
                (args[0] if args else kwargs["hidden_states"], output)
            ),
            with_kwargs=True,
        )
        for module in seen
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def last(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_the_table_is_read(tiny, family):
    model, _ = tiny(family)
    encoder = read_encoder(model)
    assert encoder.family == family
    assert encoder.order == ("post" if family in POST else "pre")
    assert (len(encoder.blocks), encoder.width, encoder.heads) == (3, 32, 4)
    assert encoder.d_ff == (128 if family == "dinov2" else 48)
    assert all(len(block.norms) == 2 for block in encoder.blocks)
    assert (encoder.final_norm is not None) == (family in {"modernbert", "vit", "deit", "dinov2"})
    assert encoder.gated == (family == "modernbert")
    assert (encoder.unbounded(1) is None) == (family != "modernbert")
    assert not encoder.causal
    notes = [note.removeprefix(f"{family}: ") for note in encoder.notes]
    expected = ["the last layer is taken before the final norm"] if encoder.final_norm else []
    assert notes == (["blocks share their weights"] if family == "albert" else expected)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_values_and_outputs_per_head_rebuild_the_attention(tiny, family):
    model, batch = tiny(family, "eager")
    model = model.double()
    if "pixel_values" in batch:
        batch = {"pixel_values": batch["pixel_values"].double()}
    encoder = read_encoder(model)
    block, weights = encoder.blocks[0], encoder.tensors(0)
    out = block.module.get_submodule(encoder.layout.output)
    value = block.module.get_submodule(encoder.layout.value)
    with torch.no_grad():
        hooked = calls(model, [block.attention, out], batch)
        attention = model(**batch, output_attentions=True).attentions[0]
    hidden, projected = hooked[block.attention][0][0], hooked[out][0][1]
    # sum_k A_k H W_k^V W_k^O.
    expected = sum(
        attention[:, k] @ hidden @ weights.value_hkd[k].mT @ weights.output_hdk[k].mT
        for k in range(4)
    )
    # Rows of A_k sum to 1 and so pass the values' offset on: the same row for every token.
    bias = getattr(block.attention, "v_bias", value.bias)
    if bias is not None:
        expected = expected + out.weight @ bias
    if out.bias is not None:
        expected = expected + out.bias
    # Several families take the softmax in float32 whatever the model's precision.
    torch.testing.assert_close(projected, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_norms_gains_and_scales_rebuild_the_block(tiny, family):
    """The block from its norms' inputs: what the theorem's chain takes for granted."""
    model, batch = tiny(family)
    encoder = read_encoder(model)
    block, weights = encoder.blocks[-1], encoder.tensors(len(encoder.blocks) - 1)
    first, second = block.norms
    for norm, gain in ((first, weights.gamma1_d), (second, weights.gamma2_d)):
        x = torch.randn(2, 5, 32)
        beta = getattr(norm.module, "bias", None)
        centred = (x - x.mean(-1, keepdim=True)) / norm.sigma(x)[..., None]
        by_hand = gain * centred + (0 if beta is None else beta)
        torch.testing.assert_close(norm.module(x), by_hand, atol=1e-5, rtol=1e-4)
    seen = calls(model, {first.module, second.module, block.module}, batch)
    hidden, output = (last(x) for x in seen[block.module][-1])
    (before1, after1), (before2, after2) = (seen[norm.module][-1] for norm in (first, second))
    ones = torch.ones(32)
    scale1, scale2 = (
        ones if scale is None else scale for scale in (weights.scale1_d, weights.scale2_d)
    )
    with torch.no_grad():
        if encoder.order == "post":
            torch.testing.assert_close(output, after2)
        else:
            torch.testing.assert_close(before1, hidden)
            feed_forward = block.module.mlp(after2)
            torch.testing.assert_close(output, before2 + scale2 * feed_forward)
            # The attention's branch, from the output projection's own result.
            out = block.module.get_submodule(encoder.layout.output)
            branch = calls(model, [out], batch)[out][-1][1]
            torch.testing.assert_close(before2, hidden + scale1 * branch)
    if weights.up_fd is not None:
        with torch.no_grad():
            up, down = (
                block.module.get_submodule(path)
                for path in (encoder.layout.up, encoder.layout.down)
            )
            act = hf.activations.ACT2FN[encoder.activation]
            x = after2 if encoder.order == "pre" else after1
            inner = act(x @ weights.up_fd.mT + up.bias)
            result = inner @ weights.down_df.mT + down.bias
            if encoder.order == "pre":
                torch.testing.assert_close(output, before2 + scale2 * result)
            else:
                torch.testing.assert_close(before2, after1 + result)


def test_layer_scale_is_read_where_there_is_one(tiny):
    scaled = tiny("beit")[0]
    weights = read_encoder(scaled).tensors(2)
    assert torch.equal(weights.scale1_d, scaled.layers[2].lambda_1)
    assert torch.equal(weights.scale2_d, scaled.layers[2].lambda_2)
    plain = read_encoder(tiny("beit-plain")[0]).tensors(2)
    assert plain.scale1_d is None
    assert plain.scale2_d is None


def test_albert_names_its_inner_layers_in_the_order_of_their_calls(tiny):
    model, _ = tiny("albert-groups")
    groups = model.encoder.albert_layer_groups
    names = [groups[g].albert_layers[j] for g in (0, 0, 1, 1) for j in (0, 1)]
    assert [block.module for block in read_encoder(model).blocks] == names


def test_a_bound_is_refused_with_its_reason(tiny):
    conv = read_encoder(tiny("deberta-v2-conv")[0])
    assert conv.unbounded(0) == "a convolution follows the block"
    assert conv.unbounded(1) is None
    assert len(conv.blocks[0].norms) == 3
    assert "gated" in read_encoder(tiny("dinov2-swiglu")[0]).unbounded(0)
    heads = tiny("deberta")[0]
    heads.config.talking_head = True
    assert "talking heads" in read_encoder(heads).unbounded(0)


def test_a_task_head_is_looked_through():
    config = hf.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = hf.BertForSequenceClassification(config)
    assert read_encoder(model).model is model.bert


def test_clip_is_read_on_its_vision_side():
    side = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    model = hf.CLIPModel(
        hf.CLIPConfig(
            text_config={**side, "vocab_size": 50},
            vision_config={**side, "image_size": 16, "patch_size": 8},
        )
    )
    encoder = read_encoder(model)
    assert (encoder.family, encoder.model) == ("clip_vision_model", model.vision_model)


def test_a_decoder_is_noted(tiny):
    encoder = read_encoder(tiny("bert-decoder")[0])
    assert encoder.causal
    assert any(note.startswith("decoder") for note in encoder.notes)


def test_of_an_encoder_decoder_the_encoder_is_read_and_its_norms_found():
    config = hf.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
    )
    model = hf.T5Model(config)
    encoder = read_encoder(model)
    assert encoder.model is model.encoder
    assert encoder.family is None
    assert [block.module for block in encoder.blocks] == list(model.encoder.block)
    norms = encoder.blocks[0].norms
    assert len(norms) == 2
    assert not any(norm.centred for norm in norms)
    x = torch.randn(2, 3, 16)
    by_hand = x / norms[0].sigma(x)[..., None] * norms[0].module.weight
    torch.testing.assert_close(norms[0].module(x), by_hand)
    with pytest.raises(UserError, match="unknown family"):
        encoder.tensors(0)
    assert encoder.unbounded(0) == "unknown family"
    assert any(note.startswith("encoder-decoder") for note in encoder.notes)


def test_an_unknown_family_keeps_its_norms_and_blocks():
    config = hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    model = hf.GPT2Model(config)
    encoder = read_encoder(model)
    assert encoder.family is None
    assert encoder.causal
    assert [norm.module for norm in encoder.blocks[1].norms] == [model.h[1].ln_1, model.h[1].ln_2]
    assert all(norm.centred for norm in encoder.blocks[1].norms)


def test_another_layout_of_a_known_family_is_an_unknown_one(tiny):
    model, _ = tiny("vit")
    model.layers[1].mlp.fully_connected = model.layers[1].mlp.fc1
    del model.layers[1].mlp.fc1
    encoder = read_encoder(model)
    assert encoder.family is None
    assert any("laid out differently" in note for note in encoder.notes)
    assert len(encoder.blocks) == 3


def test_a_model_without_blocks_is_refused():
    class Plain(hf.PreTrainedModel):
        config_class = hf.BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.linear = nn.Linear(2, 2)

    with pytest.raises(UserError, match="no sequence of blocks"):
        read_encoder(Plain(hf.BertConfig(model_type="plain")))
