"""Tokenizers against recorded ids of open_clip, transformers, slow loops and invariances."""

import copy
import gzip
import html
import json
import os
import pickle
import random
from itertools import pairwise
from pathlib import Path

import ftfy
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from filip_vl import tokenizers
from filip_vl.tokenizers import (
    BPETokenizer,
    Encoded,
    Tokenizer,
    WordTokenizer,
    check_vocabulary,
    clean_caption,
)
from tenfold.errors import UserError

with np.load(Path(__file__).parent / "reference" / "clip_bpe_tokenizer.npz") as _file:
    RECORDED = {name: _file[name] for name in _file}
TEXTS = json.loads(RECORDED["texts_json"].item())
MERGES = json.loads(RECORDED["tiny_merges_json"].item())
CAPTIONS = ["a red cat, and a dog", "The RED dog's photo", "a cat of an old dog", "it is 12!"]

bpe = BPETokenizer(MERGES)
words = WordTokenizer.train(CAPTIONS)


def rows(encoded):
    """Ids that count, caption by caption."""
    return [row[:n].tolist() for row, n in zip(encoded.ids, encoded.lengths, strict=True)]


# ---------------------------------------------------------------------------- byte pairs


def test_ids_of_open_clip():
    assert bpe.vocab_size == RECORDED["tiny_vocab_size"].item() == 535
    assert (bpe.start_id, bpe.end_id, bpe.pad_id) == (533, 534, 0)
    encoded = bpe.encode(TEXTS, context_length=16)
    assert encoded.ids.dtype == encoded.lengths.dtype == torch.int64
    assert np.array_equal(encoded.ids.numpy(), RECORDED["tiny_ids"])
    ends = (RECORDED["tiny_ids"] == 534).argmax(1)
    assert encoded.lengths.tolist() == (ends + 1).tolist()


def test_ids_of_open_clip_with_the_released_merges():
    if "FILIP_BPE_MERGES" not in os.environ:
        pytest.skip("FILIP_BPE_MERGES does not name CLIP's released merges file")
    released = BPETokenizer(os.environ["FILIP_BPE_MERGES"])
    assert (released.vocab_size, released.start_id, released.end_id) == (49408, 49406, 49407)
    assert np.array_equal(released.encode(TEXTS).ids.numpy(), RECORDED["real_ids"])


def slow_pieces(word, merges):
    """The pairs of a word, joined one merge after the other (Sennrich et al., 2016)."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while True:
        found = [
            (merges.index(f"{a} {b}"), n)
            for n, (a, b) in enumerate(pairwise(pieces))
            if f"{a} {b}" in merges
        ]
        if not found:
            return pieces
        _, n = min(found)
        pieces[n : n + 2] = [pieces[n] + pieces[n + 1]]


@st.composite
def merges_of_two_letters(draw):
    symbols, merges = ["a", "b", "a</w>", "b</w>"], []
    for _ in range(draw(st.integers(1, 8))):
        first = draw(st.sampled_from([s for s in symbols if "<" not in s]))
        second = draw(st.sampled_from(symbols))
        if first + second not in symbols:
            merges.append(f"{first} {second}")
            symbols.append(first + second)
    return merges


@given(merges=merges_of_two_letters(), word=st.text("ab", min_size=1, max_size=12))
def test_pieces_are_those_of_a_slow_loop(merges, word):
    pieces = slow_pieces(word, merges)
    tokenizer = BPETokenizer(merges)
    assert tokenizer.tokens(word)[1:-1] == [piece.removesuffix("</w>") for piece in pieces]
    # a = 64, b = 65, 256 later at the end of a word, then the merges
    numbers = {"a": 64, "b": 65, "a</w>": 320, "b</w>": 321}
    numbers |= {merge.replace(" ", ""): 512 + n for n, merge in enumerate(merges)}
    assert rows(tokenizer.encode(word)) == [
        [tokenizer.start_id, *(numbers[piece] for piece in pieces), tokenizer.end_id]
    ]


def test_every_byte_has_a_letter_in_the_order_of_clip():
    # printable ones first, as themselves, then the other 68 in ascending order
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [byte for byte in range(256) if byte not in order]
    for n, byte in enumerate(order):
        assert bpe._ids_of_bytes[byte] == n
        assert bpe._ids_of_last_bytes[byte] == n + 256
        assert bpe._bytes[n] == bpe._bytes[n + 256] == bytes([byte])


ORDINARY = st.text("abcdeghinoprtuxyz '!?.,-0123456789AZéßñ日本&", max_size=40)


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """The tokenizer of transformers with the same merges, and the folder that it was saved in."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    symbols = [*tokenizers.bpe._symbols(MERGES), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: n for n, symbol in enumerate(symbols)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    made = transformers.CLIPTokenizer.from_pretrained(folder)
    made.save_pretrained(folder / "saved")
    return made, folder


