import csv

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from ds_net_plus import report
from ds_net_plus.evaluate import (
    Point,
    RouteTable,
    gain_at_equal_madds,
    point_of,
    saving_at_equal_accuracy,
)
from ds_net_plus.report.common import madds_unit, route_names, short

MADDS = (10_000_000, 20_000_000, 40_000_000)
# 10 images, 3 routes: 4, 7 and 9 of them are right, so the static curve is 40, 70, 90 %
FIRST_CORRECT = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
LATENCY = report.Latency([1.0, 1.5, 4.0], [1.2, 2.0], "batch 2")


def build_table(hard: torch.Tensor | None = None) -> RouteTable:
    first = torch.tensor(FIRST_CORRECT)
    labels = torch.tensor([0, 1] * 5)
    correct = torch.arange(3) >= first[:, None]
    predicted = torch.where(correct, labels[:, None], 2)
    logits = torch.nn.functional.one_hot(predicted, 3).float()
    return RouteTable(torch.zeros(10, 2), torch.zeros(10, 3), logits, labels, MADDS, hard)


@pytest.fixture
def table() -> RouteTable:
    return build_table(torch.tensor([False] * 6 + [True] * 4))


@pytest.fixture
def dynamic(table) -> list[Point]:
    cheap = point_of(table, torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, 0, 0]), 0.5)  # 60 % at 12 M
    good = point_of(table, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 0]), 0.1)  # 90 % at 19 M
    return [cheap, good]


def lines(ax) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.array(line.get_xydata()) for line in ax.lines}


def line_named(ax, start: str) -> np.ndarray:
    return next(xy for name, xy in lines(ax).items() if name.startswith(start))


def texts(ax) -> str:
    return "\n".join(text.get_text() for text in ax.texts)


def test_tradeoff_draws_the_tables_numbers(table, dynamic):
    fig = report.tradeoff(table, dynamic, LATENCY)
    compute, time = fig.axes
    np.testing.assert_allclose(line_named(compute, "static"), [[10, 40], [20, 70], [40, 90]])
    np.testing.assert_allclose(line_named(compute, "dynamic"), [[12, 60], [19, 90]])
    # mixes 8/2/0 and 5/3/2 of 40, 70 and 90 %
    np.testing.assert_allclose(line_named(compute, "random"), [[12, 46], [19, 59]])
    # cheapest correct: 5 on route 0 (one of them wrong everywhere), 3 on route 1, 2 on route 2
    np.testing.assert_allclose(line_named(compute, "oracle"), [[19, 90]])
    np.testing.assert_allclose(line_named(time, "static"), [[1, 40], [1.5, 70], [4, 90]])
    np.testing.assert_allclose(line_named(time, "dynamic"), [[1.2, 60], [2, 90]])
    assert "batch 2" in time.get_xlabel()
    assert compute.get_ylim() == time.get_ylim()


def test_tradeoff_annotates_the_metrics_of_evaluate(table, dynamic):
    compute, time = report.tradeoff(table, dynamic, LATENCY).axes
    point = dynamic[1]  # the cheapest within half a point of the widest
    gain = 100 * gain_at_equal_madds(point, table)
    assert gain == pytest.approx(90 - 67)
    assert f"{gain:+.1f} points at equal MAdds" in texts(compute)
    saving = saving_at_equal_accuracy(point, table)
    assert saving == pytest.approx(40 / 19)
    assert f"{saving:.1f}× fewer MAdds at equal accuracy" in texts(compute)
    # static curve in time: 70 % at 1.5 ms, 90 % at 4 ms, so 74 % at 2 ms
    assert "+16.0 points at equal time" in texts(time)
    assert "2.0× less time at equal accuracy" in texts(time)


