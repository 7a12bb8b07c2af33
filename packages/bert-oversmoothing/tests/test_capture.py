import pytest
import torch
import transformers as hf
from torch.multiprocessing.reductions import StorageWeakRef

from bert_oversmoothing.capture import attention_map, capture
from bert_oversmoothing.families import FAMILIES, read_encoder
from tenfold.errors import UserError

VARIANTS = ("albert-groups", "deberta-v2-conv", "dinov2-swiglu", "beit-plain", "bert-decoder")
IMAGES = {"vit", "deit", "dinov2", "beit", "clip_vision_model"}
ALWAYS_EAGER = {"deberta", "deberta-v2", "deberta-v2-conv", "mpnet"}


def captured(model, batch, **options):
    """Every state, norm input and map of one forward pass, in the order they came."""
    states, norms, maps = [], [], []
    wanted = {"norms": lambda *seen: norms.append(seen)} if options.pop("norms", False) else {}
    if "attention" in options:
        wanted["maps"] = lambda *seen: maps.append(seen)
    encoder = read_encoder(model)
    with torch.no_grad(), capture(encoder, lambda *seen: states.append(seen), **wanted, **options):
        model(**batch)
    return states, norms, maps


def tokens(states):
    return [state for _, state in states]


def hook_count(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_states_are_those_of_transformers_where_the_table_says_so(tiny, family):
    model, batch = tiny(family)
    with torch.no_grad():
        theirs = model(**batch, output_hidden_states=True)
    states, _, _ = captured(model, batch)
    depth = len(read_encoder(model).blocks)
    assert [layer for layer, _ in states] == list(range(depth + 1))
    assert len(theirs.hidden_states) == depth + 1
    for ours, their in zip(tokens(states)[:-1], theirs.hidden_states[:-1], strict=True):
        assert torch.equal(ours, their)
    last = states[-1][1]
    with torch.no_grad():
        if family == "modernbert":
            assert not torch.allclose(last, theirs.hidden_states[-1])
            assert torch.equal(model.final_norm(last), theirs.hidden_states[-1])
            assert torch.equal(theirs.hidden_states[-1], theirs.last_hidden_state)
            return
        assert torch.equal(last, theirs.hidden_states[-1])
        if family in {"vit", "deit", "dinov2", "dinov2-swiglu", "beit-plain"}:
            assert not torch.allclose(last, theirs.last_hidden_state)
            assert torch.equal(model.layernorm(last), theirs.last_hidden_state)
        else:
            assert torch.equal(last, theirs.last_hidden_state)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ALWAYS_EAGER])