def test_ids_of_transformers(peer):
    tokenizer, _ = peer
    randomly = random.Random(3)
    alphabet = "abcdeghinoprtuxyz '!?.,-0123456789AZñ日本"
    texts = ["".join(randomly.choices(alphabet, k=randomly.randint(0, 40))) for _ in range(300)]
    assert rows(bpe.encode([*CAPTIONS, *texts], 200)) == tokenizer([*CAPTIONS, *texts]).input_ids
    cut = tokenizer(texts, truncation=True, max_length=12).input_ids
    assert rows(bpe.encode(texts, 12)) == cut


def test_folders_of_transformers_are_read(peer, tmp_path):
    _, folder = peer
    for place in (folder, folder / "saved", folder / "saved" / "tokenizer.json"):
        assert BPETokenizer(place).merges == tuple(MERGES)
    (tmp_path / "merges.txt").write_bytes((folder / "merges.txt").read_bytes())
    assert BPETokenizer(tmp_path).merges == tuple(MERGES)  # without its vocabulary
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocabulary["the</w>"], vocabulary["th"] = vocabulary["th"], vocabulary["the</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(UserError, match="not CLIP's vocabulary: 'th' has the id 513, not 512"):
        BPETokenizer(tmp_path)


def released_size():
    """As many merges as CLIP has, of all pairs of letters."""
    letters = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    letters += [chr(256 + n) for n in range(68)]
    return [f"{a} {b}" for a in letters for b in letters][:48894]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_the_released_file_is_read_as_far_as_clip_does(pack, tmp_path):
    lines = ['"a header of some kind#version: 0.2', *released_size(), *["never read"] * 9]
    (tmp_path / "merges").write_bytes(pack("\n".join(lines).encode()))
    tokenizer = BPETokenizer(tmp_path / "merges")
    assert tokenizer.merges == tuple(released_size())
    assert (tokenizer.vocab_size, tokenizer.start_id, tokenizer.end_id) == (49408, 49406, 49407)


def test_a_file_without_header_loses_no_merge(tmp_path):
    (tmp_path / "merges.txt").write_text("\n".join(MERGES), encoding="utf-8")
    assert BPETokenizer(tmp_path / "merges.txt").merges == tuple(MERGES)


def test_declip_has_a_mask_before_start_and_end():
    declip = BPETokenizer(released_size(), layout="declip")
    assert (declip.vocab_size, declip.start_id, declip.end_id) == (49409, 49407, 49408)
    tiny = BPETokenizer(MERGES, layout="declip")
    moved = RECORDED["tiny_ids"] + (RECORDED["tiny_ids"] >= 533)
    assert np.array_equal(tiny.encode(TEXTS, 16).ids.numpy(), moved)
    assert tiny.decode([533, *rows(tiny.encode("the cat"))[0]]) == "the cat"


@pytest.mark.parametrize(
    "typed", ["<end_of_text>", "<|endoftext|>", "<END_OF_TEXT>", "&lt;end_of_text&gt;"]
)
def test_a_typed_end_ends_the_caption(typed):
    ids, lengths = bpe.encode(f"the {typed} cat", 8)
    assert ids.tolist() == [[533, 513, 534, 524, 534, 0, 0, 0]]
    assert lengths.tolist() == [3]
    assert bpe.tokens(f"the {typed} cat") == ["<start_of_text>", "the", "<end_of_text>"]
    assert bpe.spans(f"the {typed} cat") == [None, (0, 3), None]
    assert bpe.decode(ids[0].tolist()) == "the"


@pytest.mark.parametrize("typed", ["<start_of_text>", "<|startoftext|>"])
def test_a_typed_start_is_a_start(typed):
    assert rows(bpe.encode(f"the{typed}cat")) == [[533, 513, 533, 524, 534]]
    assert bpe.tokens(f"the{typed}cat")[2] == "<start_of_text>"
    first = 3 + len(typed)
    assert bpe.spans(f"the{typed}cat") == [None, (0, 3), None, (first, first + 3), None]


def test_zero_is_also_a_symbol():
    ids, lengths = bpe.encode("cat!! dog", 8)
    assert ids.tolist() == [[533, 524, 0, 256, 526, 534, 0, 0]]
    assert lengths.tolist() == [6]


def test_pieces_of_a_character_share_its_place():
    assert bpe.spans("né") == [None, (0, 1), (1, 2), (1, 2), None]
    assert bpe.tokens("né")[1:-1] == ["n", "\\xc3", "\\xa9"]


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        (["t h", "the e</w>"], "merge 2 does not join two symbols that are there before it"),
        (["t"], "merge 1 does not join"),
        (["t h", "t h"], "merge 2 makes a symbol once more: 't h'"),
    ],
)
def test_wrong_merges(merges, message):
    with pytest.raises(UserError, match=message):
        BPETokenizer(merges)


