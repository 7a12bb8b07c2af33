"""Readers against small files in every released form, and the same tasks through datasets."""

import csv
import json
import os
from pathlib import Path

import pytest

from bert_oversmoothing.data import OversmoothingData, hub, squad, swag, tsv
from bert_oversmoothing.data.glue import TASKS, files, read_glue
from bert_oversmoothing.data.own import read_own
from bert_oversmoothing.data.records import Broken, Choice, Example, Question
from bert_oversmoothing.data.sources import SOURCES, Place
from bert_oversmoothing.synthetic import OddRun, write_squad
from tenfold.errors import UserError

REAL = Path(os.environ.get("TENFOLD_DATA", "")) / "sst2"

HEADERS = """
index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse \
sentence2_parse sentence1 sentence2 label1 label2 label3 label4 label5 gold_label
index genre filename year old_index source1 source2 sentence1 sentence2 score
id qid1 qid2 question1 question2 is_duplicate
"""
MNLI_DEV, STSB, QQP = (line.split() for line in HEADERS.strip().splitlines())
MNLI_TRAIN = [*MNLI_DEV[:11], "gold_label"]
MRPC = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]


def write(file: Path, *rows: list[str] | tuple[str, ...], end: str = "\n") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = end.join("\t".join(row) for row in rows)
    file.write_text(text, encoding="utf-8", newline="")


def mnli_row(columns: list[str], first: str, second: str, label: str) -> list[str]:
    row = dict.fromkeys(columns, "x") | {"sentence1": first, "sentence2": second}
    return list((row | {columns[-1]: label}).values())


def glue(root: Path) -> None:
    """All nine tasks as they are released, some of their lines broken."""
    write(
        root / "CoLA/train.tsv",
        ("gj04", "1", "", 'He said "no.'),
        ("gj04", "0", "*", "They drank the pub."),
    )
    write(root / "CoLA/dev.tsv", ("gj04", "1", "", "A sailor assassinated the captain."))
    write(root / "CoLA/test.tsv", ("index", "sentence"), ("0", "Bill whistled past."))
    write(root / "SST-2/train.tsv", ("sentence", "label"), ("hide new secretions ", "0"))
    write(root / "SST-2/dev.tsv", ("sentence", "label"), ("charming\u2028journey", "1"))
    write(root / "SST-2/test.tsv", ("index", "sentence"), ("0", "uneasy mishmash"))
    write(root / "MRPC/train.tsv", MRPC, ("1", "7", "8", '"A', "B"), ("0", "9", "1", "C", 'D"'))
    write(root / "MRPC/dev.tsv", MRPC, ("0", "7", "8", "E", "F"))
    write(root / "MRPC/test.tsv", ["index", *MRPC[1:]], ("0", "1", "2", "G", "H"))
    one = ["0", "news", "MSR", "2012", "1", "a", "b", "A plane.", "An aeroplane."]
    write(root / "STS-B/train.tsv", STSB, [*one, "4.25"], [*one, "5.000"])
    write(root / "STS-B/dev.tsv", STSB, [*one, "0"])
    write(root / "STS-B/test.tsv", STSB[:-1], one)
    write(
        *(root / "QQP/train.tsv", QQP, ("1", "2", "3", "Why?", "How?", "0"), ("4", "5", "6")),
        *(("What ?", "Where?", "1"), ("7", "8", "9", "", " ", "1")),
        *(("7", "8", "9", "Who?", "How?", "1"), ("7", "8", "9", "Who?", "How?", "maybe")),
    )
    write(root / "QQP/dev.tsv", QQP, ("1", "2", "3", "Why?", "Why so?", "1"))
    write(root / "QQP/test.tsv", ("id", "question1", "question2"), ("0", "Why?", "Who?"))
    write(root / "MNLI/train.tsv", MNLI_TRAIN, mnli_row(MNLI_TRAIN, "P", "H", "neutral"))
    for kind, label in (("matched", "entailment"), ("mismatched", "contradiction")):
        write(root / f"MNLI/dev_{kind}.tsv", MNLI_DEV, mnli_row(MNLI_DEV, kind, "H", label))
        write(root / f"MNLI/test_{kind}.tsv", MNLI_DEV[:10], ["0", *"abcdefg", kind, "H"])
    columns = ("index", "question", "sentence", "label")
    write(root / "QNLI/train.tsv", columns, ("0", "Who?", "He.", "not_entailment"))
    write(root / "QNLI/dev.tsv", columns, ("0", "Who?", "He.", "entailment"))
    write(root / "QNLI/test.tsv", columns[:3], ("0", "Who?", "He."))
    columns = ("index", "sentence1", "sentence2", "label")
    for folder, labels in (("RTE", ("not_entailment", "entailment")), ("WNLI", ("1", "0"))):
        for name, label in zip(("train", "dev"), labels, strict=True):
            write(root / f"{folder}/{name}.tsv", columns, ("0", "A.", "B.", label), end="\r\n")
        write(root / f"{folder}/test.tsv", columns[:3], ("0", "A.", "B."))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    glue(folder)
    return folder


