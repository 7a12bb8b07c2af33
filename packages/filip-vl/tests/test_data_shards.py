"""Training on shards: every sample, in an order that is a function of its keys."""

import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from filip_vl.data import (
    FilipDataModule,
    PairBatch,
    expand_shards,
    pairs_in_memory,
    read_shards,
    read_source,
    write_shards,
)
from filip_vl.data.batches import PairItem
from filip_vl.data.shards import count_samples
from filip_vl.data.streaming import ShardStream
from filip_vl.tokenizers import WordTokenizer
from tenfold.data import EpochSampler
from tenfold.errors import UserError


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (number % 256, number // 256, 7))


def sample(number: int) -> tuple[Image.Image, str]:
    return picture(number), f"text {number}"


def write(folder: Path, count: int = 24, per_shard: int = 4, stem: str = "train") -> list[str]:
    pairs = pairs_in_memory([sample(n) for n in range(count)])
    return [str(path) for path in write_shards(pairs, folder, stem, per_shard)]


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def data_of(root: Path, **options: object) -> FilipDataModule:
    given = {"image_size": 16, "augment": "none", "batch_size": 4, **options}
    return FilipDataModule("webdataset", str(root), **given)


def batches_of(data: FilipDataModule, epoch: int = 0, skip: int = 0) -> list[PairBatch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    if skip:
        loader.start = lambda: skip
    batches = list(loader)
    loader.close()
    return batches


def numbers(batches: list[PairBatch]) -> list[list[int]]:
    """Of the samples; the pictures agree with the texts."""
    found = []
    for batch in batches:
        found.append([int(text.split()[1]) for text in batch.captions])
        mean, std = 0.48145466, 0.26862954
        red = ((batch.image[:, 0, 0, 0] * std + mean) * 255).round().long()
        assert red.tolist() == found[-1]
    return found


# ---- names


def test_ranges_lists_and_wild_cards(tmp_path):
    names = [f"{n:05d}.tar" for n in range(12)]
    for name in names:
        (tmp_path / name).touch()
    wanted = [str(tmp_path / name) for name in names]
    assert expand_shards("{00000..00011}.tar", tmp_path) == wanted
    assert expand_shards(f"{tmp_path}/{{00000..00009}}.tar::{tmp_path}/0001*.tar") == wanted
    assert expand_shards("0000{1,3}.tar", tmp_path) == [wanted[1], wanted[3]]
    assert expand_shards(names[:2], tmp_path) == wanted[:2]
    remote = ["https://example.org/a/00001.tar", "pipe:cat x.tar"]
    assert expand_shards(remote, tmp_path) == remote
    for absent in ("{00000..00012}.tar", "b*.tar"):
        with pytest.raises(UserError, match="no such shard"):
            expand_shards(absent, tmp_path)


def test_shards_are_looked_for_in_the_root_then_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("root").mkdir()
    for name in ("0.tar", "1.tar", "root/1.tar"):
        Path(name).touch()
    assert expand_shards("{0..1}.tar", Path("root")) == ["0.tar", "root/1.tar"]
    assert expand_shards("[01].tar", Path("root")) == ["root/1.tar"]
    with pytest.raises(UserError, match=r"no such shard \(root/2.tar or 2.tar\)"):
        expand_shards("{0..2}.tar", Path("root"))


# ---- the map


def test_shards_are_read_by_place(tmp_path):
    shards = write(tmp_path, 10)
    pairs = read_shards(shards)
    assert [list(record.captions) for record in pairs] == [[f"text {n}"] for n in range(10)]
    for number in (9, 0, 5):
        assert np.array_equal(read_source(pairs[number].image), picture(number))
    assert pairs[5].key == "train-00001.tar/train00000005"
    again = (each for shard in shards for each in webdataset.WebDataset(shard, shardshuffle=False))
    assert [each["txt"].decode() for each in again] == [f"text {n}" for n in range(10)]


def test_members_of_a_sample(tmp_path):
    members = {
        "a/0.seg.png": png(50),
        "a/0.png": png(0),
        "a/0.txt": b" a text\n",
        "a/1.JPG": png(1),
        "a/1.json": json.dumps({"caption": "of json", "width": 3}).encode(),
        "2.webp": png(2),
        "2.txt": b"not this",
        "2.json": json.dumps({"captions": ["one", "two"], "caption": "nor this"}).encode(),
        "3.txt": b"no image",
        "4.jpeg": png(4),
        "5.png": png(5),
        "5.txt": b"both",
        "5.json": json.dumps({"caption": "not this", "key": "5"}).encode(),
    }
    file = write_tar(tmp_path / "train.tar", members)
    pairs = read_shards([str(file)])
    texts = [["a text"], ["of json"], ["one", "two"], [], ["both"]]
    assert [list(record.captions) for record in pairs] == texts
    assert np.array_equal(read_source(pairs[0].image), picture(0))
    assert count_samples([str(file)]) == [5]
    data = data_of(tmp_path, batch_size=8, train_size=8)
    [batch] = batches_of(data)
    assert set(batch.captions) <= {"a text", "of json", "one", "two", "both"}
    assert data.bad_items["train"].blank > 0


def test_several_captions_are_written_and_read(tmp_path):
    pairs = pairs_in_memory([(np.full((9, 9, 3), 3, np.uint8), ["one", "two"])])
    [shard] = write_shards(pairs, tmp_path)
    [record] = read_shards([str(shard)])
    assert list(record.captions) == ["one", "two"]
    assert read_source(record.image).size == (9, 9)


def test_sizes_are_taken_from_files_beside(tmp_path):
    shards = write(tmp_path, 10)
    assert json.loads((tmp_path / "sizes.json").read_text())["train-00002.tar"] == 2
    (tmp_path / "sizes.json").write_text('{"train-00000.tar": 77}')
    (tmp_path / "train-00001_stats.json").write_text('{"successes": 88, "count": 99}')
    assert count_samples(shards) == [77, 88, 2]
    with pytest.raises(UserError, match="--data\\.train_size"):
        count_samples(["https://example.org/0.tar"])


# ---- the stream


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_meets_every_sample(tmp_path, workers):
    write(tmp_path)
    first = numbers(batches_of(data_of(tmp_path, workers=workers)))
    assert sorted(itertools.chain(*first)) == list(range(24))
    second = numbers(batches_of(data_of(tmp_path, workers=workers), epoch=1))
    assert sorted(itertools.chain(*second)) == list(range(24))
    assert first != second
    assert first == numbers(batches_of(data_of(tmp_path, workers=workers)))
    assert first != numbers(batches_of(data_of(tmp_path, workers=workers, seed=1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_where_it_stopped(tmp_path, workers):
    write(tmp_path)
    options = {"workers": workers, "augment": "paper"}
    whole = batches_of(data_of(tmp_path, **options))
    for done in (1, 2, 5):
        rest = batches_of(data_of(tmp_path, **options), skip=done)
        for batch, wanted in zip(rest, whole[done:], strict=True):
            assert batch.captions == wanted.captions
            assert torch.equal(batch.image, wanted.image)


def test_another_number_of_streams_cannot_resume(tmp_path):
    write(tmp_path)
    state = data_of(tmp_path, workers=2).train_dataloader().state_dict()
    assert state["streams"] == 2
    with pytest.raises(UserError, match="streams 2 -> 1"):
        data_of(tmp_path, workers=1).train_dataloader().load_state_dict(state)


def item_of(record: object, draw: object, image_id: int) -> PairItem:
    return PairItem(torch.zeros(3, 1, 1), list(record.captions), image_id, image_id)


def streamed(shards: list[str], rank: int, ranks: int, streams: int, **options: object) -> list:
    """Samples of one rank."""
    size = options.pop("size", 24)
    made = [
        ShardStream(
            shards, [4] * 6, size, item_of, batch_size=2, streams=streams, ranks=ranks, **options
        )
        for _ in range(streams)  # one for every loading process
    ]
    sampler = EpochSampler(size, replicas=ranks, rank=rank, shuffle=False)
    seen = []
    for number, draws in enumerate(zip(*[iter(sampler)] * 2, strict=False)):
        items, bad = made[number % streams].fetch(draws)
        assert not bad
        seen += [item.index for item in items]
    return seen


@pytest.mark.parametrize(("ranks", "streams"), [(1, 1), (2, 1), (2, 3), (3, 2), (6, 1)])
def test_ranks_and_workers_share_the_samples(tmp_path, ranks, streams):
    shards = write(tmp_path)
    seen = [streamed(shards, rank, ranks, streams) for rank in range(ranks)]
    assert sorted(itertools.chain(*seen)) == list(range(24))
    for rank in seen:
        assert len({index // 4 for index in rank}) == 6 // ranks  # whole shards


def test_samples_are_mixed_across_shards_in_the_buffer(tmp_path):
    shards = write(tmp_path)
    mixed = streamed(shards, 0, 1, 1)
    assert len({index // 4 for index in mixed[:8]}) > 2
    plain = streamed(shards, 0, 1, 1, buffer=(1, 1))
    assert [index % 4 for index in plain] == [0, 1, 2, 3] * 6
    assert [index // 4 for index in plain[::4]] != list(range(6))


def test_a_stream_that_ends_begins_again(tmp_path):
    shards = write(tmp_path)
    seen = streamed(shards, 0, 1, 1, size=60)
    assert set(Counter(seen[:48]).values()) == {2}
    assert seen[:24] != seen[24:48]


def test_fewer_shards_than_workers_and_ranks_is_an_error(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="6 shards cannot feed 7 loading processes on 1 ranks"):
        data_of(tmp_path, workers=7).train_dataloader()
    shards = [str(tmp_path / f"train-{n:05d}.tar") for n in range(6)]
    with pytest.raises(UserError, match="use at most 3 workers, or write the data to more"):
        ShardStream(shards, None, 24, item_of, streams=4, ranks=2)
    with pytest.raises(UserError, match="use fewer ranks"):
        ShardStream(shards, None, 24, item_of, ranks=8)


# ---- what is broken


def broken_shards(folder: Path) -> None:
    """Shard 1 has a broken image, an empty caption, a broken JSON and a caption of other bytes."""
    members: dict[str, bytes] = {}
    for n in range(8):
        members[f"{n}.png"] = b"no picture" if n == 2 else png(n)
        members[f"{n}.txt"] = b" " if n == 3 else b"\xff" if n == 5 else b"text %d" % n
        if n == 4:
            members[f"{n}.json"] = b"{"
    write_tar(folder / "train-00001.tar", members)


def test_broken_samples_are_skipped_and_counted(tmp_path, caplog):
    broken_shards(tmp_path)
    data = data_of(tmp_path, max_bad_fraction=0.5)
    first, second = numbers(batches_of(data))
    assert len(first) == len(second) == 4
    assert set(first + second) == {0, 1, 6, 7}
    reasons = data.bad_items["train"].reasons
    assert sorted(reasons) == [2, 4, 5]
    assert "no image" in reasons[2]
    assert "train-00001.tar/4" in reasons[4]
    assert data.bad_items["train"].blank == 2  # the stream went round twice
    assert "3 of 8 items of train were skipped as unusable" in caplog.text
    assert "2 empty captions of train were dropped" in caplog.text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "of the 8 items of train are unusable, more than the share 0.01"),
        ({"on_bad_item": "raise", "max_bad_fraction": 1.0}, "of train cannot be used"),
        ({"strict": True, "max_bad_fraction": 1.0}, r"empty caption \(.*train-00001.tar/3\)"),
    ],
)
def test_broken_samples_stop_the_run(tmp_path, options, told):
    broken_shards(tmp_path)
    with pytest.raises(UserError, match=told):
        batches_of(data_of(tmp_path, **options))


def test_nothing_usable_is_an_error_and_no_hang(tmp_path):
    write_tar(tmp_path / "train.tar", {"0.png": png(0), "0.txt": b""})
    with pytest.raises(UserError, match="none of the samples that one loading process reads"):
        batches_of(data_of(tmp_path, batch_size=1, tokenizer=tokenizer()))


def tokenizer() -> WordTokenizer:
    return WordTokenizer.train(["text 0 1 2 3"])


@pytest.mark.parametrize("where", [100, 700])  # of a header, of an image
def test_a_truncated_shard(tmp_path, where):
    shards = write(tmp_path, 24, 12)
    whole = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(whole[: 8 * 1024 + where])
    with pytest.raises(UserError, match=r"damaged tar file.*train-00001.tar"):
        read_shards(shards)
    data = data_of(tmp_path, max_bad_fraction=0.5, tokenizer=tokenizer(), batch_size=24)
    found = set(itertools.chain(*numbers(batches_of(data))))
    assert found == set(range(16))
    [reason] = data.bad_items["train"].reasons.values()
    assert reason.startswith(f"{shards[1]}: ")


def test_a_file_that_is_no_shard(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match="not an uncompressed tar file"):
        data_of(tmp_path, tokenizer=tokenizer()).train_dataloader()


def test_evaluation_reads_shards_in_order(tmp_path):
    write(tmp_path, 6)
    write(tmp_path, 7, 3, "val")
    data = data_of(tmp_path)
    data.setup("fit")
    found = numbers(list(data.val_dataloader()))
    assert found == [[0, 1, 2, 3], [4, 5, 6]]
    assert data.tokenizer.words[0] == "text"


def test_shards_of_a_pattern_elsewhere(tmp_path):
    write(tmp_path / "deep", 8, 2)
    data = data_of(tmp_path, train="deep/train-{00000..00002}.tar")
    found = list(itertools.chain(*numbers(batches_of(data))))
    assert len(found) == 4  # one full batch of six samples
    assert set(found) < set(range(6))
