"""Published checkpoints: equality with the programs that wrote them, and what is refused."""

import io
import json
import os
import pickle
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

from filip_vl.convert import fit_state, read_checkpoint
from filip_vl.convert.torchscript import is_torchscript, read_torchscript
from filip_vl.model import FilipConfig, FilipModel
from filip_vl.tokenizers import WordTokenizer
from tenfold.errors import UserError

SMALL = FilipConfig(
    image_size=16,
    patch_size=8,
    vision_width=64,
    vision_layers=2,
    vision_heads=4,
    text_width=64,
    text_layers=2,
    text_heads=4,
    context_length=12,
    vocab_size=50,
    embed_dim=32,
)
HEADS = {"vision_heads": 4, "text_heads": 4}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def shaken(module: nn.Module) -> nn.Module:
    """In eval mode, with no bias zero and no norm one: those would hide faults."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def small(**overrides) -> FilipModel:
    torch.manual_seed(0)
    model = FilipModel(replace(SMALL, **overrides))
    shaken(model)
    return model


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def captions(vocab: int = 50) -> Tensor:
    ids = torch.randint(0, vocab - 2, (3, 12), generator=torch.Generator().manual_seed(2))
    ids[:, 0], ids[[0, 1, 2], [11, 4, 1]] = vocab - 2, vocab - 1
    return ids


def assert_same(model: FilipModel, other: FilipModel) -> None:
    ids = captions(model.config.vocab_size)
    ours, theirs = (m.eval()(images(), ids) for m in (model, other))
    torch.testing.assert_close(ours.image.tokens, theirs.image.tokens)
    torch.testing.assert_close(ours.text.tokens, theirs.text.tokens)
    assert torch.equal(ours.text.mask, theirs.text.mask)
    torch.testing.assert_close(ours.logit_scale, theirs.logit_scale)


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


# --------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def clip(request):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": request.param,
    }
    text = {"vocab_size": 50, "max_position_embeddings": 12, "bos_token_id": 48, "eos_token_id": 49}
    config = CLIPConfig(
        text_config=sizes | text,
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=32,
    )
    return shaken(CLIPModel(config))


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_tokens_are_those_of_transformers(clip, folder):
    model = FilipModel.from_clip(folder).eval()
    ids = captions()
    output = model(images(), ids)
    hidden = clip.vision_model(images()).last_hidden_state[:, 1:]
    expected = clip.visual_projection(clip.vision_model.post_layernorm(hidden))
    torch.testing.assert_close(output.image.tokens, expected, **CLOSE)
    hidden = clip.text_model(ids).last_hidden_state  # behind the final norm
    torch.testing.assert_close(output.text.tokens, clip.text_projection(hidden), **CLOSE)
    assert output.text.mask.sum(1).tolist() == [12, 5, 2]
    torch.testing.assert_close(output.logit_scale, clip.logit_scale)


@torch.no_grad()
@pytest.mark.parametrize("side", [8, 24, 40])
def test_tokens_at_other_sizes_are_those_of_transformers(clip, folder, side):
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    hidden = clip.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    expected = clip.visual_projection(clip.vision_model.post_layernorm(hidden))
    with pytest.warns(UserWarning, match="positions are interpolated"):
        found = FilipModel.from_clip(folder).eval().encode_image(pixels)
    torch.testing.assert_close(found.tokens, expected, **CLOSE)


@torch.no_grad()
def test_vectors_are_those_of_transformers(clip, folder):
    model = FilipModel.from_clip(folder, pooled=True).eval()
    output = model(images(), captions())
    expected = clip(pixel_values=images(), input_ids=captions())
    torch.testing.assert_close(output.image.normalized()[:, 0], expected.image_embeds, **CLOSE)
    torch.testing.assert_close(output.text.normalized()[:, 0], expected.text_embeds, **CLOSE)


@torch.no_grad()
def test_a_state_dict_of_transformers_needs_its_activation_and_heads(clip, folder, tmp_path):
    act = clip.config.vision_config.hidden_act
    state = {f"module.{key}": value.half() for key, value in clip.state_dict().items()}
    path = saved({"state_dict": state}, tmp_path / "clip.pt")
    model = FilipModel.from_clip(path, act=act, **HEADS).eval()
    expected = FilipModel.from_clip(folder).eval()(images(), captions())
    output = model(images(), captions())
    torch.testing.assert_close(output.image.tokens, expected.image.tokens, rtol=0, atol=0.01)
    assert model.visual.proj.dtype == torch.float32
    found = read_checkpoint(path)
    assert found.source == "hf-clip"
    assert (found.fields["act"], found.fields["vision_heads"]) == ("quick_gelu", 1)
    assert found.notes == ("no config.json: quick_gelu and heads of 64 channels are assumed",)


def test_weights_in_several_files(clip, folder, tmp_path):
    clip.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(FilipModel.from_clip(tmp_path), FilipModel.from_clip(folder))


def test_a_configuration_of_transformers(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())

    def fields(text: dict, vision: dict, **other) -> dict:
        changed = config | {"text_config": config["text_config"] | text}
        changed |= {"vision_config": config["vision_config"] | vision} | other
        (tmp_path / "config.json").write_text(json.dumps(changed))
        return read_checkpoint(tmp_path).fields

    assert fields({}, {})["end_id"] == 49
    assert fields({"eos_token_id": 2}, {})["end_id"] is None  # of files older than the field
    assert fields({"eos_token_id": 49407}, {})["end_id"] is None  # the default, of no small one
    assert fields({"num_attention_heads": 1}, {})["text_heads"] == 1
    assert fields({}, {}, vision_config_dict={"num_attention_heads": 8})["vision_heads"] == 8
    with pytest.raises(UserError, match="both towers need the same activation"):
        fields({"hidden_act": "gelu"}, {"hidden_act": "quick_gelu"})
    with pytest.raises(UserError, match="quick_gelu or gelu, not relu"):
        fields({"hidden_act": "relu"}, {"hidden_act": "relu"})
    with pytest.raises(UserError, match="another epsilon"):
        fields({"layer_norm_eps": 1e-6}, {})


# --------------------------------------------------------------------------- OpenAI and open_clip


def test_a_state_dict_of_openai_is_taken_as_it_is(tmp_path):
    model = small()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    settings = {"input_resolution": torch.tensor(16), "attn_mask": torch.zeros(12, 12)}
    path = saved({"epoch": 3, "state_dict": state | settings}, tmp_path / "clip.pt")
    found = read_checkpoint(path, **HEADS)
    assert FilipConfig.from_dict(found.fields) == SMALL
    copy, report = FilipModel.from_converted(found)
    assert_same(copy, model)
    assert report.matched == tuple(model.state_dict())
    assert report.reinitialised == ()
    assert report.ignored == ("input_resolution", "attn_mask")
    assert report.summary().splitlines() == [
        f"openai: {len(state)} keys matched",
        "ignored: input_resolution, attn_mask",
        "no weight tells the activation: quick_gelu is assumed, as for most models of openai",
    ]


def test_half_precision_and_heads_of_64(tmp_path):
    model = small(vision_width=128, vision_heads=2, text_heads=1)
    state = {key: value.half() for key, value in model.state_dict().items()}
    copy = FilipModel.from_clip(saved(state, tmp_path / "clip.pt"))
    assert (copy.config.vision_heads, copy.config.text_heads) == (2, 1)
    for key, value in copy.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key].float())


class Traceable(FilipModel):
    """A model whose outputs TorchScript can name."""

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_image(pixels).tokens, self.encode_text(ids).tokens


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_a_torchscript_archive(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = Traceable(replace(SMALL, act="gelu")).eval()
    path = tmp_path / "clip.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing fixes sizes, and is out of fashion
        traced = torch.jit.trace(model, (images(), captions()), strict=False, check_trace=False)
        torch.jit.save(traced.to(precision), path)
    assert is_torchscript(path)
    state = read_torchscript(path)
    assert state.keys() == model.state_dict().keys()
    assert all(value.dtype == precision for value in state.values())
    copy = FilipModel.from_clip(path, act="gelu", **HEADS)
    expected = model.to(precision).float()
    for key, value in copy.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key])


def test_a_torchscript_archive_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/constants.pkl", pickle.dumps(()))
        archive.writestr("evil/data.pkl", pickle.dumps({"a": Evil()}, protocol=2))
    with pytest.raises(UserError, match="the archive is damaged"):
        FilipModel.from_clip(path)
    assert not (tmp_path / "made").exists()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/constants.pkl", b"")
        archive.writestr("bomb/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(UserError, match="the archive is damaged"):
        FilipModel.from_clip(path)


def test_a_folder_of_open_clip(tmp_path):
    model = small(act="gelu")
    text = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_proj")
    state = {
        f"text.{key}" if key.startswith(text) else key: value
        for key, value in model.state_dict().items()
    } | {"logit_bias": torch.tensor(-10.0)}
    path = saved(state, tmp_path / "open_clip_pytorch_model.bin")
    found = read_checkpoint(path, **HEADS)
    assert found.source == "open_clip"
    assert found.fields["act"] == "gelu"
    assert "gelu is assumed, as for most models of open_clip" in found.notes[0]
    assert found.ignored == ("logit_bias",)

    def told(**changes) -> FilipModel:
        vision, text = {"width": 64, "head_width": 16}, {"heads": 4} | changes.pop("text", {})
        config = {"model_cfg": {"vision_cfg": vision, "text_cfg": text} | changes}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        return FilipModel.from_clip(tmp_path)

    assert_same(told(), model)
    assert told(quick_gelu=True).config.act == "quick_gelu"
    with pytest.raises(UserError, match="towers other than CLIP's: no_causal_mask"):
        told(text={"no_causal_mask": True})


# ------------------------------------------------------------------------------------------ DeCLIP


def test_filip_of_declip(tmp_path):
    """Maps with a bias, no norm before the image's; a mask symbol shifts start and end."""
    bounds = {"min_log_scale": 3.0, "max_log_scale": 6.0}
    model = small(vocab_size=51, proj_bias=True, visual_ln_post=False, **bounds)
    own = model.state_dict()
    mapped = {
        "image_mapping.weight": own.pop("visual.proj").T,
        "image_mapping.bias": own.pop("visual.proj_bias"),
        "text_mapping.weight": own.pop("text_projection").T,
        "text_mapping.bias": own.pop("text_projection_bias"),
        "logit_scale_dense": own.pop("logit_scale"),
    }
    unused = {
        "logit_scale": torch.ones(1),
        "visual.proj": torch.randn(64, 48),
        "visual.ln_post.weight": torch.randn(64),
        "visual.ln_post.bias": torch.randn(64),
        "encode_text.text_projection.weight": torch.randn(48, 64),
        "encode_text.text_projection.bias": torch.randn(48),
        "text_label_predictor.weight": torch.randn(51, 64),
        "text_label_predictor.bias": torch.randn(51),
    }
    towers = {
        key if key.startswith("visual.") else f"encode_text.{key}": value
        for key, value in own.items()
    }
    state = {f"module.{key}": value for key, value in (towers | mapped | unused).items()}
    path = saved(
        {"model": state, "optimizer": {"state": {}}, "last_iter": 128000}, tmp_path / "ckpt.pth.tar"
    )
    found = read_checkpoint(path, **HEADS)
    assert found.source == "declip-filip"
    assert found.ignored == tuple(unused)
    assert "--tokenizer-layout declip" in found.notes[0]
    copy, report = FilipModel.from_converted(found)
    assert not report.reinitialised
    assert (copy.config.embed_dim, copy.config.end) == (32, 50)
    assert_same(copy, model)
    hidden: list[Tensor] = []
    copy.visual.transformer.register_forward_hook(lambda *args: hidden.append(args[2]))
    tokens = copy.encode_image(images()).tokens
    weight, bias = mapped["image_mapping.weight"], mapped["image_mapping.bias"]
    torch.testing.assert_close(tokens, hidden[0][:, 1:] @ weight.T + bias)
    del state["module.text_mapping.bias"]
    with pytest.raises(UserError, match=r"no FILIP of DeCLIP: text_mapping\.bias missing"):
        read_checkpoint(saved({"model": state}, path), **HEADS)