WANTED = {
    "cola": [('He said "no.', None, 1), ("They drank the pub.", None, 0)],
    "sst2": [("hide new secretions ", None, 0)],
    "mrpc": [('"A', "B", 1), ("C", 'D"', 0)],
    "stsb": [("A plane.", "An aeroplane.", 4.25), ("A plane.", "An aeroplane.", 5.0)],
    "qqp": [("Why?", "How?", 0), ("Who?", "How?", 1)],
    "mnli": [("P", "H", 1)],
    "qnli": [("Who?", "He.", 1)],
    "rte": [("A.", "B.", 1)],
    "wnli": [("A.", "B.", 1)],
}


@pytest.mark.parametrize("task", TASKS)
def test_released_files_of_glue(root, task):
    place = Place(task, root, None)
    train, val, test = (place.read(split) for split in ("train", "val", "test"))
    found = [(each.text, each.pair, each.label) for each in train.usable]
    assert found == WANTED[task]
    assert all(type(each.label) is type(WANTED[task][0][2]) for each in train.usable)
    assert len(val.usable) == len(test.usable) == (2 if task == "mnli" else 1)
    assert not val.broken
    assert not test.broken
    assert all(each.label is None for each in test.usable)
    assert all(each.label is not None for each in val.usable)


def test_the_folder_of_the_task_is_a_root_too(root):
    assert Place("rte", root / "RTE", None).read("val") == Place("rte", root, None).read("val")


def test_a_line_ends_with_a_line_feed_alone(root):
    records = read_glue(root / "SST-2", "sst2", "val")
    assert [each.text for each in records.usable] == ["charming\u2028journey"]


def test_broken_lines_of_qqp_are_told_by_file_and_line(root):
    records = read_glue(root / "QQP", "qqp", "train")
    assert records.size == 6
    assert {number: fault.id for number, fault in records.broken.items()} == {
        1: "train.tsv:3",
        2: "train.tsv:4",
        3: "train.tsv:5",
        5: "train.tsv:7",
    }
    reasons = [fault.reason for fault in records.broken.values()]
    assert reasons[0] == reasons[1] == "3 columns instead of 6"
    assert reasons[2:] == ["no text", "no label of this task: 'maybe'"]


def test_mnli_has_two_validation_files_in_one_split(root):
    records = read_glue(root / "MNLI", "mnli", "val").usable
    assert [(each.text, each.label, each.mismatched) for each in records] == [
        ("matched", 0, False),
        ("mismatched", 2, True),
    ]
    (root / "half").mkdir(exist_ok=True)
    text = (root / "MNLI/dev_matched.tsv").read_text("utf-8")
    (root / "half/dev_matched.tsv").write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"dev_mismatched\.tsv missing beside dev_matched\.tsv"):
        read_glue(root / "half", "mnli", "val")


def original_mrpc(folder: Path, count: int) -> None:
    rows = [(str(n % 2), str(n), str(n + 5000), f"A {n}", f"B {n}") for n in range(count)]
    write(folder / "msr_paraphrase_train.txt", *(MRPC, *rows))
    text = (folder / "msr_paraphrase_train.txt").read_text("utf-8")
    (folder / "msr_paraphrase_train.txt").write_text("\ufeff" + text, "utf-8")
    write(folder / "msr_paraphrase_test.txt", MRPC, rows[0])


def test_the_original_form_of_mrpc_keeps_as_many_for_validation_as_glue(tmp_path):
    original_mrpc(tmp_path, 4076)
    train, val, test = (read_glue(tmp_path, "mrpc", split) for split in ("train", "val", "test"))
    assert (train.size, val.size, test.size) == (3668, 408, 1)
    assert not {each.id for each in train.usable} & {each.id for each in val.usable}
    assert test.usable[0].label == 0


