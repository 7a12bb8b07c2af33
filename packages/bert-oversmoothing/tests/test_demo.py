"""The demo and the data on disk: what is printed, written, and refused."""

import csv
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from bert_oversmoothing import comparison, synthetic
from bert_oversmoothing.cli import app
from bert_oversmoothing.commands.data import reading
from bert_oversmoothing.commands.demo import odd_run_finding, probe_finding
from bert_oversmoothing.data import open_tokenizer, swag, tsv
from bert_oversmoothing.synthetic import OddRun, read_squad

TASK = OddRun()


def run(*argv: object) -> int:
    return app.main([*map(str, argv)])


def refused(capsys, *argv: object) -> str:
    capsys.readouterr()
    assert run(*argv) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


# -- the demo ----------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """The module of the command, with fewer encoders in part A and fewer items to judge by."""
    module = sys.modules["bert_oversmoothing.commands.demo"]
    fewer = functools.partial(comparison.frozen_probe, stds=(0.05, 0.2), heads=("last", "concat"))
    monkeypatch.setattr(module, "frozen_probe", fewer)
    monkeypatch.setattr(synthetic, "VALIDATION_ITEMS", 24)
    return module


def row(text: str, start: str) -> list[str]:
    return next(x for x in text.splitlines() if x.startswith(start))[len(start) :].split()


