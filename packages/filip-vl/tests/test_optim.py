"""LAMB against a slow loop; groups, schedules and rates against their formulas."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from filip_vl.optim import (
    Lamb,
    clip_each_gradient,
    is_exempt,
    is_vector,
    make_optimizer,
    parameter_groups,
    peak_lr,
    warmup_cosine,
)
from tenfold.errors import UserError

BETAS = (0.9, 0.999)


def slow_lamb(values, gradients, lr, eps, weight_decay, betas=BETAS):
    """Section 4 for one tensor, number by number; the values after every step."""
    values = [float(value) for value in values]
    mean, square, after = [0.0] * len(values), [0.0] * len(values), []
    for step in gradients:
        update = []
        for n, g in enumerate(map(float, step)):
            mean[n] = betas[0] * mean[n] + (1 - betas[0]) * g
            square[n] = betas[1] * square[n] + (1 - betas[1]) * g * g
            update.append(mean[n] / (math.sqrt(square[n]) + eps) + weight_decay * values[n])
        weight = min(math.sqrt(sum(value * value for value in values)), 10.0)
        length = math.sqrt(sum(u * u for u in update))
        ratio = weight / length if weight > 0 and length > 0 else 1.0
        values = [value - lr * ratio * u for value, u in zip(values, update, strict=True)]
        after.append(list(values))
    return after


def start(size, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(size, generator=generator, dtype=torch.float64)


def steps_of(size, count, scale, seed=1):
    return [start(size, scale, seed + 10 * n) for n in range(count)]


TENSORS = {
    "matrix": (start((3, 4), 1.0), steps_of((3, 4), 5, 1.0)),
    "above ten": (start((5, 5), 30.0), steps_of((5, 5), 5, 0.01)),
    "scalar": (torch.tensor(2.6593, dtype=torch.float64), steps_of((), 5, 3.0)),
    "zeros": (torch.zeros(4, dtype=torch.float64), steps_of((4,), 5, 1.0)),
    "no gradient yet": (start((4,), 1.0), [torch.zeros(4, dtype=torch.float64)] * 5),
    "nothing at all": (
        torch.zeros(2, dtype=torch.float64),
        [torch.zeros(2, dtype=torch.float64)] * 5,
    ),
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize("eps", [1e-4, 1e-6])
def test_lamb_equals_a_slow_loop(weight_decay, eps):
    params = [nn.Parameter(value.clone()) for value, _ in TENSORS.values()]
    optimizer = Lamb(params, lr=0.02, eps=eps, weight_decay=weight_decay)
    expected = [
        slow_lamb(value.flatten().tolist(), [g.flatten().tolist() for g in given], 0.02, eps,
                  weight_decay)
        for value, given in TENSORS.values()
    ]  # fmt: skip
    for step in range(5):
        for p, (_, given) in zip(params, TENSORS.values(), strict=True):
            p.grad = given[step].clone()
        optimizer.step()
        for p, slow in zip(params, expected, strict=True):
            found = p.detach().flatten().numpy()
            assert found == pytest.approx(np.array(slow[step]), rel=1e-12, abs=1e-14)


def test_a_step_has_the_length_of_the_rate():
    """‖Δp‖ = lr · min(‖p‖, 10) whatever the gradient, and lr · ‖u‖ of a tensor of zeros."""
    for scale, length in ((0.1, None), (1.0, None), (50.0, 10.0)):
        p = nn.Parameter(start((6, 6), scale))
        before = p.detach().clone()
        p.grad = start((6, 6), 1e-3, seed=5)
        Lamb([p], lr=0.01).step()
        expected = before.norm() if length is None else length
        assert (p.detach() - before).norm() == pytest.approx(0.01 * float(expected))
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    Lamb([p], lr=0.01).step()
    # m = 0.1 g, v = 0.001 g², so that u = ± 0.1 / √0.001 in the first step
    u = 0.1 / (math.sqrt(0.001) + 1e-4 / np.array([1, 1, 2])) * np.array([1, -1, 1])
    assert p.detach().numpy() == pytest.approx(-0.01 * u)


def test_groups_devices_and_precisions_are_kept_apart():
    single = nn.Parameter(start((3, 3), 1.0).float())
    double = nn.Parameter(start((3, 3), 1.0))
    other = nn.Parameter(start((3, 3), 1.0, seed=3))
    idle = nn.Parameter(torch.ones(2))
    optimizer = Lamb(
        [
            {"params": [single, double, idle], "weight_decay": 0.1},
            {"params": [other], "lr": 0.5, "betas": (0.5, 0.6), "eps": 0.0},
        ],
        lr=0.02,
    )
    gradients = steps_of((3, 3), 3, 1.0)
    for g in gradients:
        single.grad, double.grad, other.grad = g.float(), g.clone(), g.clone()
        optimizer.step()
    flat = [g.flatten().tolist() for g in gradients]
    first = slow_lamb(start((3, 3), 1.0).flatten(), flat, 0.02, 1e-4, 0.1)[-1]
    second = slow_lamb(start((3, 3), 1.0, seed=3).flatten(), flat, 0.5, 0.0, 0.0, (0.5, 0.6))[-1]
    assert double.detach().flatten().numpy() == pytest.approx(np.array(first), rel=1e-12)
    assert single.detach().flatten().numpy() == pytest.approx(np.array(first), rel=1e-5, abs=1e-6)
    assert other.detach().flatten().numpy() == pytest.approx(np.array(second), rel=1e-12)
    assert torch.equal(idle, torch.ones(2))
    assert idle not in optimizer.state


def test_a_saved_state_goes_on_exactly():
    def made():
        net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2))
        return net, Lamb(parameter_groups(net, 0.1), lr=0.03)

    def train(net, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            net(torch.randn(8, 4, generator=generator)).square().mean().backward()
            optimizer.step()

    torch.manual_seed(0)
    net, optimizer = made()
    train(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    again, other = made()
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    train(net, optimizer, range(3, 6))
    train(again, other, range(3, 6))
    assert all(map(torch.equal, net.parameters(), again.parameters()))
    assert set(next(iter(optimizer.state.values()))) == {"exp_avg", "exp_avg_sq"}


def test_a_closure_gives_its_loss():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Lamb([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[0] == 25.0
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 2


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradients must be dense"):
        Lamb(table.parameters()).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        ({"lr": math.nan}, "lr must be 0 or more"),
        ({"betas": (0.9, 1.0)}, "betas must be from 0 to below 1"),
        ({"eps": -1e-4}, "eps must be 0 or more"),
        ({"weight_decay": math.inf}, "weight_decay must be 0 or more"),
    ],
)
def test_numbers_out_of_range(options, message):
    group = {"params": [nn.Parameter(torch.ones(2))]}
    with pytest.raises(ValueError, match=message):
        Lamb([group], **options)
    with pytest.raises(ValueError, match=message):
        Lamb([{**group, **options}])
    for name in ("lamb", "adamw"):
        with pytest.raises(UserError, match=message):
            make_optimizer(name, [{**group, **options}], 1e-3)


# -------------------------------------------------------------------------------- groups


class Towers(nn.Module):
    """The names of CLIP's towers, with a block each."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 8, 4, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.ones(8))
        self.visual.positional_embedding = nn.Parameter(torch.ones(5, 8))
        self.visual.ln_pre = nn.LayerNorm(8)
        self.visual.proj = nn.Parameter(torch.ones(8, 4))
        self.attn = nn.MultiheadAttention(8, 2)
        self.mlp = nn.Linear(8, 32)
        self.token_embedding = nn.Embedding(10, 8)
        self.positional_embedding = nn.Parameter(torch.ones(7, 8))
        self.text_projection = nn.Parameter(torch.ones(8, 4))
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))


