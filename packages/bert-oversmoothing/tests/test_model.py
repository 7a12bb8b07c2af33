"""Fusion models: equality with the plain ones, where the fused state enters, transformers' ways."""

import copy
import inspect
import json
import logging
import subprocess
import sys
import threading

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from transformers.utils.generic import find_labels

from bert_oversmoothing.capture import capture
from bert_oversmoothing.families import FAMILIES, read_encoder
from bert_oversmoothing.model import (
    BACKBONES,
    TASKS,
    FusionConfig,
    FusionForMaskedLM,
    FusionForMultipleChoice,
    FusionForQuestionAnswering,
    FusionForSequenceClassification,
    FusionForTokenClassification,
    backbone_config,
    build,
    open_fusion,
)
from bert_oversmoothing.model.plain import plain_class
from tenfold.errors import UserError

TEXT_TASKS = ("classification", "choice", "qa", "tokens", "mlm")
IMAGES = {"vit", "deit", "dinov2", "beit"}
KINDS = (
    ("gate", {}),
    ("gate", {"gate_kind": "channel", "norm_each": "none"}),
    ("concat", {"layers": "last:2"}),
    ("max", {"include_embeddings": False}),
    ("scalar_mix", {"norm_each": "none"}),
)
# Of section 4.1: parameters of the encoder with its pooler, and what concat and gate add.
COUNTS = {
    "bert-base": (109_482_240, 7_668_480, 9_997),
    "bert-large": (335_141_888, 26_215_424, 25_625),
    "roberta-base": (124_645_632, 7_668_480, 9_997),
    "albert-base": (11_683_584, 7_668_480, 9_997),
    "electra-small": (13_483_008, 852_224, 3_341),
    "deberta-v3-base": (184_224_768, 7_668_480, 9_997),
    "vit-base": (86_389_248, 7_668_480, 9_997),
    "deit-small": (21_814_272, 1_917_312, 5_005),
}


