"""Lightning modules: schedules, what is trained and what is not, warnings, evaluation."""

import copy
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

from ds_net_plus.data import Batch, ImageData
from ds_net_plus.evaluate import collect
from ds_net_plus.model import DSConvNet, with_space
from ds_net_plus.module import GateModule, SupernetModule
from ds_net_plus.module.base import parse_route
from ds_net_plus.module.schedule import learning_rate_factor
from ds_net_plus.module.supernet import external_teacher, start_from
from ds_net_plus.train import (
    CachedRoutes,
    train_gate,
    train_supernet,
)
from tenfold.errors import UserError
from tenfold.runs import make_trainer

TINY = {"stage_widths": [[4, 8], [4, 8]], "depths": [1, 1], "gate_outputs": 2, "image_size": 16}


@pytest.fixture(scope="module")
def data() -> ImageData:
    made = ImageData(image_size=16, train_size=96, val_size=32, test_size=40, batch_size=32)
    made.setup()
    return made


def supernet(**options: object) -> SupernetModule:
    torch.manual_seed(0)
    return SupernetModule(net=TINY, lr=0.1, warmup=0, cooldown=0, schedule="step", **options)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> SupernetModule:
    folder = tmp_path_factory.mktemp("stage1")
    return train_supernet(supernet(), data, folder, epochs=2, recalibration=2, progress=False)


def test_learning_rate_by_hand():
    args = {"total": 20, "warmup": 5, "cooldown": 4, "start": 0.1, "floor": 0.01}
    assert learning_rate_factor(0, **args) == pytest.approx(0.1)
    assert learning_rate_factor(2.5, **args) == pytest.approx(0.55)
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 8 / 16))
    assert learning_rate_factor(8, **args) == pytest.approx(cosine)
    assert learning_rate_factor(16, **args) == learning_rate_factor(19, **args) == 0.01


def test_stage1_trains_the_supernet_and_leaves_the_gate(trained):
    fresh = supernet()
    gate = {id(p) for p in trained.net.gate_parameters()}
    moved = {
        name: not torch.equal(p, q)
        for (name, p), q in zip(trained.net.named_parameters(), fresh.net.parameters(), strict=True)
        if id(p) not in gate
    }
    assert all(moved.values()), moved
    for p, q in zip(trained.net.gate_parameters(), fresh.net.gate_parameters(), strict=True):
        assert torch.equal(p, q)
    teacher, student = trained.teacher.state_dict(), trained.net.state_dict()
    assert any(not torch.equal(teacher[k], student[k]) for k in student)
    assert not any(p.requires_grad for p in trained.teacher.parameters())


def test_official_schedule_moves_once_an_epoch(data, tmp_path):
    torch.manual_seed(0)
    module = SupernetModule(
        net=TINY, lr=0.5, warmup=1, cooldown=0, warmup_lr=0.05, min_lr=0.0, schedule="epoch"
    )
    rates = []
    module.on_train_batch_end = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])
    make_trainer(tmp_path, epochs=2, progress=False).fit(module, datamodule=data)
    assert rates == pytest.approx([0.05] * 3 + [0.25] * 3)


def test_a_run_without_room_for_its_schedule_is_refused(data, tmp_path):
    module = SupernetModule(net=TINY, warmup=1, cooldown=2)
    with pytest.raises(UserError, match="3 epochs have no room for 1 of warm-up and 2 of cooldown"):
        make_trainer(tmp_path, epochs=3, progress=False).fit(module, datamodule=data)


def test_data_of_another_kind_are_refused(data, tmp_path):
    trainer = make_trainer(tmp_path, epochs=1, progress=False)
    for net, message in (
        ({"num_classes": 7}, "10 classes, the network 7"),
        ({"in_channels": 3}, "1 channels, the network takes 3"),
    ):
        module = SupernetModule(net=TINY | net, warmup=0, cooldown=0)
        with pytest.raises(UserError, match=message):
            trainer.fit(module, datamodule=data)


def test_logits_that_are_not_finite_are_named(trained, data, tmp_path):
    module = copy.deepcopy(trained)
    module.route = 1
    module.teacher.classifier.bias.data.fill_(float("nan"))
    trainer = make_trainer(tmp_path, epochs=1, progress=False)
    with pytest.raises(UserError, match=r"class logits are not finite \(image 0\)"):
        trainer.test(module, datamodule=data, verbose=False)


def test_routes_that_differ_between_ranks_are_found(data):
    module = supernet(check_ranks=True)
    module.all_gather = lambda routes: torch.stack([routes, routes])
    module._check_ranks((1, 2))
    module.all_gather = lambda routes: torch.stack([routes, routes + 1])
    with pytest.raises(RuntimeError, match="different routes"):
        module._check_ranks((1, 2))