def test_wrong_files(tmp_path):
    with pytest.raises(UserError, match="no merges in this folder"):
        BPETokenizer(tmp_path)
    with pytest.raises(UserError, match=r"cannot read it.*nowhere"):
        BPETokenizer(tmp_path / "nowhere")
    content = {
        "cut.gz": gzip.compress(b"x y\n" * 99)[:-9],
        "latin": b"\xe9",
        "a.json": b"[",
        "b.json": b"[]",
        "c.json": b'{"model": {"vocab": {}}}',
    }
    for name, some in content.items():
        (tmp_path / name).write_bytes(some)
        with pytest.raises(UserError, match=rf"{name}.*give the released merges file"):
            BPETokenizer(tmp_path / name)
    with pytest.raises(UserError, match="the layout must be one of clip, declip, got 'clap'"):
        BPETokenizer(MERGES, layout="clap")


# ----------------------------------------------------------------------------------- words


def test_words_are_learned_by_frequency_then_alphabet():
    assert words.words[:4] == ("a", "dog", "cat", "red")
    assert " ".join(words.words[4:]) == "! ' , 12 an and is it of old photo s the"
    assert (words.pad_id, words.start_id, words.end_id) == (0, 19, 20)
    assert words.vocab_size == 21
    assert WordTokenizer.train(CAPTIONS[::-1]).words == words.words
    few = WordTokenizer.train(CAPTIONS, max_vocab=7)
    assert (few.words, few.vocab_size) == (("a", "dog", "cat"), 7)


def test_words_and_marks_are_ids():
    encoded = words.encode(["A red  CAT!", "", "a green dog"], 7)
    a, dog, cat, red = range(2, 6)
    assert rows(encoded) == [[19, a, red, cat, words.words.index("!") + 2, 20], [19, 20],
                             [19, a, 1, dog, 20]]  # fmt: skip
    assert encoded.ids.shape == (3, 7)
    assert encoded.ids[1].tolist() == [19, 20, 0, 0, 0, 0, 0]
    assert words.tokens("a green dog")[1:-1] == ["a", "<unknown>", "dog"]
    assert words.spans("a green dog") == [None, (0, 1), (2, 7), (8, 11), None]
    assert words.decode(encoded.ids[2].tolist()) == "a <unknown> dog"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WordTokenizer.train(CAPTIONS, max_vocab=4), "max_vocab must be 5 or more, got 4"),
        (lambda: WordTokenizer.train(["", " "]), "the vocabulary has no word"),
        (lambda: WordTokenizer(["a", "b", "a"]), "the word 'a' twice"),
    ],
)
def test_wrong_vocabularies(make, message):
    with pytest.raises(UserError, match=message):
        make()


# ------------------------------------------------------------------------------------ both

both = pytest.mark.parametrize("tokenizer", [bpe, words], ids=["bpe", "words"])


