"""Batches are functions of their keys; every kind of bad input is told."""

import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from filip_vl.data import (
    FilipDataModule,
    PairBatch,
    eval_transform,
    pairs_in_memory,
    positives,
    read_source,
    train_transform,
    write_shards,
)
from filip_vl.data.batches import DrawCaption
from filip_vl.data.transforms import CLIP_MEAN, CLIP_STD
from filip_vl.synthetic import TEST_SEED, TRAIN_SEED, scene
from filip_vl.tokenizers import WordTokenizer
from tenfold.data import Draw
from tenfold.errors import UserError
from tenfold.training import Resumable

MEAN, STD = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))


def picture(number: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    generator = np.random.default_rng(number)
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def eight_bits(pixels: Tensor) -> Tensor:
    """0..255 of normalised pixels, which must be whole numbers of 255ths."""
    scaled = (pixels * STD + MEAN).double() * 255
    assert (scaled - scaled.round()).abs().max() < 1e-3
    return scaled.round().to(torch.uint8)


def pixels_of(image: object) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pairs(count: int, captions: int = 1) -> list[tuple[Image.Image, list[str]]]:
    return [(picture(n), [f"picture {n} text {m}" for m in range(captions)]) for n in range(count)]


def memory(*args: object, **options: object) -> FilipDataModule:
    wanted = {"image_size": 32, "batch_size": 8, "augment": "none", **options}
    data = FilipDataModule.from_pairs(*args, **wanted)
    data.setup()
    return data


def shapes(**options: object) -> FilipDataModule:
    data = FilipDataModule(
        **{"train_size": 20, "val_size": 3, "test_size": 5, "batch_size": 8, **options}
    )
    data.setup()
    return data


def epoch_of(data: FilipDataModule, epoch: int = 0) -> list[PairBatch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    loader.close()
    return batches


def drawn(batches: list[PairBatch]) -> dict[int, str]:
    return {
        int(index): text
        for batch in batches
        for index, text in zip(batch.index, batch.captions, strict=True)
    }


# ---- transforms


def test_evaluation_resizes_the_short_side_and_crops_the_centre():
    image = picture(0, (60, 40))
    wanted = image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    assert torch.equal(eight_bits(eval_transform(32)(image)), pixels_of(wanted))
    assert torch.equal(eight_bits(train_transform(32, "none")(image)), pixels_of(wanted))


def test_crops_have_the_shares_that_are_asked_for():
    """A ramp tells where a crop of it begins and ends."""
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    ramp = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))
    transform = train_transform(64, "crop", (0.2, 0.5))
    shares = []
    torch.manual_seed(0)
    for _ in range(200):
        crop = eight_bits(transform(ramp)).double()
        width, height = (float(crop[n].max() - crop[n].min()) + 200 / 64 for n in range(2))
        shares.append(width * height / 200**2)
        assert crop[0, :, 0].max() < crop[0, :, -1].min()  # no flip
    assert 0.17 < min(shares) < 0.25
    assert 0.45 < max(shares) < 0.56


@pytest.mark.parametrize(
    ("augment", "jitter"), [("paper", []), ("mindformers", [v2.ColorJitter(0.4, 0.4, 0.4, 0.1)])]
)
def test_training_images_go_through_the_steps_of_the_specification(augment, jitter):
    """Section 3.10, written down with torchvision's parts."""
    steps = v2.Compose(
        [
            v2.RandomResizedCrop(
                48, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
            ),
            v2.RandomHorizontalFlip(0.5),
            *jitter,
            v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
        ]
    )
    image, transform = picture(0, (90, 70)), train_transform(48, augment)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    for seed in range(5):
        torch.manual_seed(seed)
        made = transform(image)
        torch.manual_seed(seed)
        wanted = torch.from_numpy(np.array(steps(image))).permute(2, 0, 1) / 255
        torch.testing.assert_close(made, (wanted - mean) / std)


