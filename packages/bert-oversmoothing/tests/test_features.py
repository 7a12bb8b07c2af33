"""Ids, windows, hidden words and batches, against the tokenizer's plain ids and slow searches."""

import random
import string

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig

from bert_oversmoothing.data.buckets import BucketSampler
from bert_oversmoothing.data.features import ChoiceItems, Encoder, PadCollate, TextItems
from bert_oversmoothing.data.generated import OddRunItems
from bert_oversmoothing.data.masking import IGNORED, Masking
from bert_oversmoothing.data.records import Choice, Example, Question
from bert_oversmoothing.data.tokenizing import (
    frequent_words,
    many_threads,
    odd_run_tokenizer,
    open_tokenizer,
    word_tokenizer,
)
from bert_oversmoothing.data.windows import WindowItems, cut_windows
from bert_oversmoothing.metrics.spans import NO_PLACE
from bert_oversmoothing.synthetic import OddRun
from tenfold.data import Draw
from tenfold.errors import UserError

KINDS = ("bert", "roberta")
WORDS = ("the", "cat", "sat", "on", "the", "mats,", "what", "a", "dog", "is", "who")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tokenizer_folder):
    return open_tokenizer(str(tokenizer_folder(request.param)))


@pytest.fixture(scope="module")
def bert(tokenizer_folder):
    return open_tokenizer(str(tokenizer_folder("bert")))


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def joined(tokenizer, first: list[int], second: list[int] | None = None) -> list[int]:
    """Special tokens around plain ids, as the two families have them."""
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    if second is None:
        return [start, *first, end]
    twice = (
        [end] if tokenizer.model_max_length and "token_type_ids" not in inputs(tokenizer) else []
    )
    return [start, *first, end, *twice, *second, end]


def inputs(tokenizer) -> list[str]:
    return tokenizer.model_input_names


# -- texts and choices -----------------------------------------------------------------------------


def test_one_text_and_a_pair(tokenizer):
    encoder = Encoder(tokenizer, 64)
    records = [Example("a", "the cat", label=1), Example("b", "who sat?", label=0)]
    items = TextItems(records, encoder)
    for row, record in enumerate(records):
        assert items[row]["input_ids"] == joined(tokenizer, plain(tokenizer, record.text))
        assert items[row]["labels"] == record.label
        assert items[row]["index"] == row
    pair = TextItems([Example("a", "the cat", "a dog", 1.5)], encoder, regression=True)[0]
    first, second = plain(tokenizer, "the cat"), plain(tokenizer, "a dog")
    assert pair["input_ids"] == joined(tokenizer, first, second)
    assert pair["labels"] == 1.5
    assert set(pair) == {*inputs(tokenizer), "labels", "index"}
    if "token_type_ids" in pair:
        assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)


def test_the_longer_text_of_a_pair_is_cut_first(bert):
    item = TextItems([Example("a", "cat " * 20, "the dog")], Encoder(bert, 12))[0]
    first, second = plain(bert, "cat " * 7), plain(bert, "the dog")
    assert item["input_ids"] == joined(bert, first, second)


def test_labels_are_left_out_where_nobody_has_one(bert):
    encoder = Encoder(bert, 32)
    assert "labels" not in TextItems([Example("a", "cat")], encoder)[0]
    mixed = TextItems([Example("a", "cat"), Example("b", "dog", label=1)], encoder)
    assert [mixed[0]["labels"], mixed[1]["labels"]] == [-1, 1]
    scores = TextItems([Example("a", "cat"), Example("b", "dog", label=1.0)], encoder, True)
    assert np.isnan(scores[0]["labels"])


def test_choices_pair_the_context_with_every_ending(tokenizer):
    records = [Choice("a", "the cat", ("sat on", "is a dog", "who"), 2)]
    item = ChoiceItems(records, Encoder(tokenizer, 64))[0]
    for row, ending in enumerate(records[0].endings):
        pair = plain(tokenizer, "the cat"), plain(tokenizer, ending)
        assert item["input_ids"][row] == joined(tokenizer, *pair)
    assert item["labels"] == 2
    with pytest.raises(UserError, match=r"different numbers of choices: \[2, 3\]"):
        ChoiceItems([*records, Choice("b", "cat", ("a", "b"))], Encoder(tokenizer, 64))