def shaken(model):
    """With no gain, offset or scale at its default."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def plain_model(tiny, family, task):
    base, batch = tiny(family)
    if task == "choice":
        batch = {
            name: value[:, None].repeat(1, 2, *[1] * (value.ndim - 1))
            for name, value in batch.items()
        }
        batch["input_ids"][:, 1, 1:3] = 7
    return shaken(plain_class(task, base.config)._from_config(base.config)), batch


def fusion_model(tiny, family="bert", task="classification", fusion="gate", **options):
    base, batch = tiny(family)
    return shaken(build(base.config, task, fusion, **options)), batch


def wrapped(plain, task, fusion):
    """An identity around a plain model."""
    config = FusionConfig(backbone=plain.config, fusion=fusion, init="identity")
    return TASKS[task](config, plain).eval()


def answers(output):
    return {name: value for name, value in output.items() if name.endswith("logits")}


def numbers(module):
    return sum(parameter.numel() for parameter in module.parameters())


# -- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_named_encoders_have_the_sizes_of_the_specification(name):
    encoder, concat, gate = COUNTS[name]
    config = backbone_config(name)
    with torch.device("meta"):
        assert numbers(hf.AutoModel.from_config(config)) == encoder
        task = "image" if hasattr(config, "image_size") else "classification"
        assert numbers(build(name, task, "concat").fusion) == concat
        assert numbers(build(name, task, "gate").fusion) == gate
        assert numbers(build(name, task, "gate", gate_shared=True).fusion) == config.hidden_size + 1
        assert numbers(build(name, task, "max").fusion) == 0
        identity = build(name, task, "gate", init="identity")
        assert numbers(identity.fusion) == gate + 1


def test_every_named_encoder_is_in_the_table():
    assert BACKBONES.keys() == COUNTS.keys()


# -- identity ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "task"),
    [
        (family, task)
        for family in [*FAMILIES, "albert-groups", "deberta-v2-conv", "dinov2-swiglu", "beit-plain"]
        for task in (("image",) if family.partition("-")[0] in IMAGES else TEXT_TASKS)
        if family != "clip_vision_model"
    ],
)
def test_an_identity_answers_as_the_plain_model_to_the_bit(tiny, family, task):
    plain, batch = plain_model(tiny, family, task)
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    for grad, kinds in ((False, KINDS), (True, KINDS[:1])):
        with torch.set_grad_enabled(grad):
            expected = answers(plain(**batch))
        assert expected
        for fusion, options in kinds:
            config = FusionConfig(backbone=plain.config, fusion=fusion, init="identity", **options)
            model = TASKS[task](config, plain).eval()
            with torch.set_grad_enabled(grad):
                found = answers(model(**batch))
            assert found.keys() == expected.keys()
            for name in expected:
                assert torch.equal(found[name], expected[name])
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())


def test_deit_with_two_heads_keeps_both(tiny):
    base, batch = tiny("deit")
    config = copy.deepcopy(base.config)
    config.architectures = ["DeiTForImageClassificationWithTeacher"]
    plain = shaken(hf.DeiTForImageClassificationWithTeacher(config))
    model = wrapped(plain, "image", "max")
    with torch.no_grad():
        expected, found = plain(**batch), model(**batch)
    for name in ("logits", "cls_logits", "distillation_logits"):
        assert torch.equal(found[name], expected[name])


def test_clip_classifies_images(tiny):
    vision, batch = tiny("clip_vision_model")
    config = hf.CLIPConfig(vision_config=vision.config.to_dict())
    plain = shaken(hf.CLIPForImageClassification(config))
    model = wrapped(plain, "image", "concat")
    assert model.config.layers == [0, 1, 2, 3]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("name", ["ernie", "gpt2"])
def test_families_outside_the_table_are_fused_too(name):
    config = {
        "ernie": hf.ErnieConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=24,
        ),
        "gpt2": hf.GPT2Config(
            vocab_size=50,
            n_embd=32,
            n_layer=3,
            n_head=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    }[name]
    plain = shaken(plain_class("classification", config)._from_config(config))
    model = wrapped(plain, "classification", "max")
    assert model.encoder.family is None
    ids = torch.randint(3, 50, (3, 9))
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        model.fusion.alpha.fill_(1)
        assert not torch.allclose(model(input_ids=ids).logits, expected)


# -- where the fused state enters --------------------------------------------------------------


def _bert(m, f):
    return m.classifier(torch.tanh(m.bert.pooler.dense(f[:, 0])))


def _albert(m, f):
    return m.classifier(torch.tanh(m.albert.pooler(f[:, 0])))


def _distilbert(m, f):
    return m.classifier(torch.relu(m.pre_classifier(f[:, 0])))


def _electra(m, f):
    return m.classifier.out_proj(F.gelu(m.classifier.dense(f[:, 0])))


def _deberta(m, f):
    return m.classifier(F.gelu(m.pooler.dense(f[:, 0])))


def _modernbert(m, f):
    return m.classifier(m.head.norm(F.gelu(m.head.dense(f[:, 0]))))


def _token(m, f):
    return m.classifier(f[:, 0])


def _beit(m, f):
    return m.classifier(m.beit.pooler.layernorm(f[:, 1:].mean(1)))


def _dinov2(m, f):
    return m.classifier(torch.cat([f[:, 0], f[:, 1:].mean(1)], -1))


HEADS = {
    "bert": _bert,
    "albert": _albert,
    "distilbert": _distilbert,
    "electra": _electra,
    "deberta": _deberta,
    "deberta-v2": _deberta,
    "modernbert": _modernbert,
    "vit": _token,
    "deit": _token,
    "beit": _beit,
    "dinov2": _dinov2,
}


@pytest.mark.parametrize("norm_each", ["auto", "none"])
@pytest.mark.parametrize("family", HEADS)
def test_the_head_reads_the_fused_states(tiny, family, norm_each):
    """The maximum of the captured layers, and the family's head written out."""
    task = "image" if family in IMAGES else "classification"
    model, batch = fusion_model(tiny, family, task, "max", norm_each=norm_each)
    states = []
    with torch.no_grad():
        with capture(model.encoder, lambda _, hidden: states.append(hidden)):
            model.model(**batch)
        norm = model.encoder.final_norm
        if norm is not None and norm_each == "auto":
            states = [norm.module(hidden) for hidden in states]
        fused = torch.stack(states).amax(0)
        if norm is not None and norm_each == "none":
            fused = norm.module(fused)
        expected = HEADS[family](model.model, fused)
        found = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)
    shown = found.fused_state
    if norm is not None and norm_each == "none":
        shown = norm.module(shown)
    torch.testing.assert_close(shown, fused, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "albert", "vit", "modernbert"])
