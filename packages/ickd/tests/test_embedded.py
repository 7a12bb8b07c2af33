"""The embedded tasks' networks against the specification's figures and a functional copy."""

import pytest
import torch
from torch.nn import functional as F

from ickd.model.embedded import (
    EMBEDDED,
    blobs_student,
    blobs_teacher,
    gratings_student,
    gratings_teacher,
)
from tenfold.distillation import loss_class

GRATINGS = ("gratings-teacher", "gratings-student")
BLOBS = ("blobs-teacher", "blobs-student")


def lively(name, **options):
    """A network in float64 and eval mode whose norms have moved away from the identity."""
    torch.manual_seed(0)
    net = EMBEDDED[name](**options).double().eval()
    for key, value in net.state_dict().items():
        if value.ndim == 1 and value.is_floating_point():
            positive = key.endswith(("weight", "var")) and value.min() > 0
            value.copy_(torch.rand_like(value) + 0.5 if positive else torch.randn_like(value) / 2)
    return net


def images(name, batch=3):
    size = 24 if name.startswith("blobs") else 16
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize(
    ("build", "classes", "expected"),
    [
        (gratings_teacher, 16, 44_692),
        (gratings_teacher, 3, 44_055),
        (gratings_student, 16, 15_556),
        (gratings_student, 3, 14_919),
        (blobs_teacher, 6, 63_082),
        (blobs_student, 6, 8_152),
    ],
)
def test_parameter_counts(build, classes, expected):
    net = build(classes)
    assert sum(p.numel() for p in net.parameters()) == expected
    assert net.num_classes == classes


def test_default_classes():
    assert [EMBEDDED[name]().num_classes for name in (*GRATINGS, *BLOBS)] == [3, 3, 6, 6]
    assert set(EMBEDDED) == {*GRATINGS, *BLOBS}


# ------------------------------------------------------------------------------- the function