def test_augmentations_flip_half_and_change_colours():
    left = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8) * 2, (96, 1)))
    image = Image.merge("RGB", (left, left, left))
    torch.manual_seed(0)
    made = [train_transform(32, "paper")(image) for _ in range(80)]
    signs = torch.stack([(m[:, :, -4:].mean() - m[:, :, :4].mean()).sign() for m in made])
    assert 20 < int((signs < 0).sum()) < 60  # flips, and AutoAugment inverts a few
    assert all(m.shape == (3, 32, 32) for m in made)
    grey = [bool(((m * STD + MEAN).std(0) < 1e-4).all()) for m in made]
    assert all(grey)  # the policy alone brings no colour to a grey picture
    coloured = picture(0, (96, 96))
    jittered = [train_transform(32, "mindformers")(coloured).mean((1, 2)) for _ in range(20)]
    assert torch.stack(jittered).std(0).min() > 0.05


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"augment": "auto"}, "augment must be one of paper, mindformers, crop, none"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale must be two rising shares"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.2,)}, "crop_scale"),
    ],
)
def test_unknown_augmentations(options, told):
    with pytest.raises(UserError, match=told):
        train_transform(32, **options)


# ---- batches


def test_shapes_batches_are_the_generators_own():
    data = shapes(seed=4)
    batches = epoch_of(data)
    assert [len(batch) for batch in batches] == [8, 8]  # full ones alone
    for batch in batches:
        for row, index in enumerate(batch.index.tolist()):
            wanted = scene(TRAIN_SEED + 4, index)
            assert torch.equal(eight_bits(batch.image[row]), pixels_of(wanted.image))
            assert batch.captions[row] == wanted.caption
    [test] = data.test_dataloader()
    assert test.captions == [scene(TEST_SEED, n).caption for n in range(5)]
    assert [*next(iter(data.val_dataloader())).captions] != test.captions[:3]
    assert (data.image_size, data.context_length, data.tokenizer.vocab_size) == (48, 24, 27)
    assert shapes(train_size=1, seed=9).tokenizer.to_json() == data.tokenizer.to_json()


def test_ids_are_those_of_the_tokenizer_cropped_to_eights():
    texts = ["one", "one two three four five six seven eight", "two " * 40]
    data = memory([(picture(n), text) for n, text in enumerate(texts)], batch_size=3)
    [batch] = epoch_of(data)
    for text, ids in zip(batch.captions, batch.ids, strict=True):
        words = ["<s>", *text.split(), "<e>"]
        assert int((ids != 0).sum()) == len(words)
    assert batch.ids.shape == (3, 48)  # 42 rounded up
    whole, _ = data.tokenizer.encode(batch.captions, 77)
    assert torch.equal(whole[:, :48], batch.ids)
    assert not whole[:, 48:].any()
    short = memory([(picture(0), texts[1])] * 3, batch_size=3, context_length=9)
    [batch] = epoch_of(short)
    assert batch.ids.shape == (3, 9)
    assert batch.truncated == 3
    assert (batch.ids[:, -1] == short.tokenizer.end_id).all()


def test_every_caption_is_drawn_as_often_as_any_other():
    draws = Counter(
        DrawCaption(1)(["a", "b", "c"], Draw(epoch, index))[0]
        for epoch in range(30)
        for index in range(100)
    )
    chi2 = sum((count - 1000) ** 2 / 1000 for count in draws.values())
    assert chi2 < 2 + 4 * 2  # two degrees of freedom, four standard deviations
    together = Counter(
        (DrawCaption(1)("ab", Draw(0, n))[0], DrawCaption(1)("ab", Draw(1, n))[0])
        for n in range(1000)
    )
    assert min(together.values()) > 200  # epochs are independent


