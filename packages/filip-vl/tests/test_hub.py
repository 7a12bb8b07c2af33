"""Model folders: what goes in comes out, and what is no such folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from filip_vl.model import CONFIGS, FilipModel
from filip_vl.tokenizers import WordTokenizer
from tenfold.errors import UserError

TINY = replace(CONFIGS["filip_tiny"], image_size=16, vision_width=32, text_width=32)


def test_a_folder_gives_the_model_back(tmp_path):
    tokenizer = WordTokenizer.train(["a red circle", "a blue square"])
    model = FilipModel.from_config("filip_tiny", tokenizer=tokenizer, include_cls=True)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
    }
    copy = FilipModel.from_pretrained(tmp_path)
    assert copy.config == model.config
    assert not copy.training
    assert all(parameter.requires_grad for parameter in copy.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(copy.state_dict()[key], value)
    texts = ["a red square", "a circle"]
    ours, theirs = copy.encode_text(texts), model.eval().encode_text(texts)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert ours.strings == theirs.strings


def test_a_folder_is_plain_files(tmp_path):
    FilipModel(TINY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("model_type") == "filip-vl"
    assert config == TINY.to_dict()
    assert FilipModel.from_pretrained(tmp_path).tokenizer is None


def test_a_former_tokenizer_does_not_stay(tmp_path):
    (tmp_path / "tokenizer.json").write_text("of another model")
    FilipModel(TINY).save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_another_size(tmp_path):
    FilipModel(TINY).save_pretrained(tmp_path)
    model = FilipModel.from_pretrained(tmp_path, image_size=32)
    assert model.config.image_size == 32
    assert model.encode_image(torch.zeros(1, 3, 32, 32)).grid == (4, 4)


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    FilipModel(TINY).save_pretrained(tmp_path)
    asked = []

    def download(name: str, **options) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    FilipModel.from_pretrained("user/model", revision="v1")
    [(name, options)] = asked
    assert (name, options["revision"]) == ("user/model", "v1")
    assert options["allow_patterns"] == ["config.json", "model.safetensors", "tokenizer.json"]

    def refuse(name: str, **options) -> str:
        raise OSError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=r"the Hub gave none: no network \(user/other\)"):
        FilipModel.from_pretrained("user/other")


def changed(folder: Path, **changes) -> Path:
    """A model folder with other values in its config.json."""
    FilipModel(TINY).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip"}, r"config.json is not of filip-vl .*: convert a published"),
        ({"depth": 3}, "no such field of a configuration: depth"),
        ({"image_size": 20}, "image_size 20 is no multiple of patch_size 8"),
        ({"text_layers": 1}, r"the weights do not fit: 12 unexpected \(transformer"),
        ({"embed_dim": 8}, r"2 misshapen .*text_projection: \(32, 32\) instead of \(32, 8\)"),
    ],
)
def test_folders_that_hold_something_else(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        FilipModel.from_pretrained(changed(tmp_path, **changes))


def test_what_is_no_folder(tmp_path):
    (tmp_path / "weights.pt").touch()
    with pytest.raises(UserError, match="a file, no model folder"):
        FilipModel.from_pretrained(tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"no such model folder .*: give a folder or user/name"):
        FilipModel.from_pretrained(tmp_path / "none")
    folder = changed(tmp_path)
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot read it"):
        FilipModel.from_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer of filip-vl"):
        FilipModel.from_pretrained(folder)
