"""Training steps against a loop written by hand, rates by hand, and what a checkpoint carries."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, ElectraConfig, get_linear_schedule_with_warmup

from bert_oversmoothing.cli import app
from bert_oversmoothing.data import OversmoothingData, open_tokenizer
from bert_oversmoothing.model import FusionForSequenceClassification
from bert_oversmoothing.module import FusionModule, load_model, load_tokenizer
from bert_oversmoothing.module.optimisation import linear_schedule
from bert_oversmoothing.module.rows import label_rows, token_rows, word_rows
from bert_oversmoothing.module.training import token_mask
from tenfold.errors import UserError
from tenfold.testing import CPU, quiet_trainer, repeated

SENTENCES = Path(__file__).parent / "sentences"
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
SMALL = {"model_type": "bert", **SIZES, "initializer_range": 0.2}


def module(**options) -> FusionModule:
    return FusionModule(SMALL, **({"dropout": 0.0} | options))


def odd_run(form="qa", **options) -> OversmoothingData:
    sizes = {"batch_size": 8, "train_size": 16, "val_size": 8}
    return OversmoothingData(form=form, **(sizes | options))


def first_batch(form="qa") -> dict[str, torch.Tensor]:
    return next(iter(odd_run(form).train_dataloader()))


# -- optimiser and schedule ---------------------------------------------------------------------


def groups_of(made: FusionModule, folder: Path) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter, by its name."""
    trainer = quiet_trainer(folder, max_epochs=1)
    trainer.fit(made, repeated(first_batch(), 1))
    [optimizer] = trainer.optimizers
    names = {id(parameter): name for name, parameter in made.net.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["initial_lr"], group["weight_decay"])
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
    return found


@pytest.mark.parametrize("fusion", ["gate", "concat", "scalar_mix", "max"])
def test_groups_by_name(fusion, tmp_path):
    made = module(task="qa", fusion=fusion, init="identity", lr=2e-5, fusion_lr=1e-3)
    found = groups_of(made, tmp_path)
    assert found.keys() == {name for name, _ in made.net.named_parameters()}
    for name, (lr, decay) in found.items():
        plain = name.endswith(("bias", "alpha", "gamma", "mix")) or "LayerNorm" in name
        assert lr == (1e-3 if name.startswith("fusion.") else 2e-5), name
        assert decay == (0.0 if plain else 0.01), name


def test_a_fusion_may_learn_at_the_rate_of_the_encoder(tmp_path):
    found = groups_of(module(task="qa", lr=3e-5, fusion_lr=None), tmp_path)
    assert {lr for lr, _ in found.values()} == {3e-5}


def test_rates_by_hand_and_by_transformers():
    """20 steps, 10 % of them growing: 0, 1/2, 1, then 17/18 and so on to 1/18; 0 at the end."""

    def rates(make):
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], 2.0)
        schedule, found = make(optimizer), []
        for _ in range(21):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    ours = rates(lambda optimizer: linear_schedule(optimizer, steps=20, warmup=0.1))
    by_hand = [0.0, 1.0, *(2 * (20 - s) / 18 for s in range(2, 20)), 0.0]
    assert ours == pytest.approx(by_hand, abs=1e-12)
    theirs = rates(lambda optimizer: get_linear_schedule_with_warmup(optimizer, 2, 20))
    assert ours == pytest.approx(theirs, abs=1e-12)
    constant = {"warmup": 0.1, "schedule": "constant"}
    level = rates(lambda optimizer: linear_schedule(optimizer, steps=20, **constant))
    assert level == [0.0, 1.0, *[2.0] * 19]
    odd = rates(lambda optimizer: linear_schedule(optimizer, steps=15, warmup=0.1))
    assert odd[:3] == [0.0, 1.0, 2.0]  # 1.5 steps are 2


# -- steps --------------------------------------------------------------------------------------