def test_a_batch_is_padded_on_the_right_to_its_longest(tokenizer):
    records = [Example(text, text, label=n) for n, text in enumerate(("cat", "the cat sat", "on"))]
    items = TextItems(records, Encoder(tokenizer, 64))
    batch = PadCollate(tokenizer)(items.fetch([Draw(0, n) for n in range(3)])[0])
    longest = max(len(items[n]["input_ids"]) for n in range(3))
    assert batch["input_ids"].shape == (3, longest)
    for row in range(3):
        ids = items[row]["input_ids"]
        padded = ids + [tokenizer.pad_token_id] * (longest - len(ids))
        assert batch["input_ids"][row].tolist() == padded
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (longest - len(ids))
    assert batch["labels"].tolist() == [0, 1, 2]
    assert all(column.dtype == torch.int64 for column in batch.values())


def test_batches_of_choices_scores_and_hidden_words(bert):
    encoder, collate = Encoder(bert, 64), PadCollate(bert)
    choices = ChoiceItems(
        [Choice("a", "cat", ("a", "the dog sat")), Choice("b", "who", ("on", "is"))], encoder
    )
    batch = collate([choices[0], choices[1]])
    assert batch["input_ids"].shape[:2] == (2, 2)
    for row in range(2):
        for choice in range(2):
            ids = choices[row]["input_ids"][choice]
            assert batch["input_ids"][row, choice, : len(ids)].tolist() == ids
            assert batch["attention_mask"][row, choice].sum() == len(ids)
    scores = TextItems(
        [Example("a", "cat", label=1.5), Example("b", "on", label=2.0)], encoder, True
    )
    assert collate([scores[0], scores[1]])["labels"].dtype == torch.float32
    hidden = TextItems(
        [Example("a", "cat"), Example("b", "the cat sat")], encoder, masking=Masking(bert)
    )
    batch = collate([hidden[0], hidden[1]])
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


# -- hidden words ----------------------------------------------------------------------------------


def masked(bert, length: int, count: int, seed: int = 0, epoch: int = 0):
    """Ids and labels of `count` texts of the same `length` words."""
    masking, word = Masking(bert, seed), plain(bert, "cat")[0]
    item = {"input_ids": [2, *[word] * length, 3], "special_tokens_mask": [1, *[0] * length, 1]}
    items = [masking(dict(item), Draw(epoch, number)) for number in range(count)]
    ids, labels = ([each[name] for each in items] for name in ("input_ids", "labels"))
    return torch.tensor(ids), torch.tensor(labels), word


def test_hidden_words_have_their_shares(bert):
    length, count = 200, 200
    ids, labels, word = masked(bert, length, count)
    chosen = labels != IGNORED
    assert (chosen.sum(1) == round(0.15 * length)).all()
    assert (labels[chosen] == word).all()
    assert not chosen[:, [0, -1]].any()
    assert (ids[~chosen] == masked(bert, length, 1)[0][0, 0]).sum() == count  # the first token
    total = chosen.sum().item()
    hidden = (ids[chosen] == bert.mask_token_id).float().mean().item()
    kept = (ids[chosen] == word).float().mean().item()
    # four standard deviations of a share
    assert abs(hidden - 0.8) < 4 * (0.8 * 0.2 / total) ** 0.5
    words = len(bert) - len(bert.all_special_ids)
    expected = 0.1 + 0.1 / words
    assert abs(kept - expected) < 4 * (expected * (1 - expected) / total) ** 0.5
    other = ids[chosen & (ids != bert.mask_token_id)]
    assert not set(other.tolist()) & set(bert.all_special_ids)
    # every place is as likely as any other
    share = chosen[:, 1:-1].float().mean(0)
    assert abs(share - 0.15).max() < 5 * (0.15 * 0.85 / count) ** 0.5


def test_hidden_words_are_a_function_of_seed_epoch_and_index(bert):
    records = [Example(str(n), " ".join(WORDS * 2)) for n in range(4)]
    build = lambda seed: TextItems(records, Encoder(bert, 64), masking=Masking(bert, seed))  # noqa: E731
    items = build(3)
    torch.manual_seed(random.randrange(1000))
    assert items[Draw(2, 1)] == build(3)[Draw(2, 1)] == items.fetch([Draw(2, 3), Draw(2, 1)])[0][1]
    drawn = [items[Draw(e, n)]["labels"] for e in range(3) for n in range(4)]
    drawn += [build(4)[n]["labels"] for n in range(4)]
    assert len({tuple(labels) for labels in drawn}) > 12
    assert "special_tokens_mask" not in items[0]