def test_diagnostics_see_the_plain_states_inside_a_fusion(tiny, family):
    task = "image" if family in IMAGES else "classification"
    model, batch = fusion_model(tiny, family, task, "mean")
    assert read_encoder(model).model is model.base_model
    inside, plain, norms = [], [], []
    with torch.no_grad():
        with capture(
            read_encoder(model),
            lambda _, hidden: inside.append(hidden),
            norms=lambda layer, place, *_: norms.append((layer, place)),
        ):
            model(**batch)
        with capture(model.encoder, lambda _, hidden: plain.append(hidden)):
            model.model(**batch)
    assert len(inside) == 4
    assert len({*norms}) == len(norms)
    for x, y in zip(inside, plain, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
@pytest.mark.parametrize(("fusion", "options"), KINDS)
def test_layers_taken_one_by_one_give_what_all_together_give(tiny, family, fusion, options):
    model, batch = fusion_model(tiny, family, "qa", fusion, **options)
    with torch.no_grad():
        streamed = model(**batch)
    together = model(**batch)
    torch.testing.assert_close(streamed.start_logits, together.start_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", ["gate", "max", "concat"])
def test_no_layer_is_kept_without_gradients(tiny, fusion):
    model, batch = fusion_model(tiny, "bert", "qa", fusion)
    seen = []

    def look(module, args, output):
        seen.append(StorageWeakRef(output.untyped_storage()))
        assert all(ref.expired() for ref in seen[:-2])  # the input of the block is alive

    for block in model.base_model.encoder.layer:
        block.register_forward_hook(look)
    with torch.no_grad():
        model(**batch)
    assert len(seen) == 3


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "albert", "deberta-v2", "vit"])
@pytest.mark.parametrize("fusion", ["gate", "max", "concat"])
def test_the_gradient_is_the_slope_of_the_loss(tiny, family, fusion):
    model, batch = fusion_model(tiny, family, "image" if family in IMAGES else "qa", fusion)
    model.double()
    if family in IMAGES:
        batch = {"pixel_values": batch["pixel_values"].double()}
        labels = {"labels": torch.tensor([0, 1, 1])}
    else:
        labels = {
            "start_positions": torch.tensor([1, 2, 0]),
            "end_positions": torch.tensor([4, 3, 1]),
        }
    model(**batch, **labels).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.fusion_parameters())
    way = [torch.randn_like(p) for p in model.parameters()]
    for p, v in zip(model.parameters(), way, strict=True):
        if family not in IMAGES and p is model.get_input_embeddings().weight:
            v[0] = 0  # torch gives the vector of padding no gradient
    slope = sum(
        (p.grad * v).sum()
        for p, v in zip(model.parameters(), way, strict=True)
        if p.grad is not None
    )

    @torch.no_grad()
    def loss_at(step):
        moved = copy.deepcopy(model)
        for p, v in zip(moved.parameters(), way, strict=True):
            p += step * v
        return moved(**batch, **labels).loss

    measured = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    torch.testing.assert_close(slope, measured, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(tiny, reentrant):
    model, batch = fusion_model(tiny, "bert", "classification", "gate")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    labels = torch.tensor([0, 1, 1])
    model(**batch, labels=labels).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model(**batch, labels=labels).loss.backward()
    for p, grad in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-7)