def test_items_depend_on_seed_epoch_and_index_alone():
    def seen(epoch: int = 0, **options: object) -> tuple[dict[int, str], Tensor]:
        data = memory(pairs(12, 3), **{"augment": "paper", "batch_size": 12, **options})
        batches = epoch_of(data, epoch)
        index = torch.cat([batch.index for batch in batches])
        return drawn(batches), torch.cat([b.image for b in batches])[index.argsort()]

    texts, image = seen()
    for other in ({"batch_size": 3}, {"batch_size": 6, "workers": 2}):
        torch.manual_seed(other["batch_size"])
        again, pixels = seen(**other)
        assert again == texts
        assert torch.equal(pixels, image)
    for changed in ({"epoch": 1}, {"seed": 1}):
        again, pixels = seen(**changed)
        assert again != texts
        assert not torch.equal(pixels, image)


def test_evaluation_has_every_image_once_with_all_its_captions(tmp_path):
    for n in range(3):
        picture(n).save(tmp_path / f"{n}.png")
    rows = ["0.png\ta", "1.png\tb", "0.png\tc", "2.png\td", "0.png\te"]
    (tmp_path / "test.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    (tmp_path / "train.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    data = FilipDataModule("csv", str(tmp_path), image_size=32, eval_batch_size=2, augment="none")
    data.setup()
    first, second = data.test_dataloader()
    assert first.captions == ["a", "c", "e", "b"]
    assert first.rows.tolist() == [0, 0, 0, 1]
    assert first.caption_image_id.tolist() == [0, 0, 0, 1]
    assert first.first.tolist() == [0, 3]
    assert second.caption_image_id.tolist() == [2]
    assert second.index.tolist() == second.image_id.tolist() == [2]
    assert first.targets is None
    # training meets the rows, or every caption of every image
    assert sorted(drawn(epoch_of(data)).values()) == list("abcde")
    every = FilipDataModule(
        "csv", str(tmp_path), image_size=32, captions="all", batch_size=5, multi_positive="image"
    )
    every.setup()
    [batch] = epoch_of(every)
    assert sorted(batch.captions) == list("abcde")
    owner = dict(zip("abcde", (0, 1, 0, 2, 0), strict=True))
    wanted = [[owner[a] == owner[b] for b in batch.captions] for a in batch.captions]
    assert batch.targets.tolist() == wanted


@pytest.mark.parametrize("positive", ["none", "text", "both"])
def test_duplicate_captions(positive):
    texts = ["a cat", "a dog", "A  cat", "a cow"]
    options = {"batch_size": 4, "multi_positive": positive}
    data = memory([(picture(n), text) for n, text in enumerate(texts)], **options)
    [batch] = epoch_of(data)
    assert batch.duplicates == 1
    assert len(set(batch.text_id.tolist())) == 3
    if positive == "none":
        assert batch.targets is None
        return
    for i, one in enumerate(batch.index.tolist()):
        for j, other in enumerate(batch.index.tolist()):
            assert bool(batch.targets[i, j]) == (one == other or {one, other} == {0, 2})


def test_positives_across_ranks():
    """Two ranks with two pairs each: what one process would find in all four, in two blocks."""
    texts, images = torch.tensor([1, 2, 1, 3]), torch.tensor([7, 8, 9, 8])
    for mode, pairs in (("text", {(0, 2)}), ("image", {(1, 3)}), ("both", {(0, 2), (1, 3)})):
        blocks = [
            positives(mode, texts[mine], images[mine], texts, images)
            for mine in (slice(0, 2), slice(2, 4))
        ]
        found = {(i, j) for i, j in torch.cat(blocks).nonzero().tolist()}
        assert found == {(n, n) for n in range(4)} | pairs | {(j, i) for i, j in pairs}
    assert positives("none", texts, images, texts, images) is None


def test_images_alone_are_predicted(tmp_path):
    for n in range(3):
        picture(n).save(tmp_path / f"{n}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    data = FilipDataModule(predict=str(tmp_path), image_size=32)
    data.setup("predict")
    [batch] = data.predict_dataloader()
    assert batch.captions == []
    assert batch.ids.shape == (0, 8)
    assert batch.index.tolist() == [0, 1, 2, 3]  # one that is broken keeps its place
    assert [*data.pairs("predict").keys][3] == "broken.png"
    assert batch.errors[:3] == ["", "", ""]
    assert "no image" in batch.errors[3]
    data.on_before_batch_transfer(batch, 0)
    assert "no image" in data.bad_items["predict"].reasons[3]


def test_batches_move_and_are_pinned():
    [batch] = shapes(test_size=2).test_dataloader()
    moved = batch.to("meta")
    assert {moved.image.device.type, moved.ids.device.type, moved.rows.device.type} == {"meta"}
    assert moved.captions == batch.captions
    assert callable(batch.pin_memory)
    assert batch.to(torch.device("cpu")).image is batch.image


# ---- tokenizers


def test_tokenizers(tmp_path):
    words = WordTokenizer.train(["picture text 0 1 2"])
    assert memory(pairs(8), tokenizer=words).tokenizer is words
    learned = memory(pairs(8)).tokenizer
    assert set(learned.words) == {"picture", "text", *map(str, range(8))}
    (tmp_path / "tokenizer.json").write_text(words.to_json())
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert memory(pairs(8), tokenizer=str(name)).tokenizer.to_json() == words.to_json()
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    merges = str(tmp_path / "merges.txt")
    assert memory(pairs(8), tokenizer=merges).tokenizer.vocab_size == 516
    options = {"tokenizer": merges, "tokenizer_layout": "declip"}
    assert memory(pairs(8), **options).tokenizer.vocab_size == 517
    with pytest.raises(UserError, match="no such tokenizer"):
        assert memory(pairs(8), tokenizer="nowhere").tokenizer


def test_a_learned_tokenizer_travels_with_the_checkpoint():
    learned = memory(pairs(8))
    state = learned.state_dict()
    other = memory([(picture(0), "entirely other words")])
    other.load_state_dict(state)
    assert other.tokenizer.to_json() == learned.tokenizer.to_json()
    given = memory(pairs(8), tokenizer=WordTokenizer.train(["mine"]))
    given.load_state_dict(state)
    assert given.tokenizer.words == ("mine",)


# ---- training and resuming


class Crash(Exception):
    pass


class Recorder(LightningModule):
    """Remembers its batches, and breaks off at one of them."""

    def __init__(self, crash: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.crash = crash
        self.seen: list[tuple[list[int], list[str], float]] = []

    def training_step(self, batch: PairBatch, number: int) -> Tensor:
        if len(self.seen) == self.crash:
            raise Crash
        self.seen.append((batch.index.tolist(), batch.captions, float(batch.image.sum())))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data: FilipDataModule, folder: Path, model: Recorder, ckpt: Path | None = None) -> list:
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=7,
        accelerator="cpu",
        callbacks=[Resumable(every_n_steps=2)],
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt)
    return model.seen


def check_resuming(make: Callable[[], FilipDataModule], folder: Path) -> list:
    """A run that broke off after a save in an epoch's middle goes on as if it had not."""
    whole = fit(make(), folder / "whole", Recorder())
    with pytest.raises(Crash):
        fit(make(), folder / "part", Recorder(crash=3))
    after = fit(make(), folder / "part", Recorder(), folder / "part" / "last.ckpt")
    assert after == whole[2:]
    return whole


def test_a_run_resumes_in_the_middle_of_an_epoch(tmp_path, caplog):
    def make() -> FilipDataModule:
        texts = ["a cat", "a dog", "a very long caption"]
        given = [(picture(n), texts) for n in range(9)]
        options = {"augment": "paper", "batch_size": 2, "seed": 3, "context_length": 4}
        return memory(given, **options)

    check_resuming(make, tmp_path)
    assert "captions were cut at 4 tokens" in caplog.text
    assert "captions were in their batch twice; see multi_positive" in caplog.text
    assert "2 pairs in a batch contrast little" in caplog.text


def test_a_run_on_shards_resumes_in_the_middle_of_an_epoch(tmp_path):
    write_shards(pairs_in_memory(pairs(21)), tmp_path / "shards", per_shard=4)

    def make() -> FilipDataModule:
        root, options = str(tmp_path / "shards"), {"image_size": 16, "workers": 2}
        return FilipDataModule("webdataset", root, batch_size=5, **options)

    whole = check_resuming(make, tmp_path)  # two epochs of four batches
    assert len({text for _, texts, _ in whole[:4] for text in texts}) > 14


# ---- bad input


def images_on_disk(folder: Path) -> dict[str, bytes]:
    """Files of every mode, and broken ones."""
    image, files = picture(1, (64, 64)), {}

    def saved(name: str, picture: Image.Image, **options: object) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, name.split(".")[-1].replace("jpg", "jpeg"), **options)
        files[name] = buffer.getvalue()

    saved("rgb.png", image)
    saved("grey.png", ImageOps.grayscale(image))
    saved("cmyk.jpg", image.convert("CMYK"))
    saved("palette.png", image.convert("P"))
    saved("alpha.png", image.convert("RGBA"))
    saved("deep.png", Image.fromarray(np.full((64, 64), 40000, dtype=np.uint16)))
    frames = [picture(n, (64, 64)) for n in (2, 3)]
    saved("animated.gif", image, save_all=True, append_images=frames)
    saved("animated.webp", image, save_all=True, append_images=frames, lossless=True)
    files["truncated.jpg"] = files["cmyk.jpg"][:700]
    files["text.png"] = b"no picture"
    files["empty.png"] = b""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