def test_the_pairs_that_glue_validates_on_are_known_by_their_ids(tmp_path):
    original_mrpc(tmp_path, 12)
    write(tmp_path / "dev_ids.tsv", ("3", "5003"), ("11", "5011"), ("3", "5004"))
    train, val = (read_glue(tmp_path, "mrpc", split) for split in ("train", "val"))
    assert [each.text for each in val.usable] == ["A 3", "A 11"]
    assert train.size == 10


def test_a_file_of_another_form_is_refused(tmp_path):
    write(tmp_path / "train.tsv", ("a good film", "1"), ("a bad film", "0"))
    with pytest.raises(UserError, match=r"column sentence missing.*--data.source tsv"):
        read_glue(tmp_path, "sst2", "train")
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(UserError, match=r"cannot read it: .*utf-8"):
        read_glue(tmp_path, "sst2", "train")


def test_file_names_are_the_released_ones():
    assert files("mnli", "test") == ("test_matched.tsv", "test_mismatched.tsv")
    assert files("cola", "val") == ("dev.tsv",)


# -- SWAG ------------------------------------------------------------------------------------------

SWAG = [
    *("", "video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source"),
    *("ending0", "ending1", "ending2", "ending3", "label"),
]


def swag_row(**changes: str) -> dict[str, str]:
    row = dict.fromkeys(SWAG, "x") | {"sent1": "He sits.", "sent2": "He", "label": "2"}
    return row | {f"ending{n}": f"does, {n}." for n in range(4)} | changes