def test_losses_are_those_written_out(tiny):
    model, batch = fusion_model(tiny, "bert", "classification", "gate", num_labels=3)
    labels = torch.tensor([2, 0, 1])
    out = model(**batch, labels=labels)
    expected = -out.logits.log_softmax(-1)[torch.arange(3), labels].mean()
    torch.testing.assert_close(out.loss, expected)

    number, _ = fusion_model(tiny, "bert", "classification", "gate", num_labels=1)
    targets = torch.tensor([0.5, -1.0, 2.0])
    out = number(**batch, labels=targets)
    torch.testing.assert_close(out.loss, (out.logits[:, 0] - targets).square().mean())

    words, _ = fusion_model(tiny, "bert", "mlm", "gate")
    hidden = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    out = words(**batch, labels=hidden)
    expected = F.cross_entropy(out.logits.flatten(0, 1), hidden.flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)


def test_multiple_choice_of_the_first_deberta_by_hand(tiny):
    model, _ = fusion_model(tiny, "deberta", "choice", "max")
    _, batch = plain_model(tiny, "deberta", "choice")
    labels = torch.tensor([1, 0, 1])
    with torch.no_grad():
        out = model(**batch, labels=labels)
        for choice in range(2):
            flat = {name: value[:, choice] for name, value in batch.items()}
            alone = model(**{name: value[:, None] for name, value in flat.items()})
            torch.testing.assert_close(out.logits[:, choice], alone.logits[:, 0])
    assert not torch.allclose(out.logits[:, 0], out.logits[:, 1])
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))


def test_one_step_of_an_optimiser_lowers_the_loss(tiny):
    model, batch = fusion_model(tiny, "bert", "classification", "gate", init="identity")
    groups = model.parameter_groups(lr=1e-3, fusion_lr=1e-2)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    fast = {id(p) for group in groups if group["lr"] == 1e-2 for p in group["params"]}
    assert fast == {id(p) for p in model.fusion_parameters()}
    still = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    named = {id(p): name for name, p in model.named_parameters()}
    assert all(
        name.endswith(("bias", "alpha")) or "Norm" in name
        for key, name in named.items()
        if key in still
    )
    optimiser = torch.optim.AdamW(groups)
    labels = torch.tensor([0, 1, 1])
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimiser.step()
    assert model(**batch, labels=labels).loss < loss


# -- what transformers expects -----------------------------------------------------------------


def test_the_trainer_finds_labels_and_inputs_in_the_signature():
    """It drops columns that forward does not name, and asks find_labels for those of the loss."""
    assert find_labels(FusionForSequenceClassification) == ["labels"]
    assert find_labels(FusionForQuestionAnswering) == ["start_positions", "end_positions"]
    for task, kind in TASKS.items():
        named = inspect.signature(kind.forward).parameters
        assert ("pixel_values" if task == "image" else "input_ids") in named
        assert kind.accepts_loss_kwargs is False  # else it would not average over small batches
    assert "fusion_weights" in FusionConfig.keys_to_ignore_at_inference


def test_a_tuple_is_laid_out_as_that_of_the_plain_model(tiny):
    plain, batch = plain_model(tiny, "bert", "classification")
    model = wrapped(plain, "classification", "gate")
    for labels in (None, torch.tensor([0, 1, 1])):
        expected = plain(**batch, labels=labels, return_dict=False)
        found = model(**batch, labels=labels, return_dict=False)
        assert isinstance(found, tuple)
        assert len(found) == len(expected)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)
    with_weights = model(**batch, return_dict=False, output_fusion_weights=True)
    assert with_weights[1].shape == (3, 9, 4)
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple)


def test_attentions_and_hidden_states_come_on_demand(tiny):
    model, batch = fusion_model(tiny, "bert", "qa", "max")
    model.set_attn_implementation("eager")
    out = model(**batch, output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in out.attentions] == [(3, 4, 9, 9)] * 3
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[-1], out.fused_state)
    assert model(**batch).hidden_states is None
    assert model(**batch).fused_state is None