BROKEN = {"truncated.jpg", "text.png", "empty.png", "missing.png"}


def disk(folder: Path, **options: object) -> FilipDataModule:
    names = [*images_on_disk(folder), "missing.png"]
    lines = [{"filename": name, "caption": f"a {name}"} for name in names]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = FilipDataModule(
        "jsonl", str(folder), **{"image_size": 32, "augment": "none", "batch_size": 12, **options}
    )
    data.setup()
    return data


def test_every_kind_of_image_is_read_and_broken_ones_are_counted(tmp_path, caplog):
    data = disk(tmp_path, max_bad_fraction=0.5, on_bad_item="skip")
    [batch] = epoch_of(data)
    assert len(batch) == 12  # usable ones stand in for the broken
    good = {f"a {name}" for name in images_on_disk(tmp_path)} - {f"a {name}" for name in BROKEN}
    assert set(batch.captions) == good
    deep = batch.image[batch.captions.index("a deep.png")]
    assert (eight_bits(deep) == 40000 // 257).all()
    moving = batch.image[batch.captions.index("a animated.webp")]
    wanted = eval_transform(32)(picture(1, (64, 64)))
    assert torch.equal(moving, wanted)
    assert len(data.bad_items["train"].reasons) == 4
    assert "4 of 12 items of train were skipped as unusable" in caplog.text


@pytest.mark.parametrize("options", [{"on_bad_item": "raise"}, {"on_bad_item": "skip"}])
def test_too_much_that_is_broken_stops_the_run(tmp_path, options):
    data = disk(tmp_path, **options)  # one of twelve is more than 1 %
    told = "items of train are unusable, more than the share 0.01: .*no image|cannot be used"
    with pytest.raises(UserError, match=told):
        epoch_of(data)


def test_a_decompression_bomb_is_refused(tmp_path):
    good = [(picture(n, (40, 40)), f"text {n}") for n in range(3)]
    picture(9, (50, 50)).save(tmp_path / "bomb.png")
    given = [*good, (str(tmp_path / "bomb.png"), "bomb")]
    options = {"batch_size": 4, "max_bad_fraction": 1.0}
    data = memory(given, max_pixels=1600, **options)
    [batch] = epoch_of(data)
    assert "bomb" not in batch.captions
    reason = data.bad_items["train"].reasons[3]
    assert "its 50x50 pixels are above the limit max_pixels 1600" in reason
    [batch] = epoch_of(memory(given, max_pixels=2500, **options))
    assert "bomb" in batch.captions


def test_the_limit_of_pixels_takes_the_place_of_pils(tmp_path, monkeypatch):
    picture(0, (50, 50)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="could be decompression bomb"):
        read_source(tmp_path / "x.png")
    assert read_source(tmp_path / "x.png", 2500).size == (50, 50)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_empty_captions(caplog):
    given = [*pairs(8), (picture(8), "  ")]
    assert len(memory(given).train_dataset()) == 8
    assert "1 of the captions of train were dropped as empty" in caplog.text
    told = r"empty caption in train \(pair of train 8\)"
    with pytest.raises(UserError, match=told):
        memory(given, strict=True).train_dataset()
    [batch] = memory(pairs(8), given, eval_batch_size=9).val_dataloader()
    assert int((batch.ids[8] != 0).sum()) == 2  # start and end, valid in evaluation


def test_a_small_batch_warns(caplog):
    caplog.set_level(logging.WARNING)
    memory(pairs(8), batch_size=8).train_dataloader()
    assert not caplog.text
    memory(pairs(8), batch_size=1).train_dataloader()
    assert "1 pairs in a batch contrast little: use 8 or more" in caplog.text


def test_images_that_are_nowhere_are_told_before_the_run(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"filename": "x/0.png", "caption": "a"}')
    data = FilipDataModule("jsonl", str(tmp_path))
    with pytest.raises(UserError, match="images are not where their list says") as error:
        data.setup("fit")
    assert str(tmp_path / "x/0.png") in str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"source": "coco"}, "source must be one of shapes, csv"),
        ({"train_size": 0}, "train_size must be at least 1"),
        ({"image_size": -1}, "image_size must be at least 1"),
        ({"context_length": 1}, "no room for start and end"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction 2.0 is no share"),
        ({"source": "csv", "root": ".", "train_size": 4}, "train_size is for generated pairs"),
        ({"source": "webdataset", "root": ".", "captions": "all"}, "shards are read in one go"),
        ({"batch_size": 0}, "batches need at least one item"),
    ],
)
def test_options_that_do_not_exist_or_do_not_go_together(options, told):
    with pytest.raises(UserError, match=told):
        FilipDataModule(**options)