@pytest.mark.parametrize("length", [0, 1, 3])
def test_at_least_one_word_of_a_short_text_is_hidden(bert, length):
    _, labels, _ = masked(bert, length, 5)
    assert ((labels != IGNORED).sum(1) == min(1, length)).all()


def test_hidden_words_need_a_mask_token():
    with pytest.raises(UserError, match="no mask token"):
        Masking(odd_run_tokenizer(OddRun()))
    with pytest.raises(UserError, match="not 0"):
        Masking(word_tokenizer(["a"]), share=0.0)


# -- windows ---------------------------------------------------------------------------------------


def slow_windows(tokenizer, question: Question, max_length: int, stride: int) -> list[list[int]]:
    """Ids of all windows by a loop over the context's tokens."""
    asked, context = plain(tokenizer, question.question), plain(tokenizer, question.context)
    room = max_length - len(joined(tokenizer, asked, []))
    found, first = [], 0
    while True:
        found.append(joined(tokenizer, asked, context[first : first + room]))
        if first + room >= len(context):
            return found
        first += room - stride


def slow_answer(offsets: np.ndarray, text: str, start: int) -> tuple[int, int]:
    """The tokens that share a character with the answer, if the window has all of them."""
    wanted = range(start, start + len(text))
    inside = [n for n, (first, last) in enumerate(offsets) if first != NO_PLACE]
    touched = [
        n for n in inside if range(max(offsets[n][0], start), min(offsets[n][1], wanted.stop))
    ]
    whole = inside and offsets[inside[0]][0] <= start and offsets[inside[-1]][1] >= wanted.stop
    return (touched[0], touched[-1]) if whole and touched else (0, 0)


def answer_tokens(tokenizer, question: Question) -> int:
    return len(plain(tokenizer, f" {question.answers[0][0]}"))


def some_question(seed: int, words: int) -> Question:
    draw = random.Random(seed)
    context = " ".join(draw.choice(WORDS) for _ in range(words))
    places = [m for m in range(len(context)) if m == 0 or context[m - 1] == " "]
    start = draw.choice(places)
    text = " ".join(context[start:].split(" ")[: draw.randint(1, 4)])
    return Question(str(seed), "what is a cat?", context, ((text, start),))


@pytest.mark.parametrize(("max_length", "stride"), [(40, 8), (32, 1), (64, 0), (384, 128)])
def test_windows_and_answers_against_a_loop(tokenizer, max_length, stride):
    questions = [some_question(seed, 5 + 12 * seed) for seed in range(8)]
    windows = cut_windows(questions, tokenizer, max_length, stride)
    ids, starts = windows.inputs["input_ids"], []
    expected = [slow_windows(tokenizer, each, max_length, stride) for each in questions]
    assert [row.tolist() for row in ids] == [row for rows in expected for row in rows]
    assert windows.question == [n for n, rows in enumerate(expected) for _ in rows]
    for window, number in enumerate(windows.question):
        text, start = questions[number].answers[0]
        found = windows.start[window], windows.end[window]
        offsets = windows.offsets[window]
        assert found == slow_answer(offsets, text, start)
        if found != (0, 0):
            first, last = offsets[found[0], 0], offsets[found[1], 1]
            assert questions[number].context[first:last] == text
            starts.append(number)
    short = {n for n, each in enumerate(questions) if answer_tokens(tokenizer, each) <= stride}
    assert short <= set(starts)  # windows share as many tokens
    assert starts


def test_offsets_are_of_the_context_alone(tokenizer):
    question = Question("a", "the cat the", "the cat", (("cat", 4),))
    windows = cut_windows([question], tokenizer)
    inside = windows.offsets[0][:, 0] != NO_PLACE
    assert inside.sum() == len(plain(tokenizer, "the cat"))
    ids = windows.inputs["input_ids"][0][inside].tolist()
    assert ids == plain(tokenizer, "the cat")


def test_answers_outside_the_window_and_none_are_token_0(bert):
    context = "cat " * 40 + "dog"
    asked = [
        Question("far", "who", context, (("dog", 160),)),
        Question("none", "who", "cat", ()),
        Question("unknown", "who", "cat", None),
    ]
    windows = cut_windows(asked, bert, max_length=16, stride=2)
    pairs = list(zip(windows.start, windows.end, strict=True))
    assert pairs.count((0, 0)) == len(pairs) - 1
    assert pairs[windows.question.index(1) - 1] != (0, 0)
    assert windows.passages().golds == [("dog",), (), None]