def test_tradeoff_does_not_hide_a_loss(table, dynamic):
    bad = point_of(table, torch.tensor([2, 2, 2, 0, 0, 0, 0, 0, 0, 2]))  # 40 % at 22 M
    slow = report.Latency(LATENCY.static, [5.0])
    compute, time = report.tradeoff(table, [bad], slow, chosen=0).axes
    assert "\N{MINUS SIGN}32.0 points at equal MAdds" in texts(compute)
    assert "2.2× more MAdds" in texts(compute)
    assert "5.0× more time" in texts(time)
    above = Point(0.0, 1.0, 25e6, (0.5, 0.0, 0.5))
    (compute,) = report.tradeoff(table, [above]).axes
    assert "1.6× fewer MAdds than the widest route" in texts(compute)


def test_tradeoff_needs_matching_points(table, dynamic):
    with pytest.raises(ValueError, match="at least one"):
        report.tradeoff(table, [])
    with pytest.raises(ValueError, match="times of"):
        report.tradeoff(table, dynamic, report.Latency([1.0, 2.0], [1.0]))


def test_headline_point_is_the_cheapest_near_the_widest(table, dynamic):
    assert report.headline_point(table, dynamic) == 1
    assert report.headline_point(table, dynamic, tolerance=0.31) == 0
    assert report.headline_point(table, dynamic[:1]) == 0


def test_route_histogram_shows_the_shares(dynamic):
    (ax,) = report.route_histogram(dynamic[1], routes=[0, 4, 13], madds=MADDS).axes
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], [50, 30, 20])
    ticks = [tick.get_text() for tick in ax.get_xticklabels()]
    assert ticks == ["route 0\n10.0 M", "route 4\n20.0 M", "route 13\n40.0 M"]


def cells(ax) -> np.ndarray:
    return np.asarray(ax.images[0].get_array(), dtype=float)


def test_class_routes_counts_by_class_and_difficulty(table):
    # class 0 has the even images, class 1 the odd ones; route 1 gets none
    choice = torch.tensor([0, 2, 0, 2, 0, 2, 0, 2, 2, 0])
    fig = report.class_routes(table, choice, ["disc", "ring"])
    shares, cost, split = fig.axes
    np.testing.assert_allclose(cells(shares), [[80, 0, 20], [20, 0, 80]])
    np.testing.assert_allclose(cells(cost), [[16], [34]])
    assert [label.get_text() for label in shares.get_yticklabels()] == ["disc", "ring"]
    easy, hard = split.containers
    np.testing.assert_allclose([bar.get_height() for bar in easy], [50, 0, 50])
    np.testing.assert_allclose([bar.get_height() for bar in hard], [50, 0, 50])


def test_class_routes_without_difficulty_drops_empty_and_middle_classes():
    choice = torch.tensor([0, 2, 0, 2, 0, 2, 0, 2, 2, 0])
    fig = report.class_routes(build_table(), choice, ["disc", "ring", "absent"])
    assert len(fig.axes) == 2
    assert len(cells(fig.axes[0])) == 2
    fig = report.class_routes(build_table(), choice, ["disc", "ring"], limit=1)
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["disc"]


def test_gate_confusion_is_normalised_by_row_and_shows_counts(table):
    choice = torch.tensor([0, 0, 0, 2, 1, 1, 2, 2, 2, 2])
    targets = report.cheapest_correct(table)
    assert targets.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, -1]
    (ax,) = report.gate_confusion(table, choice, targets).axes
    third = 100 / 3
    truth = [[75, 0, 25], [0, 2 * third, third], [0, 0, 100], [0, 0, 100]]
    np.testing.assert_allclose(cells(ax), truth)
    assert ax.texts[0].get_text() == "75 %\n3"
    ticks = [tick.get_text() for tick in ax.get_yticklabels()]
    assert ticks[0] == "route 0\n4 images"
    assert ticks[-1] == "none correct\n1 images"


def test_gate_confusion_leaves_out_targets_without_images(table):
    targets = torch.tensor([0] * 5 + [2] * 5)
    (ax,) = report.gate_confusion(table, targets, targets).axes
    np.testing.assert_allclose(cells(ax), [[100, 0, 0], [0, 0, 100]])


def drawn_images(fig: Figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in fig.axes[0].images]