@both
@given(text=st.text(max_size=30) | ORDINARY)
@example(text="&amp;lt;start_of_text&amp;gt; \u017f'\u017f")
def test_every_position_is_told(tokenizer, text):
    (ids,) = rows(tokenizer.encode(text, 200))
    pieces, spans, cleaned = (
        tokenizer.tokens(text, 200),
        tokenizer.spans(text, 200),
        clean_caption(text),
    )
    assert len(ids) == len(pieces) == len(spans)
    assert pieces[0] == "<start_of_text>"
    assert pieces[-1] == "<end_of_text>"
    assert (ids[0], ids[-1]) == (tokenizer.start_id, tokenizer.end_id)
    covered = set()
    for piece, span in zip(pieces[1:-1], spans[1:-1], strict=True):
        if span is not None:
            shown = cleaned[slice(*span)]
            assert piece in (shown, "<unknown>") or "\\x" in piece
            covered |= set(range(*span))
    if "<" not in cleaned:  # nothing typed is special
        assert covered == {n for n, letter in enumerate(cleaned) if not letter.isspace()}


@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1), max_size=12))
def test_words_come_back(typed):
    text = " ".join(typed)
    assert bpe.decode(bpe.encode(text, 400).ids[0].tolist()) == text
    if typed:
        own = WordTokenizer.train([text])
        assert own.decode(own.encode(text, 400).ids[0].tolist()) == text


@given(st.text())
@example("caf\xc3\xa9 &amp;amp; \u201cquotes\u201d\r\n")
@example("a\x1fb")
def test_captions_are_cleaned_as_clip_does(text):
    mended = html.unescape(html.unescape(ftfy.fix_text(text)))
    expected = " ".join(mended.strip().split()).strip().lower()
    assert clean_caption(text) == bpe.clean(text) == words.clean(text) == expected


@given(st.text("".join(map(chr, range(32, 127)))))
def test_plain_captions_need_no_mending(text):
    assert (
        clean_caption(text)
        == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
    )


@both
@given(count=st.integers(0, 30), length=st.integers(2, 20))
def test_a_long_caption_keeps_its_end(tokenizer, count, length):
    tokenizer, text = copy.copy(tokenizer), "dog " * count
    tokenizer.truncated = 0
    ids, lengths = tokenizer.encode([text, "dog"], length)
    assert ids.shape == (2, length)
    assert lengths[0] == min(count + 2, length)
    assert ids[0, lengths[0] - 1] == tokenizer.end_id
    assert (ids[0, lengths[0] :] == 0).all()
    assert tokenizer.truncated == (count + 2 > length) + (length < 3)
    assert len(tokenizer.tokens(text, length)) == len(tokenizer.spans(text, length)) == lengths[0]


@both
def test_captions_are_independent_of_each_other(tokenizer):
    together = tokenizer.encode(TEXTS)
    for n, text in enumerate(TEXTS):
        alone = tokenizer.encode(text)
        assert torch.equal(alone.ids[0], together.ids[n])
        assert alone.lengths[0] == together.lengths[n]
    assert tokenizer.encode([]).ids.shape == (0, 77)


@both
def test_a_tokenizer_survives_json_and_processes(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    expected = tokenizer.encode(TEXTS)
    for again in (
        tokenizers.from_json(tokenizer.to_json()),
        type(tokenizer).from_json(tokenizer.to_json()),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert type(again) is type(tokenizer)
        assert isinstance(again.encode(TEXTS), Encoded)
        assert torch.equal(again.encode(TEXTS).ids, expected.ids)
    declip = BPETokenizer(MERGES, layout="declip")
    assert tokenizers.from_json(declip.to_json()).end_id == declip.end_id == 535


def test_a_checkpoints_description_is_a_file_of_merges(tmp_path):
    (tmp_path / "tokenizer.json").write_text(bpe.to_json(), encoding="utf-8")
    assert BPETokenizer(tmp_path).merges == bpe.merges


@pytest.mark.parametrize("text", ["", "{", "[]", '{"type": "letters"}', '{"type": "word"}'])
def test_something_else_is_no_tokenizer(text):
    with pytest.raises(UserError, match=r"not (JSON|a tokenizer)"):
        tokenizers.from_json(text)


@both
@pytest.mark.parametrize("method", ["encode", "tokens", "spans"])
def test_start_and_end_need_room(tokenizer, method):
    with pytest.raises(ValueError, match="context_length must be 2 or more for start and end"):
        getattr(tokenizer, method)("dog", 1)


def test_a_tokenizer_belongs_to_its_network():
    check_vocabulary(bpe, 535)
    with pytest.raises(UserError, match=r"535 ids, the network 536: .*--tokenizer-layout declip"):
        check_vocabulary(bpe, 536)
    with pytest.raises(UserError, match=r"535 ids, the network 49408: give the tokenizer"):
        check_vocabulary(bpe, 49408)
