"""Figures: what is drawn where, read back from the artists and from the pixels."""

import itertools
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image

from tenfold.errors import UserError
from tenfold.plotting import (
    DPI,
    FAINT,
    PALETTE,
    PAPER,
    Tile,
    TileGroup,
    bars,
    curve,
    describe,
    figure,
    heatmap,
    image_grid,
    legend,
    points,
    save,
    settle_labels,
    style,
)
from tenfold.plotting.logs import read_log, smooth
from tenfold.plotting.tidy import check_tidy


def pixels_of(fig: Figure) -> np.ndarray:
    """The drawn figure as (H, W, 3) in 0..1, first row on top."""
    canvas = FigureCanvasAgg(fig)
    with style():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255.0


def linear(rgb: np.ndarray) -> np.ndarray:
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb_linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) from linear sRGB."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.cbrt(to_xyz @ rgb_linear.clip(0, 1) / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Full protanopia, deuteranopia and tritanopia after Machado, Oliveira and Fernandes, 2009.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


@pytest.mark.parametrize("vision", VISION)
def test_palette_is_told_apart_by_everyone(vision: str) -> None:
    seen = [lab(VISION[vision] @ linear(np.array(to_rgb(c)))) for c in (*PALETTE, PAPER)]
    distances = [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)]
    # A difference of 2.3 is just noticeable; thin lines and small dots need several times that.
    assert min(distances) > 10


