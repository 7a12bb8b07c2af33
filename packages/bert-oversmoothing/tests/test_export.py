"""Files for use elsewhere: equality on sizes that were not traced, and the folded concat."""

import sys

import pytest
import torch
import transformers as hf

from bert_oversmoothing import export as exporting
from bert_oversmoothing.commands.export import export
from bert_oversmoothing.export import (
    Inference,
    deviation_between,
    example,
    export_model,
    input_names,
    open_file,
)
from bert_oversmoothing.model import build, open_fusion
from bert_oversmoothing.model.folding import can_fold, fold
from tenfold.errors import UserError


def small(task="qa", fusion="gate", **options):
    """One block, so that a trace takes little time."""
    config = hf.DistilBertConfig(
        vocab_size=30, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=24
    )
    torch.manual_seed(0)
    model = build(config, task, fusion, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def test_an_onnx_file_of_a_gate_answers_as_the_model(tmp_path):
    model = small("classification")
    done = export_model(model, tmp_path / "model.onnx")
    assert done.inputs == ("input_ids", "attention_mask")
    assert done.outputs == ("logits",)
    assert done.deviation is not None
    assert done.deviation < 1e-5
    assert "differs by" in str(done)
    run = open_file(tmp_path / "model.onnx", "onnx")
    for texts, tokens in ((1, 2), (5, 24)):
        ids, mask = example(model, texts, tokens)
        expected = model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(run(ids, mask)[0], expected, rtol=1e-4, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@torch.no_grad()
def test_an_exported_program_folds_a_concat_into_the_head(tmp_path):
    model = small("qa", "concat")
    done = export_model(model, tmp_path / "model.pt2", "pt2")
    # 2 layers x 16 x 16 + 16 and 2 x 16 + 2 become 2 x (2 layers x 16) + 2
    assert done.folded == "concat and head folded: 66 weights for 562 (11.74%)"
    run = open_file(tmp_path / "model.pt2", "pt2")
    ids, mask = example(model, 4, 7)
    out = model(input_ids=ids, attention_mask=mask)
    for found, expected in zip(run(ids, mask), (out.start_logits, out.end_logits), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "albert", "electra", "deberta-v2", "mpnet"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_folded_concat_answers_as_the_model(tiny, family, grad):
    base, batch = tiny(family)
    torch.manual_seed(0)
    model = build(base.config, "qa", "concat", layers=[0, 2, 3]).eval()
    folded = fold(model)
    with torch.set_grad_enabled(grad):
        expected, found = model(**batch), folded.model(**batch)
    for name in ("start_logits", "end_logits"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert (folded.before, folded.after) == (3 * 32 * 32 + 32 + 2 * 32 + 2, 2 * 3 * 32 + 2)
    assert model.fusion.kind == "concat"  # not changed


def test_at_the_size_of_bert_base_next_to_nothing_is_left():
    k, d = 13, 768
    with torch.device("meta"):
        model = build("bert-base", "qa", "concat")
    before = sum(
        p.numel() for part in (model.fusion, model.model.qa_outputs) for p in part.parameters()
    )
    assert before == k * d * d + d + 2 * d + 2
    assert (2 * k * d + 2) / before == pytest.approx(0.0026, abs=5e-5)


def test_what_cannot_be_folded_is_told(tiny):
    base, _ = tiny("modernbert")
    for model in (
        small("qa", "gate"),
        small("classification", "concat"),
        build(base.config, "qa", "concat"),
    ):
        assert not can_fold(model)
        with pytest.raises(UserError, match="only a concat with a linear head"):
            fold(model)


@pytest.mark.parametrize(
    ("family", "task", "names"),
    [
        ("bert", "choice", ["input_ids", "attention_mask", "token_type_ids"]),
        ("mpnet", "qa", ["input_ids", "attention_mask"]),
        ("deit", "image", ["pixel_values"]),
    ],
)
@torch.no_grad()
def test_examples_fit_the_models(tiny, family, task, names):
    model = build(tiny(family)[0].config, task, "max").eval()
    assert input_names(model) == names
    given = example(model, 3, 6)
    answers = Inference(model)(*given)
    assert all(len(answer) == 3 for answer in answers)
    assert deviation_between(Inference(model), Inference(model), model) == 0
    if task != "image":
        ids, mask = given[:2]
        assert torch.equal(ids == model.config.backbone.pad_token_id, mask == 0)
        assert 0 < mask.float().mean() < 1


def test_a_file_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch):
    (tmp_path / "model.pt2").write_text("former")
    model = small()
    wrong = Inference(small(num_labels=2, fusion="max"))
    monkeypatch.setattr(exporting, "open_file", lambda *_: wrong)
    monkeypatch.setattr(exporting, "write_graph", lambda _, path, *__: path.write_text("new"))
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="differs from the model"):
        export_model(model, tmp_path / "model.pt2", "pt2")
    assert (tmp_path / "model.pt2").read_text() == "former"
    assert len([*tmp_path.iterdir()]) == 1


def test_the_command_writes_files_and_folders(tmp_path, monkeypatch, capsys):
    model = small("qa", "concat")
    model.save_pretrained(tmp_path / "model")
    export(str(tmp_path / "model"), format="safetensors", out=tmp_path / "copy")
    again = open_fusion(tmp_path / "copy").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())

    calls = []

    def written(model, path, format, **options):
        calls.append((path, format, options))
        return exporting.Exported(path, format, ("input_ids",), ("logits",), 1e-7, "folded")

    # The function hides the module of its name.
    command = sys.modules["bert_oversmoothing.commands.export"]
    monkeypatch.setattr(command, "export_model", written)
    capsys.readouterr()
    export(str(tmp_path / "model"), out=tmp_path / "model.onnx", fold="always")
    assert calls == [(tmp_path / "model.onnx", "onnx", {"folding": "always", "check": True})]
    assert capsys.readouterr().out.splitlines() == [
        f"reading {tmp_path / 'model'}",
        "folded",
        "input_ids -> logits",
        f"wrote {tmp_path / 'model.onnx'}: differs by 1.0e-07 from the model (limit 0.0001)",
    ]


def test_bad_input_is_told(tmp_path):
    small().save_pretrained(tmp_path / "model")
    (tmp_path / "file").touch()
    for format in ("onnx", "safetensors"):
        with pytest.raises(UserError, match="a file is in the way"):
            export("none", format=format, out=tmp_path / "file" / "x")  # before it is read
    with pytest.raises(UserError, match="a folder, not a file"):
        export(str(tmp_path / "model"), out=tmp_path)
    with pytest.raises(UserError, match="there are files already"):
        export(str(tmp_path / "model"), format="safetensors", out=tmp_path / "model")
    with pytest.raises(UserError, match="only a concat"):
        export(str(tmp_path / "model"), out=tmp_path / "x.pt2", format="pt2", fold="always")
