"""FilipModule in short runs: what is trained, kept, scored and told."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

import filip_vl
import tenfold.contrastive
from filip_vl.data import FilipDataModule
from filip_vl.model import FilipModel
from filip_vl.module import FilipModule, load_model
from filip_vl.tokenizers import WordTokenizer
from tenfold.comparing import differences
from tenfold.errors import UserError
from tenfold.runs import make_trainer
from tenfold.training import LAST


def pairs(**options: object) -> FilipDataModule:
    usual = {"batch_size": 8, "train_size": 16, "val_size": 12, "test_size": 12}
    return FilipDataModule(**{**usual, **options})


def module(model: str = "filip_tiny", **options: object) -> FilipModule:
    torch.manual_seed(0)
    return FilipModule(model, **{"lr": 1e-3, "warmup": 1, **options})


def fit(made: FilipModule, folder: Path, *callbacks: Callback, data=None, epochs=1, **options):
    usual = {"accelerator": "cpu", "progress": False, "logger": False}
    usual |= {"default_root_dir": folder, "limit_val_batches": 0}
    trainer = make_trainer(folder, epochs=epochs, callbacks=callbacks, **{**usual, **options})
    trainer.fit(made, datamodule=data or pairs())
    return trainer


def test_sizes_that_do_not_fit_are_told_together(tmp_path):
    told = "captions of up to 40 ids .* of 24; images of 64 pixels, and a model of 48: "
    with pytest.raises(UserError, match=told) as error:
        fit(module(), tmp_path, data=pairs(context_length=40, image_size=64))
    assert str(error.value).endswith(": give --data.context_length 24 --data.image_size 48")


def test_towers_that_encode_in_parts_have_the_same_gradient():
    data = pairs()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    found = []
    for size in (None, 3, 8):
        made = module(tower_batch=size).train()
        made.model.set_vocabulary(data.tokenizer)
        out = made(batch)
        made.loss(out.image.tokens, out.text.tokens, out.logit_scale, out.image.mask,
                  out.text.mask).backward()  # fmt: skip
        found.append({name: p.grad for name, p in made.named_parameters()})
    assert differences(found[1], found[0], 1e-5) == ""
    assert differences(found[2], found[0], 1e-5) == ""


@pytest.mark.parametrize("name", ["filip_tiny", "clip_tiny"])
def test_a_run_opens_again_as_a_model(tmp_path, name):
    made = module(name)
    fit(made, tmp_path)
    made.eval()
    pixels, captions = torch.rand(2, 3, 48, 48), ["a red ring", "a blue square and a red ring"]
    for path in (tmp_path, tmp_path / LAST):
        model = load_model(path)
        assert not model.training
        for ours, theirs in (
            (model.encode_image(pixels), made.model.encode_image(pixels)),
            (model.encode_text(captions), made.model.encode_text(captions)),
        ):
            assert torch.equal(ours.tokens, theirs.tokens)
    made.model.save_pretrained(tmp_path / "folder")
    again = load_model(tmp_path / "folder")
    assert torch.equal(again.encode_text(captions).tokens, model.encode_text(captions).tokens)


def test_training_goes_on_from_a_model_folder(tmp_path):
    first = module()
    fit(first, tmp_path / "a")
    first.model.save_pretrained(tmp_path / "folder")
    made = FilipModule(str(tmp_path / "folder"), lr=1e-3)
    assert differences(made.model.state_dict(), first.model.state_dict()) == ""
    assert made.model.training
    with pytest.raises(UserError, match=r"a run, no model folder.*filip-vl export RUN"):
        FilipModule(str(tmp_path / "a"))
    with pytest.raises(UserError, match=r"fields already: embed_dim \(--model\.fields\)"):
        FilipModule(str(tmp_path / "folder"), {"embed_dim": 8, "image_size": 64})
    fit(made, tmp_path / "b")
    assert differences(made.model.state_dict(), first.model.state_dict()) != ""


class Tokens(Callback):
    """What validation sees."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
        image, text = pl_module.model(batch.image, batch.ids)[:2]
        for row, words in enumerate(text.normalized()):
            self.pairs.append((image.normalized()[row], words[text.mask[row]], batch.image_id[row]))


