"""Bad input and failure modes, in the order of the specification's table.

What a row says of one function is tested beside that function: masks and implementations in the
core's tests, ids and sizes in test_model.py, prompts in test_zeroshot.py, labels in
test_alignment.py, indexes in test_index.py, uneven ranks in test_losses.py. Here is what a person
meets in a command or a run.
"""

import csv
import importlib.util
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from filip_vl.cli import app
from filip_vl.data import FilipDataModule, eval_transform, pairs_in_memory, write_shards
from filip_vl.data.bad_items import PairBadItems
from filip_vl.data.shapes import shape_vocabulary
from filip_vl.losses import FilipLoss
from filip_vl.model import FilipModel, get_config
from filip_vl.module import FilipModule, load_model
from filip_vl.retrieval import TokenSet, retrieval_ranks
from filip_vl.skips import StopOnSkips
from filip_vl.synthetic import scene
from filip_vl.tokenizers import BPETokenizer, WordTokenizer
from filip_vl.zeroshot import ZeroShotClassifier
from tenfold.contrastive import late, late_interaction
from tenfold.contrastive.masks import place_type
from tenfold.data import BadItem
from tenfold.errors import UserError
from tenfold.runs import make_trainer

TOKENIZER = WordTokenizer.train(shape_vocabulary())
QUIET = ("--trainer.accelerator", "cpu", "--trainer.logger", "false")
SHALLOW = {"vision_layers": 1, "text_layers": 1}  # for runs of many steps
TEXTS = ["a red ring", "a blue ring", "a red square", "a green cross"]


