"""Figures of GLUE, choices, hidden words and SQuAD, against peers and slow definitions."""

import math
import re
import string
from itertools import product
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from torchmetrics.text import SQuAD

from bert_oversmoothing.metrics import (
    GLUE_METRICS,
    ChoiceMetric,
    GlueMetric,
    MaskedWordsMetric,
    Passages,
    SquadMetric,
    TaskMetric,
    best_threshold,
    evaluate_squad,
    glue_average,
    glue_score,
    normalize_answer,
)
from bert_oversmoothing.metrics.spans import NO_PLACE, candidates, predictions
from bert_oversmoothing.metrics.squad import best_over_golds, exact, token_f1
from tenfold.errors import UserError


def outputs(labels: int, count: int = 60, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, labels, generator=generator)
    return logits, torch.randint(max(labels, 2), (count,), generator=generator)


def feed(metric, logits, labels, parts: int = 3):
    for rows in torch.arange(len(labels)).chunk(parts):
        batch = {"labels": labels[rows], "index": rows}
        metric.update({"logits": logits[rows]}, batch)
    return {name: float(value) for name, value in metric.compute().items()}


# -- GLUE ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "qqp", "qnli", "rte", "wnli"])
def test_figures_of_two_classes_by_their_counts(task):
    logits, labels = outputs(2)
    found = feed(GlueMetric(task), logits, labels)
    said, true = logits.argmax(1).bool(), labels.bool()
    tp, fp = (said & true).sum().item(), (said & ~true).sum().item()
    fn, tn = (~said & true).sum().item(), (~said & ~true).sum().item()
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    by_hand = {
        "accuracy": (tp + tn) / 60,
        "f1": 2 * tp / (2 * tp + fp + fn),
        "matthews": (tp * tn - fp * fn) / below,
    }
    wanted = {name: by_hand[name] for name in GLUE_METRICS[task]}
    assert found == pytest.approx(wanted | {"score": fmean(wanted.values())}, abs=1e-6)


def test_scores_correlate():
    logits, labels = outputs(1)[0], 5 * torch.rand(60, generator=torch.Generator().manual_seed(1))
    found = feed(GlueMetric("stsb"), logits, labels)
    peers = [peer(logits[:, 0], labels).statistic for peer in (pearsonr, spearmanr)]
    assert list(found) == ["pearson", "spearman", "score"]
    assert list(found.values()) == pytest.approx([*peers, fmean(peers)], abs=1e-5)
    flat = feed(GlueMetric("stsb"), logits[:, 0], labels)
    assert flat == found


def test_mnli_is_the_mean_of_matched_and_mismatched():
    logits, labels = outputs(3)
    other = torch.arange(60) >= 40
    found = feed(GlueMetric("mnli", other), logits, labels)
    right = (logits.argmax(1) == labels).double()
    matched, mismatched = right[:40].mean().item(), right[40:].mean().item()
    assert found == pytest.approx(
        {"accuracy_m": matched, "accuracy_mm": mismatched, "score": (matched + mismatched) / 2}
    )
    whole = feed(GlueMetric("mnli"), logits, labels)
    assert whole == pytest.approx({"accuracy": right.mean().item(), "score": right.mean().item()})


def test_items_without_a_label_do_not_count():
    logits, labels = outputs(2)
    some = labels.clone()
    some[::3] = -1
    kept = some >= 0
    found = feed(GlueMetric("mrpc"), logits, some)
    assert found == feed(GlueMetric("mrpc"), logits[kept], labels[kept], parts=1)
    scores = torch.rand(60)
    some = torch.where(kept, scores, torch.nan)
    found = feed(GlueMetric("stsb"), logits[:, :1], some)
    alone = feed(GlueMetric("stsb"), logits[kept, :1], scores[kept], parts=1)
    assert found == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("task", ["cola", "stsb", "mrpc"])
def test_nothing_seen_is_nan(task):
    metric = GlueMetric(task)
    unlabelled = torch.full((4,), torch.nan if task == "stsb" else -1)
    found = feed(metric, torch.randn(4, metric.labels), unlabelled, parts=1)
    assert set(found) == {*GLUE_METRICS[task], "score"}
    assert all(math.isnan(value) for value in found.values())


