"""Learning rates against torch's schedulers and closed forms; which parameter is in which group."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR

from ickd.module import Distiller
from ickd.module.optimisation import make_optimizer, make_schedule, parameter_groups
from tenfold.errors import UserError


def optimizer(lr: float = 0.05, name: str = "sgd", momentum: float = 0.9) -> torch.optim.Optimizer:
    groups = [
        {"params": [nn.Parameter(torch.zeros(2))], "lr": rate, "weight_decay": 0.0}
        for rate in (lr, 10 * lr)
    ]
    return make_optimizer(groups, name, lr, momentum, nesterov=False)


def rates(name: str, steps: int, per_epoch: int = 1, lr: float = 0.05, **options) -> list[float]:
    """The rate of every step of the first group; the second has ten times as much."""
    chosen = optimizer(lr)
    schedule = make_schedule(chosen, name, steps=steps, per_epoch=per_epoch, **options)
    found = []
    for _ in range(steps):
        first, second = (group["lr"] for group in chosen.param_groups)
        assert second == pytest.approx(10 * first, rel=1e-12)
        found.append(first)
        chosen.step()
        schedule.step()
    return found


# ---- schedules


def test_the_cifar_rates_are_torchs_epoch_by_epoch():
    """Milestones counted from 0 in torch, the first epoch being 1 in the paper's program."""
    milestones, per_epoch = [150, 180, 210], 3
    theirs = optimizer()
    torch_schedule = MultiStepLR(theirs, milestones, gamma=0.1)
    wanted = []
    for epoch in range(240):
        rate = theirs.param_groups[0]["lr"]
        by_hand = 0.05 * 0.1 ** sum(epoch + 1 > milestone for milestone in milestones)
        assert rate == pytest.approx(by_hand, rel=1e-12)
        wanted += [rate] * per_epoch
        theirs.step()
        torch_schedule.step()
    found = rates("multistep", 240 * per_epoch, per_epoch, milestones=milestones)
    assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("share", [0.15, 0.3])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_one_cycle_is_torchs_with_its_momenta(kind, share):
    steps = 40
    mine, theirs = optimizer(0.1, kind), optimizer(0.1, kind)
    warmup = 0.0 if share == 0.3 else share  # 0.3 is torch's own
    schedules = [
        make_schedule(mine, "onecycle", steps=steps, per_epoch=4, warmup=warmup),
        OneCycleLR(theirs, [0.1, 1.0], total_steps=steps, pct_start=share),
    ]
    for _ in range(steps):
        for ours, them in zip(mine.param_groups, theirs.param_groups, strict=True):
            keys = ("lr", "momentum") if kind == "sgd" else ("lr", "betas")
            assert [ours[key] for key in keys] == [them[key] for key in keys]
        mine.step()
        theirs.step()
        for schedule in schedules:
            schedule.step()


def test_one_cycle_waits_for_the_preparation():
    """Five epochs of two steps at a constant rate, then torch's cycle over the others."""
    found = rates("onecycle", 50, 2, lr=0.1, init_epochs=5, init_factor=0.4, warmup=0.2)
    alone = rates("onecycle", 40, 2, lr=0.1, warmup=0.2)
    assert found[:10] == pytest.approx([0.04] * 10)
    assert found[10:] == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("constant", lambda done: 1.0),
        ("poly", lambda done: (1 - done) ** 0.9),
        ("cosine", lambda done: 0.5 * (1 + math.cos(math.pi * done))),
    ],
)
def test_closed_forms(name, form):
    """Poly as in the Pascal VOC recipe: (1 - iteration / iterations)^0.9."""
    found = rates(name, 30, 3, lr=0.007)
    assert found == pytest.approx([0.007 * form(step / 30) for step in range(30)], rel=1e-12)


@pytest.mark.parametrize("name", ["constant", "poly", "cosine", "multistep"])
@pytest.mark.parametrize("share", [0.2, 0.15])
def test_warm_up_grows_to_the_full_rate_and_not_beyond(name, share):
    steps = 50  # so that 0.15 ends inside a step
    found = rates(name, steps, 5, lr=1.0, warmup=share, milestones=[100])
    growing = share * steps
    for step, rate in enumerate(found):
        if step < growing:
            assert rate == pytest.approx(min(1.0, (step + 1) / growing), rel=1e-12)
    assert max(found) <= 1.0
    behind = math.ceil(growing)
    assert found[behind] == pytest.approx(1.0, abs=0.02)  # no jump where the warm-up ends
    assert found[behind:] == sorted(found[behind:], reverse=True)