def test_gallery_undoes_the_normalisation_and_groups_by_route():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    pixels = torch.rand(4, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    shape = (1, 3, 1, 1)
    images = (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    fig = report.gallery(images, torch.tensor([[2], [0], [2], [2]]), MADDS, mean=mean, std=std,
                         captions=list("abcd"), columns=2)  # fmt: skip
    shown = drawn_images(fig)
    assert len(shown) == 3  # the third image of the widest route does not fit in its row
    for image, index in zip(shown, (1, 0, 2), strict=True):
        np.testing.assert_allclose(image, pixels[index].permute(1, 2, 0), atol=1e-6)
    drawn = texts(fig.axes[0])
    assert "route 0: 10.0 M multiply-adds" in drawn
    assert "no image takes it" in drawn
    assert "75 % of the images" in drawn
    frames = [p.get_edgecolor() for p in fig.axes[0].patches if not p.get_fill()]
    assert len(frames) == 3
    assert len(set(frames)) == 2
    fig = report.gallery(images, [2, 0, 2, 2], MADDS, counts=[1, 0, 9])  # a part of ten images
    assert "90 % of the images" in texts(fig.axes[0])


def test_gallery_takes_grey_tensors_and_pil(tmp_path):
    grey = torch.linspace(-1, 1, 25).view(1, 1, 5, 5)
    (image,) = drawn_images(report.gallery(grey, [1], MADDS, mean=0.5, std=0.5))
    np.testing.assert_allclose(image.ravel(), np.linspace(0, 1, 25), atol=1e-6)
    pictures = [Image.new("RGB", (4, 4), "red"), Image.new("L", (4, 4), 255)]
    red, white = drawn_images(report.gallery(pictures, [0, 2], MADDS))
    np.testing.assert_allclose(red[0, 0], [1, 0, 0])
    np.testing.assert_allclose(white[0, 0], [1, 1, 1])
    with pytest.raises(ValueError, match="2 choices for 1"):
        report.gallery(grey, [1, 2], MADDS)
    with pytest.raises(ValueError, match="captions"):
        report.gallery(grey, [1], MADDS, captions=["a", "b"])


@pytest.mark.parametrize("draw", [report.gallery, report.cheapest_against_widest])
def test_routes_of_a_larger_set_keep_its_colours(draw):
    images, every = torch.zeros(2, 1, 3, 3), report.route_colors(4)
    fig = draw(images, [0, 1], (10, 40), routes=(0, 3), colors=[every[0], every[3]])
    frames = [p.get_edgecolor() for p in fig.axes[0].patches if not p.get_fill()]
    np.testing.assert_allclose(frames, [to_rgba(every[0]), to_rgba(every[3])])


def test_cheapest_against_widest_leaves_the_middle_out():
    images = torch.arange(8).float().view(8, 1, 1, 1).expand(8, 1, 3, 3) / 8
    choice = [0, 1, 2, 0, 1, 2, 0, 0]
    fig = report.cheapest_against_widest(images, choice, MADDS, columns=1, rows=2)
    shown = [float(8 * image[0, 0]) for image in drawn_images(fig)]
    assert shown == pytest.approx([0, 3, 2, 5])


def write_log(path):
    names = ["step", "train/loss_L", "train/loss_R1", "train/loss_R2", "train/loss_S",
             "train/loss_extra", "val/top1_0", "val/top1_10", "val/top1_largest"]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        for step in range(3):
            losses = dict(zip(names[1:5], (1.0, 1.25, 1.5, 2.0), strict=True))
            writer.writerow({"step": step, **{k: v - 0.25 * step for k, v in losses.items()}})
        writer.writerow({"step": 2, "val/top1_0": 0.5, "val/top1_10": 0.625})
        writer.writerow({"step": 2, "val/top1_largest": 0.75})


def test_training_curves_read_lightnings_sparse_log(tmp_path):
    write_log(tmp_path / "metrics.csv")
    losses, accuracy = report.training_curves(tmp_path / "metrics.csv").axes
    np.testing.assert_allclose(line_named(losses, "L"), [[0, 1], [1, 0.75], [2, 0.5]])
    np.testing.assert_allclose(line_named(losses, "S"), [[0, 2], [1, 1.75], [2, 1.5]])
    assert len(losses.lines) == 4
    assert list(lines(accuracy)) == ["largest", "route 10", "route 0"]
    np.testing.assert_allclose(line_named(accuracy, "route 10"), [[2, 62.5]])


def test_training_curves_of_rows():
    rows = [{"step": 4, "val/top1_0": 0.5}, {"step": 9, "val/top1_0": 0.75}]
    losses, accuracy = report.training_curves(rows).axes
    assert not losses.lines
    np.testing.assert_allclose(line_named(accuracy, "route 0"), [[4, 50], [9, 75]])
    with pytest.raises(ValueError, match="neither"):
        report.training_curves([{"step": 1, "loss": 2.0}])


def test_speedup_bars_and_the_ideal():
    rows = [{"route": 0, "madds": 10, "ms": 2.0, "big": 4.0},
            {"route": 4, "madds": 40, "ms": 5.0, "big": 16.0}]  # fmt: skip
    (ax,) = report.speedup_bars(rows, {"ms": "batch 1", "big": "batch 32"}).axes
    heights = [[bar.get_height() for bar in container] for container in ax.containers]
    np.testing.assert_allclose(heights, [[2.5, 1], [4, 1]])
    np.testing.assert_allclose([line.get_ydata()[0] for line in ax.lines], [4, 1])
    with pytest.raises(ValueError, match="no route"):
        report.speedup_bars([])


def test_comparison_rows_hold_the_tables_numbers(table, dynamic):
    rows = report.comparison_rows(table, dynamic, LATENCY)
    assert [row.kind for row in rows] == ["static"] * 3 + ["dynamic"] * 2 + ["random", "oracle"]
    assert [row.top1 for row in rows] == pytest.approx([0.4, 0.7, 0.9, 0.6, 0.9, 0.59, 0.9])
    assert [row.ms for row in rows] == [1.0, 1.5, 4.0, 1.2, 2.0, None, None]
    assert rows[4].gain == pytest.approx(gain_at_equal_madds(dynamic[1], table))
    assert rows[5].madds == pytest.approx(19e6)


def test_comparison_table_as_markdown(table, dynamic):
    text = report.comparison_table(
        report.comparison_rows(table, dynamic, LATENCY), color=False, routes=[0, 4, 13]
    )
    grid = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert grid[0][-1] == "% on route 0/4/13"
    assert grid[6] == [
        "dynamic, tau 0.1", "90.00", "19.0", "0.47", "2.00", "0.50", "+23.00", "50/30/20"
    ]  # fmt: skip
    assert "\x1b" not in text
    assert len({len(row) for row in grid}) == 1


def test_comparison_table_without_times_and_in_colour(table, dynamic):
    rows = report.comparison_rows(table, dynamic)
    assert "ms" not in report.comparison_table(rows, color=False)
    assert "\x1b[1m" in report.comparison_table(rows, color=True)
    assert "\x1b" not in report.comparison_table(rows)  # pytest's output is no terminal


def test_save_all_writes_every_picture(tmp_path, table, dynamic):
    figures = {
        "tradeoff": report.tradeoff(table, dynamic, LATENCY, title="Both"),
        "gallery": report.gallery(torch.rand(3, 3, 8, 8), [0, 0, 2], MADDS),
    }
    paths = report.save_all(figures, tmp_path / "new")
    assert [path.name for path in paths] == ["tradeoff.png", "gallery.png"]
    for path in paths:
        with Image.open(path) as image:
            assert image.width > 800
            assert np.asarray(image.convert("L")).std() > 5


def test_names_units_and_colours():
    assert route_names(2, [4, 13]) == ["route 4", "route 13"]
    with pytest.raises(ValueError, match="1 route indices for 2"):
        route_names(2, [3])
    assert madds_unit(133e6) == (1e6, "M")
    assert madds_unit(4.1e9) == (1e9, "G")
    assert [short(v) for v in (0.28712, 4.5, 55.53, 1107.0)] == ["0.287", "4.50", "55.5", "1107"]
    for count in (1, 2, 4, 14):
        assert len(set(report.route_colors(count))) == count
