"""The datamodule: sources, splits, determinism, resuming, broken records, checkpoints."""

import json
import logging
import random

import datasets
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from bert_oversmoothing.data import OversmoothingData, odd_run_tokenizer
from bert_oversmoothing.data.generated import TOKENIZER, TRAIN_ITEMS
from bert_oversmoothing.metrics import (
    ChoiceMetric,
    GlueMetric,
    MaskedWordsMetric,
    SquadMetric,
    TaskMetric,
)
from bert_oversmoothing.synthetic import VALIDATION_SEED, OddRun, write_squad
from tenfold.errors import UserError
from tenfold.training import Resumable

WORDS = ("the", "cat", "sat", "on", "the", "mats,", "what", "a", "dog", "is", "who")


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12)))


@pytest.fixture(scope="module")
def bert(tokenizer_folder):
    return str(tokenizer_folder("bert"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder of `sentence TAB label`: 40, 10 and 6 lines."""
    root, draw = tmp_path_factory.mktemp("plain"), random.Random(0)
    for name, count in (("train", 40), ("dev", 10), ("test", 6)):
        lines = [f"{sentence(draw)}\t{n % 3}" for n in range(count)]
        (root / f"{name}.tsv").write_text("\n".join(lines), "utf-8")
    return root


@pytest.fixture(scope="module")
def squad2(tmp_path_factory):
    """A folder of SQuAD 2.0: 12 and 6 questions, every third of them without an answer."""
    root, draw = tmp_path_factory.mktemp("squad"), random.Random(1)
    for name, count in (("train", 12), ("dev", 6)):
        asked = []
        for n in range(count):
            context = " ".join(sentence(draw) for _ in range(6))
            answer = {"text": context.split(" ")[0], "answer_start": 0}
            question = {"id": f"{name}{n}", "question": "who sat?", "answers": [answer]}
            if n % 3 == 0:
                question |= {"answers": [], "is_impossible": True}
            asked.append({"context": context, "qas": [question]})
        content = {"version": "v2.0", "data": [{"title": "t", "paragraphs": asked}]}
        (root / f"{name}-v2.0.json").write_text(json.dumps(content), "utf-8")
    return root


def batches(loader) -> list[dict[str, torch.Tensor]]:
    return list(loader)


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        for one, two in zip(first, second, strict=True)
    )


# -- what a source is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "task", "labels", "names"),
    [
        ({}, "qa", 2, ()),
        ({"form": "parity"}, "classification", 2, ("even", "odd")),
        ({"form": "after"}, "classification", 5, ("c0", "c1", "c2", "c3", "end")),
        ({"form": "choice"}, "choice", 1, ()),
        ({"source": "mnli"}, "classification", 3, ("entailment", "neutral", "contradiction")),
        ({"source": "stsb"}, "classification", 1, ()),
        ({"source": "swag"}, "choice", 1, ()),
        ({"source": "squad2"}, "qa", 2, ()),
        ({"source": "text"}, "mlm", 2, ()),
        ({"source": "cola", "task": "mlm"}, "mlm", 2, ()),
    ],
)
def test_task_and_labels_follow_the_source(options, task, labels, names):
    data = OversmoothingData(**options)
    assert (data.task, data.num_labels, data.label_names) == (task, labels, names)
    assert data.regression == (options.get("source") == "stsb")
    assert data.max_length == (384 if task == "qa" else 128)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"source": "imdb"}, r"source must be one of generated, cola, .*text, got 'imdb'"),
        ({"task": "choice"}, "task 'choice' is none of source generated: it is qa"),
        ({"form": "parity", "task": "mlm"}, "task 'mlm' is none of source generated"),
        ({"source": "swag", "task": "mlm"}, "it is choice.*mlm hides words of the texts of GLUE"),
        ({"max_length": 3}, "max_length must be at least 8"),
        ({"stride": -1}, "stride must be at least 0"),
        ({"context": 3}, "context must be at least 4"),
        ({"batch_size": 0}, "at least one item"),
    ],
)
def test_options_that_do_not_go(options, what):
    with pytest.raises(UserError, match=what):
        OversmoothingData(**options)


def test_what_cannot_be_known_is_asked_for(plain, squad2, bert):
    with pytest.raises(UserError, match=r"source tsv needs a tokenizer.*--data.tokenizer"):
        OversmoothingData("tsv", str(plain)).train_dataloader()
    with pytest.raises(UserError, match="asks no questions"):
        OversmoothingData("tsv", str(plain)).answers("val")
    with pytest.raises(UserError, match="train_size 41 is more than the 40"):
        OversmoothingData("tsv", str(plain), train_size=41).setup("fit")
    with pytest.raises(UserError, match="words are learned from texts alone"):
        OversmoothingData("squad2", str(squad2), tokenizer="word").train_dataloader()
    data = OversmoothingData("tsv", str(plain), tokenizer=bert, max_length=600)
    data.tokenizer.model_max_length = 512
    with pytest.raises(UserError, match="max_length 600 is more than the 512"):
        data.train_dataloader()


def test_a_tokenizer_may_be_given_or_set(plain, bert):
    data = OversmoothingData("tsv", str(plain))
    assert data.tokenizer is None
    other = OversmoothingData("tsv", str(plain), tokenizer=bert)
    data.tokenizer = other.tokenizer
    again = OversmoothingData("tsv", str(plain), tokenizer=other.tokenizer)
    assert "tokenizer" not in again.hparams
    for each in (data, again):
        assert same(batches(each.val_dataloader()), batches(other.val_dataloader()))


# -- batches ---------------------------------------------------------------------------------------


def test_batches_of_a_plain_table(plain, bert):
    data = OversmoothingData("tsv", str(plain), tokenizer=bert, batch_size=8)
    data.setup("fit")
    assert data.num_labels == 3
    found = batches(data.train_dataloader())
    assert [len(batch["index"]) for batch in found] == [8] * 5
    lines = (plain / "train.tsv").read_text("utf-8").split("\n")
    for batch in found:
        for ids, mask, label, index in zip(
            *(batch[name] for name in ("input_ids", "attention_mask", "labels", "index")),
            strict=True,
        ):
            text, written = lines[index].split("\t")
            assert ids[mask.bool()].tolist() == data.tokenizer(text)["input_ids"]
            assert label == int(written)
    assert sorted(torch.cat([batch["index"] for batch in found]).tolist()) == list(range(40))
    sizes = [len(loader.dataset) for loader in (data.val_dataloader(), data.test_dataloader())]
    assert sizes == [10, 6]


def test_subsets_are_drawn_by_the_seed_and_validation_is_not(plain, bert):
    def chosen(seed: int, **sizes: int) -> tuple[list[str], list[str]]:
        data = OversmoothingData("tsv", str(plain), tokenizer=bert, seed=seed, **sizes)
        return tuple([r.id for r in data.splits.drawn(split)] for split in ("train", "val"))

    first, second = chosen(0, train_size=20, val_size=4), chosen(1, train_size=20, val_size=4)
    assert first[0] != second[0]
    assert first[1] == second[1]
    assert len(set(first[0])) == 20
    assert set(chosen(0, train_size=5)[0]) < set(first[0])
    assert chosen(0) == chosen(1)


def test_windows_of_questions(squad2, bert):
    data = OversmoothingData(
        "squad2", str(squad2), tokenizer=bert, max_length=40, stride=8, batch_size=4
    )
    data.setup("fit")
    whole = batches(data.val_dataloader())
    index = torch.cat([batch["index"] for batch in whole])
    assert index.tolist() == list(range(len(data.answers("val").question)))
    assert len(index) > 6
    starts = torch.cat([batch["start_positions"] for batch in whole])
    answered = [data.answers("val").golds[n] != () for n in data.answers("val").question]
    assert not starts[~torch.tensor(answered)].any()
    metric = data.metric("val")
    for batch in whole:
        hot = {"start": batch["start_positions"], "end": batch["end_positions"]}
        width = batch["input_ids"].shape[1]
        logits = {
            f"{k}_logits": 9.0 * torch.nn.functional.one_hot(v, width) for k, v in hot.items()
        }
        metric.update(logits, batch)
    found = metric.compute()
    assert (found["exact"], found["HasAns_total"], found["NoAns_total"]) == (100, 4, 2)
    train = batches(data.train_dataloader())
    assert data.answers("train").offsets == []
    assert len(train) == len(data.answers("train").question) // 4


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"source": "tsv"}, TaskMetric),
        ({"source": "tsv", "task": "mlm"}, MaskedWordsMetric),
        ({"source": "text"}, MaskedWordsMetric),
        ({}, SquadMetric),
        ({"form": "choice"}, ChoiceMetric),
        ({"form": "after"}, TaskMetric),
    ],
)
def test_every_batch_fits_the_metric_of_its_source(options, kind, plain):
    data = OversmoothingData(root=str(plain), tokenizer="word", val_size=8, **options)
    data.setup("fit")
    metric, (batch,) = data.metric("val"), batches(data.val_dataloader())
    assert type(metric) is kind
    count, width = len(batch["index"]), batch["input_ids"].shape[-1]
    shape = {"qa": (count, width), "mlm": (count, width, len(data.tokenizer))}
    classes = 4 if data.task == "choice" else data.num_labels
    logits = torch.randn(shape.get(data.task, (count, classes)))
    names = ("start_logits", "end_logits") if data.task == "qa" else ("logits",)
    metric.update(dict.fromkeys(names, logits), batch)
    assert metric.compute()["score"] >= 0


# -- the generated task ----------------------------------------------------------------------------


def test_written_items_are_read_as_they_are_generated(tmp_path):
    task = OddRun()
    streams = (("train", "train", 5, 20), ("dev", "validation", VALIDATION_SEED, 10))
    for name, stream, seed, count in streams:
        items, ids = task.items(seed, range(count), stream), (f"{stream}-{n}" for n in range(count))
        write_squad(tmp_path / f"{name}-v1.1.json", task, items, ids)
    folder = str(tmp_path / TOKENIZER)
    odd_run_tokenizer(task).save_pretrained(folder)
    written = OversmoothingData("squad1", str(tmp_path), tokenizer=folder, seed=5, batch_size=5)
    made = OversmoothingData(train_size=20, val_size=10, seed=5, batch_size=5)
    for data in (written, made):
        data.setup("fit")
    for loaders in ("train_dataloader", "val_dataloader"):
        ours, theirs = (batches(getattr(data, loaders)()) for data in (made, written))
        assert same(
            [{name: batch[name] for name in sorted(batch)} for batch in ours],
            [{name: batch[name] for name in sorted(batch)} for batch in theirs],
        )
    ours, theirs = made.answers("val"), written.answers("val")
    assert (list(ours.ids), list(ours.contexts)) == (theirs.ids, theirs.contexts)
    assert (list(ours.golds), list(ours.question)) == (theirs.golds, theirs.question)
    for one, two in zip(ours.offsets, theirs.offsets, strict=True):
        assert (one == two).all()


def test_sizes_of_the_generated_task():
    data = OversmoothingData()
    sizes = [len(each) for each in (data.train_dataset(), data.val_dataset(), data.test_dataset())]
    assert sizes == [TRAIN_ITEMS, 384, 384]
    larger = OversmoothingData(categories=6, words=10, context=24)
    assert larger.train_dataset()[0]["input_ids"].shape == (28,)
    assert len(larger.tokenizer) == 69


# -- determinism -----------------------------------------------------------------------------------


def test_two_workers_give_what_none_give(plain, squad2, bert):
    options = [
        {"source": "text", "root": str(plain), "bucket": 3, "tokenizer": bert},
        {"source": "squad2", "root": str(squad2), "tokenizer": bert},
        {"form": "after", "train_size": 24},
    ]
    for given in options:
        found = []
        for workers in (0, 2):
            data = OversmoothingData(**given, batch_size=4, workers=workers, seed=2)
            data.setup("fit")
            loader = data.train_dataloader()
            loader.sampler.set_epoch(1)
            found.append(batches(loader))
            loader.close()
        assert same(*found)
        assert len(found[0]) > 2


class Crash(Exception):
    pass


class Recorder(LightningModule):
    """Keeps the batches that it is given, and breaks off at one of them."""

    def __init__(self, crash: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.crash = crash
        self.seen: list[dict[str, torch.Tensor]] = []

    def training_step(self, batch, _):
        if len(self.seen) == self.crash:
            raise Crash
        self.seen.append(batch)
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(data, folder, crash=None, ckpt=None):
    module = Recorder(crash)
    trainer = Trainer(
        max_steps=13,
        accelerator="cpu",
        callbacks=[Resumable(every_n_steps=4)],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bucket", [0, 2])
def test_a_run_goes_on_in_the_middle_of_an_epoch(plain, tmp_path, bucket):
    def data(**other):
        options = {"tokenizer": "word", "bucket": bucket, "batch_size": 8} | other
        return OversmoothingData("text", str(plain), **options)

    whole = train(data(), tmp_path / "whole")
    with pytest.raises(Crash):
        train(data(), tmp_path / "part", crash=10)
    rest = train(data(), tmp_path / "part", ckpt=tmp_path / "part/last.ckpt")
    assert len(whole) == 13  # epochs have five batches
    assert same(whole[8:], rest)
    assert not same(whole[:5], whole[5:10])  # another order, and other words hidden
    with pytest.raises(UserError, match=r"cannot be resumed \(.*bucket"):
        train(data(bucket=bucket + 1), tmp_path / "part", ckpt=tmp_path / "part/last.ckpt")


def test_a_checkpoint_keeps_the_words_and_the_classes(plain, tmp_path):
    data = OversmoothingData("tsv", str(plain), tokenizer="word")
    data.setup("fit")
    state = json.loads(json.dumps(data.state_dict()))
    (tmp_path / "dev.tsv").write_text("the zebra sat\t1\nthe cat\t0", "utf-8")
    other = OversmoothingData("tsv", str(tmp_path), tokenizer="word")
    other.load_state_dict(state)
    assert other.label_names == ("0", "1", "2")
    assert other.tokenizer.get_vocab() == data.tokenizer.get_vocab()
    other.setup("validate")
    (batch,) = batches(other.val_dataloader())
    assert batch["labels"].tolist() == [1, 0]
    (tmp_path / "train.tsv").write_text("x\tbad\ny\tgood", "utf-8")
    third = OversmoothingData("tsv", str(tmp_path))
    third.splits.drawn("train")
    with pytest.raises(UserError, match="classes bad, good, but the model learned 0, 1, 2"):
        third.load_state_dict(state)
    assert OversmoothingData("tsv", str(plain)).state_dict() == {"labels": ["0", "1", "2"]}
    assert OversmoothingData().state_dict() == {}


# -- what is broken --------------------------------------------------------------------------------


def test_broken_records_stop_or_are_counted(tmp_path, bert, caplog):
    lines = "cat\t0\nno label\ndog\t1\nsat\t0\n\t1\nmat\t1"
    (tmp_path / "train.tsv").write_text(lines, "utf-8")
    (tmp_path / "dev.tsv").write_text("cat\t0", "utf-8")
    options = {"root": str(tmp_path), "tokenizer": bert, "batch_size": 2}
    what = r"item 1 of train cannot be used: train.tsv:2, no `sentence.*on_bad_item skip"
    with pytest.raises(UserError, match=what):
        OversmoothingData("tsv", **options).setup("fit")
    data = OversmoothingData("tsv", **options, on_bad_item="skip")
    data.setup("fit")
    with caplog.at_level(logging.WARNING):
        found = batches(data.train_dataloader())
    assert sorted(torch.cat([batch["index"] for batch in found]).tolist()) == [0, 1, 2, 3]
    assert "2 of 6 items of train were skipped" in caplog.text
    assert "train.tsv:5" in caplog.text
    assert not data.bad_items["train"].reasons.keys() ^ {1, 4}


def test_questions_without_room_stop_or_are_counted(squad2, tmp_path, bert):
    content = json.loads((squad2 / "train-v2.0.json").read_text("utf-8"))
    paragraphs = content["data"][0]["paragraphs"]
    paragraphs[1]["qas"][0]["answers"][0]["answer_start"] = 5000
    paragraphs[4]["qas"][0]["question"] = "who " * 60
    (tmp_path / "train-v2.0.json").write_text(json.dumps(content), "utf-8")
    options = {"root": str(tmp_path), "tokenizer": bert, "max_length": 60, "stride": 8}
    with pytest.raises(
        UserError, match="item 1 of train cannot be used: train1, an answer at 5000"
    ):
        OversmoothingData("squad2", **options).setup("fit")
    data = OversmoothingData("squad2", **options, on_bad_item="skip", batch_size=2)
    data.setup("fit")
    loader = data.train_dataloader()
    assert sorted(data.bad_items["train"].reasons) == [1, 4]
    assert "train4, its 60 tokens leave" in data.bad_items["train"].reasons[4]
    assert len(data.answers("train").ids) == 10
    assert len(batches(loader)) == len(data.answers("train").question) // 2
    del paragraphs[1]
    (tmp_path / "train-v2.0.json").write_text(json.dumps(content), "utf-8")
    data = OversmoothingData("squad2", **options)
    data.setup("fit")
    with pytest.raises(UserError, match="item 3 of train cannot be used: train4, its 60 tokens"):
        data.train_dataloader()


def test_nothing_usable(tmp_path, bert):
    (tmp_path / "train.tsv").write_text("no label", "utf-8")
    data = OversmoothingData("tsv", str(tmp_path), tokenizer=bert, on_bad_item="skip")
    with pytest.raises(UserError, match="no record of train can be used"):
        data.setup("fit")


# -- stages ----------------------------------------------------------------------------------------


def test_a_test_split_without_labels_is_predicted_not_tested(tmp_path, bert):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nthe cat\t1", "utf-8")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na dog\t0\na cat\t1", "utf-8")
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\twho sat\n1\ton\n2\tmat", "utf-8")
    data = OversmoothingData("sst2", str(tmp_path), tokenizer=bert)
    data.setup("test")
    assert (data.split_of("test"), data.split_of("predict")) == ("val", "test")
    assert len(data.test_dataset()) == 2
    assert type(data.metric("test")) is GlueMetric
    (batch,) = batches(data.predict_dataloader())
    assert "labels" not in batch
    assert len(batch["index"]) == 3


def test_one_s_own_file_is_predicted_without_a_root(tmp_path, bert):
    file = tmp_path / "own.txt"
    file.write_text("the cat\nwho sat on the mat", "utf-8")
    data = OversmoothingData("sst2", tokenizer=bert, predict_root=str(file))
    data.setup("predict")
    (batch,) = batches(data.predict_dataloader())
    assert batch["input_ids"].shape[0] == 2
    assert sorted(batch) == ["attention_mask", "index", "input_ids", "token_type_ids"]
    data.metric("predict")
    file = tmp_path / "own.jsonl"
    file.write_text('{"question": "which c1", "context": "c0w1 c1w2 c1w0"}', "utf-8")
    data = OversmoothingData(predict_root=str(file))
    data.setup("predict")
    (batch,) = batches(data.predict_dataloader())
    words = data.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert words == ["[CLS]", "c1", "[SEP]", "c0w1", "c1w2", "c1w0", "[SEP]"]
    assert data.answers("predict").golds == [None]
    data = OversmoothingData(form="after", predict_root=str(file))
    data.setup("predict")
    (pair,) = batches(data.predict_dataloader())
    assert torch.equal(pair["input_ids"], batch["input_ids"])


def test_training_does_without_validation(tmp_path, bert):
    (tmp_path / "train.txt").write_text("the cat\na dog", "utf-8")
    data = OversmoothingData("text", str(tmp_path), tokenizer=bert)
    data.setup("fit")
    assert data.val_dataset() is None
    with pytest.raises(UserError, match="no val split"):
        data.val_dataloader()


@pytest.mark.parametrize(
    ("source", "train", "text", "missing"),
    [
        ("tsv", "train.tsv", "the cat\t1", "dev.tsv"),
        ("text", "train.txt", "the cat", "dev.txt"),
        ("rte", "train.tsv", "sentence1\tsentence2\tlabel\na\tb\tentailment", "dev.tsv"),
        (
            *("mnli", "train.tsv", "sentence1\tsentence2\tgold_label\na\tb\tneutral"),
            "dev_matched.tsv and dev_mismatched.tsv",
        ),
        ("squad1", "train-v1.1.json", '{"version": "1.1", "data": []}', "dev-v1.1.json"),
        ("swag", "train.csv", "sent1,sent2,ending0,ending1,label\na,b,c,d,0", "val.csv"),
    ],
)
def test_a_missing_validation_is_told_in_a_line(tmp_path, caplog, source, train, text, missing):
    (tmp_path / train).write_text(text, "utf-8")
    data = OversmoothingData(source, str(tmp_path))
    with caplog.at_level(logging.WARNING):
        data.splits.validated()
    assert caplog.messages == [f"no {missing} in {tmp_path}: nothing is validated"]


def test_validation_of_one_file_and_of_saved_tables_is_told_too(tmp_path, caplog):
    (tmp_path / "all.tsv").write_text("the cat\t1", "utf-8")
    OversmoothingData("tsv", str(tmp_path / "all.tsv")).setup("fit")
    rows = {"sentence": ["the cat"], "label": [1], "idx": [0]}
    tables = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    tables.save_to_disk(tmp_path / "saved")
    OversmoothingData("sst2", str(tmp_path / "saved")).setup("fit")
    assert caplog.messages == [
        f"no dev.tsv is read beside {tmp_path / 'all.tsv'}: nothing is validated",
        f"no validation split in {tmp_path / 'saved'}: nothing is validated",
    ]


def test_a_validation_that_is_there_is_not_talked_of(plain, caplog):
    OversmoothingData("tsv", str(plain)).setup("fit")
    OversmoothingData(form="parity").setup("fit")
    assert not caplog.messages


def test_items_are_named_by_their_texts(tmp_path, plain):
    file = tmp_path / "own.tsv"
    file.write_text("the cat\tsat\n \t\na dog\tran\tmore\n", "utf-8")
    data = OversmoothingData("rte", predict_root=str(file), on_bad_item="skip")
    named = [{"text": "the cat", "text_pair": "sat"}, {"text": "a dog", "text_pair": "ran"}]
    assert data.texts() == named  # numbered without the broken line, as `index` is
    lines = (plain / "test.tsv").read_text("utf-8").splitlines()
    tsv = OversmoothingData("tsv", str(plain))
    assert tsv.texts() == [{"text": line.rpartition("\t")[0]} for line in lines]
    assert OversmoothingData(form="parity").texts() == []


def test_mnli_validates_on_both_kinds(tmp_path, bert):
    columns = "sentence1\tsentence2\tgold_label\n"
    (tmp_path / "train.tsv").write_text(columns + "the cat\ta dog\tneutral", "utf-8")
    (tmp_path / "dev_matched.tsv").write_text(columns + "cat\tsat\tneutral", "utf-8")
    (tmp_path / "dev_mismatched.tsv").write_text(columns + "on\tmat\tentailment", "utf-8")
    data = OversmoothingData("mnli", str(tmp_path), tokenizer=bert)
    data.setup("fit")
    metric, (batch,) = data.metric("val"), batches(data.val_dataloader())
    metric.update({"logits": torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])}, batch)
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == {"accuracy_m": 1, "accuracy_mm": 0, "score": 0.5}