def write_csv(file: Path, columns: list[str], *rows: dict[str, str]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def test_released_files_of_swag(tmp_path):
    rows = [
        *(swag_row(), swag_row(ending1=""), swag_row(ending3="NaN"), swag_row(label="4")),
        *(swag_row(label="second"), swag_row(sent2="", ending0='"Go", he\nsaid.')),
    ]
    write_csv(tmp_path / "train.csv", SWAG, *rows)
    write_csv(
        tmp_path / "test.csv", [c for c in SWAG if c not in ("label", "gold-source")], rows[0]
    )
    train, test = swag.read_swag(tmp_path, "train"), swag.read_swag(tmp_path, "test")
    endings = tuple(f"He does, {n}." for n in range(4))
    assert train.usable[0] == Choice("train.csv:2", "He sits.", endings, 2)
    assert train.usable[1].endings[0] == '"Go", he\nsaid.'
    assert list(train.broken.items()) == [
        (1, Broken("train.csv:3", "no text in ending1")),
        (2, Broken("train.csv:4", "no text in ending3")),
        (3, Broken("train.csv:5", "label '4' is none of 0 to 3")),
        (4, Broken("train.csv:6", "label 'second' is none of 0 to 3")),
    ]
    assert [each.label for each in test.usable] == [None]
    assert swag.read_swag(tmp_path, "val") is None
    write_csv(tmp_path / "val.csv", ["sent1", "sent2"], {})
    with pytest.raises(UserError, match="column ending0, ending1, ending2, ending3 missing"):
        swag.read_swag(tmp_path, "val")


# -- SQuAD -----------------------------------------------------------------------------------------

CONTEXT = "The cat sat on the mat."


def squad_json(*questions: dict) -> str:
    paragraphs = [{"context": CONTEXT, "qas": list(questions)}]
    return json.dumps({"version": "x", "data": [{"title": "t", "paragraphs": paragraphs}]})


def asked(name: str, *answers: tuple[str, int], **other) -> dict:
    listed = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": name, "question": " who? ", "answers": listed, **other}


def test_released_files_of_squad(tmp_path):
    (tmp_path / "train-v1.1.json").write_text(
        squad_json(
            asked("a", ("cat", 4), ("The cat", 0)),
            asked("b", ("mat.", 20)),
            asked("c", ("cat", -1)),
            asked("d"),
            {"id": "e", "question": "who?"},
            {"id": "f", "question": "  "},
        ),
        "utf-8",
    )
    records = squad.read_squad(tmp_path, "squad1", "train")
    assert records.usable == [
        Question("a", "who?", CONTEXT, (("cat", 4), ("The cat", 0))),
        Question("e", "who?", CONTEXT, None),
        Question("f", "", CONTEXT, None),
    ]
    assert records.broken == {
        1: Broken("b", "an answer at 20 of 4 characters is beyond the 23 of its context"),
        2: Broken("c", "an answer at -1 of 3 characters is beyond the 23 of its context"),
        3: Broken("d", "no answer"),
    }
    assert squad.read_squad(tmp_path, "squad1", "val") is None


def test_questions_without_an_answer(tmp_path):
    plausible = {"plausible_answers": [{"text": "cat", "answer_start": 4}]}
    text = squad_json(
        asked("a", ("cat", 4), is_impossible=False), asked("b", is_impossible=True, **plausible)
    )
    (tmp_path / "dev-v2.0.json").write_text(text, "utf-8")
    records = squad.read_squad(tmp_path, "squad2", "val")
    assert [each.answers for each in records.usable] == [(("cat", 4),), ()]


@pytest.mark.parametrize("text", ["{", "[]", '{"data": [{}]}', '{"data": [{"paragraphs": [1]}]}'])
def test_what_is_no_squad(tmp_path, text):
    (tmp_path / "train-v1.1.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"no SQuAD|cannot read it"):
        squad.read_squad(tmp_path, "squad1", "train")


def test_generated_files_go_through_the_same_reader(tmp_path):
    task = OddRun()
    items = task.items(3, range(5))
    write_squad(tmp_path / "train-v1.1.json", task, items, map(str, range(5)))
    records = squad.read_squad(tmp_path, "squad1", "train").usable
    for row, record in enumerate(records):
        text, start = record.answers[0]
        words = [task.vocabulary[token] for token in items.ids[row, 3:-1].tolist()]
        assert record.context == " ".join(words)
        assert record.context[:start].count(" ") == items.start[row] - 3
        assert text.count(" ") == items.end[row] - items.start[row]


# -- plain texts -----------------------------------------------------------------------------------


def test_plain_lines(tmp_path):
    text = 'a "good film\t1\n\nbad\t0\nno label\n\t1\nodd\t7\nlast line\t1'
    (tmp_path / "train.tsv").write_text(text, "utf-8", newline="")
    assert tsv.read_labels(tmp_path / "train.tsv") == ["0", "1", "7"]
    records = tsv.read_split(tmp_path, "train", ["0", "1"])
    assert records.usable == [
        Example("train.tsv:1", 'a "good film', label=1),
        Example("train.tsv:3", "bad", label=0),
        Example("train.tsv:7", "last line", label=1),
    ]
    assert [fault.id for fault in records.broken.values()] == [f"train.tsv:{n}" for n in (4, 5, 6)]
    assert tsv.find(tmp_path, "val") is None
    assert tsv.find(tmp_path / "train.tsv", "train") == tmp_path / "train.tsv"


def test_labels_are_ordered_as_numbers_or_as_words(tmp_path):
    file = tmp_path / "train.tsv"
    file.write_text("a\t10\nb\t9\nc\t-1\n", "utf-8")
    assert tsv.read_labels(file) == ["-1", "9", "10"]
    file.write_text("a\tpos\nb\tneg\n", "utf-8")
    assert tsv.read_labels(file) == ["neg", "pos"]


@pytest.mark.skipif(not REAL.is_dir() or Path("sst2") == REAL, reason="TENFOLD_DATA is not set")
def test_the_real_copy_of_sst2():
    sizes = {split: tsv.read_split(REAL, split, ["0", "1"]) for split in ("train", "val", "test")}
    assert {split: len(found.usable) for split, found in sizes.items()} == {
        "train": 6920,
        "val": 872,
        "test": 1821,
    }
    assert not any(found.broken for found in sizes.values())
    counts = [each.label for each in sizes["val"].usable]
    lines = (REAL / "dev.tsv").read_bytes().splitlines()
    assert counts.count(1) == sum(line.endswith(b"\t1") for line in lines)


# -- Hugging Face datasets -------------------------------------------------------------------------


def tables(source: str, kind: dict):
    import datasets

    names = TASKS[source].names
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("float32")
    columns = dict.fromkeys(TASKS[source].hub_texts, datasets.Value("string"))
    features = datasets.Features({**columns, "label": label, "idx": datasets.Value("int32")})
    splits = {}
    for split, rows in kind.items():
        listed = [
            {**dict(zip(columns, texts, strict=True)), "label": number, "idx": row}
            for row, (*texts, number) in enumerate(rows)
        ]
        splits[split] = datasets.Dataset.from_list(listed, features=features)
    return datasets.DatasetDict(splits)


def test_a_dataset_dict_on_disk_gives_what_the_released_files_give(tmp_path, root, monkeypatch):
    for task in ("cola", "qnli", "mrpc", "rte", "stsb"):
        place = Place(task, root, None)
        kind = {}
        for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
            records = place.read(split).usable
            kind[name] = [
                (*(x for x in (r.text, r.pair) if x), -1 if r.label is None else r.label)
                for r in records
            ]
        tables(task, kind).save_to_disk(str(tmp_path / task))
        saved = Place(task, tmp_path / task, None)
        for split in ("train", "val", "test"):
            ours, theirs = place.read(split).usable, saved.read(split).usable
            assert [r._replace(id="") for r in ours] == [r._replace(id="") for r in theirs]


def test_a_folder_of_parquet_files(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kind = {
        "train": [("P", "H", 1), ("", " ", 2), ("P", "", 2)],
        "validation_matched": [("m", "H", 0)],
        "validation_mismatched": [("mm", "H", 2)],
        "test_matched": [("m", "H", -1)],
        "test_mismatched": [("mm", "H", -1)],
    }
    (tmp_path / "glue/mnli").mkdir(parents=True)
    for split, table in tables("mnli", kind).items():
        table.to_parquet(str(tmp_path / f"glue/mnli/{split}-00000-of-00001.parquet"))
    place = Place("mnli", tmp_path / "glue", None)
    train, val, test = (place.read(split) for split in ("train", "val", "test"))
    assert train.usable == [Example("train:0", "P", "H", 1), Example("train:2", "P", "", 2)]
    assert train.broken == {1: Broken("train:1", "no text")}
    assert [(r.text, r.label, r.mismatched) for r in val.usable] == [
        ("m", 0, False),
        ("mm", 2, True),
    ]
    assert [r.label for r in test.usable] == [None, None]


def test_classes_in_another_order_are_ours_by_their_names():
    import datasets

    kind = {"train": [("A", "B", 0), ("C", "D", 1)]}
    table = tables("rte", kind)["train"]
    swapped = datasets.ClassLabel(names=["not_entailment", "entailment"])
    features = datasets.Features({**table.features, "label": swapped})
    rows = {"train": table.cast(features)}
    records = hub.read_table(rows, "rte", "train", "here")
    assert [r.label for r in records.usable] == [1, 0]
    assert hub.read_table(rows, "rte", "val", "here") is None
    three = datasets.ClassLabel(names=["a", "b", "c"])
    rows = {"train": table.cast(datasets.Features({**table.features, "label": three}))}
    with pytest.raises(UserError, match="3 classes"):
        hub.read_table(rows, "rte", "train", "here")
    with pytest.raises(UserError, match=r"column premise, hypothesis missing.*\(here, train\)"):
        hub.read_table(rows, "mnli", "train", "here")


def test_choices_and_questions_through_datasets(tmp_path):
    import datasets

    row = {k: v for k, v in swag_row().items() if k} | {"label": 3}
    rows = [row, row | {"ending2": None}, row | {"label": -1}]
    records = hub.read_table({"train": datasets.Dataset.from_list(rows)}, "swag", "train", "")
    assert [r.label for r in records.usable] == [3, None]
    assert records.broken == {1: Broken("train:1", "no text in ending2")}
    answers = [{"text": ["cat"], "answer_start": [4]}, {"text": [], "answer_start": []}]
    asks = [
        {"id": str(n), "question": "who?", "context": CONTEXT, "answers": a}
        for n, a in enumerate(answers)
    ]
    table = {"validation": datasets.Dataset.from_list(asks)}
    found = hub.read_table(table, "squad2", "val", "").usable
    assert [r.answers for r in found] == [(("cat", 4),), ()]
    assert hub.read_table(table, "squad1", "val", "").broken == {1: Broken("1", "no answer")}


def test_a_damaged_folder_and_no_way_to_the_hub(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "train.parquet").write_bytes(b"no table")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match="cannot be read"):
        Place("cola", tmp_path, None).read("train")

    def offline(*_: object) -> None:
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        UserError, match=r"Couldn't reach 'nyu-mll/glue' on the Hub.*network"
    ) as got:
        Place("cola", None, "nyu-mll/glue").read("train")
    assert "\n" not in str(got.value)


def test_a_name_on_the_hub_is_asked_with_its_configuration(monkeypatch):
    import datasets

    called = []
    monkeypatch.setattr(
        *(datasets, "load_dataset"),
        lambda *args: called.append(args) or tables("qqp", {"train": [("A", "B", 1)]}),
    )
    place = Place("qqp", None, "nyu-mll/glue")
    assert place.read("train").usable[0].label == 1
    assert place.read("val") is None
    assert called == [("nyu-mll/glue", "qqp")]


# -- a person's own file ---------------------------------------------------------------------------


def test_own_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ttext\n\ntwo", "utf-8")
    assert [r.text for r in read_own(tmp_path / "a.txt", "mlm").usable] == ["one\ttext", "two"]
    (tmp_path / "a.tsv").write_text("one\t1\ntwo\t0\n\t0", "utf-8")
    records = read_own(tmp_path / "a.tsv", "classification")
    assert [r.text for r in records.usable] == ["one", "two"]
    assert records.broken == {2: Broken("a.tsv:3", "an empty text")}
    pairs = read_own(tmp_path / "a.tsv", "classification", ("premise", "hypothesis"))
    assert [(r.text, r.pair) for r in pairs.usable] == [("one", "1"), ("two", "0")]


def test_own_lines_of_json(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"text": "A", "text_pair": "B"}\n{"premise": "C", "hypothesis": "D"}\n{"text": 3}'
    )
    columns = ("premise", "hypothesis")
    records = read_own(file, "classification", columns)
    assert [(r.text, r.pair) for r in records.usable] == [("A", "B"), ("C", "D")]
    assert records.broken == {
        2: Broken("a.jsonl:3", "none of the keys hypothesis, text_pair, pair")
    }
    texts = read_own(file, "classification", ("premise",)).broken
    assert texts == {2: Broken("a.jsonl:3", "an empty text")}
    file.write_text(
        '{"question": "who?", "context": "cat"}\n{"question": "who?"}\n{"context": "cat"}'
    )
    records = read_own(file, "qa")
    assert records.usable == [Question("a.jsonl:1", "who?", "cat", None)]
    reasons = [fault.reason for fault in records.broken.values()]
    assert reasons == ["an empty context", "no question"]
    file.write_text('{"context": "A", "endings": ["b", "c"]}\n{"context": "A", "endings": ["b"]}')
    records = read_own(file, "choice")
    assert records.usable == [Choice("a.jsonl:1", "A", ("b", "c"))]
    assert list(records.broken) == [1]