def test_nothing_global_is_touched(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    fig, (ax,) = figure()
    curve(ax, [1, 2], [3, 4], label="x", y_error=[0.1, 0.1])
    points(ax, [1.5], [3.0], labels=["p"])
    describe(ax, title="t", x="x", y="y")
    legend(ax)
    save(fig, tmp_path / "a.png")
    assert dict(mpl.rcParams) == before


def test_neither_pyplot_nor_torch_is_imported() -> None:
    code = (
        "import sys, tenfold.plotting as p; f, (a,) = p.figure(); p.curve(a, [0, 1], [0, 1]);"
        "p.image_grid([p.TileGroup('g', [p.Tile([[0.0, 1.0]])])]);"
        "print(sorted({'matplotlib.pyplot', 'torch', 'tkinter'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_save_writes_a_png_of_the_right_size_and_the_same_bytes(tmp_path: Path) -> None:
    def draw() -> Figure:
        fig, (ax,) = figure(5, 3)
        curve(ax, [1, 2, 3], [1, 4, 9], label="squares")
        points(ax, [2], [4], labels=["four"])
        return fig

    first = save(draw(), tmp_path / "deep" / "er" / "a.png")
    second = save(draw(), tmp_path / "b.png")
    with Image.open(first) as image:
        assert image.format == "PNG"
        assert image.size == (5 * DPI, 3 * DPI)
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(UserError, match=r"written as \.png"):
        save(draw(), tmp_path / "a.jpg")


def test_panels_come_row_by_row() -> None:
    fig, panels = figure(8, 6, rows=2, columns=3)
    assert len(panels) == 6
    fig.draw_without_rendering()
    boxes = [ax.get_position() for ax in panels]
    assert boxes[0].x0 < boxes[1].x0 < boxes[2].x0
    assert boxes[0].y0 > boxes[3].y1


def segments(fig: Figure) -> list[list[tuple[float, float]]]:
    """Every error bar of the first panel, as data points."""
    found = [c for c in fig.axes[0].collections if isinstance(c, LineCollection)]
    return [[tuple(p) for p in s] for c in found for s in np.asarray(c.get_segments()).tolist()]


def test_curve_draws_line_error_bars_and_band() -> None:
    fig, (ax,) = figure()
    line = curve(
        ax, [1, 2], [10, 20], x_error=[0.5, 0.25], y_error=[[1, 2], [3, 4]], band=([5, 6], [30, 31])
    )
    assert line.get_xydata().tolist() == [[1, 10], [2, 20]]
    assert segments(fig) == [
        [(0.5, 10), (1.5, 10)],
        [(1.75, 20), (2.25, 20)],
        [(1, 9), (1, 13)],
        [(2, 18), (2, 24)],
    ]
    (band,) = [c for c in ax.collections if not isinstance(c, LineCollection)]
    corners = {tuple(p) for p in band.get_paths()[0].vertices.tolist()}
    assert {(1, 5), (2, 6), (1, 30), (2, 31)} <= corners


def test_curves_take_the_palette_in_turn() -> None:
    _, (ax,) = figure()
    assert [curve(ax, [0, 1], [i, i]).get_color() for i in range(3)] == list(PALETTE[:3])


def hidden_ink(fig: Figure) -> dict[str, float]:
    """Share of coloured pixels under every label, seen with the labels taken off."""
    settle_labels(fig)
    labels = [t for t in fig.axes[0].texts if isinstance(t, Annotation)]
    boxes = {label.get_text(): label.get_window_extent() for label in labels}
    for label in labels:
        label.set_visible(False)
    image = pixels_of(fig)
    for label in labels:
        label.set_visible(True)
    # Lines and markers are coloured; paper, grid and axes are grey.
    coloured = np.ptp(image, axis=-1) > 0.15
    height = image.shape[0]
    shares = {}
    for text, box in boxes.items():
        rows = slice(int(height - box.y1), int(height - box.y0) + 1)
        shares[text] = float(coloured[rows, int(box.x0) : int(box.x1) + 1].mean())
    return shares


def test_labels_cover_no_lines_no_points_and_not_each_other() -> None:
    fig, (ax,) = figure()
    x = np.linspace(0, 10, 60)
    curve(ax, x, np.sin(x), marker="", label="sine")
    curve(ax, x, np.cos(x), marker="", label="cosine")
    at = np.linspace(0.3, 9.7, 11)
    points(ax, at, np.sin(at), labels=[f"label {i}" for i in range(11)], y_error=[0.05] * 11)
    legend(ax)
    shares = hidden_ink(fig)
    assert len(shares) == 11
    assert max(shares.values()) == 0.0
    labels = [t for t in ax.texts if isinstance(t, Annotation)]
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.overlaps(ax.get_legend().get_window_extent()) for box in boxes)
    # Every label stays beside its own point, within the panel.
    for label, box, px, py in zip(labels, boxes, at, np.sin(at), strict=True):
        x0, y0 = ax.transData.transform((px, py))
        gap = np.hypot(max(box.x0 - x0, x0 - box.x1, 0), max(box.y0 - y0, y0 - box.y1, 0))
        assert gap < 14 * DPI / 72, label.get_text()
        assert ax.bbox.x0 <= box.x0 < box.x1 <= ax.bbox.x1


def test_a_free_label_sits_above_its_point() -> None:
    fig, (ax,) = figure()
    points(ax, [0, 1, 2], [0, 1, 2], labels=["", "here", ""])
    settle_labels(fig)
    label = ax.texts[1]
    assert label.xyann[0] == pytest.approx(0, abs=1e-6)
    assert label.xyann[1] > 0


def test_a_label_for_every_point_or_none() -> None:
    _, (ax,) = figure()
    points(ax, [0, 1], [0, 1])
    assert len(ax.texts) == 0
    with pytest.raises(ValueError, match="1 labels for 2 points"):
        points(ax, [0, 1], [0, 1], labels=["a"])


def test_bars_stand_in_groups_with_their_values() -> None:
    fig, (ax,) = figure()
    bars(ax, ["p", "q"], {"a": [1.0, 2.0], "b": [3.0, 4.0]}, errors={"b": [0.5, 0.25]})
    by_height = {bar.get_height(): bar for bar in ax.patches}
    centre = {h: bar.get_x() + bar.get_width() / 2 for h, bar in by_height.items()}
    assert set(centre) == {1.0, 2.0, 3.0, 4.0}
    # Symmetric about the ticks 0 and 1, series in the given order, bars apart from one another.
    assert centre[1.0] + centre[3.0] == pytest.approx(0.0)
    assert centre[2.0] + centre[4.0] == pytest.approx(2.0)
    assert centre[1.0] + by_height[1.0].get_width() <= centre[3.0]
    assert centre[3.0] - centre[1.0] < centre[2.0] - centre[3.0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["p", "q"]
    assert [t.get_text() for t in ax.texts] == ["1.0", "2.0", "3.0", "4.0"]
    heights = [[y for _, y in segment] for segment in segments(fig)]
    assert heights == [[2.5, 3.5], [3.75, 4.25]]
    with pytest.raises(ValueError, match="'a' has 1 values for 2 groups"):
        bars(ax, ["p", "q"], {"a": [1.0]})


def cell_colours(fig: Figure, rows: int, columns: int) -> np.ndarray:
    """Colour (rows, columns, 3) of every cell, off its centre where the text stands."""
    image = pixels_of(fig)
    cells = [(column + 0.35, row + 0.35) for row in range(rows) for column in range(columns)]
    x, y = fig.axes[0].transData.transform(cells).astype(int).T
    return image[image.shape[0] - y, x].reshape(rows, columns, 3)


def test_heatmap_writes_readable_values_into_its_cells() -> None:
    values = np.linspace(-5, 95, 20).reshape(4, 5)
    fig, (ax,) = figure()
    heatmap(ax, values, rows=list("abcd"), columns=list("vwxyz"), fmt="{:.0f}")
    assert [t.get_text() for t in ax.get_yticklabels()] == list("abcd")
    assert ax.texts[0].get_text() == "\N{MINUS SIGN}5"
    cells = cell_colours(fig, 4, 5)
    luminances = []
    for text, (row, column) in zip(ax.texts, itertools.product(range(4), range(5)), strict=True):
        assert text.get_position() == (column, row)
        weights = np.array([0.2126, 0.7152, 0.0722])
        cell = float(weights @ linear(cells[row, column]))
        ink = float(weights @ linear(np.array(to_rgb(text.get_color()))))
        contrast = (max(cell, ink) + 0.05) / (min(cell, ink) + 0.05)
        assert contrast >= 3.0, (row, column)
        luminances.append(cell)
    assert all(a > b for a, b in itertools.pairwise(luminances))  # darker means more


def test_heatmap_diverges_from_its_centre_and_skips_nan() -> None:
    fig, (ax,) = figure()
    heatmap(ax, [[-1.0, 0.0, 3.0, np.nan]], rows=["a"], columns=list("wxyz"), centre=0.0)
    assert len(ax.texts) == 3
    low, middle, high, empty = cell_colours(fig, 1, 4)[0]
    assert low[0] > low[2]  # orange below the centre
    assert high[2] > high[0]  # blue above it
    assert np.ptp(middle) < 0.02
    assert middle.min() > 0.9
    assert empty == pytest.approx(np.array(to_rgb(FAINT)), abs=0.01)
    with pytest.raises(ValueError, match=r"values are \(1, 2\), names \(1, 1\)"):
        heatmap(ax, [[1.0, 2.0]], rows=["a"], columns=["b"])


def colours_in(fig: Figure) -> set[tuple[int, ...]]:
    image = (pixels_of(fig) * 255).round().astype(int)
    return {tuple(c) for c in np.unique(image.reshape(-1, 3), axis=0).tolist()}


def test_image_grid_shows_the_pictures_their_frames_and_texts() -> None:
    red, blue = np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8)
    red[..., 0], blue[2] = 200, 1.0
    group = TileGroup(
        "Route 0",
        [Tile(red, "a red one", frame=PALETTE[2]), Tile(blue), Tile(np.full((4, 8), 0.6))],
        note="12 M",
        color=PALETTE[4],
    )
    fig = image_grid([group, TileGroup("Empty", [])], columns=2, title="Gallery")
    seen = colours_in(fig)
    green = tuple(round(255 * c) for c in to_rgb(PALETTE[2]))
    stroke = tuple(round(255 * c) for c in to_rgb(PALETTE[4]))
    assert {(200, 0, 0), (0, 0, 255), (153, 153, 153), green, stroke, (255, 255, 255)} <= seen
    texts = {t.get_text() for t in fig.axes[0].texts}
    assert {"Gallery", "Route 0", "12 M", "a red one", "Empty"} <= texts
    for text in fig.axes[0].texts:
        box = text.get_window_extent()
        assert 0 <= box.x0 <= box.x1 <= fig.bbox.x1, text.get_text()
        assert 0 <= box.y0 <= box.y1 <= fig.bbox.y1, text.get_text()


def test_image_grid_keeps_pictures_upright_and_in_proportion() -> None:
    picture = np.ones((10, 20, 3))
    picture[:5, :10] = (1.0, 0.0, 0.0)  # red in the upper left corner
    fig = image_grid([TileGroup("g", [Tile(picture, frame="#000000")])], columns=3, tile=1.0)
    image = pixels_of(fig)
    reddish = (image[..., 0] > 0.9) & (image[..., 1] < 0.1)
    rows, columns = np.nonzero(reddish)
    assert columns.max() - columns.min() == pytest.approx(0.5 * DPI, abs=4)
    assert rows.max() - rows.min() == pytest.approx(0.25 * DPI, abs=4)
    outline = (image.max(axis=-1) < 0.05).nonzero()
    assert rows.mean() < outline[0].mean()
    assert columns.mean() < outline[1].mean()


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((2, 2, 5)), r"not \(2, 2, 5\)"),
        (np.zeros(4), r"not \(4,\)"),
        (np.full((2, 2), 3.0), r"values in 3\.\.3, not 0\.\.1"),
        (np.full((2, 2), np.nan), "not 0..1"),
    ],
)
def test_image_grid_refuses_what_is_no_picture(picture: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_grid([TileGroup("g", [Tile(picture)])])


def test_a_log_is_read_column_by_column(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("step,loss,lr,never,note\n1,2.5,,,\n2,,0.1,,hot\n3,1.5,0.2,,\n,7,,,\n")
    found = read_log(file)
    assert set(found) == {"loss", "lr"}
    np.testing.assert_array_equal(found["loss"], [[1, 3], [2.5, 1.5]])
    np.testing.assert_array_equal(found["lr"], [[2, 3], [0.1, 0.2]])
    rows = [{"step": 1, "loss": 2.5}, {"step": 3, "loss": 1.5, "lr": None}]
    np.testing.assert_array_equal(read_log(rows)["loss"], found["loss"])


@pytest.mark.parametrize(("parts", "half"), [(20, 3), (25, 2)])
def test_smoothing_is_a_centred_mean(parts, half):
    values = np.random.default_rng(0).random(120)
    want = [values[max(0, k - half) : k + half + 1].mean() for k in range(120)]
    np.testing.assert_allclose(smooth(values, parts), want)


def test_smoothing_leaves_out_what_is_no_number():
    values = np.ones(203)
    values[100] = np.nan
    np.testing.assert_array_equal(smooth(values), 1)
    assert np.isnan(smooth(np.full(3, np.nan))).all()


def test_what_cannot_be_read_is_named():
    def written(*texts: tuple[float, float, str]) -> Figure:
        fig = Figure(figsize=(4, 3))
        for x, y, text in texts:
            fig.text(x, y, text)
        return fig

    check_tidy(written((0.1, 0.1, "one"), (0.1, 0.5, "two"), (0.5, 0.1, "three"), (0.1, 0.1, " ")))
    with pytest.raises(AssertionError, match="'far away' leaves the figure"):
        check_tidy(written((0.1, 0.1, "one"), (0.9, 0.5, "far away")))
    with pytest.raises(AssertionError, match="'one' lies over 'two'"):
        check_tidy(written((0.5, 0.5, "three"), (0.1, 0.1, "one"), (0.11, 0.12, "two")))
    with pytest.raises(AssertionError, match="without a word"):
        check_tidy(written())