def test_a_demo_tells_draws_and_is_not_done_again(small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"
    assert run("demo", "--out", out, "--steps", 1, "--seeds", 2, "--seed", 3, "--identity") == 0
    told = capsys.readouterr().out
    found = json.loads((out / "metrics.json").read_text())
    accuracy = found["frozen_probe"]["accuracy"]
    assert accuracy["last"].keys() == {"0.05", "0.2"}
    a, b = accuracy["concat"]["0.2"]
    cells = row(told, "concat")
    assert cells[3] == f"{50 * (a + b):.1f}"
    assert cells[5] == f"{100 * abs(a - b) / 2**0.5:.1f}"
    part_b = told[told.index("B. Find") :]
    scores = found["odd_run"]["em"]
    assert [*scores] == [*comparison.HEADS, "gate_identity"]
    a, b = scores["scalar_mix"]
    c, d = scores["last"]
    cells = row(part_b, "scalar mix (ELMo)")
    assert cells[0] == f"{50 * (a + b):.1f}"
    assert cells[3] == f"{50 * (a + b - c - d):+.1f}"
    assert cells[4:7] == [str((a > c) + (b > d)), "of", "2"]
    assert "gate, identity start" in part_b
    assert "no head has learned what it can" in told
    for name in ("frozen_probe", "odd_run"):
        assert f"wrote {out / name}.png" in told
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 200

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(comparison.end_to_end, "_seed_runs", never)
    monkeypatch.setattr(comparison.frozen, "probe_encoder", never)
    for name in ("draw_frozen_probe", "draw_odd_run"):
        monkeypatch.setattr(small, name, lambda *_: None)
    again = ("demo", "--out", out, "--seeds", 2, "--seed", 3, "--identity")
    assert run(*again, "--minutes", 9) == 0
    assert capsys.readouterr().out.startswith("1 steps\n")
    assert json.loads((out / "metrics.json").read_text()) == found
    assert "take steps 1, remove the folder" in refused(capsys, *again, "--steps", 2)


def test_the_findings_are_those_of_the_scores():
    last, middle, best = [0.1, 0.2], [0.3, 0.3], [0.5, 0.6]
    scores = {
        "last": last,
        "concat": best,
        "max": [0.4, 0.1],
        "gate": middle,
        "scalar_mix": [0.2, 0.35],
        "best_layer(3)": [0.45, 0.5],
    }
    told = odd_run_finding({"em": scores})
    assert "concat > block 3 alone > gate > scalar mix (ELMo) > max > last layer" in told
    assert "Better than the last layer in every seed: concat, gate." in told
    assert "the gate is the best of the three; here it is concat" in told
    assert "the gate wins 1 of 2 seeds (+2.5 points in the mean)" in told
    assert "Better than block 3 alone, a shallow net, in every seed: concat." in told
    told = odd_run_finding({"em": scores | {"gate": [0.7, 0.8], "concat": last}})
    assert "The gate is the best of the three fusions, as in the paper." in told
    assert "in every seed: gate." in told
    told = probe_finding(
        {
            "std": [0.1, 0.2],
            "chance": 0.125,
            "cosine": {0.1: [0.5], 0.2: [0.99]},
            "accuracy": {"last": {0.1: [0.6], 0.2: [0.13]}, "concat": {0.1: [1.0], 0.2: [0.98]}},
        }
    )
    assert "similarity of 0.99, it tells 13 % of the classes (chance 12.5 %); concat 98 %" in told
    assert "not that fusion makes a trained encoder better" in told.replace("\n", " ")


def test_a_demo_that_was_broken_off_in_part_a_names_the_steps_of_part_b(
    small, tmp_path, capsys, monkeypatch
):
    def broken(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.frozen, "probe_encoder", broken)
    assert run("demo", "--out", tmp_path, "--steps", 50) == 130
    assert "results of steps 50, not 150" in refused(capsys, "demo", "--out", tmp_path)


def test_what_a_demo_refuses(tmp_path, capsys):
    out = tmp_path / "out"
    for minutes in ("0", "-1"):
        line = refused(capsys, "demo", "--out", out, "--minutes", minutes)
        assert "--minutes must be above 0" in line
    assert "--steps must be 1 or more" in refused(capsys, "demo", "--steps", 0)
    assert "--seeds must be 1 or more" in refused(capsys, "demo", "--seeds", 0)
    assert not out.exists()


# -- the data ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "deep" / "odd-run"
    assert run("data", "--out", out, "--train", 40, "--validation", 9, "--seed", 6) == 0
    return out


def test_the_questions_are_the_items(written):
    for file, items in (
        ("train-v1.1.json", TASK.items(6, range(40))),
        ("dev-v1.1.json", TASK.items(0, range(9), "validation")),
    ):
        back = read_squad(written / "qa" / file, TASK)
        assert all(torch.equal(a, b) for a, b in zip(items, back, strict=True))


def test_the_tokenizer_gives_the_ids_of_the_items(written):
    tokenizer = open_tokenizer(str(written / "tokenizer"))
    content = json.loads((written / "qa" / "train-v1.1.json").read_text())
    for ids, paragraph in zip(
        TASK.items(6, range(40)).ids, content["data"][0]["paragraphs"], strict=True
    ):
        assert (
            tokenizer(paragraph["qas"][0]["question"], paragraph["context"])["input_ids"]
            == ids.tolist()
        )


def asked(sentence: str) -> tuple[list[str], int, int]:
    """Words of the context, and where the run of the category that is asked for begins and ends."""
    which, category, *words = sentence.split(" ")
    assert which == "which"
    inside = [n for n, word in enumerate(words) if word.startswith(f"{category}w")]
    assert inside == [*range(inside[0], inside[-1] + 1)]
    return words, inside[0], inside[-1] + 1


@pytest.mark.parametrize("form", ["parity", "after"])
def test_the_labels_are_those_of_the_sentences(written, form):
    for file, count in (("train.tsv", 40), ("dev.tsv", 9)):
        lines = (written / form / file).read_text().splitlines()
        assert len(lines) == count
        names = [*map(str, range(2 if form == "parity" else 5))]
        read = [*tsv.read_labelled(written / form / file, names)]
        for line, example in zip(lines, read, strict=True):
            sentence, label = line.split("\t")
            assert (example.text, example.label) == (sentence, int(label))
            words, start, stop = asked(sentence)
            following = int(words[stop][1]) if stop < 12 else 4
            assert int(label) == ((stop - start) % 2 if form == "parity" else following)


def test_one_ending_is_the_run(written):
    for file, count in (("train.csv", 40), ("val.csv", 9)):
        with (written / "choice" / file).open(newline="") as stream:
            rows = [*csv.DictReader(stream)]
        assert len(rows) == count
        read = [*swag.read_table(written / "choice" / file)]
        for made, choice in zip(rows, read, strict=True):
            words, start, stop = asked(made["sent1"])
            endings = [made[f"ending{n}"] for n in range(4)]
            right = [n for n, e in enumerate(endings) if e == " ".join(words[start:stop])]
            assert right == [int(made["label"])]
            assert all(f" {ending} " in f" {' '.join(words)} " for ending in endings)
            assert (choice.context, choice.label) == (made["sent1"], right[0])
            assert choice.endings == tuple(endings)


def test_the_same_data_are_left_and_others_are_not_written_over(written, tmp_path, capsys):
    options = ("--train", 5, "--validation", 3)
    out = tmp_path / "odd"
    assert run("data", "--out", out, *options) == 0
    told = capsys.readouterr().out
    for form in ("qa", "parity", "after", "choice"):
        assert f"fit {' '.join(reading(out, form))}" in told
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert run("data", "--out", out, *options) == 0
    assert "has these items already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == before
    line = refused(capsys, "data", "--out", out, *options, "--seed", 1)
    assert str(out / "after" / "train.tsv") in line
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(capsys, "data", "--out", out, *options)
    assert "a file already" in refused(capsys, "data", "--out", out / "notes.txt", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]
    for option in ("--train", "--validation", "--words"):
        assert f"{option} must be 1 or more" in refused(capsys, "data", option, 0)
    assert "--context must be 4 or more" in refused(capsys, "data", "--context", 3)
