"""The detector: padded maps, losses, grouped execution, costs, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_net_plus.model import Detector, DSConvNet, DSMobileNet, DSResNet, DynamicNet
from ds_net_plus.model.detector import default_scales
from tenfold.errors import UserError


def build(net: DynamicNet, **options) -> Detector:
    torch.manual_seed(0)
    arguments = {"num_classes": 3, "levels": (4, 8), "extras": 1, "width": 32, **options}
    return Detector(net, **arguments)


@pytest.fixture
def detector(net) -> Detector:
    """On each family in small, with random statistics and gates that use several routes."""
    return build(net, levels=sorted(net.map_channels())[-2:]).eval()


def some_targets(batch: int, size: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    targets = []
    for n in range(batch):
        corner = torch.rand(n % 3, 2, generator=generator) * size / 2
        side = (0.2 + 0.3 * torch.rand(n % 3, 2, generator=generator)) * size
        labels = torch.randint(0, 3, (n % 3,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + side], 1), "labels": labels})
    return targets


def centred_gates(net: DynamicNet) -> None:
    """Moves the logits of the first gate by a constant of the first batch, so that routes differ.

    Those of later gates may come from a group of one image, whose mean would leave ties.
    """
    plain, shift = net.gate_logits, {}

    def moved(gate_input: Tensor, gate: int = 0) -> Tensor:
        logits = plain(gate_input, gate)
        return logits if gate else logits - shift.setdefault(0, logits.mean(0))

    net.gate_logits = moved


def test_a_convolution_of_padded_maps_is_the_sliced_one(detector, images):
    net = detector.net
    for route in range(net.num_routes):
        maps = net.features(images, route=route, levels=detector.levels).maps
        for lateral, level in zip(detector.laterals, maps, strict=True):
            used = 1 + int(level.flatten(2).abs().sum((0, 2)).nonzero().max())
            conv = lateral[0]
            sliced = F.conv2d(level[:, :used], conv.weight[:, :used])
            torch.testing.assert_close(conv(level), sliced, atol=1e-5, rtol=1e-4)
            if route == 0 and isinstance(net, DSConvNet | DSMobileNet | DSResNet):
                assert used < level.shape[1]


def test_grouped_images_are_found_as_alone(detector, images):
    centred_gates(detector.net)

    def outputs(x: Tensor, route=None) -> tuple[dict[str, Tensor], Tensor]:
        features = detector.net.features(x, route=route, levels=detector.levels)
        return detector._heads(x, features.maps)[0], features.routes

    with torch.no_grad():
        together, routes = outputs(images)
        assert len(routes.unique(dim=0)) > 1
        for n in range(len(images)):
            alone, route = outputs(images[n : n + 1])
            static, _ = outputs(images[n : n + 1], tuple(routes[n].tolist()))
            assert torch.equal(route[0], routes[n])
            for key, value in together.items():
                torch.testing.assert_close(alone[key][0], value[n], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(static[key][0], value[n], atol=1e-4, rtol=1e-4)
        found, one = detector(images), detector(images[3:4])
    assert torch.equal(found.routes, routes)
    assert int(found.madds[3]) == int(one.madds[0])
    best = {key: (found.results[3][key][0], one.results[0][key][0]) for key in one.results[0]}
    for left, right in best.values():
        torch.testing.assert_close(left, right, atol=1e-2, rtol=1e-4)


def test_results_are_boxes_scores_and_classes_inside_the_image(detector, images):
    with torch.no_grad():
        found = detector(images, route=0)
    assert found.routes.tolist() == [[0] * detector.net.num_gates] * len(images)
    for result in found.results:
        assert bool((result["boxes"] >= 0).all())
        assert bool((result["boxes"] <= images.shape[-1]).all())
        assert set(result["labels"].tolist()) <= {0, 1, 2}
        assert bool((result["scores"].diff() <= 0).all())
        assert len(result["scores"]) <= 200


def test_losses_are_those_of_torchvision(detector, images):
    targets = some_targets(len(images), images.shape[-1])
    ours = detector.losses(images, targets, route=1)
    features = detector.net.features(images, route=1, levels=detector.levels).maps
    outputs, anchors = detector._heads(images, features)
    wanted = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets]
    matched = [detector._match(anchors, t["boxes"]) for t in wanted]
    theirs = detector.ssd.compute_loss(wanted, outputs, [anchors] * len(images), matched)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value)


def test_images_without_objects_have_no_loss(detector, images):
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}] * len(images)
    losses = detector.losses(images, empty, route=0)
    assert all(loss.item() == 0 for loss in losses.values())


def test_images_with_objects_have_matched_anchors(detector, images):
    targets = some_targets(len(images), images.shape[-1])
    matched = detector.image_losses(images, targets, "largest").matched
    assert (matched > 0).tolist() == [len(t["boxes"]) > 0 for t in targets]


def test_costs_of_the_head_are_counted(detector, images):
    counted: list[int] = []

    def count(conv: nn.Module, inputs: tuple, output: Tensor) -> None:
        counted.append(conv.weight.numel() * output.shape[-1] * output.shape[-2])

    head = [*detector.laterals, *detector.extras, detector.ssd.head]
    convs = [m for part in head for m in part.modules() if isinstance(m, nn.Conv2d)]
    hooks = [conv.register_forward_hook(count) for conv in convs]
    size = images.shape[-1]
    with torch.no_grad():
        found = detector(images, route=1)
    for hook in hooks:
        hook.remove()
    assert sum(counted) == detector.head_madds(size)
    assert int(found.madds[0]) == detector.net.madds(1, size) + sum(counted)


def test_odd_sizes_count_and_run():
    detector = build(DSConvNet()).eval()
    with torch.no_grad():
        found = detector(torch.randn(1, 1, 75, 75), route=3)
    maps = [
        m.shape[-1]
        for m in detector.maps(
            detector.net.features(torch.randn(1, 1, 75, 75), route=0, levels=(4, 8)).maps
        )
    ]
    assert maps == [19, 10, 5]
    assert int(found.madds[0]) == detector.net.madds(3, 75) + detector.head_madds(75)


def test_ssd300_on_ds_mbnet_has_its_maps():
    from ds_net_plus.model import create_model

    detector = Detector(create_model("ds_mbnet"), 20).eval()
    with torch.no_grad():
        levels = detector.net.features(torch.randn(1, 3, 300, 300), 0, detector.levels).maps
        maps = detector.maps(levels)
    assert [m.shape[1] for m in levels] == [264, 640, 1152]
    assert [m.shape[-1] for m in maps] == [38, 19, 10, 5, 3, 2]
    assert default_scales(6, 8) == pytest.approx([0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05])


def test_bf16_autocast_keeps_boxes_exact(detector, images):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = detector(images, route=1)
    assert found.results[0]["boxes"].dtype == torch.float32


def test_an_untrained_gate_is_refused(images, detector):
    detector.net.gate_trained = False
    with pytest.raises(UserError, match="gate"):
        detector(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes 0"),
        ({"width": 24}, "width 24"),
        ({"extras": -1}, "extras -1"),
        ({"levels": (8, 4)}, "ascend"),
        ({"levels": (4, 64)}, "no feature map of stride 64"),
        ({"scales": [0.1, 0.2]}, "3 maps need 4 scales, got 2"),
    ],
)
def test_sizes_that_mean_nothing(options, message):
    with pytest.raises(UserError, match=message):
        build(DSConvNet(), **options)