def test_a_question_without_room_for_its_context_is_broken(bert):
    asked = [
        Question("fits", "who", "cat " * 30, None),
        Question("short", "who " * 20, "cat", None),  # one window is enough
        Question("long", "who " * 20, "cat " * 30, None),
        Question("endless", "who " * 50, "cat", None),
    ]
    windows = cut_windows(asked, bert, max_length=32, stride=16)
    assert [each.id for each in windows.questions] == ["fits", "short"]
    assert sorted(windows.broken) == [2, 3]
    assert windows.broken[2].id == "long"
    assert "20 tokens leave 9 of 32" in windows.broken[2].reason
    assert set(windows.question) == {0, 1}


def test_many_questions_are_cut_in_parts(bert, monkeypatch):
    questions = [some_question(seed, 20 + seed) for seed in range(7)]
    whole = cut_windows(questions, bert, 32, 4)
    monkeypatch.setattr("bert_oversmoothing.data.windows._AT_ONCE", 3)
    parts = cut_windows(questions, bert, 32, 4, keep_offsets=False)
    assert parts.question == whole.question
    assert (parts.start, parts.end, parts.offsets) == (whole.start, whole.end, [])


def test_items_of_windows(bert):
    windows = cut_windows([some_question(1, 40)], bert, 32, 4)
    items = WindowItems(windows)
    assert len(items) == len(windows.question) > 1
    assert items.lengths()[0] == 32
    batch = PadCollate(bert)([items[n] for n in range(len(items))])
    assert batch["start_positions"].tolist() == windows.start
    assert batch["index"].tolist() == list(range(len(items)))
    unknown = cut_windows([Question("a", "who", "cat", None)], bert)
    assert "start_positions" not in WindowItems(unknown)[0]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([*WORDS, "mat's", "(dog)", "Éa", "\u00a0"]), min_size=1, max_size=30)
)
def test_the_text_of_an_answer_is_found_again(tokenizer_folder, words):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("bert"))
    context = " ".join(words)
    word = next((each for each in words if each.strip()), None)
    if word is None:
        return
    start = context.index(word)
    windows = cut_windows([Question("a", "who?", context, ((word, start),))], tokenizer, 64, 8)
    texts = [
        context[offsets[first, 0] : offsets[last, 1]]
        for first, last, offsets in zip(windows.start, windows.end, windows.offsets, strict=True)
        if (first, last) != (0, 0)
    ]
    assert texts
    assert all(text == word for text in texts)


# -- the generated task ----------------------------------------------------------------------------


def test_the_word_tokenizer_gives_the_ids_of_the_generator(tmp_path):
    task = OddRun(categories=5, words=3, context=9)
    odd_run_tokenizer(task).save_pretrained(tmp_path)
    for tokenizer in (odd_run_tokenizer(task), open_tokenizer(str(tmp_path))):
        items = task.items(1, range(20))
        for ids, category in zip(items.ids, items.category.tolist(), strict=True):
            context = " ".join(task.vocabulary[token] for token in ids[3:-1].tolist())
            assert tokenizer(f"which c{category}", context)["input_ids"] == ids.tolist()
        choices = task.choices(1, range(20))
        for ids, mask in zip(choices.ids.flatten(0, 1), choices.mask.flatten(0, 1), strict=True):
            words = [task.vocabulary[token] for token in ids[mask].tolist()]
            last = len(words) - 1 - words[-2::-1].index("[SEP]") - 1
            text = " ".join(words[1:last]), " ".join(words[last + 1 : -1])
            assert tokenizer(*text)["input_ids"] == ids[mask].tolist()
        assert len(tokenizer) == task.vocab_size
        assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    with pytest.raises(UserError, match="the tokenizer refuses a text"):
        Encoder(odd_run_tokenizer(task), 32)(["cat"])
    with pytest.raises(UserError, match="the tokenizer refuses a question"):
        cut_windows([Question("a", "which c0", "cat", None)], odd_run_tokenizer(task))


