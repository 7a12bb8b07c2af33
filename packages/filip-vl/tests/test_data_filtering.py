"""The paper's filter over every format, and captions from a person's function."""

import csv
import io
import json
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from filip_vl.data import (
    FilterRules,
    Location,
    augment_captions,
    filter_file,
    filter_pairs,
    load_callable,
    pairs_in_memory,
    read_any,
    read_jsonl,
    read_parquet,
    read_shards,
    read_source,
    read_table,
    write_kept,
    write_shards,
)
from filip_vl.data.filtering import RULES, is_meaningless, mostly_ascii
from tenfold.errors import UserError


def sized(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (width % 256, height % 256, 9))


def names_of(kept: dict[int, list[str]]) -> list[tuple[int, list[str]]]:
    return sorted(kept.items())


# ---- rules


@pytest.mark.parametrize(
    ("size", "stays"),
    [
        ((200, 200), True),
        ((199, 300), False),
        ((300, 199), False),
        ((200, 600), True),
        ((601, 200), False),
        ((200, 601), False),
    ],
)
def test_sizes_at_their_limits(size, stays):
    kept, report = filter_pairs(pairs_in_memory([(sized(*size), "a cat on a mat")]))
    assert bool(kept) == stays
    wanted = "small image" if min(size) < 200 else "long image"
    assert report.dropped[wanted] == (not stays)


@pytest.mark.parametrize("count", [10, 11])
def test_texts_that_occur_more_than_ten_times_all_go(count):
    texts = ["a cat", "A  CAT"] * 5 + ["a cat"] * (count - 10) + ["a dog"]
    kept, report = filter_pairs(pairs_in_memory([(sized(200, 200), text) for text in texts]))
    assert len(kept) == (11 if count == 10 else 1)
    assert report.dropped["frequent text"] == (0 if count == 10 else 11)


@pytest.mark.parametrize(
    "text",
    [
        *("img_0.jpg", "IMG_0001", "DSC 0123", "dsc00012.JPG", "my holiday.png", "P1010023"),
        *("12345", "2011-05-03 12:30:11", "Screenshot 2020-01-02", "photo 7", "untitled", "Image"),
        *("https://example.org/a b"[:20], "www.example.org/x.html", "3f9a2c1b77_o", "!!!", "a"),
    ],
)
def test_meaningless_texts(text):
    assert is_meaningless(text)


@pytest.mark.parametrize(
    "text",
    [
        *("2 dogs", "a cat.", "photo of 3 cats", "Paris 2011", "image of a beach", "decade"),
        *("see www.example.org for more", "page by page", "Dr. Who", "effaced facade", "jpg art"),
    ],
)
def test_texts_that_mean_something(text):
    assert not is_meaningless(text)


def test_the_language_heuristic():
    assert mostly_ascii("a café by the sea")
    assert not mostly_ascii("кошка на ковре")
    assert not mostly_ascii("猫 cat")
    assert not mostly_ascii("123 !")
    assert mostly_ascii("ein Hund im Schnee")  # a heuristic knows letters, no words


def test_every_pair_is_counted_once_under_the_first_rule():
    good = sized(200, 200)
    rows = [
        (good, ["a cat", " ", "img_0.jpg", "кошка на ковре", "a bad word"]),
        (sized(9, 9), ["a dog", "a cow"]),
        (b"no image", ["a horse"]),
        (good, []),
        (good, ["IMG_1.png"]),
    ]
    rules = FilterRules(sensitive=frozenset({"BAD"}), rewrite=lambda text: text.replace("cat", "<"))
    kept, report = filter_pairs(pairs_in_memory(rows), rules, threads=2)
    assert kept == {0: ["a <"]}
    wanted = {
        **dict.fromkeys(RULES, 0),
        "empty text": 2,
        "meaningless text": 2,
        "other language": 1,
        "sensitive word": 1,
        "unreadable image": 1,
        "small image": 2,
    }
    assert report.dropped == wanted
    assert (report.pairs, report.kept, report.images, report.images_kept) == (10, 1, 5, 1)
    assert report.pairs == report.kept + sum(report.dropped.values())
    assert "small image" in "\n".join(report.lines())
    assert report.to_dict()["dropped"] == wanted