def fails(capsys, *argv: object) -> str:
    """The one line that a person's mistake gives."""
    capsys.readouterr()
    assert app.main([str(word) for word in argv]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def tiny(**options: object) -> FilipModel:
    torch.manual_seed(0)
    return FilipModel.from_config("filip_tiny", tokenizer=TOKENIZER, **options).eval()


def module(**options: object) -> FilipModule:
    torch.manual_seed(0)
    return FilipModule("filip_tiny", **{"lr": 1e-3, "warmup": 1, **options})


def memory(texts: Sequence[str], **options: object) -> FilipDataModule:
    given = [(scene(5, n).image, text) for n, text in enumerate(texts)]
    usual = {"image_size": 48, "context_length": 24, "augment": "none", "batch_size": 8}
    return FilipDataModule.from_pairs(given, **{**usual, **options})


def fit(made: FilipModule, folder: Path, data: FilipDataModule, *callbacks: Callback, **options):
    usual = {"accelerator": "cpu", "progress": False, "logger": False, "limit_val_batches": 0}
    usual |= {"default_root_dir": folder, "epochs": 1, "callbacks": callbacks}
    make_trainer(folder, **{**usual, **options}).fit(made, datamodule=data)


def table(folder: Path, captions: Sequence[str]) -> Sequence[object]:
    """A training table on disk, and the command that trains on it for a step."""
    lines = ["filepath\ttitle"]
    for n, caption in enumerate(captions):
        Image.fromarray(scene(5, n).image).save(folder / f"{n}.png")
        lines.append(f"{n}.png\t{caption}")
    (folder / "train.tsv").write_text("\n".join(lines))
    words = ["fit", "--data.source", "csv", "--data.root", folder, "--data.batch_size", 8]
    words += ["--data.image_size", 48, "--data.context_length", 24, "--data.augment", "none"]
    words += ["--trainer.max_steps", 1, "--trainer.val_check_interval", 1.0, *QUIET]
    return [*words, "--trainer.default_root_dir", folder / "run"]


def tokens(seed: int, rows: int, length: int, dim: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, dim, generator=generator, dtype=torch.float64)


# ---- empty captions


def test_an_empty_caption_is_a_start_and_an_end():
    batch = tiny().encode_text(["", " \t", "a red ring"])
    assert batch.mask.sum(1).tolist() == [2, 2, 5]
    assert batch.tokens.isfinite().all()


def test_fit_drops_empty_captions_with_a_count_and_strict_names_file_and_row(
    tmp_path, capsys, caplog
):
    words = table(tmp_path, [*TEXTS, *TEXTS, " ", "", "a ring"])
    assert app.main([str(word) for word in words]) == 0
    assert "2 of the captions of train were dropped as empty" in caplog.text
    words = [*words[:-1], tmp_path / "strict", "--data.strict", "true"]
    line = fails(capsys, *words)
    assert "empty caption in train (train.tsv:10)" in line  # behind the header and eight rows
    assert "--data.strict" in line


def test_a_table_of_empty_captions_alone_is_named(tmp_path, capsys):
    words = table(tmp_path, ["", " ", "\u3000"])
    assert "every caption of train is empty (from train.tsv:2 on)" in fails(capsys, *words)


# ---- captions that are too long


def test_caption_of_more_than_77_tokens_keeps_its_end_and_is_counted(caplog):
    ids, lengths = TOKENIZER.encode(["red " * 75, "red " * 76], 77)
    assert lengths.tolist() == [77, 77]
    assert (ids[:, 76] == TOKENIZER.end_id).all()
    assert ids[1, :76].tolist() == ids[0, :76].tolist()
    data = memory(["red " * 76, "red " * 75, "red " * 500], context_length=77, tokenizer=TOKENIZER)
    [batch] = data.train_dataloader()
    assert batch.truncated == 2
    data.on_before_batch_transfer(batch, 0)
    data.teardown("fit")
    assert "2 captions were cut at 77 tokens" in caplog.text


# ---- rows without a token that counts


@pytest.mark.parametrize("impl", ["naive", "tiled"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_loss_names_rows_without_a_token(impl, fraction):
    v, t, hidden = tokens(0, 3, 4), tokens(1, 3, 5), torch.ones(3, 5, dtype=torch.bool)
    hidden[1] = False
    loss = FilipLoss(fraction, impl=impl)
    with pytest.raises(ValueError, match="no valid token in text row 1"):
        loss(v, t, 1.0, text_mask=hidden)
    with pytest.raises(ValueError, match="no valid token in image row 1"):
        loss(v, t, 1.0, image_mask=hidden[:, :4])


def test_nothing_is_scored_that_has_no_token():
    """An empty caption, of which neither start nor end counts."""
    model = tiny(drop_bos=True, drop_eos=True)
    texts = TokenSet([model.encode_text(["a red ring", ""])])
    images = TokenSet([model.encode_image(torch.rand(2, 3, 48, 48))])
    with pytest.raises(ValueError, match="no valid token in text row 1"):
        retrieval_ranks(images, texts, torch.arange(2))
    with pytest.raises(ValueError, match=r"prompts without a token that counts: \[' '\]"):
        ZeroShotClassifier(model, ["ring", " "], ["{}"])
    clip = FilipModel.from_config("clip_tiny", tokenizer=TOKENIZER, drop_bos=True, drop_eos=True)
    assert ZeroShotClassifier(clip, ["ring", " "], ["{}"]).prompts == ["ring", " "]


# ---- tokens of zeros, and tokens that are not finite


def test_a_token_of_zeros_counts_as_unlike_everything():
    v, t = tokens(0, 3, 4), tokens(1, 3, 5)
    v[0, 2] = t[1, 3] = 0
    leaves = [x.requires_grad_() for x in (v, t)]
    loss = FilipLoss()(*leaves, math.log(5.0))
    loss.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
    a, b = ((x / x.norm(dim=2, keepdim=True)).nan_to_num(0) for x in (v.detach(), t.detach()))
    s = torch.einsum("ind,jmd->ijnm", a, b)
    z, own = 5 * s.amax(3).mean(2), torch.arange(3)
    wanted = (F.cross_entropy(z, own) + F.cross_entropy(5 * s.amax(2).mean(2).T, own)) / 2
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)


class Enough(Exception):
    """The rest of a step does not matter."""


@pytest.mark.parametrize(("precision", "steps"), [("32-true", [0, 100, 200]), ("16-mixed", [])])
def test_training_looks_for_tokens_that_are_not_finite_every_100_steps(
    precision, steps, tmp_path, monkeypatch
):
    """Where a scaler skips such steps they go on."""
    made, looked = module(), []
    plugins = [scaled()] if precision == "16-mixed" else None
    made.trainer = make_trainer(tmp_path, epochs=1, accelerator="cpu", plugins=plugins)

    def forward(self: FilipModule, batch: object) -> None:
        looked.append(self.model.check_finite)
        raise Enough

    monkeypatch.setattr(FilipModule, "forward", forward)
    [batch] = memory(TEXTS).train_dataloader()
    for step in range(250):
        monkeypatch.setattr(FilipModule, "global_step", step)
        with pytest.raises(Enough):
            made.training_step(batch, 0)
    assert [step for step, look in enumerate(looked) if look] == steps


def test_a_run_names_the_tower_and_the_row_of_tokens_that_are_not_finite(tmp_path):
    made = module()
    with torch.no_grad():
        made.model.token_embedding.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"text tower: .* row 0 are not finite"):
        fit(made, tmp_path / "nan", memory(TEXTS, tokenizer=TOKENIZER))


def test_evaluation_looks_for_them_after_training_as_before(tmp_path):
    made = module()
    fit(made, tmp_path, memory(TEXTS, tokenizer=TOKENIZER))
    with torch.no_grad():
        made.model.visual.proj.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="image tower"):
        made.model.eval().encode_image(torch.zeros(1, 3, 48, 48))


