import io
import re
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from filip_vl.cli import app
from filip_vl.data import shape_pairs, write_shards, write_table
from filip_vl.data.shapes import shape_vocabulary
from filip_vl.index import TokenIndex, text_query
from filip_vl.model import FilipModel
from filip_vl.report import contact_sheet
from filip_vl.synthetic import scene
from filip_vl.tokenizers import WordTokenizer
from tenfold.errors import UserError


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = WordTokenizer.train(shape_vocabulary())
    folder = tmp_path_factory.mktemp("ckpt")
    FilipModel.from_config("filip_tiny", tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def index(ckpt, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "index"
    assert app.main(["index", f"--ckpt={ckpt}", "--images=shapes:90", f"--out={out}"]) == 0
    return out


def test_index_and_search_print_what_they_found(index, ckpt, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    words = "a red circle"
    argv = ["search", f"--index={index}", f"--text={words}", "-k", "4", f"--out={sheet}"]
    assert app.main(argv) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["image", "score", "a", "red", "circle"]
    tokens, model = TokenIndex.open(index), FilipModel.from_pretrained(ckpt)
    hits = tokens.search(text_query(model, words).tokens, 4)
    assert [line.split()[1] for line in told[1:5]] == [str(hit.number) for hit in hits]
    assert re.search(r"90 images in [\d.]+ ms: 90 by their mean", told[5])
    assert re.search(r"recall@4 1\.00 against exact scoring", told[6])
    assert Image.open(sheet).width > 300


def test_words_that_the_model_does_not_know_are_told(index, ckpt, tmp_path, capsys):
    asked = "a red Giraffe, no red circle"
    argv = ["search", f"--index={index}", f"--text={asked}", f"--out={tmp_path / 's.png'}"]
    assert app.main(argv) == 0
    assert capsys.readouterr().err.endswith("vocabulary, and all read alike: giraffe, no\n")
    picture = tmp_path / "p.png"
    Image.fromarray(scene(0, 1).image).save(picture)
    argv = ["align", f"--ckpt={ckpt}", f"--image={picture}", f"--out={tmp_path / 'a.png'}"]
    assert app.main([*argv, "--text=a red circle"]) == 0
    assert "vocabulary" not in capsys.readouterr().err
    assert app.main([*argv, "--text=a red zebra"]) == 0
    assert "alike: zebra" in capsys.readouterr().err


def test_search_by_a_picture(index, tmp_path, capsys):
    file = tmp_path / "asked.png"
    Image.fromarray(scene(0, 77).image).save(file)
    sheet = tmp_path / "sheet.png"
    assert app.main(["search", f"--index={index}", f"--image={file}", f"--out={sheet}"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("scene 77 of set 0")
    assert sheet.is_file()


def _table(folder):
    write_table(shape_pairs(0, 6), folder / "pairs.tsv")
    return folder / "pairs.tsv"


def _shards(folder):
    write_shards(shape_pairs(0, 6), folder / "shards", "train", 4)
    return folder / "shards"


def _images(folder):
    for pair in shape_pairs(0, 6):
        Image.fromarray(pair.image).save(folder / f"{pair.key}.png")
    return folder


@pytest.mark.parametrize("write", [_table, _shards, _images])
def test_index_reads_the_formats_of_the_data(ckpt, tmp_path, write, capsys):
    (tmp_path / "data").mkdir()
    images, out = write(tmp_path / "data"), tmp_path / "i"
    assert app.main(["index", f"--ckpt={ckpt}", f"--images={images}", f"--out={out}"]) == 0
    index = TokenIndex.open(out)
    assert len(index) == 6
    np.testing.assert_array_equal(np.asarray(index.items[5].open()), scene(0, 5).image)
    assert "6 images, 216 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "give one of --text WORDS, --image FILE, --serve"),
        (["--text=a", "--serve"], "give one of"),
        (["--text= "], "no words to look for"),
        (["--text=a", "--candidates=2000"], "candidates must be from k = 10 to 1000, got 2000"),
        (["--text=a", "--k=0"], "k must be from 1"),
        (["--image=nowhere.png"], "nowhere.png"),
        (["--text=a", "--ckpt=nowhere"], "no such model"),
    ],
)
def test_search_refuses_in_one_line(index, argv, line, capsys):
    assert app.main(["search", f"--index={index}", *argv]) == 2
    told = capsys.readouterr().err.strip()
    assert line in told
    assert "\n" not in told


def test_a_model_that_is_gone_or_another_is_told(ckpt, tmp_path, capsys):
    moved = tmp_path / "model"
    FilipModel.from_pretrained(ckpt).save_pretrained(moved)
    images = ["--images=shapes:3", f"--out={tmp_path / 'i'}"]
    assert app.main(["index", f"--ckpt={moved}", *images]) == 0
    moved.rename(tmp_path / "elsewhere")
    search = ["search", f"--index={tmp_path / 'i'}", "--text=a", "--k=2", "--candidates=3"]
    search.append(f"--out={tmp_path / 's.png'}")
    assert app.main(search) == 2
    assert "no longer there" in capsys.readouterr().err
    assert app.main([*search, f"--ckpt={tmp_path / 'elsewhere'}"]) == 0
    other = FilipModel.from_config("filip_tiny")
    other.save_pretrained(tmp_path / "other")
    assert app.main([*search, f"--ckpt={tmp_path / 'other'}"]) == 2
    assert app.main(["index", f"--ckpt={tmp_path / 'other'}", *images]) == 2
    assert "another checkpoint" in capsys.readouterr().err


def test_search_compares_as_many_as_it_shows(index, tmp_path, capsys, monkeypatch):
    drawn = []

    def sheet(words, shown, **options):  # of many pictures it takes its time
        drawn.append(len(shown))
        return contact_sheet(words, shown[:2], **options)

    monkeypatch.setattr(sys.modules["filip_vl.commands.search"], "contact_sheet", sheet)
    argv = ["search", f"--index={index}", "--text=a red circle", f"--out={tmp_path / 's.png'}"]
    assert app.main([*argv, "-k", "95"]) == 0  # there are 90
    assert capsys.readouterr().out.count("scene ") == 90
    assert drawn == [90]
    assert app.main([*argv, "-k", "2", "--candidates", "1000"]) == 0
    assert "90 images in" in (told := capsys.readouterr().out)
    assert ": 90 by their mean token" in told
    assert app.main([*argv[:3], f"--out={tmp_path / 's.pdf'}"]) == 2
    assert "written as .png" in capsys.readouterr().err


def test_index_refuses_in_one_line(ckpt, tmp_path, capsys):
    for images, line in (
        ("shapes:none", "no number of generated pictures"),
        (str(tmp_path / "nowhere"), "no such file or folder"),
        (str(tmp_path), "no image in the folder"),
    ):
        argv = ["index", f"--ckpt={ckpt}", f"--images={images}", f"--out={tmp_path / 'i'}"]
        assert app.main(argv) == 2
        assert line in capsys.readouterr().err


def _png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("structs", [True, False])
def test_images_of_parquet_files_are_shown_from_where_they_lie(ckpt, tmp_path, structs):
    scenes = [scene(5, n).image for n in range(7)]
    cells = [{"bytes": _png(i), "path": None} if structs else _png(i) for i in scenes]
    folder, out = tmp_path / "data", tmp_path / "index"
    folder.mkdir()
    for part, rows in enumerate((slice(0, 3), slice(3, 7))):
        table = pyarrow.table({"picture": cells[rows]})
        pyarrow.parquet.write_table(table, folder / f"{part}.parquet", row_group_size=2)
    argv = ["index", f"--ckpt={ckpt}", f"--images={folder}", f"--out={out}"]
    for _ in range(2):  # the second time it is complete
        assert app.main([*argv, "--image-column=picture"]) == 0
    opened = TokenIndex.open(out)
    assert [item.source.row for item in opened.items] == [0, 1, 2, 0, 1, 2, 3]
    for number in (6, 0, 3, 4, 1):  # in no order
        np.testing.assert_array_equal(np.asarray(opened.items[number].open()), scenes[number])
    (folder / "1.parquet").rename(tmp_path / "moved.parquet")
    with pytest.raises(UserError, match=r"cannot read the images.*1\.parquet"):
        opened.items[5].open()
    np.testing.assert_array_equal(np.asarray(opened.items[2].open()), scenes[2])