def test_a_missing_split_is_told():
    data = memory(pairs(8))
    with pytest.raises(UserError, match="no test split"):
        data.test_dataloader()
    with pytest.raises(UserError, match="no predict split"):
        data.predict_dataloader()
    with pytest.raises(UserError, match="source csv needs a folder"):
        FilipDataModule("csv").setup("fit")


def test_the_command_line_knows_the_options():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FilipDataModule, "data")
    parsed = parser.parse_args(["--data.tokenizer=word", "--data.augment=crop", "--data.root=x"])
    assert (parsed.data.tokenizer, parsed.data.augment) == ("word", "crop")
    assert parser.instantiate_classes(parsed).data.image_size == 48


# ---- real data


@pytest.mark.skipif("TENFOLD_DATA" not in os.environ, reason="TENFOLD_DATA is not set")
def test_noto_emoji():
    root = Path(os.environ["TENFOLD_DATA"]) / "noto-emoji"
    data = FilipDataModule("parquet", str(root), image_size=64, augment="crop", batch_size=32)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (32, 3, 64, 64)
    assert batch.ids.shape[1] in (8, 16)
    assert "skin" in data.tokenizer.words
    known = set(data.pairs("train").texts())
    assert set(batch.captions) <= known
    first = next(iter(data.val_dataloader()))  # the test pictures serve
    assert first.captions[0] == data.pairs("test")[0].captions[0]
    wanted = read_source(data.pairs("test")[0].image)
    assert torch.equal(eight_bits(first.image[0]), pixels_of(wanted))