def test_weights_of_a_gate_add_up_and_vanish_on_padding(tiny):
    model, batch = fusion_model(tiny, "bert", "classification", "gate")
    weights = model(**batch).fusion_weights
    torch.testing.assert_close(weights.sum(-1), batch["attention_mask"].float())
    choice, _ = fusion_model(tiny, "bert", "choice", "gate")
    _, choices = plain_model(tiny, "bert", "choice")
    assert choice(**choices).fusion_weights.shape == (3, 2, 9, 4)
    channel, _ = fusion_model(tiny, "bert", "qa", "gate", gate_kind="channel")
    assert channel(**batch).fusion_weights is None
    assert channel(**batch, output_fusion_weights=True).fusion_weights.shape == (3, 9, 32, 4)


LAYOUT = {
    "concat": ({"fusion.weight": (32, 128), "fusion.bias": (32,)}, {}),
    "gate": ({"fusion.gate.weight": (4, 32), "fusion.gate.bias": (4,)}, {}),
    "shared": ({"fusion.gate.weight": (1, 32), "fusion.gate.bias": (1,)}, {"gate_shared": True}),
    "channel": (
        {"fusion.gate.weight": (4, 32, 32), "fusion.gate.bias": (4, 32)},
        {"gate_kind": "channel"},
    ),
    "scalar_mix": ({"fusion.mix": (4,), "fusion.gamma": ()}, {}),
    "identity": (
        {"fusion.gate.weight": (4, 32), "fusion.gate.bias": (4,), "fusion.alpha": ()},
        {"init": "identity"},
    ),
    "max": ({}, {}),
}


@pytest.mark.parametrize("name", LAYOUT)
def test_the_keys_are_those_of_the_plain_model_and_of_the_fusion(tiny, name):
    expected, options = LAYOUT[name]
    kind = name if name in ("concat", "scalar_mix", "max") else "gate"
    plain, _ = plain_model(tiny, "bert", "qa")
    model, _ = fusion_model(tiny, "bert", "qa", kind, **options)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == expected | {
        f"model.{key}": tuple(value.shape) for key, value in plain.state_dict().items()
    }


@pytest.mark.parametrize(
    ("family", "task", "auto"),
    [
        ("bert", "classification", hf.AutoModelForSequenceClassification),
        ("deberta", "choice", hf.AutoModelForMultipleChoice),
        ("modernbert", "qa", hf.AutoModelForQuestionAnswering),
        ("albert", "tokens", hf.AutoModelForTokenClassification),
        ("vit", "image", hf.AutoModelForImageClassification),
        ("roberta", "mlm", hf.AutoModelForMaskedLM),
    ],
)
@pytest.mark.parametrize(("fusion", "init"), [("gate", "identity"), ("concat", "identity")])
def test_a_saved_model_opens_again_to_the_bit(tiny, tmp_path, family, task, auto, fusion, init):
    labels = {} if task == "qa" else {"num_labels": 3}
    model, _ = fusion_model(tiny, family, task, fusion, init=init, layers="every:2", **labels)
    _, batch = plain_model(tiny, family, task)
    model.save_pretrained(tmp_path)
    assert hf.AutoConfig.from_pretrained(tmp_path).layers == [1, 3]
    for again in (auto.from_pretrained(tmp_path), open_fusion(tmp_path)):
        assert type(again) is TASKS[task]
        assert again.config.backbone.architectures == [type(model.model).__name__]
        assert again.config.num_labels == again.model.config.num_labels == model.config.num_labels
        state = again.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        with torch.no_grad():
            for x, y in zip(
                answers(again(**batch)).values(), answers(model(**batch)).values(), strict=True
            ):
                assert torch.equal(x, y)


def test_the_words_of_a_masked_lm_are_tied(tiny, tmp_path):
    model, batch = fusion_model(tiny, "bert", "mlm", "gate")
    words = model.model.bert.embeddings.word_embeddings.weight
    assert model.get_output_embeddings().weight is words
    assert model.get_input_embeddings().weight is words
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(value.shape == words.shape for value in stored.values()) == 1
    again = FusionForMaskedLM.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    again.resize_token_embeddings(60, mean_resizing=False)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert again.config.backbone.vocab_size == again.config.get_text_config().vocab_size == 60
    assert again(**batch).logits.shape == (3, 9, 60)