class Weights:
    """Convolutions and norms by their keys, applied with torch's functions or by hand."""

    def __init__(self, net):
        self.state = net.state_dict()

    def conv(self, key, x, stride=1, dilation=1):
        weight = self.state[f"{key}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, None, stride, padding, dilation)

    def norm(self, key, x):
        weight, bias, mean, var = (
            self.state[f"{key}.{part}"][None, :, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv_norm(self, key, x, stride=1, dilation=1):
        return self.norm(f"{key}.1", self.conv(f"{key}.0", x, stride, dilation))


def relu(x):
    return x.clamp_min(0)


def gratings_by_hand(name, net, x):
    """Maps before their ReLU, and logits."""
    w = Weights(net)
    before = [w.conv_norm("stages.0.body", x)]
    for stage, stride in ((1, 2), (2, 2), (3, 1)):
        key, x = f"stages.{stage}.body", relu(before[-1])
        if name == "gratings-student":
            before.append(w.conv_norm(key, x, stride))
        else:
            inner = relu(w.conv_norm(f"{key}.conv1", x, stride))
            beside = w.conv_norm(f"{key}.shortcut", x, stride)
            before.append(w.conv_norm(f"{key}.conv2", inner) + beside)
    pooled = relu(before[-1]).flatten(2).sum(2) / 16
    return before, pooled @ w.state["fc.weight"].T + w.state["fc.bias"]


def doubling(size):
    """Bilinear interpolation to twice the size: every new pixel lies a quarter off an old one."""
    matrix = torch.zeros(2 * size, size, dtype=torch.float64)
    for new in range(2 * size):
        near, side = new // 2, 1 if new % 2 else -1
        matrix[new, near] += 0.75
        matrix[new, min(max(near + side, 0), size - 1)] += 0.25
    return matrix


def blobs_by_hand(name, net, x):
    w = Weights(net)
    before = [w.conv_norm("stages.0.body", x)]
    trunk = w.conv_norm("stages.1.body.0", relu(before[0]), stride=2)
    for layer, dilation in ((2, 2), (4, 4), (6, 1)) if name == "blobs-teacher" else ():
        trunk = w.conv_norm(f"stages.1.body.{layer}", relu(trunk), dilation=dilation)
    before += [trunk, w.conv_norm("stages.2.body", relu(trunk))]
    scores = torch.einsum("kc,bcyx->bkyx", w.state["head.weight"][:, :, 0, 0], relu(before[-1]))
    scores = scores + w.state["head.bias"][None, :, None, None]
    up = doubling(12)
    return before, torch.einsum("Yy,bkyx,Xx->bkYX", up, scores, up)


@pytest.mark.parametrize("name", [*GRATINGS, *BLOBS])
@torch.no_grad()
def test_the_network_equals_a_functional_copy(name):
    net, x = lively(name), images(name)
    by_hand = gratings_by_hand if name in GRATINGS else blobs_by_hand
    before, logits = by_hand(name, net, x)
    taps = net.taps(x)
    assert logits.std() > 0.1
    assert torch.allclose(net(x), logits, rtol=1e-9, atol=1e-10)
    assert len(before) == len(taps.preacts) == len(taps.maps)
    for ours, theirs, after in zip(before, taps.preacts, taps.maps, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)
        assert torch.equal(after, relu(theirs))


# ------------------------------------------------------------------------------------ the taps


@pytest.mark.parametrize("name", [*GRATINGS, *BLOBS])
@torch.no_grad()
def test_hooks_see_what_taps_gives(name):
    net, x = lively(name), images(name)
    modules = dict(net.named_modules())
    seen = {}
    for key in modules:
        modules[key].register_forward_hook(lambda _m, _x, out, key=key: seen.update({key: out}))
    logits = net(x)
    seen = dict(seen)
    taps = net.taps(x)
    assert torch.equal(taps.logits, logits)
    stages = net.tap_names[: len(taps.maps)]
    assert len(net.tap_names) == len(net.tap_channels)
    for key, width, after, before in zip(
        stages, net.tap_channels[: len(stages)], taps.maps, taps.preacts, strict=True
    ):
        assert torch.equal(seen[key], after)
        assert torch.equal(seen[f"{key}.body"], before)
        assert after.shape[1] == width
    assert torch.equal(seen[net.tap_names[-1]], taps.signal("last"))
    assert taps.signal("last").shape[1] == net.tap_width


@pytest.mark.parametrize("name", GRATINGS)
@torch.no_grad()
def test_the_taps_of_a_classifier(name):
    taps = lively(name).taps(images(name))
    shapes = [(12, 16, 16), (12, 8, 8), (24, 4, 4), (48, 4, 4)]
    assert [tuple(f.shape[1:]) for f in taps.maps] == shapes
    assert taps.last is None
    assert float(taps.signal("last").min()) == 0
    assert torch.allclose(taps.pooled, taps.maps[-1].mean((2, 3)))


@pytest.mark.parametrize(("name", "width"), [("blobs-teacher", 20), ("blobs-student", 10)])
@torch.no_grad()
def test_the_taps_of_a_segmenter(name, width):
    taps = lively(name).taps(images(name))
    shapes = [(width, 24, 24), (2 * width, 12, 12), (32, 12, 12)]
    assert [tuple(f.shape[1:]) for f in taps.maps] == shapes
    assert taps.pooled is None
    assert taps.logits.shape == (3, 6, 24, 24)
    assert taps.last is taps.preacts[-1]
    assert float(taps.last.min()) < 0  # before its ReLU


def test_larger_images_are_taken():
    assert gratings_student()(torch.randn(2, 3, 32, 40)).shape == (2, 3)
    assert blobs_student()(torch.randn(2, 3, 32, 40)).shape == (2, 6, 32, 40)


@pytest.mark.parametrize(
    ("student", "teacher", "losses"),
    [
        ("gratings-student", "gratings-teacher", ["kd", "ickd", "at", "vid", "fitnet", "sp"]),
        ("blobs-student", "blobs-teacher", ["kd", "ickd", "ickd_grid", "at"]),
    ],
)
def test_losses_find_what_they_compare(student, teacher, losses):
    torch.manual_seed(0)
    x = images(student, 4).float()
    nets = EMBEDDED[student](), EMBEDDED[teacher]().eval()
    ours, theirs = nets[0].taps(x), nets[1].taps(x)
    for name in losses:
        options = {"grid": (6, 6)} if name == "ickd_grid" else {}
        loss = loss_class(name).for_taps(ours, theirs, **options)
        (value,) = loss.terms(ours, theirs, {}).values()
        nets[0].zero_grad()
        value.backward(retain_graph=True)
        stem = nets[0].stages[0].body[0].weight.grad
        assert torch.isfinite(stem).all()
        assert stem.abs().max() > 0
