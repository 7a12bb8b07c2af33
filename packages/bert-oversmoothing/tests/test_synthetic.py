"""The embedded tasks against their description: distributions, determinism, forms, files."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from bert_oversmoothing import synthetic
from bert_oversmoothing.synthetic import (
    CLS,
    PAD,
    SEP,
    OddRun,
    answer_mask,
    exact_match,
    mask_logits,
    probe_task,
    read_squad,
    span_loss,
    write_squad,
)
from tenfold.errors import UserError

TASK = OddRun()
LARGE = OddRun(categories=6, words=10, context=24)


@pytest.fixture(scope="module")
def items():
    return TASK.items(5, range(6000))


def uniform(values, wanted) -> bool:
    """A chi-square test does not tell the values from uniform ones over `wanted`."""
    values = torch.as_tensor(values).tolist()
    assert set(values) == set(wanted)
    return chisquare([values.count(w) for w in wanted]).pvalue > 1e-3


def category_of(task, token):
    """By the word's own name, c<category>w<word>."""
    return int(task.vocabulary[token][1:].split("w")[0])


def test_sizes():
    assert (TASK.vocab_size, TASK.tokens, len(TASK.vocabulary)) == (23, 16, 23)
    assert (LARGE.vocab_size, LARGE.tokens) == (3 + 6 + 60, 28)
    assert TASK.vocabulary[3:9] == ("c0", "c1", "c2", "c3", "c0w0", "c0w1")
    with pytest.raises(ValueError, match="at least 2 categories"):
        OddRun(categories=1)


@pytest.mark.parametrize("task", [TASK, LARGE], ids=["default", "large"])
def test_an_item_is_what_its_description_says(task):
    items = task.items(3, range(200))
    for row, start, end, category in zip(*(part.tolist() for part in items), strict=True):
        assert (row[0], row[1], row[2], row[-1]) == (CLS, 3 + category, SEP, SEP)
        assert 3 <= start <= end <= start + 2
        assert end < task.tokens - 1
        for place in range(3, task.tokens - 1):
            inside = start <= place <= end
            assert (category_of(task, row[place]) == category) == inside


def test_category_and_run_length_are_uniform(items):
    assert uniform(items.category, range(4))
    assert uniform(items.end - items.start + 1, range(1, 4))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_start_is_uniform_where_the_run_fits(items, length):
    chosen = items.end - items.start + 1 == length
    assert uniform(items.start[chosen], range(3, 15 - length + 1))


@pytest.mark.parametrize("category", range(4))
def test_words_are_uniform_inside_and_outside_the_run(items, category):
    place = torch.arange(16)
    inside = (place >= items.start[:, None]) & (place <= items.end[:, None])
    mine = (items.category == category)[:, None]
    own = range(7 + 4 * category, 11 + 4 * category)
    assert uniform(items.ids[mine & inside], own)
    context = mine & ~inside & (place >= 3) & (place < 15)
    assert uniform(items.ids[context], [w for w in range(7, 23) if w not in own])


def test_an_item_depends_on_seed_and_index_alone():
    together = TASK.items(9, range(40))
    for index in (0, 17, 39):
        alone = TASK.items(9, [index])
        assert all(
            torch.equal(a[index : index + 1], b) for a, b in zip(together, alone, strict=True)
        )
    backwards = TASK.items(9, range(39, -1, -1))
    assert torch.equal(backwards.ids.flip(0), together.ids)
    assert not torch.equal(TASK.items(10, range(40)).ids, together.ids)
    assert len({tuple(row) for row in together.ids.tolist()}) == 40


def test_the_validation_is_fixed_and_apart_from_the_training():
    validation = TASK.validation()
    assert validation.ids.shape == (384, 16)
    assert torch.equal(validation.ids, TASK.validation().ids)
    training = {tuple(row) for row in TASK.items(0, range(384)).ids.tolist()}
    assert not training & {tuple(row) for row in validation.ids.tolist()}


# ---------------------------------------------------------------------------------- the forms


def test_answers_can_be_at_context_words_alone():
    items = TASK.items(0, range(3))
    assert torch.equal(answer_mask(items.ids), items.ids >= 7)
    logits = torch.randn(3, 16, 2)
    masked = mask_logits(logits, items.ids)
    assert torch.equal(masked[:, 3:15], logits[:, 3:15])
    assert (masked[:, :3] == -torch.inf).all()
    assert (masked[:, 15] == -torch.inf).all()


def test_span_loss_is_the_cross_entropy_over_the_context():
    items = TASK.items(0, range(5))
    assert span_loss(torch.zeros(5, 16, 2), items).item() == pytest.approx(math.log(12))
    logits = torch.randn(5, 16, 2, dtype=torch.float64, requires_grad=True)
    total = 0.0
    for row, places in enumerate(zip(items.start.tolist(), items.end.tolist(), strict=True)):
        for side, place in enumerate(places):
            scores = logits[row, 3:15, side].tolist()
            total += math.log(sum(map(math.exp, scores))) - logits[row, place, side].item()
    loss = span_loss(logits, items)
    assert loss.item() == pytest.approx(total / 10, abs=1e-12)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[:, [0, 1, 2, 15]] == 0).all()


