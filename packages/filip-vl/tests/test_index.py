import io
import json
import logging
import os
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

import filip_vl.index.writer as writer_module
from filip_vl.data import pairs_in_memory, read_images, read_shards, shape_pairs
from filip_vl.data.shapes import shape_vocabulary
from filip_vl.index import (
    Item,
    TokenIndex,
    build_index,
    checkpoint_hash,
    image_query,
    keep_tokens,
    recall_of,
    scene_images,
    text_query,
)
from filip_vl.index.arrays import GrowingArray
from filip_vl.index.build import index_format
from filip_vl.index.compress import quantise
from filip_vl.index.items import SceneImage
from filip_vl.index.meta import IndexMeta
from filip_vl.index.search import text_to_image
from filip_vl.index.writer import IndexWriter, Rows
from filip_vl.model import FilipModel
from filip_vl.synthetic import scene
from filip_vl.tokenizers import WordTokenizer
from tenfold.contrastive import late_interaction
from tenfold.errors import UserError
from tenfold.testing import process_context

TOKENIZER = WordTokenizer.train(shape_vocabulary())
IMAGES = 100
QUERY = "a red circle and a blue ring"


def make_model(name="filip_tiny", seed=0, **options) -> FilipModel:
    torch.manual_seed(seed)
    return FilipModel.from_config(name, tokenizer=TOKENIZER, **options).eval()


@pytest.fixture(scope="module")
def model() -> FilipModel:
    return make_model()


@pytest.fixture(scope="module")
def built(model, tmp_path_factory) -> TokenIndex:
    out = tmp_path_factory.mktemp("index")
    build_index(model, scene_images(IMAGES, seed=3), out)
    return TokenIndex.open(out)