# ------------------------------------------------------------------------- what fits and what not


def test_a_joint_width_of_256_starts_the_projections_anew(tmp_path):
    model = small()
    found = read_checkpoint(saved(model.state_dict(), tmp_path / "clip.pt"), **HEADS)
    copy, report = FilipModel.from_converted(found, embed_dim=256)
    assert report.reinitialised == ("text_projection", "visual.proj")
    assert report.ignored == ()
    assert copy.visual.proj.shape == copy.text_projection.shape == (64, 256)
    assert copy.visual.proj.std().item() == pytest.approx(64**-0.5, rel=0.03)
    assert torch.equal(copy.logit_scale, model.logit_scale)
    kept, report = FilipModel.from_converted(found, embed_dim=32)
    assert not report.reinitialised
    assert_same(kept, model)


def test_another_size_interpolates(tmp_path):
    path = saved(small().state_dict(), tmp_path / "clip.pt")
    words = WordTokenizer([f"word{i}" for i in range(45)])
    with pytest.raises(UserError, match="the tokenizer has 49 ids, the network 50"):
        FilipModel.from_clip(path, tokenizer=words, **HEADS)
    model = FilipModel.from_clip(path, image_size=32, include_cls=True, **HEADS)
    assert model.visual.positional_embedding.shape == (17, 64)
    assert model.encode_image(torch.zeros(1, 3, 32, 32)).tokens.shape == (1, 17, 32)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("visual.transformer.resblocks.1.ln_1.bias", None, r"lacks 1 keys \(visual.transformer"),
        ("ln_final.weight", torch.ones(3), r"1 keys \(ln_final.weight\) of the towers have other"),
        ("ln_final.weight", torch.full((64,), torch.nan), r"\(ln_final.weight\) hold numbers that"),
        ("transformer.resblocks.0.ls_1.gamma", torch.ones(64), r"gamma\) that are no part of CLIP"),
        ("visual.conv1.weight", None, r"no CLIP with a vision transformer: visual\.conv1\.weight"),
        ("visual.positional_embedding", torch.ones(4, 64), "no vision transformer on square"),
        (
            "token_embedding.weight",
            torch.ones(50, 60),
            "of the text tower, and 60 is no .* give text_heads",
        ),
    ],
)
def test_towers_that_do_not_fit_are_refused(key, value, message, tmp_path):
    state = small(text_heads=1, vision_heads=1).state_dict()
    if value is None:
        del state[key]
    else:
        state[key] = value
    with pytest.raises(UserError, match=message):
        FilipModel.from_clip(saved(state, tmp_path / "clip.pt"))