def test_a_metric_forgets():
    logits, labels = outputs(2)
    metric = GlueMetric("qqp")
    first = feed(metric, logits, labels)
    feed(metric, -logits, labels)
    metric.reset()
    assert feed(metric, logits, labels) == first


def test_more_classes_and_choices():
    logits, labels = outputs(5)
    right = (logits.argmax(1) == labels).float().mean().item()
    for metric in (TaskMetric(("accuracy",), 5), ChoiceMetric(5)):
        assert feed(metric, logits, labels) == pytest.approx({"accuracy": right, "score": right})


def test_hidden_words():
    logits, labels = torch.randn(4, 6, 11), torch.randint(11, (4, 6))
    labels[torch.rand(4, 6) < 0.6] = -100
    labels[0, :2] = 3
    metric = MaskedWordsMetric(11)
    for rows in (slice(0, 1), slice(1, 4)):
        metric.update({"logits": logits[rows]}, {"labels": labels[rows]})
    found = {name: value.item() for name, value in metric.compute().items()}
    known = labels != -100
    chances = logits.double().log_softmax(-1)[known].gather(1, labels[known][:, None])
    right = (logits.argmax(-1) == labels)[known].double().mean().item()
    wanted = {"perplexity": math.exp(-chances.mean().item()), "accuracy": right, "score": right}
    assert found == pytest.approx(wanted, rel=1e-5)


def test_the_average_leaves_wnli_out_and_counts_mnli_once():
    results = {
        "cola": {"matthews": 0.5},
        "mrpc": {"accuracy": 0.8, "f1": 0.9},
        "mnli": {"accuracy_m": 0.7, "accuracy_mm": 0.6},
        "wnli": {"accuracy": 0.1},
    }
    assert glue_average(results) == pytest.approx((0.5 + 0.85 + 0.65) / 3)
    assert glue_score("wnli", results["wnli"]) == 0.1
    with pytest.raises(ValueError, match="WNLI"):
        glue_average({"wnli": {"accuracy": 0.1}})
    with pytest.raises(KeyError):
        glue_average({"cola": {"accuracy": 0.1}})


# -- words of answers ------------------------------------------------------------------------------

ANSWERS = (
    "the cat",
    "a cat!",
    "Cat",
    "",
    "the",
    "cats, dogs",
    "dogs and cats",
    "cat cat dog",
    "42",
)
texts = st.one_of(st.sampled_from(ANSWERS), st.text(alphabet="aAn the,.cx-", max_size=20))