@pytest.mark.parametrize("form", ["qa", "parity", "after", "choice"])
def test_generated_items_never_come_twice(form):
    task = OddRun()
    items = OddRunItems(task, form, "train", size=10, seed=7)
    later = items.__getitems__([Draw(3, 4), Draw(1, 0)])
    alone = items[Draw(3, 4)]
    assert all((later[name][0] == alone[name]).all() for name in later)
    ids = task.choices(7, [34, 10]).ids if form == "choice" else task.items(7, [34, 10]).ids
    assert torch.equal(later["input_ids"], ids)
    assert later["index"].tolist() == [4, 0]


def test_validation_and_test_items_are_fixed_and_apart():
    task = OddRun()
    val = OddRunItems(task, "qa", "val", 384, seed=1).__getitems__(range(384))
    assert torch.equal(val["input_ids"], task.validation().ids)
    assert torch.equal(val["start_positions"], task.validation().start)
    test = OddRunItems(task, "qa", "test", 384, seed=2).__getitems__(range(384))
    assert torch.equal(test["input_ids"], task.items(0, range(384, 768), "validation").ids)


# -- tokenizers ------------------------------------------------------------------------------------


def test_words_are_learned_in_a_fixed_order(tmp_path):
    words = frequent_words(["b a B", "a c", "d  d\td"])
    assert words == ["d", "a", "b"]
    tokenizer = word_tokenizer(words)
    tokenizer.save_pretrained(tmp_path)
    again = open_tokenizer(str(tmp_path))
    for each in (tokenizer, again):
        assert each("A z", "d")["input_ids"] == [2, 6, 1, 3, 5, 3]
        assert each("A z", "d")["token_type_ids"] == [0, 0, 0, 0, 1, 1]
        assert (each.mask_token_id, each.pad_token_id) == (4, 0)


def test_a_tokenizer_that_is_not_there_is_told_in_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(name: str, local_files_only: bool = False, **_: object) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        asked.append(local_files_only)
        raise LocalEntryNotFoundError("no network\nat all")

    asked: list[bool] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"no such folder, nor .*nobody/nothing.*network") as got:
        open_tokenizer("nobody/nothing")
    assert asked == [True, False]
    assert "\n" not in str(got.value)
    with pytest.raises(UserError, match="no tokenizer: ") as got:
        open_tokenizer(str(tmp_path))
    assert "\n" not in str(got.value)
    BertConfig(vocab_size=9).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="vocabulary is empty"):
        open_tokenizer(str(tmp_path))


def test_a_tokenizer_of_the_cache_is_read_without_the_network(tokenizer_folder, monkeypatch):
    import huggingface_hub

    def cached(name: str, local_files_only: bool = False, **_: object) -> str:
        assert local_files_only
        return str(tokenizer_folder("bert"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert open_tokenizer("some/model")("cat")["input_ids"] == [2, 7, 3]


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no padding token"):
        open_tokenizer(str(tmp_path))


def test_threads_are_for_the_main_process_alone(monkeypatch):
    import os

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with many_threads():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


# -- batches of like length ------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2])
def test_buckets_are_a_permutation_with_less_padding(replicas):
    draw = random.Random(0)
    lengths = [draw.randint(1, 100) for _ in range(203)]
    ranks = [
        BucketSampler(lengths, batch_size=8, pool=5, seed=3, replicas=replicas, rank=rank)
        for rank in range(replicas)
    ]
    orders = []
    for sampler in ranks:
        sampler.set_epoch(2)
        orders.append([key.index for key in sampler])
        assert [key.epoch for key in sampler] == [2] * len(sampler)
    kept = 203 // replicas * replicas
    assert len({index for order in orders for index in order}) == kept
    assert orders[0] != sorted(orders[0])

    def padding(order: list[int]) -> int:
        batches = [order[n : n + 8] for n in range(0, len(order) - 7, 8)]
        return sum(
            max(lengths[k] for k in each) * 8 - sum(lengths[k] for k in each) for each in batches
        )

    assert padding(orders[0]) < 0.5 * padding(list(range(203 // replicas)))


def test_buckets_leave_out_what_was_done():
    lengths = list(range(40))
    whole = BucketSampler(lengths, batch_size=4, pool=3, seed=1)
    keys = list(whole)
    whole.skip = 12
    assert list(whole) == keys[12:]
    assert list(whole) == keys
    whole.set_epoch(1)
    assert [key.index for key in whole] != [key.index for key in keys]


def test_alphabet_of_the_test_tokenizers(tokenizer):
    assert tokenizer.is_fast
    text = string.ascii_lowercase
    assert tokenizer.unk_token_id not in plain(tokenizer, text)