def test_projections_may_be_missing_where_they_start_anew(tmp_path):
    state = small().state_dict()
    for key in ("visual.proj", "text_projection", "logit_scale"):
        del state[key]
    path = saved(state, tmp_path / "clip.pt")
    with pytest.raises(UserError, match="no projections: give embed_dim"):
        FilipModel.from_clip(path, **HEADS)
    found = read_checkpoint(path, **HEADS)
    model, report = FilipModel.from_converted(found, embed_dim=16)
    assert set(report.reinitialised) == {"visual.proj", "text_projection", "logit_scale"}
    with pytest.raises(UserError, match="lacks 1 keys"):
        fit_state(found, model.state_dict() | {"visual.new": torch.ones(1)})


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(UserError, match="no program is called 'clip': choose auto, openai"):
        read_checkpoint(tmp_path, "clip")
    with pytest.raises(UserError, match="no weights in this folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.pt")
    buffer = io.BytesIO()
    torch.save({"state_dict": {"layer1.0.conv1.weight": torch.ones(1)}}, buffer)
    (tmp_path / "resnet.pt").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"resnet.pt, keys: layer1.0.conv1.weight"):
        read_checkpoint(tmp_path / "resnet.pt")
    with pytest.raises(UserError, match=r"no FILIP of DeCLIP"):
        read_checkpoint(tmp_path / "resnet.pt", "declip-filip")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read it.*index\.json"):
        read_checkpoint(tmp_path)