def test_a_deep_copy_has_hooks_of_its_own(tiny):
    model, batch = fusion_model(tiny, "vit", "image", "concat")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.fusion.weight.zero_()
        other.base_model.layernorm.weight.zero_()
        expected = other.model.classifier(other.fusion.bias.expand(3, -1))
        torch.testing.assert_close(other(**batch).logits, expected)
        assert not torch.allclose(model(**batch).logits, expected)


def test_threads_do_not_disturb_each_other(tiny):
    model, batch = fusion_model(tiny, "bert", "classification", "gate")
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(3)]

    @torch.no_grad()
    def run(i):
        return model(**rows[i]).logits

    expected, wrong = [run(i) for i in range(3)], []

    def serve(i):
        wrong.extend(i for _ in range(10) if not torch.equal(run(i), expected[i]))

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_autocast_and_half_precision(tiny):
    model, batch = fusion_model(tiny, "bert", "classification", "gate")
    with torch.no_grad():
        exact = model(**batch).logits
        with torch.autocast("cpu", torch.bfloat16):
            close = model(**batch).logits
    torch.testing.assert_close(close.float(), exact, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch, labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.fusion_parameters())
    half, _ = plain_model(tiny, "bert", "qa")
    half.bfloat16()
    identity = wrapped(half, "qa", "concat").bfloat16()
    with torch.no_grad():
        assert torch.equal(identity(**batch).start_logits, half(**batch).start_logits)


TRACED = """
import torch, transformers as hf
from bert_oversmoothing.model import build

config = hf.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                       intermediate_size=48, max_position_embeddings=24)
ids = torch.randint(1, 50, (3, 9))
for grad, fusion in ((False, "gate"), (True, "max")):
    torch.compiler.reset()
    model = build(config, "qa", fusion).eval()
    with torch.set_grad_enabled(grad):
        plain = model(ids).start_logits
        traced = torch.compile(model, fullgraph=True, backend="eager")(ids).start_logits
    torch.testing.assert_close(traced, plain)
"""


@pytest.mark.slow
def test_a_compiler_traces_the_model_without_a_break():
    """In a process of its own: the checks of shapes, which only the tests have, are no graph."""
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- starting from an encoder ------------------------------------------------------------------


@pytest.fixture
def stored(tiny, tmp_path):
    base, batch = tiny("bert")
    base.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder", base, batch


def test_a_stored_encoder_starts_as_the_identity(stored, caplog):
    folder, base, batch = stored
    with caplog.at_level(logging.WARNING):
        model = FusionForTokenClassification.from_encoder(folder, "gate", num_labels=5)
    assert "classifier.bias, classifier.weight" in caplog.text
    assert model.config.init == "identity"
    assert not model.training
    for name, value in model.base_model.state_dict().items():
        assert torch.equal(value, base.state_dict()[name])
    with torch.no_grad():
        expected = model.model.classifier(base(**batch).last_hidden_state)
        assert torch.equal(model(**batch).logits, expected)


def test_an_untrained_encoder_starts_at_random_and_identity_warns(tiny):
    plain, _ = plain_model(tiny, "bert", "qa")
    assert FusionForQuestionAnswering.from_encoder(plain).config.init == "random"
    with pytest.warns(UserWarning, match="untrained encoder"):
        FusionForQuestionAnswering.from_encoder(plain, init="identity")


def test_another_model_gives_the_weights_of_its_encoder(tiny):
    base, batch = tiny("distilbert")
    model = FusionForSequenceClassification.from_encoder(base, "max", num_labels=4)
    assert model(**batch).logits.shape == (3, 4)
    weights = model.model.distilbert.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    assert base.config.num_labels == 2
    plain, _ = plain_model(tiny, "distilbert", "classification")
    assert FusionForSequenceClassification.from_encoder(plain).model is plain


