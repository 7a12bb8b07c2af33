import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ickd import report
from ickd.diagnostics import (
    Diversity,
    cell_distances,
    cell_icc,
    diversity,
    fit_channel_map,
)
from ickd.report.cells import mosaic
from ickd.report.common import PLAIN, STUDENT, around, loss_colors
from ickd.report.order import ChannelOrder
from ickd.report.segmentation import class_colors, overlay
from tenfold.plotting.tidy import check_tidy

MINUS = "\N{MINUS SIGN}"


def blocks(batch: int = 40, seed: int = 0) -> Tensor:
    """Maps of 12 channels in three groups that fire together, in a mixed order."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(batch, 3, 4, 4, generator=generator, dtype=torch.float64)
    own = torch.randn(batch, 12, 4, 4, generator=generator, dtype=torch.float64)
    return groups[:, GROUP_OF] + 0.3 * own


GROUP_OF = [0, 1, 2, 0, 1, 2, 2, 1, 0, 0, 1, 2]


@pytest.fixture(scope="module")
def found() -> list[Diversity]:
    """Diagnostics of a teacher, of a student near to it, and of one that is not."""
    teacher = blocks()
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    students = teacher[:, :10] + 0.3 * noise[:, :10], noise[:, :8].double()
    lifts = [fit_channel_map(s[::2], teacher[::2]) for s in students]
    held_out = [
        diversity(s[1::2], teacher[1::2], lift) for s, lift in zip(students, lifts, strict=True)
    ]
    return [diversity(teacher[1::2]), *held_out]


@pytest.fixture(scope="module")
def triptych(found) -> Figure:
    return report.icc_triptych(*found)


def texts(ax: Axes) -> str:
    """All that is written in and over a panel."""
    return "\n".join(
        [ax.get_title("left"), ax.get_title(), *(text.get_text() for text in ax.texts)]
    )


def titled(fig: Figure, start: str) -> Axes:
    return next(ax for ax in fig.axes if texts(ax).strip().startswith(start))


def picture(ax: Axes) -> np.ndarray:
    return np.ma.filled(np.asarray(ax.images[0].get_array(), float), np.nan)


# -- order --------------------------------------------------------------------------------------


def test_the_order_brings_groups_together(found):
    order = report.cluster_channels(found[0].icc.numpy(), groups=3)
    assert sorted(order.channels) == list(range(12))
    groups = [GROUP_OF[c] for c in order.channels]
    assert len(list(itertools.groupby(groups))) == 3  # contiguous
    assert order.borders == [4, 8]
    assert order.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_the_order_does_not_depend_on_the_given_order(found):
    matrix = found[0].icc.numpy()
    shuffled = np.random.default_rng(0).permutation(12)
    one = report.cluster_channels(matrix, 3).arrange(matrix)
    again = matrix[np.ix_(shuffled, shuffled)]
    other = report.cluster_channels(again, 3).arrange(again)
    np.testing.assert_allclose(np.sort(one.ravel()), np.sort(other.ravel()))
    for ordered in (one, other):  # neighbours are alike
        assert np.diag(ordered, 1).mean() > 0.7 > 3 * np.abs(matrix).mean() / 2


def test_arranging_moves_rows_and_columns():
    order = ChannelOrder(np.array([2, 0, 1]), np.array([0, 1, 1]))
    matrix = np.arange(9.0).reshape(3, 3)
    np.testing.assert_array_equal(order.arrange(matrix), [[8, 6, 7], [2, 0, 1], [5, 3, 4]])
    assert order.borders == [1]


def test_the_order_of_dead_channels_and_of_one():
    matrix = np.eye(5)
    matrix[3:] = 0
    order = report.cluster_channels(matrix, 2)
    assert sorted(order.channels) == list(range(5))
    assert abs(np.flatnonzero(order.channels >= 3) @ [1, -1]) == 1  # side by side
    assert report.cluster_channels(np.ones((1, 1))).channels.tolist() == [0]


# -- triptych -----------------------------------------------------------------------------------


def test_the_triptych_shows_the_matrices_in_one_order(found, triptych):
    order = report.cluster_channels(found[0].icc.numpy())
    names = ("Teacher", "Distilled student", "Plain student")
    matrices = [titled(triptych, name) for name in names]
    for ax, network in zip(matrices, found, strict=True):
        np.testing.assert_allclose(picture(ax), order.arrange(network.icc.numpy()))
    pairs = found[0].icc.numpy()[~np.eye(12, dtype=bool)]
    norms = [ax.images[0].norm for ax in matrices]
    assert {norm.vcenter for norm in norms} == {np.median(pairs)}  # one scale for all
    np.testing.assert_allclose([norm.vmax for norm in norms], 1.0)
    for network, start in zip(found[1:], ("Distilled student −", "Plain student −"), strict=True):
        ax = titled(triptych, start)
        gap = network.icc.numpy() - found[0].icc.numpy()
        np.testing.assert_allclose(picture(ax), order.arrange(gap))
        assert ax.images[0].norm.vmax == -ax.images[0].norm.vmin > 0
        assert f"{np.abs(gap[~np.eye(12, dtype=bool)]).mean():.2f}" in texts(ax)


def test_the_triptych_tells_the_figures(found):
    fig = report.icc_triptych(*found, names=("A", "B", "C"), heading="All of it")
    assert "12 channels" in texts(titled(fig, "A"))
    assert f"10 channels · ICC distance {found[1].icc_distance:.3f}" in texts(titled(fig, "B"))
    assert f"8 channels · ICC distance {found[2].icc_distance:.3f}" in texts(titled(fig, "C"))
    figures = titled(fig, "Diversity")
    wanted = [network.effective_rank for network in found]
    lengths = [bar.get_width() for bar in figures.patches[:3]]
    np.testing.assert_allclose(lengths, 0.72 * np.array(wanted) / max(wanted))
    for network in found:
        assert f"{network.effective_rank:.1f}" in texts(figures)
        assert f"{100 * network.homology_ratio:.1f}" in texts(figures)
    assert fig.get_suptitle() == "All of it"


def test_the_histogram_has_all_pairs_and_the_spectrum_all_values(found, triptych):
    steps = titled(triptych, "All pairs").patches
    shares = [patch.get_data().values.sum() for patch in steps]
    np.testing.assert_allclose(shares, 100)
    curves = [line for line in titled(triptych, "Singular").lines if len(line.get_xdata()) > 1]
    for line, network in zip(curves, found, strict=True):
        np.testing.assert_allclose(line.get_ydata(), 100 * network.spectrum.numpy())
    dots = [line for line in titled(triptych, "Singular").lines if len(line.get_xdata()) == 1]
    ranks = [float(np.asarray(line.get_xdata())[0]) for line in dots]
    np.testing.assert_allclose(ranks, [network.effective_rank for network in found])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_triptych_is_tidy(found, count):
    heading = "Which channels fire together" if count == 3 else ""
    check_tidy(report.icc_triptych(*found[:count], heading=heading))


def test_a_distance_from_a_poor_fit_is_marked(found, grids):
    fig = report.icc_triptych(*found, doubtful=[2])
    plain = f"{found[2].icc_distance:.3f}"
    assert f"ICC distance {plain} (unreliable)" in texts(titled(fig, "Plain student\n"))
    assert "unreliable" not in texts(titled(fig, "Distilled student\n"))
    assert f"{plain} ?" in texts(titled(fig, "Diversity"))
    assert "Unreliable (?)" in fig.get_supxlabel()
    check_tidy(fig)
    assert "Unreliable" not in report.icc_triptych(*found).get_supxlabel()
    fig = report.icc_cells(*grids, doubtful=[1])
    assert "(unreliable)" in texts(titled(fig, "Distilled student: ICC"))
    assert "(unreliable)" not in texts(titled(fig, "Plain student: ICC"))
    check_tidy(fig)


def test_the_triptych_explains_itself(found):
    words = " ".join(report.icc_triptych(*found).get_supxlabel().split())
    for part in ("linear map", "clustering", "|correlation| over all pixels above 0.5", "0 to 4"):
        assert part in words
    alone = report.icc_triptych(found[0]).get_supxlabel()
    assert "clustering" in alone
    assert "linear map" not in alone


def test_a_single_network_has_no_difference(found):
    fig = report.icc_triptych(found[0], names=("timm:resnet18",))
    assert len([ax for ax in fig.axes if ax.images]) == 1
    assert "ICC distance" not in texts(titled(fig, "Diversity"))


def test_students_that_were_not_lifted_are_refused(found):
    with pytest.raises(ValueError, match="lift the students"):
        report.icc_triptych(found[0], diversity(blocks()[:, :7]))


def test_the_triptych_survives_equal_and_dead_channels():
    dead = blocks()
    dead[:, 3:] = 0
    one = diversity(dead)
    check_tidy(report.icc_triptych(one, one))
    same = diversity(blocks()[:, :1].repeat(1, 6, 1, 1))
    check_tidy(report.icc_triptych(same))


def test_colours_reach_both_ways_from_the_centre():
    norm = around(0.5, np.array([0.1, 0.2, 0.9]), quantile=0.0)
    assert (norm.vmin, norm.vcenter, norm.vmax) == (0.1, 0.5, 0.9)
    flat = around(0.5, np.full(4, 0.5))
    assert flat.vmin < 0.5 < flat.vmax


# -- cells --------------------------------------------------------------------------------------


def cells(student: Tensor, teacher: Tensor, own: bool = False) -> report.CellCorrelations:
    lift = None if own else fit_channel_map(student, teacher)
    distances = None if own else cell_distances(student, teacher, (2, 2), lift)
    return report.CellCorrelations(cell_icc(student, (2, 2), "cosine", lift), distances, 40)


@pytest.fixture(scope="module")
def grids() -> list[report.CellCorrelations]:
    teacher = blocks()
    near, far = teacher[:, :10] + 0.1 * blocks(seed=1)[:, :10], blocks(seed=2)[:, :8]
    return [cells(teacher, teacher, own=True), cells(near, teacher), cells(far, teacher)]


def test_a_mosaic_places_every_cell():
    order = ChannelOrder(np.array([1, 0]), np.array([0, 0]))
    values = np.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    whole = mosaic(values, order)
    assert whole.shape == (5, 8)  # 2 + 1 + 2 rows, 2 + 1 + 2 + 1 + 2 columns
    np.testing.assert_array_equal(whole[:2, :2], [[3, 2], [1, 0]])
    np.testing.assert_array_equal(whole[3:, 6:], order.arrange(values[1, 2]))
    assert np.isnan(whole[2]).all()
    assert np.isnan(whole[:, [2, 5]]).all()
    assert np.isfinite(whole).sum() == values.size


def test_cells_show_matrices_and_distances(grids):
    image = np.random.default_rng(0).random((8, 8, 3))
    fig = report.icc_cells(*grids, image=image)
    order = report.cluster_channels(grids[0].icc.mean((0, 1)).numpy())
    shown = picture(titled(fig, "Plain student\n"))
    np.testing.assert_allclose(shown, mosaic(grids[2].icc.numpy(), order))
    for name, network in zip(("Distilled", "Plain"), grids[1:], strict=True):
        ax = titled(fig, f"{name} student: ICC distance")
        np.testing.assert_allclose(picture(ax), network.distances.numpy())
        assert f"mean of 40 images {float(network.distances.mean()):.3f}" in texts(ax)
        assert f"{float(network.distances[1, 0]):.2f}" in texts(ax)
    np.testing.assert_array_equal(picture(titled(fig, "Image")), image)
    assert len(titled(fig, "Image").lines) == 2  # one line each way between 2x2 cells
    check_tidy(fig)
    check_tidy(report.icc_cells(*grids[:2], heading="Without an image"))


def test_cells_refuse_what_does_not_belong_together(grids):
    teacher, student, _ = grids
    with pytest.raises(ValueError, match="different grids"):
        report.icc_cells(teacher, student._replace(icc=student.icc[:1]))
    many = teacher._replace(icc=teacher.icc[:1].repeat(9, 1, 1, 1))
    with pytest.raises(ValueError, match="9x2 cells cannot be seen"):
        report.icc_cells(many, many)
    with pytest.raises(ValueError, match="distances"):
        report.icc_cells(teacher, teacher)


# -- training -----------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path) -> Path:
    path = tmp_path / "metrics.csv"
    names = ["epoch", "step", "train/loss", "train/ce", "train/kd", "train/ickd", "train/at"]
    names += ["train/dead_student", "val/top1", "val/teacher"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for step in range(10, 101, 10):
            terms = {"train/ce": 2 / step, "train/kd": 3.0, "train/ickd": 1.5, "train/at": 0.5}
            writer.writerow({"step": step, "train/loss": 9, "train/dead_student": 0.1, **terms})
        for step, top1 in ((50, 0.4), (100, 0.6)):
            writer.writerow({"step": step, "val/top1": top1})
        writer.writerow({"step": 50, "val/teacher": 0.875})
    return path


def lines(ax: Axes) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.array(line.get_xydata()) for line in ax.lines}


def test_training_curves_read_the_log(log):
    plain = [{"step": 50, "val/top1": 0.3}, {"step": 100, "val/top1": 0.35}]
    fig = report.training_curves(log, {"plain student": plain})
    terms, scores = (lines(ax) for ax in fig.axes)
    named = {name for name in terms if not name.startswith("_")}
    logits, correlation = "kd: the teacher's logits", "ickd: channel correlation"
    assert named == {"ce: labels", logits, correlation, "at"}
    np.testing.assert_allclose(terms["ce: labels"], [[k, 2 / k] for k in range(10, 101, 10)])
    np.testing.assert_allclose(terms[logits][:, 1], 3.0)
    np.testing.assert_allclose(terms[correlation][:, 1], 1.5)
    np.testing.assert_allclose(scores["distilled student"], [[50, 40], [100, 60]])
    np.testing.assert_allclose(scores["plain student"], [[50, 30], [100, 35]])
    np.testing.assert_allclose(scores["teacher"][:, 1], 87.5)
    assert fig.axes[1].get_ylabel() == "validation top-1 (%)"
    check_tidy(fig)


def test_training_curves_of_segmentation_and_of_nothing():
    fig = report.training_curves([{"step": 1, "val/miou": 0.5}, {"step": 1, "train/ce": 1.0}])
    assert fig.axes[1].get_ylabel() == "validation mIoU (%)"
    check_tidy(fig)
    for alone in ({"train/ce": 1.0}, {"val/top1": 0.5}):  # no empty half, and a dot is seen
        fig = report.training_curves([{"step": 1, **alone}, {"step": 2}], heading="Seed 3")
        (ax,) = fig.axes
        assert ax.lines[-1].get_marker() == "o"
        assert fig.get_suptitle() == "Seed 3"
        check_tidy(fig)
    with pytest.raises(ValueError, match="neither terms"):
        report.training_curves([{"step": 1, "lr": 0.1}])


# -- comparison ---------------------------------------------------------------------------------

ROWS = [
    report.LossRow("none", (74.0, 75.0, 73.0), None, 0.020, 0),
    report.LossRow("kd", (80.0, 81.0, 79.9), (6.3, 5.7, 6.9), 0.0201, 512),
    report.LossRow("ickd", (80.5, 80.6, 80.7), (6.6, 4.0, 9.2), 0.021, 18_000),
    report.LossRow("kd+ickd@2", (81.5, 81.6, 81.7), (7.6, 5.0, 10.2), 0.0215, 18_512),
    report.LossRow("nst", (73.0, 73.5, 72.8), (-0.9, -2.0, 0.2), 0.04, 900_000),
]


def test_dots_show_seeds_means_and_gains():
    fig = report.dots(ROWS, teacher=87.7)
    seeds, gains = fig.axes
    names = [label.get_text() for label in seeds.get_yticklabels()]
    assert names == ["nst", "none", "kd", "ickd", "kd+ickd@2"]  # the best on top
    drawn = {tuple(np.round(line.get_xdata(), 6)) for line in seeds.lines if line.get_marker()}
    for row in ROWS:
        assert tuple(row.scores) in drawn
        assert (round(row.mean, 6),) in drawn
    assert any(list(line.get_xdata()) == [87.7, 87.7] for line in seeds.lines)
    intervals = [tuple(line.get_xdata()) for line in gains.lines if len(line.get_xdata()) == 2]
    assert (4.0, 9.2) in intervals
    assert {"+6.6", "+7.6", f"{MINUS}0.9"} <= set(texts(gains).split("\n"))
    assert "paired over 3 seeds, with 95 % intervals" in texts(gains)
    (explained,) = fig.legends
    named = [text.get_text() for text in explained.get_texts()]
    assert sorted(named) == ["plain student (mean)", "teacher"]
    check_tidy(fig)
    fig = report.dots(ROWS, score="mIoU")
    assert texts(fig.axes[0]).startswith("mIoU\n")
    check_tidy(fig)


def test_dots_of_a_single_seed_have_no_interval():
    row = report.LossRow("ickd", (80.0,), (5.0, float("-inf"), float("inf")))
    fig = report.dots([report.LossRow("none", (75.0,)), row], teacher=float("nan"))
    assert "single seed" in texts(fig.axes[1])
    assert not [line for line in fig.axes[1].lines if tuple(line.get_xdata()) == row.gain[1:]]
    assert len(report.dots([row._replace(gain=None)]).axes) == 1
    with pytest.raises(ValueError, match="scores in each"):
        report.dots([row._replace(scores=())])


def test_the_scatter_joins_what_nothing_beats():
    fig = report.accuracy_against_cost(ROWS)
    (ax,) = fig.axes
    (front,) = [np.array(line.get_xydata()) for line in ax.lines if line.get_linestyle() == ":"]
    want = [[20.0, 74.0], [20.1, 80.3], [21.0, 80.6], [21.5, 81.6]]
    np.testing.assert_allclose(front, want)
    assert {text.get_text() for text in ax.texts} == {row.losses for row in ROWS}
    assert "(ms)" in ax.get_xlabel()
    check_tidy(fig)
    memory = report.accuracy_against_cost(ROWS, "memory")
    assert "(KiB)" in memory.axes[0].get_xlabel()
    check_tidy(memory)


def test_the_scatter_leaves_out_what_was_not_measured():
    rows = [*ROWS[:2], report.LossRow("at", (77.0,))]
    (ax,) = report.accuracy_against_cost(rows).axes
    assert [text.get_text() for text in ax.texts] == ["none", "kd"]
    with pytest.raises(ValueError, match="memory measured"):
        report.accuracy_against_cost([rows[-1]], "memory")


def test_losses_with_ickd_have_its_colour():
    colors = loss_colors(["none", "kd", "kd+ickd@2", "ickd_grid"])
    assert colors["none"] == PLAIN
    assert colors["ickd_grid"] == STUDENT
    assert len(set(colors.values())) == 4  # beside others it has one of its own


# -- segmentation -------------------------------------------------------------------------------


def test_grid_bars_are_differences_to_the_plain_student():
    rows = {"none": [65.0, 66.0], "1×1": [63.0, 64.0], "6×6": [69.0, 69.2], "kd": [69.5]}
    fig = report.grid_bars(rows, teacher=75.8)
    (ax,) = fig.axes
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], [-2.0, 3.6, 4.0])
    ticks = [label.get_text() for label in ax.get_xticklabels()]
    assert ticks == ["1×1\n63.5", "6×6\n69.1", "kd\n69.5"]
    assert "plain student 65.5 % · teacher 75.8 %" in texts(ax)
    assert {f"{MINUS}2.0", "+3.6", "+4.0"} <= set(texts(ax).split("\n"))
    assert to_rgba(STUDENT, 0.85) == ax.patches[1].get_facecolor() != ax.patches[2].get_facecolor()
    check_tidy(fig)
    for rows in ({"1×1": [13.8, 13.9], "6×6": [20.0]}, {"1×1": [13.8], "6×6": [60.0]}):
        check_tidy(report.grid_bars({"none": [36.9], **rows}, teacher=50.0))
    for bad in ({"none": [1.0]}, {"1×1": [1.0], "2×2": [1.0]}, {"none": [], "1×1": [1.0]}):
        with pytest.raises(ValueError, match="none"):
            report.grid_bars(bad)


def test_an_overlay_paints_classes_over_grey():
    photo = np.zeros((1, 3, 3))
    photo[0, :, 0] = 0.9  # grey of 0.3
    painted = overlay(photo, np.array([[0, 1, 255]]), 2)
    np.testing.assert_allclose(painted[0, 0], 0.3)
    np.testing.assert_allclose(
        painted[0, 1], 0.32 * 0.3 + 0.68 * np.array(to_rgb(class_colors(2)[1]))
    )
    np.testing.assert_allclose(painted[0, 2], 1.0)
    with_background = overlay(photo, np.array([[0, 1, 255]]), 2, background=None)
    assert not np.allclose(with_background[0, 0], 0.3)


def test_class_colours_are_apart():
    colors = np.array(class_colors(21))
    gaps = np.abs(colors[:, None] - colors[None]).max(2) + np.eye(21)
    assert gaps.min() > 0.05


def test_overlays_tell_the_iou_of_each_image():
    truth = torch.zeros(2, 4, 4, dtype=torch.int64)
    truth[0, :2] = 1
    truth[1, :, :2] = 2
    truth[1, 0, 0] = 255
    student, plain = truth.clone(), torch.zeros_like(truth)
    student[1, 0, 0] = 1  # where there is no truth
    student[0, 0, 0] = 2
    images = torch.rand(2, 3, 4, 4)
    names = ("background", "a", "b", "never")
    fig = report.segmentation_overlays(images, truth, student, plain, class_names=names)
    panels = np.array(fig.axes).reshape(2, 4)
    heads = [ax.get_title("left") for ax in panels[0]]
    assert heads == ["Image", "Truth", "Distilled student", "Plain student"]
    # class 0 whole, 7 of 8 pixels of class 1, and class 2 for nothing
    assert panels[0, 2].get_xlabel() == f"mIoU {100 * (1 + 7 / 8 + 0) / 3:.0f}"
    assert panels[1, 2].get_xlabel() == "mIoU 100"
    assert panels[0, 3].get_xlabel() == f"mIoU {100 * (8 / 16 + 0) / 2:.0f}"
    np.testing.assert_allclose(picture(panels[1, 0]), images[1].permute(1, 2, 0).numpy())
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    check_tidy(fig)


def test_overlays_take_bytes_and_refuse_other_sizes():
    images = torch.randint(256, (1, 3, 6, 4), dtype=torch.uint8)
    truth = torch.zeros(1, 6, 4, dtype=torch.int64)
    fig = report.segmentation_overlays(
        images, truth, truth, truth, truth, class_names=["only"], background=None, heading="One"
    )
    shown = picture(fig.axes[0])
    np.testing.assert_allclose(shown, images[0].permute(1, 2, 0).numpy() / 255, atol=1e-6)
    check_tidy(fig)
    with pytest.raises(ValueError, match=r"distilled student is \(1, 4, 6\)"):
        report.segmentation_overlays(images, truth, truth.mT, class_names=["only"])


def test_save_all_writes_pngs(tmp_path, triptych):
    (path,) = report.save_all({"icc": triptych}, tmp_path / "new")
    assert path == tmp_path / "new" / "icc.png"
    with Image.open(path) as picture_file:
        assert min(picture_file.size) > 600
