"""The comparison against plain loops: one model at a time, item by item, pair by pair."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from bert_oversmoothing import synthetic
from bert_oversmoothing.comparison import (
    HEADS,
    SINGLE,
    Head,
    Models,
    end_to_end,
    frozen,
    frozen_probe,
    layer_scores,
    odd_run,
    pace,
    probe_steps,
    steps_within,
    train,
    training,
)
from bert_oversmoothing.encoder import Encoder, EncoderConfig, probe_config
from bert_oversmoothing.synthetic import OddRun, probe_task
from tenfold.errors import UserError

TASK = OddRun()
SMALL = EncoderConfig(width=8, heads=2, ff_width=12, layers=3)
KINDS = ("last", "concat", "max", "gate", "scalar_mix", "best_layer(1)", "gate_identity")


def read(head: Head, states) -> torch.Tensor:
    """What the linear layer of a head reads, by the equations."""
    kind, fusion = head.fusion.kind, head.fusion
    stacked = torch.stack(list(states))
    if kind == "concat":
        return torch.cat(list(states), -1) @ fusion.weight.T + fusion.bias
    if kind == "max":
        return stacked.max(0).values
    if kind == "gate":
        logits = torch.einsum("kbnd,kd->kbn", stacked, fusion.gate.weight)
        gates = (logits + fusion.gate.bias[:, None, None]).softmax(0)
        fused = (gates[..., None] * stacked).sum(0)
        if fusion.alpha is not None:
            fused = states[-1] + fusion.alpha * (fused - states[-1])
        return fused
    if kind == "scalar_mix":
        return fusion.gamma * torch.einsum("k,kbnd->bnd", fusion.mix.softmax(0), stacked)
    return states[-1 if kind == "last" else int(kind[11:-1])]


def mean_cosine(hidden: torch.Tensor) -> float:
    """Over all pairs of different tokens of a text, and over texts."""
    rows = hidden.detach().double().numpy()
    rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    grams = rows @ rows.transpose(0, 2, 1)
    n = grams.shape[1]
    return float(np.mean([(gram.sum() - np.trace(gram)) / (n * (n - 1)) for gram in grams]))


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["none", "first"])
def test_several_models_at_once_are_each_alone(monkeypatch, share):
    monkeypatch.setattr(training, "WARMUP", 3)
    config = EncoderConfig(width=8, heads=2, ff_width=12, layers=3, share_attention=share)
    models, steps = Models(KINDS, config, seed=5, dtype=torch.float64), 7
    losses = train(models, 5, steps)
    for name, head, curve, end in zip(KINDS, models.readers, losses, range(99), strict=False):
        alone = Encoder(config, generator=torch.Generator().manual_seed(5)).double()
        reader = Head(name, config, 2, 5, torch.float64)
        named = [*alone.named_parameters(), *reader.named_parameters()]
        bare = ("bias", "alpha", "gamma", "mix")
        plain = [p for n, p in named if n.endswith(bare) or "norm" in n]
        decaying = [p for n, p in named if not (n.endswith(bare) or "norm" in n)]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decaying}]
        optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.01)
        found = []
        for step in range(steps):
            rate = (step + 1) / 3 if step < 3 else (steps - step) / (steps - 3)
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * rate
            items = TASK.items(5, range(32 * step, 32 * step + 32))
            logits = reader.output(read(reader, alone(items.ids).hidden_states))[:, 3:15]
            chances = logits.log_softmax(1)
            rows = torch.arange(32)
            right = chances[rows, items.start - 3, 0] + chances[rows, items.end - 3, 1]
            loss = -right.mean() / 2
            optimizer.zero_grad()
            loss.backward()
            for p in [*alone.parameters(), *reader.parameters()]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            nn.utils.clip_grad_norm_([*alone.parameters(), *reader.parameters()], 1.0)
            optimizer.step()
            found.append(loss.item())
        assert curve == pytest.approx(found, abs=1e-9), name
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(
                models.encoder.state_dict()[key][end], value, rtol=0, atol=1e-6
            )
        for key, value in reader.state_dict().items():
            torch.testing.assert_close(head.state_dict()[key], value, rtol=0, atol=1e-6)


def test_the_gradient_of_each_model_is_clipped_by_its_own_norm():
    models = Models(("last", "concat"), SMALL, seed=0, dtype=torch.float64)
    items = TASK.items(0, range(8))
    first, second = models(items.ids)
    (first.square().sum() + 1e-4 * second.square().sum()).backward()
    own = [
        [
            *(p.grad[m].clone() for p in models.encoder.parameters()),
            *(p.grad.clone() for p in head.parameters()),
        ]
        for m, head in enumerate(models.readers)
    ]
    norms = [torch.cat([g.flatten() for g in gradients]).norm() for gradients in own]
    assert norms[0] > 1 > norms[1]
    assert models.clip(1.0).tolist() == pytest.approx([n.item() for n in norms])
    for m, (head, scale) in enumerate(zip(models.readers, (1 / norms[0], 1.0), strict=True)):
        now = [
            *(p.grad[m] for p in models.encoder.parameters()),
            *(p.grad for p in head.parameters()),
        ]
        for a, b in zip(now, own[m], strict=True):
            torch.testing.assert_close(a, b * scale, rtol=1e-5, atol=1e-12)


def test_models_of_a_seed_start_alike_whatever_is_beside_them():
    many, few = Models(KINDS, SMALL, 3), Models(("gate",), SMALL, 3)
    for key, value in few.encoder.state_dict().items():
        assert all(torch.equal(value[0], each) for each in many.encoder.state_dict()[key])
    for key, value in few.readers[0].state_dict().items():
        assert torch.equal(value, many.readers[KINDS.index("gate")].state_dict()[key])
    assert len({tuple(head.output.weight.flatten().tolist()) for head in many.readers}) == 1
    assert many.readers[-1].fusion.is_identity()
    assert not torch.equal(Models(("gate",), SMALL, 4).encoder.word, few.encoder.word)


# -- what is measured --------------------------------------------------------------------------


def test_the_odd_run_is_measured_item_by_item(monkeypatch):
    monkeypatch.setattr(synthetic, "VALIDATION_ITEMS", 64)
    heads, steps = ("concat", SINGLE), 2
    found = odd_run((2,), steps, heads=heads, progress=False)
    models = Models(heads, EncoderConfig(), 2)
    items = TASK.validation()
    before = [mean_cosine(hidden) for hidden in models.states(items.ids)[0]]
    assert found["cosine_before"] == pytest.approx(before, abs=1e-5)
    losses = train(models, 2, steps)
    states = models.states(items.ids)
    for m, (name, own, head) in enumerate(zip(heads, states, models.readers, strict=True)):
        logits = head.output(read(head, own)).tolist()
        right = 0
        for n, places in enumerate(logits):
            start = max(range(3, 15), key=lambda i, p=places: p[i][0])
            end = max(range(3, 15), key=lambda i, p=places: p[i][1])
            right += (start, end) == (int(items.start[n]), int(items.end[n]))
        assert found["em"][name] == [pytest.approx(right / 64)]
        assert found["loss"][name] == [pytest.approx(losses[m])]
        after = [mean_cosine(hidden) for hidden in own]
        assert found["cosine_after"][name] == pytest.approx(after, abs=1e-5)
        assert found["cosine_last"][name] == [pytest.approx(after[-1], abs=1e-5)]
        fused = mean_cosine(read(head, own))
        assert found["cosine_fused"][name] == [pytest.approx(fused, abs=1e-5)]
    assert found["chance"] == pytest.approx(1 / 36)
    # at first no place is told from another
    assert found["loss"]["concat"][0][0] == pytest.approx(found["chance_loss"], abs=0.5)


def test_the_probe_is_measured_token_by_token():
    found = frozen_probe((1,), (0.15,), heads=("max", "concat"), steps=4, progress=False)
    train_set, test_set = probe_task(1)
    for std in (0.15,):
        encoder = Encoder(probe_config(std), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            seen = torch.stack(encoder(train_set.ids).hidden_states)
            unseen = encoder(test_set.ids).hidden_states
        assert found["cosine"][std] == [pytest.approx(mean_cosine(unseen[-1]), abs=1e-5)]
        assert len(found["layers"][std][0]) == 13
        for name in ("max", "concat"):
            head = Head(name, probe_config(std), 8, 1)
            matrices = [p for p in head.parameters() if p.dim() > 1]
            others = [p for p in head.parameters() if p.dim() < 2]
            groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.01)
            order = torch.Generator().manual_seed(1)
            for _ in range(4):
                rows = torch.randint(400, (32,), generator=order)
                outputs = head.output(read(head, seen[:, rows]))
                chances = outputs.log_softmax(-1).gather(-1, train_set.label[rows][..., None])
                optimizer.zero_grad()
                (-chances.mean()).backward()
                optimizer.step()
            chosen = head.output(read(head, unseen)).argmax(-1)
            right = [
                int(c) == int(i) % 8
                for c, i in zip(chosen.flatten(), test_set.ids.flatten(), strict=True)
            ]
            # an outcome near a tie may fall either way
            assert found["accuracy"][name][std] == [pytest.approx(np.mean(right), abs=2e-3)]


def test_single_layers_are_judged_by_items_that_no_run_reports(monkeypatch):
    given = {}

    def seed_runs(seed, config, heads, steps, judges, label):
        given.update(seed=seed, judges=judges, heads=heads)
        return {"heads": {name: {"em": n / 100} for n, name in enumerate(heads)}}

    monkeypatch.setattr(end_to_end, "_seed_runs", seed_runs)
    assert layer_scores(steps=4, progress=False) == {n + 1: n / 100 for n in range(12)}
    judged = {tuple(row) for row in given["judges"].ids.tolist()}
    trained = TASK.items(given["seed"], range(4 * 32)).ids.tolist()
    assert len(judged) == 384
    assert not judged & {tuple(row) for row in [*trained, *TASK.validation().ids.tolist()]}
    assert given["heads"][2] == "best_layer(3)"


# -- an interrupted comparison -----------------------------------------------------------------


def test_an_odd_run_goes_on_where_it_was_broken_off(tmp_path, monkeypatch):
    done, broken = [], [2]

    def seed_runs(seed, config, heads, steps, judges, label):
        if seed in broken:
            broken.remove(seed)
            raise KeyboardInterrupt
        done.append((seed, tuple(heads)))
        run = {"em": seed / 10, "loss": [1.0], "cosine": [0.0, 0.5], "cosine_fused": 0.25}
        return {"before": [0.0, 1.0], "heads": dict.fromkeys(heads, run)}

    monkeypatch.setattr(end_to_end, "_seed_runs", seed_runs)
    options = {"heads": ("last", "max"), "out": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        odd_run((1, 2, 3), 9, **options)
    found = odd_run((1, 2, 3), 9, **options)
    assert done == [(seed, ("last", "max")) for seed in (1, 2, 3)]
    assert found["em"] == {"last": [0.1, 0.2, 0.3], "max": [0.1, 0.2, 0.3]}
    # a head that is asked for later is trained alone
    again = odd_run((1, 3), 9, **(options | {"heads": ("last", "gate")}))
    assert done[3:] == [(1, ("gate",)), (3, ("gate",))]
    assert again["em"] == {"last": [0.1, 0.3], "gate": [0.1, 0.3]}
    for changed, told in (
        ({"steps": 8}, "results of steps 9, not 8"),
        ({"std": 0.1}, "results of std 0.2, not 0.1"),
        ({"share_attention": "first"}, "results of share_attention none, not first"),
    ):
        with pytest.raises(UserError, match=told):
            odd_run((1,), **{"steps": 9, **options, **changed})
    assert steps_within(1.0, 3, tmp_path) == 9


def test_a_probe_goes_on_where_it_was_broken_off(tmp_path, monkeypatch):
    done, broken = [], [(1, 0.1)]

    def probe_encoder(seed, std, heads, steps):
        if (seed, std) in broken:
            broken.clear()
            raise KeyboardInterrupt
        done.append((seed, std, *heads))
        return {"cosine": [0.0, std], "accuracy": dict.fromkeys(heads, std + seed)}

    monkeypatch.setattr(frozen, "probe_encoder", probe_encoder)
    options = {"heads": ("last",), "steps": 6, "out": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        frozen_probe((0, 1), (0.1, 0.2), **options)
    found = frozen_probe((0, 1), (0.1, 0.2), **options)
    assert done == [(seed, std, "last") for std in (0.1, 0.2) for seed in (0, 1)]
    assert found["accuracy"] == {"last": {0.1: [0.1, 1.1], 0.2: [0.2, 1.2]}}
    assert found["cosine"] == {0.1: [0.1, 0.1], 0.2: [0.2, 0.2]}
    with pytest.raises(UserError, match="results of steps 6, not 7"):
        frozen_probe((0,), (0.1,), **(options | {"steps": 7}))
    # the other part shares the file
    assert json.loads((tmp_path / "results.json").read_text()).keys() == {"frozen_probe"}


@pytest.mark.parametrize("text", ["{", "[]", '{"odd_run": 3}', '{"odd_run": {"runs": {}}}'])
def test_a_file_that_holds_no_results_is_told(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"no JSON of results .*results\.json"):
        odd_run((0,), 1, out=tmp_path, progress=False)


# -- time --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "seeds", "steps"),
    # a step of part B takes 0.2 s, and beside it 0.8 steps of four encoders 0.1 s each: 0.52 s
    [(130, 2, 100), (1000, 2, 150), (0.1, 1, 1)],
)
def test_a_time_has_room_for_so_many_steps(tmp_path, monkeypatch, seconds, seeds, steps):
    monkeypatch.setattr(pace, "_step_seconds", lambda: 0.2)
    monkeypatch.setattr(pace, "_probe_step_seconds", lambda: 0.1)
    assert steps_within(seconds, seeds, tmp_path) == steps
    assert probe_steps(150) == 120
    assert probe_steps(1) == 1


def test_the_pace_is_that_of_the_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])

    def trained(models, seed, steps):
        assert models.names == HEADS
        now[0] += durations.pop(0) * steps

    def probed(seed, std, heads, steps):
        now[0] += 5 + 0.25 * steps

    durations = [9.0] * 4 + [0.5, 0.5, 0.5, 0.5, 0.5, 7.0]
    monkeypatch.setattr(pace, "train", trained)
    monkeypatch.setattr(pace, "probe_encoder", probed)
    assert pace._step_seconds() == pytest.approx(0.5)
    assert pace._probe_step_seconds() == pytest.approx(0.25)


# -- the effect --------------------------------------------------------------------------------


def test_a_collapsed_last_layer_tells_no_class_and_a_fusion_does():
    found = frozen_probe((0,), (0.2,), heads=("last", "concat"), steps=60, progress=False)
    assert found["cosine"][0.2][0] > 0.999
    assert found["accuracy"]["last"][0.2][0] < 0.2
    assert found["accuracy"]["concat"][0.2][0] > 0.9


@pytest.mark.slow
def test_every_fusion_beats_the_last_layer_where_it_is_smoothed_away():
    """Section 9.3 of the specification: the order of the fusions is not claimed."""
    found = odd_run((0, 1, 2), progress=False)
    scores = {name: np.array(values) for name, values in found["em"].items()}
    for name in ("concat", "max", "gate"):
        assert (scores[name] > scores["last"]).all(), name
    assert scores["concat"].mean() > scores["last"].mean() + 0.3
