"""Plain models to fusion models and back: bits, keys, folders and what is refused."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from bert_oversmoothing.commands.convert import convert
from bert_oversmoothing.convert import save_folder, to_fusion, to_plain
from bert_oversmoothing.model import FusionForQuestionAnswering, build, open_fusion
from bert_oversmoothing.model.plain import plain_class
from tenfold.errors import UserError


@pytest.fixture
def stored(tiny, tmp_path):
    """A plain model for questions with a tokenizer beside it."""
    base, batch = tiny("bert")
    torch.manual_seed(0)
    plain = plain_class("qa", base.config)._from_config(base.config).eval()
    folder = tmp_path / "plain"
    plain.save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1, "two": 2, "words": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    (folder / "notes.txt").write_text("stays")
    return folder, plain, batch


@torch.no_grad()
def starts(model, batch):
    return model(**batch).start_logits


@pytest.mark.parametrize("fusion", ["gate", "concat", "max", "scalar_mix", "mean", "last"])
def test_there_and_back_to_the_bit(stored, tmp_path, fusion):
    folder, plain, batch = stored
    convert(str(folder), tmp_path / "fused", task="qa", fusion=fusion, layers="last:2")
    fused = FusionForQuestionAnswering.from_pretrained(tmp_path / "fused")
    assert (fused.config.layers, fused.config.fusion) == ([2, 3], fusion)
    assert torch.equal(starts(fused, batch), starts(plain, batch))

    before = load_file(folder / "model.safetensors")
    between = load_file(tmp_path / "fused" / "model.safetensors")
    assert {key for key in between if not key.startswith("fusion.")} == {
        f"model.{key}" for key in before
    }
    convert(str(tmp_path / "fused"), tmp_path / "back", to="plain")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(between[f"model.{key}"], value)
        assert torch.equal(after[key], value)
    again = hf.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "back")
    assert torch.equal(starts(again, batch), starts(plain, batch))


def test_the_tokenizer_goes_along(stored, tmp_path, capsys):
    folder, *_ = stored
    convert(str(folder), tmp_path / "fused", task="qa")
    said = capsys.readouterr().out
    assert "gate of layers [0, 1, 2, 3]: 133 parameters more" in said
    assert "FusionForQuestionAnswering" in said
    assert "no tokenizer" not in said
    convert(str(folder), tmp_path / "mix", task="qa", fusion="max")
    assert "max of layers [0, 1, 2, 3]: 1 parameter more\n" in capsys.readouterr().out
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "fused")
    assert tokenizer("two words three").input_ids == [2, 3, 1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "fused" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "fused" / "notes.txt").exists()
    convert(str(tmp_path / "fused"), tmp_path / "back", to="plain")
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    convert(str(folder), tmp_path / "bare", task="qa")
    assert "no tokenizer beside the weights" in capsys.readouterr().out


def test_a_trained_fusion_is_dropped_by_force_only(stored, tmp_path, capsys):
    folder, plain, batch = stored
    model = to_fusion(folder, "qa", "gate")
    with torch.no_grad():
        model.fusion.alpha.fill_(0.5)
    save_folder(model, tmp_path / "trained", folder)
    with pytest.raises(UserError, match=r"the gate fusion is no identity.*--force-last"):
        convert(str(tmp_path / "trained"), tmp_path / "back", to="plain")
    assert not (tmp_path / "back").exists()
    convert(str(tmp_path / "trained"), tmp_path / "back", to="plain", force_last=True)
    assert "BertForQuestionAnswering" in capsys.readouterr().out
    again = hf.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "back")
    assert torch.equal(starts(again, batch), starts(plain, batch))


def test_a_concat_of_the_last_layer_alone_goes_into_the_head(stored):
    folder, _, batch = stored
    model = to_fusion(folder, "qa", "concat")
    with torch.no_grad():
        model.fusion.weight[:, -32:] = torch.randn(32, 32)
        model.fusion.bias.normal_()
    expected = starts(model, batch)
    torch.testing.assert_close(starts(to_plain(model), batch), expected, rtol=1e-4, atol=1e-5)

    reads_more = to_fusion(folder, "qa", "concat")
    with torch.no_grad():
        reads_more.fusion.weight[0, 0] = 1e-3
    with pytest.raises(UserError, match="the concat fusion is no identity"):
        to_plain(reads_more)


def test_a_concat_before_a_pooler_goes_nowhere(tiny):
    model = build(tiny("bert")[0].config, "classification", "concat", init="identity")
    with torch.no_grad():
        model.fusion.bias += 1
    with pytest.raises(UserError, match="no identity"):
        to_plain(model)


def test_what_is_there_stays(stored, tmp_path):
    folder, *_ = stored
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(UserError, match="there are files already"):
            convert(str(folder), out, task="qa")
    assert (tmp_path / "full" / "file").read_text() == "mine"
    (tmp_path / "hollow").mkdir()
    convert(str(folder), tmp_path / "hollow", task="qa")
    assert open_fusion(tmp_path / "hollow").task == "qa"


def test_a_folder_appears_whole_or_not_at_all(stored, tmp_path, monkeypatch):
    folder, *_ = stored
    model = to_fusion(folder, "qa")

    def fail(part):
        (part / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_folder(model, tmp_path / "new", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_tokenizer_in_memory_is_written(stored, tmp_path):
    folder, *_ = stored
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    files = save_folder(to_fusion(folder, "qa"), tmp_path / "new", tokenizer=tokenizer)
    assert files == ["tokenizer.json", "tokenizer_config.json"]


def test_bad_input_is_told_and_nothing_is_written(stored, tmp_path):
    folder, *_ = stored
    out = tmp_path / "out"
    for options, message in (
        ({}, "the task of the head is not given"),
        ({"task": "qa", "layers": [0, 9]}, "no such layers: 9"),
        ({"task": "qa", "layers": "last:0"}, "out of range"),
        ({"task": "image"}, "bert has no head for the task image"),
        ({"task": "qa", "fusion": "sum"}, "unknown fusion"),
        ({"task": "classification", "num_labels": 0}, "--num-labels must be 1"),
        ({"fusion": "foo"}, "unknown fusion: 'foo'"),
        ({"task": "qa", "layers": "0,99"}, r"numbers in brackets, as \[0,6,12\]"),
        ({"to": "plain"}, "a plain bert, no fusion model .*: bert-oversmoothing convert"),
    ):
        with pytest.raises(UserError, match=message):
            convert(str(folder), out, **options)
    with pytest.raises(UserError, match="no such model folder"):
        convert(str(tmp_path / "nothing"), out, task="qa")
    with pytest.raises(UserError, match="unknown task"):
        to_fusion(folder, "speech")
    convert(str(folder), tmp_path / "fused", task="qa")
    with pytest.raises(UserError, match="a fusion model already"):
        convert(str(tmp_path / "fused"), out, task="qa")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}})
    )
    with pytest.raises(UserError, match="needs code that comes with it"):
        convert(str(folder), out, task="qa")
    assert not out.exists()


def test_an_encoder_with_code_of_its_own_is_not_written(tiny, tmp_path):
    class MineConfig(hf.BertConfig):
        model_type = "mine"

    plain = plain_class("qa", tiny("bert")[0].config)._from_config(tiny("bert")[0].config)
    plain.config = MineConfig()
    with pytest.raises(UserError, match="needs code that the folder would not hold"):
        save_folder(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()