def test_own_files_of_the_released_forms(tmp_path):
    write_csv(tmp_path / "a.csv", SWAG, swag_row())
    assert read_own(tmp_path / "a.csv", "choice").usable[0].label == 2
    (tmp_path / "a.json").write_text(squad_json({"id": "e", "question": "who?"}), "utf-8")
    assert read_own(tmp_path / "a.json", "qa").usable[0].answers is None


@pytest.mark.parametrize(
    ("name", "text", "task", "what"),
    [
        ("none.txt", None, "mlm", "no such file to predict"),
        ("a.docx", "x", "mlm", "ends in .txt or .tsv or .jsonl"),
        ("a.txt", "x", "qa", "ends in .json or .jsonl"),
        ("a.txt", "\n", "mlm", "nothing to predict"),
        ("a.jsonl", "{", "mlm", r"not JSON.*a.jsonl:1"),
        ("a.jsonl", "3", "mlm", r"not a JSON object.*a.jsonl:1"),
    ],
)
def test_files_that_cannot_be_predicted(tmp_path, name, text, task, what):
    if text is not None:
        (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(UserError, match=what):
        read_own(tmp_path / name, task)


# -- roots -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES[1:])
def test_a_missing_root_tells_what_is_expected_and_where_to_get_it(tmp_path, source):
    place = "rajpurkar|gluebenchmark|rowanz|lines|a line"
    with pytest.raises(UserError, match=f"needs a folder: expected DIR/.*({place})"):
        OversmoothingData(source).setup("fit")
    with pytest.raises(UserError, match=f"no such folder .*nowhere.*expected .*({place})"):
        OversmoothingData(source, str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(UserError, match=f"no (train )?files .*expected .*({place})") as got:
        OversmoothingData(source, str(tmp_path)).setup("fit")
    assert "\n" not in str(got.value)


def test_a_root_and_a_name_are_one_too_many(tmp_path):
    with pytest.raises(UserError, match="both root and hub"):
        Place("cola", tmp_path, "nyu-mll/glue")
    with pytest.raises(UserError, match="not on the hub"):
        Place("tsv", None, "somebody/texts")