def test_sdpa_and_eager_give_the_same_states(tiny, family):
    fast, batch = tiny(family)
    slow, _ = tiny(family, "eager")
    assert fast.config._attn_implementation == "sdpa"
    mask = batch.get("attention_mask", torch.ones(3, 10)).bool()
    for ours, theirs in zip(
        tokens(captured(fast, batch)[0]), tokens(captured(slow, batch)[0]), strict=True
    ):
        if family not in IMAGES:
            ours, theirs = ours[mask], theirs[mask]
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in IMAGES] + ["deberta-v2-conv"])
def test_padding_changes_no_state_of_a_real_token(tiny, family):
    model, batch = tiny(family)
    together = tokens(captured(model, batch)[0])
    for row, n in enumerate((9, 6, 3)):
        alone = {key: value[row : row + 1, :n] for key, value in batch.items()}
        for padded, plain in zip(together, tokens(captured(model, alone)[0]), strict=True):
            torch.testing.assert_close(padded[row, :n], plain[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
@pytest.mark.parametrize("attention", ["eager", "recompute"])
def test_maps_are_those_of_transformers(tiny, family, attention):
    model, batch = tiny(family)
    reference, _ = tiny(family, "eager")
    with torch.no_grad():
        theirs = reference(**batch, output_attentions=True).attentions
    _, _, maps = captured(model, batch, attention=attention)
    assert [layer for layer, _ in maps] == list(range(1, len(read_encoder(model).blocks) + 1))
    mask = batch.get("attention_mask", torch.ones(3, maps[0][1].shape[-1])).bool()
    for (_, ours), their in zip(maps, theirs, strict=True):
        torch.testing.assert_close(ours.sum(-1), torch.ones(ours.shape[:-1]))
        rows, their_rows = (x.transpose(1, 2)[mask] for x in (ours, their))
        torch.testing.assert_close(rows, their_rows, atol=1e-5, rtol=1e-4)
        hidden_keys = ~mask[:, None, None, :] & mask[:, None, :, None]
        assert ours.masked_select(hidden_keys).abs().sum() == 0


def test_recomputed_maps_of_a_decoder_without_padding_are_causal(tiny):
    """SDPA gets no mask here, but the module's flag."""
    model, batch = tiny("bert-decoder")
    ids = {"input_ids": batch["input_ids"][:1]}
    _, _, maps = captured(model, ids, attention="recompute")
    _, _, eager = captured(model, ids, attention="eager")
    for (_, ours), (_, theirs) in zip(maps, eager, strict=True):
        assert torch.equal(ours, ours.tril())
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_every_norm_is_seen_once_in_its_place(tiny, family):
    model, batch = tiny(family)
    encoder = read_encoder(model)
    states, norms, _ = captured(model, batch, norms=True)
    places = [
        (layer, place)
        for layer, block in enumerate(encoder.blocks, 1)
        for place, norm in enumerate(block.norms)
        if norm is not None
    ]
    if encoder.final_norm is not None:
        places.append((len(encoder.blocks), 2))
    assert [seen[:2] for seen in norms] == places
    hidden = dict(states)
    for layer, place, before, after in norms:
        norm = (*encoder.blocks[layer - 1].norms, encoder.final_norm)[place]
        assert norm is not None
        with torch.no_grad():
            assert torch.equal(norm.module(before), after)
        if encoder.order == "pre" and place == 0:
            assert torch.equal(before, hidden[layer - 1])
        if place == 2 and encoder.order == "pre":
            assert torch.equal(before, hidden[layer])
        if encoder.order == "post" and place == len(encoder.blocks[layer - 1].norms) - 1:
            mask = batch["attention_mask"].bool()
            assert torch.equal(after[mask], hidden[layer][mask])


def test_layers_are_counted_from_the_start_in_every_pass(tiny):
    model, batch = tiny("albert")
    seen = []
    encoder = read_encoder(model)
    with torch.no_grad(), capture(encoder, lambda layer, _: seen.append(layer)):
        model(**batch)
        model(**batch)
    assert seen == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet", "modernbert", "vit", "dinov2"])
def test_one_layer_is_alive_at_a_time(tiny, family):
    """When layer l comes, the states before its own input have been freed."""
    model, batch = tiny(family)
    storages = {}

    def consume(layer, hidden):
        storages[layer] = StorageWeakRef(hidden.untyped_storage())
        # The model itself holds on to the embeddings, layer 0.
        assert all(ref.expired() for seen, ref in storages.items() if 0 < seen < layer - 1)

    with torch.no_grad(), capture(read_encoder(model), consume):
        model(**batch)
    assert len(storages) == 4


def test_states_carry_no_graph(tiny):
    model, batch = tiny("bert")
    seen = []
    with capture(
        read_encoder(model),
        lambda _, hidden: seen.append(hidden),
        norms=lambda *args: seen.extend(args[2:]),
        maps=lambda _, attention: seen.append(attention),
    ):
        model(**batch)
    assert not any(tensor.requires_grad for tensor in seen)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "albert"])
@pytest.mark.parametrize("attention", ["eager", "recompute"])
def test_the_model_is_left_as_it_was(tiny, family, attention):
    model, batch = tiny(family)
    model.train()
    model.embeddings.eval()
    before = {name: module.training for name, module in model.named_modules()}
    implementation = model.config._attn_implementation

    def fail(layer, hidden):
        assert not any(module.training for module in model.modules())
        if layer == 2:
            raise KeyError

    def nothing(*args):
        pass

    with (
        pytest.raises(KeyError),
        capture(read_encoder(model), fail, norms=nothing, maps=nothing, attention=attention),
    ):
        model(**batch)
    assert hook_count(model) == 0
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == implementation