def test_steps_equal_a_loop_by_hand(tmp_path):
    """Three steps of fit: loss, clipping, AdamW and rates written out."""
    batch = first_batch()
    made = module(task="qa", fusion="gate", lr=1e-2, fusion_lr=3e-2, warmup=0.4)
    start = {name: x.clone() for name, x in made.net.state_dict().items()}
    exact = {"precision": "64-true", "gradient_clip_val": 1.0}  # Adam makes much of rounding
    quiet_trainer(tmp_path, max_epochs=1, **exact).fit(made, repeated(batch, 3))

    net = module(task="qa", fusion="gate").net.double()
    net.load_state_dict(start)
    moments = {
        name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in net.named_parameters()
    }
    for step, factor in enumerate((0.0, 0.5, 1.0)):  # of 1.2 growing steps, rounded up to 2
        net.zero_grad()
        output = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        ends = zip((output.start_logits, output.end_logits), ("start", "end"), strict=True)
        sum(F.cross_entropy(x, batch[f"{end}_positions"]) for x, end in ends).div(2).backward()
        norm = torch.stack([p.grad.square().sum() for p in net.parameters()]).sum().sqrt()
        with torch.no_grad():
            for name, p in net.named_parameters():
                gradient = p.grad * min(1.0, 1.0 / (norm.item() + 1e-6))
                lr = factor * (3e-2 if name.startswith("fusion.") else 1e-2)
                decays = name.endswith("weight") and "LayerNorm" not in name
                p.mul_(1 - lr * 0.01 if decays else 1.0)
                first, second = moments[name]
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient.square(), 0.001)
                unbiased = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                p.sub_(lr * first / (1 - 0.9 ** (step + 1)) / unbiased)
    moved = 0.0
    for name, p in made.net.named_parameters():
        torch.testing.assert_close(p, net.get_parameter(name), atol=1e-9, rtol=1e-7, msg=name)
        moved = max(moved, (p - start[name]).abs().max().item())
    assert moved > 1e-3