def test_rules_of_ones_own():
    pairs = pairs_in_memory([(sized(60, 60), "ein Hund"), (sized(60, 60), "a dog")])
    rules = FilterRules(min_side=50, language=lambda text: text.startswith("ein"))
    assert filter_pairs(pairs, rules)[0] == {0: ["ein Hund"]}
    for wrong in ({"min_side": -1}, {"max_aspect": 0.5}, {"max_repeats": 0}):
        with pytest.raises(UserError, match="must be at least"):
            FilterRules(**wrong)


# ---- every format


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures 0 and 2 are large enough, 1 is not."""
    for number, side in enumerate((200, 20, 210)):
        sized(side, side).save(tmp_path / f"{number}.png")
    return tmp_path


TEXTS = ["a cat", "a dog", "a very, \tquoted cow"]


def filtered(files: list[str], at: Location, pairs: object, out: Path) -> list[Path]:
    rules = FilterRules(rewrite=lambda text: text.replace("cow", "<cow>"))
    kept, _ = filter_pairs(pairs, rules)
    return write_kept(files, at, pairs, kept, out)


@pytest.mark.parametrize("separator", ["\t", ","])
def test_tables_keep_their_columns(folder, separator):
    file = folder / "t.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=separator)
        writer.writerow(["id", "filepath", "title", "licence"])
        writer.writerows([n, f"{n}.png", text, f"by {n}"] for n, text in enumerate(TEXTS))
    out = folder / "kept.csv"
    assert filtered([str(file)], Location("csv"), read_table(file), out) == [out]
    with out.open(newline="") as stream:
        rows = list(csv.reader(stream, delimiter=separator))
    assert rows == [
        ["id", "filepath", "title", "licence"],
        ["0", "0.png", "a cat", "by 0"],
        ["2", "2.png", "a very, \tquoted <cow>", "by 2"],
    ]


def test_lines_keep_their_keys(folder):
    lines = [
        {"filename": "0.png", "caption": TEXTS[0], "n": 0},
        {"filename": "1.png", "caption": TEXTS[1]},
        {"filename": "2.png", "captions": ["img_2.jpg", "a cow"], "caption": "unread"},
        {"filename": "2.png", "caption": [TEXTS[2], " "]},
    ]
    file = folder / "t.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    out = folder / "kept.jsonl"
    filtered([str(file)], Location("jsonl"), read_jsonl(file), out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        lines[0],
        {**lines[2], "captions": ["a <cow>"]},
        {"filename": "2.png", "caption": ["a very, \tquoted <cow>"]},
    ]


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    sized(side, side).save(buffer, "PNG")
    return buffer.getvalue()


def test_shards_keep_their_members(folder):
    members = {"x.txt": b"alone"}
    for number, side in enumerate((200, 20, 210)):
        members |= {f"{number}.png": png(side), f"{number}.txt": TEXTS[number].encode()}
        members |= {f"{number}.json": json.dumps({"n": number}).encode()}
    shard = folder / "a.tar"
    with tarfile.open(shard, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    pairs = read_shards([str(shard)])
    [out] = filtered([str(shard)], Location("webdataset"), pairs, folder / "kept")
    assert out == folder / "kept" / "a.tar"
    with tarfile.open(out) as tar:
        found = {info.name: tar.extractfile(info).read() for info in tar}
    wanted = {name: content for name, content in members.items() if name[0] in "02"}
    wanted["2.txt"] = b"a very, \tquoted <cow>"
    assert found == wanted


def test_parquet_keeps_its_columns(folder):
    file = folder / "t.parquet"
    images = [(folder / f"{n}.png").read_bytes() for n in range(3)]
    content = {"caption": TEXTS, "image": images, "n": [0, 1, 2]}
    datasets.Dataset.from_dict(content).to_parquet(str(file))
    out = folder / "kept.parquet"
    filtered([str(file)], Location("parquet"), read_parquet([file]), out)
    table = datasets.Dataset.from_parquet(str(out), cache_dir=str(folder / "cache"))
    assert table.column_names == ["caption", "image", "n"]
    assert table["n"][:] == [0, 2]
    assert table["caption"][:] == ["a cat", "a very, \tquoted <cow>"]
    assert [list(record.captions) for record in read_parquet([out])] == [
        [t] for t in table["caption"]
    ]


def test_other_sources_become_json_lines(folder):
    images = [{"filename": f"{n}.png", "split": "test", "sentences": [{"raw": t}]}
              for n, t in enumerate(TEXTS)]  # fmt: skip
    (folder / "d.json").write_text(json.dumps({"images": images}))
    at = Location("karpathy")
    pairs = read_any(folder / "d.json", at)
    out = folder / "lists" / "kept.jsonl"
    filtered([str(folder / "d.json")], at, pairs, out)
    kept = read_jsonl(out)
    assert [list(record.captions) for record in kept] == [["a cat"], ["a very, \tquoted <cow>"]]
    assert read_source(kept[1].image).size == (210, 210)


# ---- captions of a person's function


def test_variants_are_written_beside_their_originals(tmp_path):
    given = [(sized(9, 9), ["one", "two"]), (sized(9, 9), "three"), (sized(9, 9), [])]
    calls = []

    def augment(captions: list[str]) -> list[list[str]]:
        calls.append(captions)
        return [[text.upper(), f"{text}!", " "] for text in captions]

    report = augment_captions(pairs_in_memory(given), augment, tmp_path / "a.jsonl", at_once=2)
    assert calls == [["one", "two"], ["three"]]
    assert (report.images, report.captions, report.added) == (3, 3, 6)
    pairs = read_jsonl(tmp_path / "a.jsonl")
    assert [list(record.captions) for record in pairs] == [
        ["one", "two", "ONE", "one!", "TWO", "two!"],
        ["three", "THREE", "three!"],
        [],
    ]
    assert np.array_equal(read_source(pairs[1].image), sized(9, 9))
    augment_captions(pairs_in_memory(given), lambda texts: texts, tmp_path / "b.jsonl")
    assert list(read_jsonl(tmp_path / "b.jsonl")[1].captions) == ["three", "three"]


@pytest.mark.parametrize(
    ("augment", "told"),
    [
        (lambda texts: texts[:-1], "1 answers for 2 captions"),
        (lambda texts: [3, "a"], "neither a text nor texts for 'one': 3"),
        (lambda texts: [["a", None], "a"], "neither a text nor texts"),
    ],
)
def test_answers_that_are_none(tmp_path, augment, told):
    pairs = pairs_in_memory([(sized(9, 9), ["one", "two"])])
    with pytest.raises(UserError, match=told):
        augment_captions(pairs, augment, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()
    with pytest.raises(UserError, match="at_once must be at least 1"):
        augment_captions(pairs, augment, tmp_path / "a.jsonl", at_once=0)


def test_functions_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_functions.py").write_text("def shout(texts):\n    return texts\nNO = 1\n")
    assert load_callable("my_own_functions:shout")(["a"]) == ["a"]
    assert str(tmp_path) not in sys.path
    assert load_callable("json:dumps")(1) == "1"
    for name, told in (
        ("my_own_functions:NO", "no function 'NO'"),
        ("my_own_functions:none", "no function 'none'"),
        ("not_there_at_all:f", "cannot import the module"),
        ("json", "no name of a function"),
        (":f", "no name of a function"),
    ):
        with pytest.raises(UserError, match=told):
            load_callable(name)
    sys.modules.pop("my_own_functions")


def test_files_are_filtered_by_their_names(folder):
    lines = [{"filename": f"{n}.png", "caption": text} for n, text in enumerate(TEXTS)]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = filter_file(folder / "t.jsonl", folder / "kept.jsonl")
    assert (report.pairs, report.kept, report.dropped["small image"]) == (3, 2, 1)
    assert [*read_jsonl(folder / "kept.jsonl").texts()] == [TEXTS[0], TEXTS[2]]
    pairs = read_jsonl(folder / "t.jsonl")
    write_shards(pairs, folder / "shards")
    filter_file(folder / "shards", folder / "left")
    assert [*read_any(folder / "left").texts()] == [TEXTS[0], TEXTS[2]]
    rules = FilterRules(language=lambda text: text == TEXTS[1])
    with pytest.raises(UserError, match=r"no pair is left.*small image +1"):
        filter_file(folder / "t.jsonl", folder / "none.jsonl", rules)
    with pytest.raises(UserError, match="nothing to filter"):
        filter_file(folder / "shards" / "..", folder / "none.jsonl")


def test_several_shards_are_filtered(tmp_path):
    pairs = pairs_in_memory(
        [(sized(200 if n % 2 else 20, 200), f"text {n} here") for n in range(7)]
    )
    shards = [str(path) for path in write_shards(pairs, tmp_path, per_shard=3)]
    found = read_shards(shards)
    kept, _ = filter_pairs(found)
    out = write_kept(shards, Location("webdataset"), found, kept, tmp_path / "out")
    left = read_shards([str(path) for path in out])
    assert [*left.texts()] == [f"text {n} here" for n in (1, 3, 5)]
