import csv
import json

import pytest
from PIL import Image

from bert_oversmoothing.analysis import list_images, read_texts
from bert_oversmoothing.analysis.corpus import Ready, Texts, longest_text, prefix_tokens
from tenfold.errors import UserError


@pytest.fixture
def write(tmp_path):
    def put(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def test_texts_of_all_kinds(write):
    lines = write("a.txt", "one text\n\n a second \nlast, without a newline")
    assert read_texts(["given"], lines) == [
        "given",
        "one text",
        "",
        " a second ",
        "last, without a newline",
    ]
    assert read_texts((), lines, limit=2) == ["one text", ""]
    # A separator of lines that is no newline is part of a text.
    assert read_texts((), write("b.txt", "one\u2028text\nb")) == ["one\u2028text", "b"]
    assert read_texts((), write("c.txt", b"\xef\xbb\xbfwith a mark")) == ["with a mark"]


def test_columns_by_name_by_number_or_by_habit(write):
    glue = write("dev.tsv", 'sentence\tlabel\nan "odd quote\t1\n\nb c\t0\n')
    assert read_texts((), glue) == ['an "odd quote', "b c"]
    assert read_texts((), glue, "label") == ["1", "0"]
    plain = write("plain.tsv", "a b\t1\nc d\t0")
    assert read_texts((), plain, "1") == ["a b", "c d"]
    assert read_texts((), plain, "2") == ["1", "0"]
    assert read_texts((), write("one.tsv", "a b\nc\n")) == ["a b", "c"]
    table = write("t.csv", 'id,text\n1,"a, b"\n2,"two\nlines"\n')
    assert read_texts((), table) == ["a, b", "two\nlines"]


def test_json_lines(write):
    rows = [{"sentence": "a b", "x": 1}, {"sentence": "c", "x": 2}]
    file = write("t.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_texts((), file) == ["a b", "c"]
    assert read_texts((), write("s.jsonl", '"a"\n"b"')) == ["a", "b"]
    assert read_texts((), write("n.jsonl", '{"q": "why"}'), "q") == ["why"]


@pytest.mark.parametrize(
    ("name", "content", "column", "wanted"),
    [
        ("a.txt", "", None, "there are no texts"),
        ("a.txt", "x", "text", "a .txt file has no columns"),
        ("a.md", "x", None, "unknown kind of file: '.md'"),
        ("a.txt", b"\xff\xfe\x00", None, "the file is not UTF-8"),
        (
            "a.tsv",
            "a\tb\n1\t2",
            None,
            "which column holds the texts? there are 2, and the first line is 'a | b' ",
        ),
        ("a.tsv", "a\tb", None, "--column 1 takes the first of a file without a header line"),
        ("a.tsv", f"{'a ' * 40}\tb", None, f"the first line is '{'a ' * 28}a...' "),
        ("a.tsv", "a\tb\n1\t2", "c", "no column 'c'"),
        pytest.param(
            "a.csv", f"a,{'b' * 140_000}", "1", "no table, field larger than", id="long field"
        ),
        ("a.tsv", "a\tb\n1\t2", "3", "no column '3'"),
        ("a.tsv", "a\ttext\n1", None, "line 2 has 1 columns, and no 2"),
        ("a.jsonl", '"a"\n{', None, "a.jsonl:2): give a line such as"),
        ("a.jsonl", '{"a": }', None, "no JSON, Expecting value at column 7 ("),
        ("a.jsonl", "[1]", None, "not a JSON object"),
        ("a.jsonl", '{"a": 1}', None, "which key holds the text?"),
        ("a.jsonl", '{"text": 1}', None, "no text under 'text'"),
    ],
)
def test_bad_files_are_told_in_one_line(write, name, content, column, wanted):
    csv.field_size_limit(131_072)  # another package's reader may have raised it
    with pytest.raises(UserError) as error:
        read_texts((), write(name, content), column)
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.fix


def test_no_texts_and_no_file(tmp_path):
    with pytest.raises(UserError, match="there are no texts"):
        read_texts()
    with pytest.raises(UserError, match="a column of what file"):
        read_texts(["a"], None, "text")
    with pytest.raises(UserError, match=r"no such file .*: give a \.txt"):
        read_texts((), tmp_path / "a.txt")
    (tmp_path / "b.txt").mkdir()
    for folder in (tmp_path, tmp_path / "b.txt"):
        told = f"is a folder ({folder}): give a .txt, .tsv, .csv or .jsonl file"
        with pytest.raises(UserError) as error:
            read_texts((), folder)
        assert str(error.value) == told


def test_images_of_a_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        list_images(tmp_path / "none")
    with pytest.raises(UserError, match="no images in the folder"):
        list_images(tmp_path)
    (tmp_path / "b").mkdir()
    for name in ("b/1.png", "a.JPG", "c.bmp"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "d.txt").touch()
    found = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)]
    assert found == ["a.JPG", "b/1.png", "c.bmp"]
    assert len(list_images(tmp_path, 2)) == 2


def test_batches_are_the_texts_with_padding_on_the_right(word_tokenizer):
    texts = ["w9 w8", "w4 w5 w6", "w7"]
    corpus = Texts(texts, word_tokenizer(padding_side="left"), 16)
    assert corpus.usable == [1, 0, 2]  # the longest first
    first, second = corpus.batches([0, 1, 2], 2)
    assert first.inputs["input_ids"].tolist() == [[2, 9, 8, 3, 0], [2, 4, 5, 6, 3]]
    assert first.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert first.mask_bn.tolist() == [[True] * 4 + [False], [True] * 5]
    assert (first.rows, second.rows) == ([0, 1], [2])
    assert corpus.counted_words(0) == ["[CLS]", "w9", "w8", "[SEP]"]
    special = Texts(texts, word_tokenizer(), 16, exclude_special=True)
    batch = next(special.batches([0, 1], 2))
    assert batch.counted_bn.sum(1).tolist() == [2, 3]
    assert special.counts.single == [2]
    assert special.counted_words(0) == ["w9", "w8"]


def test_ready_batches_are_picked_by_place():
    import torch

    ids = torch.arange(12).view(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    corpus = Ready([{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1]}])
    assert corpus.usable == [0, 1, 3]
    assert corpus.counts.empty == [2]
    first, second = corpus.batches([3, 1], 16)
    assert (first.rows, second.rows) == ([3], [1])
    assert first.mask_bn is None
    assert second.inputs["input_ids"].tolist() == [[4, 5, 6, 7]]
    assert second.mask_bn.tolist() == [[False, True, True, True]]


@pytest.mark.parametrize(
    ("family", "tokens"),
    [("bert", 24), ("roberta", 23), ("mpnet", 22), ("deberta-v2", 24), ("modernbert", 24)],
)
def test_models_know_how_long_a_text_may_be(tiny, word_tokenizer, family, tokens):
    import torch

    model, _ = tiny(family)
    longest = longest_text(model, word_tokenizer(), 100)
    assert longest == tokens
    with torch.no_grad():
        model(input_ids=torch.full((1, longest), 5))
        if family in ("roberta", "mpnet"):
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, longest + 1), 5))
    assert longest_text(model, word_tokenizer(model_max_length=7), 100) == 7
    assert longest_text(model, None, 9) == 9


@pytest.mark.parametrize(("family", "tokens"), [("vit", 1), ("deit", 2), ("clip_vision_model", 1)])
def test_tokens_before_the_patches(tiny, family, tokens):
    assert prefix_tokens(tiny(family)[0]) == tokens