def test_noise_at_evaluation_is_gumbel_noise(trained, data):
    """With it the shares of a gate are those of its softmax (the Gumbel-max trick)."""
    gate = GateModule(net=TINY, gate_loss="sgs", eval_gumbel=True).eval()
    gate.net.load_state_dict(trained.net.state_dict())
    torch.nn.init.normal_(gate.net.gate_parameters()[-1])
    x = next(iter(data.test_loader())).image[:1].expand(4000, -1, -1, -1)
    share = gate.net.gate_logits(gate.net.front(x[:1]).gate_input).softmax(1)[0, 1]
    torch.manual_seed(0)
    chosen = (gate(x).routes[:, 0] == gate.net.routing_space[1]).double().mean()
    assert abs(chosen - share) < 4 * float(share * (1 - share) / 4000) ** 0.5
    assert 0.02 < share < 0.98


def test_the_gate_of_a_checkpoint_is_trained_by_fit(trained, data, tmp_path):
    """The same Stage II as train_gate on images, from nothing but the file."""
    from ds_net_plus.checkpoint import STUDENT, TEACHER, Saved, load_net, write_checkpoint

    supernet = tmp_path / "supernet.ckpt"
    write_checkpoint(supernet, Saved({}, {STUDENT: trained.net, TEACHER: trained.teacher}))
    options = {"gate_loss": "sgs", "optimizer": "sgd", "lr": 0.05, "weight_decay": 0.01}
    module = GateModule(init_from=str(supernet), seed=3, **options)
    make_trainer(tmp_path / "a", epochs=2, seed=3, progress=False).fit(module, datamodule=data)
    other = train_gate(
        trained.evaluated(), data, tmp_path / "b", steps=6, seed=3, progress=False, **options
    )
    for key, value in module.net.state_dict().items():
        assert torch.equal(value, other.net.state_dict()[key]), key
    supernet.unlink()
    again = GateModule.load_from_checkpoint(tmp_path / "a" / "last.ckpt")
    assert again.hparams["init_from"] is None
    assert load_net(tmp_path / "a" / "last.ckpt").gate_trained