def test_validation_is_retrieval_among_all_pairs(tmp_path):
    seen = Tokens()
    trainer = fit(module(), tmp_path, seen, limit_val_batches=1.0)
    assert len(seen.pairs) == 12
    i2t = torch.tensor(
        [[(v @ t.T).amax(1).mean() for _, t, _ in seen.pairs] for v, _, _ in seen.pairs]
    )
    t2i = torch.tensor(
        [[(v @ t.T).amax(0).mean() for _, t, _ in seen.pairs] for v, _, _ in seen.pairs]
    )
    for name, z in (("i2t", i2t), ("t2i", t2i.T)):
        ranks = 1 + (z > z.diagonal()[:, None]).sum(1)
        for k in (1, 5, 10):
            wanted = (ranks <= k).double().mean().item()
            found = trainer.callback_metrics[f"val/{name}_r{k}"].item()
            assert found == pytest.approx(wanted)


def test_the_temperature_stays_in_its_bounds_and_that_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("filip_vl.module._PATIENCE", 3)
    made = module()
    with torch.no_grad():
        made.model.logit_scale.fill_(math.log(100))
    made.model.logit_scale.register_hook(lambda grad: torch.full_like(grad, -1.0))  # it grows
    fit(made, tmp_path, epochs=2)
    assert made.model.logit_scale.item() <= math.log(100) + 1e-6
    assert "the temperature was at its bound, 0.01, for 3 steps" in caplog.text


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    made = module()
    with torch.no_grad():
        made.model.visual.proj.fill_(torch.nan)
    made.model.check_finite = False
    with pytest.raises((UserError, FloatingPointError)):
        fit(made, tmp_path)


def test_a_selection_of_few_tokens_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        fit(module(token_fraction=0.2), tmp_path, limit_train_batches=1)
        fit(module(token_fraction=0.5, fields={"learned_tokens": 8}), tmp_path / "learned",
            limit_train_batches=1)  # fmt: skip
    assert "token_fraction 0.2 keeps 7 image tokens and 4 words" in caplog.text
    assert "token_fraction 0.5 keeps 4 image tokens and 12 words" in caplog.text


def test_a_selection_is_a_share_of_the_context_however_short_the_captions(tmp_path):
    picture = np.zeros((48, 48, 3), np.uint8)
    data = FilipDataModule.from_pairs(
        [(picture, "a dog"), (picture, "two cats")], image_size=48, context_length=24, batch_size=2
    )
    made, seen = module(token_fraction=0.25), []
    made.loss.register_forward_hook(lambda _, given, __: seen.append(given))
    fit(made, tmp_path, data=data)
    [(_, tokens, _, _, mask, _)] = seen
    assert tokens.shape[1] == 8  # as the batch was cropped
    assert mask.shape == (2, 24)  # whose quarter is six words, more than the captions have


def test_the_learning_rate_grows_with_the_batch(tmp_path):
    made = module(lr=None, base_lr=1e-3, warmup=0)
    trainer = fit(made, tmp_path, limit_train_batches=1)
    [group, *_] = trainer.optimizers[0].param_groups
    assert group["initial_lr"] == pytest.approx(1e-3 * math.sqrt(8 / 512))


def test_a_run_without_an_end_has_no_cosine(tmp_path):
    with pytest.raises(UserError, match="give max_epochs or max_steps"):
        fit(module(), tmp_path, epochs=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e-3, "base_lr": 1e-3}, "give one of them"),
        ({"tower_batch": 0}, "tower_batch must be 1 or more"),
        ({"model": "nowhere"}, "no such model: nowhere"),
        ({"token_fraction": 2.0}, "token_fraction"),
        ({"fields": {"width": 3}}, "width"),
    ],
)
def test_what_does_not_fit_is_told(options, message):
    with pytest.raises(UserError, match=message):
        FilipModule(**options)


def test_another_vocabulary_is_refused_where_weights_are_there(tmp_path):
    tokenizer = WordTokenizer.train(["a dog", "two cats"])
    FilipModel.from_config("filip_tiny", tokenizer=tokenizer).save_pretrained(tmp_path / "folder")
    made = FilipModule(str(tmp_path / "folder"), lr=1e-3)
    with pytest.raises(UserError, match=r"the data have 27 ids, the model \d+.*--data.tokenizer"):
        fit(made, tmp_path / "run")


def test_what_is_no_checkpoint_is_told(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of filip-vl"):
        load_model(tmp_path / "other.ckpt")


def test_the_public_names_are_there_at_the_top():
    for name in filip_vl.__all__:
        assert name in dir(filip_vl)
        assert getattr(filip_vl, name) is not None
    assert filip_vl.FilipModule is FilipModule
    assert filip_vl.late_interaction is tenfold.contrastive.late_interaction