@torch.no_grad()
def tokens_of(model, images) -> torch.Tensor:
    """Normalised tokens in float64, with a preprocessing of the test's own (48 pixels already)."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)
    pixels = (torch.from_numpy(np.stack(images)).double() / 255 - mean) / std
    tokens = model.encode_image(pixels.permute(0, 3, 1, 2).float()).tokens.double()
    return tokens / tokens.square().sum(-1, keepdim=True).sqrt()


def scores_of(images, query) -> list[float]:
    """The equation, one image at a time."""
    return [float((image @ query.T).max(0).values.mean()) for image in images]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


# ---------------------------------------------------------------------------------- what is stored


def test_arrays_are_plain_numpy_files(model, built):
    tokens = np.load(built.folder / "tokens.npy", mmap_mode="r")
    offsets = np.load(built.folder / "offsets.npy")
    assert tokens.shape == (IMAGES * 36, 32)
    assert tokens.dtype == np.float16
    assert offsets.tolist() == [36 * n for n in range(IMAGES + 1)]
    truth = tokens_of(model, [scene(3, n).image for n in range(IMAGES)])
    np.testing.assert_allclose(tokens.reshape(IMAGES, 36, 32), truth, atol=2**-11)
    means = np.load(built.folder / "means.npy")
    direction = truth.mean(1) / truth.mean(1).square().sum(-1, keepdim=True).sqrt()
    np.testing.assert_allclose(means, direction, atol=1e-3)


def test_meta_and_items_tell_what_the_index_is(model, built):
    meta = json.loads((built.folder / "meta.json").read_text())
    assert meta["checkpoint"] == checkpoint_hash(model)
    assert (meta["width"], meta["dtype"], meta["token_fraction"]) == (32, "fp16", 1.0)
    assert meta["preprocessing"]["image_size"] == 48
    assert (meta["images"], meta["tokens"], meta["complete"]) == (IMAGES, 36 * IMAGES, True)
    lines = (built.folder / "items.jsonl").read_text().splitlines()
    assert json.loads(lines[17]) == {
        "key": "scene 17 of set 3",
        "scene": [3, 17],
        "size": [48, 48],
        "grid": [6, 6],
    }


def test_items_open_what_they_name(tmp_path):
    picture = Image.fromarray(scene(1, 2).image)
    file = tmp_path / "a b.png"
    picture.save(file)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(file, "x.png")
        info = tarfile.TarInfo("x.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    member = read_shards([str(tmp_path / "s.tar")]).images[0]
    for source in (str(file), file, member, SceneImage(1, 2)):
        item = replace(Item.of("key", source), size=(48, 48), grid=(6, 6))
        again = Item.from_json(item.to_json())
        assert again == item
        np.testing.assert_array_equal(np.asarray(again.open()), scene(1, 2).image)
    with pytest.raises(UserError, match="not kept"):
        Item.from_json(Item.of("key", scene(1, 2).image).to_json()).open()


def test_int8_is_within_half_a_step():
    tokens = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    tokens[7] = 0
    values, scales = quantise(tokens)
    assert values.dtype == np.int8
    step = abs(tokens).max(1, keepdims=True) / 127
    # float16 scales are off by up to 2^-11 of themselves, 127 steps away from zero
    assert (
        abs(values * scales.astype(np.float64)[:, None] - tokens) <= step * (0.5 + 127 * 2**-11)
    ).all()
    assert not values[7].any()


def test_an_int8_index_takes_half_the_room_and_finds_nearly_the_same(model, built, tmp_path):
    build_index(model, scene_images(IMAGES, seed=3), tmp_path, dtype="int8")
    small = TokenIndex.open(tmp_path)
    assert (tmp_path / "tokens.npy").stat().st_size == 128 + IMAGES * 36 * 32
    query = text_query(model, QUERY).tokens
    exact, near = built.exact(query, IMAGES), small.exact(query, IMAGES)
    scores = {hit.number: hit.score for hit in exact}
    assert all(abs(hit.score - scores[hit.number]) < 0.01 for hit in near)
    assert {hit.number for hit in near[:20]} & {hit.number for hit in exact[:10]} == {
        hit.number for hit in exact[:10]
    }


def test_kept_tokens_are_those_of_a_greedy_cover():
    torch.manual_seed(0)
    tokens = torch.nn.functional.normalize(torch.randn(3, 12, 4), dim=-1)
    tokens[1, 5] = tokens[1, 4]  # equal ones: both may be kept, none twice
    kept, places = keep_tokens(tokens, 0.5)
    assert places.shape == (3, 6)
    for image, chosen in zip(tokens.double(), places.tolist(), strict=True):
        mean = image.mean(0)
        greedy = [int((image @ mean).argmin())]
        while len(greedy) < 6:
            rest = [n for n in range(12) if n not in greedy]
            greedy.append(min(rest, key=lambda n: max(float(image[n] @ image[m]) for m in greedy)))
        assert chosen == sorted(greedy)
    torch.testing.assert_close(
        kept, torch.stack([t[p] for t, p in zip(tokens, places, strict=True)])
    )
    assert keep_tokens(tokens, 0.01)[1].shape == (3, 1)
    assert keep_tokens(tokens, 1.0)[1].tolist() == [list(range(12))] * 3


def test_a_share_of_the_tokens_keeps_their_places(model, tmp_path):
    build_index(model, scene_images(20), tmp_path, token_fraction=0.25)
    index = TokenIndex.open(tmp_path)
    positions = np.load(tmp_path / "positions.npy").reshape(20, 9)
    assert positions.dtype == np.uint8
    truth = tokens_of(model, [scene(0, n).image for n in range(20)])
    query = text_query(model, QUERY).tokens
    for hit in index.exact(query, 20):
        of_image = truth[hit.number] @ query.double().T
        kept = of_image[positions[hit.number].astype(int)]
        assert hit.score == pytest.approx(float(kept.max(0).values.mean()), abs=2e-3)
        assert hit.score <= float(of_image.max(0).values.mean()) + 2e-3
        assert set(hit.places.tolist()) <= set(positions[hit.number].tolist())


@pytest.mark.parametrize(("patches", "kind"), [(16, np.uint8), (17, np.int16)])
def test_more_than_256_places_take_two_bytes(patches, kind, tmp_path):
    model = make_model(image_size=patches * 8)
    build_index(model, scene_images(3), tmp_path, token_fraction=0.1)
    positions = np.load(tmp_path / "positions.npy")
    assert positions.dtype == kind
    assert positions.max() > 127  # a byte without a sign holds these
    assert len(positions) == 3 * (patches**2 // 10)


# ----------------------------------------------------------------------------------------- search


def test_search_is_the_equation(model, built):
    truth = tokens_of(model, [scene(3, n).image for n in range(IMAGES)])
    query = text_query(model, QUERY).tokens
    scores = scores_of(truth, query.double())
    order = sorted(range(IMAGES), key=lambda n: -scores[n])
    for hits in (built.exact(query, 10), built.search(query, 10, candidates=1000)):
        assert [hit.number for hit in hits] == order[:10]
        for hit in hits:
            assert hit.score == pytest.approx(scores[hit.number], abs=1e-3)
            assert hit.score == pytest.approx(float(hit.similarities.mean()), abs=1e-5)
            of_image = truth[hit.number] @ query.double().T
            chosen = of_image[hit.places, range(len(query))]
            np.testing.assert_allclose(chosen, of_image.max(0).values, atol=1e-3)
            assert hit.item.key == f"scene {hit.number} of set 3"


def test_the_score_is_late_interaction():
    torch.manual_seed(0)
    images, query = torch.randn(5, 7, 4), torch.randn(3, 4)
    torch.testing.assert_close(
        text_to_image(images, query), late_interaction(images, query[None])[1][:, 0]
    )


def test_the_prefilter_takes_the_most_similar_means(model, built):
    query = text_query(model, QUERY).tokens
    truth = tokens_of(model, [scene(3, n).image for n in range(IMAGES)]).mean(1)
    cosine = (truth / truth.square().sum(-1, keepdim=True).sqrt()) @ query.double().mean(0)
    best = cosine.topk(20).indices.tolist()
    found = [hit.number for hit in built.search(query, 20, candidates=20)]
    assert set(found) == set(best)
    exact = built.exact(query, 10)
    inside = sum(hit.number in best for hit in exact) / 10
    assert built.recall(query, 10, candidates=20) == pytest.approx(inside)
    assert built.recall(query, 10, candidates=IMAGES) == 1


def test_recall_counts_equal_scores_as_found(built):
    query = torch.nn.functional.normalize(torch.randn(4, 32), dim=-1)
    best = built.exact(query, 3)
    twin = best[-1]._replace(number=10**6)
    assert recall_of([*best[:2], twin], best) == 1
    assert recall_of([best[0], twin._replace(score=twin.score - 0.1)], best) == pytest.approx(1 / 3)


def test_a_picture_finds_itself_and_its_own_patches(model, built):
    query = image_query(model, Image.fromarray(scene(3, 42).image))
    hit = built.search(query.tokens, 3)[0]
    assert hit.number == 42
    assert hit.score == pytest.approx(1, abs=1e-3)
    assert query.grid == (6, 6)
    assert hit.places.tolist() == list(range(36))


def test_batches_of_the_index_do_not_change_the_ranking(model, built, monkeypatch):
    query = text_query(model, QUERY).tokens
    whole = built.exact(query, 7)
    monkeypatch.setattr("filip_vl.index.search._BLOCK", 7 * 36 * 32)
    assert [hit.number for hit in built.exact(query, 7)] == [hit.number for hit in whole]
    assert [hit.number for hit in built.search(query, 7, 1000)] == [hit.number for hit in whole]


def test_bad_questions_are_refused(built):
    query = torch.ones(1, 32)
    with pytest.raises(UserError, match="1000, got 1001"):
        built.search(query, 10, candidates=1001)
    with pytest.raises(UserError, match="k = 10 to 1000, got 9"):
        built.search(query, 10, candidates=9)
    with pytest.raises(UserError, match="k must be"):
        built.exact(query, 0)
    with pytest.raises(ValueError, match="width 32"):
        built.search(torch.ones(1, 31))


def test_a_query_knows_which_tokens_its_words_are(model):
    query = text_query(model, "A red  Circle!")
    # the vocabulary has no "!": it is unknown, and a word of its own all the same
    assert [(word.text, word.rows) for word in query.words if word.spoken] == [
        ("a", (1,)),
        ("red", (2,)),
        ("circle", (3,)),
        ("!", (4,)),
    ]
    assert [word.rows for word in query.words if not word.spoken] == [(0,), (5,)]
    assert query.tokens.shape == (6, 32)
    torch.testing.assert_close(query.tokens.norm(dim=1), torch.ones(6))
    bare = text_query(make_model(drop_bos=True, drop_eos=True), "red circle")
    assert [(word.text, word.rows) for word in bare.words] == [("red", (0,)), ("circle", (1,))]
    with pytest.raises(UserError, match="no words"):
        text_query(model, "  ")
    with pytest.raises(UserError, match="no tokenizer"):
        text_query(FilipModel.from_config("filip_tiny").eval(), "red")


def test_clip_and_class_tokens_have_an_index_too(tmp_path):
    clip = make_model("clip_tiny")
    build_index(clip, scene_images(30), tmp_path / "clip")
    index = TokenIndex.open(tmp_path / "clip")
    query = text_query(clip, QUERY)
    assert [word.text for word in query.words] == [QUERY]
    truth = tokens_of(clip, [scene(0, n).image for n in range(30)])[:, 0] @ query.tokens[0].double()
    assert index.search(query.tokens, 1, 30)[0].number == int(truth.argmax())
    assert index.recall(query.tokens, 5, 10) == 1  # the mean of one token is that token

    with_class = make_model(include_cls=True)
    build_index(with_class, scene_images(30), tmp_path / "class")
    index = TokenIndex.open(tmp_path / "class")
    hit = index.search(image_query(with_class, Image.fromarray(scene(0, 4).image)).tokens, 1, 30)[0]
    assert index.patches(hit).tolist() == [-1, *range(36)]


# --------------------------------------------------------------------------- stopped and taken up


def _build_and_die(folder, at):
    """A process that is killed at its `at`-th step on the disk."""
    torch.set_num_threads(1)
    steps = 0

    def counted(call):
        def step(*args, **options):
            nonlocal steps
            steps += 1
            if steps == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return step

    os.fsync = counted(os.fsync)
    os.replace = counted(os.replace)
    Path.replace = counted(Path.replace)
    GrowingArray.append = counted(GrowingArray.append)
    GrowingArray._write_header = counted(GrowingArray._write_header)
    build_index(make_model(), scene_images(10), folder, batch_size=2, chunk=4, token_fraction=0.25)


def test_a_kill_at_any_moment_neither_doubles_nor_loses_an_image(model, tmp_path):
    build_index(model, scene_images(10), tmp_path / "whole", batch_size=10, token_fraction=0.25)
    wanted = files_of(tmp_path / "whole")
    context = process_context("filip_vl")
    for first in range(1, 50, 13):
        folder = tmp_path / f"at{first}"
        for at in (first, first + 1, first + 3, 1000):  # the next one is killed as well
            child = context.Process(target=_build_and_die, args=(folder, at))
            child.start()
            child.join(120)
            assert child.exitcode in ((0,) if at == 1000 else (0, -signal.SIGKILL))
            if (folder / "meta.json").is_file():
                images = IndexMeta.read(folder).extent.images
                assert images in (0, 4, 8, 10)
                lines = (folder / "items.jsonl").read_bytes().count(b"\n")
                assert lines >= images
        assert files_of(folder) == wanted


def test_what_was_not_committed_is_made_again(model, built, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    calls = 0

    def stop_after_five(rows, *_):
        nonlocal calls
        calls += 1
        if calls > 5:
            raise Stop
        return original(rows, *_)

    original = IndexWriter.append
    monkeypatch.setattr(IndexWriter, "append", stop_after_five)
    with pytest.raises(Stop):
        build_index(model, scene_images(IMAGES, seed=3), tmp_path, batch_size=16, chunk=32)
    monkeypatch.undo()
    assert IndexMeta.read(tmp_path).extent.images == 64
    extent = build_index(model, scene_images(IMAGES, seed=3), tmp_path, batch_size=64)
    assert extent.images == IMAGES
    assert files_of(tmp_path) == files_of(built.folder)


def test_an_unfinished_index_can_be_searched(model, tmp_path, caplog):
    build_index(model, scene_images(40), tmp_path)
    meta = IndexMeta.read(tmp_path)
    extent = replace(meta.extent, images=30, tokens=30 * 36, complete=False)
    lines = (tmp_path / "items.jsonl").read_bytes().splitlines(keepends=True)[:30]
    replace(meta, extent=replace(extent, item_bytes=sum(map(len, lines)))).write(tmp_path)
    with caplog.at_level(logging.WARNING):
        index = TokenIndex.open(tmp_path)
    assert "not complete: 30 images" in caplog.text
    found = index.exact(text_query(model, QUERY).tokens, 40)
    assert sorted(hit.number for hit in found) == list(range(30))


def test_a_complete_index_takes_images_behind_its_own(model, built, tmp_path):
    build_index(model, scene_images(70, seed=3), tmp_path)
    before = files_of(tmp_path)
    assert build_index(model, scene_images(70, seed=3), tmp_path).images == 70
    assert files_of(tmp_path) == before
    build_index(model, scene_images(IMAGES, seed=3), tmp_path)
    stored = np.load(tmp_path / "tokens.npy").astype(np.float32)
    np.testing.assert_allclose(stored, np.load(built.folder / "tokens.npy"), atol=2**-10)


def test_memory_stays_flat(tmp_path):
    """28 MB of tokens pass through; the peak does not grow by more than what a chunk needs."""
    format = replace(index_format(make_model(), "fp16", 1.0), width=256, tokens_per_image=64)
    rng = np.random.default_rng(0)

    def rows(count=128):
        items = [Item(str(n)) for n in range(count)]
        tokens = rng.standard_normal((count * 64, 256), dtype=np.float32)
        places = np.tile(np.arange(64), count)
        return Rows(items, np.full(count, 64), tokens, places, tokens[::64])

    with IndexWriter.open(tmp_path, IndexMeta(format)) as writer:
        writer.append(rows())
        writer.commit()
        Path("/proc/self/clear_refs").write_text("5")
        start = _peak()
        for _ in range(6):
            writer.append(rows())
            writer.commit()
        assert (tmp_path / "tokens.npy").stat().st_size > 28e6
        assert _peak() - start < 10 * 2**10


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# --------------------------------------------------------------------------------------- refusals


def test_a_foreign_index_is_refused(model, built, tmp_path):
    other = make_model(seed=1)
    mine, its = checkpoint_hash(model)[:12], checkpoint_hash(other)[:12]
    assert mine != its
    with pytest.raises(UserError, match=f"{mine} there, {its} here"):
        build_index(other, scene_images(IMAGES, seed=3), built.folder)
    with pytest.raises(UserError, match=f"{mine} there, {its} here"):
        built.check_model(other)
    built.check_model(make_model())  # the same weights, made anew
    wide = make_model(embed_dim=64)
    with pytest.raises(UserError, match="another checkpoint"):
        build_index(wide, scene_images(IMAGES, seed=3), built.folder)
    with pytest.raises(UserError, match="dtype fp16 there, int8 here"):
        build_index(model, scene_images(IMAGES, seed=3), built.folder, dtype="int8")
    with pytest.raises(UserError, match=r"token_fraction 1\.0 there, 0\.5 here"):
        build_index(model, scene_images(IMAGES, seed=3), built.folder, token_fraction=0.5)
    with pytest.raises(UserError, match="number 0 was scene 0 of set 3, is scene 0 of set 4"):
        build_index(model, scene_images(IMAGES, seed=4), built.folder)
    with pytest.raises(UserError, match="has 100 images already, of which only 10 are given"):
        build_index(model, scene_images(10, seed=3), built.folder)
    assert TokenIndex.open(built.folder).extent == built.extent


def test_the_hash_is_of_configuration_and_weights(model):
    assert checkpoint_hash(make_model(drop_bos=True)) != checkpoint_hash(model)
    nudged = make_model()
    with torch.no_grad():
        nudged.visual.proj[0, 0] += 1e-3
    assert checkpoint_hash(nudged) != checkpoint_hash(model)


def test_two_builders_do_not_write_one_index(model, tmp_path):
    tmp_path.joinpath("x").mkdir()
    with (
        FileLock(tmp_path / "x" / writer_module.LOCK_FILE),
        pytest.raises(UserError, match="another process"),
    ):
        build_index(model, scene_images(3), tmp_path / "x")


def test_an_unknown_type_is_refused(model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match="one of fp16, int8, not 'fp8'"):
        index_format(model, "fp8", 1.0)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"token_fraction": 0.0}, "share of tokens"),
        ({"token_fraction": 1.5}, "share of tokens"),
        ({"batch_size": 0}, "at least one image"),
        ({"chunk": 0}, "at least one image"),
        ({"workers": -1}, "workers be 0 or more"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction"),
    ],
)
def test_options_out_of_range_are_refused(model, tmp_path, options, line):
    with pytest.raises(UserError, match=line):
        build_index(model, scene_images(3), tmp_path, **options)


def test_damage_is_told(model, built, tmp_path):
    with pytest.raises(UserError, match="no index"):
        TokenIndex.open(tmp_path)

    def copy(name, change):
        folder = tmp_path / name.replace(".", "")
        folder.mkdir()
        for file, content in files_of(built.folder).items():
            (folder / file).write_bytes(change(content) if file == name else content)
        return folder

    for name in ("tokens.npy", "means.npy", "offsets.npy", "items.jsonl"):
        cut = copy(name, lambda content: content[:-5])
        with pytest.raises(UserError, match=name):
            TokenIndex.open(cut)
        with pytest.raises(UserError, match=name):
            build_index(model, scene_images(IMAGES, seed=3), cut)
    with pytest.raises(UserError, match=r"not the meta\.json"):
        TokenIndex.open(copy("meta.json", lambda content: content[:-5]))
    (tmp_path / "metajson" / "meta.json").write_text('{"version": 2}')
    with pytest.raises(UserError, match="version 2, where this program knows 1"):
        TokenIndex.open(tmp_path / "metajson")


# -------------------------------------------------------------------------------- unusable images


@pytest.fixture
def folder(tmp_path) -> Path:
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(12):
        Image.fromarray(scene(9, n).image).resize((96, 64)).save(photos / f"{n:02}.png")
    (photos / "05.png").write_bytes(b"no picture")
    (photos / "07.png").write_bytes((photos / "08.png").read_bytes()[:100])
    return photos


def test_unreadable_images_are_counted_and_never_found(model, folder, tmp_path, monkeypatch):
    images = read_images(folder)
    with pytest.raises(UserError, match=r"2 of the first 8 images cannot be read.*07\.png"):
        build_index(model, images, tmp_path / "i", batch_size=4, chunk=4, max_bad_fraction=0.1)
    extent = build_index(model, images, tmp_path / "i", max_bad_fraction=0.2)
    assert (extent.images, extent.skipped, extent.tokens) == (12, 2, 360)
    index = TokenIndex.open(tmp_path / "i")
    assert [n for n, item in enumerate(index.items) if item.error] == [5, 7]
    assert "no image" in index.items[5].error
    assert index.items[0].size == (96, 64)
    query = text_query(model, QUERY).tokens
    answers = [index.search(query, 12, 12), index.exact(query, 12)]
    monkeypatch.setattr("filip_vl.index.search._BLOCK", 1)
    answers += [index.search(query, 12, 12), index.exact(query, 12)]
    for found in answers:
        assert sorted(hit.number for hit in found) == [n for n in range(12) if n not in (5, 7)]
    with pytest.raises(UserError, match="cannot be read"):
        build_index(model, images, tmp_path / "j")  # 1 % by default
    Image.fromarray(scene(9, 12).image).save(folder / "12.png")
    with pytest.raises(UserError, match=r"2 of the first 13 .* more than 1\.00% of 13\b"):
        build_index(model, read_images(folder), tmp_path / "i")  # those of before count too


def test_no_image_at_all_is_no_index_to_search(model, folder, tmp_path):
    for file in folder.iterdir():
        file.write_bytes(b"")
    build_index(model, read_images(folder), tmp_path / "i", max_bad_fraction=1)
    with pytest.raises(UserError, match="no image yet"):
        TokenIndex.open(tmp_path / "i")


def test_images_of_other_kinds_go_in(model, folder, tmp_path):
    build_index(model, read_images(folder), tmp_path / "i", max_bad_fraction=1, workers=1)
    item = TokenIndex.open(tmp_path / "i").items[3]
    assert item.source == str(folder / "03.png")
    moved = folder.rename(tmp_path / "moved")
    build_index(model, read_images(moved), tmp_path / "i", max_bad_fraction=1)  # still its images
    memory = pairs_in_memory([(scene(0, n).image, "x") for n in range(3)])
    build_index(model, memory, tmp_path / "m")
    assert TokenIndex.open(tmp_path / "m").items[2] == Item("pair 2", None, (48, 48), (6, 6))
    small = build_index(
        model, read_images(moved), tmp_path / "p", max_pixels=96 * 63, max_bad_fraction=1
    )
    assert small.skipped == 12


def test_generated_images_are_those_of_the_data(model):
    pairs, images = shape_pairs(3, 5), scene_images(5, seed=3)
    assert list(pairs.keys) == list(images.keys)
    assert len(images) == 5
    assert images.images[4] == SceneImage(3, 4)