def test_names_of_labels_go_along(tiny, tmp_path):
    plain, _ = plain_model(tiny, "bert", "classification")
    names = {0: "no", 1: "perhaps", 2: "yes"}
    plain.config.id2label, plain.config.label2id = names, {v: k for k, v in names.items()}
    plain.classifier = torch.nn.Linear(32, 3)
    plain.save_pretrained(tmp_path / "plain")
    model = FusionForSequenceClassification.from_encoder(tmp_path / "plain")
    assert model.config.id2label == model.model.config.id2label == names
    model.save_pretrained(tmp_path / "fusion")
    assert open_fusion(tmp_path / "fusion").config.id2label == names
    # Three classes say nothing of questions, which have two ends.
    qa = FusionForQuestionAnswering.from_encoder(tmp_path / "plain")
    assert qa.model.qa_outputs.out_features == qa.config.num_labels == 2


def test_fields_of_the_encoder_can_be_set(stored):
    folder, *_ = stored
    model = FusionForQuestionAnswering.from_encoder(folder, config={"hidden_dropout_prob": 0.3})
    assert model.base_model.encoder.layer[0].output.dropout.p == 0.3
    eager = FusionForQuestionAnswering.from_encoder(folder, attn_implementation="eager")
    assert eager.base_model.config._attn_implementation == "eager"
    half = FusionForQuestionAnswering.from_encoder(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, 4]}, "no such layers: 4"),
        ({"layers": [1, 1, 3]}, "layers given twice: 1"),
        ({"layers": [0, 1]}, "init identity starts as layer 3"),
        ({"layers": "every:9"}, "out of range"),
        ({"norm_each": "some"}, "unknown norm_each"),
        ({"init": "zero"}, "unknown init"),
        ({"fusion": "sum"}, "unknown fusion"),
        ({"fusion": "best_layer(7)"}, "not among the layers"),
        ({"gate_kind": "hard"}, "unknown gate_kind"),
        ({"num_labels": 3}, "questions have two labels"),
    ],
)
def test_wrong_layers_are_told_before_weights_are_read(stored, options, message):
    folder, *_ = stored
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=message):
        FusionForQuestionAnswering.from_encoder(folder, **options)


def test_unknown_fusions_gates_tasks_and_encoders_are_told(tiny):
    base, _ = tiny("bert")
    for options, message in (
        ({"fusion": "sum"}, "unknown fusion"),
        ({"gate_kind": "hard"}, "unknown gate_kind"),
        ({"task": "speech"}, "unknown task"),
        ({"task": "image"}, "bert has no head for the task image"),
    ):
        with pytest.raises(UserError, match=message):
            build(base.config, **options)
    with pytest.raises(UserError, match="no such encoder"):
        build("bert-huge")
    with pytest.raises(UserError, match="no configuration of an encoder"):
        build({"model_type": "nonsense"})
    assert build(
        {
            "model_type": "bert",
            "num_hidden_layers": 1,
            "vocab_size": 9,
            "hidden_size": 8,
            "num_attention_heads": 2,
        }
    ).config.layers == [0, 1]


def test_a_head_of_another_size_is_refused_unless_asked_for(tiny, tmp_path):
    plain, _ = plain_model(tiny, "bert", "classification")
    plain.save_pretrained(tmp_path / "plain")
    kind = FusionForSequenceClassification
    with pytest.raises(UserError, match=r"classifier\S* is \[2.*asked for is \[5"):
        kind.from_encoder(tmp_path / "plain", num_labels=5)
    model = kind.from_encoder(tmp_path / "plain", num_labels=5, ignore_mismatched_sizes=True)
    assert model.model.classifier.out_features == 5
    model.save_pretrained(tmp_path / "fusion")
    with pytest.raises(UserError, match=r"is \[5.*asked for is \[3"):
        kind.from_pretrained(tmp_path / "fusion", num_labels=3)
    again = kind.from_pretrained(tmp_path / "fusion", num_labels=3, ignore_mismatched_sizes=True)
    assert again.config.num_labels == again.model.classifier.out_features == 3
    assert torch.equal(again.fusion.gate.weight, model.fusion.gate.weight)