DECAYED = {
    "visual.conv1.weight",
    "visual.proj",
    "attn.in_proj_weight",
    "attn.out_proj.weight",
    "mlp.weight",
    "text_projection",
}
EMBEDDINGS = {"visual.positional_embedding", "token_embedding.weight", "positional_embedding"}


@pytest.mark.parametrize(
    ("exempt", "decayed"),
    [(is_exempt, DECAYED), (is_vector, DECAYED | EMBEDDINGS)],
)
def test_weight_decay_spares_what_the_paper_spares(exempt, decayed):
    towers = Towers()
    groups = parameter_groups(towers, 0.03, exempt=exempt)
    assert [group["weight_decay"] for group in groups] == [0.03, 0.0]
    names = {id(p): name for name, p in towers.named_parameters()}
    found = [{names[id(p)] for p in group["params"]} for group in groups]
    assert found[0] == decayed
    assert found[0] | found[1] == set(names.values())
    assert not found[0] & found[1]


def test_frozen_weights_are_in_no_group():
    towers = Towers()
    towers.visual.requires_grad_(False)
    groups = parameter_groups(towers, 0.03)
    members = {id(p) for group in groups for p in group["params"]}
    assert not members & {id(p) for p in towers.visual.parameters()}
    towers.requires_grad_(False)
    towers.logit_scale.requires_grad_(True)
    assert [group["params"] for group in parameter_groups(towers, 0.03)] == [[towers.logit_scale]]
    with pytest.raises(UserError, match="all weights are frozen"):
        parameter_groups(towers.requires_grad_(False), 0.03)
    with pytest.raises(UserError, match="weight_decay must be 0 or more, got -1"):
        parameter_groups(Towers(), -1.0)