def test_a_command_tells_weights_that_are_not_finite(tmp_path, capsys):
    model = tiny()
    with torch.no_grad():
        model.visual.proj.fill_(torch.nan)
    model.save_pretrained(tmp_path / "model")
    Image.fromarray(scene(0, 0).image).save(tmp_path / "x.png")
    words = ["--ckpt", tmp_path / "model", "--image", tmp_path / "x.png", "--text", "a ring"]
    line = fails(capsys, "align", *words, "--out", tmp_path / "a.png")
    assert "image tower: 36 of the tokens in row 0 are not finite" in line


# ---- masks with holes


@pytest.mark.parametrize("impl", ["naive", "tiled"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_where_tokens_stand_makes_no_difference_to_the_loss(impl, fraction):
    v, t, mask = tokens(0, 3, 6), tokens(1, 3, 8), torch.zeros(3, 8, dtype=torch.bool)
    mask[0, [1, 4, 7]] = mask[1, [0, 5]] = mask[2, [2, 3, 4, 6]] = True
    front = mask.byte().argsort(dim=1, descending=True, stable=True)
    loss = FilipLoss(fraction, impl=impl)
    wanted = loss(v, t.take_along_dim(front[..., None], 1), 1.5, None, mask.gather(1, front))
    assert loss(v, t, 1.5, None, mask).item() == pytest.approx(wanted.item(), rel=1e-12)


# ---- another vocabulary


def many_merges() -> list[str]:
    """As many as CLIP has, of letters that come in twos and threes."""
    letters = [chr(n) for n in range(33, 127)]
    twos = [(a, b) for a in letters for b in letters]
    threes = [(a + b, c) for c in letters[:5] for a, b in twos]
    return [" ".join(pair) for pair in [*twos, *threes][:48_894]]


def test_clips_ids_for_a_network_of_declip_name_both_sizes_and_the_layout(tmp_path, capsys):
    merges, model = tmp_path / "merges.txt", tmp_path / "model"
    merges.write_text("\n".join(["#version", *many_merges()]))
    torch.manual_seed(0)
    FilipModel.from_config("filip_tiny", vocab_size=49_409).save_pretrained(model)
    Image.fromarray(scene(0, 0).image).save(tmp_path / "x.png")
    words = ["align", "--ckpt", model, "--image", tmp_path / "x.png", "--text", "a ring"]
    words += ["--tokenizer", merges, "--out", tmp_path / "a.png"]
    line = fails(capsys, *words)
    assert "49408 ids, the network 49409" in line
    assert line.endswith("--tokenizer-layout declip")
    assert app.main([*map(str, words), "--tokenizer-layout", "declip"]) == 0
    trained = ["fit", "--model.model", model, "--data.tokenizer", merges, "--data.train_size", 8]
    trained += ["--trainer.default_root_dir", tmp_path / "run", "--trainer.accelerator", "cpu"]
    line = fails(capsys, *trained)
    assert "49408 ids, the model 49409" in line
    assert line.endswith("--data.tokenizer_layout declip")
    network = FilipModel.from_config("filip_tiny", vocab_size=49_408)
    with pytest.raises(UserError, match=r"49409 ids, the network 49408: .*--tokenizer-layout clip"):
        network.tokenizer = BPETokenizer(many_merges(), layout="declip")


def test_a_checkpoint_serves_where_its_training_data_are_not(tmp_path):
    assert app.main([str(word) for word in table(tmp_path, [*TEXTS, *TEXTS])]) == 0
    texts = ["a red cross", "a green ring", "a purple square"]  # a word that no vocabulary has
    lines = ["filepath\ttitle", *(f"{n}.png\t{text}" for n, text in enumerate(texts))]
    (tmp_path / "own.tsv").write_text("\n".join(lines))
    (tmp_path / "train.tsv").unlink()
    words = ["--ckpt", tmp_path / "run", "--data.source", "csv", "--data.root", tmp_path, *QUIET]
    for verb, split in (("validate", "val"), ("test", "test"), ("predict", "predict")):
        given = [verb, *words, f"--data.{split}", tmp_path / "own.tsv"]
        assert app.main([str(word) for word in given]) == 0
    with (tmp_path / "run" / "predict" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    model = load_model(tmp_path / "run")
    images = torch.stack([eval_transform(48)(Image.open(tmp_path / f"{n}.png")) for n in range(3)])
    v, t = model.encode_image(images), model.encode_text(texts)
    for n, row in enumerate(rows):
        s = v.normalized()[n] @ t.normalized()[n][t.mask[n]].T
        assert float(row["s_i2t"]) == pytest.approx(float(s.amax(1).mean()), abs=1e-5)
    assert [row["caption"] for row in rows] == texts


# ---- sizes that are no multiple of the patch


def test_an_image_size_that_is_no_multiple_of_the_patch_names_the_nearest(capsys):
    with pytest.raises(ValueError, match=r"image_size 50 .* patch_size 8: .* is 48 or 56$"):
        get_config("filip_tiny", image_size=50)
    line = fails(capsys, "fit", "--model.fields", '{"image_size": 5}', "--trainer.logger", "false")
    assert "image_size 5 is no multiple of patch_size 8: the nearest valid is 8" in line


# ---- images that cannot be used


def test_one_image_in_a_hundred_may_be_unreadable_and_not_two():
    bad = PairBadItems("train", 100, skip=True, strict=False, most=0.01)
    bad.add([BadItem(7, "no image (7.png)", "")])
    bad.add([BadItem(7, "no image (7.png)", "")])  # met again in another epoch
    told = r"2 of the 100 items of train are unusable, more than the share 0.01: .*8.png"
    with pytest.raises(UserError, match=told):
        bad.add([BadItem(8, "no image (8.png)", "")])


@pytest.mark.parametrize("workers", [0, 1])
def test_predict_has_a_row_and_an_error_for_what_cannot_be_read(tmp_path, caplog, workers):
    folder = tmp_path / "images"
    folder.mkdir()
    whole = Image.fromarray(scene(0, 0).image)
    whole.convert("CMYK").save(folder / "0.jpg")
    (folder / "1.jpg").write_bytes((folder / "0.jpg").read_bytes()[:600])
    whole.convert("P").save(folder / "2.png")
    Image.fromarray(np.full((48, 48), 40_000, dtype=np.uint16)).save(folder / "3.png")
    whole.save(folder / "4.gif", save_all=True, append_images=[whole.rotate(90)])
    (folder / "5.png").write_bytes(b"no picture")  # all of the last batch
    words = ["predict", "--data.predict", folder, "--trainer.accelerator", "cpu"]
    words += ["--data.eval_batch_size", 5, "--data.workers", workers]
    words += ["--trainer.default_root_dir", tmp_path / "run"]
    assert app.main([str(word) for word in words]) == 0
    with (tmp_path / "run" / "predict" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [*"012345"]
    assert [bool(row["error"]) for row in rows] == [False, True, False, False, False, True]
    assert "1.jpg" in rows[1]["error"]
    assert "no image" in rows[5]["error"]
    told = [text for text in caplog.messages if "of 6 items of predict were skipped" in text]
    assert len(told) == 2  # at the end of the images, and of the run
    assert "1.jpg" in told[0]
    assert "5.png" in told[1]


def test_a_prediction_of_a_pair_scores_what_can_be_read_alone(tmp_path):
    given = [(scene(5, 0).image, TEXTS[0]), (str(tmp_path / "none.png"), TEXTS[1])]
    data = FilipDataModule.from_pairs(given[:1], test=given, image_size=48, tokenizer=TOKENIZER)
    [batch] = data.predict_dataloader()
    made = module().eval()
    made.model.set_vocabulary(TOKENIZER)
    first, second = made.predict_step(batch, 0)
    assert isinstance(first["s_i2t"], float)
    assert first["error"] == ""
    assert (second["s_i2t"], second["s_t2i"]) == ("", "")
    assert second["caption"] == TEXTS[1]
    assert "none.png" in second["error"]
    strict = FilipDataModule.from_pairs(
        given[:1], test=given, image_size=48, tokenizer=TOKENIZER, on_bad_item="raise"
    )
    with pytest.raises(UserError, match=r"none\.png"):
        list(strict.predict_dataloader())


def test_a_decompression_bomb_names_the_option(tmp_path, capsys, monkeypatch):
    Image.fromarray(scene(0, 0).image).resize((60, 60)).save(tmp_path / "x.png")
    tiny().save_pretrained(tmp_path / "model")
    words = ["align", "--ckpt", tmp_path / "model", "--image", tmp_path / "x.png"]
    words += ["--text", "a ring", "--out", tmp_path / "a.png"]
    line = fails(capsys, *words, "--max-pixels", 3599)
    assert "its 60x60 pixels are above the limit max_pixels 3599" in line
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL refuses twice as many
    assert "max_pixels" in fails(capsys, *words)
    assert app.main([*map(str, words), "--max-pixels", "3600"]) == 0


# ---- duplicate captions


class Kept(Callback):
    """Batches, what the towers make of them before the step, and losses."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []
        self.losses: list[float] = []

    @torch.no_grad()
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((batch, pl_module.model(batch.image, batch.ids)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def test_duplicate_captions_share_the_target_and_are_counted(tmp_path, caplog):
    texts = ["a red ring", "a blue ring", "a  Red ring", "a green cross"]
    kept = Kept()
    fit(module(), tmp_path, memory(texts, multi_positive="text", batch_size=4), kept)
    [(batch, out)], [loss] = kept.seen, kept.losses
    said = [" ".join(text.lower().split()) for text in batch.captions]
    same = torch.tensor([[float(a == b) for a in said] for b in said]).double()
    assert same.sum() == 6
    i2t, t2i = late_interaction(
        *(side.normalized().double() for side in out[:2]), None, out.text.mask, impl="naive"
    )
    wanted = 0.0
    for z in (i2t * out.logit_scale.exp(), t2i.T * out.logit_scale.exp()):
        wanted -= (same / same.sum(1, keepdim=True) * z.log_softmax(1)).sum().item() / 4 / 2
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert "1 captions were in their batch twice" in caplog.text
    assert "see multi_positive" not in caplog.text


# ---- small batches


def test_the_rest_of_an_epoch_is_dropped_and_few_pairs_warn(tmp_path, caplog):
    kept = Kept()
    fit(module(), tmp_path / "a", memory(TEXTS * 5), kept, epochs=2)
    assert [len(batch) for batch, _ in kept.seen] == [8] * 4  # of 20
    assert "contrast little" not in caplog.text
    kept = Kept()
    fit(module(), tmp_path / "b", memory(TEXTS[:1], batch_size=64), kept)
    assert kept.losses == [0.0]
    assert "1 pairs in a batch contrast little: use 8 or more" in caplog.text


# ---- shards


def test_fewer_shards_than_workers_end_the_command_at_once(tmp_path, capsys):
    pairs = pairs_in_memory([(scene(5, n).image, TEXTS[n % 4]) for n in range(8)])
    write_shards(pairs, tmp_path, per_shard=4)
    words = ["fit", "--data.source", "webdataset", "--data.root", tmp_path, "--data.workers", 3]
    words += ["--data.image_size", 48, "--data.context_length", 24, "--data.batch_size", 2]
    words += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", tmp_path / "run"]
    line = fails(capsys, *words)
    assert "2 shards cannot feed 3 loading processes on 1 ranks: use at most 2 workers" in line


# ---- float16 and losses that are not finite


class Overflow(Callback):
    """Gradients, or the temperature and so the loss, that are not finite in some steps."""

    def __init__(self, good: Sequence[int], of_loss: bool) -> None:
        self.good, self.of_loss, self.scales = good, of_loss, []
        self.step = -1

    def on_train_start(self, trainer, pl_module):
        pl_module.model.visual.proj.register_hook(
            lambda grad: grad if self.of_loss or self.step in self.good else grad * torch.inf
        )

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step += 1
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        if self.of_loss and self.step not in self.good:
            batch.image.fill_(torch.inf)


def scaled() -> MixedPrecision:
    """Float16 with a scaler, which Lightning gives to GPUs alone."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("of_loss", [False, True], ids=["gradient", "loss"])
def test_skipped_steps_in_a_row_stop_a_float16_run_with_advice(tmp_path, monkeypatch, of_loss):
    assert StopOnSkips().most == 20
    most, good = 7, 2
    monkeypatch.setattr("filip_vl.module.StopOnSkips", partial(StopOnSkips, most))
    made, overflow = module(fields=SHALLOW), Overflow([good], of_loss)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    data = FilipDataModule(batch_size=2, train_size=80, val_size=2, test_size=2)
    told = "7 steps in a row were skipped.*: raise weight_decay, lower the rate.* bf16-mixed"
    with pytest.raises(UserError, match=told):
        fit(made, tmp_path, data, overflow, plugins=[scaled()])
    assert overflow.step == good + most
    assert overflow.scales[good] == overflow.scales[good + 1] == overflow.scales[0] / 2**good
    assert overflow.scales[-1] == overflow.scales[good + 1] / 2 ** (most - 1)
    moved = [n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])]
    assert "visual.proj" in moved
    assert all(p.isfinite().all() for p in made.model.parameters())


def test_skips_are_of_steps_where_gradients_gather_over_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("filip_vl.module.StopOnSkips", partial(StopOnSkips, 5))
    overflow = Overflow([], of_loss=True)
    data = FilipDataModule(batch_size=2, train_size=22, val_size=2, test_size=2)
    options = {"plugins": [scaled()], "accumulate_grad_batches": 2}
    with pytest.raises(UserError, match="5 steps in a row were skipped"):
        fit(module(fields=SHALLOW), tmp_path, data, overflow, **options)
    assert overflow.step == 9


def test_without_a_scaler_the_first_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("filip_vl.module._LOOK", 1 << 30)
    made = module()
    steps = Kept()

    class Broken(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                batch.image.fill_(torch.inf)

    with pytest.raises(UserError, match="the loss is not finite: raise weight_decay"):
        fit(made, tmp_path, memory(TEXTS * 6), steps, Broken())
    assert len(steps.losses) == 1
    assert all(p.isfinite().all() for p in made.model.parameters())


# ---- the temperature at its bound


def test_a_temperature_at_its_bound_for_1000_steps_is_told_once(tmp_path, caplog):
    made = module()
    with torch.no_grad():
        made.model.logit_scale.fill_(math.log(100))
    made.model.logit_scale.register_hook(lambda grad: torch.full_like(grad, -1.0))  # it grows
    made.held = 997
    with caplog.at_level(logging.WARNING):
        fit(made, tmp_path, memory(TEXTS * 4), limit_train_batches=2)
        assert "temperature" not in caplog.text
        made.held = 998
        fit(made, tmp_path / "again", memory(TEXTS * 4), epochs=2)
    assert caplog.text.count("the temperature was at its bound, 0.01, for 1000 steps") == 1
    assert made.held == 1002


# ---- a share of less than a token


@pytest.mark.parametrize("impl", ["naive", "tiled"])
def test_a_share_of_less_than_a_token_keeps_the_best_one(impl):
    v, t = tokens(0, 3, 4), tokens(1, 3, 5)
    a, b = (x / x.norm(dim=2, keepdim=True) for x in (v, t))
    s = torch.einsum("ind,jmd->ijnm", a, b)
    rows = torch.arange(3)
    best = a[rows, s.amax((1, 3)).argmax(1)], b[rows, s.amax((0, 2)).argmax(1)]
    z = 5 * best[0] @ best[1].T  # of one token a side
    wanted = (F.cross_entropy(z, rows) + F.cross_entropy(z.T, rows)) / 2
    found = FilipLoss(1e-3, impl=impl)(v, t, math.log(5.0))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-10)


# ---- more than 256 places


def test_more_than_256_places_take_two_bytes_and_more_than_32768_four():
    kinds = [place_type(n) for n in (1, 256, 257, 1 << 15, (1 << 15) + 1)]
    assert kinds == [torch.uint8, torch.uint8, torch.int16, torch.int16, torch.int32]


# ---- devices without the kernels


class Elsewhere(Tensor):
    """A tensor that says to be on a GPU, to see what would be chosen there."""

    where = "cuda"

    @property
    def device(self) -> torch.device:
        return torch.device(self.where)


@pytest.mark.parametrize(
    ("where", "there", "fused"),
    [("cuda", True, True), ("cuda", False, False), ("mps", True, False), ("cpu", True, False)],
)
def test_auto_takes_the_kernels_on_cuda_with_triton_alone(where, there, fused, monkeypatch):
    monkeypatch.setattr(Elsewhere, "where", where)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    monkeypatch.setattr(late, "kernels_agree", lambda *args: True)  # which would run them
    v, t = torch.rand(2, 3, 4).as_subclass(Elsewhere), torch.rand(2, 3, 4).as_subclass(Elsewhere)
    assert (late._form("auto", v, t) is late.late_interaction_fused) == fused
    assert late._form("triton", v, t) is late.late_interaction_fused


def test_a_command_that_asks_for_the_kernels_on_a_cpu_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = ["fit", "--model.impl", "triton", "--data.train_size", 8, "--data.batch_size", 8]
    words += ["--data.val_size", 8, "--trainer.val_check_interval", 1.0, *QUIET]
    line = fails(capsys, *words, "--trainer.default_root_dir", tmp_path / "run")
    assert "impl='auto'" in line