@pytest.mark.parametrize("name", ["constant", "poly", "cosine", "multistep"])
def test_the_task_after_a_preparation_has_the_rates_of_a_run_of_its_own(name):
    options = {"lr": 0.05, "milestones": [2, 3], "warmup": 0.1}
    found = rates(name, 70, 7, init_epochs=4, init_factor=0.2, **options)
    assert found[:28] == pytest.approx([0.01] * 28)
    assert found[28:] == pytest.approx(rates(name, 42, 7, **options), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "step"}, "schedule must be one of constant, multistep, cosine, poly, onecycle"),
        ({"name": "poly", "warmup": 1.0}, "warmup must be a share"),
        ({"name": "poly", "warmup": -0.1}, "warmup must be a share"),
    ],
)
def test_wrong_schedules(options, message):
    with pytest.raises(UserError, match=message):
        make_schedule(optimizer(), steps=10, per_epoch=1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adam"}, "optimizer must be one of sgd, adamw"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": math.nan}, "lr must be above 0"),
        ({"momentum": 1.0}, "momentum must be from 0 to below 1"),
    ],
)
def test_wrong_optimisers(options, message):
    with pytest.raises(UserError, match=message):
        optimizer(**options)


def test_wrong_decay_and_nothing_to_train():
    groups = parameter_groups([(nn.Linear(2, 2), 1.0)], 0.1, -1.0, decay_all=True)
    with pytest.raises(UserError, match="weight_decay must be 0 or more"):
        make_optimizer(groups, "sgd", 0.1, 0.9, nesterov=False)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    groups = parameter_groups([(frozen, 1.0)], 0.1, 0.0, decay_all=True)
    with pytest.raises(UserError, match="all weights of the student are frozen"):
        make_optimizer(groups, "sgd", 0.1, 0.9, nesterov=False)


# ---- groups


def distiller(**options: object) -> Distiller:
    given = {"losses": "ickd", "num_classes": 3, **options}
    return Distiller("embedded:gratings-student", "embedded:gratings-teacher", **given)


def plan(module: Distiller, **trainer: object) -> dict[str, object]:
    """What `configure_optimizers` makes, inside a trainer of two epochs of five steps."""
    facts = {
        "world_size": 1,
        "max_epochs": 2,
        "estimated_stepping_batches": 10,
        "num_training_batches": 5,
        "accumulate_grad_batches": 1,
    }
    module._trainer = SimpleNamespace(**{**facts, **trainer})
    return module.configure_optimizers()


def groups_of(module: Distiller, **trainer: object) -> list[dict[str, object]]:
    return plan(module, **trainer)["optimizer"].param_groups