def test_optimisers_by_name():
    towers = Towers()
    lamb, adamw = (
        make_optimizer(name, parameter_groups(towers, 0.5), 1e-3) for name in ("lamb", "adamw")
    )
    assert isinstance(lamb, Lamb)
    assert isinstance(adamw, torch.optim.AdamW)
    for optimizer, betas, eps in ((lamb, (0.9, 0.999), 1e-4), (adamw, (0.9, 0.98), 1e-8)):
        for group, decay in zip(optimizer.param_groups, (0.5, 0.0), strict=True):
            found = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
            assert found == (1e-3, betas, eps, decay)
    groups = parameter_groups(towers, 0.5)
    own = make_optimizer("lamb", groups, 1e-3, betas=(0.5, 0.6), eps=0.0)
    assert (own.param_groups[0]["betas"], own.param_groups[0]["eps"]) == ((0.5, 0.6), 0.0)
    with pytest.raises(UserError, match="optimizer must be one of lamb, adamw, got 'sgd'"):
        make_optimizer("sgd", groups, 1e-3)


# --------------------------------------------------------------------------------- rates


@pytest.mark.parametrize(
    ("base", "batch", "peak"),
    [(6e-3, 8192, 2.4e-2), (2e-3, 40960, 1.79e-2), (8e-4, 30720, 6.2e-3), (2e-4, 5120, 6.3e-4)],
)
def test_peaks_are_those_of_the_paper(base, batch, peak):
    assert peak_lr(base, batch) == pytest.approx(peak, rel=5e-3)
    assert peak_lr(base, 512) == pytest.approx(base)


@pytest.mark.parametrize(("base", "batch"), [(0.0, 512), (math.nan, 512), (1e-3, 0)])
def test_wrong_peaks(base, batch):
    with pytest.raises(UserError, match="base_lr and batch must be above 0"):
        peak_lr(base, batch)


def rates(steps, **options):
    optimizer = Lamb([nn.Parameter(torch.ones(1))], lr=2.0)
    schedule, found = warmup_cosine(optimizer, steps=steps, **options), []
    for _ in range(steps + 2):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_rates_grow_and_follow_a_cosine():
    found = rates(14, warmup=4)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    cosine = [1 + math.cos(math.pi * n / 10) for n in range(11)]
    assert found[4:15] == pytest.approx(cosine)
    assert found[14:] == pytest.approx([0.0, 0.0])
    assert rates(10, warmup=0)[:11] == pytest.approx(cosine)


def test_rates_need_not_begin_or_end_with_zero():
    found = rates(12, warmup=2, start=0.2, end=0.1)
    assert found[:2] == pytest.approx([1.2, 2.0])
    assert found[7] == pytest.approx(0.2 + 1.8 / 2)
    assert found[12] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 600, "warmup": 3000}, "a warm-up of 3000 steps does not fit a run of 600"),
        ({"steps": 5, "warmup": -1}, "a warm-up of -1 steps"),
        ({"steps": 5, "warmup": 1, "start": 2.0}, "start and end are shares"),
        ({"steps": 5, "warmup": 1, "end": -0.1}, "start and end are shares"),
    ],
)
def test_wrong_schedules(options, message):
    with pytest.raises(UserError, match=message):
        warmup_cosine(Lamb([nn.Parameter(torch.ones(1))]), **options)


# ------------------------------------------------------------------------------ clipping


def test_every_gradient_is_clipped_by_itself():
    lengths = [0.0, 0.3, 1.0, 7.0]
    params = [nn.Parameter(torch.ones(3, 3)) for _ in lengths]
    for p, length in zip(params, lengths, strict=True):
        p.grad = torch.full((3, 3), length / 3)
    params.append(nn.Parameter(torch.ones(1)))  # has none
    clip_each_gradient(params, 1.0)
    for p, length in zip(params, lengths, strict=False):
        torch.testing.assert_close(p.grad, torch.full((3, 3), min(length, 1.0) / 3))
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        clip_each_gradient(params, 0.0)