def test_exact_match_wants_both_ends():
    items = TASK.items(0, range(4))
    logits = torch.zeros(4, 16, 2)
    rows = torch.arange(4)
    logits[rows, items.start, 0] = 1
    logits[rows, items.end, 1] = 1
    logits[:, 0] = 9  # CLS is no answer
    assert exact_match(logits, items).all()
    logits[1, (items.start[1] + 1 - 3) % 12 + 3, 0] = 2
    logits[2, (items.end[2] + 1 - 3) % 12 + 3, 1] = 2
    assert exact_match(logits, items).tolist() == [True, False, False, True]


def test_labels_of_the_classification_form(items):
    parity, after = TASK.labels(items, "parity"), TASK.labels(items, "after")
    ends = 0
    for row in range(300):
        start, end = int(items.start[row]), int(items.end[row])
        assert parity[row] == (end - start + 1) % 2
        following = int(items.ids[row, end + 1])
        ends += following == SEP
        assert after[row] == (4 if following == SEP else category_of(TASK, following))
    assert ends
    with pytest.raises(ValueError, match="label must be"):
        OddRun.labels.__wrapped__(TASK, items, "before")


@pytest.mark.parametrize("task", [TASK, OddRun(2, 1, 4)], ids=["default", "smallest"])
def test_one_of_four_different_spans_is_the_run(task):
    items, choices = task.items(2, range(300)), task.choices(2, range(300))
    n = task.tokens
    for row in range(300):
        start, end = int(items.start[row]), int(items.end[row])
        spans = []
        for text, mask in zip(choices.ids[row], choices.mask[row], strict=True):
            assert text[mask].tolist() == [t for t in text.tolist() if t != PAD]
            real = text[mask].tolist()
            assert real[:n] == items.ids[row].tolist()
            assert real[-1] == SEP
            spans.append(real[n:-1])
        assert spans[choices.label[row]] == items.ids[row, start : end + 1].tolist()
        assert len({tuple(s) for s in spans}) == 4
        context = items.ids[row, 3:-1].tolist()
        for span in spans:
            assert 1 <= len(span) <= 3
            assert any(context[k : k + len(span)] == span for k in range(len(context)))


def test_the_right_choice_is_anywhere_and_choices_are_deterministic():
    choices = TASK.choices(2, range(1200))
    assert uniform(choices.label, range(4))
    alone = TASK.choices(2, [700])
    assert torch.equal(alone.ids[0], choices.ids[700])
    assert torch.equal(alone.label[0], choices.label[700])


# --------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("task", [TASK, LARGE], ids=["default", "large"])
def test_items_survive_a_file_in_squads_format(task, tmp_path):
    items = task.items(4, range(50))
    path = tmp_path / "train-v1.1.json"
    write_squad(path, task, items, (f"odd-{k}" for k in range(50)))
    back = read_squad(path, task)
    assert all(torch.equal(a, b) for a, b in zip(items, back, strict=True))
    content = json.loads(path.read_text())
    assert content["version"] == "1.1"
    for k, paragraph in enumerate(content["data"][0]["paragraphs"]):
        (question,) = paragraph["qas"]
        (answer,) = question["answers"]
        first = answer["answer_start"]
        found = paragraph["context"][first : first + len(answer["text"])]
        assert found == answer["text"]
        words = [task.vocabulary[t] for t in items.ids[k, items.start[k] : items.end[k] + 1]]
        assert found.split() == words
        assert question["id"] == f"odd-{k}"
        assert question["question"] == f"which c{items.category[k]}"


def test_files_that_hold_no_items_are_told(tmp_path):
    path = tmp_path / "dev.json"
    with pytest.raises(UserError, match="cannot read"):
        read_squad(path, TASK)
    for text in ("{", "[]", '{"data": [{"paragraphs": 3}]}'):
        path.write_text(text)
        with pytest.raises(UserError, match="holds no odd-run items"):
            read_squad(path, TASK)
    path.write_text('{"data": []}')
    with pytest.raises(UserError, match="holds no item"):
        read_squad(path, TASK)
    write_squad(path, LARGE, LARGE.items(0, range(5)), "abcde")
    with pytest.raises(UserError, match="holds no odd-run items"):
        read_squad(path, TASK)
    write_squad(path, TASK, TASK.items(0, range(1)), "a")
    content = json.loads(path.read_text())
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 2000
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no answer in its context"):
        read_squad(path, TASK)


# --------------------------------------------------------------------------------------- probe


def test_the_probe():
    train, test = probe_task(1)
    assert train.ids.shape == (400, 24)
    assert test.ids.shape == (100, 24)
    assert torch.equal(train.label, train.ids % 8)
    assert torch.equal(test.label, test.ids % 8)
    assert uniform(train.ids.flatten(), range(64))
    assert torch.equal(probe_task(1)[1].ids, test.ids)
    assert not torch.equal(probe_task(2)[1].ids, test.ids)
    assert not torch.equal(train.ids[:100], test.ids)


def test_streams_are_numpys_philox_of_domain_seed_and_index():
    streams = synthetic._Streams(2, -3, [5], 4)
    counter, key = np.array([0, 0, 0, 2], np.uint64), np.array([2**64 - 3, 5], np.uint64)
    bits = np.random.Philox(counter=counter, key=key).random_raw(4)
    wanted = [((int(b) >> 11) + 0.5) / 2**53 for b in bits]
    assert streams.uniform(4)[0].tolist() == wanted
