"""Every format gives the same records; what is missing or damaged is told with its place."""

import csv
import json
import os
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102

from filip_vl.data import (
    Location,
    Pairs,
    labelled,
    merge_images,
    pairs_in_memory,
    read_any,
    read_class_captions,
    read_class_folders,
    read_images,
    read_jsonl,
    read_karpathy,
    read_labelled,
    read_parquet,
    read_source,
    read_split,
    read_table,
    shape_pairs,
    write_jsonl,
    write_shapes,
    write_table,
)
from filip_vl.data.pairs import Captions, Strings, drop_blank, unroll
from filip_vl.data.sources import source_of
from filip_vl.synthetic import TEST_SEED, TRAIN_SEED, scene
from filip_vl.zeroshot import prompt_names
from tenfold.errors import UserError

CAPTIONS = ["a red ring", "a cat, on a mat", "très\tbien"]


def picture(number: int) -> Image.Image:
    generator = np.random.default_rng(number)
    return Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8))


def same_pixels(source: object, number: int) -> bool:
    return np.array_equal(np.asarray(read_source(source)), np.asarray(picture(number)))


@pytest.fixture
def root(tmp_path) -> Path:
    """Three pictures, images/0.png to 2.png."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def check_all(pairs: Pairs, keys: list[str] | None = None) -> None:
    """Three pictures with `CAPTIONS`."""
    assert [list(record.captions) for record in pairs] == [[text] for text in CAPTIONS]
    assert all(same_pixels(record.image, number) for number, record in enumerate(pairs))
    if keys is not None:
        assert [record.key for record in pairs] == keys


# ---- tables


def write_rows(file: Path, rows: list[list[str]], separator: str = "\t") -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter=separator).writerows(rows)
    return file


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_table(root, separator):
    rows = [[f"images/{n}.png", text] for n, text in enumerate(CAPTIONS)]
    file = write_rows(root / "train.tsv", [["filepath", "title"], *rows], separator)
    pairs = read_table(file, separator=separator if separator == ";" else None)
    check_all(pairs, ["train.tsv:2", "train.tsv:3", "train.tsv:4"])


def test_table_of_other_columns_elsewhere(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    rows = [["7", f"{n}.png", text] for n, text in enumerate(CAPTIONS)]
    file = write_rows(folder / "list.csv", [["", "name", "what"], *rows], ",")
    check_all(read_table(file, root / "images", "name", "what"))
    absolute = [[str(root / "images" / f"{n}.png"), text] for n, text in enumerate(CAPTIONS)]
    file = write_rows(folder / "absolute.tsv", [["filepath", "title"], *absolute])
    check_all(read_table(file))


def test_table_keeps_lines_of_a_quoted_caption_and_short_rows(root):
    file = root / "t.tsv"
    file.write_text('\ufefffilepath\ttitle\nimages/0.png\t"two\nlines"\nimages/1.png\n')
    assert [list(r.captions) for r in read_table(file)] == [["two\nlines"], [""]]
    assert [r.key for r in read_table(file)] == ["t.tsv:3", "t.tsv:4"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"path\ttitle\n1.png\ta\n", "column filepath missing; there are path, title"),
        (b"", "the file is empty"),
        (b"\n", "column filepath, title missing; there are none"),
        (b"filepath\ttitle\n", "the table has no row"),
        (b"filepath\ttitle\n1.png\t\xff\n", "not a table in UTF-8"),
    ],
)
def test_unusable_tables(tmp_path, content, told):
    file = tmp_path / "t.tsv"
    file.write_bytes(content)
    with pytest.raises(UserError, match=told) as error:
        read_table(file)
    assert str(file) in str(error.value)


def test_a_missing_file_is_told(tmp_path):
    for read in (read_table, read_jsonl, lambda file: read_karpathy(file, "train")):
        with pytest.raises(UserError, match="No such file"):
            read(tmp_path / "none")


# ---- JSON lines


def write_lines(file: Path, lines: list[object]) -> Path:
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return file


def test_jsonl(root):
    lines = [{"filename": f"images/{n}.png", "caption": text} for n, text in enumerate(CAPTIONS)]
    lines[1]["caption"] = [CAPTIONS[1]]
    lines[2] = {"filename": "images/2.png", "captions": [CAPTIONS[2]], "caption": "not this"}
    file = write_lines(root / "train.jsonl", lines)
    check_all(read_jsonl(file), ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"])
    moved = [{"file": f"{n}.png", "text": text} for n, text in enumerate(CAPTIONS)]
    file = write_lines(root / "other.jsonl", moved)
    check_all(read_jsonl(file, root / "images", "file", "text"))


def test_jsonl_without_captions(root):
    file = write_lines(root / "t.jsonl", [{"filename": "images/0.png"}, {"filename": "1.png"}])
    assert [list(record.captions) for record in read_jsonl(file)] == [[], []]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"filename": ', "no JSON"),
        ('["a"]', "no JSON object"),
        ('{"image": "a.png"}', "no file name under 'filename'; keys: image"),
        ('{"filename": "a.png", "caption": 3}', "neither a caption nor a list of them: 3"),
        ('{"filename": "a.png", "captions": [3]}', "neither a caption nor a list"),
    ],
)
def test_unusable_lines(tmp_path, line, told):
    file = tmp_path / "t.jsonl"
    file.write_text('{"filename": "a.png", "caption": "a"}\n\n' + line)
    with pytest.raises(UserError, match=told) as error:
        read_jsonl(file)
    assert f"{file}:3" in str(error.value)


# ---- Karpathy's JSON


def karpathy(file: Path, folder: str | None) -> Path:
    """One image of every split; the test image has six captions."""
    images = []
    for number, split in enumerate(("train", "restval", "val", "test")):
        texts = [f"{split} {n}" for n in range(6 if split == "test" else 2)]
        entry = {"filename": f"{number}.png", "split": split, "imgid": number}
        entry["sentences"] = [{"raw": text, "tokens": text.split()} for text in texts]
        images.append(entry if folder is None else {**entry, "filepath": folder})
    file.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return file


def test_karpathy(tmp_path):
    file = karpathy(tmp_path / "dataset_coco.json", "val2014")
    train = read_karpathy(file, "train")
    assert [list(r.captions) for r in train] == [["train 0", "train 1"], ["restval 0", "restval 1"]]
    assert train[1].image == str(tmp_path / "val2014" / "1.png")
    assert train[1].key == "val2014/1.png"
    assert [list(r.captions) for r in read_karpathy(file, "val")] == [["val 0", "val 1"]]
    assert len(read_karpathy(file, "test")[0].captions) == 5
    assert len(read_karpathy(file, "test", captions=None)[0].captions) == 6
    assert read_karpathy(file, "test", Path("/coco"))[0].image == "/coco/val2014/3.png"


@pytest.mark.parametrize("folder", ["", "flickr30k-images"])
def test_karpathy_finds_the_folder_of_flickr(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    picture(0).save(tmp_path / folder / "0.png")
    file = karpathy(tmp_path / "dataset_flickr30k.json", None)
    assert read_karpathy(file, "train")[1].image == str(tmp_path / folder / "1.png")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "no JSON"),
        ("[]", "no list `images`"),
        ('{"images": [{"split": "train"}]}', "image 0 is not of Karpathy's format"),
    ],
)
def test_unusable_karpathy(tmp_path, content, told):
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(UserError, match=told):
        read_karpathy(tmp_path / "d.json", "train")


# ---- Parquet, folders, memory, shapes


def parquet(
    file: Path, image: str = "image", caption: str = "caption", plain: bool = False
) -> Path:
    content = []
    for number in range(3):
        picture(number).save(file.parent / "one.png")
        whole = (file.parent / "one.png").read_bytes()
        content.append(whole if plain else {"bytes": whole, "path": f"{number}.png"})
    table = datasets.Dataset.from_dict({"image": content, "caption": CAPTIONS})
    table.to_parquet(str(file))
    return file


@pytest.mark.parametrize("plain", [False, True])
def test_parquet(tmp_path, plain):
    file = parquet(tmp_path / "train-0.parquet", plain=plain)
    check_all(read_parquet([file]), [f"train-0.parquet:{n}" for n in range(3)])
    with pytest.raises(UserError, match="column text missing; there are image, caption") as error:
        read_parquet([file], caption_column="text")
    assert str(error.value).endswith("name yours with image_column and caption_column")


def test_parquet_of_several_captions(tmp_path):
    file = tmp_path / "t.parquet"
    picture(0).save(tmp_path / "0.png")
    rows = {"image": [(tmp_path / "0.png").read_bytes()] * 2, "text": [["a", "b"], None]}
    datasets.Dataset.from_dict(rows).to_parquet(str(file))
    pairs = read_parquet([file], caption_column="text")
    assert [list(record.captions) for record in pairs] == [["a", "b"], []]


def test_folders(root):
    for number, name in enumerate(("b_cat", "a dog", "c")):
        (root / "test" / name).mkdir(parents=True)
        picture(number).save(root / "test" / name / "x.png")
    (root / "test" / ".thumbs").mkdir()
    split = read_class_folders(root / "test")
    assert (split.names, list(split.labels)) == (("a dog", "b cat", "c"), [0, 1, 2])
    pairs = read_class_captions(root / "test")
    assert [list(record.captions) for record in pairs] == [["a dog"], ["b cat"], ["c"]]
    assert pairs[1].key == "b_cat/x.png"
    assert same_pixels(pairs[1].image, 0)
    images = read_images(root / "images")
    assert [(r.key, list(r.captions)) for r in images] == [(f"{n}.png", []) for n in range(3)]
    (root / "empty" / "class").mkdir(parents=True)
    for read in (read_class_folders, read_images):
        with pytest.raises(UserError, match="no image"):
            read(root / "empty")
        with pytest.raises(UserError, match="no such folder"):
            read(root / "nowhere")


def test_memory():
    images = [picture(0), np.asarray(picture(1)), picture(2)]
    check_all(pairs_in_memory(list(zip(images, CAPTIONS, strict=True))))
    pairs = pairs_in_memory([(picture(0), ["a", "b"])])
    assert list(pairs[0].captions) == ["a", "b"]
    with pytest.raises(UserError, match="no pairs"):
        pairs_in_memory([])
    with pytest.raises(ValueError, match=r"image 0 is a float64 array of shape \(4, 4, 3\)"):
        pairs_in_memory([(np.zeros((4, 4, 3)), "a")])


def test_shapes_are_those_of_the_generator():
    pairs = shape_pairs(5, 3)
    for number, record in enumerate(pairs):
        wanted = scene(5, number)
        assert np.array_equal(record.image, wanted.image)
        assert record.captions == [wanted.caption]
    assert len(pairs) == 3


# ---- which file


def test_files_of_a_split(root):
    rows = [[f"images/{n}.png", text] for n, text in enumerate(CAPTIONS)]
    write_rows(root / "train.tsv", [["filepath", "title"], *rows])
    write_rows(root / "validation.csv", [["filepath", "title"], *rows[:1]], ",")
    at = Location("csv", root)
    check_all(read_split(at, "train"))
    assert len(read_split(at, "val")) == 1
    assert read_split(at, "test") is None
    assert len(read_split(at, "test", "validation.csv")) == 1


@pytest.mark.parametrize("name", ["pairs.tsv", "pa*.tsv"])
def test_a_named_file_is_looked_for_in_the_root_then_in_the_current_folder(root, monkeypatch, name):
    monkeypatch.chdir(root)
    at = Location("csv", Path("images"))
    with pytest.raises(UserError) as error:
        read_split(at, "train", name)
    assert str(error.value) == f"no such file (images/{name} or {name})"
    rows = [[f"{n}.png", text] for n, text in enumerate(CAPTIONS)]
    write_rows(root / "pairs.tsv", [["filepath", "title"], *rows])
    check_all(read_split(at, "train", name))
    write_rows(root / "images" / "pairs.tsv", [["filepath", "title"], *rows[:1]])
    assert len(read_split(at, "train", name)) == 1
    assert len(read_split(at, "train", str(root / "pairs.tsv"))) == 3
    with pytest.raises(UserError, match=rf"^no such file \({root}/none.tsv\)$"):
        read_split(at, "train", str(root / "none.tsv"))


def test_an_unknown_source_is_told_with_the_known_ones():
    with pytest.raises(UserError, match=r"no source 'tfds': choose one of csv, jsonl, .*, images$"):
        Location("tfds")


def test_images_of_files_that_have_no_captions(root):
    file = write_rows(root / "t.tsv", [["filepath"], *([f"images/{n}.png"] for n in range(3))])
    whole = {"image": [(root / "images" / f"{n}.png").read_bytes() for n in range(3)]}
    datasets.Dataset.from_dict(whole).to_parquet(str(root / "t.parquet"))
    for path, source in ((file, "csv"), (root / "t.parquet", "parquet")):
        with pytest.raises(UserError, match="missing"):
            read_any(path, Location(source))
        pairs = read_any(path, Location(source, captions=False))
        assert [*pairs.captions] == [[], [], []]
        assert all(same_pixels(record.image, number) for number, record in enumerate(pairs))


def test_splits_of_karpathy_that_are_not_there(tmp_path):
    file = karpathy(tmp_path / "dataset_x.json", None)
    content = json.loads(file.read_text())
    content["images"] = content["images"][:1]
    file.write_text(json.dumps(content))
    at = Location("karpathy", tmp_path)
    assert [read_split(at, split) is None for split in ("train", "val", "test")] == [0, 1, 1]


@pytest.mark.parametrize(
    ("source", "tree"),
    [
        ("csv", "filepath and title"),
        ("jsonl", "filename"),
        ("karpathy", "cocodataset.org"),
        ("webdataset", "KEY.jpg"),
        ("parquet", r"train\*.parquet"),
        ("imagefolder", "train/<class>"),
    ],
)
def test_a_missing_or_empty_root_says_what_is_expected(tmp_path, source, tree):
    for root, what in ((tmp_path, "no "), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(UserError, match=tree) as error:
            read_split(Location(source, root), "train")
        assert str(error.value).startswith(what)
        assert str(root) in str(error.value)


def test_any_format_by_its_name(root):
    rows = [[f"images/{n}.png", text] for n, text in enumerate(CAPTIONS)]
    check_all(read_any(write_rows(root / "t.csv", [["filepath", "title"], *rows], ",")))
    lines = [{"filename": f"images/{n}.png", "caption": text} for n, text in enumerate(CAPTIONS)]
    check_all(read_any(write_lines(root / "t.jsonl", lines)))
    (root / "parquet").mkdir()
    check_all(read_any(parquet(root / "parquet" / "x.parquet")))
    check_all(read_any(root / "parquet"))
    assert len(read_any(root / "images")) == 3
    assert len(read_any(karpathy(root / "d.json", None), split="train")) == 2
    moved = Location("csv", root / "images", "a", "b")
    file = write_rows(root / "m.tsv", [["a", "b"], *([f"{n}.png", t] for n, t in enumerate("xy"))])
    assert [list(record.captions) for record in read_any(file, moved)] == [["x"], ["y"]]
    with pytest.raises(UserError, match="no format for this name"):
        source_of("a.xyz")
    with pytest.raises(UserError, match=r"no .*none.csv"):
        read_any(root / "none.csv")


# ---- pairs


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.text(), max_size=3), max_size=6))
def test_packed_captions_are_what_went_in(captions):
    packed = Captions(captions)
    assert [*packed] == captions
    assert packed[1:] == captions[1:]
    assert [*packed.texts] == [text for texts in captions for text in texts]
    if captions:
        assert packed[-1] == captions[-1]


def test_packed_strings_keep_what_cannot_be_encoded():
    odd = ["a\udcff", "", "日本"]
    assert [*Strings(odd)] == odd
    assert [*pickle.loads(pickle.dumps(Strings(odd)))] == odd


def test_blank_captions_are_dropped_or_refused(caplog):
    texts = [["a", " "], [], ["\t\n"], ["b"]]
    pairs = pairs_in_memory([(picture(n), t) for n, t in enumerate(texts)])
    kept = drop_blank(pairs, "train")
    assert [list(record.captions) for record in kept] == [["a"], ["b"]]
    assert kept.keys[1] == "pair 3"
    assert "3 of the captions of train were dropped as empty" in caplog.text
    with pytest.raises(UserError, match=r"empty caption in train \(pair 0\)"):
        drop_blank(pairs, "train", strict=True)
    with pytest.raises(UserError, match="every caption of train is empty"):
        drop_blank(pairs_in_memory([(picture(0), "")]), "train")


def test_rows_of_one_image_are_merged_and_unrolled():
    rows = [("x.png", "a"), ("y.png", "b"), ("x.png", ["c", "d"])]
    merged = merge_images(pairs_in_memory(rows))
    assert [(r.image, list(r.captions)) for r in merged] == [
        ("x.png", ["a", "c", "d"]),
        ("y.png", ["b"]),
    ]
    every = unroll(merged)
    assert [(r.image, *r.captions) for r in every] == [
        ("x.png", "a"),
        ("x.png", "c"),
        ("x.png", "d"),
        ("y.png", "b"),
    ]
    assert [every.image_id(n) for n in range(4)] == [0, 0, 0, 1]


# ---- writing


def test_what_is_written_is_read(root, tmp_path_factory):
    pairs = pairs_in_memory([(picture(n), text) for n, text in enumerate(CAPTIONS)])
    folder = tmp_path_factory.mktemp("out")
    assert write_jsonl(pairs, folder / "a" / "t.jsonl") == 3
    check_all(read_jsonl(folder / "a" / "t.jsonl"))
    assert write_table(pairs, folder / "b" / "t.tsv") == 3
    check_all(read_table(folder / "b" / "t.tsv"))
    on_disk = read_jsonl(folder / "a" / "t.jsonl")
    write_jsonl(on_disk, folder / "c.jsonl")  # names the files where they are
    check_all(read_jsonl(folder / "c.jsonl"))
    assert not (folder / "images").exists()


@pytest.mark.parametrize("format", ["jsonl", "csv", "webdataset"])
def test_shapes_on_disk_are_those_in_memory(tmp_path, format):
    write_shapes(tmp_path, format, seed=3, train=5, test=4)
    for split, seed, count in (("train", TRAIN_SEED + 3, 5), ("test", TEST_SEED, 4)):
        pairs = read_split(Location(format, tmp_path), split)
        assert len(pairs) == count
        for number, record in enumerate(pairs):
            wanted = scene(seed, number)
            assert np.array_equal(np.asarray(read_source(record.image)), wanted.image)
            assert list(record.captions) == [wanted.caption]


def test_shapes_on_disk_know_their_objects(tmp_path):
    write_shapes(tmp_path, train=3, test=1)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        wanted = scene(TRAIN_SEED, number)
        instances = np.asarray(Image.open(tmp_path / line["instances"]))
        assert np.array_equal(instances, wanted.instances)
        assert line["objects"] == [shape.name for shape in wanted.objects]
    with pytest.raises(UserError, match="format must be one of"):
        write_shapes(tmp_path, "xml")
    with pytest.raises(UserError, match="at least 1"):
        write_shapes(tmp_path, train=0)


# ---- labelled sets


def save(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_labelled_sets_of_torchvision(tmp_path, caplog):
    save(tmp_path / "food-101/images/apple_pie/1.jpg")
    text(tmp_path / "food-101/meta/test.json", '{"apple_pie": ["apple_pie/1"], "cake": []}')
    save(tmp_path / "dtd/dtd/images/woven/w.jpg")
    text(tmp_path / "dtd/dtd/labels/test1.txt", "banded/b.jpg\nwoven/w.jpg\n")
    text(tmp_path / "fgvc-aircraft-2013b/data/variants.txt", "707-320\nA300\n")
    text(tmp_path / "fgvc-aircraft-2013b/data/images_variant_test.txt", "123 A300\n")
    (tmp_path / "oxford-iiit-pet/images").mkdir(parents=True)
    lines = "Abyssinian_1 1 1 1\namerican_bulldog_7 2 2 1\n"
    text(tmp_path / "oxford-iiit-pet/annotations/test.txt", lines)
    text(tmp_path / "SUN397/ClassName.txt", "/a/abbey\n/a/apartment_building/outdoor\n")
    save(tmp_path / "SUN397/a/abbey/sun_1.jpg")
    save(tmp_path / "SUN397/a/apartment_building/outdoor/sun_2.jpg")
    for name in ("BACKGROUND_Google", "ant"):
        save(tmp_path / f"caltech101/101_ObjectCategories/{name}/image_0001.jpg")
    save(tmp_path / "eurosat/2750/River/1.jpg")
    save(tmp_path / "val/n01440764/1.jpg")
    text(tmp_path / "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\n")
    wanted = {
        "food101": (("apple pie", "cake"), [0], "apple_pie/1.jpg"),
        "dtd": (("banded", "woven"), [0, 1], "banded/b.jpg"),
        "aircraft": (("707-320", "A300"), [1], "images/123.jpg"),
        "oxford_pets": (("Abyssinian", "American Bulldog"), [0, 1], "images/Abyssinian_1.jpg"),
        "sun397": (("abbey", "apartment building outdoor"), [0, 1], "abbey/sun_1.jpg"),
        "caltech101": (("background", "ant"), [0, 1], "BACKGROUND_Google/image_0001.jpg"),
        "eurosat": (("River",), [0], "River/1.jpg"),
        "imagenet": (("tench",), [0], "n01440764/1.jpg"),
    }
    for name, (names, labels, path) in wanted.items():
        split = read_labelled(tmp_path, name)
        assert (split.names, list(split.labels)) == (names, labels)
        assert str(split.sources[0]).endswith(path)
    assert "food101: 1 images of 2 classes, CLIP's protocol has 25250 of 101" in caplog.text
    text(tmp_path / "SUN397/Testing_01.txt", "/a/apartment_building/outdoor/sun_2.jpg\n")
    assert list(read_labelled(tmp_path, "sun397").labels) == [1]


def test_labelled_cifar(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": [1, 0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"airplane", b"cat"]}))
    split = read_labelled(tmp_path, "cifar10")
    assert (split.names, list(split.labels)) == (("airplane", "cat"), [1, 0])
    assert np.array_equal(split.sources[1], pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))


def test_labelled_sets_with_files_of_matlab(tmp_path, monkeypatch):
    # which compares checksums with those of the released files
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda _: True)
    flowers = tmp_path / "flowers-102"
    save(flowers / "jpg/image_00002.jpg")
    savemat(flowers / "imagelabels.mat", {"labels": np.array([[77, 3, 102]])})
    savemat(flowers / "setid.mat", {"trnid": np.array([[1, 1]]), "tstid": np.array([[2, 3]])})
    split = read_labelled(tmp_path, "flowers102")
    assert (len(split.names), list(split.labels)) == (102, [2, 101])
    assert str(split.sources[0]).endswith("jpg/image_00002.jpg")

    cars = tmp_path / "stanford_cars"
    save(cars / "cars_test/00001.jpg")
    (cars / "devkit").mkdir()
    names = np.array(["AM General Hummer", "Ford F-150"], dtype=object)
    savemat(cars / "devkit/cars_meta.mat", {"class_names": names})
    kinds = [("fname", object), ("class", object)]
    rows = np.array([("00001.jpg", 2), ("00002.jpg", 1)], dtype=kinds)
    savemat(cars / "cars_test_annos_withlabels.mat", {"annotations": rows})
    split = read_labelled(tmp_path, "stanford_cars")
    assert (split.names, list(split.labels)) == (("AM General Hummer", "Ford F-150"), [1, 0])
    assert str(split.sources[0]).endswith("cars_test/00001.jpg")

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    for name in ("train", "test"):
        content = {b"data": pixels, b"fine_labels": [3, 0], b"coarse_labels": [0, 0]}
        (folder / name).write_bytes(pickle.dumps(content))
    fine = [f"class_{n}".encode() for n in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": fine}))
    split = read_labelled(tmp_path, "cifar100")
    assert (len(split.names), list(split.labels)) == (100, [3, 0])


def test_the_sets_are_those_of_the_protocol():
    """Section 5.3: test images and classes."""
    found = {name: (known.images, known.classes) for name, known in labelled._SETS.items()}
    assert found == {
        "cifar10": (10_000, 10),
        "cifar100": (10_000, 100),
        "caltech101": (6085, 102),
        "stanford_cars": (8041, 196),
        "flowers102": (6149, 102),
        "food101": (25_250, 101),
        "sun397": (19_850, 397),
        "dtd": (1880, 47),
        "aircraft": (3333, 100),
        "oxford_pets": (3669, 37),
        "eurosat": (5000, 10),
        "imagenet": (50_000, 1000),
    }
    assert set(found) == set(prompt_names())


@pytest.mark.parametrize("name", ["food101", "stanford_cars", "flowers102", "eurosat", "cifar100"])
def test_labelled_sets_that_are_not_there(tmp_path, name):
    with pytest.raises(UserError, match=f"expected {tmp_path}/"):
        read_labelled(tmp_path, name)
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="no such folder"):
        read_labelled(tmp_path / "nowhere", name)


def test_labelled_sets_have_names(root):
    with pytest.raises(UserError, match="the set must be one of cifar10"):
        read_labelled(root, "mnist")
    assert read_labelled(root).names == ("images",)


# ---- real data


@pytest.mark.skipif("TENFOLD_DATA" not in os.environ, reason="TENFOLD_DATA is not set")
def test_noto_emoji():
    folder = Path(os.environ["TENFOLD_DATA"]) / "noto-emoji"
    train, test = (read_split(Location("parquet", folder), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (2834, 709)
    assert list(train[0].captions) == ["lizard"]
    assert read_source(test[708].image).size == (64, 64)
