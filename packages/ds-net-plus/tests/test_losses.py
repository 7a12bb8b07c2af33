"""Stage-II objectives against the official numbers and hand computation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_net_plus.losses import (
    GateLoss,
    complexity,
    gumbel_gate,
    gumbel_noise,
    sgs_targets,
    value_loss,
)
from tenfold.errors import UserError

REFERENCE = Path(__file__).parent / "reference"


def test_gumbel_gate_equals_the_official_program():
    with np.load(REFERENCE / "gumbel.npz") as file:
        ref = {k: torch.from_numpy(file[k]) for k in file.files}
    logits = ref["logits"].requires_grad_()
    sample = gumbel_gate(logits, ref["noise"])
    assert torch.allclose(sample.soft, ref["soft"], rtol=1e-6, atol=1e-7)
    assert torch.equal(sample.choice, ref["index"][:, 0])
    assert torch.allclose(sample.gate, ref["hard_st"], atol=1e-6)
    (sample.gate * ref["weight"]).sum().backward()
    assert torch.allclose(logits.grad, ref["grad_logits"], rtol=1e-5, atol=1e-7)


def test_gumbel_noise_has_the_moments_of_its_law():
    torch.manual_seed(0)
    noise = gumbel_noise(torch.zeros(200_000, 2, dtype=torch.float64))
    assert abs(noise.mean() - 0.5772156649) < 5 * (math.pi / math.sqrt(6)) / math.sqrt(4e5)
    assert abs(noise.var() - math.pi**2 / 6) < 0.02


def test_sampled_routes_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 0.0, -1.0]]).expand(60_000, 3)
    share = gumbel_gate(logits).choice.bincount(minlength=3) / 60_000
    assert torch.allclose(share, logits[0].softmax(0), atol=0.01)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("try_best", [0, 3, 3, 3, 0]),
        ("give_up", [0, 3, 0, 3, 0]),
        ("ladder", [0, 1, 3, 3, 0]),
    ],
)
def test_difficulty_labels_by_hand(mode, expected):
    correct = torch.tensor(
        [
            [1, 1, 1, 1],  # easy
            [0, 1, 1, 1],  # needs the second route
            [0, 0, 0, 0],  # hopeless
            [0, 0, 0, 1],  # needs the last
            [1, 0, 0, 0],  # only the first is right
        ]
    ).bool()
    assert sgs_targets(correct, mode).tolist() == expected


def test_unknown_difficulty_labels_are_named():
    with pytest.raises(UserError, match="try_best"):
        sgs_targets(torch.ones(1, 2).bool(), "harder")
    with pytest.raises(UserError, match="probs"):
        GateLoss(sgs_on="odds")


def test_complexity_is_the_square_of_the_mean_cost():
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    assert float(complexity(gate, [2, 4])) == pytest.approx(((2 + 4 + 4 + 4) / 4 / 4) ** 2)
    assert float(complexity(gate, [2, 4], scale=10)) == pytest.approx(0.35**2)


@pytest.mark.parametrize("sgs_on", ["logits", "probs"])
def test_gate_loss_by_hand(sgs_on):
    torch.manual_seed(1)
    logits, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    classes = torch.randn(5, 4, dtype=torch.float64)
    labels, targets = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 2, 0, 2, 2])
    sample = gumbel_gate(logits, noise)
    out = GateLoss(0.7, 0.3, 2.0, 5.0, sgs_on, 0.1)(
        logits, sample, classes, labels, targets, [1, 2, 4]
    )

    def smoothed(scores, target):
        log = scores.numpy() - np.log(np.exp(scores.numpy()).sum(1, keepdims=True))
        n, k = log.shape
        q = np.full((n, k), 0.1 / k)
        q[np.arange(n), target.numpy()] += 0.9
        return -(q * log).sum(1).mean()

    soft = np.exp((logits + noise).numpy())
    soft /= soft.sum(1, keepdims=True)
    cost = np.take([1, 2, 4], soft.argmax(1)).mean()
    scores = logits if sgs_on == "logits" else torch.from_numpy(soft)
    parts = {
        "ce": smoothed(classes, labels),
        "complexity": (cost / 5.0) ** 2,
        "sgs": smoothed(scores, targets),
    }
    for key, value in parts.items():
        assert float(out[key]) == pytest.approx(value, rel=1e-12), key
    total = 0.7 * parts["ce"] + 0.3 * parts["complexity"] + 2.0 * parts["sgs"]
    assert float(out["loss"]) == pytest.approx(total, rel=1e-12)


def test_value_loss_by_hand():
    gate = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    routes = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    p = [1 / (1 + math.exp(2.0)), 1 / (1 + math.exp(-1.0))]  # probability of class 1
    q = [1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(1.2))]
    bce = [-(a * math.log(b) + (1 - a) * math.log(1 - b)) for a, b in zip(p, q, strict=True)]
    assert float(value_loss(gate, routes, torch.tensor([1]))) == pytest.approx(sum(bce) / 2)