def test_a_pass_that_broke_off_does_not_shift_the_next(tiny):
    model, batch = tiny("bert")
    seen = []

    def consume(layer, hidden):
        seen.append(layer)
        if len(seen) == 3:
            raise KeyError

    with torch.no_grad(), capture(read_encoder(model), consume):
        with pytest.raises(KeyError):
            model(**batch)
        model(**batch)
    assert seen == [0, 1, 2, 0, 1, 2, 3]


def test_a_task_head_does_not_disturb(tiny):
    base, batch = tiny("bert")
    model = hf.BertForSequenceClassification(base.config).eval()
    model.bert.load_state_dict(base.state_dict(), strict=False)
    ours, theirs = captured(model, batch)[0], captured(base, batch)[0]
    for x, y in zip(tokens(ours), tokens(theirs), strict=True):
        assert torch.equal(x, y)


def test_an_encoder_that_changes_shape_is_refused():
    config = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
    )
    model = hf.SwinModel(config).eval()
    with pytest.raises(UserError, match="states change shape at layer 1"):
        captured(model, {"pixel_values": torch.randn(1, 3, 16, 16)})
    assert hook_count(model) == 0


def gpt2():
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    return hf.GPT2Model(config).eval(), {"input_ids": torch.randint(0, 50, (2, 6))}


def test_states_and_maps_of_an_unknown_decoder():
    model, batch = gpt2()
    states, norms, maps = captured(model, batch, norms=True, attention="eager")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(**batch, output_hidden_states=True, output_attentions=True)
    for x, y in zip(tokens(states)[:-1], theirs.hidden_states[:-1], strict=True):
        torch.testing.assert_close(x, y)
    with torch.no_grad():
        torch.testing.assert_close(model.ln_f(states[-1][1]), theirs.last_hidden_state)
    for (_, x), y in zip(maps, theirs.attentions, strict=True):
        torch.testing.assert_close(x, y)
    assert [seen[:2] for seen in norms] == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_states_and_maps_of_an_encoder_decoder_are_its_encoders():
    torch.manual_seed(0)
    model = hf.T5Model(
        hf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).eval()
    ids = torch.randint(3, 50, (2, 6))
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :2]}
    states, _, maps = captured(model, batch, attention="eager")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model.encoder(ids, output_hidden_states=True, output_attentions=True)
    for x, y in zip(tokens(states)[:-1], theirs.hidden_states[:-1], strict=True):
        torch.testing.assert_close(x, y)
    for (_, x), y in zip(maps, theirs.attentions, strict=True):
        torch.testing.assert_close(x, y)


def test_maps_of_an_unknown_family_are_not_recomputed():
    model, batch = gpt2()
    with pytest.raises(UserError, match="attention maps unavailable"):
        captured(model, batch, attention="recompute")
    assert hook_count(model) == 0


def test_blocks_that_do_not_all_run_are_an_error(tiny):
    model, batch = tiny("bert")
    encoder = read_encoder(model)
    del model.encoder.layer[2]
    with (
        torch.no_grad(),
        pytest.raises(UserError, match="2 blocks ran of 3"),
        capture(encoder, lambda *seen: None),
    ):
        model(**batch)


def test_a_map_by_hand():
    q, k = torch.randn(2, 1, 2, 5, 3, dtype=torch.float64)
    mask = torch.arange(5) < 4
    expected = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    for head in range(2):
        for i in range(5):
            row = [float(torch.dot(q[0, head, i], k[0, head, j])) / 3**0.5 for j in range(4)]
            weights = torch.tensor(row, dtype=torch.float64).exp()
            expected[0, head, i, :4] = weights / weights.sum()
    torch.testing.assert_close(attention_map(q, k, mask[None, None, None]), expected)
    added = torch.zeros(5, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attention_map(q, k, added[None, None, None]), expected)
    with pytest.raises(UserError, match="cannot be recomputed"):
        attention_map(q, k, mask[None])
