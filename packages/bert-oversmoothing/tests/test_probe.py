"""Heads on every layer of a frozen encoder, against heads trained one by one and full states."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

from bert_oversmoothing.commands.layer_heads import (
    LayerHeads,
    States,
    as_outputs,
    error_of_most_frequent,
    fit_heads,
    head_losses,
    keep_states,
    score_heads,
)
from bert_oversmoothing.commands.probe import layer_rows, probe, told
from bert_oversmoothing.data import OversmoothingData
from bert_oversmoothing.families import read_encoder
from tenfold.errors import UserError

LAYERS, WIDTH = 3, 8


@pytest.fixture(scope="module")
def bert() -> BertModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": WIDTH, "num_hidden_layers": LAYERS - 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}
    return BertModel(BertConfig(**sizes, initializer_range=0.3)).eval()


def odd_run(form: str, **options) -> OversmoothingData:
    return OversmoothingData(
        form=form, **({"train_size": 20, "val_size": 10, "batch_size": 5} | options)
    )


def kept(bert, form, tmp_path, split="val", room=10**9, **options) -> States:
    data = odd_run(form, **options)
    return keep_states(read_encoder(bert), data, split, tmp_path / split, room=room)


# -- states -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parity", "qa", "choice"])
def test_states_are_those_of_transformers(bert, form, tmp_path):
    """Token 0 of a text or of each choice; all real tokens of a question. In batches of 5."""
    states, data = kept(bert, form, tmp_path, batch_size=5), odd_run(form)
    start = 0
    cosines = []
    for batch in data.val_dataloader():
        ids, mask = (batch[name].flatten(0, -2) for name in ("input_ids", "attention_mask"))
        with torch.no_grad():
            all_states = bert(ids, mask, output_hidden_states=True).hidden_states
        items = torch.arange(start, start + 5)
        found, real = states.batch(items)
        for layer, hidden in enumerate(all_states):
            wanted = hidden if form == "qa" else hidden[:, :1].reshape(5, -1, WIDTH)
            torch.testing.assert_close(found[layer], wanted)
            for row, seen in zip(hidden.double(), mask.bool(), strict=True):
                unit = F.normalize(row[seen], dim=1)
                n = len(unit)
                cosines.append((layer, float(((unit @ unit.T).sum() - n) / (n * (n - 1)))))
        assert real.all()
        start += 5
    for layer in range(LAYERS):
        mean = np.mean([value for at, value in cosines if at == layer])
        assert states.cosine[layer] == pytest.approx(mean, abs=1e-6)


def test_items_of_different_length_are_padded_with_what_is_not_theirs(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
    length = torch.tensor([1, 3, 2])
    states = States(values, length.cumsum(0) - length, length, {}, [])
    found, real = states.batch(torch.tensor([2, 1]))
    assert found.shape == (2, 2, 3, 2)
    assert real.tolist() == [[True, True, False], [True, True, True]]
    assert found[1, 0, :2].tolist() == values[4:, 1].tolist()
    assert found[0, 1].tolist() == values[1:4, 0].tolist()


def test_states_that_take_too_much_are_refused_before_they_are_written(bert, tmp_path):
    """10 items of 16 tokens, 3 layers, 8 numbers of 4 bytes."""
    size = 10 * 16 * 3 * 8 * 4
    with pytest.raises(UserError, match=r"--data\.train_size"):
        kept(bert, "qa", tmp_path, room=size - 1)
    assert (tmp_path / "val").stat().st_size == 0
    assert kept(bert, "qa", tmp_path, room=size).values.nbytes == size


# -- heads --------------------------------------------------------------------------------------


def some_states(form: str, items: int = 12, tokens: int = 5) -> tuple[States, OversmoothingData]:
    """Random states of 3 layers and what is to be found."""
    generator = torch.Generator().manual_seed(0)
    rows = {"qa": tokens, "choice": 4}.get(form, 1)
    values = torch.randn(items * rows, LAYERS, WIDTH, generator=generator).numpy()
    length = torch.full((items,), rows)
    label = torch.randint({"choice": 4, "qa": tokens}.get(form, 2), (2, items), generator=generator)
    fields = {"index": torch.arange(items), "labels": label[0]}
    if form == "qa":
        fields = {"index": torch.arange(items)}
        fields |= {"start_positions": label.amin(0), "end_positions": label.amax(0)}
    return States(values, length.cumsum(0) - length, length, fields, [0.0] * LAYERS), odd_run(form)


@pytest.mark.parametrize("form", ["parity", "qa", "choice"])
def test_heads_side_by_side_are_heads_alone(form):
    """Those of layer 1, trained with the others, equal a network of nn.Linear trained alone."""
    states, data = some_states(form)
    found = fit_heads(states, data, epochs=3, lr=1e-2, batch_size=5, seed=4)
    outputs = {"qa": 2, "choice": 1}.get(form, 2)
    dense = form != "qa"
    start = LayerHeads(LAYERS, WIDTH, outputs, dense=dense, seed=4)

    alone = torch.nn.ModuleDict({"out": torch.nn.Linear(WIDTH, outputs)})
    alone["out"].weight.data[:] = start.weight[1].T
    alone["out"].bias.data.zero_()
    if start.dense is not None:
        alone["dense"] = torch.nn.Linear(WIDTH, WIDTH)
        alone["dense"].weight.data[:] = start.dense[1].T
        alone["dense"].bias.data.zero_()
    weights = [p for name, p in alone.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in alone.named_parameters() if name.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.01}, {"params": biases, "weight_decay": 0.0}]
    )
    steps, step = 3 * 3, 0
    from tenfold.training import mix

    for epoch in range(3):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(mix(4, epoch)))
        for items in order.split(5):
            x = torch.from_numpy(states.values).unflatten(0, (12, -1))[items, :, 1]
            hidden = alone["dense"](x).tanh() if dense else x
            logits = alone["out"](hidden)
            fields = {name: value[items] for name, value in states.fields.items()}
            if form == "qa":
                loss = F.cross_entropy(logits[..., 0], fields["start_positions"]) / 2
                loss = loss + F.cross_entropy(logits[..., 1], fields["end_positions"]) / 2
            else:
                flat = logits[..., 0] if form == "choice" else logits[:, 0]
                loss = F.cross_entropy(flat, fields["labels"])
            for group in optimizer.param_groups:  # one of nine steps grows
                group["lr"] = 1e-2 * (0.0 if step == 0 else (steps - step) / (steps - 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    torch.testing.assert_close(found.weight[1].T, alone["out"].weight, atol=1e-5, rtol=1e-4)
    if found.dense is not None:
        torch.testing.assert_close(found.dense[1].T, alone["dense"].weight, atol=1e-5, rtol=1e-4)
    assert (found.weight - start.weight).abs().max() > 1e-2


def test_a_head_starts_as_the_pooler(bert):
    heads = LayerHeads(LAYERS, WIDTH, 2, dense=True, start=bert.pooler.dense)
    x = torch.randn(1, 3, 1, WIDTH).expand(LAYERS, -1, -1, -1)
    with torch.no_grad():
        wanted = bert.pooler(x[0]) @ heads.weight[2]
        torch.testing.assert_close(heads(x)[2, :, 0], wanted)


def test_answers_are_sought_among_real_tokens():
    logits, real = torch.zeros(1, 1, 3, 2), torch.tensor([[True, True, False]])
    outputs = as_outputs(logits, real, odd_run("qa"))
    assert outputs["start_logits"].tolist() == [[[0.0, 0.0, -torch.inf]]]
    fields = {"start_positions": torch.tensor([0]), "end_positions": torch.tensor([1])}
    assert head_losses(logits, real, fields, odd_run("qa")).item() == pytest.approx(np.log(2))


def test_a_score_has_a_squared_error():
    data = OversmoothingData("stsb", ".", tokenizer="word")
    logits = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1)
    fields = {"labels": torch.tensor([1.0, 0.0, 5.0])}
    found = head_losses(logits, torch.ones(3, 1, dtype=torch.bool), fields, data)
    assert found.tolist() == pytest.approx([5 / 3])


def test_figures_are_those_of_the_task():
    states, data = some_states("parity")
    heads = fit_heads(states, data, epochs=1, lr=1e-2, batch_size=4)
    found = score_heads(heads, states, data, batch_size=5)
    with torch.no_grad():
        logits = heads(states.batch(torch.arange(12))[0])[:, :, 0]
    share = (logits.argmax(-1) == states.fields["labels"]).double().mean(1)
    assert [figures["accuracy"] for figures in found] == pytest.approx(share.tolist())
    assert [figures["score"] for figures in found] == pytest.approx(share.tolist())


def test_rows_over_seeds():
    figures = [[{"accuracy": a, "score": a}] for a in (0.5, 0.7, 0.9)]
    [row] = layer_rows([0.25], figures)
    wanted = {"layer": 0, "cosine": 0.25, "error": 0.3, "error_std": 0.2, "accuracy": 0.7}
    assert row == pytest.approx(wanted)
    assert layer_rows([0.25], figures[:1])[0]["error_std"] is None
    assert "20.00" in told([row], 3)


def test_the_error_of_the_most_frequent_label():
    """Five of eight in training are 1, and two of five of the others: an error of 3/5."""
    known, data = some_states("parity", 8)
    asked, _ = some_states("parity", 5)
    known.fields["labels"] = torch.tensor([1, 1, 0, 1, 0, 1, 0, 1])
    asked.fields["labels"] = torch.tensor([0, 1, 0, 1, 0])
    assert error_of_most_frequent(known, asked, data) == pytest.approx(0.6)
    known, data = some_states("choice", 4)
    asked, _ = some_states("choice", 4)
    known.fields["labels"], asked.fields["labels"] = torch.tensor([[2, 3, 2, 0], [2, 1, 0, 3]])
    assert error_of_most_frequent(known, asked, data) == pytest.approx(0.75)
    states, data = some_states("qa")
    assert error_of_most_frequent(states, states, data) is None


def test_no_layer_beats_the_most_frequent_label():
    figures = [[{"accuracy": a, "score": a} for a in (0.25, 0.5)]]
    rows = layer_rows([0.25, 0.5], figures, 0.5)
    assert [row["error_most_frequent"] for row in rows] == [0.5, 0.5]
    last = told(rows, 1).splitlines()[-1]
    assert last == "always naming the most frequent label: error 50.00 %, which no layer beats"
    assert told(layer_rows([0.25, 0.5], figures, 0.6), 1).endswith("error 60.00 %")
    assert "most frequent" not in told(layer_rows([0.25, 0.5], figures), 1)


# -- the command --------------------------------------------------------------------------------


def test_command_on_a_plain_encoder(bert, tmp_path, monkeypatch, capsys):
    """The class is the first word: layer 0 holds nothing of it at token 0, layer 1 does."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bert"
    bert.save_pretrained(folder)
    odd_run("qa").tokenizer.save_pretrained(folder)
    lines = [f"c{n % 2}w{n % 4} c{n % 3}w1\t{n % 2}" for n in range(48)]
    (tmp_path / "train.tsv").write_text("\n".join(lines))
    (tmp_path / "dev.tsv").write_text("\n".join(lines[:24]))
    options = {"source": "tsv", "root": ".", "max_length": 16, "batch_size": 8}
    probe(str(folder), data=options, epochs=30, lr=3e-2, batch_size=8, out=tmp_path / "out")
    with (tmp_path / "out/probe.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["layer"]) for row in rows] == [0, 1, 2]
    assert float(rows[0]["error"]) == pytest.approx(0.5)
    assert float(rows[0]["error_most_frequent"]) == pytest.approx(0.5)
    assert float(rows[1]["error"]) < 0.1
    assert (tmp_path / "out/probe.png").stat().st_size > 10_000
    assert "least error" in capsys.readouterr().out


def test_what_cannot_be_probed(bert, tmp_path):
    (tmp_path / "train.txt").write_text("a b\nb a\n")
    bert.save_pretrained(tmp_path / "bert")
    text = {"source": "text", "root": str(tmp_path), "tokenizer": "word"}
    with pytest.raises(UserError, match="every word"):
        probe(str(tmp_path / "bert"), data=text, out=tmp_path / "out")
    with pytest.raises(UserError, match="--data"):
        probe(str(tmp_path / "bert"), data={"sources": "text"}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