def named(module: nn.Module, groups: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    """Group of every parameter by name."""
    of = {id(p): group for group in groups for p in group["params"]}
    return {name: of[id(p)] for name, p in module.named_parameters() if id(p) in of}


@pytest.mark.parametrize(
    "options",
    [
        {"losses": "ickd+kd"},
        {"losses": "ft+at", "init_epochs": 1},
        {"losses": {"crd": {"n_data": 40}}, "paper_decay": True},
        {"losses": "vid", "fast_head": True, "optimizer": "adamw"},
    ],
    ids=lambda options: str(options["losses"]),
)
def test_every_parameter_is_in_one_group_and_none_of_the_teacher(options):
    module = distiller(**options)
    groups = groups_of(module)
    members = [id(p) for group in groups for p in group["params"]]
    assert len(members) == len(set(members))
    wanted = {id(p) for p in [*module.student.parameters(), *module.objective.parameters()]}
    assert set(members) == wanted
    assert not wanted & {id(p) for p in module.teacher.parameters()}
    assert {id(p) for p in module.parameters() if p.requires_grad} == wanted


def test_norms_and_biases_do_not_decay_unless_the_paper_wants_it():
    module = distiller(weight_decay=0.05)
    for name, group in named(module, groups_of(module)).items():
        kernel = dict(module.named_parameters())[name].ndim > 1
        assert group["weight_decay"] == (0.05 if kernel else 0.0), name
    decays = {name: g["weight_decay"] for name, g in named(module, groups_of(module)).items()}
    assert decays["student.net.fc.weight"] == decays["objective.losses.ickd.embed_s.conv2d.weight"]
    assert decays["student.net.fc.bias"] == decays["objective.losses.ickd.embed_s.l2norm.bias"] == 0
    paper = distiller(weight_decay=0.05, paper_decay=True)
    assert [group["weight_decay"] for group in groups_of(paper)] == [0.05]


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_adaptors_have_the_students_rate_unless_told_otherwise(factor):
    module = distiller(lr=0.2, adaptor_factor=factor, schedule="constant")
    for name, group in named(module, groups_of(module)).items():
        assert group["lr"] == pytest.approx(0.2 * (factor if "objective" in name else 1)), name


@pytest.mark.parametrize("student", ["deeplab:resnet18", "deeplab:mobilenet_v2"])
def test_heads_of_deeplab_learn_ten_times_as_fast(student):
    with torch.device("meta"):
        module = Distiller(student, fast_head=True, lr=0.007, schedule="constant", num_classes=21)
    groups = groups_of(module)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted({id(p) for p in module.student.parameters()})
    for name, group in named(module, groups).items():
        slow = name.startswith("student.net.backbone.")
        assert group["lr"] == pytest.approx(0.007 if slow else 0.07), name
    fast = {name.split(".")[2] for name, g in named(module, groups).items() if g["lr"] > 0.01}
    assert fast == {"aspp", "decoder"}


def test_the_head_and_what_else_is_beside_a_backbone_are_all_trained():
    """Of a network of one's own with weights of its own, in no part."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.scale * self.head(self.backbone(x).mean((2, 3)))

    module = Distiller(Own(), fast_head=True, lr=0.1, schedule="constant")
    rate = {name: g["lr"] for name, g in named(module, groups_of(module)).items()}
    assert len(rate) == 5
    assert rate["student.net.backbone.weight"] == pytest.approx(0.1)
    assert rate["student.net.head.weight"] == rate["student.net.scale"] == pytest.approx(1.0)


def test_frozen_weights_of_a_student_are_left_out():
    module = distiller()
    module.student.net.stages[0].requires_grad_(False)
    assert not any("stages.0" in name for name in named(module, groups_of(module)))


# ---- what a run makes of it


@pytest.mark.parametrize(("scale", "wanted"), [(False, 0.05), (True, 0.2)])
def test_rates_grow_with_the_processes_if_wished(scale, wanted):
    module = distiller(scale_lr=scale, schedule="constant")
    assert groups_of(module, world_size=4)[0]["lr"] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("trainer", "falls"),
    [
        ({"estimated_stepping_batches": 10}, 5),
        ({"estimated_stepping_batches": 10, "max_epochs": -1}, 5),  # --trainer.max_steps alone
        (
            {
                "estimated_stepping_batches": 6,
                "num_training_batches": 5,
                "accumulate_grad_batches": 2,
            },
            3,
        ),
        ({"estimated_stepping_batches": 10, "num_training_batches": math.inf}, 10),
    ],
)
def test_an_epoch_is_as_long_as_its_batches(trainer, falls):
    module = distiller(schedule="multistep", milestones=[1], lr=1.0)
    made = plan(module, **trainer)
    schedule, found = made["lr_scheduler"]["scheduler"], []
    for _ in range(12):
        found.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        schedule.step()
    assert found == pytest.approx([1.0] * falls + [0.1] * (12 - falls))


def test_a_run_without_end_has_no_schedule():
    with pytest.raises(UserError, match=r"has no end.*--trainer.max_epochs"):
        plan(distiller(), estimated_stepping_batches=math.inf)


def test_a_run_of_preparation_alone_is_told(caplog):
    module = distiller(losses="ab", init_epochs=2)
    plan(module, max_epochs=2)
    assert "all 2 epochs prepare the task, which is never trained" in caplog.text
    caplog.clear()
    plan(module, max_epochs=3)
    assert not caplog.records


def test_the_preparation_has_the_tasks_rate_if_left_out():
    ab = {"losses": "ab", "init_epochs": 1, "lr": 0.02}
    assert groups_of(distiller(**ab))[0]["lr"] == pytest.approx(0.02)
    assert groups_of(distiller(**ab, init_lr=0.01))[0]["lr"] == pytest.approx(0.01)


def test_nesterov_and_decay_arrive():
    module = distiller(nesterov=True, momentum=0.8, weight_decay=1e-3, schedule="constant")
    group = groups_of(module)[0]
    assert (group["nesterov"], group["momentum"], group["weight_decay"]) == (True, 0.8, 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lr": 0.0}, "init_lr must be above 0"),
        ({"adaptor_factor": -1.0}, "adaptor_factor must be above 0"),
        ({"ce_weight": 0.0, "losses": None}, "there is nothing to learn from"),
        ({"ce_weight": 0.0, "losses": "ab", "init_epochs": 2}, "there is nothing to learn from"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(UserError, match=message):
        distiller(**options)