def test_loss_of_masked_words_is_the_mean_over_them():
    made = module(task="mlm", fusion="max").eval()
    ids = torch.randint(3, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[0, 2], labels[2, 5], labels[2, 7] = 4, 5, 6
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with torch.no_grad():
        found = made._task_loss(batch)
        logits = made.net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    shares = logits.log_softmax(-1)
    by_hand = -(shares[0, 2, 4] + shares[2, 5, 5] + shares[2, 7, 6]) / 3
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(found, made(batch).loss.detach())
    none = {**batch, "labels": torch.full_like(ids, -100)}
    assert made._task_loss(none).item() == 0.0


def test_regulariser_reads_the_last_layer_and_reaches_it(tmp_path):
    """Weight 0.7 of the hinge on the cosines of H_2, pair by pair; the fusion has no part."""
    batch = first_batch("after")
    batch["attention_mask"][0, 12:] = 0
    made = module(num_labels=5, fusion="best_layer(1)", regulariser=0.7, margin=0.4)
    made.log = lambda *_, **__: None
    loss = made.training_step(batch, 0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    encoder = made.net.base_model
    last = encoder(**inputs).last_hidden_state
    costs = []
    for rows, real in zip(last.double(), batch["attention_mask"].bool(), strict=True):
        unit = rows[real] / rows[real].norm(dim=1, keepdim=True)
        pairs = [
            max(0.0, 0.4 - 1 + float(unit[i] @ unit[j]))
            for i in range(len(unit))
            for j in range(len(unit))
            if i != j
        ]
        costs.append(sum(pairs) / len(pairs))
    plain = made(batch).loss
    assert float(loss - plain) == pytest.approx(0.7 * sum(costs) / len(costs), rel=1e-4)
    loss.backward()
    assert encoder.encoder.layer[1].output.dense.weight.grad.abs().max() > 0


def test_validation_logs_the_cosines_of_last_and_fused(tmp_path):
    made, data = module(task="qa", fusion="mean"), odd_run()
    [logged] = quiet_trainer(tmp_path).validate(made, data, verbose=False)
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        states = made.net.base_model(batch["input_ids"], output_hidden_states=True).hidden_states
    for name, state in (("last", states[-1]), ("fused", torch.stack(states).mean(0))):
        unit = F.normalize(state.double(), dim=-1)
        gram = unit @ unit.mT
        n = gram.shape[1]
        by_hand = (gram.sum((1, 2)) - gram.diagonal(dim1=1, dim2=2).sum(1)) / (n * (n - 1))
        assert logged[f"val/cosine_{name}"] == pytest.approx(by_hand.mean().item(), abs=1e-5)


def test_figures_of_validation_are_those_of_the_logits(tmp_path):
    made, data = module(num_labels=2), odd_run("parity", val_size=24)
    [logged] = quiet_trainer(tmp_path).validate(made, data, verbose=False)
    right = []
    for batch in data.val_dataloader():
        with torch.no_grad():
            right += (made(batch).logits.argmax(1) == batch["labels"]).tolist()
    assert len(right) == 24
    assert logged["val/accuracy"] == pytest.approx(sum(right) / 24)


# -- weights ------------------------------------------------------------------------------------


def plain_folder(path, config=None):
    """A plain encoder with its tokenizer."""
    torch.manual_seed(1)
    BertModel(config or BertConfig(**SIZES, initializer_range=0.2)).save_pretrained(path)
    odd_run().tokenizer.save_pretrained(path)
    return str(path)


def test_weights_of_a_plain_encoder_start_as_the_identity(tmp_path):
    weights = plain_folder(tmp_path / "plain")
    made = FusionModule(weights=weights, num_labels=5, dropout=0.0)
    assert made.hparams["init"] == "identity"
    assert made.net.config.backbone.hidden_size == 16  # that of the folder, not BERT-base
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(made, odd_run("after"))  # at rate 0: nothing moves
    batch = first_batch("after")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain = BertModel.from_pretrained(weights).eval()
    with torch.no_grad():
        pooled = plain(**inputs).pooler_output
        head = made.net.model.classifier
        assert torch.equal(made.eval().net(**inputs).logits, head(pooled))
    alone = FusionModule(**made.hparams)
    assert alone.hparams["init"] == "identity"


def test_a_checkpoint_needs_no_weights_and_no_tokenizer(tmp_path, monkeypatch):
    """The folder of the weights is gone when predict opens the run."""
    monkeypatch.chdir(tmp_path)
    weights = plain_folder(tmp_path / "plain")
    (tmp_path / "train.tsv").write_text("c0w0 c1w1\tgood\nc2w1 c0w3\tbad\n" * 8)
    (tmp_path / "dev.tsv").write_text("c0w0 c1w1\tgood\nc2w1 c0w3 c1w0\tbad")
    data = ["--data.root", ".", "--data.batch_size", "8", "--data.max_length", "16"]
    options = ["--trainer.max_epochs", "1", "--trainer.precision", "32-true", *CPU]
    fit = ["fit", "--config", "tsv", "--weights", weights, *data, *options]
    assert app.main(fit) == 0
    (tmp_path / "plain").rename(tmp_path / "gone")
    (tmp_path / "own.txt").write_text("c0w0 c1w1\nc2w1\n")
    run = "runs/bert-oversmoothing/tsv"
    predict = ["predict", "--ckpt", run, "--data.predict_root", "own.txt", *CPU]
    assert app.main([*predict, "--trainer.precision", "32-true"]) == 0
    with open(f"{run}/predict/predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["index"], row["text"]) for row in rows] == [("0", "c0w0 c1w1"), ("1", "c2w1")]
    net, tokenizer = load_model(run), load_tokenizer(run)
    known = open_tokenizer("gone")
    assert tokenizer.get_vocab() == known.get_vocab()
    for row, text in zip(rows, ("c0w0 c1w1", "c2w1"), strict=True):
        with torch.no_grad():
            share = net(**known(text, return_tensors="pt")).logits[0].softmax(0).tolist()
        names = sorted(key for key in row if key.startswith("p_"))
        assert names == ["p_bad", "p_good"]
        assert sorted(float(row[key]) for key in names) == pytest.approx(sorted(share), abs=1e-6)
        assert row["label"] == max(("bad", "good"), key=lambda name: float(row[f"p_{name}"]))


def test_load_model_opens_all_three(tmp_path):
    made, data = module(num_labels=5, fusion="concat"), odd_run("after")
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(made, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    made.net.save_pretrained(tmp_path / "folder")
    for path in (tmp_path, tmp_path / "last.ckpt", tmp_path / "folder"):
        net = load_model(path)
        assert isinstance(net, FusionForSequenceClassification)
        assert not net.training
        for name, tensor in made.net.state_dict().items():
            assert torch.equal(net.state_dict()[name], tensor), (path, name)
    assert load_tokenizer(tmp_path).get_vocab() == data.tokenizer.get_vocab()


def test_weights_may_be_a_model_with_fusion(tmp_path):
    first = module(num_labels=5, fusion="concat", layers="last:2")
    first.net.save_pretrained(tmp_path)
    again = FusionModule(weights=str(tmp_path), num_labels=5, fusion="max")
    assert (again.hparams["fusion"], list(again.hparams["layers"])) == ("concat", [1, 2])
    quiet_trainer(tmp_path, limit_val_batches=1).validate(again, odd_run("after"), verbose=False)
    for name, tensor in first.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], tensor), name


@pytest.mark.parametrize("fusion", ["max", "last"])
def test_pre_training_is_gone_on_with(fusion, tmp_path):
    """From the run of a masked language model: its encoder, its fusion and its vocabulary."""
    text = {"source": "text", "root": str(SENTENCES), "tokenizer": "word", "batch_size": 8}
    first = FusionModule({**SMALL, "vocab_size": 60}, task="mlm", fusion=fusion, init="identity")
    first.net.fusion.alpha = None if fusion == "last" else torch.nn.Parameter(torch.tensor(0.5))
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(first, OversmoothingData(**text))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    made = FusionModule(weights=str(tmp_path), fusion="gate")
    assert made.net.config.fusion == {"max": "max", "last": "gate"}[fusion]
    (tmp_path / "train.tsv").write_text("my sister reads\tyes\nthe tall baker\tno\n" * 4)
    rows = OversmoothingData("tsv", str(tmp_path), max_length=16, batch_size=8)
    quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(made, rows)  # at rate 0
    known = first.net.base_model.state_dict()
    for name, tensor in made.net.base_model.state_dict().items():
        assert name.startswith("pooler.") or torch.equal(tensor, known[name]), name
    assert made.net.fusion.alpha.item() == {"max": 0.5, "last": 0.0}[fusion]
    assert rows.tokenizer.get_vocab() == load_tokenizer(tmp_path).get_vocab()


def test_errors_of_weights(tmp_path):
    weights = plain_folder(tmp_path / "plain")
    wrong = FusionModule({**SMALL, "hidden_size": 8}, weights, num_labels=5)
    with pytest.raises(UserError, match="of another network"):
        quiet_trainer(tmp_path, max_steps=1).fit(wrong, odd_run("after"))
    with pytest.raises(UserError, match="nowhere"):
        FusionModule(weights=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="model_type"):
        FusionModule({"hidden_size": 16})
    with pytest.raises(UserError, match="num_labels 5, the model 3"):
        quiet_trainer(tmp_path, max_steps=1).fit(module(num_labels=3), odd_run("after"))


@pytest.mark.parametrize("config", [BertConfig(**SIZES), ElectraConfig(**SIZES, embedding_size=8)])
def test_dropout_of_all_parts(config):
    made = FusionModule(config.to_dict(), dropout=0.25)
    rates = {m.p for m in made.net.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}


# -- predictions --------------------------------------------------------------------------------


def test_answers_of_predict(tmp_path):
    """answers.json has an answer for each question, which is the span with the best two ends."""
    made, data = module(task="qa"), odd_run(val_size=10, eval_batch_size=4)
    rows = quiet_trainer(tmp_path).predict(made, data)
    rows = [row for batch in rows for row in batch]
    answers = json.loads((tmp_path / "predict" / "answers.json").read_text())
    assert {row["id"]: row["answer"] for row in rows} == answers
    assert len(answers) == 10
    batch = next(iter(data.predict_dataloader()))
    with torch.no_grad():
        output = made.eval()(batch)
    words = data.odd_run.vocabulary
    for i, row in enumerate(rows[:4]):
        best = max(
            ((s, e) for s in range(3, 15) for e in range(s, 15)),
            key=lambda span: float(output.start_logits[i, span[0]] + output.end_logits[i, span[1]]),
        )
        ids = batch["input_ids"][i, best[0] : best[1] + 1].tolist()
        assert row["answer"] == " ".join(words[token] for token in ids)


def test_rows_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [2.0, 2.0]])
    [first, second] = label_rows(logits, [7, 8], ("no", "yes"))
    assert (first.pop("index"), first.pop("label")) == (7, "yes")
    assert first == pytest.approx({"p_no": 0.25, "p_yes": 0.75})
    assert (second["label"], second["p_no"]) == ("no", 0.5)
    assert label_rows(torch.tensor([[1.5]]), [3]) == [{"index": 3, "score": 1.5}]
    [choice] = label_rows(torch.tensor([[0.0, 0.0, 1.0]]), [0], ("unused",), choices=True)
    assert choice["label"] == 2
    assert set(choice) == {"index", "label", "p_0", "p_1", "p_2"}
    tokens = torch.eye(3)[None, [2, 0, 1]]
    mask = torch.tensor([[1, 1, 0]])
    assert token_rows(tokens, [4], mask, ("a", "b", "c")) == [{"index": 4, "labels": "c a"}]
    words = word_rows(tokens, [5], {"input_ids": torch.tensor([[9, 1, 9]])}, 9, "xyz".__getitem__)
    assert [(row["place"], row["word"]) for row in words] == [(0, "z"), (2, "y")]
    assert words[0]["probability"] == pytest.approx(math.e / (math.e + 2))