def slow_normalize(text: str) -> str:
    """The four steps, one after the other."""
    text = "".join(each for each in text.lower() if each not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def slow_f1(prediction: str, gold: str) -> float:
    """Words matched one by one."""
    predicted, wanted = slow_normalize(prediction).split(), slow_normalize(gold).split()
    if not predicted or not wanted:
        return float(predicted == wanted)
    left, same = list(wanted), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            same += 1
    if not same:
        return 0.0
    precision, recall = same / len(predicted), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


@settings(deadline=None)
@given(texts, texts)
def test_words_of_an_answer(prediction, gold):
    assert normalize_answer(prediction) == slow_normalize(prediction)
    assert exact(prediction, gold) == (slow_normalize(prediction) == slow_normalize(gold))
    assert token_f1(prediction, gold) == pytest.approx(slow_f1(prediction, gold))


def test_texts_without_words_agree_in_2_0_alone():
    assert token_f1("the", "a", "2.0") == 1
    assert token_f1("the", "a", "1.1") == 0
    assert best_over_golds("the", ("a", "cat"), "1.1") == (1, 0)


def test_accepted_answers_without_words_do_not_count_in_2_0():
    assert best_over_golds("", ("the", "cat"), "2.0") == (0, 0)
    assert best_over_golds("", ("the",), "2.0") == (1, 1)
    assert best_over_golds("", (), "2.0") == (1, 1)
    assert best_over_golds("cat", (), "2.0") == (0, 0)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_squad_1_1_is_what_torchmetrics_gives(items):
    # where nothing is left of either text, the official program and torchmetrics differ
    items = [(said, golds) for said, golds in items if all(map(slow_normalize, (said, *golds)))]
    if not items:
        return
    peer = SQuAD()
    peer.update(
        [{"id": str(n), "prediction_text": said} for n, (said, _) in enumerate(items)],
        [
            {"id": str(n), "answers": {"text": golds, "answer_start": [0] * len(golds)}}
            for n, (_, golds) in enumerate(items)
        ],
    )
    theirs = {name: float(value) for name, value in peer.compute().items()}
    said = {str(n): each for n, (each, _) in enumerate(items)}
    golds = {str(n): each for n, (_, each) in enumerate(items)}
    ours = evaluate_squad(said, golds)
    assert ours["total"] == len(items)
    assert (ours["exact"], ours["f1"]) == pytest.approx(
        (theirs["exact_match"], theirs["f1"]), abs=1e-4
    )


def test_squad_2_0_by_hand():
    golds = {"a": ["cat"], "b": ["the cat sat"], "c": [], "d": [], "e": ["dog"]}
    said = {"a": "the cat", "b": "cat", "c": "", "d": "mat", "e": ""}
    found = evaluate_squad(said, golds, "2.0")
    f1 = 2 * 1 * 0.5 / 1.5
    assert found == pytest.approx(
        {
            **{"exact": 40, "f1": 20 * (2 + f1), "total": 5},
            **{"HasAns_exact": 100 / 3, "HasAns_f1": 100 / 3 * (1 + f1), "HasAns_total": 3},
            **{"NoAns_exact": 50, "NoAns_f1": 50, "NoAns_total": 2},
        }
    )
    null = {"a": -3.0, "b": -1.0, "c": 9.0, "d": 2.0, "e": 0.0}
    found = evaluate_squad(said, golds, "2.0", null, null_threshold=-2.0)
    # a alone is answered; c and d are rightly not
    assert (found["exact"], found["NoAns_exact"]) == pytest.approx((60, 100))
    assert found["HasAns_f1"] == pytest.approx(100 / 3)
    assert (found["best_exact"], found["best_exact_thresh"]) == pytest.approx((60, -3))
    assert found["best_f1"] == pytest.approx(20 * (3 + f1))
    assert found["best_f1_thresh"] == -1


def test_only_answerable_questions():
    found = evaluate_squad({"a": "cat"}, {"a": ["cat"]}, "2.0")
    assert set(found) == {
        *("exact", "f1", "total", "HasAns_exact", "HasAns_f1", "HasAns_total"),
    }


def test_a_question_without_a_prediction():
    with pytest.raises(UserError, match=r"1 of 2 questions have no prediction \(b\)"):
        evaluate_squad({"a": "cat"}, {"a": ["cat"], "b": ["dog"]})
    with pytest.raises(UserError, match="0 of 0"):
        evaluate_squad({}, {})


# -- thresholds ------------------------------------------------------------------------------------


def slow_threshold(said, scores, null, answerable):
    """Every threshold tried: what is not above it is answered; the lowest of the best is taken."""
    best, at = float(sum(not has for has in answerable)), 0.0
    for threshold in sorted(null):
        total = 0.0
        for text, score, odds, has in zip(said, scores, null, answerable, strict=True):
            answered = odds <= threshold
            total += score if answered and has else not has and (not answered or not text)
        if total > best + 1e-12:
            best, at = total, threshold
    return 100 * best / len(said), at


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_best_threshold_is_the_best_of_all(data):
    count = data.draw(st.integers(1, 12))
    rows = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=count, max_size=count)
    scores = data.draw(rows)
    null = data.draw(st.permutations([n - 5.5 for n in range(count)]))
    answerable = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    said = data.draw(st.lists(st.sampled_from(["", "cat"]), min_size=count, max_size=count))
    scores = [score if has else 0.0 for score, has in zip(scores, answerable, strict=True)]
    assert best_threshold(said, scores, null, answerable) == pytest.approx(
        slow_threshold(said, scores, null, answerable)
    )


def test_equal_odds_come_one_after_the_other():
    # in this order the sum is 1, 2, 1: the highest is between two questions of equal odds
    found = best_threshold(["a", "b"], [1.0, 0.0], [0.5, 0.5], [True, False])
    assert found == (100.0, 0.5)
    found = best_threshold(["b", "a"], [0.0, 1.0], [0.5, 0.5], [False, True])
    assert found == (50.0, 0.0)


