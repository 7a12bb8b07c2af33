"""Both training steps against formulations written the long way."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ds_net_plus.model import DSConvNet
from ds_net_plus.steps import drop_zero_gradients, sample_routes, stage1_step, stage2_step
from tenfold.errors import UserError


@pytest.fixture
def batch():
    torch.manual_seed(3)
    return torch.randn(6, 1, 32, 32), torch.randint(0, 10, (6,))


@pytest.fixture
def student(randomize):
    torch.manual_seed(4)
    return randomize(DSConvNet()).train()


@pytest.fixture
def teacher(randomize):
    torch.manual_seed(5)
    return randomize(DSConvNet(), seed=9).eval()


def gradients(net):
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def reference_targets(student, teacher, x, y, distill, ensemble, progress):
    """Targets of L, R1, R2, S for routes (1, 3), from the text of the paper."""
    hard = F.one_hot(y, 10).float() * 0.9 + 0.01
    with torch.no_grad():
        soft = teacher(x, route="largest").softmax(1)
        own = copy.deepcopy(student)(x, route="largest").softmax(1)
        mean = sum(teacher(x, route=r).softmax(1) for r in ("largest", 1, 3)) / 3
    other = {
        "none": hard,
        "ib": soft,
        "inplace": own,
        "ramp": (1 - progress) * hard + progress * soft,
        "switch": soft if progress >= 0.5 else hard,
    }[distill]
    return [hard, other, other, mean if ensemble else other]


@pytest.mark.parametrize(
    ("distill", "ensemble", "progress"),
    [
        ("ib", False, 0.0),
        ("ib", True, 0.0),
        ("inplace", False, 0.0),
        ("none", False, 0.0),
        ("ramp", False, 0.25),
        ("switch", False, 0.4),
        ("switch", False, 0.6),
    ],
)
def test_stage1_equals_the_long_way(student, teacher, batch, distill, ensemble, progress):
    x, y = batch
    other = copy.deepcopy(student)
    targets = reference_targets(student, teacher, x, y, distill, ensemble, progress)
    output = stage1_step(
        student, teacher, x, y, (1, 3), distill=distill, ensemble=ensemble, progress=progress
    )
    assert list(output.routes.values()) == ["largest", 1, 3, 0]
    total = torch.zeros(())
    for name, route, target in zip(output.routes, ("largest", 1, 3, 0), targets, strict=True):
        logits = other(x, route=route)
        loss = -(target * logits.log_softmax(1)).sum(1).mean()
        assert torch.allclose(output.logits[name], logits, atol=1e-6), name
        assert torch.allclose(output.losses[name], loss, rtol=1e-5), name
        total = total + loss
    total.backward()
    assert torch.allclose(output.loss, total, rtol=1e-5)
    expected = gradients(other)
    for key, value in gradients(student).items():
        assert torch.allclose(value, expected[key], rtol=1e-4, atol=1e-6), key
    # statistics moved in the order L, R1, R2, S
    after = other.state_dict()
    for key, value in student.state_dict().items():
        assert torch.allclose(value, after[key], atol=1e-6), key


def test_dropout_belongs_to_the_largest_mode_alone(batch):
    x, _ = batch
    net = DSConvNet(dropout=0.5).train()
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    assert torch.equal(net(x, route=3), net(x, route=3))
    assert not torch.equal(net(x, route="largest"), net(x, route="largest"))


def test_unknown_distillation_is_named(student, teacher, batch):
    with pytest.raises(UserError, match="switch"):
        stage1_step(student, teacher, *batch, (1, 2), distill="magic")


def test_sampled_routes_are_reproducible_uniform_and_never_the_smallest():
    draws = torch.tensor([sample_routes(step, 5) for step in range(4000)])
    assert sample_routes(7, 5) == sample_routes(7, 5)
    counts = draws.flatten().bincount(minlength=5)
    assert counts[0] == 0
    assert (counts[1:] / 8000 - 0.25).abs().max() < 0.02
    same = (draws[:, 0] == draws[:, 1]).double().mean()
    assert abs(same - 0.25) < 0.03  # independent draws


def test_paths_are_sampled_gate_by_gate():
    draws = torch.tensor([sample_routes(step, 4, gates=3) for step in range(4000)])
    assert draws.shape == (4000, 2, 3)
    for gate in range(3):
        counts = draws[:, :, gate].flatten().bincount(minlength=4)
        assert (counts / 8000 - 0.25).abs().max() < 0.02
    assert abs(float((draws[..., 0] == draws[..., 1]).double().mean()) - 0.25) < 0.03


def test_mixed_labels_another_view_and_an_external_teacher(student, teacher, batch):
    x, y = batch
    soft = torch.rand(len(y), student.num_classes).softmax(1)
    view = x.flip(-1)
    external = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(student.num_classes))
    seen = []
    hook = student.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    with torch.no_grad():
        expected_teacher = external(x).softmax(1)
    out = stage1_step(student, teacher, x, soft, (1, 2), other_view=view, external=external)
    hook.remove()
    assert [s is x for s in seen] == [True, False, False, False]
    assert all(s is view for s in seen[1:])
    smooth = 0.9 * soft + 0.1 / student.num_classes
    torch.testing.assert_close(out.targets["L"], (smooth + expected_teacher) / 2)
    with torch.no_grad():
        wanted = teacher(x, route="largest").softmax(1)  # of the first view
    for name in ("R1", "R2", "S"):
        torch.testing.assert_close(out.targets[name], wanted)
    assert all(p.grad is None for p in external.parameters())


def test_zero_gradients_stop_momentum_and_decay():
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    used.grad, unused.grad = torch.tensor([0.0, 1.0, 0.0]), torch.zeros(3)
    drop_zero_gradients([used, unused])
    torch.optim.SGD([used, unused], 0.1, weight_decay=0.5).step()
    assert torch.equal(unused.detach(), torch.ones(3))
    assert torch.allclose(used.detach(), torch.tensor([0.95, 0.85, 0.95]))


def labels_for(net, images) -> torch.Tensor:
    return torch.randint(0, net.num_classes, (len(images),))


def noise_for(net, images) -> torch.Tensor:
    shape = (len(images), net.num_gates, 4) if net.num_gates > 1 else (len(images), 4)
    return 30 * torch.randn(shape)


@pytest.mark.parametrize("estimator", ["mixture", "mask"])
@pytest.mark.parametrize("sgs", ["try_best", "give_up", "ladder", "none"])
def test_stage2_forward_is_the_sampled_route(net, images, estimator, sgs):
    torch.manual_seed(6)
    y, noise = labels_for(net, images), noise_for(net, images)
    if estimator == "mask" and not net.maskable:
        with pytest.raises(UserError, match="use the mixture estimator"):
            stage2_step(net, images, y, noise=noise, estimator=estimator)
        return
    out = stage2_step(net, images, y, noise=noise, estimator=estimator, sgs=sgs)
    dynamic = net(images, noise=noise)
    space = torch.tensor(net.routing_space)
    assert torch.equal(space[out.sample.choice.view(len(images), -1)], dynamic.routes)
    assert len(dynamic.routes.unique()) > 1
    expected = dynamic.logits
    assert torch.allclose(out.logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    mean = dynamic.madds.double().mean() / net.madds(net.routing_space[-1], images.shape[-1])
    assert float(out.losses["complexity"]) == pytest.approx(float(mean) ** 2, rel=1e-5)
    correct = torch.stack([net(images, route=k) for k in net.routing_space], 1).argmax(2)
    correct = correct == y[:, None]
    if sgs == "none":
        assert out.targets is None
    else:
        last = torch.full_like(y, 3)
        easy = correct[:, 0] | (~correct[:, 3] if sgs == "give_up" else False)
        ladder = torch.where(correct.any(1), correct.int().argmax(1), last)
        expected = ladder if sgs == "ladder" else torch.where(easy, 0, last)
        assert torch.equal(out.targets, expected)


def test_mixture_gradient_is_the_difference_between_routes(net, images):
    """d loss / d g_k is the loss's gradient along route k's logits: exact counterfactual credit.

    With several gates that is the last gate's, whose stage outputs are the class logits.
    """
    torch.manual_seed(7)
    y, noise = labels_for(net, images), noise_for(net, images) / 30
    head = net.gate_heads()[-1]
    stage2_step(net, images, y, noise=noise, sgs="none", lambda_cplx=0.0, smoothing=0.0)
    last, space = net.num_gates - 1, net.routing_space
    path = net(images, noise=noise).routes.tolist()
    logits, routes = [], []
    for n, (*before, _) in enumerate(path):
        features, gate_input = net.front(images[n : n + 1])
        for gate, k in enumerate(before):
            features, gate_input = net.stage(net.enter(features, gate, k), gate, k)
        logits.append(net.gate_logits(gate_input.detach(), last))
        runs = [net.stage(net.enter(features, last, k), last, k).features for k in space]
        routes.append(torch.stack(runs, 1))
    logits, routes = torch.cat(logits), torch.cat(routes).detach()
    soft = (logits + (noise[:, last] if last else noise)).softmax(1)
    hard = F.one_hot(soft.argmax(1), 4).float()
    z = torch.einsum("nk,nkc->nc", hard, routes)
    dz = (z.softmax(1) - F.one_hot(y, net.num_classes)) / len(y)
    dg = torch.einsum("nc,nkc->nk", dz, routes)
    dl = soft * (dg - (dg * soft).sum(1, keepdim=True))
    expected = torch.autograd.grad(logits, head, dl)[0].view_as(head)
    scale = float(expected.abs().max())
    assert torch.allclose(head.grad, expected, rtol=1e-3, atol=1e-4 * scale)


def test_credit_of_an_early_gate_is_the_effect_of_its_stage(families, randomize, images_of):
    """Finite differences in the weights of the mixture, with soft decisions held constant."""
    torch.manual_seed(11)
    net = randomize(families["resnet"]()).double().requires_grad_(False)
    x = images_of(net).double()[:2]
    space, gates = net.routing_space, torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def mixed(weights):
        features = net.widen(net.front(x).features, 0)
        for gate in range(3):
            runs = [net.stage(net.enter(features, gate, k), gate, k).features for k in space]
            wide = torch.stack([net.widen(run, gate + 1) for run in runs], 1)
            features = torch.einsum("nk,nk...->n...", weights[:, gate], wide)
        return features.sum()

    (gradient,) = torch.autograd.grad(mixed(gates), gates)
    direction = torch.randn_like(gates)
    with torch.no_grad():
        ahead, behind = mixed(gates + 1e-7 * direction), mixed(gates - 1e-7 * direction)
    slope = float((ahead - behind) / 2e-7)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_value_gates_learn_what_each_route_is_worth(net, images):
    torch.manual_seed(9)
    net, images, y = net.double(), images.double(), labels_for(net, images)
    torch.manual_seed(5)
    out = stage2_step(net, images, y, gate_loss="value")
    torch.manual_seed(5)
    path = torch.randint(4, (net.num_gates,)).tolist()
    routes = torch.stack([net(images, route=k) for k in net.routing_space], 1).softmax(2)
    target = routes[torch.arange(len(y)), :, y]
    terms = []
    features, gate_input = net.front(images)
    for gate, j in enumerate(path):
        scores = net.gate_logits(gate_input, gate).sigmoid()
        scores = scores.clamp(1e-40, 1 - 1e-15)
        terms.append(-(target * scores.log() + (1 - target) * (1 - scores).log()).mean())
        k = net.routing_space[j]
        features, gate_input = net.stage(net.enter(features, gate, k), gate, k)
    assert float(out.loss) == pytest.approx(float(sum(terms) / len(terms)), rel=1e-4)
    assert all(bool(head.grad.any()) for head in net.gate_heads())


def test_mask_gradient_reaches_the_gate_through_masks_and_statistics(randomize):
    torch.manual_seed(8)
    net = randomize(DSConvNet(stage_widths=((2, 3), (2, 4)), depths=(1, 1), gate_outputs=2))
    net = net.double()
    features = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    gate = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: net.masked_rest(features, g, (0, 1)), gate)


def test_stage2_leaves_the_supernet_as_it_was(net, images):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    stage2_step(net, images, torch.zeros(len(images), dtype=torch.int64))
    assert net.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_official_scale_and_double_softmax(net, images):
    y = torch.zeros(len(images), dtype=torch.int64)
    noise = 0 * noise_for(net, images)
    out = stage2_step(net, images, y, noise=noise, sgs_on="probs", scale="1e9")
    mean = net(images).madds.double().mean()
    assert float(out.losses["complexity"]) == pytest.approx(float(mean / 1e9) ** 2, rel=1e-5)
    gates = out.sample.soft.view(len(images), -1, 4).unbind(1)
    double = [F.cross_entropy(soft, out.targets, label_smoothing=0.1) for soft in gates]
    assert torch.allclose(out.losses["sgs"], torch.stack(double).mean())


def test_unknown_estimators_are_named(net, images):
    with pytest.raises(UserError, match="mixture"):
        stage2_step(net, images, torch.zeros(9, dtype=torch.int64), estimator="reinforce")
    with pytest.raises(UserError, match="ascending"):
        stage2_step(net, images, torch.zeros(9, dtype=torch.int64), routing_space=(3, 1, 2, 0))


def test_a_teacher_left_in_training_mode_teaches_with_its_own_statistics(student, teacher, batch):
    x, y = batch
    twin = copy.deepcopy(student)
    expected = stage1_step(twin, teacher, x, y, (1, 2), ensemble=True)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    actual = stage1_step(student, teacher.train(), x, y, (1, 2), ensemble=True)
    assert teacher.training
    assert all(torch.equal(teacher.state_dict()[k], v) for k, v in before.items())
    for name, target in expected.targets.items():
        assert torch.equal(actual.targets[name], target)
    assert actual.outputs is actual.logits


@pytest.mark.parametrize("estimator", ["mixture", "mask"])
def test_stage2_leaves_an_unfrozen_supernet_without_gradients(student, batch, estimator):
    x, y = batch
    for parameter in student.gate_parameters():
        parameter.requires_grad_(False)  # as Stage I leaves them
    flags = [p.requires_grad for p in student.parameters()]
    stage2_step(student, x, y, estimator=estimator)
    gate = {id(p) for p in student.gate_parameters()}
    assert all((p.grad is not None) == (id(p) in gate) for p in student.parameters())
    assert [p.requires_grad for p in student.parameters()] == flags
    assert student.training