def test_choices_are_texts_of_their_own():
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]]])
    states = torch.zeros(2, 3, 4)
    found = token_mask({"attention_mask": mask}, states)
    assert found.tolist() == [[True, True, False], [True, False, False]]
    assert token_mask({"pixel_values": states}, states).all()


def test_threshold_of_no_answer_is_tuned_in_validation_and_kept(tmp_path, squad2):
    """The buffer holds what the official program would choose, and predict obeys it."""
    data = OversmoothingData(
        "squad2", str(squad2), tokenizer=odd_run().tokenizer, max_length=24, stride=4
    )
    made = module(task="qa", lr=1e-3)
    trainer = quiet_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(made, data)
    best = trainer.callback_metrics["val/best_f1_thresh"].item()
    assert made.null_threshold.item() == pytest.approx(best)
    rows = [row for batch in quiet_trainer(tmp_path).predict(made, data) for row in batch]
    for row in rows:
        assert row["answer"] == ("" if row["null_odds"] > made.null_threshold else row["best"])
    made.null_threshold.fill_(-1e9)
    rows = [row for batch in quiet_trainer(tmp_path).predict(made, data) for row in batch]
    assert {row["answer"] for row in rows} == {""}


@pytest.fixture
def squad2(tmp_path):
    """A few questions with and without an answer, in the words of the generated task."""
    root = tmp_path / "squad2"
    root.mkdir()
    context = "c0w0 c1w1 c2w2 c3w3"
    for name in ("train-v2.0.json", "dev-v2.0.json"):
        questions = []
        for n in range(8):
            answers = [{"text": f"c{n % 4}w{n % 4}", "answer_start": 5 * (n % 4)}]
            kind = {"answers": [] if n % 2 else answers, "is_impossible": bool(n % 2)}
            questions.append({"id": f"{name}-{n}", "question": f"which c{n % 4}", **kind})
        article = {"title": "t", "paragraphs": [{"context": context, "qas": questions}]}
        (root / name).write_text(json.dumps({"version": "v2.0", "data": [article]}))
    return root