def test_no_threshold_is_better_than_no_answers():
    assert best_threshold(["a"] * 3, [0.0] * 3, [-1.0, 2.0, 3.0], [False] * 3) == (100.0, 0.0)


# -- spans -----------------------------------------------------------------------------------------


def some_windows(seed: int = 0):
    """Windows of two questions over one context each, with overlaps, and random logits."""
    rng = np.random.default_rng(seed)
    contexts = ["one two three four five six seven eight", "red green blue"]
    places = [[(m.start(), m.end()) for m in re.finditer(r"\w+", each)] for each in contexts]
    cuts = [(0, 0, 5), (0, 3, 8), (1, 0, 3)]
    offsets = []
    for question, first, last in cuts:
        outside = [(NO_PLACE, NO_PLACE)]
        inside = places[question][first:last]
        offsets.append(np.array([*outside * 2, *inside, *outside], np.int32))
    golds = [("two three",), ("green",)]
    passages = Passages(["p", "q"], contexts, golds, [0, 0, 1], offsets)
    longest = max(map(len, offsets))
    start, end = (torch.tensor(rng.normal(size=(3, longest)), dtype=torch.float32) for _ in "ab")
    return passages, start, end


def padded(passages: Passages, longest: int) -> torch.Tensor:
    rows = torch.full((len(passages.offsets), longest, 2), NO_PLACE)
    for row, offsets in zip(rows, passages.offsets, strict=True):
        row[: len(offsets)] = torch.from_numpy(offsets.astype(np.int64))
    return rows


def slow_spans(offsets, start, end, max_tokens):
    """(score, first, last) of every span of a window's context, the best first."""
    inside = [n for n, (first, _) in enumerate(offsets) if first != NO_PLACE]
    found = [
        (float(start[i] + end[j]), int(offsets[i][0]), int(offsets[j][1]))
        for i, j in product(inside, inside)
        if i <= j < i + max_tokens
    ]
    return sorted(found, reverse=True)


@pytest.mark.parametrize("max_tokens", [1, 2, 30])
@pytest.mark.parametrize("n_best", [1, 4, 50])
def test_candidates_are_the_best_spans_of_the_context(n_best, max_tokens):
    passages, start, end = some_windows()
    found = candidates(start, end, padded(passages, start.shape[1]), n_best, max_tokens)
    assert found.score.shape == (3, n_best)
    assert torch.equal(found.null, start[:, 0] + end[:, 0])
    for row, offsets in enumerate(passages.offsets):
        wanted = slow_spans(offsets, start[row], end[row], max_tokens)[:n_best]
        got = [
            (score, *place)
            for score, place in zip(
                found.score[row].tolist(), found.place[row].tolist(), strict=True
            )
            if place[0] != NO_PLACE
        ]
        assert [each[1:] for each in got] == [each[1:] for each in wanted]
        assert [each[0] for each in got] == pytest.approx([each[0] for each in wanted], abs=1e-5)
        assert torch.isneginf(found.score[row][len(wanted) :]).all()


def test_answers_are_the_best_over_overlapping_windows():
    passages, start, end = some_windows(3)
    found = candidates(start, end, padded(passages, start.shape[1]))
    answers = predictions(passages, [0, 1, 2], found)
    both = {}
    for row in (0, 1):
        for score, first, last in slow_spans(passages.offsets[row], start[row], end[row], 30):
            both[first, last] = max(score, both.get((first, last), -math.inf))
    best = sorted(both.items(), key=lambda span: -span[1])[:20]
    assert [each.id for each in answers] == ["p", "q"]
    assert [(each.start, each.end) for each in answers[0].n_best] == [span for span, _ in best]
    (first, last), score = best[0]
    assert answers[0].text == passages.contexts[0][first:last]
    null = min((start[row, 0] + end[row, 0]).item() for row in (0, 1))
    assert answers[0].null_odds == pytest.approx(null - score, abs=1e-5)
    assert sum(each.probability for each in answers[0].n_best) == pytest.approx(1)
    ratio = answers[0].n_best[0].probability / answers[0].n_best[1].probability
    assert ratio == pytest.approx(math.exp(best[0][1] - best[1][1]), rel=1e-4)