def test_folders_that_are_none_and_damaged_ones_are_told(stored, tmp_path):
    folder, *_ = stored
    kind = FusionForQuestionAnswering
    for opening in (kind.from_encoder, kind.from_pretrained):
        with pytest.raises(UserError, match="no such model folder"):
            opening(tmp_path / "nothing")
        with pytest.raises(UserError, match="a file, no model folder"):
            opening(folder / "config.json")
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"config\.json is missing"):
            opening(tmp_path / "empty")
    weights = {key: v.clone() for key, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="weights cannot be read"):
        kind.from_encoder(folder)
    lost = "encoder.layer.1.output.dense.weight"
    save_file(
        {key: value for key, value in weights.items() if key != lost},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="1 weights of the blocks are missing"):
        kind.from_encoder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="no model there"):
        kind.from_encoder(folder)


def test_stored_fusions_tell_what_does_not_fit(tiny, tmp_path):
    model, _ = fusion_model(tiny, "bert", "qa", "gate")
    model.save_pretrained(tmp_path)
    kind = FusionForQuestionAnswering
    with pytest.raises(UserError, match=r"of K = 4 layers \(0, 1, 2, 3\), not of K = 2 layers"):
        kind.from_pretrained(tmp_path, layers="last:2")
    with pytest.raises(UserError, match="has fusion gate, not max"):
        kind.from_pretrained(tmp_path, fusion="max")
    with pytest.raises(UserError, match="for the task qa, not tokens"):
        FusionForTokenClassification.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="a fusion model already"):
        kind.from_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"layers": [2, 3]}, r"fusion\.gate\.\w+ is \[4.*asks for \[2"),
        ({"init": "identity"}, r"1 missing \(fusion\.alpha\)"),
        ({"fusion": "max"}, "2 left over"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            kind.from_pretrained(tmp_path)


def test_a_plain_folder_is_no_fusion_model(stored):
    folder, *_ = stored
    with pytest.raises(UserError, match=r"a plain bert.*FusionForMultipleChoice\.from_encoder"):
        FusionForMultipleChoice.from_pretrained(folder)
    with pytest.raises(UserError, match="a plain bert"):
        open_fusion(folder)


CODE = """
import transformers as hf

class MineConfig(hf.BertConfig):
    model_type = "mine"

class MineForQuestionAnswering(hf.BertForQuestionAnswering):
    config_class = MineConfig
"""


def test_code_that_comes_with_an_encoder_is_run_on_demand_only(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    plain, batch = plain_model(tiny, "bert", "qa")
    folder = tmp_path / "remote"
    plain.save_pretrained(folder)
    (folder / "mine.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {
        "AutoConfig": "mine.MineConfig",
        "AutoModelForQuestionAnswering": "mine.MineForQuestionAnswering",
    }
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "mine", "auto_map": classes})
    )
    with pytest.raises(UserError, match="mine needs code that comes with it"):
        FusionForQuestionAnswering.from_encoder(folder)
    model = FusionForQuestionAnswering.from_encoder(folder, trust_remote_code=True)
    assert type(model.model).__name__ == "MineForQuestionAnswering"
    with torch.no_grad():
        assert torch.equal(model(**batch).start_logits, plain(**batch).start_logits)


def test_numbers_that_are_none_name_their_layer(tiny):
    model, batch = fusion_model(tiny, "bert", "qa", "max")
    with torch.no_grad():
        model.base_model.encoder.layer[1].output.LayerNorm.bias[3] = float("nan")
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(UserError, match="layer 2 holds NaN"):
            model(**batch)
    with torch.no_grad():  # the pass that broke off leaves nothing behind
        model.base_model.encoder.layer[1].output.LayerNorm.bias[3] = 0
        model(**batch)