def test_no_decay_on_biases_and_norms():
    module = supernet()
    module.steps = lambda: 10
    module.trainer = type("T", (), {"max_epochs": 1})()
    [optimizer], _ = module.configure_optimizers()
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 1e-4
    assert free["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim <= 1 for p in free["params"])


def test_a_teacher_that_cannot_follow_is_told(data, tmp_path, caplog):
    slow = supernet(ema=0.9999, ema_warmup=False)
    make_trainer(tmp_path, epochs=1, progress=False).fit(slow, datamodule=data)
    assert "teacher still more than half initial weights" in caplog.text
    caplog.clear()
    make_trainer(tmp_path / "b", epochs=1, progress=False).fit(supernet(), datamodule=data)
    assert "teacher still" not in caplog.text


def test_a_folder_with_another_run_is_refused(trained, data, tmp_path):
    table = CachedRoutes(collect(trained.evaluated(), data.gate_loader()), 32, 0)
    for seed in (0, 0):
        train_gate(trained.evaluated(), table, tmp_path, steps=3, seed=seed, progress=False)
    with pytest.raises(UserError, match=r"other settings \(sgs try_best -> ladder, seed 0 -> 1\)"):
        train_gate(
            trained.evaluated(), table, tmp_path, steps=3, seed=1, sgs="ladder", progress=False
        )
    train_gate(trained.evaluated(), table, tmp_path, steps=9, progress=False)
    with pytest.raises(UserError, match="epochs 3 -> 2"):
        train_gate(trained.evaluated(), table, tmp_path, steps=6, progress=False)


@pytest.mark.parametrize("cached", [True, False])
def test_stage2_trains_the_gate_alone(trained, data, tmp_path, cached):
    net = trained.evaluated()
    table = collect(net, data.gate_loader())
    source = CachedRoutes(table, 32, 0) if cached else data
    gate = train_gate(net, source, tmp_path, steps=6, progress=False, gate_loss="sgs").net
    heads = {name for name, p in gate.named_parameters() if p.requires_grad}
    for name, parameter in gate.named_parameters():
        same = torch.equal(parameter, dict(net.named_parameters())[name])
        assert same != (name in heads), name
    for name, buffer in gate.named_buffers():
        assert torch.equal(buffer, dict(net.named_buffers())[name]), name
    assert gate.gate_trained


def test_a_collapsed_gate_is_told(trained, data, tmp_path, caplog):
    table = collect(trained.evaluated(), data.gate_loader())
    source = CachedRoutes(table, 32, 0)
    options = {"gate_loss": "sgs", "sgs": "none", "lambda_ce": 0.0, "lambda_cplx": 100.0}
    with caplog.at_level(logging.WARNING):
        train_gate(trained.evaluated(), source, tmp_path, steps=60, progress=False, **options)
    assert "gate collapse" in caplog.text


def test_a_new_routing_space_keeps_the_supernet():
    torch.manual_seed(0)
    net = DSConvNet()
    other = with_space(net, (0, 3))
    x = torch.randn(2, 1, 32, 32)
    assert other.gate_outputs == 2
    assert torch.equal(other(x, route=3), net.eval()(x, route=3))


def test_starting_from_other_weights_leaves_a_classifier_of_other_size(tmp_path):
    from ds_net_plus.checkpoint import save_net

    source = DSConvNet(num_classes=7)
    save_net(tmp_path / "a", source)
    target = DSConvNet(num_classes=10)
    before = target.classifier.weight.clone()
    start_from(target, str(tmp_path / "a"))
    assert torch.equal(target.stem[0].conv.weight, source.stem[0].conv.weight)
    assert torch.equal(target.classifier.weight, before)
    with pytest.raises(UserError, match="another network"):
        start_from(DSConvNet(front_widths=(4, 8)), str(tmp_path / "a"))


def test_routes_of_the_command_line():
    net = DSConvNet()
    assert parse_route(net, "dynamic") is None
    assert parse_route(net, "2") == 2
    assert parse_route(net, "largest") == "largest"
    for wrong in ("9", "-1", "wide"):
        with pytest.raises(UserError, match="does not exist"):
            parse_route(net, wrong)


def test_options_that_do_not_exist_are_named():
    for options, message in (
        ({"schedule": "day"}, "schedule"),
        ({"weights": "best"}, "weights"),
        ({"arch": "resnet"}, "no model"),
    ):
        with pytest.raises(UserError, match=message):
            SupernetModule(**options)
    with pytest.raises(UserError, match="optimizer"):
        GateModule(optimizer="lion")


def two_view_batch(count: int = 8) -> Batch:
    torch.manual_seed(0)
    image = torch.randn(count, 1, 32, 32)
    label, index = torch.arange(count) % 10, torch.arange(count)
    return Batch(image, label, index, None, image + 100)


def test_both_views_are_mixed_with_the_same_partners_and_shares():
    module = SupernetModule(mvco="cross", mixup=0.8, cutmix=1.0)
    for seed in range(6):  # mixup in some, CutMix in others
        np.random.seed(seed)  # noqa: NPY002 (timm draws from it)
        image, label, other = module._views(two_view_batch())
        torch.testing.assert_close(other - image, torch.full_like(image, 100.0), atol=1e-4, rtol=0)
        assert label.shape == (8, 10)
        torch.testing.assert_close(label.sum(1), torch.ones(8))
        np.random.seed(seed)  # noqa: NPY002
        again = module._views(two_view_batch())
        assert all(torch.equal(a, b) for a, b in zip(again, (image, label, other), strict=True))
    batch = two_view_batch()
    module._views(batch)
    assert torch.equal(batch.image, two_view_batch().image)  # mixed in a copy


def test_what_mixing_and_views_need():
    with pytest.raises(UserError, match=r"--data\.views 2"):
        SupernetModule(mvco="cross")._views(two_view_batch()._replace(other=None))
    with pytest.raises(UserError, match=r"even --data\.batch_size"):
        SupernetModule(mixup=0.2)._views(two_view_batch(7))
    with pytest.raises(UserError, match="0 or more"):
        SupernetModule(mixup=-1.0)
    with pytest.raises(UserError, match="mvco must be one of off, cross"):
        SupernetModule(mvco="on")
    plain = SupernetModule()._views(two_view_batch())
    assert plain[2] is None  # a second view that nobody asked for


def test_the_external_teacher_is_frozen_and_no_part_of_the_checkpoint(tmp_path):
    file = tmp_path / "weights.pth"
    theirs = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    torch.save(theirs.state_dict(), file)
    module = SupernetModule(net={"num_classes": 10})
    teacher = external_teacher(f"timm:resnet10t:{file}", module.net)
    x = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(teacher(x), theirs.eval()(x))
    assert not any(p.requires_grad for p in teacher.parameters())
    module._external.append(teacher)
    assert not any("external" in key for key in module.state_dict())
    for name, match in (
        ("resnet50", "timm:NAME"),
        ("timm:", "timm:NAME"),
        ("timm:no", "cannot be"),
    ):
        with pytest.raises(UserError, match=match):
            external_teacher(name, module.net)


def test_adamw_spares_norms_biases_and_positions():
    module = SupernetModule(
        arch="ds_vit_glyph", optimizer="adamw", weight_decay=0.05, warmup=0, cooldown=0
    )
    module._trainer = SimpleNamespace(estimated_stepping_batches=10, max_epochs=1)
    (optimizer,), _ = SupernetModule.configure_optimizers(module)
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {n for n, p in module.net.named_parameters() if id(p) in decayed}
    assert "embedding.proj.weight" in names
    assert "embedding.positions" not in names
    assert all(p.ndim > 1 for n, p in module.net.named_parameters() if n in names)
    assert optimizer.param_groups[1]["weight_decay"] == 0