def test_a_threshold_answers_nothing_above_it():
    passages, start, end = some_windows(3)
    found = candidates(start, end, padded(passages, start.shape[1]))
    odds = predictions(passages, [0, 1, 2], found)[0].null_odds
    above, at = (
        predictions(passages, [0, 1, 2], found, threshold)[0] for threshold in (odds - 0.1, odds)
    )
    assert above.text == "" != above.best == at.text


def test_a_window_without_context_has_no_span():
    passages = Passages(["p"], ["cat"], [()], [0], [np.full((4, 2), NO_PLACE)])
    found = candidates(torch.zeros(1, 4), torch.zeros(1, 4), padded(passages, 4))
    answer = predictions(passages, [0], found, 0.0)[0]
    assert (answer.text, answer.best, answer.null_odds, answer.n_best) == ("", "", math.inf, ())


# -- the metric of questions -----------------------------------------------------------------------


def question_metric(version="1.1", **options):
    passages, start, end = some_windows(5)
    return SquadMetric(passages, version, **options), start, end


def update(metric, start, end, windows):
    index = torch.tensor(windows)
    longest = max(len(metric.passages.offsets[window]) for window in windows)
    metric.update(
        {"start_logits": start[index, :longest], "end_logits": end[index, :longest]},
        {"index": index},
    )


def test_figures_of_questions():
    metric, start, end = question_metric()
    for windows in ([2, 0], [1, 2]):  # one of them twice, as samplers of several ranks do
        update(metric, start, end, windows)
    found = {name: value.item() for name, value in metric.compute().items()}
    said = {each.id: each.text for each in metric.predictions()}
    golds = dict(zip(metric.passages.ids, metric.passages.golds, strict=True))
    wanted = evaluate_squad(said, golds)
    assert found == pytest.approx(wanted | {"score": wanted["f1"]})
    assert list(said) == ["p", "q"]


def test_right_logits_are_right():
    metric, start, end = question_metric()
    start.zero_()
    end.zero_()
    for window, (first, last) in enumerate([(3, 4), (0, 0), (3, 3)]):
        start[window, first] = end[window, last] = 9
    update(metric, start, end, [0, 1, 2])
    assert metric.compute()["exact"] == 100
    metric.reset()
    assert math.isnan(metric.compute()["f1"])
    update(metric, start, end, [2])
    assert metric.compute()["total"] == 1


def test_no_answer_in_2_0():
    passages, start, end = some_windows(5)
    passages = Passages(
        passages.ids, passages.contexts, [("two three",), ()], passages.question, passages.offsets
    )
    metric = SquadMetric(passages, "2.0")
    start[2, 0] = end[2, 0] = 9
    start[0, 3] = end[0, 4] = 9
    update(metric, start, end, [0, 1, 2])
    found = metric.compute()
    assert (found["HasAns_exact"], found["NoAns_exact"], found["best_f1"]) == (100, 100, 100)
    assert [each.text for each in metric.predictions()] == ["two three", ""]
    answers = SquadMetric(passages, "2.0", null_threshold=100.0)
    update(answers, start, end, [0, 1, 2])
    assert answers.compute()["NoAns_exact"] == 0
    assert answers.compute()["best_exact"] == 100


def test_questions_without_known_answers_are_answered_but_not_counted():
    passages, start, end = some_windows(5)
    unknown = Passages(
        passages.ids, passages.contexts, [None, ("green",)], passages.question, passages.offsets
    )
    metric = SquadMetric(unknown)
    update(metric, start, end, [0, 1, 2])
    assert metric.compute()["total"] == 1
    assert len(metric.predictions()) == 2


def test_two_processes_give_the_figures_of_one():
    whole, start, end = question_metric("2.0")
    update(whole, start, end, [0, 1, 2])
    states = []
    for windows in ([0, 2], [1]):
        part, *_ = question_metric("2.0")
        update(part, start, end, windows)
        states.append(part.metric_state)
    metric, *_ = question_metric(
        "2.0",
        dist_sync_fn=lambda tensor, group: gathered.pop(0),
        distributed_available_fn=lambda: True,
    )
    update(metric, start, end, [0, 2])
    names = list(metric.metric_state)
    gathered = [[state[name][0] for state in states] for name in names]
    assert metric.compute() == whole.compute()
    assert not gathered
